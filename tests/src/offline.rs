//! Files and batches as clients see them.

use std::{
    collections::BTreeMap,
    io::{Cursor, Read},
};

use serde_json::{Value, json};

/// Between the parts of a form.
const BOUNDARY: &str = "boundary-of-the-offline-tests";

/// Sends a file as it is read, for batches.
///
/// # Panics
/// If it is refused.
pub fn upload(http: &str, content: impl Read) -> Value {
    let part = |name: &str, rest: &str| {
        format!("--{BOUNDARY}\r\nContent-Disposition: form-data; name=\"{name}\"{rest}\r\n\r\n")
    };
    let file = part("file", "; filename=\"in.jsonl\"\r\nContent-Type: application/jsonl");
    let before = [part("purpose", ""), "batch\r\n".to_owned(), file].concat();
    let mut form = Cursor::new(before).chain(content).chain(Cursor::new(format!("\r\n--{BOUNDARY}--\r\n")));
    let request = ureq::post(format!("{http}/v1/files"));
    let request = request.header("content-type", format!("multipart/form-data; boundary={BOUNDARY}"));
    let request = request.config().http_status_as_error(false).build();
    let mut answer = request.send(ureq::SendBody::from_reader(&mut form)).expect("it is answered");
    let text = answer.body_mut().read_to_string().expect("the answer is text");
    assert_eq!(answer.status(), 200, "{text}");
    serde_json::from_str(&text).expect("it is a JSON text")
}

/// Lines of an output by name; each stands there once.
///
/// # Panics
/// If one stands twice.
pub fn results(text: &str) -> BTreeMap<String, Value> {
    let mut results = BTreeMap::new();
    for line in text.lines() {
        let line: Value = serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"));
        let name = line["custom_id"].as_str().unwrap_or("nobody").to_owned();
        assert!(results.insert(name.clone(), line).is_none(), "{name} stands twice");
    }
    results
}

/// What a line's answer says.
pub fn said(line: &Value) -> Value {
    let body = &line["response"]["body"];
    match body["choices"].as_array() {
        Some(choices) => json!([choices[0]["text"], choices[0]["message"]["content"], choices[0]["finish_reason"]]),
        None => body["output"][0]["content"][0]["text"].clone(),
    }
}
