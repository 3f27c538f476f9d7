//! Which kinds of values a schema lets a parameter have.

use serde_json::{Map, Value};

/// How deep references and alternatives are followed.
const DEEPEST: usize = 8;

/// Kinds of JSON values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kinds(u8);

impl Kinds {
    /// All of them.
    pub const ALL: Self = Self(0b11_1111);
    /// Texts.
    pub const TEXT: Self = Self(1);

    fn named(name: &Value) -> Self {
        Self(match name.as_str() {
            Some("string") => 1,
            Some("number" | "integer") => 1 << 1,
            Some("boolean") => 1 << 2,
            Some("null") => 1 << 3,
            Some("array") => 1 << 4,
            Some("object") => 1 << 5,
            _ => return Self::ALL,
        })
    }

    /// The value's.
    pub fn of_value(value: &Value) -> Self {
        Self(match value {
            Value::String(_) => 1,
            Value::Number(_) => 1 << 1,
            Value::Bool(_) => 1 << 2,
            Value::Null => 1 << 3,
            Value::Array(_) => 1 << 4,
            Value::Object(_) => 1 << 5,
        })
    }

    /// Those that a part of a schema allows.
    pub fn of_schema(schema: &Value, root: &Map<String, Value>) -> Self {
        Self::of(schema, root, DEEPEST)
    }

    fn of(schema: &Value, root: &Map<String, Value>, depth: usize) -> Self {
        let Some(schema) = schema.as_object().filter(|_| depth > 0) else { return Self::ALL };
        let of = |part: &Value| Self::of(part, root, depth - 1);
        let any_of = |parts: &[Value], of: &dyn Fn(&Value) -> Self| parts.iter().map(of).fold(Self(0), Self::or);
        let mut kinds = Self::ALL;
        for (keyword, value) in schema {
            kinds = kinds.and(match (keyword.as_str(), value) {
                ("$ref", Value::String(reference)) => resolve(reference, root).map_or(Self::ALL, of),
                ("type", Value::Array(names)) => any_of(names, &Self::named),
                ("type", name) => Self::named(name),
                ("enum", Value::Array(values)) => any_of(values, &Self::of_value),
                ("const", value) => Self::of_value(value),
                ("anyOf" | "oneOf", Value::Array(parts)) => any_of(parts, &of),
                ("allOf", Value::Array(parts)) => parts.iter().map(of).fold(Self::ALL, Self::and),
                _ => Self::ALL,
            });
        }
        kinds
    }

    fn and(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    fn or(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Whether there is one that both have.
    pub fn meets(self, other: Self) -> bool {
        self.0 & other.0 != 0
    }
}

/// What a reference within a schema stands for.
pub fn resolve<'a>(reference: &str, root: &'a Map<String, Value>) -> Option<&'a Value> {
    let mut names = reference.strip_prefix("#/")?.split('/').map(|name| name.replace("~1", "/").replace("~0", "~"));
    let first = root.get(&names.next()?)?;
    names.try_fold(first, |value, name| value.get(&name))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn schemas_say_which_kinds_fit() {
        let root = json!({"$defs": {"unit": {"enum": ["c", "f"]}, "deep": {"$ref": "#/$defs/deep"}, "a/b": {"type": "array"}}});
        let root = root.as_object().unwrap();
        let kinds = |schema: Value| Kinds::of_schema(&schema, root);
        let some = |names: &[&str]| names.iter().map(|name| Kinds::named(&json!(name))).fold(Kinds(0), Kinds::or);
        assert_eq!(kinds(json!({"type": "string", "minLength": 3})), Kinds::TEXT);
        assert_eq!(kinds(json!({"$ref": "#/$defs/unit"})), Kinds::TEXT);
        assert_eq!(kinds(json!({"$ref": "#/$defs/a~1b"})), some(&["array"]));
        assert_eq!(kinds(json!({"type": ["string", "null"]})), some(&["string", "null"]));
        assert_eq!(kinds(json!({"anyOf": [{"type": "integer"}, {"const": true}]})), some(&["number", "boolean"]));
        assert_eq!(kinds(json!({"allOf": [{"type": ["integer", "null"]}, {"enum": [null, "x"]}]})), some(&["null"]));
        for unknown in [json!({}), json!(true), json!({"$ref": "#/$defs/deep"}), json!({"$ref": "elsewhere"})] {
            assert_eq!(kinds(unknown), Kinds::ALL);
        }
    }
}
