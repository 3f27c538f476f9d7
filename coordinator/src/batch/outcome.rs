//! What became of a line, as OpenAI writes it.

use serde::Serialize;
use serde_json::Value;

use super::line::BadLine;

/// What became of a line.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    /// It was answered, well or not.
    Answered {
        /// HTTP status.
        status: u16,
        /// By what the server knows it.
        request_id: String,
        /// A JSON value, or a text if it is none.
        body: Value,
    },
    /// It was never asked for.
    Unasked {
        /// What programs look at.
        code: String,
        /// Why.
        message: String,
        /// The field that is wrong, if one is.
        param: Option<String>,
        /// Its line in the file.
        line: usize,
    },
}

#[derive(Serialize)]
struct Written<'a> {
    id: String,
    custom_id: Option<&'a str>,
    response: Option<Response<'a>>,
    error: Option<Failure<'a>>,
}

#[derive(Serialize)]
struct Response<'a> {
    status_code: u16,
    request_id: &'a str,
    body: &'a Value,
}

#[derive(Serialize)]
struct Failure<'a> {
    code: &'a str,
    message: &'a str,
    param: Option<&'a str>,
    line: usize,
}

impl Outcome {
    /// Of a line that is no request.
    pub fn of_bad(bad: &BadLine) -> Self {
        Self::Unasked {
            code: bad.error.code().unwrap_or("invalid_line").to_owned(),
            message: bad.error.message().to_owned(),
            param: bad.error.param().map(str::to_owned),
            line: bad.number,
        }
    }

    /// Of a line that there was no time for.
    pub fn expired(line: usize) -> Self {
        let message = "the batch's completion window was over before this line's turn".to_owned();
        Self::Unasked { code: "batch_expired".to_owned(), message, param: None, line }
    }

    /// Whether the line has what it asked for.
    pub fn is_good(&self) -> bool {
        matches!(self, Self::Answered { status: 200..=299, .. })
    }

    /// Tokens of prompt and output, as the answer counts them.
    pub fn tokens(&self) -> (u64, u64) {
        let Self::Answered { body, .. } = self else { return (0, 0) };
        let count = |names: [&str; 2]| names.iter().find_map(|name| body["usage"][*name].as_u64()).unwrap_or(0);
        (count(["prompt_tokens", "input_tokens"]), count(["completion_tokens", "output_tokens"]))
    }

    /// A line of the output, without its end.
    pub fn to_line(&self, custom_id: Option<&str>) -> Vec<u8> {
        let id = format!("batch_req_{}", uuid::Uuid::new_v4().simple());
        let (response, error) = match self {
            Self::Answered { status, request_id, body } => {
                (Some(Response { status_code: *status, request_id, body }), None)
            }
            Self::Unasked { code, message, param, line } => {
                (None, Some(Failure { code, message, param: param.as_deref(), line: *line }))
            }
        };
        serde_json::to_vec(&Written { id, custom_id, response, error }).expect("strings and numbers are JSON")
    }
}

/// A line of an output, as far as it tells what is done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DoneLine {
    /// Which; lines without a name are known by their number.
    pub of: Which,
    /// Whether it has what it asked for.
    pub is_good: bool,
}

/// Which line of the input.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Which {
    /// By its `custom_id`.
    Named(String),
    /// By its number.
    Numbered(usize),
}

/// Reads a line of an output; `None` if it is none.
pub fn parse_done(text: &[u8]) -> Option<DoneLine> {
    let value: Value = serde_json::from_slice(text).ok()?;
    value.as_object().filter(|line| line.contains_key("response") && line.contains_key("error"))?;
    let of = match &value["custom_id"] {
        Value::String(name) => Which::Named(name.clone()),
        _ => Which::Numbered(usize::try_from(value["error"]["line"].as_u64()?).ok()?),
    };
    let status = value["response"]["status_code"].as_u64();
    Some(DoneLine { of, is_good: status.is_some_and(|status| (200..300).contains(&status)) })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::batch::line;

    #[test]
    fn lines_are_as_openai_writes_them_and_say_what_is_done() {
        let body = json!({"usage": {"prompt_tokens": 3, "completion_tokens": 4}});
        let good = Outcome::Answered { status: 200, request_id: "r".to_owned(), body };
        assert_eq!((good.is_good(), good.tokens()), (true, (3, 4)));
        let text = good.to_line(Some("a"));
        let value: Value = serde_json::from_slice(&text).unwrap();
        assert!(value["id"].as_str().unwrap().starts_with("batch_req_"));
        assert_eq!((&value["custom_id"], &value["response"]["status_code"]), (&json!("a"), &json!(200)));
        assert_eq!((&value["response"]["request_id"], &value["error"]), (&json!("r"), &Value::Null));
        assert_eq!(parse_done(&text), Some(DoneLine { of: Which::Named("a".to_owned()), is_good: true }));

        let refused = Outcome::Answered { status: 400, request_id: "r".to_owned(), body: json!({"error": {}}) };
        assert_eq!(parse_done(&refused.to_line(Some("b"))).map(|line| line.is_good), Some(false));

        let bad = line::parse(9, b"nonsense").unwrap_err();
        let text = Outcome::of_bad(&bad).to_line(None);
        let value: Value = serde_json::from_slice(&text).unwrap();
        assert_eq!((&value["custom_id"], &value["response"]), (&Value::Null, &Value::Null));
        assert_eq!(value["error"]["code"], "invalid_json_line");
        assert_eq!(parse_done(&text), Some(DoneLine { of: Which::Numbered(9), is_good: false }));
    }

    #[test]
    fn other_texts_are_no_lines_of_an_output() {
        for text in ["", "{}", "[]", "nonsense", r#"{"custom_id":"a"}"#, r#"{"response":null,"error":null}"#] {
            assert_eq!(parse_done(text.as_bytes()), None, "{text}");
        }
    }
}
