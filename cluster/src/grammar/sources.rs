//! Grammars from what clients say they want.

use serde_json::{Map, Value, json};

use super::{Grammar, GrammarError, gbnf::quoted};

/// White space that a JSON text may have at one place. As much as it likes would be valid too, but a model that has begun to
/// write blanks sometimes writes nothing else.
const WHITE_SPACE: &str = r"[\x20\x0A\x0D\x09]{1,64}";
/// The compiler's own settings in a schema.
const SETTINGS: &str = "x-guidance";

/// What may stand between the parts of a JSON text.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum WhiteSpace {
    /// Some.
    #[default]
    Some,
    /// None at all.
    None,
    /// What this regular expression matches, or nothing.
    Pattern(String),
}

impl Grammar {
    /// JSON texts that are valid under a schema.
    ///
    /// # Errors
    /// If it is neither an object nor a boolean, or has settings of the compiler's.
    pub fn of_schema(schema: Value, white_space: &WhiteSpace) -> Result<Self, GrammarError> {
        let refused = |reason: &str| Err(GrammarError::Refused(reason.to_owned()));
        let mut schema = match schema {
            Value::Object(schema) => schema,
            // As keywords, for settings need an object.
            Value::Bool(true) => Map::new(),
            Value::Bool(false) => return refused("allows no value at all"),
            _ => return refused("must be an object or a boolean"),
        };
        if schema.contains_key(SETTINGS) {
            return refused("must not have the keyword 'x-guidance'");
        }
        let settings = match white_space {
            WhiteSpace::Some => json!({"whitespace_pattern": WHITE_SPACE}),
            WhiteSpace::None => json!({"whitespace_flexible": false}),
            WhiteSpace::Pattern(pattern) => json!({"whitespace_pattern": pattern}),
        };
        schema.insert(SETTINGS.to_owned(), settings);
        Ok(Self::JsonSchema(Value::Object(schema).to_string()))
    }

    /// Any JSON object.
    pub fn of_any_object() -> Self {
        let settings = json!({"whitespace_pattern": WHITE_SPACE});
        Self::JsonSchema(json!({"type": "object", SETTINGS: settings}).to_string())
    }

    /// One of these texts.
    ///
    /// # Errors
    /// If there is none, or one of them is empty.
    pub fn of_choices(choices: &[String]) -> Result<Self, GrammarError> {
        if choices.is_empty() || choices.iter().any(String::is_empty) {
            return Err(GrammarError::Refused("must be a list of texts that are not empty".to_owned()));
        }
        let literals: Vec<_> = choices.iter().map(|text| quoted(text)).collect();
        Ok(Self::Lark(format!("start: {}", literals.join(" | "))))
    }
}
