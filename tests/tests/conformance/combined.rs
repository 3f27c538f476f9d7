//! Schemas that are made of others, as people write them.

use serde_json::{Value, json};

fn closed(properties: Value, required: Value) -> Value {
    json!({"type": "object", "properties": properties, "required": required, "additionalProperties": false})
}

/// Names and schemas.
pub fn all() -> Vec<(&'static str, Value)> {
    let small = json!({"type": "integer", "minimum": 0, "maximum": 9});
    let word = json!({"type": "string", "minLength": 1, "maxLength": 6, "pattern": "^[a-z]+$"});
    let kind = |kind: &str, more: Value| {
        let mut properties = json!({"kind": {"const": kind}});
        properties.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
        let names: Vec<_> = properties.as_object().expect("an object").keys().cloned().collect();
        closed(properties, json!(names))
    };
    vec![
        ("any of types", json!({"anyOf": [{"type": "boolean"}, {"type": "string", "maxLength": 5}, {"type": "null"}]})),
        (
            "any of objects",
            json!({"anyOf": [closed(json!({"a": small}), json!(["a"])), closed(json!({"b": word}), json!(["b"]))]}),
        ),
        (
            "any of lists",
            json!({"anyOf": [{"type": "array", "items": small, "maxItems": 2}, {"type": "array", "items": word, "minItems": 1, "maxItems": 2}]}),
        ),
        ("any of any of", json!({"anyOf": [{"anyOf": [{"const": 1}, {"const": 2}]}, {"const": "x"}]})),
        (
            "one of types",
            json!({"oneOf": [{"type": "boolean"}, {"type": "integer", "minimum": 1, "maximum": 3}, {"type": "null"}]}),
        ),
        ("one of constants", json!({"oneOf": [{"const": "a"}, {"const": "b"}, {"const": 3}]})),
        (
            "one of kinds",
            json!({"oneOf": [kind("a", json!({"n": small})), kind("b", json!({})), kind("c", json!({"w": word}))]}),
        ),
        ("all of bounds", json!({"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 40}]})),
        ("all of lengths", json!({"allOf": [{"type": "string", "minLength": 2}, {"type": "string", "maxLength": 4}]})),
        (
            "all of properties",
            json!({"allOf": [{"type": "object", "properties": {"a": small}, "required": ["a"]}, {"type": "object", "properties": {"b": small}, "required": ["b"]}], "maxProperties": 2}),
        ),
        ("all of and siblings", json!({"type": "integer", "minimum": 0, "allOf": [{"maximum": 9}, {"multipleOf": 2}]})),
        (
            "all of with a reference",
            json!({"$defs": {"positive": {"type": "integer", "minimum": 1}}, "allOf": [{"$ref": "#/$defs/positive"}, {"maximum": 9}]}),
        ),
        ("types and enum", json!({"type": ["string", "null"], "enum": ["a", null, 5]})),
        ("nullable by any of", closed(json!({"v": {"anyOf": [word, {"type": "null"}]}}), json!(["v"]))),
        ("nullable by type", closed(json!({"v": {"type": ["string", "null"], "maxLength": 4}}), json!(["v"]))),
        (
            "definitions",
            json!({"definitions": {"flag": {"type": "boolean"}}, "type": "array", "items": {"$ref": "#/definitions/flag"}, "minItems": 2, "maxItems": 2}),
        ),
        (
            "references to references",
            json!({"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/c"}, "c": small}, "$ref": "#/$defs/a"}),
        ),
        (
            "references into properties",
            json!({"type": "object", "properties": {"a": small, "b": {"$ref": "#/properties/a"}}, "required": ["a", "b"], "additionalProperties": false}),
        ),
        (
            "escaped references",
            json!({"$defs": {"a/b": small, "c~d": word}, "type": "array", "prefixItems": [{"$ref": "#/$defs/a~1b"}, {"$ref": "#/$defs/c~0d"}], "items": false, "minItems": 2}),
        ),
        (
            "references with siblings",
            json!({"$defs": {"n": {"type": "integer", "minimum": 0}}, "$ref": "#/$defs/n", "maximum": 3}),
        ),
        (
            "list",
            json!({"$defs": {"list": {"anyOf": [{"type": "null"}, closed(json!({"head": small, "tail": {"$ref": "#/$defs/list"}}), json!(["head", "tail"]))]}}, "$ref": "#/$defs/list"}),
        ),
        (
            "tree",
            json!({"$defs": {"tree": closed(json!({"v": small, "children": {"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 2}}), json!(["v", "children"]))}, "$ref": "#/$defs/tree"}),
        ),
        (
            "mutual recursion",
            json!({"$defs": {"a": closed(json!({"b": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/b"}]}}), json!(["b"])), "b": closed(json!({"a": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/a"}]}}), json!(["a"]))}, "$ref": "#/$defs/a"}),
        ),
        (
            "recursion to the root",
            json!({"type": "object", "properties": {"v": small, "next": {"anyOf": [{"type": "null"}, {"$ref": "#"}]}}, "required": ["v", "next"], "additionalProperties": false}),
        ),
        (
            "expression",
            json!({"$defs": {"e": {"anyOf": [small, closed(json!({"op": {"enum": ["+", "*"]}, "l": {"$ref": "#/$defs/e"}, "r": {"$ref": "#/$defs/e"}}), json!(["op", "l", "r"]))]}}, "$ref": "#/$defs/e"}),
        ),
        (
            "record",
            closed(
                json!({"id": {"type": "string", "format": "uuid"}, "tags": {"type": "array", "items": word, "maxItems": 2}, "score": {"type": "number", "minimum": 0, "maximum": 1}, "when": {"type": "string", "format": "date"}, "state": {"enum": ["open", "done"]}}),
                json!(["id", "tags", "score", "when", "state"]),
            ),
        ),
        (
            "person",
            closed(
                json!({"name": word, "age": {"type": "integer", "minimum": 0, "maximum": 130}, "mail": {"anyOf": [{"type": "null"}, word]}, "address": closed(json!({"street": word, "zip": {"type": "string", "pattern": "^[0-9]{5}$"}}), json!(["street", "zip"]))}),
                json!(["name", "age", "mail", "address"]),
            ),
        ),
        (
            "steps",
            closed(
                json!({"steps": {"type": "array", "items": closed(json!({"explanation": word, "output": word}), json!(["explanation", "output"])), "minItems": 1, "maxItems": 2}, "answer": word}),
                json!(["steps", "answer"]),
            ),
        ),
        (
            "table",
            json!({"type": "array", "items": {"type": "array", "prefixItems": [word, small, {"type": "boolean"}], "items": false, "minItems": 3}, "minItems": 1, "maxItems": 2}),
        ),
        (
            "shapes",
            json!({"type": "array", "items": {"oneOf": [kind("circle", json!({"r": small})), kind("square", json!({"a": small}))]}, "minItems": 1, "maxItems": 2}),
        ),
        (
            "call of a tool",
            json!({"anyOf": [closed(json!({"name": {"const": "add"}, "arguments": closed(json!({"a": small, "b": small}), json!(["a", "b"]))}), json!(["name", "arguments"])), closed(json!({"name": {"const": "say"}, "arguments": closed(json!({"text": word}), json!(["text"]))}), json!(["name", "arguments"]))]}),
        ),
        (
            "several patterns of names",
            json!({"type": "object", "patternProperties": {"^a": small, "^b": {"type": "boolean"}}, "additionalProperties": false, "minProperties": 1, "maxProperties": 2}),
        ),
        (
            "names and patterns",
            json!({"type": "object", "properties": {"id": small}, "required": ["id"], "patternProperties": {"^x-": {"type": "null"}}, "additionalProperties": false, "maxProperties": 2}),
        ),
        ("deep", (0..12).fold(small, |inner, _| closed(json!({"d": inner}), json!(["d"])))),
        (
            "many properties",
            closed(
                (0..40)
                    .map(|n| (format!("p{n}"), json!({"type": "boolean"})))
                    .collect::<serde_json::Map<_, _>>()
                    .into(),
                json!((0..40).map(|n| format!("p{n}")).collect::<Vec<_>>()),
            ),
        ),
        ("many choices", json!({"enum": (0..200).map(|n| format!("choice {n}")).collect::<Vec<_>>()})),
        ("true", json!({"type": "array", "items": true, "maxItems": 1})),
        (
            "schema and title",
            json!({"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": "urn:phalanx:test", "title": "n", "$comment": "c", "type": "integer", "minimum": 0, "maximum": 3}),
        ),
    ]
}
