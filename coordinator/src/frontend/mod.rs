//! HTTP and gRPC: what clients send becomes a [`Request`](crate::request::Request), its events become their answers.
//!
//! Each API is a file or folder and a line in [`family::FAMILIES`]. [`fields`] reads JSON, [`params`] is the one way from raw
//! parameters to checked ones, [`prompt`] turns texts, token ids and chats into tokens, [`generation`] submits and
//! collects, [`asked`] takes a request to its answer, [`reply`] says how that looks, [`sse`] streams. [`streams`] keeps what
//! can be asked for again.

pub mod anthropic;
pub mod asked;
pub mod batches;
pub mod chat;
pub mod completions;
pub mod connections;
pub mod door;
pub mod error;
pub mod family;
pub mod fields;
pub mod files;
pub mod forward;
pub mod generation;
pub mod grpc;
pub mod guarded;
pub mod health;
mod inputs;
pub mod json_body;
pub mod listing;
pub mod logprobs;
pub mod messages;
pub mod models;
pub mod neutral;
pub mod observe;
pub mod ollama;
pub mod openapi;
pub mod opening;
pub mod params;
pub mod prober;
pub mod prometheus;
pub mod prompt;
pub mod reply;
pub mod response_cache;
pub mod responses;
pub mod sse;
pub mod streams;
pub mod structured;
pub mod template_fields;
pub mod tgi;
pub mod tokenize;
pub mod tools;

use std::{sync::Arc, time::Duration};

use axum::{
    Router,
    extract::DefaultBodyLimit,
    http::{Method, Uri},
    middleware,
    routing::get,
};
use metrics_exporter_prometheus::PrometheusHandle;
use tokio::sync::Semaphore;

use crate::{
    batches::service::Batches, config::Config, grammars::Grammars, group::loading::Loading, guard::Tally,
    leadership::journal_feed::ReplicatedJournal, scheduler::handle::Submit, security::Security,
    served_model::ServedModel,
};
use error::ApiError;
use family::FAMILIES;
use prober::Prober;
use response_cache::ResponseCache;
use streams::{Streams, registry::Retention};
use tools::Parsers;

/// Bounds of what clients may send, how long they may take, and what is kept for them.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Longest body of an HTTP request and longest gRPC message, in bytes.
    pub max_body_bytes: usize,
    /// How long a body may take to arrive.
    pub body_timeout: Duration,
    /// Most choices of all prompts of one HTTP request together.
    pub max_choices: usize,
    /// Most prompts of one HTTP request: each takes a place in the queue of an idle server.
    pub max_prompts: usize,
    /// Deadline of every request, from its arrival; `None` is none. A gRPC call's own, if earlier, counts.
    pub deadline: Option<Duration>,
    /// Silence in an event stream before a comment is sent.
    pub keep_alive: Duration,
    /// How long a client may take nothing of what is there for it before it is cut off.
    pub write_timeout: Duration,
    /// How much is kept of answers that can be asked for again, and for how long.
    pub retention: Retention,
}

impl Limits {
    /// As configured.
    pub fn of(config: &Config) -> Self {
        Self {
            max_prompts: config.max_num_queued_reqs as usize,
            write_timeout: config.client_write_timeout,
            retention: Retention::of(config),
            ..Self::default()
        }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_body_bytes: 32 << 20,
            body_timeout: Duration::from_secs(60),
            max_choices: 2048,
            max_prompts: crate::scheduler::actor::DEFAULT_MAX_QUEUED_REQUESTS,
            deadline: None,
            keep_alive: Duration::from_secs(5),
            write_timeout: Duration::from_secs(60),
            retention: Retention::default(),
        }
    }
}

/// What all endpoints share. A clone is a few reference counts.
#[derive(Clone)]
pub struct FrontendState {
    submit: Arc<dyn Submit>,
    model: Arc<ServedModel>,
    limits: Arc<Limits>,
    metrics: PrometheusHandle,
    streams: Arc<Streams>,
    security: Arc<Security>,
    loading: Arc<Loading>,
    prober: Arc<Prober>,
    /// Parsing, rendering and tokenizing take a core: no more of it at once than there are cores.
    encoders: Arc<Semaphore>,
    /// Bytes of the longest token: a text of more than this times the context can't fit, and is not even tokenized.
    longest_token: usize,
    grammars: Arc<Grammars>,
    batches: Option<Batches>,
    response_cache: Option<Arc<ResponseCache>>,
    /// What is found in texts of the request that it is for.
    tally: Arc<Tally>,
    parsers: Arc<Parsers>,
}

impl FrontendState {
    /// Looks at every token of the vocabulary once.
    pub fn new(submit: Arc<dyn Submit>, model: ServedModel, limits: Limits, metrics: PrometheusHandle) -> Self {
        let n_cores = std::thread::available_parallelism().map_or(1, usize::from);
        let n_tokens = u32::try_from(model.tokenizer.vocab_size()).unwrap_or(u32::MAX);
        let longest_token = (0..n_tokens).map(|id| model.tokenizer.token_bytes(id).len()).max().unwrap_or(1).max(1);
        let grammars = Arc::new(Grammars::here(Arc::clone(&model.tokenizer)));
        Self {
            submit,
            model: Arc::new(model),
            streams: Arc::new(Streams::new(limits.retention, Arc::default())),
            limits: Arc::new(limits),
            metrics,
            security: Arc::default(),
            loading: Arc::default(),
            prober: Arc::default(),
            encoders: Arc::new(Semaphore::new(n_cores)),
            longest_token,
            grammars,
            batches: None,
            response_cache: None,
            tally: Arc::default(),
            parsers: Arc::default(),
        }
    }

    /// Reads calls and thoughts in these formats.
    #[must_use]
    pub fn with_parsers(self, parsers: Parsers) -> Self {
        Self { parsers: Arc::new(parsers), ..self }
    }

    /// Has grammars tried there.
    #[must_use]
    pub fn with_grammars(self, grammars: Arc<Grammars>) -> Self {
        Self { grammars, ..self }
    }

    /// Has files and batches.
    #[must_use]
    pub fn with_batches(self, batches: Option<Batches>) -> Self {
        Self { batches, ..self }
    }

    /// Gives answers again that are certain.
    #[must_use]
    pub fn with_response_cache(self, cache: Option<ResponseCache>) -> Self {
        Self { response_cache: cache.map(Arc::new), ..self }
    }

    /// Looks keys that it does not know up in what a former leader told.
    #[must_use]
    pub fn with_journal(self, journal: Arc<ReplicatedJournal>) -> Self {
        Self { streams: Arc::new(Streams::new(self.limits.retention, journal)), ..self }
    }

    /// Lets those in who have a key, as far as it goes.
    #[must_use]
    pub fn with_security(self, security: Arc<Security>) -> Self {
        Self { security, ..self }
    }

    /// Shows how this process starts.
    #[must_use]
    pub fn with_loading(self, loading: Arc<Loading>) -> Self {
        Self { loading, ..self }
    }

    /// Finds out in its own way whether requests would be answered.
    #[must_use]
    pub fn with_prober(self, prober: Prober) -> Self {
        Self { prober: Arc::new(prober), ..self }
    }

    /// Requests that can be resumed.
    pub fn streams(&self) -> Arc<Streams> {
        Arc::clone(&self.streams)
    }

    /// An error unless the name is one of the served model's; no name is the served one.
    fn check_model(&self, asked: Option<&str>) -> Result<(), ApiError> {
        match asked {
            Some(name) if !self.model.names.iter().any(|n| n == name) => {
                Err(ApiError::unknown_model(name, &self.model.names))
            }
            _ => Ok(()),
        }
    }

    /// Runs work that takes a core for a while on a thread where it holds up nobody.
    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Self) -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, ApiError> {
        let permit = Arc::clone(&self.encoders).acquire_owned().await.map_err(ApiError::internal)?;
        let state = self.clone();
        let task = tokio::task::spawn_blocking(move || {
            let _permit = permit;
            work(&state)
        });
        // The only way to fail is a panic; its message went to the log.
        task.await.map_err(|_| ApiError::internal("preparing the request failed; see the server's log"))?
    }
}

/// All HTTP endpoints.
pub fn http_router(state: FrontendState) -> Router {
    let endpoints = FAMILIES.iter().fold(Router::new(), |router, family| (family.routes)(router));
    endpoints
        .route("/v1/streams/{key}", get(streams::endpoint::read))
        .route("/health", get(health::health))
        .route("/ping", get(health::health).post(health::health))
        .route("/livez", get(health::health))
        .route("/ready", get(health::ready))
        .route("/readyz", get(health::readyz))
        .route("/startupz", get(health::startupz))
        .route("/version", get(health::version))
        .route("/metrics", get(prometheus::render))
        .route(openapi::DOCUMENT_PATH, get(openapi::document))
        .route(openapi::PAGE_PATH, get(openapi::page))
        .fallback(|uri: Uri| async move { ApiError::unknown_path(uri.path()) })
        .method_not_allowed_fallback(
            |method: Method, uri: Uri| async move { ApiError::wrong_method(&method, uri.path()) },
        )
        .layer(DefaultBodyLimit::max(state.limits.max_body_bytes))
        .layer(middleware::from_fn_with_state(Arc::clone(&state.security), door::count))
        .layer(middleware::from_fn(family::shape_errors))
        .layer(middleware::from_fn(observe::observe))
        .with_state(state)
}

#[cfg(test)]
mod tests;
