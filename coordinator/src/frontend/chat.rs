//! `POST /v1/chat/completions`.

use std::sync::Arc;

use axum::{
    Json,
    response::{IntoResponse, Response},
};
use phalanx_cluster::id::TokenId;
use phalanx_proto::v1::TokenScore;
use serde::Serialize;
use serde_json::{Value, json};

use super::{
    FrontendState,
    asked::{Asked, Call},
    error::ApiError,
    fields::{Fields, Integer},
    generation::{Collected, Collection, Generation, StopReason, UsageObject, finish_reason, unix_seconds},
    logprobs::{ChatLogprobs, TokenNames, prompt_logprobs},
    messages,
    neutral::{self, Delivery, StreamedUsage},
    params::{MAX_LOGPROBS, Params, RawParams, in_range},
    prompt::{Prompt, Rendering, SpecialTokens},
    reply::Reply,
    sse::{self, Chunk, Chunks, Payload},
    streams::Prepared,
    tools::{
        budget::ThoughtBudget,
        reader::{Piece, Reader, Reading, Told, ToldCall},
        toolbox::Toolbox,
    },
};
use crate::{
    request::{Finish, Output, Usage},
    served_model::ServedModel,
};

/// Where it is.
pub const PATH: &str = "/v1/chat/completions";

/// A request, checked but not yet rendered.
struct ChatRequest {
    text: String,
    reading: Reading,
    special_tokens: SpecialTokens,
    delivery: Delivery,
    params: Params,
    prompt_logprobs: Option<u32>,
    returns_token_ids: bool,
    token_names: TokenNames,
    /// What the answer begins with.
    echoed: String,
    name: Option<String>,
}

/// The text of the last message if it is an assistant's: what `echo` repeats.
fn last_words(messages: &[Value]) -> String {
    let last = messages.last().filter(|message| message["role"] == "assistant");
    last.and_then(|message| message["content"].as_str()).unwrap_or_default().to_owned()
}

impl ChatRequest {
    fn parse(mut fields: Fields, state: &FrontendState, name: &str) -> Result<Self, ApiError> {
        state.check_model(fields.take::<String>("model")?.as_deref())?;
        let messages = messages::parse(fields.require("messages")?)?;
        let delivery = Delivery::take(&mut fields)?;
        let mut raw = RawParams::take_shared(&mut fields)?;
        take_logprobs(&mut fields, &mut raw)?;
        take_max_completion_tokens(&mut fields, &mut raw)?;
        neutral::check_prompt_logprobs(raw.prompt_logprobs, delivery)?;
        let prompt_logprobs = in_range("prompt_logprobs", raw.prompt_logprobs, 0..=MAX_LOGPROBS)?;
        let echoed = if fields.flag("echo")? { last_words(&messages) } else { String::new() };
        let mut rendering = Rendering::take(&mut fields, messages, state)?;
        let toolbox = Toolbox::take(&mut fields)?;
        let shows_thoughts = fields.take("include_reasoning")?.unwrap_or(true);
        raw.thought_budget = ThoughtBudget::take(&mut fields)?;
        let special_tokens = if fields.flag("add_special_tokens")? { SpecialTokens::Add } else { SpecialTokens::Leave };
        let returns_token_ids = fields.flag("return_token_ids")?;
        let token_names = TokenNames::take(&mut fields)?;
        let own_name = neutral::take_request_id(&mut fields)?;
        neutral::take_of_chat(&mut fields)?;
        fields.finish()?;
        let (text, reading) = state.prompt_with_tools(&mut rendering, &toolbox, &mut raw, name)?;
        let params = Params::check(raw, &state.model)?;
        Ok(Self {
            text,
            reading: Reading { shows_thoughts, ..reading },
            special_tokens,
            delivery,
            params,
            prompt_logprobs,
            returns_token_ids,
            token_names,
            echoed,
            name: own_name,
        })
    }
}

/// `logprobs` and `top_logprobs`.
fn take_logprobs(fields: &mut Fields, raw: &mut RawParams) -> Result<(), ApiError> {
    let is_on = fields.flag("logprobs")?;
    let top = in_range("top_logprobs", fields.take("top_logprobs")?, 0..=MAX_LOGPROBS)?;
    if !is_on && top.is_some_and(|top| top > 0) {
        return Err(ApiError::invalid("top_logprobs", "is only possible when 'logprobs' is true"));
    }
    raw.logprobs = is_on.then(|| top.unwrap_or(0).into());
    Ok(())
}

/// `max_completion_tokens`, the newer name of `max_tokens`.
fn take_max_completion_tokens(fields: &mut Fields, raw: &mut RawParams) -> Result<(), ApiError> {
    let Some(newer) = fields.take::<Integer>("max_completion_tokens")? else { return Ok(()) };
    if raw.max_tokens.is_some_and(|older| older != newer) {
        return Err(ApiError::invalid("max_completion_tokens", "and 'max_tokens' differ: give one of them"));
    }
    raw.max_tokens = Some(newer);
    raw.max_tokens_field = "max_completion_tokens";
    Ok(())
}

/// The endpoint.
pub async fn create(asked: Asked) -> Result<Response, ApiError> {
    let prepare = |state: &FrontendState, fields: Fields, call: Call| {
        let chat = ChatRequest::parse(fields, state, &call.name)?;
        let prompt = state.encode(&Prompt::Text(chat.text), chat.special_tokens, "messages")?;
        let id = format!("chatcmpl-{}", chat.name.as_ref().unwrap_or(&call.name));
        // Clients may give the same name twice; here each request has its own.
        let own = format!("chatcmpl-{}", call.name);
        let request = chat.params.request(own, "messages", prompt, &state.model, call.deadline)?;
        let answer = Answer {
            id,
            created: unix_seconds(),
            model: Arc::clone(&state.model),
            wants_scores: chat.params.wants_scores(),
            token_names: chat.token_names,
            n_prompt: request.prompt.len(),
            echoed: state.repeated(chat.echoed),
            reading: chat.reading,
            prompt_token_ids: chat.returns_token_ids.then(|| request.prompt.clone()),
        };
        let reply = ChatReply {
            answer: Arc::new(answer),
            delivery: chat.delivery,
            prompt_logprobs: chat.prompt_logprobs,
            n: chat.params.n as usize,
        };
        let has_seed = chat.params.has_seed();
        Ok(Prepared { requests: vec![request], has_seed, reply: Some(Arc::new(reply)) })
    };
    asked.answer(PATH, prepare).await
}

/// What all parts of an answer share.
struct Answer {
    id: String,
    created: u64,
    model: Arc<ServedModel>,
    wants_scores: bool,
    token_names: TokenNames,
    n_prompt: usize,
    echoed: String,
    reading: Reading,
    prompt_token_ids: Option<Vec<TokenId>>,
}

#[derive(Serialize)]
struct Completion<C, U> {
    id: String,
    object: &'static str,
    created: u64,
    model: String,
    system_fingerprint: String,
    choices: Vec<C>,
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<U>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_logprobs: Option<Vec<Value>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<Vec<TokenId>>,
}

#[derive(Serialize)]
struct Choice {
    index: usize,
    message: Message,
    logprobs: Option<ChatLogprobs>,
    finish_reason: Option<&'static str>,
    stop_reason: Option<StopReason>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<Vec<TokenId>>,
}

#[derive(Serialize)]
struct Message {
    role: &'static str,
    /// Null if there is something else instead.
    content: Option<String>,
    refusal: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reasoning_content: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tool_calls: Vec<Value>,
}

impl Message {
    fn new(echoed: &str, told: Told) -> Self {
        let Told { content, thought, calls, .. } = told;
        let content = format!("{echoed}{content}");
        let has_other = !thought.is_empty() || !calls.is_empty();
        let call = |call: ToldCall| {
            let ToldCall { id, name, arguments } = call;
            json!({"id": id, "type": "function", "function": {"name": name, "arguments": arguments}})
        };
        Self {
            role: "assistant",
            content: Some(content).filter(|content| !content.is_empty() || !has_other),
            refusal: None,
            reasoning_content: Some(thought).filter(|thought| !thought.is_empty()),
            tool_calls: calls.into_iter().map(call).collect(),
        }
    }
}

#[derive(Serialize)]
struct ChunkChoice {
    index: usize,
    delta: Delta,
    logprobs: Option<ChatLogprobs>,
    finish_reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    stop_reason: Option<StopReason>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<Vec<TokenId>>,
}

#[derive(Default, Serialize)]
struct Delta {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reasoning_content: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tool_calls: Option<[Value; 1]>,
}

impl From<Piece> for Delta {
    fn from(piece: Piece) -> Self {
        match piece {
            Piece::Content(text) => Self { content: Some(text), ..Self::default() },
            Piece::Thought(text) => Self { reasoning_content: Some(text), ..Self::default() },
            Piece::Call { index, id, name } => {
                let function = json!({"name": name, "arguments": ""});
                let call = json!({"index": index, "id": id, "type": "function", "function": function});
                Self { tool_calls: Some([call]), ..Self::default() }
            }
            Piece::Arguments { index, text } => {
                let call = json!({"index": index, "function": {"arguments": text}});
                Self { tool_calls: Some([call]), ..Self::default() }
            }
        }
    }
}

/// Why a choice ended, with so many calls in it.
fn finish_reason_of(finish: &Finish, n_calls: usize) -> &'static str {
    match finish {
        Finish::Length => finish_reason(finish),
        _ if n_calls > 0 => "tool_calls",
        _ => finish_reason(finish),
    }
}

impl Answer {
    fn object<C, U>(&self, object: &'static str, choices: Vec<C>, usage: Option<U>) -> Completion<C, U> {
        Completion {
            id: self.id.clone(),
            object,
            created: self.created,
            model: self.model.name(),
            system_fingerprint: self.model.fingerprint.clone(),
            choices,
            usage,
            prompt_logprobs: None,
            prompt_token_ids: None,
        }
    }

    fn logprobs(&self, scores: &[TokenScore]) -> Option<ChatLogprobs> {
        self.wants_scores.then(|| ChatLogprobs::new(&self.model.tokenizer, self.token_names, scores))
    }

    fn usage(&self, usage: Usage, n_thought_tokens: u32) -> UsageObject {
        let usage = UsageObject::from(usage);
        if self.reading.finds_thoughts() { usage.with_reasoning(n_thought_tokens) } else { usage }
    }

    fn whole(&self, collected: Collected, n_prompt_logprobs: Option<u32>) -> Completion<Choice, UsageObject> {
        let returns_token_ids = self.prompt_token_ids.is_some();
        let mut n_thought_tokens = 0_u32;
        let choice = |(index, choice): (usize, Collection)| {
            let told = self.reading.told(index, &choice);
            n_thought_tokens = n_thought_tokens.saturating_add(told.n_thought_tokens);
            Choice {
                index,
                logprobs: self.logprobs(&choice.scores),
                finish_reason: choice.finish.as_ref().map(|finish| finish_reason_of(finish, told.calls.len())),
                stop_reason: StopReason::of(choice.finish.as_ref()),
                message: Message::new(&self.echoed, told),
                token_ids: returns_token_ids.then_some(choice.token_ids),
            }
        };
        let choices = collected.choices.into_iter().enumerate().map(choice).collect();
        let usage = self.usage(collected.usage, n_thought_tokens);
        let mut whole = self.object("chat.completion", choices, Some(usage));
        let scores = collected.prompt_scores.into_iter().next().flatten();
        whole.prompt_logprobs =
            n_prompt_logprobs.zip(scores).map(|(n_top, scores)| prompt_logprobs(&self.model.tokenizer, &scores, n_top));
        whole.prompt_token_ids.clone_from(&self.prompt_token_ids);
        whole
    }
}

/// Answers to one request.
struct ChatReply {
    answer: Arc<Answer>,
    delivery: Delivery,
    prompt_logprobs: Option<u32>,
    n: usize,
}

impl Reply for ChatReply {
    fn delivery(&self) -> Delivery {
        self.delivery
    }

    fn whole(&self, collected: Collected) -> Response {
        Json(self.answer.whole(collected, self.prompt_logprobs)).into_response()
    }

    fn chunks(&self) -> Box<dyn Chunks> {
        let answer = Arc::clone(&self.answer);
        let choices = (0..self.n).map(|index| Streamed { n_tokens: None, reader: answer.reading.reader(index) });
        Box::new(ChatChunks { usage: self.delivery.usage(), choices: choices.collect(), answer })
    }

    fn reveals(&self) -> Option<&'static str> {
        let answer = &self.answer;
        let token_ids = answer.prompt_token_ids.as_ref().map(|_| "return_token_ids");
        answer.wants_scores.then_some("logprobs").or(token_ids)
    }

    fn kept_bytes(&self) -> usize {
        size_of::<Answer>()
            + self.answer.echoed.len()
            + self.answer.reading.kept_bytes()
            + self.answer.prompt_token_ids.as_ref().map_or(0, |ids| size_of_val(ids.as_slice()))
    }
}

/// Chunks of a streamed chat: per choice the role, then what it says in pieces, then why it ended.
struct ChatChunks {
    answer: Arc<Answer>,
    usage: StreamedUsage,
    choices: Vec<Streamed>,
}

/// A choice on its way.
struct Streamed {
    /// Tokens so far; `None` before its beginning.
    n_tokens: Option<usize>,
    reader: Reader,
}

impl ChatChunks {
    fn chunk(&self, choice: ChunkChoice) -> Completion<ChunkChoice, Value> {
        let n_tokens = self.choices.get(choice.index).and_then(|choice| choice.n_tokens).unwrap_or(0);
        let usage = self.usage.of_chunk(self.answer.n_prompt, n_tokens);
        self.answer.object("chat.completion.chunk", vec![choice], usage)
    }
}

impl Chunks for ChatChunks {
    fn prompt_scored(&mut self, _: usize, _: Vec<TokenScore>) {
        // Not streamed: `prompt_logprobs` is refused.
    }

    fn output(&mut self, prompt_idx: usize, output: Output) -> Vec<Chunk> {
        let index = Generation::choice_index(0, prompt_idx, &output);
        let empty = || ChunkChoice {
            index,
            delta: Delta::default(),
            logprobs: None,
            finish_reason: None,
            stop_reason: None,
            token_ids: None,
        };
        let mut chunks = Vec::new();
        let Some(choice) = self.choices.get_mut(index) else { return chunks };
        let begins = choice.n_tokens.is_none();
        choice.n_tokens = Some(choice.n_tokens.unwrap_or(0) + output.token_ids.len());
        let mut pieces = choice.reader.push(&output.text, output.token_ids.len());
        if output.finish.is_some() {
            pieces.extend(choice.reader.finish());
        }
        let n_calls = choice.reader.n_calls();
        if begins {
            let content = Some(self.answer.echoed.clone());
            let delta = Delta { role: Some("assistant"), content, ..Delta::default() };
            let mut chunk = self.chunk(ChunkChoice { delta, ..empty() });
            chunk.prompt_token_ids = self.answer.prompt_token_ids.clone();
            chunks.push(Chunk::Head(sse::json(&chunk).into()));
        }
        // Tokens and their scores go with the first piece, or alone if what they say is held back.
        let mut token_ids = self.answer.prompt_token_ids.is_some().then_some(output.token_ids);
        let has_tokens = token_ids.as_ref().is_some_and(|ids| !ids.is_empty());
        if pieces.is_empty() && (!output.scores.is_empty() || has_tokens) {
            pieces.push(Piece::Content(String::new()));
        }
        let mut logprobs = self.answer.logprobs(&output.scores);
        for piece in pieces {
            let (logprobs, token_ids) = (logprobs.take(), token_ids.take());
            let chunk = self.chunk(ChunkChoice { delta: piece.into(), logprobs, token_ids, ..empty() });
            chunks.push(Chunk::Body(sse::json(&chunk).into()));
        }
        if let Some(finish) = &output.finish {
            let finish_reason = Some(finish_reason_of(finish, n_calls));
            let stop_reason = StopReason::of(Some(finish));
            let chunk = self.chunk(ChunkChoice { finish_reason, stop_reason, ..empty() });
            chunks.push(Chunk::Body(sse::json(&chunk).into()));
        }
        chunks
    }

    fn finished(&mut self, usage: Usage) -> Option<Payload> {
        let n_thought_tokens = self.choices.iter().map(|choice| choice.reader.n_thought_tokens()).sum();
        let last = || {
            let usage = self.answer.usage(usage, n_thought_tokens);
            sse::json(&self.answer.object::<ChunkChoice, _>("chat.completion.chunk", Vec::new(), Some(usage))).into()
        };
        (self.usage != StreamedUsage::Omitted).then(last)
    }
}
