//! Contents of files on their way between a client and the leader: passed on as they come, piece by piece, so that nobody in
//! between has to have room for a file.
//!
//! What is read stays the same whoever leads, so the next leader goes on where one broke off. What is sent can't be asked
//! for twice: if its leader is lost once it has begun, its client has to send it again.

use std::{
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
};

use axum::{
    body::{Body, BodyDataStream, Bytes},
    response::{IntoResponse, Response},
};
use futures::{Stream, StreamExt};
use http::{StatusCode, header};
use tokio::time::{Instant, sleep, timeout_at};

use super::{
    Busy,
    finder::Over,
    relay::{PATIENCE, RETRY_PAUSE, no_leader, whole},
    upstream::{Ask, Upstream, Upstreams},
};
use crate::frontend::error::ApiError;

/// Takes a file to the leader.
pub async fn send(upstreams: Upstreams, ask: Ask, body: Body, _busy: Busy) -> Response {
    let deadline = Instant::now() + PATIENCE;
    let parcel = Parcel::new(body);
    while let Some(body) = parcel.hand_out() {
        let Ok((target, over)) = timeout_at(deadline, upstreams.finder.find()).await else { return no_leader() };
        // As slow as the client is: whoever takes it in says how slow that may be.
        let reason = match upstreams.ask_with(target, over, &ask, Body::from_stream(body)).await {
            Ok(upstream) => match whole(upstream).await {
                Ok(response) => return response,
                Err(reason) => reason,
            },
            Err(reason) => reason,
        };
        tracing::debug!(reason, "a file has not reached the leader");
        if Instant::now() >= deadline {
            return no_leader();
        }
        sleep(RETRY_PAUSE).await;
    }
    ApiError::not_ready("the leader was lost while the file was sent: send it again").into_response()
}

/// A body that is handed out again as long as nobody has taken anything of it.
struct Parcel(Arc<Mutex<Option<BodyDataStream>>>);

impl Parcel {
    fn new(body: Body) -> Self {
        Self(Arc::new(Mutex::new(Some(body.into_data_stream()))))
    }

    /// The body, unless it is begun or somebody has it.
    fn hand_out(&self) -> Option<Carried> {
        let body = self.0.lock().unwrap_or_else(PoisonError::into_inner).take()?;
        Some(Carried { body: Some(body), home: Arc::clone(&self.0), is_begun: false })
    }
}

/// A body on its way.
struct Carried {
    body: Option<BodyDataStream>,
    home: Arc<Mutex<Option<BodyDataStream>>>,
    is_begun: bool,
}

impl Stream for Carried {
    type Item = Result<Bytes, axum::Error>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let Some(body) = &mut self.body else { return Poll::Ready(None) };
        let polled = body.poll_next_unpin(context);
        self.is_begun |= matches!(polled, Poll::Ready(Some(_)));
        polled
    }
}

impl Drop for Carried {
    fn drop(&mut self) {
        if !self.is_begun {
            *self.home.lock().unwrap_or_else(PoisonError::into_inner) = self.body.take();
        }
    }
}

/// Brings a file from the leader.
pub async fn fetch(upstreams: Upstreams, ask: Ask, busy: Busy) -> Response {
    let mut fetching = Fetching { upstreams, ask, n_told: 0, n_bytes: None, _busy: busy };
    let upstream = match fetching.open().await {
        Ok(upstream) => upstream,
        Err(other) => return other,
    };
    let (parts, body) = upstream.response.into_parts();
    fetching.n_bytes = length(&parts.headers);
    let source = Source { body: body.into_data_stream(), over: upstream.over, n_known: 0 };
    let pieces = futures::stream::unfold((fetching, Some(source)), |(mut fetching, source)| async move {
        let (piece, source) = fetching.next(source?).await?;
        Some((piece, (fetching, source)))
    });
    Response::from_parts(parts, Body::from_stream(pieces))
}

fn length(headers: &http::HeaderMap) -> Option<u64> {
    headers.get(header::CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

/// One leader's copy.
struct Source {
    body: BodyDataStream,
    over: Over,
    /// Bytes at its beginning that the client has already.
    n_known: u64,
}

/// A file that is being brought.
struct Fetching {
    upstreams: Upstreams,
    ask: Ask,
    /// Bytes that the client has.
    n_told: u64,
    /// Bytes that it is to get.
    n_bytes: Option<u64>,
    _busy: Busy,
}

type Piece = Result<Bytes, std::io::Error>;

impl Fetching {
    /// The file from whoever leads, or what is said instead.
    async fn open(&self) -> Result<Upstream, Response> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let reason = match timeout_at(deadline, self.upstreams.ask(&self.ask)).await {
                Err(_) => return Err(no_leader()),
                Ok(Ok(upstream)) if upstream.response.status() == StatusCode::OK => return Ok(upstream),
                Ok(Ok(upstream)) => match whole(upstream).await {
                    // A new leader takes a moment to have the files.
                    Ok(response) if self.n_told > 0 && response.status() == StatusCode::SERVICE_UNAVAILABLE => {
                        response.status().to_string()
                    }
                    Ok(response) => return Err(response),
                    Err(reason) => reason,
                },
                Ok(Err(reason)) => reason,
            };
            tracing::debug!(reason, "asking for a file again");
            sleep(RETRY_PAUSE).await;
        }
    }

    /// What comes next, and where the rest comes from; nothing at the end.
    async fn next(&mut self, mut source: Source) -> Option<(Piece, Option<Source>)> {
        loop {
            let reason = match self.read(&mut source).await {
                Ok(Some(piece)) => return Some((Ok(piece), Some(source))),
                Ok(None) => return None,
                Err(reason) => reason,
            };
            tracing::info!(reason, "a file broke off: going on with the next leader");
            sleep(RETRY_PAUSE).await;
            match self.open().await {
                Ok(again) if length(again.response.headers()) == self.n_bytes => {
                    let body = again.response.into_body().into_data_stream();
                    source = Source { body, over: again.over, n_known: self.n_told };
                }
                Ok(_) => return Some((Err(std::io::Error::other("the file has become another one")), None)),
                Err(said) => {
                    let reason = format!("the next leader does not have the file: {}", said.status());
                    return Some((Err(std::io::Error::other(reason)), None));
                }
            }
        }
    }

    /// The next bytes that the client has not; none if it has all.
    async fn read(&mut self, source: &mut Source) -> Result<Option<Bytes>, String> {
        loop {
            let next = tokio::select! {
                biased;
                next = source.body.next() => next,
                () = &mut source.over => return Err("its leadership ended".to_owned()),
            };
            let mut piece = match next {
                Some(piece) => piece.map_err(|error| error.to_string())?,
                None if self.n_bytes.is_none_or(|n_bytes| n_bytes == self.n_told) => return Ok(None),
                None => return Err("it ended early".to_owned()),
            };
            let n_known = usize::try_from(source.n_known).map_or(piece.len(), |n_known| n_known.min(piece.len()));
            source.n_known -= n_known as u64;
            let piece = piece.split_off(n_known);
            if !piece.is_empty() {
                self.n_told += piece.len() as u64;
                return Ok(Some(piece));
            }
        }
    }
}
