//! Messages, whole and as events.

use std::sync::Arc;

use axum::{
    Json,
    response::{IntoResponse, Response},
};
use phalanx_proto::v1::TokenScore;
use serde_json::{Value, json};

use super::FAMILY;
use crate::{
    frontend::{
        family::Family,
        generation::Collected,
        neutral::Delivery,
        reply::Reply,
        sse::{Chunk, Chunks, Payload},
        tools::reader::{Piece, Reader, Reading, Told},
    },
    request::{Finish, Output, Usage},
};

/// What all parts of an answer share.
pub struct Answer {
    pub id: String,
    pub model: String,
    pub n_prompt: usize,
    pub reading: Reading,
}

/// Answers to one request.
pub struct MessageReply {
    pub answer: Arc<Answer>,
    pub delivery: Delivery,
}

/// `stop_reason` and `stop_sequence`, of a message with so many calls.
fn stop(finish: Option<&Finish>, n_calls: usize) -> (Value, Value) {
    match finish {
        None => (Value::Null, Value::Null),
        Some(Finish::EndOfSequence | Finish::StopToken(_)) if n_calls > 0 => ("tool_use".into(), Value::Null),
        Some(Finish::EndOfSequence | Finish::StopToken(_)) => ("end_turn".into(), Value::Null),
        Some(Finish::StopString(text)) => ("stop_sequence".into(), text.as_str().into()),
        Some(Finish::Length) => ("max_tokens".into(), Value::Null),
        Some(Finish::ContentFilter) => ("refusal".into(), Value::Null),
    }
}

/// Tokens that were read from the cache are not among the input tokens there.
fn usage(usage: Usage) -> Value {
    json!({
        "input_tokens": usage.prompt_tokens.saturating_sub(usage.cached_tokens),
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
    })
}

impl Answer {
    fn message(&self, content: Value, (stop_reason, stop_sequence): (Value, Value), usage: Value) -> Value {
        json!({
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": content,
            "stop_reason": stop_reason,
            "stop_sequence": stop_sequence,
            "usage": usage,
        })
    }
}

impl Reply for MessageReply {
    fn delivery(&self) -> Delivery {
        self.delivery
    }

    fn whole(&self, collected: Collected) -> Response {
        let choice = collected.choices.into_iter().next().unwrap_or_default();
        let told = self.answer.reading.told(0, &choice);
        let stop = stop(choice.finish.as_ref(), told.calls.len());
        Json(self.answer.message(blocks(told), stop, usage(collected.usage))).into_response()
    }

    fn chunks(&self) -> Box<dyn Chunks> {
        Box::new(MessageEvents {
            answer: Arc::clone(&self.answer),
            reader: self.answer.reading.reader(0),
            has_begun: false,
            open: None,
            n_blocks: 0,
            finish: None,
        })
    }

    fn reveals(&self) -> Option<&'static str> {
        None
    }

    fn kept_bytes(&self) -> usize {
        size_of::<Answer>() + self.answer.id.len() + self.answer.model.len() + self.answer.reading.kept_bytes()
    }
}

/// What a message says, as blocks.
fn blocks(told: Told) -> Value {
    let mut blocks = Vec::new();
    if !told.thought.is_empty() {
        blocks.push(json!({"type": "thinking", "thinking": told.thought, "signature": ""}));
    }
    if !told.content.is_empty() || (told.calls.is_empty() && blocks.is_empty()) {
        blocks.push(json!({"type": "text", "text": told.content}));
    }
    for call in told.calls {
        match serde_json::from_str::<Value>(&call.arguments) {
            Ok(input) => {
                blocks.push(json!({"type": "tool_use", "id": call.id, "name": call.name, "input": input}));
            }
            // Cut short: not an object, but what the model said.
            Err(_) => {
                blocks.push(json!({"type": "tool_use", "id": call.id, "name": call.name, "input": {}}));
                blocks.push(json!({"type": "text", "text": call.arguments}));
            }
        }
    }
    blocks.into()
}

/// A message being made: `message_start`, its blocks, `message_delta` with the reason of its end, `message_stop`.
struct MessageEvents {
    answer: Arc<Answer>,
    reader: Reader,
    has_begun: bool,
    /// The kind of the block that grows.
    open: Option<Block>,
    n_blocks: usize,
    finish: Option<Finish>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Block {
    Text,
    Thinking,
    Call,
}

impl MessageEvents {
    /// An event about the block that grows.
    fn block_event(&self, name: &'static str, more: (&str, Value)) -> Payload {
        let mut event = json!({"type": name, "index": self.n_blocks.saturating_sub(1)});
        event[more.0] = more.1;
        Payload::named(name, &event)
    }

    fn close(&mut self) -> Option<Payload> {
        self.open.take()?;
        let event = json!({"type": "content_block_stop", "index": self.n_blocks.saturating_sub(1)});
        Some(Payload::named("content_block_stop", &event))
    }

    /// Ends the block that grows, and begins another.
    fn open(&mut self, block: Block, object: Value) -> Vec<Payload> {
        let mut events: Vec<_> = self.close().into_iter().collect();
        self.open = Some(block);
        self.n_blocks += 1;
        events.push(self.block_event("content_block_start", ("content_block", object)));
        events
    }

    /// Events that tell a piece. Of these the last brings it.
    fn tell(&mut self, piece: Piece) -> Vec<Payload> {
        let (block, object, delta) = match piece {
            Piece::Content(text) => {
                (Block::Text, json!({"type": "text", "text": ""}), json!({"type": "text_delta", "text": text}))
            }
            Piece::Thought(text) => (
                Block::Thinking,
                json!({"type": "thinking", "thinking": "", "signature": ""}),
                json!({"type": "thinking_delta", "thinking": text}),
            ),
            Piece::Call { id, name, .. } => {
                let object = json!({"type": "tool_use", "id": id, "name": name, "input": {}});
                return self.open(Block::Call, object);
            }
            Piece::Arguments { text, .. } => {
                (Block::Call, Value::Null, json!({"type": "input_json_delta", "partial_json": text}))
            }
        };
        let mut events = Vec::new();
        if self.open != Some(block) {
            events = self.open(block, object);
        }
        events.push(self.block_event("content_block_delta", ("delta", delta)));
        events
    }
}

impl Chunks for MessageEvents {
    fn prompt_scored(&mut self, _: usize, _: Vec<TokenScore>) {
        // Never asked for.
    }

    fn output(&mut self, _: usize, output: Output) -> Vec<Chunk> {
        let mut chunks = Vec::new();
        if !std::mem::replace(&mut self.has_begun, true) {
            let n_prompt = u32::try_from(self.answer.n_prompt).unwrap_or(u32::MAX);
            let so_far = usage(Usage { prompt_tokens: n_prompt, ..Usage::default() });
            let message = self.answer.message(json!([]), stop(None, 0), so_far);
            let start = json!({"type": "message_start", "message": message});
            chunks.push(Chunk::Head(Payload::named("message_start", &start)));
        }
        let mut pieces = self.reader.push(&output.text, output.token_ids.len());
        if output.finish.is_some() {
            pieces.extend(self.reader.finish());
            if pieces.is_empty() && self.n_blocks == 0 {
                // Of nothing there is a block too.
                pieces.push(Piece::Content(String::new()));
            }
        }
        for piece in pieces {
            chunks.extend(self.tell(piece).into_iter().map(Chunk::Body));
        }
        if let Some(finish) = output.finish {
            self.finish = Some(finish);
            chunks.extend(self.close().map(Chunk::Body));
        }
        chunks
    }

    fn finished(&mut self, counts: Usage) -> Option<Payload> {
        let (stop_reason, stop_sequence) = stop(self.finish.as_ref(), self.reader.n_calls());
        let delta = json!({"stop_reason": stop_reason, "stop_sequence": stop_sequence});
        let delta = json!({"type": "message_delta", "delta": delta, "usage": usage(counts)});
        Some(Payload::named("message_delta", &delta))
    }

    fn last(&mut self) -> Option<Payload> {
        Some(Payload::named("message_stop", &json!({"type": "message_stop"})))
    }

    fn family(&self) -> &'static Family {
        &FAMILY
    }

    fn keep_alive(&self) -> Option<Payload> {
        Some(Payload::named("ping", &json!({"type": "ping"})))
    }
}
