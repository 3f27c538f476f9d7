//! What clients of Anthropic's API send.

use phalanx_cluster::id::TokenId;
use serde_json::{Value, json};

use crate::frontend::{
    FrontendState,
    error::ApiError,
    fields::{Fields, FromJson, Unsupported, kind},
    neutral::{Delivery, StreamedUsage},
    params::{Params, RawParams},
    prompt::{Ending, Prompt, Rendering, SpecialTokens},
};

/// A request, checked but not yet rendered.
pub struct MessageAsk {
    pub prompting: Prompting,
    pub delivery: Delivery,
    pub params: Params,
}

/// What the prompt is made of.
pub struct Prompting(Rendering);

fn is_empty(value: &Value) -> bool {
    value.as_array().is_some_and(Vec::is_empty)
}

fn is_disabled(value: &Value) -> bool {
    value["type"] == "disabled"
}

fn is_plain_choice(value: &Value) -> bool {
    matches!(value["type"].as_str(), Some("auto" | "none"))
}

fn is_plain_tier(value: &Value) -> bool {
    matches!(value.as_str(), Some("auto" | "standard_only"))
}

fn is_standard(value: &Value) -> bool {
    value == "standard"
}

fn never(_: &Value) -> bool {
    false
}

/// What shapes the prompt and is not there yet.
static UNSUPPORTED: &[Unsupported] = &[
    ("tools", is_empty),
    ("tool_choice", is_plain_choice),
    ("thinking", is_disabled),
    ("mcp_servers", is_empty),
    ("speed", is_standard),
    ("container", never),
    ("context_management", never),
    ("output_config", never),
    ("output_format", never),
];

impl Prompting {
    /// Takes `model`, `system`, `messages` and what may only be empty.
    pub fn take(fields: &mut Fields, state: &FrontendState) -> Result<Self, ApiError> {
        state.check_model(Some(&fields.require::<String>("model")?))?;
        let mut messages: Vec<Value> = Vec::new();
        if let Some(system) = fields.take::<Value>("system")? {
            messages.push(json!({"role": "system", "content": text_of(system, "system")?}));
        }
        let sent = fields.require::<Vec<Fields>>("messages")?;
        if sent.is_empty() {
            return Err(ApiError::invalid("messages", "must have at least one message"));
        }
        for mut message in sent {
            let role: String = message.require("role")?;
            if !matches!(role.as_str(), "user" | "assistant") {
                return Err(ApiError::invalid(&message.path("role"), "must be user or assistant"));
            }
            let at = message.path("content");
            let content = text_of(message.require("content")?, &at)?;
            message.finish()?;
            match messages.last_mut().filter(|last| last["role"] == role.as_str()) {
                // Neighbours of one role are one turn.
                Some(last) => {
                    last["content"] = format!("{}\n{content}", last["content"].as_str().unwrap_or_default()).into();
                }
                None => messages.push(json!({"role": role, "content": content})),
            }
        }
        fields.refuse(UNSUPPORTED)?;
        // Every prompt's beginning is cached as far as there is memory: a mark changes nothing.
        fields.take::<Fields>("cache_control")?;
        let is_begun = messages.last().is_some_and(|message| message["role"] == "assistant");
        let ending = if is_begun { Ending::OpenMessage } else { Ending::GenerationPrompt };
        Ok(Self(Rendering { ending, ..Rendering::plain(messages) }))
    }

    /// As the model reads it. Takes time.
    pub fn tokens(&self, state: &FrontendState) -> Result<Vec<TokenId>, ApiError> {
        let text = state.render(&self.0).map_err(|error| match error.param() {
            // The field is OpenAI's; here the last message alone says it.
            Some("continue_final_message") => {
                ApiError::invalid("messages", "ends with a message that can't be gone on with")
            }
            _ => error,
        })?;
        state.encode(&Prompt::Text(text), SpecialTokens::Leave, "messages")
    }
}

/// A content: a text, or blocks of text, which are joined by newlines.
fn text_of(content: Value, at: &str) -> Result<String, ApiError> {
    match content {
        Value::String(text) => Ok(text),
        Value::Array(_) => {
            let blocks = Vec::<Fields>::from_json(content, at)?;
            Ok(blocks.into_iter().map(text_block).collect::<Result<Vec<_>, _>>()?.join("\n"))
        }
        other => Err(ApiError::wrong_type(at, "a string or a list of text blocks", kind(&other))),
    }
}

fn text_block(mut block: Fields) -> Result<String, ApiError> {
    let kind: String = block.require("type")?;
    if kind != "text" {
        return Err(ApiError::invalid(&block.path("type"), "must be \"text\": the model takes nothing else"));
    }
    let text = block.require("text")?;
    block.take::<Fields>("cache_control")?;
    block.refuse(&[("citations", is_empty)])?;
    block.finish()?;
    Ok(text)
}

impl MessageAsk {
    pub fn parse(mut fields: Fields, state: &FrontendState) -> Result<Self, ApiError> {
        let prompting = Prompting::take(&mut fields, state)?;
        let raw = RawParams {
            max_tokens: Some(fields.require("max_tokens")?),
            temperature: fields.take("temperature")?,
            top_p: fields.take("top_p")?,
            top_k: fields.take("top_k")?,
            stop: fields.take("stop_sequences")?.unwrap_or_default(),
            ..RawParams::default()
        };
        if raw.temperature.is_some_and(|t| !(0.0..=1.0).contains(&t)) {
            return Err(ApiError::invalid("temperature", "must be from 0 to 1"));
        }
        let is_streamed = fields.flag("stream")?;
        let delivery = if is_streamed { Delivery::Streamed(StreamedUsage::Included) } else { Delivery::Whole };
        // A label for somebody's records.
        if let Some(mut metadata) = fields.take::<Fields>("metadata")? {
            metadata.take::<String>("user_id")?;
            metadata.finish()?;
        }
        fields.refuse(&[("service_tier", is_plain_tier)])?;
        fields.finish()?;
        let params = Params::check(raw, &state.model).map_err(|error| match error.param() {
            Some("stop") => ApiError::invalid("stop_sequences", error.message().trim_start_matches("'stop' ")),
            _ => error,
        })?;
        Ok(Self { prompting, delivery, params })
    }
}
