//! Answers as server-sent events: one JSON object per event, `[DONE]` after the last.

use std::{collections::VecDeque, convert::Infallible, sync::Arc, time::Duration};

use axum::response::{
    IntoResponse, Response,
    sse::{Event, KeepAlive, Sse},
};
use futures::Stream;
use http::{HeaderName, HeaderValue, StatusCode};
use phalanx_proto::v1::TokenScore;
use serde::Serialize;

use super::{
    error::ApiError,
    generation::{Broken, Generation, Progress},
    observe::Record,
    streams::position::{Place, Position, Tail},
};
use crate::request::{Output, RequestError, Usage};

/// How long a client should wait before it asks again for a stream that broke off.
const RETRY: Duration = Duration::from_millis(250);

/// Makes an endpoint's chunks.
pub trait Chunks: Send + 'static {
    /// A prompt's scores have come.
    fn prompt_scored(&mut self, prompt_idx: usize, scores: Vec<TokenScore>);

    /// A choice has grown. No chunk if there is nothing to show yet.
    fn output(&mut self, prompt_idx: usize, output: Output) -> Vec<Chunk>;

    /// All choices are complete. A JSON text.
    fn finished(&mut self, usage: Usage) -> Option<String>;
}

/// Part of a streamed choice, as a JSON text.
#[derive(Debug)]
pub enum Chunk {
    /// What comes before the output's tokens.
    Head(String),
    /// The first of these brings the output's tokens, others what comes after them.
    Body(String),
}

/// A chunk's JSON.
pub fn json(chunk: &impl Serialize) -> String {
    serde_json::to_string(chunk).expect("chunks are plain structs whose maps have strings as keys")
}

struct Streaming {
    generation: Generation,
    chunks: Box<dyn Chunks>,
    numbering: Option<Numbering>,
    ready: VecDeque<Event>,
    is_over: bool,
    record: Arc<Record>,
}

/// Ids of the events of a stream that can be resumed, and which of them the client has.
struct Numbering {
    /// Place in each choice, from its beginning.
    walked: Vec<Place>,
    /// What the client has after the next event.
    has: Position,
    has_begun: bool,
}

/// The answer to a streamed request. When the client goes away, the stream is dropped and with it the generation, which
/// cancels the request or leaves it to the next reader. `has` is what the client has of a stream that can be resumed.
pub fn respond(
    generation: Generation,
    chunks: Box<dyn Chunks>,
    has: Option<Position>,
    record: Arc<Record>,
    keep_alive: Duration,
) -> Response {
    if has.as_ref().is_some_and(|has| has.tail() == Tail::Done) {
        // Tells an event source that it need not come back.
        return StatusCode::NO_CONTENT.into_response();
    }
    record.begin_stream();
    let numbering = has.map(|mut has| {
        has.widen(generation.n_choices());
        Numbering { walked: vec![Place::default(); generation.n_choices()], has, has_begun: false }
    });
    let streaming = Streaming { generation, chunks, numbering, ready: VecDeque::new(), is_over: false, record };
    let mut response = Sse::new(events(streaming)).keep_alive(KeepAlive::new().interval(keep_alive)).into_response();
    // Reverse proxies would hold events back.
    let no_buffer = (HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no"));
    response.headers_mut().insert(no_buffer.0, no_buffer.1);
    response
}

fn events(streaming: Streaming) -> impl Stream<Item = Result<Event, Infallible>> {
    futures::stream::unfold(streaming, |mut streaming| async move {
        while streaming.ready.is_empty() && !streaming.is_over {
            streaming.advance().await;
        }
        let event = streaming.ready.pop_front()?;
        Some((Ok(event), streaming))
    })
}

impl Streaming {
    async fn advance(&mut self) {
        let Some(progress) = self.generation.next().await else {
            self.is_over = true;
            return;
        };
        match progress {
            Ok(Progress::PromptScored { prompt_idx, scores }) => self.chunks.prompt_scored(prompt_idx, scores),
            Ok(Progress::Output { prompt_idx, output }) => self.output(prompt_idx, output),
            Ok(Progress::Finished(usage)) => {
                if let Some(chunk) = self.chunks.finished(usage) {
                    self.tail(Tail::Usage, chunk);
                }
                self.tail(Tail::Done, "[DONE]".to_owned());
                self.record.end("200");
            }
            // Its successor tells the rest.
            Err(Broken::Superseded) => self.record.end(StatusCode::CONFLICT.as_str()),
            // Not the request has failed, but this server: the client asks again, here or elsewhere.
            Err(Broken::Failed(RequestError::Unavailable(reason))) if self.numbering.is_some() => {
                self.ready
                    .push_back(Event::default().comment(format!("ask again: {}", reason.replace(['\r', '\n'], " "))));
                self.record.end(StatusCode::SERVICE_UNAVAILABLE.as_str());
            }
            Err(error) => {
                let error = self.record.span().in_scope(|| ApiError::from(error));
                self.ready.push_back(Event::default().data(json(&error.object())));
                self.record.end(error.status().as_str());
            }
        }
    }

    fn output(&mut self, prompt_idx: usize, output: Output) {
        let index = Generation::choice_index(self.generation.n(), prompt_idx, &output);
        let mut n_new = output.token_ids.len();
        let chunks = self.chunks.output(prompt_idx, output);
        let Some(numbering) = &mut self.numbering else {
            self.ready.extend(chunks.into_iter().map(|chunk| match chunk {
                Chunk::Head(json) | Chunk::Body(json) => Event::default().data(json),
            }));
            return;
        };
        for chunk in chunks {
            let (json, n_tokens) = match chunk {
                Chunk::Head(json) => (json, 0),
                Chunk::Body(json) => (json, std::mem::take(&mut n_new)),
            };
            self.ready.extend(numbering.chunk(index, n_tokens, json));
        }
        numbering.silent(index, n_new);
    }

    fn tail(&mut self, tail: Tail, json: String) {
        match &mut self.numbering {
            None => self.ready.push_back(Event::default().data(json)),
            Some(numbering) => {
                if numbering.has.reach_tail(tail) {
                    self.ready.push_back(numbering.event(json));
                }
            }
        }
    }
}

impl Numbering {
    /// A chunk's event, unless the client has it.
    fn chunk(&mut self, index: usize, n_tokens: usize, json: String) -> Option<Event> {
        let walked = self.walked.get_mut(index)?;
        *walked = walked.step(n_tokens);
        self.has.reach(index, *walked).then(|| self.event(json))
    }

    /// Tokens that nothing shows yet.
    fn silent(&mut self, index: usize, n_tokens: usize) {
        if let Some(walked) = self.walked.get_mut(index).filter(|_| n_tokens > 0) {
            *walked = walked.step(n_tokens);
            self.has.reach(index, *walked);
        }
    }

    fn event(&mut self, json: String) -> Event {
        let event = Event::default().id(self.has.to_string()).data(json);
        if std::mem::replace(&mut self.has_begun, true) { event } else { event.retry(RETRY) }
    }
}
