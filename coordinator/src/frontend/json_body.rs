//! A request's body that says it is JSON.

use axum::{
    body::Bytes,
    extract::{FromRequest, Request},
};
use http::{StatusCode, header};

use super::{FrontendState, error::ApiError, fields::Fields};

/// Extracts a body of the type JSON, whole but not parsed: parsing a long one takes a core for a while and many times its
/// memory, so it is done where other long work is, on a thread for it.
#[derive(Clone)]
pub struct JsonBody(Bytes);

impl JsonBody {
    /// The object in it.
    pub fn parse(&self) -> Result<Fields, ApiError> {
        Fields::of_body(&self.0)
    }

    /// As it came.
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }
}

impl FromRequest<FrontendState> for JsonBody {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &FrontendState) -> Result<Self, ApiError> {
        // Insisting on the type also keeps foreign web pages out: a browser asks before it sends JSON elsewhere.
        let media_type = request.headers().get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
        if !media_type.is_some_and(is_json) {
            return Err(ApiError::not_json_type());
        }
        let body = tokio::time::timeout(state.limits.body_timeout, Bytes::from_request(request, state)).await;
        let body = body.map_err(ApiError::body_incomplete)?.map_err(|rejection| match rejection.status() {
            StatusCode::PAYLOAD_TOO_LARGE => ApiError::body_too_large(state.limits.max_body_bytes),
            _ => ApiError::body_incomplete(rejection),
        })?;
        Ok(Self(body))
    }
}

fn is_json(media_type: &str) -> bool {
    let essence = media_type.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    essence == "application/json" || (essence.starts_with("application/") && essence.ends_with("+json"))
}
