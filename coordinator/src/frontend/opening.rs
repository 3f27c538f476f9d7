//! Answers probes while the model is being opened, which may be a download of minutes: the process lives and is not ready.

use std::{os::fd::AsFd, sync::Arc, time::Duration};

use anyhow::Context;
use axum::{
    Router,
    response::{IntoResponse, Response},
    routing::get,
};
use http::{HeaderValue, header};
use serde_json::json;
use tokio::{net::TcpListener, task::JoinHandle};

use super::{
    connections::{self, progress::Patience},
    health,
};
use crate::security::tls::ServingTls;

/// Answers on a listener's socket until it is dropped.
pub struct Opening(JoinHandle<std::io::Result<()>>);

impl Opening {
    /// Begins to answer, as the server that comes after it will: with `tls`, if there is some, and with as much patience
    /// for clients that read slowly.
    ///
    /// # Errors
    /// If the socket can't be shared.
    pub fn start(listener: &TcpListener, write: Duration, tls: Option<Arc<ServingTls>>) -> anyhow::Result<Self> {
        let socket = listener.as_fd().try_clone_to_owned().context("the HTTP socket can't be shared")?;
        let listener = TcpListener::from_std(socket.into()).context("the HTTP socket can't be shared")?;
        // Dropping the task lets connections end after their answer.
        let served = connections::serve(listener, router(), Patience::new(write), tls, std::future::pending());
        Ok(Self(tokio::spawn(served)))
    }
}

impl Drop for Opening {
    fn drop(&mut self) {
        self.0.abort();
    }
}

fn router() -> Router {
    Router::new()
        .route("/health", get(health::health))
        .route("/livez", get(health::health))
        .route("/ping", get(health::health).post(health::health))
        .route("/version", get(health::version))
        .route("/startupz", get(|| async { opening("starting") }))
        .fallback(|| async { opening("not ready") })
        .layer(axum::middleware::map_response(close))
}

fn opening(status: &'static str) -> Response {
    let reason = "the model is being opened or fetched";
    let error = json!({"message": format!("not ready: {reason}"), "type": "service_unavailable_error", "param": null, "code": null});
    health::not_yet(json!({"status": status, "reason": reason, "error": error})).into_response()
}

/// A connection that stayed open would go on being answered from here.
async fn close(mut response: Response) -> Response {
    response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    response
}

#[cfg(test)]
mod tests {
    use axum::body::Body;
    use http::Request;
    use tower::ServiceExt;

    use super::*;

    #[tokio::test]
    async fn the_process_lives_and_is_not_ready() {
        for (path, status) in
            [("/livez", 200), ("/health", 200), ("/readyz", 503), ("/startupz", 503), ("/v1/models", 503)]
        {
            let answer = router().oneshot(Request::get(path).body(Body::empty()).unwrap()).await.unwrap();
            assert_eq!((path, answer.status().as_u16()), (path, status));
            assert_eq!(answer.headers()[header::CONNECTION], "close");
        }
    }
}
