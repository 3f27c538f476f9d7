//! What clients are told when a request fails: OpenAI's error object over HTTP, a status over gRPC.

use std::time::Duration;

use axum::{
    Json,
    response::{IntoResponse, Response},
};
use http::{HeaderMap, HeaderValue, StatusCode, header};
use serde::Serialize;

use crate::{
    request::RequestError,
    security::{admission::NotAdmitted, audit::NotRecorded, keys::Denied, limits::Refused},
};

/// How long clients should wait before they try again when there are no shards.
const RETRY_AFTER: Duration = Duration::from_secs(1);
/// Names that clients send are shown up to this many characters.
const LONGEST_SHOWN: usize = 64;

/// Why a request was refused or failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    status: StatusCode,
    message: String,
    param: Option<String>,
    code: Option<&'static str>,
    /// When it is worth to try again, if it is.
    retry_after: Option<Duration>,
}

/// OpenAI's error object, as it is sent.
#[derive(Debug, Serialize)]
pub struct ErrorObject<'a> {
    error: ErrorBody<'a>,
}

#[derive(Debug, Serialize)]
struct ErrorBody<'a> {
    message: &'a str,
    r#type: &'static str,
    param: Option<&'a str>,
    code: Option<&'static str>,
}

impl ApiError {
    fn new(status: StatusCode, message: String) -> Self {
        let retry_after = (status == StatusCode::SERVICE_UNAVAILABLE).then_some(RETRY_AFTER);
        Self { status, message, param: None, code: None, retry_after }
    }

    fn about(param: &str, code: &'static str, message: String) -> Self {
        let param = Some(shorten(param));
        Self { status: StatusCode::BAD_REQUEST, message, param, code: Some(code), retry_after: None }
    }

    /// A field has a value that it can't have. `reason` continues a sentence that begins with the field's name.
    pub fn invalid(param: &str, reason: impl std::fmt::Display) -> Self {
        Self::about(param, "invalid_value", format!("'{}' {reason}", shorten(param)))
    }

    /// A field has the wrong JSON type.
    pub fn wrong_type(param: &str, want: &str, got: &str) -> Self {
        Self::about(param, "invalid_type", format!("'{}' must be {want}, got {got}", shorten(param)))
    }

    /// A field that must be there is not.
    pub fn missing(param: &str) -> Self {
        Self::about(param, "missing_required_parameter", format!("'{}' is required", shorten(param)))
    }

    /// A field that nobody knows.
    pub fn unknown_field(param: &str) -> Self {
        let name = shorten(param);
        Self::about(param, "unknown_parameter", format!("unknown field '{name}': remove it or correct its name"))
    }

    /// A field of OpenAI's or vLLM's API that has no implementation here, with a value that asks for one.
    pub fn unsupported(param: &str) -> Self {
        let message = format!("'{}' with this value is not supported yet: leave it out", shorten(param));
        Self::about(param, "unsupported_parameter", message)
    }

    /// The server's guard or moderation does not let it through.
    pub fn blocked(param: &str, reason: impl std::fmt::Display) -> Self {
        Self::about(param, "content_filter", format!("'{}' {reason}", shorten(param)))
    }

    /// Prompt and output don't fit the context.
    pub fn context_exceeded(param: &str, message: String) -> Self {
        Self::about(param, "context_length_exceeded", message)
    }

    /// The body is not a JSON object.
    pub fn not_json(reason: impl std::fmt::Display) -> Self {
        Self::new(StatusCode::BAD_REQUEST, format!("the body must be a JSON object: {reason}"))
    }

    /// A line of a batch is not a JSON object.
    pub fn bad_line(reason: &str) -> Self {
        Self {
            code: Some("invalid_json_line"),
            ..Self::new(StatusCode::BAD_REQUEST, reason.replace("the body", "the line"))
        }
    }

    /// Nothing of this name is there, or it is somebody else's.
    pub fn no_such(what: &str, id: &str) -> Self {
        let message = format!("no such {what}: '{}'", shorten(id));
        Self { status: StatusCode::NOT_FOUND, ..Self::about("id", "not_found", message) }
    }

    /// Something is not possible while something else is as it is.
    pub fn conflict(code: &'static str, message: String) -> Self {
        Self { code: Some(code), ..Self::new(StatusCode::CONFLICT, message) }
    }

    /// Something that could be had is switched off, or is full: what the server's owner could do about it.
    pub fn not_here(code: &'static str, message: impl Into<String>) -> Self {
        Self { code: Some(code), ..Self::new(StatusCode::BAD_REQUEST, message.into()) }
    }

    /// The `Content-Type` is not JSON.
    pub fn not_json_type() -> Self {
        let message = "the header Content-Type must be application/json".to_owned();
        Self::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, message)
    }

    /// The body is longer than the limit.
    pub fn body_too_large(limit: usize) -> Self {
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, format!("the body is longer than {limit} bytes"))
    }

    /// Something that is sent is longer than its limit.
    pub fn too_large(message: String) -> Self {
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, message)
    }

    /// The body is no form.
    pub fn not_a_form(reason: impl std::fmt::Display) -> Self {
        Self::new(
            StatusCode::BAD_REQUEST,
            format!("the body must be multipart/form-data with 'purpose' and 'file': {reason}"),
        )
    }

    /// The body did not come, or not in time.
    pub fn body_incomplete(reason: impl std::fmt::Display) -> Self {
        Self::new(StatusCode::REQUEST_TIMEOUT, format!("the body did not arrive whole: {reason}"))
    }

    /// No such model.
    pub fn unknown_model(asked: &str, served: &[String]) -> Self {
        let message = format!("the model '{}' does not exist; served is {}", shorten(asked), served.join(", "));
        let mut error = Self::about("model", "model_not_found", message);
        error.status = StatusCode::NOT_FOUND;
        error
    }

    /// No such path.
    pub fn unknown_path(path: &str) -> Self {
        Self::new(StatusCode::NOT_FOUND, format!("no such path: {}", shorten(path)))
    }

    /// The path exists, the method on it does not.
    pub fn wrong_method(method: &http::Method, path: &str) -> Self {
        let message = format!("{} is not possible on {}", shorten(method.as_str()), shorten(path));
        Self::new(StatusCode::METHOD_NOT_ALLOWED, message)
    }

    /// A key that another request has already.
    pub fn key_reused(key: &str) -> Self {
        let message = format!("the key '{}' belongs to another request: take a new one for each request", shorten(key));
        let error = Self::about("Idempotency-Key", "idempotency_key_reuse", message);
        Self { status: StatusCode::UNPROCESSABLE_ENTITY, ..error }
    }

    /// No answer is kept under a key.
    pub fn unknown_stream(key: &str) -> Self {
        let message = format!("no answer is kept under the key '{}': send its request again with it", shorten(key));
        let error = Self::about("key", "stream_not_found", message);
        Self { status: StatusCode::NOT_FOUND, ..error }
    }

    /// A newer connection reads the answer.
    pub fn superseded() -> Self {
        let message = "a newer request with the same key has taken the answer over".to_owned();
        let error = Self::about("Idempotency-Key", "superseded", message);
        Self { status: StatusCode::CONFLICT, ..error }
    }

    /// Nothing serves now.
    pub fn not_ready(reason: &str) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, format!("not ready: {reason}"))
    }

    /// A fault of ours, which goes to the log.
    pub fn internal(reason: impl std::fmt::Display) -> Self {
        tracing::error!(%reason, "request failed");
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, format!("internal error: {reason}"))
    }

    /// The path is for those who administrate.
    pub fn forbidden(path: &str) -> Self {
        let message = format!("{} needs a key whose role is admin", shorten(path));
        Self { code: Some("insufficient_permissions"), ..Self::new(StatusCode::FORBIDDEN, message) }
    }

    /// What it says.
    pub fn message(&self) -> &str {
        &self.message
    }

    /// When it is worth to try again, and what else stands in the head of an answer.
    pub fn set_headers(&self, headers: &mut HeaderMap) {
        if let Some(after) = self.retry_after {
            // Whole seconds, and never too early.
            let seconds = after.as_secs() + u64::from(after.subsec_nanos() > 0);
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds.max(1)));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
    }

    /// The field that is wrong, if it is one.
    pub fn param(&self) -> Option<&str> {
        self.param.as_deref()
    }

    /// What programs look at, if anything.
    pub fn code(&self) -> Option<&'static str> {
        self.code
    }

    /// HTTP status.
    pub fn status(&self) -> StatusCode {
        self.status
    }

    /// The object that clients parse, in a body or in an event of a stream.
    pub fn object(&self) -> ErrorObject<'_> {
        let r#type = match self.status {
            StatusCode::UNAUTHORIZED => "authentication_error",
            StatusCode::FORBIDDEN => "permission_error",
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
            StatusCode::SERVICE_UNAVAILABLE => "service_unavailable_error",
            StatusCode::GATEWAY_TIMEOUT => "timeout_error",
            status if status.is_server_error() => "server_error",
            _ => "invalid_request_error",
        };
        ErrorObject {
            error: ErrorBody { message: &self.message, r#type, param: self.param.as_deref(), code: self.code },
        }
    }
}

/// Clients' own words are not repeated at length.
fn shorten(name: &str) -> String {
    match name.char_indices().nth(LONGEST_SHOWN) {
        Some((end, _)) => format!("{}…", &name[..end]),
        None => name.to_owned(),
    }
}

impl From<Denied> for ApiError {
    fn from(denied: Denied) -> Self {
        Self { code: Some("invalid_api_key"), ..Self::new(StatusCode::UNAUTHORIZED, denied.to_string()) }
    }
}

impl From<NotRecorded> for ApiError {
    fn from(error: NotRecorded) -> Self {
        Self { code: Some("not_recorded"), ..Self::new(StatusCode::SERVICE_UNAVAILABLE, error.to_string()) }
    }
}

impl From<Refused> for ApiError {
    fn from(refused: Refused) -> Self {
        let code = Some("rate_limit_exceeded");
        match &refused {
            Refused::Later { retry_after, .. } => {
                let retry_after = Some(*retry_after);
                Self { code, retry_after, ..Self::new(StatusCode::TOO_MANY_REQUESTS, refused.to_string()) }
            }
            // To send it again would be in vain: no status that clients try again after.
            Refused::Never { .. } => Self { code, ..Self::new(StatusCode::BAD_REQUEST, refused.to_string()) },
        }
    }
}

impl From<NotAdmitted> for ApiError {
    fn from(error: NotAdmitted) -> Self {
        match error {
            NotAdmitted::Limit(refused) => refused.into(),
            NotAdmitted::Prompt { .. } => Self::about("prompt", "context_length_exceeded", error.to_string()),
            NotAdmitted::Output { .. } => Self::about("max_tokens", "invalid_value", error.to_string()),
        }
    }
}

impl From<RequestError> for ApiError {
    fn from(error: RequestError) -> Self {
        if let RequestError::Internal(reason) = &error {
            tracing::error!(reason, "request failed");
        }
        let (status, code) = match &error {
            RequestError::Overloaded { .. } => (StatusCode::TOO_MANY_REQUESTS, Some("overloaded")),
            RequestError::DeadlineExceeded => (StatusCode::GATEWAY_TIMEOUT, Some("deadline_exceeded")),
            RequestError::TooLarge { .. } => (StatusCode::BAD_REQUEST, Some("context_length_exceeded")),
            RequestError::Unavailable(_) => (StatusCode::SERVICE_UNAVAILABLE, Some("unavailable")),
            RequestError::Poison { .. } => (StatusCode::INTERNAL_SERVER_ERROR, Some("request_poison")),
            RequestError::Revoked => (StatusCode::UNAUTHORIZED, Some("invalid_api_key")),
            RequestError::Unread { .. } => (StatusCode::INTERNAL_SERVER_ERROR, Some("answer_unread")),
            RequestError::Grammar { .. } => (StatusCode::BAD_REQUEST, Some("grammar_too_complex")),
            RequestError::Unmoderated => (StatusCode::SERVICE_UNAVAILABLE, Some("moderation_unavailable")),
            RequestError::Internal(_) => (StatusCode::INTERNAL_SERVER_ERROR, None),
        };
        let param = match &error {
            RequestError::Grammar { field, .. } => Some(field.clone()),
            _ => None,
        };
        let retry_after = match &error {
            RequestError::Overloaded { retry_after, .. } => Some(*retry_after),
            RequestError::Unavailable(_) | RequestError::Unmoderated => Some(RETRY_AFTER),
            _ => None,
        };
        Self { status, message: error.to_string(), param, code, retry_after }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.object())).into_response();
        self.set_headers(response.headers_mut());
        // Families other than OpenAI's put it into their own form on its way out.
        response.extensions_mut().insert(self);
        response
    }
}

impl From<ApiError> for tonic::Status {
    fn from(error: ApiError) -> Self {
        let code = match error.status {
            StatusCode::UNAUTHORIZED => tonic::Code::Unauthenticated,
            StatusCode::FORBIDDEN => tonic::Code::PermissionDenied,
            StatusCode::NOT_FOUND => tonic::Code::NotFound,
            StatusCode::CONFLICT => tonic::Code::Aborted,
            StatusCode::TOO_MANY_REQUESTS => tonic::Code::ResourceExhausted,
            StatusCode::SERVICE_UNAVAILABLE => tonic::Code::Unavailable,
            StatusCode::GATEWAY_TIMEOUT => tonic::Code::DeadlineExceeded,
            status if status.is_server_error() => tonic::Code::Internal,
            _ => tonic::Code::InvalidArgument,
        };
        Self::new(code, error.message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::Queued;

    #[test]
    fn request_errors_have_a_status_each() {
        let retry_after = Duration::from_secs(17);
        let overloaded = RequestError::Overloaded { waiting: 9, limit: 9, of: Queued::Requests, retry_after };
        let cases = [
            (overloaded, 429, tonic::Code::ResourceExhausted),
            (RequestError::DeadlineExceeded, 504, tonic::Code::DeadlineExceeded),
            (RequestError::TooLarge { need: 9, have: 3 }, 400, tonic::Code::InvalidArgument),
            (RequestError::Unavailable("forming".to_owned()), 503, tonic::Code::Unavailable),
            (RequestError::Poison { losses: 3 }, 500, tonic::Code::Internal),
            (RequestError::Internal("bug".to_owned()), 500, tonic::Code::Internal),
        ];
        for (error, status, code) in cases {
            let api = ApiError::from(error);
            assert_eq!(api.status().as_u16(), status);
            let response = api.clone().into_response();
            let retry = response.headers().get(header::RETRY_AFTER).map(|v| v.to_str().expect("digits"));
            assert_eq!(retry, [(429, "17"), (503, "1")].into_iter().find(|(s, _)| *s == status).map(|(_, v)| v));
            assert_eq!(tonic::Status::from(api).code(), code);
        }
    }

    #[test]
    fn long_names_are_cut_between_characters() {
        let error = ApiError::unknown_field(&"é".repeat(5000));
        assert!(error.message.chars().count() < 200);
        assert!(error.param.is_some_and(|p| p.starts_with('é') && p.ends_with('…')));
    }
}
