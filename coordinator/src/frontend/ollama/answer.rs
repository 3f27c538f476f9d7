//! Answers as Ollama gives them: one object, or a line for each piece, and in the end counts and durations.

use std::{sync::Arc, time::Instant};

use axum::{
    Json,
    response::{IntoResponse, Response},
};
use phalanx_cluster::id::TokenId;
use phalanx_proto::v1::TokenScore;
use serde_json::{Value, json};

use super::{CHAT, FAMILY, GENERATE};
use crate::{
    frontend::{
        family::Family,
        generation::Collected,
        logprobs::{ChatLogprobs, TokenNames},
        neutral::Delivery,
        reply::Reply,
        sse::{Chunk, Chunks, Payload, json as text_of},
        tools::reader::{Piece, Reader, Reading, Told, ToldCall},
    },
    request::{Finish, Output, Usage},
    served_model::ServedModel,
};

/// Which of the two.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// Messages.
    Chat,
    /// A text.
    Generate,
}

impl Form {
    /// Where it is.
    pub fn path(self) -> &'static str {
        match self {
            Self::Chat => CHAT,
            Self::Generate => GENERATE,
        }
    }

    /// Where its prompt stands.
    pub fn prompt_field(self) -> &'static str {
        match self {
            Self::Chat => "messages",
            Self::Generate => "prompt",
        }
    }
}

/// What all parts of an answer share.
pub struct Answer {
    pub model: Arc<ServedModel>,
    /// The model's name as the client has it.
    pub name: String,
    pub reading: Reading,
    pub form: Form,
    /// The prompt's tokens, if the answer ends with all tokens so far.
    pub context: Option<Vec<TokenId>>,
    pub wants_scores: bool,
    pub arrived_at: Instant,
}

/// Answers to one request.
pub struct OllamaReply {
    pub answer: Arc<Answer>,
    pub delivery: Delivery,
}

fn now() -> String {
    jiff::Timestamp::now().to_string()
}

/// What is said of a model that was only asked for.
pub fn loaded(name: &str, form: Form) -> Value {
    let mut object = json!({"model": name, "created_at": now()});
    say(&mut object, form, Said::default());
    object["done"] = true.into();
    object["done_reason"] = "load".into();
    object
}

/// What an object says.
#[derive(Default)]
struct Said {
    content: String,
    thought: String,
    calls: Vec<Value>,
}

impl Said {
    fn is_empty(&self) -> bool {
        self.content.is_empty() && self.thought.is_empty() && self.calls.is_empty()
    }

    /// Adds a call that is complete. What was cut short is no object of arguments, and told as it is.
    fn add_call(&mut self, index: usize, call: ToldCall) {
        match serde_json::from_str::<Value>(&call.arguments) {
            Ok(arguments) => {
                let function = json!({"index": index, "name": call.name, "arguments": arguments});
                self.calls.push(json!({"id": call.id, "function": function}));
            }
            Err(_) => self.content.push_str(&call.arguments),
        }
    }
}

impl From<Told> for Said {
    fn from(told: Told) -> Self {
        let mut said = Self { content: told.content, thought: told.thought, calls: Vec::new() };
        for (index, call) in told.calls.into_iter().enumerate() {
            said.add_call(index, call);
        }
        said
    }
}

fn say(object: &mut Value, form: Form, said: Said) {
    let message = match form {
        Form::Chat => {
            object["message"] = json!({"role": "assistant", "content": said.content});
            &mut object["message"]
        }
        Form::Generate => {
            object["response"] = said.content.into();
            object
        }
    };
    if !said.thought.is_empty() {
        message["thinking"] = said.thought.into();
    }
    if !said.calls.is_empty() {
        message["tool_calls"] = said.calls.into();
    }
}

/// How an answer ended.
struct Ending<'a> {
    finish: Option<&'a Finish>,
    usage: Usage,
    token_ids: &'a [TokenId],
    first_output_at: Option<Instant>,
}

impl Answer {
    fn part(&self, said: Said, scores: &[TokenScore]) -> Value {
        let mut object = json!({"model": self.name, "created_at": now()});
        say(&mut object, self.form, said);
        if self.wants_scores {
            let entries = ChatLogprobs::new(&self.model.tokenizer, TokenNames::Texts, scores).into_entries();
            object["logprobs"] = json!(entries);
        }
        object["done"] = false.into();
        object
    }

    fn end(&self, object: &mut Value, ending: &Ending<'_>) {
        let now = Instant::now();
        let first = ending.first_output_at.unwrap_or(now);
        let nanos = |from: Instant, to: Instant| {
            u64::try_from(to.saturating_duration_since(from).as_nanos()).unwrap_or(u64::MAX)
        };
        object["done"] = true.into();
        object["done_reason"] = match ending.finish {
            Some(Finish::Length) => "length".into(),
            Some(Finish::ContentFilter) => "content_filter".into(),
            _ => "stop".into(),
        };
        if let Some(prompt) = &self.context {
            object["context"] = json!([prompt.as_slice(), ending.token_ids].concat());
        }
        object["total_duration"] = nanos(self.arrived_at, now).into();
        object["load_duration"] = 0.into();
        object["prompt_eval_count"] = ending.usage.prompt_tokens.into();
        object["prompt_eval_duration"] = nanos(self.arrived_at, first).into();
        object["eval_count"] = ending.usage.completion_tokens.into();
        object["eval_duration"] = nanos(first, now).into();
    }
}

impl Reply for OllamaReply {
    fn delivery(&self) -> Delivery {
        self.delivery
    }

    fn whole(&self, collected: Collected) -> Response {
        let Collected { choices, usage, first_output_at, .. } = collected;
        let choice = choices.into_iter().next().unwrap_or_default();
        let told = self.answer.reading.told(0, &choice);
        let mut object = self.answer.part(told.into(), &choice.scores);
        let finish = choice.finish.as_ref();
        self.answer.end(&mut object, &Ending { finish, usage, token_ids: &choice.token_ids, first_output_at });
        Json(object).into_response()
    }

    fn chunks(&self) -> Box<dyn Chunks> {
        let answer = Arc::clone(&self.answer);
        let reader = answer.reading.reader(0);
        Box::new(Lines { answer, reader, call: None, finish: None, token_ids: Vec::new(), first_output_at: None })
    }

    fn reveals(&self) -> Option<&'static str> {
        self.answer.wants_scores.then_some("logprobs")
    }

    fn kept_bytes(&self) -> usize {
        let context = self.answer.context.as_ref().map_or(0, |ids| size_of_val(ids.as_slice()));
        size_of::<Answer>() + self.answer.name.len() + self.answer.reading.kept_bytes() + context
    }
}

/// An answer being made.
struct Lines {
    answer: Arc<Answer>,
    reader: Reader,
    /// The call that grows: it is told when it is complete.
    call: Option<(usize, ToldCall)>,
    finish: Option<Finish>,
    /// Kept only if the answer ends with them.
    token_ids: Vec<TokenId>,
    first_output_at: Option<Instant>,
}

impl Lines {
    fn add(&mut self, pieces: Vec<Piece>, said: &mut Said) {
        for piece in pieces {
            match piece {
                Piece::Arguments { text, .. } => {
                    if let Some((_, call)) = &mut self.call {
                        call.arguments.push_str(&text);
                    }
                    continue;
                }
                Piece::Content(text) => said.content.push_str(&text),
                Piece::Thought(text) => said.thought.push_str(&text),
                Piece::Call { index, id, name } => {
                    let next = (index, ToldCall { id, name, arguments: String::new() });
                    if let Some((index, call)) = self.call.replace(next) {
                        said.add_call(index, call);
                    }
                }
            }
        }
    }
}

impl Chunks for Lines {
    fn prompt_scored(&mut self, _: usize, _: Vec<TokenScore>) {
        // Never asked for.
    }

    fn output(&mut self, _: usize, output: Output) -> Vec<Chunk> {
        self.first_output_at.get_or_insert_with(Instant::now);
        let is_last = output.finish.is_some();
        self.finish = output.finish.or(self.finish.take());
        if self.answer.context.is_some() {
            self.token_ids.extend(&output.token_ids);
        }
        let pieces = self.reader.push(&output.text, output.token_ids.len());
        let mut said = Said::default();
        self.add(pieces, &mut said);
        if is_last {
            let pieces = self.reader.finish();
            self.add(pieces, &mut said);
            if let Some((index, call)) = self.call.take() {
                said.add_call(index, call);
            }
        }
        if said.is_empty() && output.scores.is_empty() {
            return Vec::new();
        }
        vec![Chunk::Body(text_of(&self.answer.part(said, &output.scores)).into())]
    }

    fn finished(&mut self, usage: Usage) -> Option<Payload> {
        let mut object = self.answer.part(Said::default(), &[]);
        let (finish, first_output_at) = (self.finish.as_ref(), self.first_output_at);
        self.answer.end(&mut object, &Ending { finish, usage, token_ids: &self.token_ids, first_output_at });
        if let Some(object) = object.as_object_mut() {
            object.remove("logprobs");
        }
        Some(text_of(&object).into())
    }

    fn last(&mut self) -> Option<Payload> {
        None
    }

    fn family(&self) -> &'static Family {
        &FAMILY
    }
}
