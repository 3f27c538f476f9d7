//! What clients of Anthropic's API send.

use phalanx_cluster::id::TokenId;
use serde_json::Value;

use super::turns::Turns;
use crate::frontend::{
    FrontendState,
    error::ApiError,
    fields::{Fields, Unsupported},
    neutral::{Delivery, StreamedUsage},
    params::{Params, RawParams, in_range},
    prompt::{Ending, Prompt, Rendering, SpecialTokens},
    tools::{
        budget::ThoughtBudget,
        reader::Reading,
        toolbox::{Choice, Tool, Toolbox},
    },
};

/// A request, checked and rendered.
pub struct MessageAsk {
    pub prompt: Vec<TokenId>,
    pub reading: Reading,
    pub delivery: Delivery,
    pub params: Params,
}

/// What the prompt is made of.
pub struct Prompting {
    rendering: Rendering,
    toolbox: Toolbox,
    thinking: Thinking,
}

/// What is said of thoughts.
#[derive(Default)]
struct Thinking {
    is_told: bool,
    budget: Option<ThoughtBudget>,
}

pub fn is_empty(value: &Value) -> bool {
    value.as_array().is_some_and(Vec::is_empty)
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
        let mut turns = Turns::default();
        if let Some(system) = fields.take::<Value>("system")? {
            turns.add_system(system)?;
        }
        let sent = fields.require::<Vec<Fields>>("messages")?;
        if sent.is_empty() {
            return Err(ApiError::invalid("messages", "must have at least one message"));
        }
        for message in sent {
            turns.add(message)?;
        }
        let messages = turns.into_messages();
        fields.refuse(UNSUPPORTED)?;
        // Every prompt's beginning is cached as far as there is memory: a mark changes nothing.
        fields.take::<Fields>("cache_control")?;
        let is_begun = messages.last().is_some_and(|message| message["role"] == "assistant");
        let ending = if is_begun { Ending::OpenMessage } else { Ending::GenerationPrompt };
        let mut rendering = Rendering { ending, ..Rendering::plain(messages) };
        let thinking = take_thinking(fields, &mut rendering, state)?;
        Ok(Self { rendering, toolbox: take_tools(fields)?, thinking })
    }

    /// As the model reads it, and how its answer is read. Takes time.
    fn read(
        &mut self,
        state: &FrontendState,
        raw: &mut RawParams,
        name: &str,
    ) -> Result<(Vec<TokenId>, Reading), ApiError> {
        raw.thought_budget = self.thinking.budget.take();
        let asked = state.prompt_with_tools(&mut self.rendering, &self.toolbox, raw, name);
        let (text, reading) = asked.map_err(|error| match error.param() {
            // The field is OpenAI's; here the last message alone says it.
            Some("continue_final_message") => {
                ApiError::invalid("messages", "ends with a message that can't be gone on with")
            }
            _ => error,
        })?;
        let ids = state.encode(&Prompt::Text(text), SpecialTokens::Leave, "messages")?;
        Ok((ids, Reading { shows_thoughts: self.thinking.is_told, ..reading }))
    }

    /// As the model reads it. Takes time.
    pub fn tokens(&mut self, state: &FrontendState) -> Result<Vec<TokenId>, ApiError> {
        self.read(state, &mut RawParams::default(), "").map(|(ids, _)| ids)
    }
}

/// `thinking`: whether thoughts are told, and how long they may be.
fn take_thinking(fields: &mut Fields, rendering: &mut Rendering, state: &FrontendState) -> Result<Thinking, ApiError> {
    let Some(mut thinking) = fields.take::<Fields>("thinking")? else { return Ok(Thinking::default()) };
    let is_on = match thinking.require::<String>("type")?.as_str() {
        "disabled" => false,
        "enabled" | "adaptive" => true,
        _ => return Err(ApiError::invalid("thinking.type", "must be enabled, adaptive or disabled")),
    };
    let field = thinking.path("budget_tokens");
    let tokens = in_range(&field, thinking.take("budget_tokens")?, 1024..=u32::MAX)?;
    if tokens.is_some() && !is_on {
        return Err(ApiError::invalid(&field, "means nothing without thoughts"));
    }
    thinking.refuse(&[("display", |value| value == "summarized")])?;
    thinking.finish()?;
    if rendering.reads("enable_thinking", state) {
        rendering.variables.insert("enable_thinking".to_owned(), is_on.into());
    } else if is_on && !state.tells_thoughts(rendering) {
        return Err(ApiError::invalid("thinking", "is not possible: the model has no thoughts that could be told"));
    }
    Ok(Thinking { is_told: is_on, budget: tokens.map(|tokens| ThoughtBudget { field, tokens }) })
}

/// `tools` and `tool_choice`.
fn take_tools(fields: &mut Fields) -> Result<Toolbox, ApiError> {
    let mut tools = Vec::new();
    for mut tool in fields.take::<Vec<Fields>>("tools")?.unwrap_or_default() {
        if tool.take::<String>("type")?.is_some_and(|kind| kind != "custom") {
            return Err(ApiError::invalid(&tool.path("type"), "must be \"custom\": there are no other tools here"));
        }
        let at = [tool.path("name"), tool.path("input_schema")];
        let (name, description) = (tool.require("name")?, tool.take("description")?);
        let (schema, is_strict) = (tool.take("input_schema")?, tool.flag("strict")?);
        tool.take::<Fields>("cache_control")?;
        tool.finish()?;
        tools.push(Tool::new(&at, name, description, schema, is_strict)?);
    }
    let mut toolbox = Toolbox::new("tools", tools)?;
    if let Some(mut choice) = fields.take::<Fields>("tool_choice")? {
        toolbox.choice = match choice.require::<String>("type")?.as_str() {
            "auto" => Choice::Auto,
            "none" => Choice::None,
            "any" => Choice::Required,
            "tool" => Choice::Named(choice.require("name")?),
            _ => return Err(ApiError::invalid("tool_choice.type", "must be auto, any, tool or none")),
        };
        toolbox.is_parallel = !choice.flag("disable_parallel_tool_use")?;
        choice.finish()?;
        toolbox.check_choice("tool_choice")?;
    }
    Ok(toolbox)
}

impl MessageAsk {
    pub fn parse(mut fields: Fields, state: &FrontendState, name: &str) -> Result<Self, ApiError> {
        let mut prompting = Prompting::take(&mut fields, state)?;
        let mut raw = RawParams {
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
        let (prompt, reading) = prompting.read(state, &mut raw, name)?;
        let params = Params::check(raw, &state.model).map_err(|error| match error.param() {
            Some("stop") => ApiError::invalid("stop_sequences", error.message().trim_start_matches("'stop' ")),
            _ => error,
        })?;
        Ok(Self { prompt, reading, delivery, params })
    }
}
