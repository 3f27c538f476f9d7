//! The API of Hugging Face's text-generation-inference: `POST /generate`, `POST /generate_stream`, `POST /`, `GET /info`.

mod answer;
mod ask;

use std::sync::Arc;

use axum::{
    Json,
    extract::State,
    response::Response,
    routing::{get, post},
};
use http::StatusCode;
use serde_json::{Value, json};

use self::{
    answer::{Answer, Form, TgiReply},
    ask::Ask,
};
use super::{
    FrontendState,
    asked::{Asked, Call},
    error::ApiError,
    family::Family,
    fields::Fields,
    params::{MAX_LOGPROBS, MAX_N, MAX_STOP_STRINGS},
    sse::{Framing, json as text_of},
    streams::Prepared,
};

const GENERATE: &str = "/generate";
const GENERATE_STREAM: &str = "/generate_stream";
const ROOT: &str = "/";
const INFO: &str = "/info";

/// The API.
pub static FAMILY: Family = Family {
    owns: |path| matches!(path, GENERATE | GENERATE_STREAM | ROOT | INFO),
    routes: |router| {
        router
            .route(GENERATE, post(generate))
            .route(GENERATE_STREAM, post(generate_stream))
            .route(ROOT, post(generate_either))
            .route(INFO, get(info))
    },
    generations: &[GENERATE, GENERATE_STREAM, ROOT],
    framing: Framing::Events,
    error: |error| (status(error), error_object(error)),
    failure: |error| text_of(&error_object(error)).into(),
    request_id: None,
};

fn status(error: &ApiError) -> StatusCode {
    match error.status() {
        StatusCode::BAD_REQUEST => StatusCode::UNPROCESSABLE_ENTITY,
        status => status,
    }
}

fn error_object(error: &ApiError) -> Value {
    let kind = match error.status() {
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => "authentication",
        StatusCode::TOO_MANY_REQUESTS => "overloaded",
        StatusCode::SERVICE_UNAVAILABLE => "unhealthy",
        status if status.is_server_error() => "generation",
        _ => "validation",
    };
    json!({"error": error.message(), "error_type": kind})
}

/// `POST /generate`.
async fn generate(asked: Asked) -> Result<Response, ApiError> {
    respond(asked, GENERATE, Form::Object).await
}

/// `POST /generate_stream`.
async fn generate_stream(asked: Asked) -> Result<Response, ApiError> {
    respond(asked, GENERATE_STREAM, Form::Events).await
}

/// `POST /`: whole, as a list of one, or streamed, as the body says.
async fn generate_either(asked: Asked) -> Result<Response, ApiError> {
    respond(asked, ROOT, Form::AsAsked).await
}

async fn respond(asked: Asked, path: &'static str, form: Form) -> Result<Response, ApiError> {
    let prepare = move |state: &FrontendState, fields: Fields, call: Call| {
        let ask = Ask::parse(fields, state, form)?;
        let (mut request, prompt) = ask.request(state, format!("tgi-{}", call.name), call.deadline)?;
        if !ask.params.has_seed() {
            // Answers tell their seed: it is one that every coordinator finds, and that JSON's readers can hold.
            request.sampling.seed = call.name.get(..12).and_then(|hex| u64::from_str_radix(hex, 16).ok()).unwrap_or(0);
        }
        let answer = Answer {
            model: Arc::clone(&state.model),
            prompt,
            wants: ask.wants,
            hides_tokens: state.hides_tokens(),
            seed: ask.params.draws().then_some(request.sampling.seed),
        };
        let reply = TgiReply { answer: Arc::new(answer) };
        Ok(Prepared { requests: vec![request], has_seed: true, reply: Some(Arc::new(reply)) })
    };
    asked.answer(path, prepare).await
}

/// `GET /info`: what is served, within which bounds.
async fn info(State(state): State<FrontendState>) -> Json<Value> {
    let facts = &state.model.facts;
    Json(json!({
        "model_id": state.model.name(),
        "model_sha": facts.identity,
        "model_dtype": facts.weight_type,
        "model_pipeline_tag": "text-generation",
        "max_concurrent_requests": state.limits.max_prompts,
        "max_best_of": MAX_N,
        "max_stop_sequences": MAX_STOP_STRINGS,
        "max_top_n_tokens": MAX_LOGPROBS,
        "max_input_tokens": state.model.max_model_len.saturating_sub(1),
        "max_total_tokens": state.model.max_model_len,
        "max_client_batch_size": 1,
        "router": "phalanx",
        "version": env!("CARGO_PKG_VERSION"),
    }))
}
