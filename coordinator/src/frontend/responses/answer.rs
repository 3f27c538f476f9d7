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
    fn message_id(&self) -> String {
        format!("msg_{}", self.name)
    }

    fn logprobs(&self, scores: &[TokenScore]) -> Value {
        json!(ChatLogprobs::new(&self.model.tokenizer, TokenNames::Texts, scores).into_entries())
    }

    fn text_part(&self, text: &str, scores: &[TokenScore]) -> Value {
        json!({"type": "output_text", "text": text, "annotations": [], "logprobs": self.logprobs(scores)})
    }

    fn message(&self, content: Value, finish: Option<&Finish>) -> Value {
        let status = status(finish);
        json!({"id": self.message_id(), "type": "message", "status": status, "role": "assistant", "content": content})
    }

    fn response(&self, output: Value, finish: Option<&Finish>, usage: Option<Usage>) -> Value {
        let Echo { instructions, max_output_tokens, metadata, effort, format, user, .. } = &self.echo;
        let reason = if finish == Some(&Finish::ContentFilter) { "content_filter" } else { "max_output_tokens" };
        let incomplete = (status(finish) == "incomplete").then(|| json!({"reason": reason}));
        let usage = usage.map(|usage| {
            json!({
                "input_tokens": usage.prompt_tokens,
                "input_tokens_details": {"cached_tokens": usage.cached_tokens},
                "output_tokens": usage.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
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
            "tools": [],
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
        let finish = choice.finish.as_ref();
        let message = self.answer.message(json!([self.answer.text_part(&choice.text, &choice.scores)]), finish);
        Json(self.answer.response(json!([message]), finish, Some(collected.usage))).into_response()
    }

    fn chunks(&self) -> Box<dyn Chunks> {
        Box::new(ResponseEvents {
            answer: Arc::clone(&self.answer),
            n_sent: 0,
            text: String::new(),
            scores: Vec::new(),
            finish: None,
        })
    }

    fn reveals(&self) -> Option<&'static str> {
        self.answer.wants_scores.then_some("include")
    }

    fn kept_bytes(&self) -> usize {
        let instructions = self.answer.echo.instructions.as_str().map_or(0, str::len);
        let metadata: usize =
            self.answer.echo.metadata.iter().map(|(name, v)| name.len() + v.as_str().map_or(0, str::len)).sum();
        // A schema, at the length of its text.
        let format = self.answer.echo.format.to_string().len();
        size_of::<Answer>() + instructions + metadata + format
    }
}

/// A response being made. Events are numbered.
struct ResponseEvents {
    answer: Arc<Answer>,
    n_sent: u64,
    text: String,
    scores: Vec<TokenScore>,
    finish: Option<Finish>,
}

impl ResponseEvents {
    /// An event of a type, with its number.
    fn event(&mut self, name: &'static str, mut object: Value) -> Payload {
        object["type"] = name.into();
        object["sequence_number"] = self.n_sent.into();
        self.n_sent += 1;
        Payload::named(name, &object)
    }

    /// An event about the one part of the one message.
    fn part_event(&mut self, name: &'static str, mut object: Value) -> Payload {
        object["item_id"] = self.answer.message_id().into();
        object["output_index"] = 0.into();
        object["content_index"] = 0.into();
        self.event(name, object)
    }

    fn begin(&mut self) -> Vec<Payload> {
        let answer = Arc::clone(&self.answer);
        let response = json!({"response": answer.response(json!([]), None, None)});
        vec![
            self.event("response.created", response.clone()),
            self.event("response.in_progress", response),
            self.event(
                "response.output_item.added",
                json!({"output_index": 0, "item": answer.message(json!([]), None)}),
            ),
            self.part_event("response.content_part.added", json!({"part": answer.text_part("", &[])})),
        ]
    }

    fn end(&mut self) -> Vec<Payload> {
        let answer = Arc::clone(&self.answer);
        let part = answer.text_part(&self.text, &self.scores);
        let message = answer.message(json!([part]), self.finish.as_ref());
        let (text, logprobs) = (self.text.clone(), answer.logprobs(&self.scores));
        vec![
            self.part_event("response.output_text.done", json!({"text": text, "logprobs": logprobs})),
            self.part_event("response.content_part.done", json!({"part": part})),
            self.event("response.output_item.done", json!({"output_index": 0, "item": message})),
        ]
    }
}

impl Chunks for ResponseEvents {
    fn prompt_scored(&mut self, _: usize, _: Vec<TokenScore>) {
        // Never asked for.
    }

    fn output(&mut self, _: usize, output: Output) -> Vec<Chunk> {
        let mut chunks = Vec::new();
        if self.n_sent == 0 {
            chunks.extend(self.begin().into_iter().map(Chunk::Head));
        }
        if !output.text.is_empty() || !output.scores.is_empty() {
            self.text.push_str(&output.text);
            let logprobs = self.answer.logprobs(&output.scores);
            self.scores.extend(output.scores);
            let delta = json!({"delta": output.text, "logprobs": logprobs});
            chunks.push(Chunk::Body(self.part_event("response.output_text.delta", delta)));
        }
        if let Some(finish) = output.finish {
            self.finish = Some(finish);
            chunks.extend(self.end().into_iter().map(Chunk::Body));
        }
        chunks
    }

    fn finished(&mut self, usage: Usage) -> Option<Payload> {
        let answer = Arc::clone(&self.answer);
        let finish = self.finish.clone();
        let message = answer.message(json!([answer.text_part(&self.text, &self.scores)]), finish.as_ref());
        let response = answer.response(json!([message]), finish.as_ref(), Some(usage));
        let name = if status(finish.as_ref()) == "incomplete" { "response.incomplete" } else { "response.completed" };
        Some(self.event(name, json!({"response": response})))
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
