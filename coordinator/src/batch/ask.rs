//! Where lines are answered: by the endpoints of this process, or by another server.

use std::{sync::Arc, time::Duration};

use axum::{
    Router,
    body::{Body, to_bytes},
};
use futures::{FutureExt, future::BoxFuture};
use http::{HeaderMap, HeaderValue, Request, StatusCode, header};
use phalanx_cluster::{error_text::with_causes, web};
use serde_json::Value;
use tower::ServiceExt;

use crate::{
    frontend::{door::OnBehalf, error::ApiError, observe::REQUEST_ID},
    security::keys::{Denied, Principal},
};

/// Pause before a line is asked for again, if the server does not say.
const PAUSE: Duration = Duration::from_secs(1);
/// Longest wait for an answer of another server: generations are long.
const ANSWER_LIMIT: Duration = Duration::from_secs(6 * 3600);
/// Longest wait for a connection to it.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);

/// An HTTP answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Answer {
    /// Its status.
    pub status: StatusCode,
    /// By what the server knows the request.
    pub request_id: String,
    /// When it is worth to ask again, where it is.
    pub retry_after: Option<Duration>,
    /// A JSON value, or a text if it is none.
    pub body: Value,
}

impl Answer {
    fn new(status: StatusCode, headers: &HeaderMap, body: &[u8]) -> Self {
        let text = |name| headers.get(name).and_then(|value: &HeaderValue| value.to_str().ok());
        let seconds = text(header::RETRY_AFTER).and_then(|after| after.trim().parse().ok());
        let is_later =
            matches!(status, StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE | StatusCode::BAD_GATEWAY);
        Self {
            status,
            request_id: text(REQUEST_ID).unwrap_or_default().to_owned(),
            retry_after: is_later.then(|| seconds.map_or(PAUSE, Duration::from_secs)),
            body: serde_json::from_slice(body).unwrap_or_else(|_| String::from_utf8_lossy(body).into_owned().into()),
        }
    }
}

/// Answers requests.
pub trait Ask: Send + Sync {
    /// Sends a body to a path. An error is that of a connection: it may go better next time.
    fn ask(&self, path: &'static str, body: Vec<u8>) -> BoxFuture<'static, Result<Answer, String>>;
}

/// For whom this process asks itself.
pub type Whose = Arc<dyn Fn() -> Result<Option<Arc<Principal>>, Denied> + Send + Sync>;

/// The endpoints of this process.
#[derive(Clone)]
pub struct Here {
    /// All of them.
    pub router: Router,
    /// Looked up for each line: a key may be revoked meanwhile.
    pub whose: Whose,
    /// Whether clients that wait come first.
    pub is_background: bool,
}

impl Ask for Here {
    fn ask(&self, path: &'static str, body: Vec<u8>) -> BoxFuture<'static, Result<Answer, String>> {
        let Self { router, whose, is_background } = self.clone();
        async move {
            let principal = match whose() {
                Ok(principal) => principal,
                Err(denied) => {
                    let error = ApiError::from(denied);
                    let body = serde_json::to_vec(&error.object()).unwrap_or_default();
                    return Ok(Answer::new(error.status(), &HeaderMap::new(), &body));
                }
            };
            let request = Request::post(path).header(header::CONTENT_TYPE, "application/json");
            let mut request = request.body(Body::from(body)).map_err(|error| error.to_string())?;
            request.extensions_mut().insert(OnBehalf { principal, is_background });
            let (parts, body) = match router.oneshot(request).await {
                Ok(response) => response.into_parts(),
                Err(never) => match never {},
            };
            let body = to_bytes(body, usize::MAX).await.map_err(|error| error.to_string())?;
            Ok(Answer::new(parts.status, &parts.headers, &body))
        }
        .boxed()
    }
}

/// Another server.
pub struct There {
    agent: ureq::Agent,
    /// Without a slash at its end.
    url: String,
    authorization: Option<String>,
}

impl There {
    /// At `http(s)://HOST:PORT`, perhaps with a path; with or without `/v1`, which lines bring along.
    pub fn new(url: &str, key: Option<&str>) -> Self {
        let url = url.trim_end_matches('/');
        let url = url.strip_suffix("/v1").unwrap_or(url).to_owned();
        let config = web::agent().http_status_as_error(false);
        let config = config.timeout_connect(Some(CONNECT_LIMIT)).timeout_global(Some(ANSWER_LIMIT));
        let authorization = key.map(|key| format!("Bearer {key}"));
        Self { agent: config.build().new_agent(), url, authorization }
    }
}

impl Ask for There {
    fn ask(&self, path: &'static str, body: Vec<u8>) -> BoxFuture<'static, Result<Answer, String>> {
        let mut request = self.agent.post(format!("{}{path}", self.url)).content_type("application/json");
        if let Some(authorization) = &self.authorization {
            request = request.header("authorization", authorization);
        }
        let asked = tokio::task::spawn_blocking(move || {
            let mut response = request.send(&body[..]).map_err(|error| with_causes(&error))?;
            let body = response.body_mut().with_config().limit(u64::MAX).read_to_vec();
            let body = body.map_err(|error| with_causes(&error))?;
            Ok(Answer::new(response.status(), response.headers(), &body))
        });
        async move { asked.await.unwrap_or_else(|error| Err(error.to_string())) }.boxed()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_busy_says_when_it_is_worth_to_ask_again() {
        let headers = HeaderMap::from_iter([
            (header::RETRY_AFTER, HeaderValue::from_static("7")),
            (REQUEST_ID, HeaderValue::from_static("r")),
        ]);
        let answer = Answer::new(StatusCode::TOO_MANY_REQUESTS, &headers, b"busy");
        assert_eq!((answer.retry_after, answer.request_id.as_str()), (Some(Duration::from_secs(7)), "r"));
        assert_eq!(answer.body, Value::from("busy"));
        let answer = Answer::new(StatusCode::SERVICE_UNAVAILABLE, &HeaderMap::new(), b"{}");
        assert_eq!(answer.retry_after, Some(PAUSE));
        assert_eq!(Answer::new(StatusCode::OK, &headers, b"{}").retry_after, None);
    }

    #[test]
    fn urls_may_end_as_clients_have_them() {
        for url in ["http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/"] {
            assert_eq!(There::new(url, None).url, "http://h:1");
        }
    }
}
