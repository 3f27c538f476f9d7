//! Files of what must not be said: a phrase or a `/regex/` per line, in upper or lower case alike, as whole words.

use regex_automata::util::syntax;

use super::rules::{Candidate, Pattern, is_of_words};

/// Longest file, in bytes.
const LONGEST_FILE: usize = 1 << 20;
/// Longest match of a line, in bytes.
const LONGEST_MATCH: usize = 1024;

/// What a file's lines look for. Empty lines and those that begin with `#` say nothing.
///
/// # Errors
/// The first line that can't be used, and why.
pub fn parse(file: &[u8]) -> Result<Vec<Pattern>, String> {
    if file.len() > LONGEST_FILE {
        return Err(format!("has {} bytes, at most {LONGEST_FILE} are read", file.len()));
    }
    let text = std::str::from_utf8(file).map_err(|error| format!("is not UTF-8: {error}"))?;
    let lines = text.trim_start_matches('\u{feff}').lines().map(str::trim).enumerate();
    let lines = lines.filter(|(_, line)| !line.is_empty() && !line.starts_with('#'));
    lines.map(|(index, line)| pattern(line).map_err(|reason| format!("line {}: {reason}", index + 1))).collect()
}

fn pattern(line: &str) -> Result<Pattern, String> {
    let regex = match line.strip_prefix('/').and_then(|rest| rest.strip_suffix('/')) {
        Some(regex) => regex.to_owned(),
        None => phrase(line),
    };
    let config = syntax::Config::new().case_insensitive(true);
    let parsed = syntax::parse_with(&regex, &config).map_err(|error| format!("no regular expression: {error}"))?;
    let properties = parsed.properties();
    if !properties.look_set().is_empty() {
        return Err("^, $ and \\b are not possible: matches are whole words anyhow".to_owned());
    }
    if properties.minimum_len().is_none_or(|least| least == 0) {
        return Err("matches nothing, or the empty text".to_owned());
    }
    match properties.maximum_len() {
        Some(most) if most <= LONGEST_MATCH => Ok(Pattern::checked(format!("(?i:{regex})"), is_whole)),
        Some(most) => Err(format!("may match {most} bytes, at most {LONGEST_MATCH} are possible")),
        None => Err("may match any length: give what repeats a bound, such as .{0,40}".to_owned()),
    }
}

/// A phrase's words, with blanks or line ends between them.
fn phrase(line: &str) -> String {
    let escape = |word: &str| {
        let mut escaped = String::new();
        for c in word.chars() {
            // An escaped angle is a border.
            if c.is_ascii_punctuation() && !matches!(c, '<' | '>') {
                escaped.push('\\');
            }
            escaped.push(c);
        }
        escaped
    };
    line.split_whitespace().map(escape).collect::<Vec<_>>().join(r"\s{1,8}")
}

/// Does not end within a word. That it does not begin in one holds for all patterns.
fn is_whole(found: &Candidate<'_>) -> bool {
    !(found.text.ends_with(is_of_words) && found.after.starts_with(is_of_words))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::guard::{Action, rules::Rules, transducer::Transducer};

    fn redacted(file: &str, text: &str) -> String {
        let rules = Rules::new([("denylist", "#", Action::Redact, parse(file.as_bytes()).unwrap())].into_iter());
        Transducer::whole(&Arc::new(rules.unwrap()), text).text
    }

    #[test]
    fn lines_are_phrases_or_regexes() {
        let file = "# secret projects\nProject X\n\n/blue(bird|fish)s?/\nc++\n項目\n";
        for (text, want) in [
            ("PROJECT\n x, project xy, my project x.", "#, project xy, my #."),
            ("Bluebirds and bluefishes", "# and bluefishes"),
            ("C++ or c+", "# or c+"),
            ("新項目的", "新#的"),
        ] {
            assert_eq!(redacted(file, text), want);
        }
    }

    #[test]
    fn what_can_not_be_used_is_named() {
        for (file, want) in [
            ("a\n/b(/", "line 2: no regular expression"),
            ("/.*/", "line 1: matches nothing"),
            ("/a.*b/", "line 1: may match any length"),
            ("/[a-z]{2000}/", "line 1: may match 6000 bytes"),
            (r"/\bfoo\b/", "line 1: ^, $ and \\b"),
        ] {
            let error = parse(file.as_bytes()).unwrap_err();
            assert!(error.starts_with(want), "{file}: {error}");
        }
        assert!(parse(b"\xff").unwrap_err().contains("UTF-8"));
    }
}
