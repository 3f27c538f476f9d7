//! The thread that sends spans to a collector: OTLP over HTTP, as protobuf.

use std::{
    collections::{HashMap, VecDeque},
    fmt,
    str::FromStr,
    sync::mpsc::{Receiver, RecvTimeoutError},
    time::{Duration, Instant},
};

use http::Uri;
use metrics::Counter;
use prost::Message;

use super::{
    Note, Settings, SpanContext,
    otlp::{Export, Resource, ResourceSpans, Scope, ScopeSpans, Span, attribute},
    spans::Clock,
};
use crate::metrics as names;

/// Path of traces at a collector (OTLP/HTTP).
const PATH: &str = "/v1/traces";
/// Most spans of a message.
const MOST_SPANS: usize = 512;
/// Longest that a span waits for others.
const LINGER: Duration = Duration::from_secs(1);
/// Longest wait for the collector.
const SEND_LIMIT: Duration = Duration::from_secs(5);
/// Between complaints about a collector that does not take spans.
const COMPLAIN_EVERY: Duration = Duration::from_secs(60);
/// Traced requests that are known; the oldest are forgotten.
const MOST_OPEN: usize = 16_384;

/// Where spans are sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Destination(String);

/// Why a URL is none of a collector.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EndpointError {
    /// It is no URL, or has no host.
    #[error("want http://HOST:PORT or https://HOST:PORT of a collector's OTLP over HTTP, mostly at port 4318")]
    NoUrl,
    /// OTLP over gRPC is not spoken.
    #[error("spans are sent over HTTP, not gRPC: give http://HOST:4318")]
    Grpc,
}

impl FromStr for Destination {
    type Err = EndpointError;

    fn from_str(text: &str) -> Result<Self, EndpointError> {
        let uri: Uri = text.parse().map_err(|_| EndpointError::NoUrl)?;
        if uri.scheme_str() == Some("grpc") {
            return Err(EndpointError::Grpc);
        }
        if !matches!(uri.scheme_str(), Some("http" | "https")) || uri.host().is_none_or(str::is_empty) {
            return Err(EndpointError::NoUrl);
        }
        let is_bare = matches!(uri.path(), "" | "/") && uri.query().is_none();
        Ok(Self(if is_bare { format!("{}{PATH}", text.trim_end_matches('/')) } else { text.to_owned() }))
    }
}

impl fmt::Display for Destination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Turns messages into spans and sends them.
pub(super) struct Exporter {
    settings: Settings,
    agent: ureq::Agent,
    clock: Clock,
    open: Open,
    spans: Vec<Span>,
    /// When the first of them came.
    since: Instant,
    exported: Counter,
    failed: Counter,
    complained: Option<Instant>,
}

/// Traced requests that were given to the scheduler.
#[derive(Default)]
struct Open {
    contexts: HashMap<String, SpanContext>,
    order: VecDeque<String>,
}

impl Open {
    fn insert(&mut self, id: String, context: SpanContext) {
        if self.contexts.insert(id.clone(), context).is_none() {
            self.order.push_back(id);
        }
        if self.order.len() > MOST_OPEN
            && let Some(oldest) = self.order.pop_front()
        {
            self.contexts.remove(&oldest);
        }
    }

    /// It stays: a request may go on at another group, under the same name.
    fn get(&self, id: &str) -> Option<SpanContext> {
        self.contexts.get(id).copied()
    }
}

impl Exporter {
    pub(super) fn new(settings: Settings) -> Self {
        let outcome = |outcome: &'static str| metrics::counter!(names::TRACE_SPANS, "outcome" => outcome);
        let agent = ureq::Agent::config_builder().timeout_global(Some(SEND_LIMIT)).build().into();
        Self {
            settings,
            agent,
            clock: Clock::new(),
            open: Open::default(),
            spans: Vec::new(),
            since: Instant::now(),
            exported: outcome("exported"),
            failed: outcome("failed"),
            complained: None,
        }
    }

    /// Ends with the tracer, which is at the end of the process.
    pub(super) fn run(mut self, notes: &Receiver<Note>) {
        loop {
            let note = if self.spans.is_empty() {
                notes.recv().map_err(|_| RecvTimeoutError::Disconnected)
            } else {
                notes.recv_timeout(LINGER.saturating_sub(self.since.elapsed()))
            };
            match note {
                Ok(Note::Began(id, context)) => self.open.insert(id, context),
                Ok(Note::Answered(answered)) => {
                    let span = self.clock.answered(*answered);
                    self.add([span]);
                }
                Ok(Note::Ended(ended, work)) => {
                    if let Some(request) = self.open.get(&ended.id) {
                        let spans = self.clock.ended(&ended, &work, request, &self.settings.model);
                        self.add(spans);
                    }
                }
                Ok(Note::Flush(_done)) => self.send(),
                Err(RecvTimeoutError::Timeout) => self.send(),
                Err(RecvTimeoutError::Disconnected) => return self.send(),
            }
            if self.spans.len() >= MOST_SPANS || self.since.elapsed() >= LINGER {
                self.send();
            }
        }
    }

    fn add(&mut self, spans: impl IntoIterator<Item = Span>) {
        if self.spans.is_empty() {
            self.since = Instant::now();
        }
        self.spans.extend(spans);
    }

    fn send(&mut self) {
        if self.spans.is_empty() {
            return;
        }
        let spans = std::mem::take(&mut self.spans);
        let n_spans = spans.len() as u64;
        let body = self.message(spans).encode_to_vec();
        let request = self.agent.post(&self.settings.destination.0).header("content-type", "application/x-protobuf");
        match request.send(&body[..]) {
            Ok(_) => self.exported.increment(n_spans),
            Err(error) => {
                self.failed.increment(n_spans);
                if self.complained.is_none_or(|at| at.elapsed() >= COMPLAIN_EVERY) {
                    self.complained = Some(Instant::now());
                    let to = &self.settings.destination;
                    tracing::warn!(%to, n_spans, %error, "the collector does not take spans: they are dropped");
                }
            }
        }
    }

    fn message(&self, spans: Vec<Span>) -> Export {
        let attributes = vec![
            attribute("service.name", "phalanx"),
            attribute("service.version", env!("CARGO_PKG_VERSION")),
            attribute("service.instance.id", self.settings.instance.as_str()),
        ];
        let scope = Scope { name: "phalanx-coordinator".to_owned(), version: env!("CARGO_PKG_VERSION").to_owned() };
        Export {
            resource_spans: vec![ResourceSpans {
                resource: Some(Resource { attributes }),
                scope_spans: vec![ScopeSpans { scope: Some(scope), spans }],
            }],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_collector_is_an_http_url() {
        let url = |text: &str| text.parse::<Destination>().map(|to| to.0);
        assert_eq!(url("http://localhost:4318").unwrap(), "http://localhost:4318/v1/traces");
        assert_eq!(url("https://otlp.example/").unwrap(), "https://otlp.example/v1/traces");
        assert_eq!(url("http://c:4318/v1/traces").unwrap(), "http://c:4318/v1/traces");
        assert_eq!(url("https://c/otlp/v1/traces").unwrap(), "https://c/otlp/v1/traces");
        assert_eq!(url("grpc://c:4317"), Err(EndpointError::Grpc));
        for wrong in ["", "c:4318", "ftp://c", "http://", "not a url"] {
            assert_eq!(url(wrong), Err(EndpointError::NoUrl), "{wrong}");
        }
    }

    #[test]
    fn open_requests_are_bounded() {
        let mut open = Open::default();
        let context = SpanContext::drawn(1.0).unwrap();
        for n in 0..=MOST_OPEN {
            open.insert(n.to_string(), context);
        }
        assert_eq!(open.contexts.len(), MOST_OPEN);
        assert!(open.get("0").is_none() && open.get("1").is_some());
        assert_eq!(open.order.len(), MOST_OPEN);
    }
}
