//! Whether the process lives, whether it serves, and which version it is.

use axum::{Json, extract::State};
use serde_json::{Value, json};

use super::{FrontendState, error::ApiError};
use crate::scheduler::handle::Readiness;

/// `GET /health`, `GET|POST /ping`: the process lives.
pub async fn health() -> Json<Value> {
    Json(json!({"status": "ok"}))
}

/// `GET /ready`: 200 if requests are being served now, else 503 with the reason.
pub async fn ready(State(state): State<FrontendState>) -> Result<Json<Value>, ApiError> {
    match state.submit.readiness() {
        Readiness::Serving => Ok(Json(json!({"status": "ready"}))),
        Readiness::NotReady(reason) => Err(ApiError::not_ready(&reason)),
    }
}

/// `GET /version`.
pub async fn version() -> Json<Value> {
    Json(json!({"version": env!("CARGO_PKG_VERSION")}))
}
