//! Reading the document: what its references mean, and which fields an object has.

use serde_json::{Map, Value};

/// A field of an object.
pub struct Field<'a> {
    /// Its name.
    pub name: &'a str,
    /// What it may be.
    pub schema: &'a Value,
    /// Whether it must be there.
    pub is_required: bool,
}

/// What a reference means; everything else means itself.
pub fn resolve<'a>(document: &'a Value, value: &'a Value) -> &'a Value {
    let Some(reference) = value.get("$ref").and_then(Value::as_str) else { return value };
    document.pointer(reference.trim_start_matches('#')).unwrap_or(&Value::Null)
}

/// Last part of a reference.
pub fn referred(value: &Value) -> Option<&str> {
    value.get("$ref")?.as_str()?.rsplit('/').next()
}

/// The fields of an object, its own first, then those of the schemas that it is made of.
pub fn fields<'a>(document: &'a Value, schema: &'a Value) -> Vec<Field<'a>> {
    let schema = resolve(document, schema);
    let required = schema["required"].as_array().map_or(&[][..], Vec::as_slice);
    let own = entries(&schema["properties"]).map(|(name, schema)| Field {
        name,
        schema,
        is_required: required.iter().any(|wanted| wanted == name),
    });
    let mut all: Vec<Field<'a>> = own.collect();
    for part in schema["allOf"].as_array().into_iter().flatten() {
        for field in fields(document, part) {
            if all.iter().all(|known| known.name != field.name) {
                all.push(field);
            }
        }
    }
    all
}

/// Entries of what may be an object.
pub fn entries(value: &Value) -> impl Iterator<Item = (&str, &Value)> {
    value.as_object().into_iter().flat_map(Map::iter).map(|(name, value)| (name.as_str(), value))
}

/// Every operation: path, method, what is said of it.
pub fn operations(document: &Value) -> impl Iterator<Item = (&str, &str, &Value)> {
    entries(&document["paths"])
        .flat_map(|(path, methods)| entries(methods).map(move |(method, operation)| (path, method, operation)))
}
