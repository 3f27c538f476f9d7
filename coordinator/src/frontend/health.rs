//! Whether the process lives, has started and serves, and which version it is.

use axum::{
    Json,
    extract::State,
    response::{IntoResponse, Response},
};
use http::{HeaderValue, StatusCode, header};
use serde_json::{Value, json};

use super::{FrontendState, error::ApiError};
use crate::scheduler::handle::Readiness;

/// Seconds after which it is worth to ask again.
const RETRY_AFTER: HeaderValue = HeaderValue::from_static("1");

/// `GET /health`, `GET /livez`, `GET|POST /ping`: the process lives.
pub async fn health() -> Json<Value> {
    Json(json!({"status": "ok"}))
}

/// `GET /ready`: 200 if a group serves now, else 503 with the reason as the API's error.
pub async fn ready(State(state): State<FrontendState>) -> Result<Json<Value>, ApiError> {
    match state.submit.readiness() {
        Readiness::Serving => Ok(Json(json!({"status": "ready"}))),
        Readiness::NotReady(reason) => Err(ApiError::not_ready(&reason)),
    }
}

/// `GET /readyz`: 200 if a request would be answered: one of one token was. Else 503 with the reason. A standby is ready when
/// it can pass requests on.
pub async fn readyz(State(state): State<FrontendState>) -> Response {
    match state.prober.check(&state).await {
        Ok(()) => Json(json!({"status": "ready"})).into_response(),
        Err(reason) => not_yet(json!({"status": "not ready", "reason": reason})),
    }
}

/// `GET /startupz`: 200 once this process could answer requests for the first time, and from then on. Until then 503 with
/// what it waits for and how far its ranks have loaded.
pub async fn startupz(State(state): State<FrontendState>) -> Response {
    let readiness = state.submit.readiness();
    let reason = match readiness {
        Readiness::NotReady(reason) if !state.loading.has_served() => reason,
        _ => return Json(json!({"status": "started"})).into_response(),
    };
    let ranks: Vec<Value> = state.loading.ranks().into_iter().map(|rank| json!({
        "group": rank.group, "rank": rank.rank, "loaded_bytes": rank.loaded_bytes, "total_bytes": rank.total_bytes,
    })).collect();
    not_yet(json!({"status": "starting", "reason": reason, "ranks": ranks}))
}

/// 503, with the reason as JSON.
pub fn not_yet(body: Value) -> Response {
    (StatusCode::SERVICE_UNAVAILABLE, [(header::RETRY_AFTER, RETRY_AFTER)], Json(body)).into_response()
}

/// `GET /version`.
pub async fn version() -> Json<Value> {
    Json(json!({"version": env!("CARGO_PKG_VERSION")}))
}
