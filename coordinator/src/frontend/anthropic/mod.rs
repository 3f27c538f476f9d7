//! Anthropic's API: `POST /v1/messages` and `POST /v1/messages/count_tokens`.

mod answer;
mod ask;
mod turns;

use std::sync::Arc;

use axum::{Json, extract::State, response::Response, routing::post};
use http::{HeaderName, StatusCode};
use serde_json::{Value, json};

use self::{
    answer::{Answer, MessageReply},
    ask::{MessageAsk, Prompting},
};
use super::{
    FrontendState,
    asked::{Asked, Call},
    error::ApiError,
    family::Family,
    fields::Fields,
    json_body::JsonBody,
    sse::{Framing, Payload},
    streams::Prepared,
};

/// Where messages are made.
pub const PATH: &str = "/v1/messages";
const COUNT_PATH: &str = "/v1/messages/count_tokens";

/// The API.
pub static FAMILY: Family = Family {
    owns: |path| path == PATH || path == COUNT_PATH,
    routes: |router| router.route(PATH, post(create)).route(COUNT_PATH, post(count_tokens)),
    generations: &[PATH],
    framing: Framing::Events,
    error: |error| (error.status(), error_object(error)),
    failure: |error| Payload::named("error", &error_object(error)),
    request_id: Some(HeaderName::from_static("request-id")),
};

/// Anthropic's error object.
fn error_object(error: &ApiError) -> Value {
    let kind = match error.status() {
        StatusCode::UNAUTHORIZED => "authentication_error",
        StatusCode::FORBIDDEN => "permission_error",
        StatusCode::NOT_FOUND => "not_found_error",
        StatusCode::PAYLOAD_TOO_LARGE => "request_too_large",
        StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
        StatusCode::SERVICE_UNAVAILABLE => "overloaded_error",
        StatusCode::GATEWAY_TIMEOUT => "timeout_error",
        status if status.is_server_error() => "api_error",
        _ => "invalid_request_error",
    };
    json!({"type": "error", "error": {"type": kind, "message": error.message()}})
}

/// `POST /v1/messages`.
async fn create(asked: Asked) -> Result<Response, ApiError> {
    let prepare = |state: &FrontendState, fields: Fields, call: Call| {
        let ask = MessageAsk::parse(fields, state, &call.name)?;
        let id = format!("msg_{}", call.name);
        let request = ask.params.request(id.clone(), "messages", ask.prompt, &state.model, call.deadline)?;
        let answer = Answer { id, model: state.model.name(), n_prompt: request.prompt.len(), reading: ask.reading };
        let reply = MessageReply { answer: Arc::new(answer), delivery: ask.delivery };
        Ok(Prepared { requests: vec![request], has_seed: false, reply: Some(Arc::new(reply)) })
    };
    asked.answer(PATH, prepare).await
}

/// `POST /v1/messages/count_tokens`.
async fn count_tokens(State(state): State<FrontendState>, body: JsonBody) -> Result<Json<Value>, ApiError> {
    let work = move |state: &FrontendState| {
        let mut fields = body.parse()?;
        let mut prompting = Prompting::take(&mut fields, state)?;
        fields.finish()?;
        Ok(json!({"input_tokens": prompting.tokens(state)?.len()}))
    };
    state.blocking(work).await.map(Json)
}
