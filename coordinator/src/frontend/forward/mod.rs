//! The one door for HTTP: what this coordinator answers itself, and what its leader does.
//!
//! Where coordinators share a store, a generation is asked for under a key, by whichever of them the client has reached.
//! When the answer breaks off - its server is dead, or leads no more - the same request goes to the next leader with the id
//! of the last event that the client has. The client notices a pause.

pub mod dial;
mod events;
mod finder;
pub mod grpc;
mod relay;
mod transfer;
mod upstream;

#[cfg(test)]
mod tests;

use std::{
    convert::Infallible,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use axum::{
    Router,
    body::{Body, Bytes, to_bytes},
    response::Response,
};
use futures::{FutureExt, future::BoxFuture};
use http::{HeaderName, HeaderValue, Method, Request, header};
use tokio::{sync::watch, time::timeout};
use tower::{Service, ServiceExt};

#[cfg(any(test, fuzzing))]
pub(crate) use self::events::{Cutter, Kind};
pub use self::{
    finder::{Finder, Local},
    upstream::{FORWARDED, NO_LEADER},
};
use self::{
    relay::{no_leader, relay, while_leading},
    upstream::{Ask, Upstreams},
};
use super::{Limits, error::ApiError, family, files};
use crate::leadership::LeadershipView;

/// Header by which a client names a request that it may ask again.
const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");
/// Header by which a coordinator that passes a request on names it.
const RESUME_KEY: HeaderName = HeaderName::from_static("x-phalanx-resume-key");
/// Paths that say something about this very process.
const OWN_PATHS: &[&str] = &["/health", "/livez", "/ping", "/ready", "/readyz", "/startupz", "/metrics", "/version"];

/// Counts requests that are under way.
#[derive(Clone)]
struct Busy {
    _one: Arc<One>,
}

struct One(watch::Sender<usize>);

impl Busy {
    fn new(count: &watch::Sender<usize>) -> Self {
        count.send_modify(|n| *n += 1);
        Self { _one: Arc::new(One(count.clone())) }
    }
}

impl Drop for One {
    fn drop(&mut self) {
        self.0.send_modify(|n| *n -= 1);
    }
}

/// Takes all HTTP requests. Clones are the same.
#[derive(Clone)]
pub struct Gateway {
    upstreams: Upstreams,
    local: watch::Sender<Option<Local<Router>>>,
    standby: Router,
    /// Whether other coordinators may lead.
    is_shared: bool,
    max_body_bytes: usize,
    body_timeout: Duration,
    n_busy: watch::Sender<usize>,
}

impl Gateway {
    /// As a standby's, whose own endpoints are `standby`. `is_shared` says that others may lead.
    pub fn new(
        view: LeadershipView,
        standby: Router,
        is_shared: bool,
        limits: &Limits,
        connector: dial::Connector,
    ) -> Self {
        let (local, receiver) = watch::channel(None);
        Self {
            upstreams: Upstreams::new(Finder::new(view, receiver), connector),
            local,
            standby,
            is_shared,
            max_body_bytes: limits.max_body_bytes,
            body_timeout: limits.body_timeout,
            n_busy: watch::Sender::new(0),
        }
    }

    /// This process's endpoints while it leads.
    pub fn set(&self, local: Option<Local<Router>>) {
        self.local.send_replace(local);
    }

    /// Waits until no request that may change its server is under way.
    pub async fn idle(&self) {
        // The sender is right here: this can't fail.
        let _ = self.n_busy.subscribe().wait_for(|n| *n == 0).await;
    }

    async fn answer(self, request: Request<Body>) -> Response {
        let path = request.uri().path();
        if OWN_PATHS.contains(&path) {
            let router = self.upstreams.finder.here().map_or(self.standby, |local| local.endpoints);
            return call(router, request).await;
        }
        if request.headers().contains_key(FORWARDED) {
            return self.answer_forwarded(request).await;
        }
        let is_generation = request.method() == Method::POST && family::is_generation(path);
        if let Some(local) = self.upstreams.finder.here().filter(|_| !self.is_shared || !is_generation) {
            return call(local.endpoints, request).await;
        }
        let busy = Busy::new(&self.n_busy);
        let (parts, body) = request.into_parts();
        // Of any length, and so not to be kept here.
        match files::transfer(&parts.method, parts.uri.path()) {
            Some(files::Transfer::Upload) => {
                return transfer::send(self.upstreams, Ask::new(&parts, Bytes::new()), body, busy).await;
            }
            Some(files::Transfer::Content) => {
                return transfer::fetch(self.upstreams, Ask::new(&parts, Bytes::new()), busy).await;
            }
            None => {}
        }
        let body = match self.read(body, parts.headers.get(header::CONTENT_LENGTH)).await {
            Ok(body) => body,
            Err(error) => return family::refuse(parts.uri.path(), &error),
        };
        let form = family::of(parts.uri.path());
        let mut ask = Ask::new(&parts, body);
        // Also where nobody resumes an answer: what is made must not be made twice.
        let is_named = is_generation || parts.method == Method::POST;
        if is_named && self.is_shared && !ask.headers.contains_key(&IDEMPOTENCY_KEY) {
            let key = uuid::Uuid::new_v4().to_string();
            if let Ok(key) = HeaderValue::try_from(key) {
                ask.headers.insert(RESUME_KEY, key);
            }
        }
        relay(self.upstreams, ask, form, busy).await
    }

    /// Somebody else's client: that one looks for the next leader if this one ceases to be it.
    async fn answer_forwarded(self, request: Request<Body>) -> Response {
        let Some(local) = self.upstreams.finder.here() else {
            let mut refusal = no_leader();
            refusal.headers_mut().insert(NO_LEADER, HeaderValue::from_static("1"));
            return refusal;
        };
        let end = self.upstreams.finder.end_of(local.session);
        while_leading(local.endpoints.oneshot(request), end).await
    }

    async fn read(&self, body: Body, announced: Option<&HeaderValue>) -> Result<Bytes, ApiError> {
        let announced = announced.and_then(|v| v.to_str().ok()).and_then(|v| v.parse::<usize>().ok());
        if announced.is_some_and(|n| n > self.max_body_bytes) {
            return Err(ApiError::body_too_large(self.max_body_bytes));
        }
        let body = timeout(self.body_timeout, to_bytes(body, self.max_body_bytes)).await;
        body.map_err(ApiError::body_incomplete)?.map_err(|error| {
            let is_too_large =
                std::error::Error::source(&error).is_some_and(|e| e.to_string().contains("length limit"));
            if is_too_large { ApiError::body_too_large(self.max_body_bytes) } else { ApiError::body_incomplete(error) }
        })
    }
}

async fn call(router: Router, request: Request<Body>) -> Response {
    match router.oneshot(request).await {
        Ok(response) => response,
        Err(never) => match never {},
    }
}

impl Service<Request<Body>> for Gateway {
    type Response = Response;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Response, Infallible>>;

    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let form = family::of(request.uri().path());
        self.clone().answer(request).map(|response| Ok(family::shape(form, response))).boxed()
    }
}
