//! The APIs that clients speak. Each is a form of the same request and the same answer: its endpoints, how it tells errors,
//! and how it writes streams stand in one [`Family`], and all of them in [`FAMILIES`].

use axum::{
    Json, Router,
    extract::Request,
    middleware::Next,
    response::{IntoResponse, Response},
    routing::{get, post},
};
use http::{HeaderName, StatusCode};
use serde_json::Value;

use super::{
    FrontendState, anthropic, batches, chat, completions,
    error::ApiError,
    files, models, ollama, responses,
    sse::{self, Framing, Payload},
    tgi, tokenize,
};

/// An API.
pub struct Family {
    /// Whether a path is one of its own; asked in the order of [`FAMILIES`].
    pub owns: fn(&str) -> bool,
    /// Adds its endpoints.
    pub routes: fn(Router<FrontendState>) -> Router<FrontendState>,
    /// Paths of generations: another coordinator can go on with their answers.
    pub generations: &'static [&'static str],
    /// How its streams are written.
    pub framing: Framing,
    /// Status and body of an error.
    pub error: fn(&ApiError) -> (StatusCode, Value),
    /// What ends a stream that fails.
    pub failure: fn(&ApiError) -> Payload,
    /// Another header in which its clients look for a request's name, beside `x-request-id`.
    pub request_id: Option<HeaderName>,
}

/// All of them. The last one owns every path that no other does.
pub static FAMILIES: &[&Family] = &[&anthropic::FAMILY, &ollama::FAMILY, &tgi::FAMILY, &responses::FAMILY, &OPENAI];

/// OpenAI's completions and chats, with what vLLM has beside them.
pub static OPENAI: Family = Family {
    owns: |_| true,
    routes: |router| {
        router
            .route(chat::PATH, post(chat::create))
            .route(completions::PATH, post(completions::create))
            .route("/v1/models", get(models::list))
            .route("/v1/models/{*id}", get(models::retrieve))
            .route(files::PATH, get(files::list).merge(files::upload()))
            .route("/v1/files/{id}", get(files::retrieve).delete(files::delete))
            .route("/v1/files/{id}/content", get(files::content))
            .route("/v1/batches", get(batches::list).post(batches::create))
            .route("/v1/batches/{id}", get(batches::retrieve))
            .route("/v1/batches/{id}/cancel", post(batches::cancel))
            .route("/tokenize", post(tokenize::tokenize))
            .route("/detokenize", post(tokenize::detokenize))
            .route("/apply-template", post(tokenize::apply_template))
    },
    generations: &[chat::PATH, completions::PATH],
    framing: Framing::Events,
    error: openai_error,
    failure: |error| sse::json(&error.object()).into(),
    request_id: None,
};

/// OpenAI's error object.
pub fn openai_error(error: &ApiError) -> (StatusCode, Value) {
    let object = serde_json::to_value(error.object()).unwrap_or_default();
    (error.status(), object)
}

/// Whose path it is.
pub fn of(path: &str) -> &'static Family {
    FAMILIES.iter().find(|family| (family.owns)(path)).copied().unwrap_or(&OPENAI)
}

/// Whether a path is one of a generation.
pub fn is_generation(path: &str) -> bool {
    of(path).generations.contains(&path)
}

/// Puts the error of an answer into the form of its family.
pub fn shape(family: &Family, response: Response) -> Response {
    let (mut parts, body) = response.into_parts();
    let Some(error) = parts.extensions.remove::<ApiError>() else {
        return Response::from_parts(parts, body);
    };
    let (status, object) = (family.error)(&error);
    let mut shaped = (status, Json(object)).into_response();
    for (name, value) in &parts.headers {
        // Its type and length are the new body's.
        if !shaped.headers().contains_key(name) && name != http::header::CONTENT_LENGTH {
            shaped.headers_mut().append(name, value.clone());
        }
    }
    shaped
}

/// The answer to a request for `path` that is refused before its endpoint has seen it.
pub fn refuse(path: &str, error: &ApiError) -> Response {
    shape(of(path), error.clone().into_response())
}

/// Middleware around all endpoints.
pub async fn shape_errors(request: Request, next: Next) -> Response {
    let family = of(request.uri().path());
    shape(family, next.run(request).await)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::security::keys::Denied;

    #[test]
    fn every_path_of_a_generation_is_its_familys() {
        let mut paths: Vec<_> = FAMILIES.iter().flat_map(|family| family.generations).collect();
        let n_paths = paths.len();
        paths.sort();
        paths.dedup();
        assert_eq!(paths.len(), n_paths, "no path is two families'");
        for family in FAMILIES {
            assert!(family.generations.iter().all(|path| std::ptr::eq(of(path), *family)), "{:?}", family.generations);
        }
        assert!(std::ptr::eq(of("/no/such/path"), &OPENAI));
    }

    #[tokio::test]
    async fn refusals_at_the_door_have_the_family_s_form() {
        let error = ApiError::from(Denied::Missing);
        for (path, pointer, want) in [
            ("/v1/chat/completions", "/error/code", "invalid_api_key"),
            ("/v1/messages", "/error/type", "authentication_error"),
            ("/v1/messages_of_mine", "/error/code", "invalid_api_key"),
            ("/api/chat", "/error", error.message()),
            ("/generate", "/error_type", "authentication"),
        ] {
            let response = refuse(path, &error);
            assert_eq!(response.status(), StatusCode::UNAUTHORIZED);
            assert_eq!(response.headers()["www-authenticate"], "Bearer", "{path}");
            let body = axum::body::to_bytes(response.into_body(), 4096).await.unwrap();
            let body: Value = serde_json::from_slice(&body).unwrap();
            assert_eq!(body.pointer(pointer).and_then(Value::as_str), Some(want), "{path}: {body}");
        }
    }

    #[tokio::test]
    async fn each_family_has_its_own_errors() {
        let error = ApiError::not_ready("nobody leads");
        for (path, pointer, want) in [
            ("/v1/chat/completions", "/error/type", "service_unavailable_error"),
            ("/v1/responses", "/error/type", "service_unavailable_error"),
            ("/v1/messages", "/error/type", "overloaded_error"),
            ("/v1/messages/count_tokens", "/type", "error"),
            ("/api/chat", "/error", "not ready: nobody leads"),
            ("/generate", "/error_type", "unhealthy"),
        ] {
            let response = refuse(path, &error);
            assert_eq!(response.status(), 503);
            assert_eq!(response.headers()["retry-after"], "1", "{path}");
            let body = axum::body::to_bytes(response.into_body(), 4096).await.unwrap();
            let body: Value = serde_json::from_slice(&body).unwrap();
            assert_eq!(body.pointer(pointer).and_then(Value::as_str), Some(want), "{path}: {body}");
        }
    }
}
