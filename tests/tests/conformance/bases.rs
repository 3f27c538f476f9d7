//! A schema for each keyword and its bounds. Each stands in several places of other schemas.

use serde_json::{Value, json};

/// Schemas that accept less than a validator does: not each spelling of a value, or not each order.
pub const NARROWER: &[&str] = &[];

/// What these say is no regular language, or has an exception that one leaves out: 29 February is taken in every year, and a
/// leap second in every minute. Such texts are not counted as wrong.
pub const CALENDAR: &[&str] = &["format date", "format time", "format date-time"];

/// Names and schemas.
pub fn all() -> Vec<(&'static str, Value)> {
    let mut all = types();
    all.extend(texts());
    all.extend(numbers());
    all.extend(lists());
    all.extend(objects());
    all
}

fn types() -> Vec<(&'static str, Value)> {
    vec![
        ("type boolean", json!({"type": "boolean"})),
        ("type null", json!({"type": "null"})),
        ("type integer", json!({"type": "integer"})),
        ("type number", json!({"type": "number"})),
        ("type string", json!({"type": "string"})),
        ("type array", json!({"type": "array", "items": {"type": "null"}})),
        ("type object", json!({"type": "object", "additionalProperties": {"type": "null"}})),
        ("several types", json!({"type": ["boolean", "null", "integer"]})),
        ("enum of texts", json!({"enum": ["red", "green", "a \"quoted\" one", "wei\u{df}"]})),
        ("enum of numbers", json!({"enum": [1, 2.5, -3]})),
        ("enum of anything", json!({"enum": [null, true, 7, "x", [1, 2], {"a": 1}]})),
        ("enum and type", json!({"type": "string", "enum": ["red", "blue"]})),
        ("const text", json!({"const": "abc"})),
        ("const number", json!({"const": 10})),
        ("const null", json!({"const": null})),
        ("const object", json!({"const": {"a": 1, "b": [true, "x"]}})),
        (
            "annotations",
            json!({"title": "T", "description": "d", "default": 1, "examples": [2], "type": "integer", "minimum": 1, "maximum": 5}),
        ),
    ]
}

fn texts() -> Vec<(&'static str, Value)> {
    let text = |rest: Value| {
        let mut schema = json!({"type": "string"});
        schema.as_object_mut().expect("an object").extend(rest.as_object().expect("an object").clone());
        schema
    };
    vec![
        ("minLength", text(json!({"minLength": 3}))),
        ("maxLength", text(json!({"maxLength": 2}))),
        ("both lengths", text(json!({"minLength": 2, "maxLength": 3}))),
        ("equal lengths", text(json!({"minLength": 3, "maxLength": 3}))),
        ("empty text", text(json!({"maxLength": 0}))),
        ("pattern of all", text(json!({"pattern": "^[A-Z]{2}-[0-9]{4}$"}))),
        ("pattern somewhere", text(json!({"pattern": "b"}))),
        ("pattern at the beginning", text(json!({"pattern": "^a"}))),
        ("pattern at the end", text(json!({"pattern": "c$"}))),
        ("pattern with choices", text(json!({"pattern": "^(red|green|blue)$"}))),
        ("pattern with escapes", text(json!({"pattern": "^[\"\\\\/\\n]{1,3}$"}))),
        ("pattern of letters", text(json!({"pattern": "^[\u{e4}\u{20ac}\u{1f600}a]{1,4}$"}))),
        ("pattern with classes", text(json!({"pattern": "^\\d{1,3}[ab]+$"}))),
        ("format date", text(json!({"format": "date"}))),
        ("format time", text(json!({"format": "time"}))),
        ("format date-time", text(json!({"format": "date-time"}))),
        ("format uuid", text(json!({"format": "uuid"}))),
        ("format ipv4", text(json!({"format": "ipv4"}))),
        ("format ipv6", text(json!({"format": "ipv6"}))),
    ]
}

fn numbers() -> Vec<(&'static str, Value)> {
    vec![
        ("minimum", json!({"type": "integer", "minimum": 3})),
        ("maximum", json!({"type": "integer", "maximum": 10})),
        ("range of integers", json!({"type": "integer", "minimum": -17, "maximum": 99})),
        ("one integer", json!({"type": "integer", "minimum": 7, "maximum": 7})),
        ("exclusive integers", json!({"type": "integer", "exclusiveMinimum": 9, "exclusiveMaximum": 12})),
        ("negative integers", json!({"type": "integer", "exclusiveMaximum": 0, "minimum": -1000})),
        ("range of numbers", json!({"type": "number", "minimum": 0.25, "maximum": 1.75})),
        ("exclusive numbers", json!({"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1})),
        ("numbers around zero", json!({"type": "number", "minimum": -0.5, "maximum": 0.5})),
        ("multiple of integers", json!({"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 500})),
        ("multiple", json!({"type": "integer", "multipleOf": 3, "minimum": -999, "maximum": 99_999})),
        ("bounds without a type", json!({"anyOf": [{"type": "integer", "maximum": 2}, {"type": "boolean"}]})),
    ]
}

fn lists() -> Vec<(&'static str, Value)> {
    let small = json!({"type": "integer", "minimum": 0, "maximum": 9});
    vec![
        ("minItems", json!({"type": "array", "items": small, "minItems": 2})),
        ("maxItems", json!({"type": "array", "items": small, "maxItems": 2})),
        ("both counts of items", json!({"type": "array", "items": small, "minItems": 2, "maxItems": 4})),
        ("no items", json!({"type": "array", "maxItems": 0})),
        (
            "items of lists",
            json!({"type": "array", "items": {"type": "array", "items": small, "maxItems": 2}, "minItems": 1, "maxItems": 2}),
        ),
        (
            "items of an enum",
            json!({"type": "array", "items": {"enum": ["a", "b", "c"]}, "minItems": 1, "maxItems": 3}),
        ),
        (
            "closed tuple",
            json!({"type": "array", "prefixItems": [{"const": "x"}, small, {"type": "boolean"}], "items": false, "minItems": 3}),
        ),
        (
            "open tuple",
            json!({"type": "array", "prefixItems": [small], "items": {"type": "string", "maxLength": 3}, "minItems": 1, "maxItems": 3}),
        ),
        ("tuple of some", json!({"type": "array", "prefixItems": [small, {"type": "boolean"}], "items": false})),
        (
            "items of several types",
            json!({"type": "array", "items": {"type": ["null", "boolean", "integer"]}, "maxItems": 3}),
        ),
    ]
}

fn objects() -> Vec<(&'static str, Value)> {
    let (flag, one) = (json!({"type": "boolean"}), json!({"enum": [1, 2]}));
    let closed = |properties: Value, required: Value| json!({"type": "object", "properties": properties, "required": required, "additionalProperties": false});
    vec![
        ("required properties", closed(json!({"a": one, "b": one}), json!(["a", "b"]))),
        ("optional properties", closed(json!({"a": one, "b": one}), json!([]))),
        ("one of two required", closed(json!({"a": one, "b": {"type": ["null", "integer"]}}), json!(["b"]))),
        ("no properties", closed(json!({}), json!([]))),
        (
            "odd names",
            closed(
                json!({"": flag, "a b": {"type": "null"}, "q\"": one, "\u{e9}": one}),
                json!(["", "a b", "q\"", "\u{e9}"]),
            ),
        ),
        (
            "nested",
            closed(
                json!({"a": closed(json!({"b": closed(json!({"c": one}), json!(["c"]))}), json!(["b"]))}),
                json!(["a"]),
            ),
        ),
        (
            "other properties",
            json!({"type": "object", "properties": {"a": one}, "required": ["a"], "additionalProperties": flag, "maxProperties": 2}),
        ),
        ("map", json!({"type": "object", "additionalProperties": {"type": "integer"}})),
        (
            "pattern properties",
            json!({"type": "object", "patternProperties": {"^x_[a-z]{1,3}$": one}, "additionalProperties": false, "maxProperties": 2}),
        ),
        (
            "counts of properties",
            json!({"type": "object", "additionalProperties": flag, "minProperties": 1, "maxProperties": 2}),
        ),
        (
            "required beyond properties",
            json!({"type": "object", "properties": {"a": one}, "required": ["b"], "additionalProperties": {"type": "null"}}),
        ),
    ]
}
