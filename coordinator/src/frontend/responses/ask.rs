//! What clients of the responses API send.

use serde_json::{Map, Value, json};

use super::items;
use crate::frontend::{
    FrontendState,
    error::ApiError,
    fields::{Fields, FromJson, Unsupported},
    neutral::{Delivery, StreamedUsage},
    params::{MAX_LOGPROBS, Params, RawParams, in_range},
    prompt::Rendering,
    structured,
    tools::{
        budget::ThoughtBudget,
        reader::Reading,
        toolbox::{Toolbox, flat},
    },
};

/// The only thing that can be asked for beside the text.
const LOGPROBS: &str = "message.output_text.logprobs";

/// A request, checked and rendered.
pub struct ResponseAsk {
    /// What the model reads.
    pub text: String,
    pub reading: Reading,
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
    pub tools: Value,
    pub tool_choice: Value,
    pub user: Value,
}

pub fn is_empty(value: &Value) -> bool {
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
    pub fn parse(mut fields: Fields, state: &FrontendState, name: &str) -> Result<Self, ApiError> {
        state.check_model(fields.take::<String>("model")?.as_deref())?;
        let instructions = fields.take::<String>("instructions")?;
        let mut messages: Vec<Value> = Vec::new();
        messages.extend(instructions.iter().map(|text| json!({"role": "system", "content": text})));
        items::input(fields.require("input")?, &mut messages)?;
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
        raw.thought_budget = ThoughtBudget::take(&mut fields)?;
        let format = take_format(&mut fields, &mut raw)?;
        let (toolbox, tools, tool_choice) = take_tools(&mut fields)?;
        let metadata = fields.take::<Fields>("metadata")?.map(Fields::into_entries).unwrap_or_default();
        if metadata.len() > 16 || metadata.values().any(|value| !value.is_string()) {
            return Err(ApiError::invalid("metadata", "must be at most 16 strings by name"));
        }
        let user = fields.take::<String>("user")?;
        fields.take::<String>("safety_identifier")?;
        fields.take::<String>("prompt_cache_key")?;
        fields.refuse(UNSUPPORTED)?;
        fields.finish()?;
        let max_output_tokens = raw.max_tokens;
        let (text, reading) = state.prompt_with_tools(&mut rendering, &toolbox, &mut raw, name)?;
        if wants_scores && reading.tells_apart() {
            let reason =
                format!("can't have \"{LOGPROBS}\" where calls or thoughts may come: a token may belong to both");
            return Err(ApiError::invalid("include", reason));
        }
        let params = Params::check(raw, &state.model)?;
        let sampling = params.sampling();
        let echo = Echo {
            instructions: json!(instructions),
            max_output_tokens: json!(max_output_tokens.and_then(|n| u32::try_from(n).ok())),
            metadata,
            parallel_tool_calls: toolbox.is_parallel,
            effort: json!(effort),
            format,
            temperature: sampling.temperature,
            top_p: sampling.top_p,
            top_logprobs: top_logprobs.unwrap_or(0),
            tools,
            tool_choice,
            user: json!(user),
        };
        Ok(Self { text, reading, delivery, params, echo })
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

/// Tools, and them and the choice as they were sent.
fn take_tools(fields: &mut Fields) -> Result<(Toolbox, Value, Value), ApiError> {
    let sent = fields.take::<Value>("tools")?.unwrap_or_else(|| json!([]));
    let mut tools = Vec::new();
    for mut tool in Vec::<Fields>::from_json(sent.clone(), "tools")? {
        if tool.require::<String>("type")? != "function" {
            let reason = "must be \"function\": there are no other tools here";
            return Err(ApiError::invalid(&tool.path("type"), reason));
        }
        tools.push(flat(tool)?);
    }
    let mut toolbox = Toolbox::new("tools", tools)?;
    let choice = fields.take::<Value>("tool_choice")?.unwrap_or_else(|| "auto".into());
    toolbox.choose(choice.clone(), |choice| choice.require("name"))?;
    toolbox.is_parallel = fields.take("parallel_tool_calls")?.unwrap_or(true);
    Ok((toolbox, sent, choice))
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
