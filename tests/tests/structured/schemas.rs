//! Schemas of the kinds that public suites have: each keyword, and what people combine them to. All are small, so that a
//! small model comes to an end.

use serde_json::{Value, json};

/// Names and schemas.
pub fn all() -> Vec<(&'static str, Value)> {
    let mut all = types();
    all.extend(texts());
    all.extend(numbers());
    all.extend(arrays());
    all.extend(objects());
    all.extend(combined());
    all
}

fn types() -> Vec<(&'static str, Value)> {
    vec![
        ("boolean", json!({"type": "boolean"})),
        ("null", json!({"type": "null"})),
        ("several types", json!({"type": ["boolean", "null", "integer"], "minimum": 0, "maximum": 99})),
        ("enum of texts", json!({"enum": ["red", "green", "blue", "a \"quoted\" one", "wei\u{df}"]})),
        ("enum of anything", json!({"enum": [1, null, true, "x", [1, 2], {"a": "b"}]})),
        ("const", json!({"const": {"kind": "fixed", "values": [1, 2.5, "three"]}})),
        (
            "true",
            json!({"type": "object", "properties": {"any": {"enum": [0, 1]}}, "required": ["any"], "additionalProperties": false}),
        ),
        (
            "annotations",
            json!({"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "T", "description": "d", "default": 1, "examples": [2], "type": "integer", "minimum": 1, "maximum": 5}),
        ),
    ]
}

fn texts() -> Vec<(&'static str, Value)> {
    let mut all = vec![
        ("length", json!({"type": "string", "minLength": 3, "maxLength": 12})),
        ("pattern", json!({"type": "string", "pattern": "^[A-Z]{2}-[0-9]{4}$"})),
        ("pattern of words", json!({"type": "string", "pattern": "^([a-z]{2,8})( [a-z]{2,8}){0,2}$"})),
        ("escapes", json!({"type": "string", "minLength": 1, "maxLength": 8, "pattern": "^[\\\\\"/\\n\\tab]+$"})),
        ("not ascii", json!({"type": "string", "pattern": "^[\u{e4}\u{f6}\u{fc}\u{20ac}]{1,4}$"})),
    ];
    for format in ["date", "time", "date-time", "uuid", "ipv4", "ipv6"] {
        all.push((format, json!({"type": "string", "format": format})));
    }
    all
}

fn numbers() -> Vec<(&'static str, Value)> {
    vec![
        ("range of integers", json!({"type": "integer", "minimum": -17, "maximum": 2048})),
        ("exclusive range", json!({"type": "integer", "exclusiveMinimum": 9, "exclusiveMaximum": 12})),
        ("range of numbers", json!({"type": "number", "minimum": 0.25, "maximum": 1.75})),
        ("multiple", json!({"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 500})),
    ]
}

fn arrays() -> Vec<(&'static str, Value)> {
    let small = json!({"type": "integer", "minimum": 0, "maximum": 9});
    vec![
        ("few items", json!({"type": "array", "items": small, "minItems": 2, "maxItems": 4})),
        ("no items", json!({"type": "array", "maxItems": 0})),
        (
            "tuple",
            json!({"type": "array", "prefixItems": [{"const": "x"}, small, {"type": "boolean"}], "items": false, "minItems": 3}),
        ),
        (
            "lists of lists",
            json!({"type": "array", "minItems": 1, "maxItems": 2, "items": {"type": "array", "items": small, "maxItems": 2}}),
        ),
        ("enum in a list", json!({"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 1, "maxItems": 3})),
    ]
}

fn objects() -> Vec<(&'static str, Value)> {
    let name = json!({"type": "string", "minLength": 1, "maxLength": 10, "pattern": "^[A-Za-z ]*$"});
    vec![
        (
            "required",
            json!({"type": "object", "properties": {"name": name, "age": {"type": "integer", "minimum": 0, "maximum": 130}}, "required": ["name", "age"], "additionalProperties": false}),
        ),
        (
            "optional",
            json!({"type": "object", "properties": {"a": {"type": "boolean"}, "b": {"type": "null"}, "c": {"enum": [1, 2]}}, "additionalProperties": false}),
        ),
        (
            "some required",
            json!({"type": "object", "properties": {"a": {"type": "boolean"}, "b": {"type": "boolean"}}, "required": ["b"], "additionalProperties": false}),
        ),
        (
            "odd names",
            json!({"type": "object", "properties": {"": {"type": "boolean"}, "a b": {"type": "null"}, "q\"": {"enum": [1]}, "\u{e9}": {"enum": [2]}}, "required": ["", "a b", "q\"", "\u{e9}"], "additionalProperties": false}),
        ),
        (
            "nested",
            json!({"type": "object", "properties": {"outer": {"type": "object", "properties": {"inner": {"type": "object", "properties": {"leaf": {"enum": ["deep"]}}, "required": ["leaf"], "additionalProperties": false}}, "required": ["inner"], "additionalProperties": false}}, "required": ["outer"], "additionalProperties": false}),
        ),
        ("map", json!({"type": "object", "additionalProperties": {"type": "boolean"}, "maxProperties": 1})),
        (
            "pattern properties",
            json!({"type": "object", "patternProperties": {"^x_[a-z]{1,3}$": {"enum": [1, 2]}}, "additionalProperties": false, "minProperties": 1, "maxProperties": 2}),
        ),
        ("empty", json!({"type": "object", "additionalProperties": false})),
    ]
}

fn combined() -> Vec<(&'static str, Value)> {
    let point = json!({"type": "object", "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 9}, "y": {"type": "integer", "minimum": 0, "maximum": 9}}, "required": ["x", "y"], "additionalProperties": false});
    vec![
        ("any of", json!({"anyOf": [{"type": "boolean"}, {"type": "string", "maxLength": 5}, point]})),
        (
            "one of",
            json!({"oneOf": [{"type": "object", "properties": {"kind": {"const": "a"}, "n": {"enum": [1]}}, "required": ["kind", "n"], "additionalProperties": false}, {"type": "object", "properties": {"kind": {"const": "b"}}, "required": ["kind"], "additionalProperties": false}]}),
        ),
        ("all of", json!({"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 40}]})),
        (
            "reference",
            json!({"$defs": {"point": point}, "type": "object", "properties": {"from": {"$ref": "#/$defs/point"}, "to": {"$ref": "#/$defs/point"}}, "required": ["from", "to"], "additionalProperties": false}),
        ),
        (
            "definitions",
            json!({"definitions": {"flag": {"type": "boolean"}}, "type": "array", "items": {"$ref": "#/definitions/flag"}, "minItems": 2, "maxItems": 2}),
        ),
        (
            "recursion",
            json!({"$defs": {"tree": {"type": "object", "properties": {"v": {"enum": [0, 1]}, "next": {"anyOf": [{"type": "null"}, {"type": "null"}, {"type": "null"}, {"$ref": "#/$defs/tree"}]}}, "required": ["v", "next"], "additionalProperties": false}}, "$ref": "#/$defs/tree"}),
        ),
        (
            "nullable",
            json!({"type": "object", "properties": {"a": {"type": ["string", "null"], "maxLength": 4}}, "required": ["a"], "additionalProperties": false}),
        ),
        (
            "a record",
            json!({"type": "object", "properties": {"id": {"type": "string", "format": "uuid"}, "tags": {"type": "array", "items": {"type": "string", "minLength": 1, "maxLength": 6}, "maxItems": 2}, "score": {"type": "number", "minimum": 0, "maximum": 1}, "when": {"type": "string", "format": "date"}, "state": {"enum": ["open", "done"]}}, "required": ["id", "tags", "score", "when", "state"], "additionalProperties": false}),
        ),
    ]
}
