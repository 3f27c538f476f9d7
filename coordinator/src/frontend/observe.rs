//! One record per request: its span, its time, how it ended. Prompts and outputs are in none of them.

use std::{
    sync::{Arc, OnceLock},
    time::Instant,
};

use axum::{
    extract::{MatchedPath, Request},
    middleware::Next,
    response::Response,
};
use http::{HeaderName, HeaderValue, Method, StatusCode};
use tracing::{Instrument, Span, field::Empty};

use super::{
    family::{self, FAMILIES},
    grpc,
};
use crate::{
    guard::Tally,
    metrics as names,
    security::{audit::Account, keys::Principal},
    trace::{self, Answered, SpanContext},
};

/// Clients name their requests with this header; the answer repeats the name.
pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// Header by which a client says of which trace its request is a part.
pub const TRACEPARENT: &str = "traceparent";
/// Milliseconds until the answer began, as OpenAI tells them.
const PROCESSING_MS: HeaderName = HeaderName::from_static("openai-processing-ms");
/// A longer name is replaced.
const LONGEST_REQUEST_ID: usize = 128;
/// Status of a request whose client went away, as nginx counts it.
const CLIENT_GONE: &str = "499";

/// Measures a request from its arrival until the last holder lets go: for a stream, until its last byte or the client's
/// departure.
pub struct Record {
    endpoint: String,
    abandoned: &'static str,
    arrived_at: Instant,
    outcome: OnceLock<String>,
    is_stream: OnceLock<()>,
    span: Span,
    principal: OnceLock<Arc<Principal>>,
    account: OnceLock<Account>,
    trace: Option<Traced>,
    name: String,
    tally: Arc<Tally>,
}

/// A request that is traced.
struct Traced {
    context: SpanContext,
    /// The client's span.
    parent: Option<[u8; 8]>,
    request_id: String,
}

impl Record {
    /// A request has arrived. `abandoned` is its status if nobody sets another.
    pub fn begin(endpoint: String, abandoned: &'static str, span: Span) -> Self {
        let arrived_at = Instant::now();
        let (outcome, is_stream, principal, account) = Default::default();
        let (name, tally) = Default::default();
        Self { endpoint, abandoned, arrived_at, outcome, is_stream, span, principal, account, trace: None, name, tally }
    }

    /// Its name in logs.
    #[must_use]
    pub fn named(mut self, name: &str) -> Self {
        self.name = name.to_owned();
        self
    }

    /// Its name in logs.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What is found in its texts.
    pub fn tally(&self) -> &Arc<Tally> {
        &self.tally
    }

    /// Has it traced, if it is to be: as its client decided, or by chance.
    #[must_use]
    pub fn traced(mut self, request_id: &str, traceparent: Option<&str>) -> Self {
        let begun = trace::active().and_then(|tracer| tracer.begin(traceparent));
        if let Some((context, _)) = begun {
            self.span.record("trace_id", context.trace_id());
        }
        let request_id = request_id.to_owned();
        self.trace = begun.map(|(context, parent)| Traced { context, parent, request_id });
        self
    }

    /// The scheduler is about to get it under these names.
    pub fn submits<'a>(&self, names: impl IntoIterator<Item = &'a str>) {
        if let (Some(tracer), Some(traced)) = (trace::active(), &self.trace) {
            names.into_iter().for_each(|name| tracer.began(name, traced.context));
        }
    }

    /// When it arrived.
    pub fn arrived_at(&self) -> Instant {
        self.arrived_at
    }

    /// Its span.
    pub fn span(&self) -> &Span {
        &self.span
    }

    /// How it ended; the first word counts.
    pub fn end(&self, status: impl Into<String>) {
        let _ = self.outcome.set(status.into());
    }

    /// Somebody with a key has sent it; the first word counts.
    pub fn identify(&self, principal: Arc<Principal>) {
        let _ = self.principal.set(principal);
    }

    /// The endpoint that it is for, as metrics name it.
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// It will have a line in the audit log; the first word counts.
    pub fn audit(&self, account: Account) {
        let _ = self.account.set(account);
    }

    /// What is noted of it for the audit log, if there is one.
    pub fn account(&self) -> Option<&Account> {
        self.account.get()
    }

    /// Who has sent it, where keys are needed.
    pub fn principal(&self) -> Option<&Arc<Principal>> {
        self.principal.get()
    }

    /// The answer is a stream: its end is told by [`Record::end`], not by the answer's status.
    pub fn begin_stream(&self) {
        let _ = self.is_stream.set(());
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        let status = self.outcome.take().unwrap_or_else(|| self.abandoned.to_owned());
        if let Some(account) = self.account.take() {
            let key = self.principal.get().map(|principal| principal.name.clone());
            account.close(key, &status, self.arrived_at.elapsed(), &self.tally);
        }
        let elapsed = self.arrived_at.elapsed().as_secs_f64();
        self.span.in_scope(|| tracing::debug!(status, seconds = elapsed, "request ended"));
        let endpoint = std::mem::take(&mut self.endpoint);
        if let (Some(tracer), Some(traced)) = (trace::active(), self.trace.take()) {
            let Traced { context, parent, request_id } = traced;
            let (endpoint, status, arrived) = (endpoint.clone(), status.clone(), self.arrived_at);
            let ended = Instant::now();
            tracer.answered(Answered { context, parent, endpoint, status, request_id, arrived, ended });
        }
        metrics::histogram!(names::LATENCY, "endpoint" => endpoint.clone()).record(elapsed);
        metrics::counter!(names::REQUESTS, "endpoint" => endpoint, "status" => status).increment(1);
    }
}

/// Makes the series of generations, with nothing counted: a rate is right from the first request on, and a query finds
/// something before it.
pub fn begin_to_count() {
    let http = |path: &'static str| (path, ["200", "400", "429", "499", "500", "503", "504"].as_slice());
    let grpc =
        ["ok", "cancelled", "deadline_exceeded", "invalid_argument", "internal", "resource_exhausted", "unavailable"];
    let generations = || FAMILIES.iter().flat_map(|family| family.generations).copied();
    let endpoints = generations().map(http).chain([(grpc::ENDPOINT, grpc.as_slice())]);
    for (endpoint, statuses) in endpoints {
        drop(metrics::histogram!(names::LATENCY, "endpoint" => endpoint));
        for status in statuses {
            drop(metrics::counter!(names::REQUESTS, "endpoint" => endpoint, "status" => *status));
        }
    }
    for handler in generations() {
        for status in ["2xx", "4xx", "5xx"] {
            drop(metrics::counter!(names::HTTP_REQUESTS, "handler" => handler, "method" => "POST", "status" => status));
        }
    }
}

fn count_answer(endpoint: &str, method: &Method, status: StatusCode) {
    let class = match status.as_u16() / 100 {
        1 => "1xx",
        2 => "2xx",
        3 => "3xx",
        4 => "4xx",
        _ => "5xx",
    };
    // Clients may invent methods.
    let method = match *method {
        Method::GET => "GET",
        Method::POST => "POST",
        Method::DELETE => "DELETE",
        Method::PUT => "PUT",
        Method::HEAD => "HEAD",
        Method::OPTIONS => "OPTIONS",
        _ => "other",
    };
    let handler = endpoint.to_owned();
    metrics::counter!(names::HTTP_REQUESTS, "handler" => handler, "method" => method, "status" => class).increment(1);
}

/// Middleware around every endpoint. Unknown paths count as one endpoint, so that clients can't invent labels.
pub async fn observe(mut request: Request, next: Next) -> Response {
    let endpoint = request.extensions().get::<MatchedPath>().map_or("unknown", MatchedPath::as_str).to_owned();
    let given = request.headers().get(REQUEST_ID).filter(|id| is_harmless(id)).cloned();
    let made = || HeaderValue::try_from(uuid::Uuid::new_v4().simple().to_string());
    let Ok(request_id) = given.map_or_else(made, Ok) else {
        return next.run(request).await;
    };
    let name = request_id.to_str().unwrap_or_default();
    let span = if request.method() == Method::GET {
        tracing::debug_span!("request", endpoint, request_id = name, trace_id = Empty)
    } else {
        tracing::info_span!("request", endpoint, request_id = name, trace_id = Empty)
    };
    request.headers_mut().insert(REQUEST_ID, request_id.clone());
    let method = request.method().clone();
    let mut record = Record::begin(endpoint.clone(), CLIENT_GONE, span.clone()).named(name);
    // What is only read is not worth a trace.
    if method == Method::POST {
        record = record.traced(name, request.headers().get(TRACEPARENT).and_then(|value| value.to_str().ok()));
    }
    let record = Arc::new(record);
    request.extensions_mut().insert(Arc::clone(&record));
    let arrived_at = record.arrived_at();
    let also_named = family::of(request.uri().path()).request_id.as_ref();
    let mut response = next.run(request).instrument(span).await;
    count_answer(&endpoint, &method, response.status());
    if record.is_stream.get().is_none() {
        record.end(response.status().as_str());
    }
    if let Some(name) = also_named {
        response.headers_mut().insert(name, request_id.clone());
    }
    response.headers_mut().insert(REQUEST_ID, request_id);
    let elapsed = u64::try_from(arrived_at.elapsed().as_millis()).unwrap_or(u64::MAX);
    response.headers_mut().insert(PROCESSING_MS, HeaderValue::from(elapsed));
    response
}

/// Names end up in logs: only characters that can't forge a line.
fn is_harmless(id: &HeaderValue) -> bool {
    let bytes = id.as_bytes();
    !bytes.is_empty() && bytes.len() <= LONGEST_REQUEST_ID && bytes.iter().all(u8::is_ascii_graphic)
}
