//! Responses, whole and as events.

use std::sync::Arc;

use axum::{
    Json,
    response::{IntoResponse, Response},
};
use phalanx_proto::v1::TokenScore;
use serde_json::{Value, json};

use super::{FAMILY, ask::Echo, error_event};
use crate::{
    frontend::{
        error::ApiError,
        family::Family,
        generation::Collected,
        logprobs::{ChatLogprobs, TokenNames},
        neutral::Delivery,
        reply::Reply,
        sse::{Chunk, Chunks, Payload},
        tools::reader::{Piece, Reader, Reading, ToldCall},
    },
    request::{Finish, Output, Usage},
    served_model::ServedModel,
};

/// What all parts of an answer share.
pub struct Answer {
    /// Unique part of all names in it.
    pub name: String,
    pub created_at: u64,
    pub model: Arc<ServedModel>,
    pub reading: Reading,
    pub echo: Echo,
    pub wants_scores: bool,
}

/// Answers to one request.
pub struct ResponseReply {
    pub answer: Arc<Answer>,
    pub delivery: Delivery,
}

/// Whether an answer is whole, from why it ended.
fn status(finish: Option<&Finish>) -> &'static str {
    match finish {
        Some(Finish::Length | Finish::ContentFilter) => "incomplete",
        Some(_) => "completed",
        None => "in_progress",
    }
}

impl Answer {
    /// Of the first message; further ones have a number.
    fn message_id(&self, index: usize) -> String {
        if index == 0 { format!("msg_{}", self.name) } else { format!("msg_{}_{index}", self.name) }
    }

    fn logprobs(&self, scores: &[TokenScore]) -> Value {
        json!(ChatLogprobs::new(&self.model.tokenizer, TokenNames::Texts, scores).into_entries())
    }

    fn text_part(&self, text: &str, scores: &[TokenScore]) -> Value {
        json!({"type": "output_text", "text": text, "annotations": [], "logprobs": self.logprobs(scores)})
    }

    fn message(&self, index: usize, content: Value, status: &str) -> Value {
        json!({"id": self.message_id(index), "type": "message", "status": status, "role": "assistant", "content": content})
    }

    /// A thought, or the beginning of one.
    fn reasoning(&self, index: usize, content: Value, status: &str) -> Value {
        let id = format!("rs_{}_{index}", self.name);
        json!({"id": id, "type": "reasoning", "summary": [], "content": content, "status": status})
    }

    /// A call, or the beginning of one.
    fn call(call: &ToldCall, status: &str) -> Value {
        json!({
            "id": format!("fc_{}", call.id),
            "type": "function_call",
            "status": status,
            "call_id": call.id,
            "name": call.name,
            "arguments": call.arguments,
        })
    }

    fn response(&self, output: Value, finish: Option<&Finish>, usage: Option<(Usage, u32)>) -> Value {
        let Echo { instructions, max_output_tokens, metadata, effort, format, user, .. } = &self.echo;
        let reason = if finish == Some(&Finish::ContentFilter) { "content_filter" } else { "max_output_tokens" };
        let incomplete = (status(finish) == "incomplete").then(|| json!({"reason": reason}));
        let usage = usage.map(|(usage, n_thought_tokens)| {
            json!({
                "input_tokens": usage.prompt_tokens,
                "input_tokens_details": {"cached_tokens": usage.cached_tokens},
                "output_tokens": usage.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": n_thought_tokens},
                "total_tokens": usage.prompt_tokens.saturating_add(usage.completion_tokens),
            })
        });
        json!({
            "id": format!("resp_{}", self.name),
            "object": "response",
            "created_at": self.created_at,
            "status": status(finish),
            "background": false,
            "error": null,
            "incomplete_details": incomplete,
            "instructions": instructions,
            "max_output_tokens": max_output_tokens,
            "model": self.model.name(),
            "output": output,
            "parallel_tool_calls": self.echo.parallel_tool_calls,
            "previous_response_id": null,
            "reasoning": {"effort": effort, "summary": null},
            "service_tier": "default",
            "store": false,
            "temperature": self.echo.temperature,
            "text": {"format": format},
            "tool_choice": self.echo.tool_choice,
            "tools": self.echo.tools,
            "top_logprobs": self.echo.top_logprobs,
            "top_p": self.echo.top_p,
            "truncation": "disabled",
            "usage": usage,
            "user": user,
            "metadata": metadata,
        })
    }
}

impl Reply for ResponseReply {
    fn delivery(&self) -> Delivery {
        self.delivery
    }

    fn whole(&self, collected: Collected) -> Response {
        let choice = collected.choices.into_iter().next().unwrap_or_default();
        // As it would have been streamed: the items are the same, in the same order.
        let mut items = Items::new(Arc::clone(&self.answer));
        let mut begin = 0;
        for (n_bytes, n_tokens) in &choice.pieces {
            let text = choice.text.get(begin..begin + n_bytes).unwrap_or_default();
            let pieces = items.reader.push(text, *n_tokens);
            items.add(pieces, &[]);
            begin += n_bytes;
        }
        let pieces = items.reader.push(choice.text.get(begin..).unwrap_or_default(), 0);
        items.add(pieces, &choice.scores);
        items.end(choice.finish);
        Json(items.response(Some(collected.usage))).into_response()
    }

    fn chunks(&self) -> Box<dyn Chunks> {
        Box::new(ResponseEvents { items: Items::new(Arc::clone(&self.answer)), n_sent: 0 })
    }

    fn reveals(&self) -> Option<&'static str> {
        self.answer.wants_scores.then_some("include")
    }

    fn kept_bytes(&self) -> usize {
        let instructions = self.answer.echo.instructions.as_str().map_or(0, str::len);
        let metadata: usize =
            self.answer.echo.metadata.iter().map(|(name, v)| name.len() + v.as_str().map_or(0, str::len)).sum();
        // Schemas, at the length of their text.
        let format = self.answer.echo.format.to_string().len();
        let tools = self.answer.echo.tools.to_string().len() + self.answer.reading.kept_bytes();
        size_of::<Answer>() + instructions + metadata + format + tools
    }
}

/// Items of a response being made.
struct Items {
    answer: Arc<Answer>,
    reader: Reader,
    done: Vec<Value>,
    open: Option<Item>,
    n_messages: usize,
    n_thoughts: usize,
    finish: Option<Finish>,
}

/// The item that grows.
enum Item {
    Message { text: String, scores: Vec<TokenScore> },
    Thought(String),
    Call(ToldCall),
}

/// An event that is not numbered yet.
type Event = (&'static str, Value);

impl Items {
    fn new(answer: Arc<Answer>) -> Self {
        let reader = answer.reading.reader(0);
        Self { answer, reader, done: Vec::new(), open: None, n_messages: 0, n_thoughts: 0, finish: None }
    }

    fn item(&self, item: &Item, status: &str) -> Value {
        match item {
            Item::Message { text, scores } => {
                self.answer.message(self.n_messages, json!([self.answer.text_part(text, scores)]), status)
            }
            Item::Thought(text) => {
                self.answer.reasoning(self.n_thoughts, json!([{"type": "reasoning_text", "text": text}]), status)
            }
            Item::Call(call) => Answer::call(call, status),
        }
    }

    /// An event about the item that grows; `more` is what it says, beside which item, and which part of it.
    fn about(&self, name: &'static str, id: &Value, mut more: Value, is_of_part: bool) -> Event {
        more["item_id"] = id.clone();
        more["output_index"] = self.done.len().into();
        if is_of_part {
            more["content_index"] = 0.into();
        }
        (name, more)
    }

    /// Begins an item, after the end of the one before it.
    fn begin(&mut self, item: Item) -> Vec<Event> {
        let mut events = self.close("completed");
        let mut shown = self.item(&item, "in_progress");
        let id = shown["id"].clone();
        let part = shown.get_mut("content").map(|content| std::mem::replace(content, json!([])));
        events.push(("response.output_item.added", json!({"output_index": self.done.len(), "item": shown})));
        if let Some(part) = part.and_then(|parts| parts.get(0).cloned()) {
            events.push(self.about("response.content_part.added", &id, json!({"part": part}), true));
        }
        self.open = Some(item);
        events
    }

    /// Ends the item that grows.
    fn close(&mut self, status: &str) -> Vec<Event> {
        let Some(item) = self.open.take() else { return Vec::new() };
        let whole = self.item(&item, status);
        let (id, part) = (whole["id"].clone(), whole["content"].get(0).cloned());
        let mut events = Vec::new();
        events.push(match &item {
            Item::Message { text, scores } => {
                let said = json!({"text": text, "logprobs": self.answer.logprobs(scores)});
                self.about("response.output_text.done", &id, said, true)
            }
            Item::Thought(text) => self.about("response.reasoning_text.done", &id, json!({"text": text}), true),
            Item::Call(call) => {
                let said = json!({"name": call.name, "arguments": call.arguments});
                self.about("response.function_call_arguments.done", &id, said, false)
            }
        });
        if let Some(part) = part {
            events.push(self.about("response.content_part.done", &id, json!({"part": part}), true));
        }
        events.push(("response.output_item.done", json!({"output_index": self.done.len(), "item": whole})));
        match item {
            Item::Message { .. } => self.n_messages += 1,
            Item::Thought(_) => self.n_thoughts += 1,
            Item::Call(_) => {}
        }
        self.done.push(whole);
        events
    }

    /// Adds pieces; scores go with the first text among them.
    fn add(&mut self, mut pieces: Vec<Piece>, scores: &[TokenScore]) -> Vec<Event> {
        if pieces.is_empty() && !scores.is_empty() {
            pieces.push(Piece::Content(String::new()));
        }
        let mut scores = scores;
        let mut events = Vec::new();
        for piece in pieces {
            match piece {
                Piece::Content(delta) => {
                    if !matches!(self.open, Some(Item::Message { .. })) {
                        events.extend(self.begin(Item::Message { text: String::new(), scores: Vec::new() }));
                    }
                    let new = std::mem::take(&mut scores);
                    if let Some(Item::Message { text, scores }) = &mut self.open {
                        text.push_str(&delta);
                        scores.extend_from_slice(new);
                    }
                    let said = json!({"delta": delta, "logprobs": self.answer.logprobs(new)});
                    let id = self.answer.message_id(self.n_messages).into();
                    events.push(self.about("response.output_text.delta", &id, said, true));
                }
                Piece::Thought(delta) => {
                    if !matches!(self.open, Some(Item::Thought(_))) {
                        events.extend(self.begin(Item::Thought(String::new())));
                    }
                    if let Some(Item::Thought(text)) = &mut self.open {
                        text.push_str(&delta);
                    }
                    let id = self.answer.reasoning(self.n_thoughts, Value::Null, "")["id"].take();
                    events.push(self.about("response.reasoning_text.delta", &id, json!({"delta": delta}), true));
                }
                Piece::Call { id, name, .. } => {
                    events.extend(self.begin(Item::Call(ToldCall { id, name, arguments: String::new() })));
                }
                Piece::Arguments { text, .. } => {
                    let Some(Item::Call(call)) = &mut self.open else { continue };
                    call.arguments.push_str(&text);
                    let id = format!("fc_{}", call.id).into();
                    let name = "response.function_call_arguments.delta";
                    events.push(self.about(name, &id, json!({"delta": text}), false));
                }
            }
        }
        events
    }

    /// The choice is over.
    fn end(&mut self, finish: Option<Finish>) -> Vec<Event> {
        let pieces = self.reader.finish();
        let mut events = self.add(pieces, &[]);
        self.finish = finish;
        if self.done.is_empty() && self.open.is_none() {
            // Of nothing there is a message too.
            events.extend(self.begin(Item::Message { text: String::new(), scores: Vec::new() }));
        }
        events.extend(self.close(status(self.finish.as_ref())));
        events
    }

    fn response(&self, usage: Option<Usage>) -> Value {
        let usage = usage.map(|usage| (usage, self.reader.n_thought_tokens()));
        self.answer.response(self.done.clone().into(), self.finish.as_ref(), usage)
    }
}

/// A response being made. Events are numbered.
struct ResponseEvents {
    items: Items,
    n_sent: u64,
}

impl ResponseEvents {
    /// An event of a type, with its number.
    fn event(&mut self, (name, mut object): Event) -> Payload {
        object["type"] = name.into();
        object["sequence_number"] = self.n_sent.into();
        self.n_sent += 1;
        Payload::named(name, &object)
    }
}

impl Chunks for ResponseEvents {
    fn prompt_scored(&mut self, _: usize, _: Vec<TokenScore>) {
        // Never asked for.
    }

    fn output(&mut self, _: usize, output: Output) -> Vec<Chunk> {
        let mut chunks = Vec::new();
        if self.n_sent == 0 {
            let response = json!({"response": self.items.response(None)});
            for name in ["response.created", "response.in_progress"] {
                chunks.push(Chunk::Head(self.event((name, response.clone()))));
            }
        }
        let pieces = self.items.reader.push(&output.text, output.token_ids.len());
        let mut events = self.items.add(pieces, &output.scores);
        if output.finish.is_some() {
            events.extend(self.items.end(output.finish));
        }
        chunks.extend(events.into_iter().map(|event| Chunk::Body(self.event(event))));
        chunks
    }

    fn finished(&mut self, usage: Usage) -> Option<Payload> {
        let response = json!({"response": self.items.response(Some(usage))});
        let is_cut = status(self.items.finish.as_ref()) == "incomplete";
        Some(self.event((if is_cut { "response.incomplete" } else { "response.completed" }, response)))
    }

    fn last(&mut self) -> Option<Payload> {
        None
    }

    fn family(&self) -> &'static Family {
        &FAMILY
    }

    fn failed(&mut self, error: &ApiError) -> Payload {
        Payload::named("error", &error_event(error, self.n_sent))
    }
}
