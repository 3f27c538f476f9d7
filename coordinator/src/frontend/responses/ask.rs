//! What clients of the responses API send.

use serde_json::{Map, Value, json};

use crate::frontend::{
    FrontendState,
    error::ApiError,
    fields::{Fields, FromJson, Unsupported, kind},
    neutral::{Delivery, StreamedUsage},
    params::{MAX_LOGPROBS, Params, RawParams, in_range},
    prompt::Rendering,
    structured,
};

/// The only thing that can be asked for beside the text.
const LOGPROBS: &str = "message.output_text.logprobs";

/// A request, checked but not yet rendered.
pub struct ResponseAsk {
    pub rendering: Rendering,
    pub delivery: Delivery,
    pub params: Params,
    pub echo: Echo,
}

/// What the answer repeats.
pub struct Echo {
    pub instructions: Value,
    pub max_output_tokens: Value,
    pub metadata: Map<String, Value>,
    pub parallel_tool_calls: bool,
    pub effort: Value,
    /// `text.format`.
    pub format: Value,
    pub temperature: f32,
    pub top_p: f32,
    pub top_logprobs: u32,
    pub tool_choice: String,
    pub user: Value,
}

fn is_empty(value: &Value) -> bool {
    value.as_array().is_some_and(Vec::is_empty)
}

fn is_false(value: &Value) -> bool {
    *value == Value::Bool(false)
}

fn is_disabled(value: &Value) -> bool {
    value == "disabled"
}

fn is_plain_tier(value: &Value) -> bool {
    matches!(value.as_str(), Some("auto" | "default"))
}

fn never(_: &Value) -> bool {
    false
}

/// What has no implementation, with the value that asks for nothing.
static UNSUPPORTED: &[Unsupported] = &[
    ("background", is_false),
    ("tools", is_empty),
    ("truncation", is_disabled),
    ("service_tier", is_plain_tier),
    ("max_tool_calls", never),
    ("prompt", never),
    ("prompt_cache_retention", never),
    ("context_management", never),
];

/// What would need a memory of earlier answers.
static STORED: &[&str] = &["previous_response_id", "conversation"];

impl ResponseAsk {
    pub fn parse(mut fields: Fields, state: &FrontendState) -> Result<Self, ApiError> {
        state.check_model(fields.take::<String>("model")?.as_deref())?;
        let instructions = fields.take::<String>("instructions")?;
        let mut messages: Vec<Value> = Vec::new();
        messages.extend(instructions.iter().map(|text| json!({"role": "system", "content": text})));
        input(fields.require("input")?, &mut messages)?;
        for name in STORED {
            if fields.take::<Value>(name)?.is_some() {
                return Err(ApiError::invalid(
                    name,
                    "is not possible: nothing is stored here; send all items as 'input'",
                ));
            }
        }
        // Clients ask for it unless told otherwise; the answer says that it was not done.
        fields.take::<bool>("store")?;

        let is_streamed = fields.flag("stream")?;
        if let Some(mut options) = fields.take::<Fields>("stream_options")? {
            if !is_streamed {
                return Err(ApiError::invalid("stream_options", "is only possible when 'stream' is true"));
            }
            options.refuse(&[("include_obfuscation", is_false)])?;
            options.finish()?;
        }
        let delivery = if is_streamed { Delivery::Streamed(StreamedUsage::Included) } else { Delivery::Whole };

        let mut raw = RawParams {
            max_tokens: fields.take("max_output_tokens")?,
            max_tokens_field: "max_output_tokens",
            ..RawParams::take_drawing(&mut fields)?
        };
        let top_logprobs = in_range("top_logprobs", fields.take("top_logprobs")?, 0..=MAX_LOGPROBS)?;
        let mut wants_scores = false;
        for asked in fields.take::<Vec<String>>("include")?.unwrap_or_default() {
            if asked != LOGPROBS {
                return Err(ApiError::invalid("include", format!("may only have \"{LOGPROBS}\"")));
            }
            wants_scores = true;
        }
        if !wants_scores && top_logprobs.is_some_and(|n| n > 0) {
            return Err(ApiError::invalid(
                "top_logprobs",
                format!("is only possible with \"{LOGPROBS}\" in 'include'"),
            ));
        }
        raw.logprobs = wants_scores.then(|| top_logprobs.unwrap_or(0).into());

        let mut rendering = Rendering::plain(messages);
        let effort = take_reasoning(&mut fields, &mut rendering, state)?;
        let format = take_format(&mut fields, &mut raw)?;
        let tool_choice = match fields.take::<Value>("tool_choice")? {
            None => "auto".to_owned(),
            Some(Value::String(choice)) if matches!(choice.as_str(), "auto" | "none") => choice,
            Some(_) => return Err(ApiError::unsupported("tool_choice")),
        };
        let metadata = fields.take::<Fields>("metadata")?.map(Fields::into_entries).unwrap_or_default();
        if metadata.len() > 16 || metadata.values().any(|value| !value.is_string()) {
            return Err(ApiError::invalid("metadata", "must be at most 16 strings by name"));
        }
        let parallel_tool_calls = fields.take("parallel_tool_calls")?.unwrap_or(true);
        let user = fields.take::<String>("user")?;
        fields.take::<String>("safety_identifier")?;
        fields.take::<String>("prompt_cache_key")?;
        fields.refuse(UNSUPPORTED)?;
        fields.finish()?;
        let max_output_tokens = raw.max_tokens;
        let params = Params::check(raw, &state.model)?;
        let sampling = params.sampling();
        let echo = Echo {
            instructions: json!(instructions),
            max_output_tokens: json!(max_output_tokens.and_then(|n| u32::try_from(n).ok())),
            metadata,
            parallel_tool_calls,
            effort: json!(effort),
            format,
            temperature: sampling.temperature,
            top_p: sampling.top_p,
            top_logprobs: top_logprobs.unwrap_or(0),
            tool_choice,
            user: json!(user),
        };
        Ok(Self { rendering, delivery, params, echo })
    }
}

/// `text`: what the output has to follow. Also as the answer repeats it.
fn take_format(fields: &mut Fields, raw: &mut RawParams) -> Result<Value, ApiError> {
    let plain = json!({"type": "text"});
    let Some(mut text) = fields.take::<Fields>("text")? else { return Ok(plain) };
    let format = text.take::<Fields>("format")?;
    text.refuse(&[("verbosity", never)])?;
    text.finish()?;
    let Some(mut format) = format else { return Ok(plain) };
    let (wanted, repeated) = match format.require::<String>("type")?.as_str() {
        "text" => (None, plain),
        "json_object" => (Some(structured::of_any_object("text.format")), json!({"type": "json_object"})),
        "json_schema" => {
            let name = format.require::<String>("name")?;
            // Labels. What is not strict is followed too: that is within what was asked for.
            let description = format.take::<String>("description")?;
            let strict = format.take::<bool>("strict")?;
            let field = format.path("schema");
            let schema = format.require::<Value>("schema")?;
            let repeated = json!({
                "type": "json_schema", "name": name, "description": description, "strict": strict.unwrap_or(true),
                "schema": schema,
            });
            (Some(structured::of_schema(&field, schema)?), repeated)
        }
        _ => return Err(ApiError::invalid(&format.path("type"), "must be text, json_object or json_schema")),
    };
    format.finish()?;
    raw.structured = wanted;
    Ok(repeated)
}

/// `reasoning`: the effort, if the template knows one.
fn take_reasoning(
    fields: &mut Fields,
    rendering: &mut Rendering,
    state: &FrontendState,
) -> Result<Option<String>, ApiError> {
    let Some(mut reasoning) = fields.take::<Fields>("reasoning")? else { return Ok(None) };
    let effort = reasoning.take::<String>("effort")?;
    if let Some(effort) = &effort {
        rendering.set_effort("reasoning.effort", effort, state)?;
    }
    reasoning.refuse(&[("summary", never), ("generate_summary", never)])?;
    reasoning.finish()?;
    Ok(effort)
}

/// `input`: a text, or what was said so far.
fn input(input: Value, messages: &mut Vec<Value>) -> Result<(), ApiError> {
    match input {
        Value::String(text) => messages.push(json!({"role": "user", "content": text})),
        Value::Array(_) => {
            let items = Vec::<Fields>::from_json(input, "input")?;
            if items.is_empty() {
                return Err(ApiError::invalid("input", "must not be empty"));
            }
            for item in items {
                messages.push(message(item)?);
            }
        }
        other => return Err(ApiError::wrong_type("input", "a string or a list of items", kind(&other))),
    }
    Ok(())
}

fn message(mut item: Fields) -> Result<Value, ApiError> {
    if item.take::<String>("type")?.is_some_and(|kind| kind != "message") {
        let reason = "must be \"message\": there are no other items without tools";
        return Err(ApiError::invalid(&item.path("type"), reason));
    }
    let role: String = item.require("role")?;
    let template_role = match role.as_str() {
        "developer" => "system",
        "system" | "user" | "assistant" => role.as_str(),
        _ => {
            let reason = "must be one of system, developer, user and assistant";
            return Err(ApiError::invalid(&item.path("role"), reason));
        }
    };
    let at = item.path("content");
    let content = match item.require::<Value>("content")? {
        Value::String(text) => text,
        parts @ Value::Array(_) => {
            let parts = Vec::<Fields>::from_json(parts, &at)?;
            parts.into_iter().map(part).collect::<Result<Vec<_>, _>>()?.join("\n")
        }
        other => return Err(ApiError::wrong_type(&at, "a string or a list of text parts", kind(&other))),
    };
    // What clients repeat of earlier answers.
    item.take::<String>("id")?;
    item.take::<String>("status")?;
    item.finish()?;
    Ok(json!({"role": template_role, "content": content}))
}

fn part(mut part: Fields) -> Result<String, ApiError> {
    let kind: String = part.require("type")?;
    match kind.as_str() {
        "input_text" | "text" => {}
        "output_text" => {
            part.take::<Vec<Value>>("logprobs")?;
            part.refuse(&[("annotations", is_empty)])?;
        }
        _ => {
            let reason = "must be \"input_text\" or \"output_text\": the model takes nothing else";
            return Err(ApiError::invalid(&part.path("type"), reason));
        }
    }
    let text = part.require("text")?;
    part.finish()?;
    Ok(text)
}
