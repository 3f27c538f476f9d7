//! `/admin/*` and `/debug/*` over HTTP.
//!
//! Not everybody has API keys, so by default only this machine is served, keys or not: the peer's address must be a loopback one, the
//! `Host` an address or `localhost` (a name could be anybody's, pointed here), and the request none that a web page
//! makes (those carry `Origin`) or that a proxy passes on and says so.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use axum::{
    Json, Router,
    extract::{ConnectInfo, DefaultBodyLimit, Request, State, rejection::JsonRejection},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use clap::ValueEnum;
use http::{HeaderMap, StatusCode, header};
use phalanx_cluster::id::ShardId;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{AdminError, Control, RollingRestart, RolloutPhase, debug, json::StatusJson};

/// Longest body, in bytes: the name of a shard.
const LONGEST_BODY: usize = 4096;
/// Headers by which proxies, another coordinator among them, say that a request comes from elsewhere.
const FORWARDED: &[&str] = &["forwarded", "x-forwarded-for", "x-real-ip", "via", "x-phalanx-forwarded"];

/// Whose requests `/admin/*` takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AdminHttp {
    /// This machine's.
    #[default]
    Local,
    /// Nobody's.
    Off,
    /// Everybody's who reaches the port: for networks that are trusted.
    All,
}

/// The endpoints.
pub fn router(control: Arc<dyn Control>, access: AdminHttp) -> Router {
    Router::new()
        .route("/admin/status", get(status))
        .route("/admin/drain", post(drain))
        .route("/admin/undrain", post(undrain))
        .route("/admin/rollout", post(rollout))
        .route("/debug/cluster", get(debug::cluster))
        .with_state(control)
        .layer(DefaultBodyLimit::max(LONGEST_BODY))
        .layer(middleware::from_fn_with_state(access, guard))
}

async fn guard(State(access): State<AdminHttp>, request: Request, next: Next) -> Response {
    let peer = request.extensions().get::<ConnectInfo<SocketAddr>>().map(|info| info.0.ip());
    match refusal(access, peer, request.headers()) {
        None => next.run(request).await,
        Some(reason) => {
            tracing::warn!(?peer, path = request.uri().path(), reason, "refused");
            error(StatusCode::FORBIDDEN, reason, None)
        }
    }
}

/// Why a request is not let in.
fn refusal(access: AdminHttp, peer: Option<IpAddr>, headers: &HeaderMap) -> Option<&'static str> {
    if headers.contains_key(header::ORIGIN) {
        return Some("web pages may not administrate");
    }
    match access {
        AdminHttp::All => None,
        AdminHttp::Off => Some("switched off by --admin-http"),
        AdminHttp::Local => {
            let is_loopback = peer.is_some_and(|ip| ip.to_canonical().is_loopback());
            if !is_loopback || FORWARDED.iter().any(|name| headers.contains_key(*name)) {
                Some(
                    "only requests of this machine are taken (--admin-http local); use the `cluster` program elsewhere",
                )
            } else if !headers.get(header::HOST).and_then(|h| h.to_str().ok()).is_some_and(is_own_address) {
                Some("the Host header must be localhost or an IP address")
            } else {
                None
            }
        }
    }
}

fn is_own_address(host: &str) -> bool {
    let Ok(authority) = host.parse::<http::uri::Authority>() else { return false };
    let name = authority.host().trim_start_matches('[').trim_end_matches(']');
    name.eq_ignore_ascii_case("localhost") || name.parse::<IpAddr>().is_ok()
}

fn error(status: StatusCode, message: &str, leader: Option<&str>) -> Response {
    let mut object = json!({"message": message});
    if let Some(leader) = leader {
        object["leader"] = leader.into();
    }
    (status, Json(json!({"error": object}))).into_response()
}

impl IntoResponse for AdminError {
    fn into_response(self) -> Response {
        let status = match &self {
            Self::UnknownShard { .. } => StatusCode::NOT_FOUND,
            Self::Refused(_) => StatusCode::CONFLICT,
            Self::NotLeader(Some(_)) => StatusCode::MISDIRECTED_REQUEST,
            Self::NotLeader(None) | Self::GivenUp(_) | Self::Unavailable(_) => StatusCode::SERVICE_UNAVAILABLE,
        };
        let leader = if let Self::NotLeader(Some(leader)) = &self { Some(leader.http.as_str()) } else { None };
        error(status, &self.to_string(), leader)
    }
}

/// What `drain` and `undrain` are told.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Named {
    shard: String,
}

/// Why a request is not fulfilled.
enum Refusal {
    /// The body is not what it should be.
    Body(StatusCode, String),
    /// The leader, or its group, says no.
    Control(AdminError),
}

impl From<AdminError> for Refusal {
    fn from(error: AdminError) -> Self {
        Self::Control(error)
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        match self {
            Self::Body(status, message) => error(status, &message, None),
            Self::Control(error) => error.into_response(),
        }
    }
}

fn named(body: Result<Json<Named>, JsonRejection>) -> Result<ShardId, Refusal> {
    body.map(|Json(named)| ShardId(named.shard)).map_err(|wrong| {
        let message = format!("{}; want {{\"shard\": NAME}} with content-type: application/json", wrong.body_text());
        Refusal::Body(wrong.status(), message)
    })
}

type Answer = Result<Json<Value>, Refusal>;

async fn status(State(control): State<Arc<dyn Control>>) -> Answer {
    let status = control.status().await?;
    Ok(Json(serde_json::to_value(StatusJson::from(&status)).expect("plain structures become JSON")))
}

async fn drain(State(control): State<Arc<dyn Control>>, body: Result<Json<Named>, JsonRejection>) -> Answer {
    let shard = named(body)?;
    tracing::info!(%shard, "an operator asks over HTTP: drain");
    let drained = control.drain(shard.clone()).await?;
    let successor = Some(drained.successor).filter(|s| !s.is_empty());
    Ok(Json(json!({
        "shard": shard.0, "successor": successor, "epoch": drained.epoch, "stall_ms": drained.stall_ms,
    })))
}

async fn undrain(State(control): State<Arc<dyn Control>>, body: Result<Json<Named>, JsonRejection>) -> Answer {
    let shard = named(body)?;
    tracing::info!(%shard, "an operator asks over HTTP: undrain");
    control.undrain(shard.clone()).await?;
    Ok(Json(json!({"shard": shard.0})))
}

/// Answers when all shards are restarted.
async fn rollout(State(control): State<Arc<dyn Control>>) -> Answer {
    tracing::info!("an operator asks over HTTP: rollout restart");
    let mut events = control.rollout_restart(RollingRestart::default()).await?;
    let (mut restarted, mut stall_ms) = (Vec::new(), 0);
    while let Some(event) = events.recv().await {
        let event = event?;
        stall_ms = stall_ms.max(event.stall_ms);
        match RolloutPhase::from_name(&event.phase) {
            Some(RolloutPhase::Returned) => restarted.push(event.shard_id),
            Some(RolloutPhase::Done) => return Ok(Json(json!({"restarted": restarted, "stall_ms": stall_ms}))),
            _ => {}
        }
    }
    let message = format!("the rollout ended before its end; restarted are: {}", restarted.join(", "));
    Err(AdminError::GivenUp(message).into())
}

#[cfg(test)]
mod tests {
    use axum::body::Body;
    use tower::ServiceExt;

    use super::*;
    use crate::admin::testing::FakeControl;

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        pairs.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap())).collect()
    }

    #[test]
    fn only_this_machine_is_let_in_by_default() {
        let refused = |peer: Option<&str>, pairs: &[(&'static str, &str)]| {
            refusal(AdminHttp::default(), peer.map(|p| p.parse().unwrap()), &headers(pairs)).is_some()
        };
        let (loopback, host) = (Some("127.0.0.1"), ("host", "127.0.0.1:8000"));
        assert!(!refused(loopback, &[host]));
        assert!(!refused(Some("::1"), &[("host", "[::1]:8000")]));
        assert!(!refused(Some("::ffff:127.0.0.1"), &[("host", "localhost:8000")]));
        assert!(refused(Some("10.0.0.7"), &[host]));
        assert!(refused(None, &[host]));
        assert!(refused(loopback, &[]));
        assert!(refused(loopback, &[("host", "rebound.example:8000")]));
        assert!(refused(loopback, &[host, ("origin", "http://evil.example")]));
        assert!(refused(loopback, &[host, ("x-forwarded-for", "10.0.0.7")]));
        assert!(refused(loopback, &[host, ("forwarded", "for=10.0.0.7")]));
        assert!(refused(loopback, &[host, ("x-phalanx-forwarded", "1")]));
    }

    #[test]
    fn access_can_be_closed_and_opened_but_never_to_web_pages() {
        let host = [("host", "a.example")];
        let peer = Some("10.0.0.7".parse().unwrap());
        assert!(
            refusal(AdminHttp::Off, Some("127.0.0.1".parse().unwrap()), &headers(&[("host", "localhost")])).is_some()
        );
        assert!(refusal(AdminHttp::All, peer, &headers(&host)).is_none());
        assert!(refusal(AdminHttp::All, peer, &headers(&[host[0], ("origin", "http://a.example")])).is_some());
    }

    async fn call(method: &str, path: &str, body: &str) -> (u16, Value) {
        let mut request = Request::builder().method(method).uri(path).header("host", "127.0.0.1:8000");
        if !body.is_empty() {
            request = request.header("content-type", "application/json");
        }
        let mut request = request.body(Body::from(body.to_owned())).unwrap();
        request.extensions_mut().insert(ConnectInfo(SocketAddr::from(([127, 0, 0, 1], 7))));
        let response = router(Arc::new(FakeControl), AdminHttp::Local).oneshot(request).await.unwrap();
        let status = response.status().as_u16();
        let bytes = axum::body::to_bytes(response.into_body(), 1 << 16).await.unwrap();
        (status, serde_json::from_slice(&bytes).unwrap())
    }

    #[tokio::test]
    async fn wishes_are_answered_in_json() {
        let (status, answer) = call("POST", "/admin/drain", r#"{"shard": "local-1"}"#).await;
        assert_eq!(status, 200);
        assert_eq!(answer, json!({"shard": "local-1", "successor": "local-2", "epoch": 8, "stall_ms": 120}));
        assert_eq!(call("POST", "/admin/undrain", r#"{"shard": "local-1"}"#).await.0, 200);
        let (status, answer) = call("POST", "/admin/rollout", "").await;
        assert_eq!((status, answer), (200, json!({"restarted": ["local-0", "local-1", "local-2"], "stall_ms": 130})));
        let (status, answer) = call("GET", "/admin/status", "").await;
        assert_eq!((status, &answer["epoch"]), (200, &json!(7)));
        let (status, answer) = call("GET", "/debug/cluster", "").await;
        assert_eq!(
            (status, &answer["streams"]["kept"], &answer["shards"][2]["role"]),
            (200, &json!(4), &json!("spare"))
        );
    }

    #[tokio::test]
    async fn what_can_not_be_done_is_said() {
        let (status, answer) = call("POST", "/admin/drain", r#"{"shard": "x"}"#).await;
        assert_eq!(status, 404);
        let message = answer["error"]["message"].as_str().unwrap();
        assert!(message.contains("\"x\"") && message.contains("local-0, local-1, local-2"), "{message}");
        let (status, answer) = call("POST", "/admin/drain", r#"{"shards": "x"}"#).await;
        assert_eq!(status, 422);
        assert!(answer["error"]["message"].as_str().unwrap().contains("{\"shard\": NAME}"), "{answer}");
    }
}
