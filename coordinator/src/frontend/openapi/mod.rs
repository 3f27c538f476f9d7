//! What all endpoints take and give: as an OpenAPI document at `GET /openapi.json`, as a page for people at `GET /docs`.
//!
//! Each API is described by a file of JSON. A test finds endpoints that no file describes, and descriptions without an
//! endpoint.

mod page;
mod schema;
#[cfg(test)]
mod tests;

use std::sync::LazyLock;

use axum::response::{IntoResponse, Response};
use http::header;
use serde_json::Value;

/// Where the document is.
pub const DOCUMENT_PATH: &str = "/openapi.json";
/// Where the page is.
pub const PAGE_PATH: &str = "/docs";

/// What belongs to no API: title, authentication, errors.
static BASE: &str = include_str!("base.json");
/// An API each. Names of schemas are unique among all of them.
static PARTS: &[&str] = &[
    include_str!("openai.json"),
    include_str!("responses.json"),
    include_str!("batches.json"),
    include_str!("anthropic.json"),
    include_str!("ollama.json"),
    include_str!("tgi.json"),
    include_str!("service.json"),
    include_str!("admin.json"),
];

static DOCUMENT: LazyLock<Value> = LazyLock::new(|| {
    let mut whole = parse(BASE);
    for part in PARTS {
        merge(&mut whole, parse(part));
    }
    whole["info"]["version"] = env!("CARGO_PKG_VERSION").into();
    whole
});
static TEXT: LazyLock<String> = LazyLock::new(|| DOCUMENT.to_string());
static PAGE: LazyLock<page::Page> = LazyLock::new(|| page::Page::of(&DOCUMENT));

fn parse(text: &str) -> Value {
    serde_json::from_str(text).expect("tests read every embedded file")
}

/// Adds what is new; what both have is gone through.
fn merge(whole: &mut Value, part: Value) {
    match (whole, part) {
        (Value::Object(whole), Value::Object(part)) => {
            for (name, value) in part {
                match whole.get_mut(&name) {
                    Some(there) => merge(there, value),
                    None => drop(whole.insert(name, value)),
                }
            }
        }
        (whole, part) => *whole = part,
    }
}

/// `GET /openapi.json`.
pub async fn document() -> Response {
    ([(header::CONTENT_TYPE, "application/json")], TEXT.as_str()).into_response()
}

/// `GET /docs`. The page fetches nothing and runs nothing, and browsers are told to keep it that way.
pub async fn page() -> Response {
    let page = &*PAGE;
    let headers = [
        (header::CONTENT_TYPE, "text/html; charset=utf-8"),
        (header::CONTENT_SECURITY_POLICY, page.policy.as_str()),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
    ];
    (headers, page.html.as_str()).into_response()
}
