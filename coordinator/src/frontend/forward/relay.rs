//! An answer on its way to a client that does not notice when its server changes.

use std::{convert::Infallible, time::Duration};

use axum::{
    body::{Body, Bytes, to_bytes},
    response::Response,
};
use futures::{FutureExt, StreamExt};
use http::{HeaderName, HeaderValue, StatusCode, header};
use tokio::{
    sync::mpsc,
    time::{Instant, sleep, timeout_at},
};
use tokio_stream::wrappers::ReceiverStream;

use super::{
    Busy,
    events::{Cutter, Kind},
    finder::Over,
    upstream::{Ask, Upstream, Upstreams},
};
use crate::frontend::{
    error::ApiError,
    family::Family,
    sse::{self, Framing, Payload},
};

/// Header that says after which event a stream is to go on.
const LAST_EVENT_ID: HeaderName = HeaderName::from_static("last-event-id");
/// Longest wait for a leader.
pub const PATIENCE: Duration = Duration::from_secs(60);
/// Between comments that show a client, and what lies between, that its connection lives.
const PING: Duration = Duration::from_secs(5);
/// Pause before the same leader is asked again.
pub const RETRY_PAUSE: Duration = Duration::from_millis(100);
/// Events that wait for a slow client.
const QUEUE: usize = 64;

/// Asks until somebody answers, then passes the answer on: event by event if it is a stream, else whole.
pub async fn relay(upstreams: Upstreams, ask: Ask, form: &'static Family, busy: Busy) -> Response {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match timeout_at(deadline, upstreams.ask(&ask)).await {
            Err(_) => return no_leader(),
            Ok(Err(reason)) => tracing::debug!(reason, "asking for a leader again"),
            Ok(Ok(upstream)) => {
                if is_stream(&upstream.response) {
                    return stream(upstreams, ask, form, upstream, busy);
                }
                match whole(upstream).await {
                    Ok(response) => return response,
                    Err(reason) => tracing::debug!(reason, "the answer broke off: asking again"),
                }
            }
        }
        sleep(RETRY_PAUSE).await;
    }
}

/// Nobody leads.
pub fn no_leader() -> Response {
    use axum::response::IntoResponse;
    ApiError::not_ready("no coordinator leads").into_response()
}

fn is_stream(response: &Response) -> bool {
    let kind = response.headers().get(header::CONTENT_TYPE).and_then(|v| v.to_str().ok());
    response.status() == StatusCode::OK && kind.is_some_and(|k| k.starts_with("text/event-stream"))
}

/// An answer once all of it is there. An error is a reason to ask again.
pub async fn whole(upstream: Upstream) -> Result<Response, String> {
    let (parts, body) = upstream.response.into_parts();
    tokio::select! {
        biased;
        // First: an answer that ends with its server's leadership may be about that.
        () = upstream.over => Err("its leadership ended".to_owned()),
        body = to_bytes(body, usize::MAX) => {
            Ok(Response::from_parts(parts, Body::from(body.map_err(|e| e.to_string())?)))
        }
    }
}

fn stream(upstreams: Upstreams, ask: Ask, form: &'static Family, upstream: Upstream, busy: Busy) -> Response {
    let (mut parts, body) = upstream.response.into_parts();
    if form.framing == Framing::Lines {
        parts.headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(sse::LINES_TYPE));
    }
    let (client, events) = mpsc::channel(QUEUE);
    let relay = Relay { upstreams, ask, form, client, last_id: None, has_said: false, _busy: busy };
    let source = Source { body: body.into_data_stream().boxed(), over: upstream.over };
    tokio::spawn(relay.run(source));
    Response::from_parts(parts, Body::from_stream(ReceiverStream::new(events).map(Ok::<_, Infallible>)))
}

/// One server's events.
struct Source {
    body: futures::stream::BoxStream<'static, Result<Bytes, axum::Error>>,
    over: Over,
}

/// Why a source gives no more.
enum End {
    /// The answer is complete, or its server says that it is.
    Complete,
    ClientGone,
    Broken(String),
}

/// What an event carries, as a line; nothing if it carries nothing.
fn line(event: &[u8]) -> Bytes {
    let carried = event.split(|byte| *byte == b'\n').find_map(|line| line.strip_prefix(b"data: "));
    carried.map_or_else(Bytes::new, |carried| Bytes::from([carried, b"\n"].concat()))
}

/// Passes one answer on.
struct Relay {
    upstreams: Upstreams,
    ask: Ask,
    /// Whose streams the client reads.
    form: &'static Family,
    client: mpsc::Sender<Bytes>,
    /// What the client has.
    last_id: Option<String>,
    has_said: bool,
    _busy: Busy,
}

impl Relay {
    async fn run(mut self, mut source: Source) {
        loop {
            let reason = match self.pass_on(source).await {
                End::Complete | End::ClientGone => return,
                End::Broken(reason) => reason,
            };
            tracing::info!(reason, "a stream broke off: going on with the next leader");
            if self.has_said && self.last_id.is_none() {
                // Without ids nobody knows what the client has.
                return self.fail(&ApiError::not_ready("the answer broke off and can't be resumed")).await;
            }
            if let Some(id) = self.last_id.as_deref().and_then(|id| HeaderValue::from_str(id).ok()) {
                self.ask.headers.insert(LAST_EVENT_ID, id);
            }
            source = match self.reopen().await {
                Some(source) => source,
                None => return,
            };
        }
    }

    async fn pass_on(&mut self, mut source: Source) -> End {
        let mut cutter = Cutter::default();
        loop {
            let bytes = tokio::select! {
                biased;
                // Before its last words: they are about its end, not about the answer.
                () = &mut source.over => return End::Broken("its leadership ended".to_owned()),
                next = source.body.next() => match next {
                    Some(Ok(bytes)) => bytes,
                    Some(Err(error)) => return End::Broken(error.to_string()),
                    None => return End::Complete,
                },
                () = self.client.closed() => return End::ClientGone,
            };
            cutter.push(&bytes);
            while let Some(event) = cutter.next() {
                if event.kind == Kind::AskAgain {
                    return End::Broken("its server ends".to_owned());
                }
                let raw = match self.form.framing {
                    Framing::Events => event.raw,
                    Framing::Lines => line(&event.raw),
                };
                if !raw.is_empty() && self.client.send(raw).await.is_err() {
                    return End::ClientGone;
                }
                self.has_said |= event.kind != Kind::Comment;
                self.last_id = event.id.or(self.last_id.take());
                if event.kind == Kind::Done {
                    return End::Complete;
                }
            }
        }
    }

    /// The same stream from the next leader; the client is told why if there is none.
    async fn reopen(&mut self) -> Option<Source> {
        let deadline = Instant::now() + PATIENCE;
        let client = self.client.clone();
        let pings = async {
            // Nothing can be said between lines: their client hears of its connection's end only.
            let ping: &[u8] = if self.form.framing == Framing::Events { b": waiting for a leader\n\n" } else { b"" };
            loop {
                sleep(PING).await;
                if !ping.is_empty() && client.send(Bytes::from_static(ping)).await.is_err() {
                    return;
                }
            }
        };
        let opened = tokio::select! {
            opened = timeout_at(deadline, self.ask_again()) => opened,
            () = pings => return None,
            () = self.client.closed() => return None,
        };
        let response = match opened {
            Ok(upstream) if is_stream(&upstream.response) => {
                let body = upstream.response.into_body().into_data_stream().boxed();
                return Some(Source { body, over: upstream.over });
            }
            // It was complete: the client has it all.
            Ok(upstream) if upstream.response.status() == StatusCode::NO_CONTENT => return None,
            Ok(upstream) => whole(upstream).await,
            Err(_) => Ok(no_leader()),
        };
        let said = match response {
            Ok(response) => to_bytes(response.into_body(), usize::MAX).await.map_err(|e| e.to_string()),
            Err(reason) => Err(reason),
        };
        match said {
            // As the endpoints end a stream that fails: with the error's object.
            Ok(error) => {
                let text = String::from_utf8_lossy(&error).into_owned();
                self.say(Payload { text, ..(self.form.failure)(&ApiError::not_ready("")) }).await;
            }
            Err(reason) => self.fail(&ApiError::not_ready(&reason)).await,
        }
        None
    }

    async fn ask_again(&self) -> Upstream {
        loop {
            match self.upstreams.ask(&self.ask).await {
                // Busy or without shards: it will not be for ever, and the request was accepted once.
                Ok(upstream)
                    if matches!(
                        upstream.response.status(),
                        StatusCode::SERVICE_UNAVAILABLE | StatusCode::TOO_MANY_REQUESTS
                    ) => {}
                Ok(upstream) => return upstream,
                Err(reason) => tracing::debug!(reason, "asking for a leader again"),
            }
            sleep(RETRY_PAUSE).await;
        }
    }

    async fn fail(&self, error: &ApiError) {
        self.say((self.form.failure)(error)).await;
    }

    async fn say(&self, payload: Payload) {
        let text = match (self.form.framing, payload.name) {
            (Framing::Lines, _) => format!("{}\n", payload.text),
            (Framing::Events, None) => format!("data: {}\n\n", payload.text),
            (Framing::Events, Some(name)) => format!("event: {name}\ndata: {}\n\n", payload.text),
        };
        // A client that has gone needs none.
        let _ = self.client.send(Bytes::from(text)).await;
    }
}

/// Breaks an answer of this process off when its leadership ends, whatever it would still say: whoever passes it on asks
/// the next leader.
pub async fn while_leading(answer: impl Future<Output = Result<Response, Infallible>>, mut end: Over) -> Response {
    let response = tokio::select! {
        biased;
        () = &mut end => {
            let mut refusal = no_leader();
            refusal.headers_mut().insert(super::NO_LEADER, HeaderValue::from_static("1"));
            return refusal;
        }
        response = answer => match response {
            Ok(response) => response,
            Err(never) => match never {},
        },
    };
    let (parts, body) = response.into_parts();
    let broken = end.map(|()| Err(axum::Error::new(std::io::Error::other("this coordinator no longer leads"))));
    let body = futures::stream::unfold((body.into_data_stream(), Some(broken)), |(mut body, broken)| async move {
        let mut broken = broken?;
        tokio::select! {
            biased;
            error = &mut broken => Some((error, (body, None))),
            next = body.next() => next.map(|bytes| (bytes, (body, Some(broken)))),
        }
    });
    Response::from_parts(parts, Body::from_stream(body))
}
