//! Answers as a stream: server-sent events, or lines of JSON where an API wants these. What stands in them, and what comes
//! last, each API says itself ([`Chunks`]).

use std::{collections::VecDeque, convert::Infallible, sync::Arc, time::Duration};

use axum::{
    body::{Body, Bytes},
    response::{
        IntoResponse, Response,
        sse::{Event, KeepAlive, Sse},
    },
};
use futures::{Stream, StreamExt};
use http::{HeaderName, HeaderValue, StatusCode, header};
use phalanx_proto::v1::TokenScore;
use serde::Serialize;

use super::{
    error::ApiError,
    family::{Family, OPENAI},
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

    /// All choices are complete.
    fn finished(&mut self, usage: Usage) -> Option<Payload>;

    /// What comes last of all.
    fn last(&mut self) -> Option<Payload> {
        Some("[DONE]".to_owned().into())
    }

    /// Whose form they have.
    fn family(&self) -> &'static Family {
        &OPENAI
    }

    /// What ends a stream that fails.
    fn failed(&mut self, error: &ApiError) -> Payload {
        (self.family().failure)(error)
    }

    /// What shows that a silent stream lives; `None` is a comment.
    fn keep_alive(&self) -> Option<Payload> {
        None
    }
}

/// What one event carries.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Payload {
    /// The event's name, where the API names events.
    pub name: Option<&'static str>,
    /// A JSON text, but for the last words of some APIs.
    pub text: String,
}

impl Payload {
    /// Of an event with a name.
    pub fn named(name: &'static str, object: &impl Serialize) -> Self {
        Self { name: Some(name), text: json(object) }
    }

    /// Adds it to an event that may have an id. Some clients read lines rather than events: id and name come first.
    pub(crate) fn add_to(self, event: Event) -> Event {
        self.name.into_iter().fold(event, Event::event).data(self.text)
    }
}

impl From<String> for Payload {
    fn from(text: String) -> Self {
        Self { name: None, text }
    }
}

/// Part of a streamed choice.
#[derive(Debug)]
pub enum Chunk {
    /// What comes before the output's tokens.
    Head(Payload),
    /// The first of these brings the output's tokens, others what comes after them.
    Body(Payload),
}

/// How a stream is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Framing {
    /// Server-sent events.
    Events,
    /// A JSON text per line.
    Lines,
}

/// The type of a stream of lines.
pub const LINES_TYPE: &str = "application/x-ndjson";

/// A chunk's JSON.
pub fn json(chunk: &impl Serialize) -> String {
    serde_json::to_string(chunk).expect("chunks are plain structs whose maps have strings as keys")
}

struct Streaming {
    generation: Generation,
    chunks: Box<dyn Chunks>,
    numbering: Option<Numbering>,
    ready: VecDeque<Ready>,
    is_over: bool,
    record: Arc<Record>,
}

/// What is to be sent.
enum Ready {
    /// An event; the position is its id, with the wish for a quick return if it is the first that has one.
    Payload { payload: Payload, id: Option<(String, bool)> },
    /// A comment.
    Comment(String),
}

impl Ready {
    fn event(self) -> Event {
        match self {
            Self::Comment(text) => Event::default().comment(text),
            Self::Payload { payload, id: None } => payload.add_to(Event::default()),
            Self::Payload { payload, id: Some((id, is_first)) } => {
                let event = payload.add_to(Event::default().id(id));
                if is_first { event.retry(RETRY) } else { event }
            }
        }
    }

    fn line(self) -> Bytes {
        match self {
            Self::Comment(_) => Bytes::new(),
            Self::Payload { payload, .. } => Bytes::from(payload.text + "\n"),
        }
    }
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
    framing: Framing,
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
    let still_there = KeepAlive::new().interval(keep_alive);
    let still_there = match chunks.keep_alive() {
        Some(payload) => still_there.event(payload.add_to(Event::default())),
        None => still_there,
    };
    let streaming = Streaming { generation, chunks, numbering, ready: VecDeque::new(), is_over: false, record };
    let all = unfold(streaming);
    let mut response = match framing {
        Framing::Events => {
            Sse::new(all.map(|ready| Ok::<_, Infallible>(ready.event()))).keep_alive(still_there).into_response()
        }
        Framing::Lines => {
            let body = Body::from_stream(all.map(|ready| Ok::<_, Infallible>(ready.line())));
            ([(header::CONTENT_TYPE, LINES_TYPE)], body).into_response()
        }
    };
    // Reverse proxies would hold events back.
    let no_buffer = (HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no"));
    response.headers_mut().insert(no_buffer.0, no_buffer.1);
    response
}

fn unfold(streaming: Streaming) -> impl Stream<Item = Ready> {
    futures::stream::unfold(streaming, |mut streaming| async move {
        while streaming.ready.is_empty() && !streaming.is_over {
            streaming.advance().await;
        }
        let ready = streaming.ready.pop_front()?;
        Some((ready, streaming))
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
                if let Some(last) = self.chunks.last() {
                    self.tail(Tail::Done, last);
                }
                self.record.end("200");
            }
            // Its successor tells the rest.
            Err(Broken::Superseded) => self.record.end(StatusCode::CONFLICT.as_str()),
            // Not the request has failed, but this server: the client asks again, here or elsewhere.
            Err(Broken::Failed(RequestError::Unavailable(reason))) if self.numbering.is_some() => {
                self.ready.push_back(Ready::Comment(format!("ask again: {}", reason.replace(['\r', '\n'], " "))));
                self.record.end(StatusCode::SERVICE_UNAVAILABLE.as_str());
            }
            Err(error) => {
                let error = self.record.span().in_scope(|| ApiError::from(error));
                let payload = self.chunks.failed(&error);
                self.ready.push_back(Ready::Payload { payload, id: None });
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
                Chunk::Head(payload) | Chunk::Body(payload) => Ready::Payload { payload, id: None },
            }));
            return;
        };
        for chunk in chunks {
            let (payload, n_tokens) = match chunk {
                Chunk::Head(payload) => (payload, 0),
                Chunk::Body(payload) => (payload, std::mem::take(&mut n_new)),
            };
            self.ready.extend(numbering.chunk(index, n_tokens, payload));
        }
        numbering.silent(index, n_new);
    }

    fn tail(&mut self, tail: Tail, payload: Payload) {
        match &mut self.numbering {
            None => self.ready.push_back(Ready::Payload { payload, id: None }),
            Some(numbering) => {
                if numbering.has.reach_tail(tail) {
                    self.ready.push_back(numbering.ready(payload));
                }
            }
        }
    }
}

impl Numbering {
    /// A chunk's event, unless the client has it.
    fn chunk(&mut self, index: usize, n_tokens: usize, payload: Payload) -> Option<Ready> {
        let walked = self.walked.get_mut(index)?;
        *walked = walked.step(n_tokens);
        self.has.reach(index, *walked).then(|| self.ready(payload))
    }

    /// Tokens that nothing shows yet.
    fn silent(&mut self, index: usize, n_tokens: usize) {
        if let Some(walked) = self.walked.get_mut(index).filter(|_| n_tokens > 0) {
            *walked = walked.step(n_tokens);
            self.has.reach(index, *walked);
        }
    }

    fn ready(&mut self, payload: Payload) -> Ready {
        let is_first = !std::mem::replace(&mut self.has_begun, true);
        Ready::Payload { payload, id: Some((self.has.to_string(), is_first)) }
    }
}
