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
    },
    request::{Finish, Output, Usage},
};

/// What all parts of an answer share.
pub struct Answer {
    pub id: String,
    pub model: String,
    pub n_prompt: usize,
}

/// Answers to one request.
pub struct MessageReply {
    pub answer: Arc<Answer>,
    pub delivery: Delivery,
}

/// `stop_reason` and `stop_sequence`.
fn stop(finish: Option<&Finish>) -> (Value, Value) {
    match finish {
        None => (Value::Null, Value::Null),
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
    fn message(&self, content: Value, finish: Option<&Finish>, usage: Value) -> Value {
        let (stop_reason, stop_sequence) = stop(finish);
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
        let content = json!([{"type": "text", "text": choice.text}]);
        Json(self.answer.message(content, choice.finish.as_ref(), usage(collected.usage))).into_response()
    }

    fn chunks(&self) -> Box<dyn Chunks> {
        Box::new(MessageEvents { answer: Arc::clone(&self.answer), has_begun: false, finish: None })
    }

    fn reveals(&self) -> Option<&'static str> {
        None
    }

    fn kept_bytes(&self) -> usize {
        size_of::<Answer>() + self.answer.id.len() + self.answer.model.len()
    }
}

/// A message being made: `message_start`, one block of text, `message_delta` with the reason of its end, `message_stop`.
struct MessageEvents {
    answer: Arc<Answer>,
    has_begun: bool,
    finish: Option<Finish>,
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
            let start = json!({"type": "message_start", "message": self.answer.message(json!([]), None, so_far)});
            chunks.push(Chunk::Head(Payload::named("message_start", &start)));
            let block = json!({"type": "text", "text": ""});
            let start = json!({"type": "content_block_start", "index": 0, "content_block": block});
            chunks.push(Chunk::Head(Payload::named("content_block_start", &start)));
        }
        if !output.text.is_empty() {
            let delta = json!({"type": "text_delta", "text": output.text});
            let delta = json!({"type": "content_block_delta", "index": 0, "delta": delta});
            chunks.push(Chunk::Body(Payload::named("content_block_delta", &delta)));
        }
        if let Some(finish) = output.finish {
            self.finish = Some(finish);
            let end = json!({"type": "content_block_stop", "index": 0});
            chunks.push(Chunk::Body(Payload::named("content_block_stop", &end)));
        }
        chunks
    }

    fn finished(&mut self, counts: Usage) -> Option<Payload> {
        let (stop_reason, stop_sequence) = stop(self.finish.as_ref());
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
