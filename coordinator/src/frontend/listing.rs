//! Lists of what there may be much of, page by page, as OpenAI has them.

use serde::Serialize;

use super::error::ApiError;

/// A page.
#[derive(Debug, Serialize)]
pub struct Listing<T> {
    object: &'static str,
    data: Vec<T>,
    first_id: Option<String>,
    last_id: Option<String>,
    has_more: bool,
}

impl<T> Listing<T> {
    /// The same of other objects.
    pub fn map<U>(self, map: impl Fn(T) -> U) -> Listing<U> {
        let Self { object, data, first_id, last_id, has_more } = self;
        Listing { object, data: data.into_iter().map(map).collect(), first_id, last_id, has_more }
    }
}

/// Which page is asked for.
#[derive(Debug, PartialEq, Eq)]
pub struct Page {
    after: Option<String>,
    limit: usize,
    is_ascending: bool,
    filters: Vec<(String, String)>,
}

impl Page {
    /// Reads `after`, `limit`, `order`, and what the endpoint has beside these.
    pub fn of(query: Option<&str>, default: usize, most: usize, filters: &[&str]) -> Result<Self, ApiError> {
        let mut page = Self { after: None, limit: default, is_ascending: false, filters: Vec::new() };
        for pair in query.unwrap_or_default().split('&').filter(|pair| !pair.is_empty()) {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            // Ids, numbers and words: none has a character that would be escaped.
            let is_plain = value.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte));
            if !is_plain {
                return Err(ApiError::invalid(name, "has characters that no such value has"));
            }
            match name {
                "after" => page.after = Some(value.to_owned()).filter(|after| !after.is_empty()),
                "limit" => {
                    let limit = value.parse().ok().filter(|limit| (1..=most).contains(limit));
                    page.limit = limit
                        .ok_or_else(|| ApiError::invalid("limit", format!("must be an integer from 1 to {most}")))?;
                }
                "order" => {
                    page.is_ascending = match value {
                        "asc" => true,
                        "desc" => false,
                        _ => return Err(ApiError::invalid("order", "must be \"asc\" or \"desc\"")),
                    }
                }
                name if filters.contains(&name) => page.filters.push((name.to_owned(), value.to_owned())),
                name => return Err(ApiError::unknown_field(name)),
            }
        }
        Ok(page)
    }

    /// What a filter is to be.
    pub fn filter(&self, name: &str) -> Option<&str> {
        self.filters.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    /// The page, of things that come newest first.
    pub fn take<T>(&self, mut all: Vec<T>, id: impl Fn(&T) -> &String, what: &str) -> Result<Listing<T>, ApiError> {
        if self.is_ascending {
            all.reverse();
        }
        let begin = match &self.after {
            None => 0,
            Some(after) => {
                let place = all.iter().position(|one| id(one) == after);
                place.ok_or_else(|| ApiError::no_such(what, after))? + 1
            }
        };
        let has_more = all.len() - begin > self.limit;
        let data: Vec<T> = all.into_iter().skip(begin).take(self.limit).collect();
        let (first_id, last_id) = (data.first().map(|one| id(one).clone()), data.last().map(|one| id(one).clone()));
        Ok(Listing { object: "list", data, first_id, last_id, has_more })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_follow_each_other() {
        let all: Vec<String> = ["e", "d", "c", "b", "a"].map(str::to_owned).into();
        let page = |query: &str| Page::of(Some(query), 20, 100, &["purpose"]).unwrap();
        let take = |query: &str| {
            let listing = page(query).take(all.clone(), |id| id, "letter").unwrap();
            (listing.data.concat(), listing.has_more, listing.last_id)
        };
        assert_eq!(take(""), ("edcba".to_owned(), false, Some("a".to_owned())));
        assert_eq!(take("limit=2"), ("ed".to_owned(), true, Some("d".to_owned())));
        assert_eq!(take("limit=2&after=d"), ("cb".to_owned(), true, Some("b".to_owned())));
        assert_eq!(take("after=b"), ("a".to_owned(), false, Some("a".to_owned())));
        assert_eq!(take("after=a"), (String::new(), false, None));
        assert_eq!(take("order=asc&limit=1&after=a").0, "b");
        assert_eq!(page("purpose=batch").filter("purpose"), Some("batch"));
        assert_eq!(page("after=x").take(all.clone(), |id| id, "letter").unwrap_err().status(), 404);
        for wrong in ["limit=0", "limit=101", "limit=x", "order=up", "color=red", "after=%20"] {
            assert!(Page::of(Some(wrong), 20, 100, &[]).is_err(), "{wrong}");
        }
    }
}
