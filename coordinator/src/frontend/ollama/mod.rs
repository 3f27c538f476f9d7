//! Ollama's API: `/api/chat` and `/api/generate` over the served model, and what its clients ask of a server.

mod answer;
mod ask;
mod model;
mod options;

use std::sync::Arc;

use axum::{
    Json,
    response::{IntoResponse, Response},
    routing::{get, post},
};
use serde_json::{Value, json};

use self::{
    answer::{Answer, Form, OllamaReply},
    ask::{Ask, Input},
};
use super::{
    FrontendState,
    asked::{Asked, Call},
    error::ApiError,
    family::Family,
    fields::Fields,
    sse::{Framing, json as text_of},
    streams::Prepared,
};

/// Where chats go on.
const CHAT: &str = "/api/chat";
/// Where texts go on.
const GENERATE: &str = "/api/generate";

/// The API.
pub static FAMILY: Family = Family {
    owns: |path| path.starts_with("/api/"),
    routes: |router| {
        router
            .route(CHAT, post(chat))
            .route(GENERATE, post(generate))
            .route("/api/tags", get(model::tags))
            .route("/api/show", post(model::show))
            .route("/api/ps", get(model::ps))
            .route("/api/version", get(version))
            .route("/", get(root))
    },
    generations: &[CHAT, GENERATE],
    framing: Framing::Lines,
    error: |error| (error.status(), error_object(error)),
    failure: |error| text_of(&error_object(error)).into(),
    request_id: None,
};

fn error_object(error: &ApiError) -> Value {
    json!({"error": error.message()})
}

/// `POST /api/chat`.
async fn chat(asked: Asked) -> Result<Response, ApiError> {
    respond(asked, Form::Chat).await
}

/// `POST /api/generate`.
async fn generate(asked: Asked) -> Result<Response, ApiError> {
    respond(asked, Form::Generate).await
}

async fn respond(asked: Asked, form: Form) -> Result<Response, ApiError> {
    let arrived_at = asked.record.arrived_at();
    // Asking for nothing is how clients have a model loaded.
    let body = asked.body.clone();
    let is_empty = asked.state.blocking(move |_| Ok(ask::asks_for_nothing(body.parse()?, form))).await?;
    if is_empty {
        let Asked { state, body, .. } = asked;
        let name = state.blocking(move |state| Ask::check_empty(body.parse()?, state, form)).await?;
        return Ok(Json(answer::loaded(&name, form)).into_response());
    }
    let prepare = move |state: &FrontendState, fields: Fields, call: Call| {
        let ask = Ask::parse(fields, state, form, &call.name)?;
        let field = form.prompt_field();
        let request =
            ask.params.request(format!("ollama-{}", call.name), field, ask.prompt, &state.model, call.deadline)?;
        let context = match (&ask.input, form) {
            (Input::Rendered { .. }, Form::Generate) if !state.hides_tokens() => Some(request.prompt.clone()),
            _ => None,
        };
        let answer = Answer {
            model: Arc::clone(&state.model),
            name: ask.name,
            reading: ask.reading,
            form,
            context,
            wants_scores: ask.params.wants_scores(),
            arrived_at,
        };
        let has_seed = ask.params.has_seed();
        let reply = OllamaReply { answer: Arc::new(answer), delivery: ask.delivery };
        Ok(Prepared { requests: vec![request], has_seed, reply: Some(Arc::new(reply)) })
    };
    asked.answer(form.path(), prepare).await
}

/// `GET /api/version`.
async fn version() -> Json<Value> {
    Json(json!({"version": env!("CARGO_PKG_VERSION")}))
}

/// `GET /`: clients look whether somebody is there.
async fn root() -> &'static str {
    "Phalanx is running"
}
