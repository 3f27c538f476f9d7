//! A line of a batch: a request by name.

use serde_json::{Map, Value};

use crate::frontend::{chat, completions, error::ApiError, fields::Fields, responses};

/// Where lines may go.
pub const URLS: &[&str] = &[chat::PATH, completions::PATH, responses::PATH];
/// Longest `custom_id`, in bytes.
const LONGEST_ID: usize = 512;
/// Most bytes of a line: a body may have as many as over HTTP.
pub const LONGEST_LINE: usize = (32 << 20) + 4096;

/// A request.
#[derive(Debug, Clone, PartialEq)]
pub struct Line {
    /// Of the line in its file, from 1 on.
    pub number: usize,
    /// By what its sender knows it.
    pub custom_id: String,
    /// One of [`URLS`].
    pub url: &'static str,
    /// As it is sent there.
    pub body: Vec<u8>,
}

/// A line that is no request.
#[derive(Debug, Clone, PartialEq)]
pub struct BadLine {
    /// Of the line in its file, from 1 on.
    pub number: usize,
    /// Its name, as far as it could be read.
    pub custom_id: Option<String>,
    /// Why not.
    pub error: ApiError,
}

/// A line, one way or the other.
pub type Parsed = Result<Line, BadLine>;

/// Name of a line, if it is known.
pub fn id_of(parsed: &Parsed) -> Option<&str> {
    match parsed {
        Ok(line) => Some(&line.custom_id),
        Err(bad) => bad.custom_id.as_deref(),
    }
}

/// Reads a line. The body is looked at where it is sent to.
pub fn parse(number: usize, text: &[u8]) -> Parsed {
    let mut custom_id = None;
    let (url, body) =
        parse_fields(text, &mut custom_id).map_err(|error| BadLine { number, custom_id: custom_id.clone(), error })?;
    let Some(custom_id) = custom_id else {
        return Err(BadLine { number, custom_id, error: ApiError::missing("custom_id") });
    };
    Ok(Line { number, custom_id, url, body })
}

fn parse_fields(text: &[u8], id: &mut Option<String>) -> Result<(&'static str, Vec<u8>), ApiError> {
    if text.len() > LONGEST_LINE {
        return Err(ApiError::body_too_large(LONGEST_LINE));
    }
    let mut fields = Fields::of_body(text).map_err(|error| ApiError::bad_line(error.message()))?;
    let custom_id = fields.require::<String>("custom_id")?;
    if custom_id.is_empty() || custom_id.len() > LONGEST_ID {
        return Err(ApiError::invalid("custom_id", format!("must have 1 to {LONGEST_ID} bytes")));
    }
    *id = Some(custom_id);
    if fields.require::<String>("method")? != "POST" {
        return Err(ApiError::invalid("method", "must be \"POST\""));
    }
    let url = fields.require::<String>("url")?;
    let url = URLS.iter().copied().find(|known| *known == url);
    let url = url.ok_or_else(|| ApiError::invalid("url", format!("must be one of {}", URLS.join(", "))))?;
    let body: Map<String, Value> = fields.require::<Fields>("body")?.into_entries();
    fields.finish()?;
    if body.get("stream").is_some_and(|stream| *stream == Value::Bool(true)) {
        return Err(ApiError::invalid("body.stream", "can't be true: a batch has whole answers"));
    }
    serde_json::to_vec(&body).map(|body| (url, body)).map_err(ApiError::internal)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn good() -> Value {
        json!({"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x", "seed": 1}})
    }

    #[test]
    fn a_line_is_a_request() {
        let line = parse(3, good().to_string().as_bytes()).unwrap();
        assert_eq!((line.number, line.custom_id.as_str(), line.url), (3, "a", "/v1/completions"));
        assert_eq!(line.body, br#"{"prompt":"x","seed":1}"#);
    }

    #[test]
    fn bad_lines_say_what_is_wrong_and_whose_they_are() {
        let with = |name: &str, value: Value| {
            let mut line = good();
            line[name] = value;
            line
        };
        for (line, param, has_id) in [
            (json!([1]).to_string(), None, false),
            ("{".to_owned(), None, false),
            (with("custom_id", json!(5)).to_string(), Some("custom_id"), false),
            (with("custom_id", json!("")).to_string(), Some("custom_id"), false),
            (with("custom_id", Value::Null).to_string(), Some("custom_id"), false),
            (with("method", json!("GET")).to_string(), Some("method"), true),
            (with("url", json!("/v1/embeddings")).to_string(), Some("url"), true),
            (with("body", json!("x")).to_string(), Some("body"), true),
            (with("body", json!({"stream": true})).to_string(), Some("body.stream"), true),
            (with("color", json!(1)).to_string(), Some("color"), true),
        ] {
            let bad = parse(7, line.as_bytes()).unwrap_err();
            let got = (bad.error.param(), bad.custom_id.is_some(), bad.number);
            assert_eq!(got, (param, has_id, 7), "{line}");
            assert!(!bad.error.message().is_empty() && bad.error.code().is_some(), "{line}");
        }
    }
}
