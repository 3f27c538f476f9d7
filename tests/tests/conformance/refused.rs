//! What can't be kept to, keyword by keyword: each is refused, with a reason. Keywords that the standard does not know are
//! annotations, as it says.

use serde_json::{Value, json};

/// Keyword, a schema with it, and a part of the reason.
pub fn all() -> Vec<(&'static str, Value, &'static str)> {
    let any = json!({"type": "integer"});
    vec![
        ("not", json!({"not": any}), "not"),
        ("if", json!({"type": "integer", "if": {"minimum": 3}, "then": {"multipleOf": 2}}), "if"),
        ("uniqueItems", json!({"type": "array", "items": any, "uniqueItems": true}), "uniqueItems"),
        ("contains", json!({"type": "array", "contains": any}), "contains"),
        ("minContains", json!({"type": "array", "contains": any, "minContains": 2}), "ontains"),
        ("propertyNames", json!({"type": "object", "propertyNames": {"maxLength": 3}}), "propertyNames"),
        ("dependentRequired", json!({"type": "object", "dependentRequired": {"a": ["b"]}}), "dependentRequired"),
        (
            "dependentSchemas",
            json!({"type": "object", "dependentSchemas": {"a": {"required": ["b"]}}}),
            "dependentSchemas",
        ),
        ("unevaluatedProperties", json!({"type": "object", "unevaluatedProperties": false}), "unevaluatedProperties"),
        ("unevaluatedItems", json!({"type": "array", "unevaluatedItems": false}), "unevaluatedItems"),
        ("$dynamicRef", json!({"$dynamicRef": "#node"}), "$dynamicRef"),
        ("an unknown format", json!({"type": "string", "format": "phone-number"}), "phone-number"),
        ("an unknown type", json!({"type": "text"}), "text"),
        ("one of what overlaps", json!({"oneOf": [{"type": "integer"}, {"type": "number"}]}), "oneOf"),
        (
            "one of ranges",
            json!({"oneOf": [{"type": "integer", "maximum": 4}, {"type": "integer", "minimum": 10}]}),
            "oneOf",
        ),
        ("a remote reference", json!({"$ref": "http://127.0.0.1:1/schema"}), "can't be used"),
        ("a reference to nothing", json!({"$ref": "#/$defs/missing"}), "can't be used"),
        ("look-around", json!({"type": "string", "pattern": "^(?=a)b$"}), "can't be used"),
        ("a back-reference", json!({"type": "string", "pattern": "^(a)\\1$"}), "can't be used"),
        ("no value: bounds", json!({"type": "integer", "minimum": 5, "maximum": 3}), "can't be used"),
        ("no value: lengths", json!({"type": "string", "minLength": 5, "maxLength": 3}), "can't be used"),
        ("no value: counts of items", json!({"type": "array", "minItems": 5, "maxItems": 3}), "can't be used"),
        ("no value: all of", json!({"allOf": [{"type": "string"}, {"type": "integer"}]}), "can't be used"),
        ("no value: enum", json!({"type": "integer", "enum": ["a"]}), "can't be used"),
        ("no value: false", json!(false), "no value"),
        (
            "no value: a required property",
            json!({"type": "object", "properties": {"a": false}, "required": ["a"]}),
            "can't be used",
        ),
        ("not a schema", json!(3), "an object or a boolean"),
    ]
}
