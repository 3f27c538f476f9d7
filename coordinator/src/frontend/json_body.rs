//! The JSON object in a request's body.

use axum::{
    body::Bytes,
    extract::{FromRequest, Request},
};
use http::{StatusCode, header};

use super::{FrontendState, error::ApiError, fields::Fields};

/// Bodies up to this many bytes are parsed where they arrive: handing them over would take longer.
const PARSED_AT_ONCE: usize = 64 << 10;

/// Extracts a body that must be a JSON object.
pub struct JsonBody(pub Fields);

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
        if body.len() <= PARSED_AT_ONCE {
            return Fields::of_body(&body).map(Self);
        }
        state.blocking(move |_| Fields::of_body(&body)).await.map(Self)
    }
}

fn is_json(media_type: &str) -> bool {
    let essence = media_type.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    essence == "application/json" || (essence.starts_with("application/") && essence.ends_with("+json"))
}
