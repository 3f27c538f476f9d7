//! What an output has to follow, in OpenAI's and vLLM's words: `response_format`, `structured_outputs`, `guided_*`.

use phalanx_cluster::grammar::{Grammar, GrammarError, WhiteSpace};
use phalanx_proto::v1::{StructuredOutput, structured_output::Constraint};
use serde_json::Value;

use super::{
    FrontendState,
    error::ApiError,
    fields::{Fields, FromJson, kind},
};
use crate::{grammars::Refusal, request::Request};

/// A grammar, and the field that it came in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// Name of the field, for errors.
    pub field: String,
    /// What the output has to follow.
    pub grammar: Grammar,
}

/// Takes all fields that ask for a structured output: at most one of them may.
pub fn take(fields: &mut Fields) -> Result<Option<Wanted>, ApiError> {
    let mut all = Vec::new();
    all.extend(response_format(fields)?);
    if let Some(mut options) = fields.take::<Fields>("structured_outputs")? {
        all.extend(constraints(&mut options, "")?);
        options.finish()?;
    }
    all.extend(constraints(fields, "guided_")?);
    let mut all = all.into_iter();
    match (all.next(), all.next()) {
        (Some(first), Some(second)) => {
            let reason = format!("and '{}' both say what the output has to follow: give one of them", first.field);
            Err(ApiError::invalid(&second.field, reason))
        }
        (first, _) => Ok(first),
    }
}

fn response_format(fields: &mut Fields) -> Result<Option<Wanted>, ApiError> {
    let Some(mut format) = fields.take::<Fields>("response_format")? else { return Ok(None) };
    let field = "response_format".to_owned();
    let wanted = match format.require::<String>("type")?.as_str() {
        "text" => None,
        "json_object" => Some(Wanted { field, grammar: Grammar::of_any_object() }),
        "json_schema" => {
            let mut named = format.require::<Fields>("json_schema")?;
            // Labels. What is not strict is followed too: that is within what was asked for.
            named.take::<String>("name")?;
            named.take::<String>("description")?;
            named.take::<bool>("strict")?;
            let field = named.path("schema");
            let schema = named.require::<Value>("schema")?;
            named.finish()?;
            Some(wanted(&field, Grammar::of_schema(schema, &WhiteSpace::Some))?)
        }
        "structural_tag" => return Err(ApiError::unsupported("response_format.type")),
        _ => return Err(ApiError::invalid("response_format.type", "must be text, json_object or json_schema")),
    };
    format.finish()?;
    Ok(wanted)
}

/// vLLM's constraints: in an object of their own, or (older) among the request's fields with a prefix.
fn constraints(fields: &mut Fields, prefix: &str) -> Result<Vec<Wanted>, ApiError> {
    let name = |name: &str| format!("{prefix}{name}");
    let mut all = Vec::new();
    let white_space = white_space(fields, prefix)?;
    if let Some(Schema(schema)) = fields.take(&name("json"))? {
        all.push(wanted(&fields.path(&name("json")), Grammar::of_schema(schema, &white_space))?);
    } else if white_space != WhiteSpace::Some {
        let reason = format!("is only possible with '{}'", fields.path(&name("json")));
        return Err(ApiError::invalid(&fields.path(&name("whitespace_pattern")), reason));
    }
    if fields.flag(&name("json_object"))? {
        all.push(wanted(&fields.path(&name("json_object")), Ok(Grammar::of_any_object()))?);
    }
    if let Some(regex) = fields.take(&name("regex"))? {
        all.push(wanted(&fields.path(&name("regex")), Ok(Grammar::Regex(regex)))?);
    }
    if let Some(choices) = fields.take::<Vec<String>>(&name("choice"))? {
        all.push(wanted(&fields.path(&name("choice")), Grammar::of_choices(&choices))?);
    }
    if let Some(text) = fields.take::<String>(&name("grammar"))? {
        all.push(wanted(&fields.path(&name("grammar")), Grammar::of_notation(text))?);
    }
    // There is one way to follow grammars: nothing to choose from, nothing to fall back to.
    fields.refuse(&[("structural_tag", |_| false)]).and_then(|()| {
        if prefix.is_empty() {
            fields.take::<bool>("disable_fallback")?;
            fields.refuse(&[("disable_additional_properties", |value| *value == Value::Bool(false))])?;
        } else {
            fields
                .refuse(&[("guided_decoding_backend", |value| matches!(value.as_str(), Some("auto" | "guidance")))])?;
        }
        Ok(())
    })?;
    Ok(all)
}

fn white_space(fields: &mut Fields, prefix: &str) -> Result<WhiteSpace, ApiError> {
    let pattern = fields.take::<String>(&format!("{prefix}whitespace_pattern"))?;
    let has_none = prefix.is_empty() && fields.flag("disable_any_whitespace")?;
    match (pattern, has_none) {
        (Some(_), true) => Err(contradicting(&fields.path("disable_any_whitespace"))),
        (Some(pattern), false) => Ok(WhiteSpace::Pattern(pattern)),
        (None, true) => Ok(WhiteSpace::None),
        (None, false) => Ok(WhiteSpace::Some),
    }
}

fn contradicting(field: &str) -> ApiError {
    ApiError::invalid(field, "and 'whitespace_pattern' contradict each other: give one of them")
}

/// A schema, or the text of one.
struct Schema(Value);

impl FromJson for Schema {
    fn from_json(value: Value, at: &str) -> Result<Self, ApiError> {
        match value {
            Value::String(text) => serde_json::from_str(&text)
                .map(Self)
                .map_err(|error| ApiError::invalid(at, format!("is a string that is not JSON: {error}"))),
            Value::Object(_) | Value::Bool(_) => Ok(Self(value)),
            other => Err(ApiError::wrong_type(at, "an object or a string", kind(&other))),
        }
    }
}

impl FrontendState {
    /// Has requests' grammars tried, away from threads that others wait for.
    pub(super) async fn admit_grammars(&self, requests: &mut [Request]) -> Result<(), ApiError> {
        self.grammars.admit(requests).await.map_err(|(field, refusal)| match refusal {
            Refusal::OfGrammar(reason) => ApiError::invalid(&field, reason),
            Refusal::Busy(_) => ApiError::not_ready(&refusal.to_string()),
        })
    }
}

/// What a gRPC call asks for.
pub fn of_grpc(output: StructuredOutput) -> Result<Option<Wanted>, ApiError> {
    let at = |name: &str| format!("structured_output.{name}");
    let white_space = match (output.whitespace_pattern, output.disable_any_whitespace) {
        (Some(_), true) => return Err(contradicting(&at("disable_any_whitespace"))),
        (Some(pattern), false) => WhiteSpace::Pattern(pattern),
        (None, true) => WhiteSpace::None,
        (None, false) => WhiteSpace::Some,
    };
    if white_space != WhiteSpace::Some && !matches!(output.constraint, Some(Constraint::JsonSchema(_))) {
        let field = if white_space == WhiteSpace::None { "disable_any_whitespace" } else { "whitespace_pattern" };
        return Err(ApiError::invalid(&at(field), format!("is only possible with '{}'", at("json_schema"))));
    }
    let Some(constraint) = output.constraint else { return Ok(None) };
    Ok(Some(match constraint {
        Constraint::JsonSchema(text) => {
            let field = at("json_schema");
            let Schema(schema) = Schema::from_json(Value::String(text), &field)?;
            wanted(&field, Grammar::of_schema(schema, &white_space))?
        }
        Constraint::JsonObject(false) => return Ok(None),
        Constraint::JsonObject(true) => wanted(&at("json_object"), Ok(Grammar::of_any_object()))?,
        Constraint::Regex(text) => wanted(&at("regex"), Ok(Grammar::Regex(text)))?,
        Constraint::Choices(choices) => wanted(&at("choices"), Grammar::of_choices(&choices.texts))?,
        Constraint::Grammar(text) => wanted(&at("grammar"), Grammar::of_notation(text))?,
    }))
}

/// JSON under a schema, which may be a text.
pub fn of_schema(field: &str, schema: Value) -> Result<Wanted, ApiError> {
    let Schema(schema) = Schema::from_json(schema, field)?;
    wanted(field, Grammar::of_schema(schema, &WhiteSpace::Some))
}

/// Any JSON object.
pub fn of_any_object(field: &str) -> Wanted {
    Wanted { field: field.to_owned(), grammar: Grammar::of_any_object() }
}

/// A text that a regex matches as a whole.
pub fn of_regex(field: &str, regex: String) -> Wanted {
    Wanted { field: field.to_owned(), grammar: Grammar::Regex(regex) }
}

fn wanted(field: &str, grammar: Result<Grammar, GrammarError>) -> Result<Wanted, ApiError> {
    let grammar = grammar.map_err(|error| ApiError::invalid(field, error))?;
    Ok(Wanted { field: field.to_owned(), grammar })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn taken(body: &Value) -> Result<Option<Wanted>, ApiError> {
        let mut fields = Fields::of_body(body.to_string().as_bytes())?;
        let wanted = take(&mut fields)?;
        fields.finish()?;
        Ok(wanted)
    }

    #[test]
    fn every_name_of_it_is_known() {
        let schema = json!({"type": "integer"});
        let grammar = |body: Value| taken(&body).unwrap().map(|w| (w.field, w.grammar));
        let of_schema = |field: &str, white_space: &WhiteSpace| {
            Some((field.to_owned(), Grammar::of_schema(schema.clone(), white_space).unwrap()))
        };
        let some = &WhiteSpace::Some;
        assert_eq!(grammar(json!({})), None);
        assert_eq!(grammar(json!({"response_format": {"type": "text"}})), None);
        let named = json!({"name": "x", "strict": true, "description": "y", "schema": schema});
        assert_eq!(
            grammar(json!({"response_format": {"type": "json_schema", "json_schema": named}})),
            of_schema("response_format.json_schema.schema", some)
        );
        let field = "structured_outputs.json";
        assert_eq!(grammar(json!({"structured_outputs": {"json": schema}})), of_schema(field, some));
        let text = schema.to_string();
        assert_eq!(
            grammar(json!({"structured_outputs": {"json": text, "disable_fallback": true}})),
            of_schema(field, some)
        );
        let bare = json!({"json": schema, "disable_any_whitespace": true, "regex": null});
        assert_eq!(grammar(json!({"structured_outputs": bare})), of_schema(field, &WhiteSpace::None));
        let pattern = WhiteSpace::Pattern(" ?".to_owned());
        let body = json!({"guided_json": schema, "guided_whitespace_pattern": " ?", "guided_decoding_backend": "auto"});
        assert_eq!(grammar(body), of_schema("guided_json", &pattern));
        let any = Grammar::of_any_object();
        let field = "response_format".to_owned();
        assert_eq!(grammar(json!({"response_format": {"type": "json_object"}})), Some((field, any.clone())));
        let field = "structured_outputs.json_object".to_owned();
        assert_eq!(grammar(json!({"structured_outputs": {"json_object": true}})), Some((field, any)));
        let regex = Grammar::Regex("a+".to_owned());
        assert_eq!(grammar(json!({"guided_regex": "a+"})), Some(("guided_regex".to_owned(), regex)));
        let lark = Grammar::Lark("start: \"a\"".to_owned());
        let field = "structured_outputs.grammar".to_owned();
        assert_eq!(grammar(json!({"structured_outputs": {"grammar": "start: \"a\""}})), Some((field, lark)));
        let choices = Grammar::Lark("start: \"a\" | \"b\"".to_owned());
        assert_eq!(grammar(json!({"guided_choice": ["a", "b"]})), Some(("guided_choice".to_owned(), choices)));
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (body, want) in [
            (
                json!({"guided_regex": "a", "response_format": {"type": "json_object"}}),
                "'guided_regex' and 'response_format'",
            ),
            (json!({"guided_regex": "a", "response_format": {"type": "text", "odd": 1}}), "'response_format.odd'"),
            (json!({"structured_outputs": {"whitespace_pattern": " "}}), "'structured_outputs.whitespace_pattern'"),
            (
                json!({"structured_outputs": {"json": {}, "whitespace_pattern": " ", "disable_any_whitespace": true}}),
                "contradict",
            ),
            (json!({"structured_outputs": {"json": "{"}}), "not JSON"),
            (json!({"structured_outputs": {"json": 1}}), "an object or a string"),
            (json!({"structured_outputs": {"disable_additional_properties": true}}), "disable_additional_properties"),
            (json!({"structured_outputs": "x"}), "'structured_outputs' must be an object"),
            (json!({"guided_decoding_backend": "outlines"}), "'guided_decoding_backend'"),
            (json!({"response_format": "json"}), "'response_format' must be an object"),
        ] {
            let error = taken(&body).unwrap_err().to_string();
            assert!(error.contains(want), "{body}: {error}");
        }
    }

    #[test]
    fn grpc_says_the_same() {
        let output = |constraint| StructuredOutput { constraint, ..StructuredOutput::default() };
        let grammar = |constraint| of_grpc(output(constraint)).unwrap();
        assert_eq!(grammar(None), None);
        assert_eq!(grammar(Some(Constraint::JsonObject(false))), None);
        let wanted = grammar(Some(Constraint::JsonSchema("true".to_owned()))).unwrap();
        assert_eq!(wanted.grammar, Grammar::of_schema(json!(true), &WhiteSpace::Some).unwrap());
        let error = of_grpc(output(Some(Constraint::JsonSchema("{".to_owned())))).unwrap_err();
        assert!(error.to_string().contains("structured_output.json_schema"), "{error}");
        let spaced = |constraint: Constraint, pattern: Option<&str>, disable_any_whitespace| {
            let whitespace_pattern = pattern.map(str::to_owned);
            of_grpc(StructuredOutput { constraint: Some(constraint), whitespace_pattern, disable_any_whitespace })
        };
        let schema = || Constraint::JsonSchema("true".to_owned());
        let want = |white_space| Grammar::of_schema(json!(true), &white_space).unwrap();
        assert_eq!(spaced(schema(), None, true).unwrap().unwrap().grammar, want(WhiteSpace::None));
        let pattern = WhiteSpace::Pattern(" ?".to_owned());
        assert_eq!(spaced(schema(), Some(" ?"), false).unwrap().unwrap().grammar, want(pattern));
        let regex = || Constraint::Regex("a".to_owned());
        for (constraint, pattern, none, named) in [
            (schema(), Some(" "), true, "disable_any_whitespace"),
            (regex(), Some(" "), false, "whitespace_pattern"),
            (regex(), None, true, "disable_any_whitespace"),
        ] {
            let error = spaced(constraint, pattern, none).unwrap_err().to_string();
            assert!(error.contains(named), "{error}");
        }
    }
}
