//! One listening socket, two sets of services behind it: a leader's and a standby's.

use std::{
    convert::Infallible,
    sync::{Arc, PoisonError, RwLock},
    task::{Context, Poll},
};

use axum::{Router, body::Body, routing::future::RouteFuture};
use http::Request;
use tower::Service;

/// Passes each request to the services that are set when it comes. Clones are the same switch.
#[derive(Clone)]
pub struct Switch(Arc<RwLock<Router>>);

impl Switch {
    /// With these services at first.
    pub fn new(services: Router) -> Self {
        Self(Arc::new(RwLock::new(services)))
    }

    /// Requests that come from now on go to these; those that run stay where they are.
    pub fn set(&self, services: Router) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = services;
    }

    /// Requests that come now go to these.
    pub fn get(&self) -> Router {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Service<Request<Body>> for Switch {
    type Response = axum::response::Response;
    type Error = Infallible;
    type Future = RouteFuture<Infallible>;

    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        self.get().call(request)
    }
}

#[cfg(test)]
mod tests {
    use axum::{body::to_bytes, routing::get};
    use tower::ServiceExt;

    use super::*;

    #[tokio::test]
    async fn requests_go_where_the_switch_points() {
        let says = |text: &'static str| Router::new().route("/", get(move || async move { text }));
        let switch = Switch::new(says("standby"));
        let ask = async || {
            let answer = switch.clone().oneshot(Request::get("/").body(Body::empty()).unwrap()).await.unwrap();
            to_bytes(answer.into_body(), 100).await.unwrap()
        };
        assert_eq!(ask().await, "standby");
        switch.set(says("leader"));
        assert_eq!(ask().await, "leader");
    }
}
