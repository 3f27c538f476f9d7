//! What Ollama's clients send.

use phalanx_cluster::id::TokenId;
use serde_json::{Value, json};

use super::{answer::Form, options};
use crate::frontend::{
    FrontendState,
    error::ApiError,
    fields::{Fields, Integer, Unsupported, kind},
    neutral::{Delivery, StreamedUsage},
    params::{MAX_LOGPROBS, Params, RawParams, in_range},
    prompt::{Ending, Prompt, Rendering, SpecialTokens},
    structured::{self, Wanted},
    tools::{reader::Reading, toolbox::Toolbox},
};

/// A request, checked and rendered.
pub struct Ask {
    /// The model's name as the client has it.
    pub name: String,
    pub input: Input,
    pub prompt: Vec<TokenId>,
    pub reading: Reading,
    pub delivery: Delivery,
    pub params: Params,
}

/// What the prompt is made of.
pub enum Input {
    /// A chat, behind tokens of earlier ones.
    Rendered { before: Vec<Integer>, chat: Rendering },
    /// A text as it is.
    Raw(String),
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Array(items) => items.is_empty(),
        Value::String(text) => text.is_empty(),
        _ => false,
    }
}

fn is_false(value: &Value) -> bool {
    *value == Value::Bool(false)
}

/// What has no implementation, with the value that asks for nothing.
static UNSUPPORTED: &[Unsupported] = &[
    ("tools", is_empty),
    ("images", is_empty),
    ("suffix", is_empty),
    // The prompt is read whole or refused, and an answer ends where the context does.
    ("truncate", is_false),
    ("shift", is_false),
];

/// Whether a request names no prompt.
pub fn asks_for_nothing(mut fields: Fields, form: Form) -> bool {
    match fields.take::<Value>(form.prompt_field()) {
        Ok(Some(prompt)) => is_empty(&prompt),
        Ok(None) => true,
        Err(_) => false,
    }
}

impl Ask {
    /// Checks a request that names no prompt, and gives the model's name.
    pub fn check_empty(mut fields: Fields, state: &FrontendState, form: Form) -> Result<String, ApiError> {
        let name = take_model(&mut fields, state)?;
        if fields.take::<Value>("keep_alive")?.is_some_and(|keep| keep == 0 || keep == "0") {
            return Err(ApiError::invalid("keep_alive", "can't be 0: the model is served as long as the server runs"));
        }
        fields.take::<Value>(form.prompt_field())?;
        options::take(fields.take("options")?, state.model.max_model_len)?;
        fields.take::<bool>("stream")?;
        take_format(&mut fields)?;
        fields.refuse(UNSUPPORTED)?;
        fields.finish()?;
        Ok(name)
    }

    /// `request` is the request's unique name.
    pub fn parse(mut fields: Fields, state: &FrontendState, form: Form, request: &str) -> Result<Self, ApiError> {
        let name = take_model(&mut fields, state)?;
        let is_streamed = fields.take("stream")?.unwrap_or(true);
        let delivery = if is_streamed { Delivery::Streamed(StreamedUsage::Included) } else { Delivery::Whole };
        // How long a model stays in memory: this one stays.
        fields.take::<Value>("keep_alive")?;
        let mut raw = options::take(fields.take("options")?, state.model.max_model_len)?;
        let wants_scores = fields.flag("logprobs")?;
        let n_top = in_range("top_logprobs", fields.take("top_logprobs")?, 0..=MAX_LOGPROBS)?;
        if !wants_scores && n_top.is_some_and(|n| n > 0) {
            return Err(ApiError::invalid("top_logprobs", "is only possible when 'logprobs' is true"));
        }
        raw.logprobs = wants_scores.then(|| n_top.unwrap_or(0).into());
        raw.structured = take_format(&mut fields)?;
        let mut input = match form {
            Form::Chat => chat(&mut fields)?,
            Form::Generate => generate(&mut fields)?,
        };
        let shows_thoughts = take_think(&mut fields, &mut input, state)?;
        let toolbox = if form == Form::Chat { Toolbox::take_tools(&mut fields)? } else { Toolbox::default() };
        fields.refuse(UNSUPPORTED)?;
        fields.finish()?;
        let (prompt, reading) = input.read(state, form.prompt_field(), &toolbox, &mut raw, request)?;
        let reading = Reading { shows_thoughts, ..reading };
        let params = Params::check(raw, &state.model).map_err(options::renamed)?;
        Ok(Self { name, input, prompt, reading, delivery, params })
    }
}

/// The model, with or without the tag that Ollama gives names without one.
fn take_model(fields: &mut Fields, state: &FrontendState) -> Result<String, ApiError> {
    let name: String = fields.require("model")?;
    state
        .check_model(Some(name.strip_suffix(":latest").unwrap_or(&name)))
        .or_else(|_| state.check_model(Some(&name)))?;
    Ok(name)
}

/// `format`: "json", or a schema.
fn take_format(fields: &mut Fields) -> Result<Option<Wanted>, ApiError> {
    const FORMAT: &str = "format";
    match fields.take::<Value>(FORMAT)? {
        None => Ok(None),
        Some(Value::String(name)) if name.is_empty() => Ok(None),
        Some(Value::String(name)) if name == "json" => Ok(Some(structured::of_any_object(FORMAT))),
        Some(schema @ Value::Object(_)) => structured::of_schema(FORMAT, schema).map(Some),
        Some(Value::String(_)) => Err(ApiError::invalid(FORMAT, "must be \"json\" or a JSON schema")),
        Some(other) => Err(ApiError::wrong_type(FORMAT, "\"json\" or a JSON schema", kind(&other))),
    }
}

fn chat(fields: &mut Fields) -> Result<Input, ApiError> {
    let mut messages = Vec::new();
    for mut message in fields.require::<Vec<Fields>>("messages")? {
        let role: String = message.require("role")?;
        if !matches!(role.as_str(), "system" | "user" | "assistant" | "tool") {
            let reason = "must be one of system, user, assistant and tool";
            return Err(ApiError::invalid(&message.path("role"), reason));
        }
        let content: String = message.take("content")?.unwrap_or_default();
        let thinking = message.take::<String>("thinking")?;
        let tool_name = message.take::<String>("tool_name")?;
        let tool_call_id = message.take::<String>("tool_call_id")?;
        let calls = message.take::<Vec<Fields>>("tool_calls")?.unwrap_or_default();
        let calls = calls.into_iter().map(earlier_call).collect::<Result<Vec<_>, _>>()?;
        message.refuse(&[("images", is_empty)])?;
        message.finish()?;
        let mut message = json!({"role": role, "content": content});
        if let Some(thinking) = thinking.filter(|t| !t.is_empty()) {
            message["reasoning_content"] = thinking.into();
        }
        if let Some(name) = tool_name {
            message["name"] = name.into();
        }
        if let Some(id) = tool_call_id {
            message["tool_call_id"] = id.into();
        }
        if !calls.is_empty() {
            message["tool_calls"] = calls.into();
        }
        messages.push(message);
    }
    // As there, an assistant's last message is gone on with.
    let is_begun = messages.last().is_some_and(|m: &Value| {
        m["role"] == "assistant" && !m["content"].as_str().unwrap_or_default().trim().is_empty()
    });
    let ending = if is_begun { Ending::OpenMessage } else { Ending::GenerationPrompt };
    Ok(Input::Rendered { before: Vec::new(), chat: Rendering { ending, ..Rendering::plain(messages) } })
}

/// A call that an answer had.
fn earlier_call(mut call: Fields) -> Result<Value, ApiError> {
    let id = call.take::<String>("id")?;
    call.take::<String>("type")?;
    let mut function: Fields = call.require("function")?;
    let name: String = function.require("name")?;
    let arguments = function.take::<Fields>("arguments")?.map(Fields::into_entries).unwrap_or_default();
    function.take::<Integer>("index")?;
    function.finish()?;
    call.finish()?;
    Ok(json!({"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}))
}

fn generate(fields: &mut Fields) -> Result<Input, ApiError> {
    let prompt: String = fields.require("prompt")?;
    let system = fields.take::<String>("system")?;
    let before = fields.take::<Vec<Integer>>("context")?.unwrap_or_default();
    let is_raw = fields.flag("raw")?;
    if fields.take::<String>("template")?.is_some_and(|template| !template.is_empty()) {
        let reason = "is not possible: send the text as the model is to read it, with 'raw': true";
        return Err(ApiError::invalid("template", reason));
    }
    if is_raw {
        if system.is_some_and(|system| !system.is_empty()) {
            return Err(ApiError::invalid("system", "means nothing with 'raw': true: put it into the prompt"));
        }
        if !before.is_empty() {
            return Err(ApiError::invalid("context", "is not possible with 'raw': true: put it into the prompt"));
        }
        return Ok(Input::Raw(prompt));
    }
    let system = system.filter(|system| !system.is_empty()).map(|system| json!({"role": "system", "content": system}));
    let messages = system.into_iter().chain([json!({"role": "user", "content": prompt})]).collect();
    Ok(Input::Rendered { before, chat: Rendering::plain(messages) })
}

/// `think`: whether the model thinks before it answers, and how much, where its template knows how. Whether thoughts are told.
fn take_think(fields: &mut Fields, input: &mut Input, state: &FrontendState) -> Result<bool, ApiError> {
    let think = fields.take::<Value>("think")?;
    let effort = match &think {
        None => return Ok(true),
        Some(Value::Bool(false)) => "none",
        Some(Value::Bool(true)) => "medium",
        Some(Value::String(level)) => level,
        Some(other) => return Err(ApiError::wrong_type("think", "true, false or a level", kind(other))),
    };
    match input {
        Input::Raw(_) if effort == "none" => {}
        Input::Raw(_) => return Err(ApiError::invalid("think", "means nothing with 'raw': true")),
        // It thinks anyway.
        Input::Rendered { chat, .. } if think == Some(true.into()) && state.always_thinks(chat) => {}
        Input::Rendered { chat, .. } => chat.set_effort("think", effort, state)?,
    }
    Ok(effort != "none")
}

impl Input {
    /// As the model reads it, and how its answer is read. Takes time.
    fn read(
        &mut self,
        state: &FrontendState,
        field: &str,
        toolbox: &Toolbox,
        raw: &mut RawParams,
        request: &str,
    ) -> Result<(Vec<TokenId>, Reading), ApiError> {
        match self {
            Self::Raw(text) => {
                let ids = state.encode(&Prompt::Text(text.clone()), SpecialTokens::Add, field)?;
                Ok((ids, Reading::plain()))
            }
            Self::Rendered { before, chat } => {
                let asked = state.prompt_with_tools(chat, toolbox, raw, request);
                let (text, reading) = asked.map_err(|error| match error.param() {
                    Some("continue_final_message" | "chat_template") => {
                        ApiError::invalid(field, format!("can't be rendered: {}", error.message()))
                    }
                    _ => error,
                })?;
                let mut ids = state.encode(&Prompt::Ids(before.clone()), SpecialTokens::Leave, "context")?;
                ids.extend(state.encode(&Prompt::Text(text), SpecialTokens::Leave, field)?);
                Ok((ids, reading))
            }
        }
    }
}
