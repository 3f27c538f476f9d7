//! The document as a page: one file without scripts, so that nothing has to be fetched and nothing can be run.

use std::fmt::Write as _;

use base64::{Engine, engine::general_purpose::STANDARD};
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::schema::{entries, fields, operations, referred, resolve};

const STYLE: &str = "
:root{color-scheme:light dark}
body{font:15px/1.5 system-ui,sans-serif;max-width:64rem;margin:0 auto;padding:1rem}
h1{margin-bottom:0}h2{margin-top:2rem;border-bottom:1px solid #8884}
code,pre{font:13px/1.5 ui-monospace,monospace}
pre{overflow:auto;padding:.6rem;background:#8882;border-radius:4px}
details{border:1px solid #8884;border-radius:4px;margin:.4rem 0;padding:.3rem .7rem}
summary{cursor:pointer}
summary b{display:inline-block;width:3.5rem;font:bold 12px ui-monospace,monospace}
table{border-collapse:collapse;width:100%;margin:.5rem 0}
td,th{text-align:left;vertical-align:top;padding:.2rem .6rem .2rem 0;border-top:1px solid #8883}
em{color:#888}
";

/// The page, and what browsers are told about it.
pub struct Page {
    /// As it is sent.
    pub html: String,
    /// `Content-Security-Policy`: this style, and nothing else.
    pub policy: String,
}

impl Page {
    /// Of a document.
    pub fn of(document: &Value) -> Self {
        let style = STANDARD.encode(Sha256::digest(STYLE));
        let policy = format!(
            "default-src 'none'; style-src 'sha256-{style}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        );
        Self { html: html(document), policy }
    }
}

/// A text as HTML shows it.
fn shown(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

fn text(value: &Value) -> String {
    shown(value.as_str().unwrap_or_default())
}

fn html(document: &Value) -> String {
    let mut out = String::new();
    let info = &document["info"];
    let title = text(&info["title"]);
    let _infallible = write!(
        out,
        "<!DOCTYPE html><html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" \
         content=\"width=device-width\"><title>{title} API</title><style>{STYLE}</style></head><body><h1>{title} \
         {version}</h1><p>{summary}.</p><p>{description}</p><p>For programs: <a href=\"{path}\">{path}</a></p>",
        version = text(&info["version"]),
        summary = text(&info["summary"]),
        description = text(&info["description"]),
        path = super::DOCUMENT_PATH.trim_start_matches('/'),
    );
    for tag in document["tags"].as_array().into_iter().flatten() {
        let _infallible = write!(out, "<h2>{}</h2><p>{}.</p>", text(&tag["name"]), text(&tag["description"]));
        for (path, method, operation) in operations(document) {
            if operation["tags"][0] == tag["name"] {
                write_operation(&mut out, document, path, method, operation);
            }
        }
    }
    out.push_str("<h2>Schemas</h2>");
    for (name, schema) in entries(&document["components"]["schemas"]) {
        let name = shown(name);
        let _infallible =
            write!(out, "<details id=\"schema-{name}\"><summary><code>{name}</code></summary>{}", described(schema));
        write_fields(&mut out, document, schema);
        out.push_str("</details>");
    }
    out.push_str("</body></html>\n");
    out
}

fn described(schema: &Value) -> String {
    schema["description"].as_str().map_or_else(String::new, |said| format!("<p>{}.</p>", shown(said)))
}

fn write_operation(out: &mut String, document: &Value, path: &str, method: &str, operation: &Value) {
    let _infallible = write!(
        out,
        "<details id=\"{id}\"><summary><b>{method}</b> <code>{path}</code> {summary}</summary>",
        id = text(&operation["operationId"]),
        method = method.to_ascii_uppercase(),
        path = shown(path),
        summary = text(&operation["summary"]),
    );
    let parameters = operation["parameters"].as_array().map_or(&[][..], Vec::as_slice);
    if !parameters.is_empty() {
        out.push_str("<table><tr><th>parameter</th><th>in</th><th></th></tr>");
        for parameter in parameters.iter().map(|parameter| resolve(document, parameter)) {
            let _infallible = write!(
                out,
                "<tr><td><code>{}</code></td><td>{}</td><td>{}</td></tr>",
                text(&parameter["name"]),
                text(&parameter["in"]),
                text(&parameter["description"]),
            );
        }
        out.push_str("</table>");
    }
    let body = &operation["requestBody"]["content"]["application/json"];
    if body.is_object() {
        write_fields(out, document, &body["schema"]);
        let example = serde_json::to_string_pretty(&body["example"]).unwrap_or_default();
        let _infallible = write!(out, "<pre>{}</pre>", shown(&example));
    }
    out.push_str("<table><tr><th>status</th><th></th><th>body</th></tr>");
    for (status, response) in entries(&operation["responses"]) {
        let response = resolve(document, response);
        let bodies: Vec<String> = entries(&response["content"])
            .map(|(kind, content)| format!("{} ({})", type_of(&content["schema"]), shown(kind)))
            .collect();
        let _infallible = write!(
            out,
            "<tr><td>{}</td><td>{}</td><td>{}</td></tr>",
            shown(status),
            text(&response["description"]),
            bodies.join("<br>")
        );
    }
    out.push_str("</table></details>");
}

fn write_fields(out: &mut String, document: &Value, schema: &Value) {
    let fields = fields(document, schema);
    if fields.is_empty() {
        let _infallible = write!(out, "<p>{}</p>", type_of(schema));
        return;
    }
    out.push_str("<table><tr><th>field</th><th>type</th><th></th></tr>");
    for field in fields {
        let mut notes: Vec<String> = Vec::new();
        if field.is_required {
            notes.push("<em>required</em>".to_owned());
        }
        if let Some(said) = field.schema["description"].as_str() {
            notes.push(shown(said));
        }
        let bounds = [
            ("default", "unset:"),
            ("minimum", "at least"),
            ("exclusiveMinimum", "above"),
            ("maximum", "at most"),
            ("maxItems", "entries at most:"),
            ("maxLength", "characters at most:"),
        ];
        for (keyword, said) in bounds {
            if let Some(bound) = field.schema.get(keyword) {
                notes.push(format!("{said} {}", shown(&bound.to_string())));
            }
        }
        let _infallible = write!(
            out,
            "<tr><td><code>{}</code></td><td>{}</td><td>{}</td></tr>",
            shown(field.name),
            type_of(field.schema),
            notes.join("; ")
        );
    }
    out.push_str("</table>");
}

/// A type in a few words, with links to schemas.
fn type_of(schema: &Value) -> String {
    if let Some(name) = referred(schema) {
        let name = shown(name);
        return format!("<a href=\"#schema-{name}\">{name}</a>");
    }
    if let Some(only) = schema.get("const") {
        return format!("<code>{}</code>", shown(&only.to_string()));
    }
    if let Some(choices) = schema["enum"].as_array() {
        let choices: Vec<String> =
            choices.iter().map(|choice| format!("<code>{}</code>", shown(&choice.to_string()))).collect();
        return choices.join(" ");
    }
    if let Some(choices) = schema["oneOf"].as_array() {
        return choices.iter().map(type_of).collect::<Vec<_>>().join(" or ");
    }
    match &schema["type"] {
        Value::String(kind) if kind == "array" => format!("list of {}", type_of(&schema["items"])),
        Value::String(kind) => shown(kind),
        Value::Array(kinds) => kinds.iter().map(text).collect::<Vec<_>>().join(" or "),
        _ => "anything".to_owned(),
    }
}
