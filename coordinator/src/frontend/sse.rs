//! Answers as server-sent events: one JSON object per event, `[DONE]` after the last.

use std::{collections::VecDeque, convert::Infallible, sync::Arc, time::Duration};

use axum::response::{
    IntoResponse, Response,
    sse::{Event, KeepAlive, Sse},
};
use futures::Stream;
use http::{HeaderName, HeaderValue};
use phalanx_proto::v1::TokenScore;
use serde::Serialize;

use super::{
    error::ApiError,
    generation::{Generation, Progress},
    observe::Record,
};
use crate::request::{Output, Usage};

/// Makes an endpoint's chunks, each a JSON text.
pub trait Chunks: Send + 'static {
    /// A prompt's scores have come.
    fn prompt_scored(&mut self, prompt_idx: usize, scores: Vec<TokenScore>);

    /// A choice has grown. No chunk if there is nothing to show yet.
    fn output(&mut self, prompt_idx: usize, output: Output) -> Vec<String>;

    /// All choices are complete.
    fn finished(&mut self, usage: Usage) -> Option<String>;
}

/// A chunk's JSON.
pub fn json(chunk: &impl Serialize) -> String {
    serde_json::to_string(chunk).expect("chunks are plain structs whose maps have strings as keys")
}

struct Streaming<C> {
    generation: Generation,
    chunks: C,
    ready: VecDeque<String>,
    is_over: bool,
    record: Arc<Record>,
}

/// The answer to a streamed request. When the client goes away, the stream is dropped and with it the generation, which
/// cancels the request.
pub fn respond(generation: Generation, chunks: impl Chunks, record: Arc<Record>, keep_alive: Duration) -> Response {
    record.begin_stream();
    let streaming = Streaming { generation, chunks, ready: VecDeque::new(), is_over: false, record };
    let mut response = Sse::new(events(streaming)).keep_alive(KeepAlive::new().interval(keep_alive)).into_response();
    // Reverse proxies would hold events back.
    let no_buffer = (HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no"));
    response.headers_mut().insert(no_buffer.0, no_buffer.1);
    response
}

fn events<C: Chunks>(streaming: Streaming<C>) -> impl Stream<Item = Result<Event, Infallible>> {
    futures::stream::unfold(streaming, |mut streaming| async move {
        while streaming.ready.is_empty() && !streaming.is_over {
            streaming.advance().await;
        }
        let data = streaming.ready.pop_front()?;
        Some((Ok(Event::default().data(data)), streaming))
    })
}

impl<C: Chunks> Streaming<C> {
    async fn advance(&mut self) {
        let Some(progress) = self.generation.next().await else {
            self.is_over = true;
            return;
        };
        match progress {
            Ok(Progress::PromptScored { prompt_idx, scores }) => self.chunks.prompt_scored(prompt_idx, scores),
            Ok(Progress::Output { prompt_idx, output }) => self.ready.extend(self.chunks.output(prompt_idx, output)),
            Ok(Progress::Finished(usage)) => {
                self.ready.extend(self.chunks.finished(usage));
                self.ready.push_back("[DONE]".to_owned());
                self.record.end("200");
            }
            Err(error) => {
                let error = self.record.span().in_scope(|| ApiError::from(error));
                self.ready.push_back(json(&error.object()));
                self.record.end(error.status().as_str());
            }
        }
    }
}
