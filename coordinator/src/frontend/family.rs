//! Refusals in the form that a path's API gives errors: what a door says must be understood by the client that knocked.

use axum::{
    Json,
    response::{IntoResponse, Response},
};
use http::StatusCode;
use serde_json::{Value, json};

use super::error::ApiError;

/// Makes an error's object.
type Shape = fn(&ApiError) -> Value;

/// APIs whose errors differ from OpenAI's, by how their paths begin: a whole path, or one before a `/`.
static FAMILIES: &[(&str, Shape)] = &[
    ("/v1/messages", anthropic),
    ("/api", ollama),
    ("/generate", text_generation),
    ("/generate_stream", text_generation),
    ("/info", text_generation),
];

/// The answer to a request for `path` that is refused before its endpoint has seen it.
pub fn refuse(path: &str, error: &ApiError) -> Response {
    let is_in = |family: &str| path.strip_prefix(family).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
    match FAMILIES.iter().find(|(family, _)| is_in(family)) {
        None => error.clone().into_response(),
        Some((_, shape)) => {
            let mut response = (error.status(), Json(shape(error))).into_response();
            error.set_headers(response.headers_mut());
            response
        }
    }
}

fn anthropic(error: &ApiError) -> Value {
    let kind = match error.status() {
        StatusCode::UNAUTHORIZED => "authentication_error",
        StatusCode::FORBIDDEN => "permission_error",
        StatusCode::NOT_FOUND => "not_found_error",
        StatusCode::PAYLOAD_TOO_LARGE => "request_too_large",
        StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
        StatusCode::SERVICE_UNAVAILABLE => "overloaded_error",
        status if status.is_server_error() => "api_error",
        _ => "invalid_request_error",
    };
    json!({"type": "error", "error": {"type": kind, "message": error.message()}})
}

fn ollama(error: &ApiError) -> Value {
    json!({"error": error.message()})
}

fn text_generation(error: &ApiError) -> Value {
    let kind = match error.status() {
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => "authentication",
        StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE => "overloaded",
        status if status.is_server_error() => "generation",
        _ => "validation",
    };
    json!({"error": error.message(), "error_type": kind})
}

#[cfg(test)]
mod tests {
    use axum::body::to_bytes;

    use super::*;
    use crate::security::keys::Denied;

    #[tokio::test]
    async fn each_family_has_its_own_errors() {
        let error = ApiError::from(Denied::Missing);
        for (path, pointer, want) in [
            ("/v1/chat/completions", "/error/code", "invalid_api_key"),
            ("/v1/messages", "/error/type", "authentication_error"),
            ("/v1/messages/count_tokens", "/type", "error"),
            ("/v1/messages_of_mine", "/error/code", "invalid_api_key"),
            ("/api/chat", "/error", error.message()),
            ("/generate", "/error_type", "authentication"),
            ("/", "/error/type", "authentication_error"),
        ] {
            let response = refuse(path, &error);
            assert_eq!(
                (response.status(), &response.headers()["www-authenticate"]),
                (StatusCode::UNAUTHORIZED, &"Bearer".parse().unwrap())
            );
            let body = to_bytes(response.into_body(), 4096).await.unwrap();
            let body: Value = serde_json::from_slice(&body).unwrap();
            assert_eq!(body.pointer(pointer).and_then(Value::as_str), Some(want), "{path}: {body}");
        }
    }
}
