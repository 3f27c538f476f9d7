//! Reads a JSON object field by field. Every error names its field, and a field that nobody took is an error too.

mod bounded;

use serde_json::{Map, Value};

use super::error::ApiError;

/// An integer as JSON has it: wide enough for every `i64` and `u64`; ranges are checked where the meaning is known.
pub type Integer = i128;

/// A field that has no implementation, and whether a value of it asks for nothing.
pub type Unsupported = (&'static str, fn(&Value) -> bool);

/// A JSON object whose fields are taken one by one. `null` counts as absent.
#[derive(Debug)]
pub struct Fields {
    /// Where the object stands, such as `messages[2]`; empty for the body itself.
    at: String,
    map: Map<String, Value>,
    /// Names that were asked for and have a meaning.
    #[cfg(test)]
    read: std::collections::BTreeSet<String>,
}

/// A body with this field is refused with the names of all fields that were read: tests compare them with what is documented.
#[cfg(test)]
pub const TELL: &str = "tell which fields are read";

impl Fields {
    /// The object in a body. Nesting deeper than 128 levels is an error, not a stack overflow: the parser counts. So are
    /// more than a million values.
    pub fn of_body(body: &[u8]) -> Result<Self, ApiError> {
        match bounded::parse(body) {
            Ok(Value::Object(map)) => Ok(Self::new(String::new(), map)),
            Ok(other) => Err(ApiError::not_json(format!("it is {}", kind(&other)))),
            Err(error) => Err(ApiError::not_json(error)),
        }
    }

    fn new(at: String, map: Map<String, Value>) -> Self {
        Self {
            at,
            map,
            #[cfg(test)]
            read: std::collections::BTreeSet::new(),
        }
    }

    /// The field's name as errors show it.
    pub fn path(&self, name: &str) -> String {
        if self.at.is_empty() { name.to_owned() } else { format!("{}.{name}", self.at) }
    }

    /// Takes a field of a type; `None` if it is absent or null.
    pub fn take<T: FromJson>(&mut self, name: &str) -> Result<Option<T>, ApiError> {
        #[cfg(test)]
        self.read.insert(name.to_owned());
        match self.map.remove(name) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => T::from_json(value, &self.path(name)).map(Some),
        }
    }

    /// Takes a field that must be there.
    pub fn require<T: FromJson>(&mut self, name: &str) -> Result<T, ApiError> {
        self.take(name)?.ok_or_else(|| ApiError::missing(&self.path(name)))
    }

    /// Takes a flag that is off if absent.
    pub fn flag(&mut self, name: &str) -> Result<bool, ApiError> {
        Ok(self.take(name)?.unwrap_or(false))
    }

    /// Takes fields that have no implementation: an error if one asks for something.
    pub fn refuse(&mut self, unsupported: &[Unsupported]) -> Result<(), ApiError> {
        for (name, is_neutral) in unsupported {
            if self.take::<Value>(name)?.is_some_and(|value| !is_neutral(&value)) {
                return Err(ApiError::unsupported(&self.path(name)));
            }
            #[cfg(test)]
            self.read.remove(*name);
        }
        Ok(())
    }

    /// An error if a field is left that nobody took.
    pub fn finish(self) -> Result<(), ApiError> {
        #[cfg(test)]
        if self.map.contains_key(TELL) {
            let names = self.read.into_iter().collect::<Vec<_>>().join(",");
            return Err(ApiError::invalid(TELL, format!("<{names}>")));
        }
        match self.map.iter().find(|(_, value)| !value.is_null()) {
            Some((name, _)) => Err(ApiError::unknown_field(&self.path(name))),
            None => Ok(()),
        }
    }

    /// All fields, whatever they are called.
    pub fn into_entries(self) -> Map<String, Value> {
        self.map
    }
}

/// A type that a field may have.
pub trait FromJson: Sized {
    /// From a value that is not null. `at` names it in errors.
    fn from_json(value: Value, at: &str) -> Result<Self, ApiError>;
}

impl FromJson for Value {
    fn from_json(value: Value, _: &str) -> Result<Self, ApiError> {
        Ok(value)
    }
}

impl FromJson for bool {
    fn from_json(value: Value, at: &str) -> Result<Self, ApiError> {
        value.as_bool().ok_or_else(|| ApiError::wrong_type(at, "true or false", kind(&value)))
    }
}

impl FromJson for String {
    fn from_json(value: Value, at: &str) -> Result<Self, ApiError> {
        match value {
            Value::String(text) => Ok(text),
            other => Err(ApiError::wrong_type(at, "a string", kind(&other))),
        }
    }
}

impl FromJson for f32 {
    fn from_json(value: Value, at: &str) -> Result<Self, ApiError> {
        // Too large for f32 becomes infinite, which no range contains.
        value.as_f64().map(|x| x as f32).ok_or_else(|| ApiError::wrong_type(at, "a number", kind(&value)))
    }
}

impl FromJson for Integer {
    /// `3.0` is an integer, as it is to other servers' parsers.
    fn from_json(value: Value, at: &str) -> Result<Self, ApiError> {
        let whole = |x: &f64| x.fract() == 0.0;
        let integer = value.as_i64().map(Self::from).or(value.as_u64().map(Self::from));
        integer
            .or_else(|| value.as_f64().filter(whole).map(|x| x as Self))
            .ok_or_else(|| ApiError::wrong_type(at, "an integer", kind(&value)))
    }
}

impl FromJson for Fields {
    fn from_json(value: Value, at: &str) -> Result<Self, ApiError> {
        match value {
            Value::Object(map) => Ok(Self::new(at.to_owned(), map)),
            other => Err(ApiError::wrong_type(at, "an object", kind(&other))),
        }
    }
}

impl<T: FromJson> FromJson for Vec<T> {
    fn from_json(value: Value, at: &str) -> Result<Self, ApiError> {
        match value {
            Value::Array(items) => {
                let item = |(index, value)| T::from_json(value, &format!("{at}[{index}]"));
                items.into_iter().enumerate().map(item).collect()
            }
            other => Err(ApiError::wrong_type(at, "a list", kind(&other))),
        }
    }
}

/// A value's JSON type in words. Values themselves are not repeated to clients: they may be long, or a prompt.
pub fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(number) if number.is_f64() => "a number with a fraction",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn fields(value: &Value) -> Fields {
        Fields::of_body(value.to_string().as_bytes()).unwrap()
    }

    #[test]
    fn null_is_absent_and_the_rest_is_unknown() {
        let mut fields = fields(&json!({"a": null, "b": 1, "c": null}));
        assert_eq!(fields.take::<String>("a").unwrap(), None);
        assert_eq!(fields.take::<Integer>("b").unwrap(), Some(1));
        fields.finish().unwrap();
    }

    #[test]
    fn errors_name_the_innermost_field() {
        let mut outer = fields(&json!({"list": [1, "x"], "object": {"odd": 1}}));
        let error = outer.take::<Vec<Integer>>("list").unwrap_err();
        assert_eq!(error.to_string(), "'list[1]' must be an integer, got a string");
        let inner = outer.take::<Fields>("object").unwrap().unwrap();
        assert!(inner.finish().unwrap_err().to_string().contains("'object.odd'"));
    }

    #[test]
    fn integers_are_taken_whole_or_not_at_all() {
        let mut fields = fields(&json!({"a": 3.0, "b": 3.5, "c": u64::MAX, "d": i64::MIN, "e": 1e300}));
        assert_eq!(fields.take::<Integer>("a").unwrap(), Some(3));
        assert!(fields.take::<Integer>("b").is_err());
        assert_eq!(fields.take::<Integer>("c").unwrap(), Some(u64::MAX.into()));
        assert_eq!(fields.take::<Integer>("d").unwrap(), Some(i64::MIN.into()));
        assert_eq!(fields.take::<Integer>("e").unwrap(), Some(Integer::MAX), "saturates; every range refuses it");
    }

    #[test]
    fn deep_nesting_is_an_error() {
        assert!(Fields::of_body("[".repeat(1_000_000).as_bytes()).is_err());
        assert!(Fields::of_body(format!("{{\"a\":{}", "[".repeat(1_000_000)).as_bytes()).is_err());
    }
}
