//! `POST /v1/responses`, OpenAI's newer API, without memory: nothing is stored, each request brings all that was said.

mod answer;
mod ask;
mod items;

use std::sync::Arc;

use axum::{response::Response, routing::post};
use serde_json::{Value, json};

use self::{
    answer::{Answer, ResponseReply},
    ask::ResponseAsk,
};
use super::{
    FrontendState,
    asked::{Asked, Call},
    error::ApiError,
    family::{self, Family},
    fields::Fields,
    generation::unix_seconds,
    prompt::{Prompt, SpecialTokens},
    sse::{Framing, Payload},
    streams::Prepared,
};

/// Where it is.
pub const PATH: &str = "/v1/responses";

/// The API.
pub static FAMILY: Family = Family {
    owns: |path| path == PATH,
    routes: |router| router.route(PATH, post(create)),
    generations: &[PATH],
    framing: Framing::Events,
    error: family::openai_error,
    failure: |error| Payload::named("error", &error_event(error, 0)),
    request_id: None,
};

/// The event that ends a stream that fails.
fn error_event(error: &ApiError, sequence_number: u64) -> Value {
    json!({
        "type": "error",
        "code": error.code(),
        "message": error.message(),
        "param": error.param(),
        "sequence_number": sequence_number,
    })
}

/// The endpoint.
async fn create(asked: Asked) -> Result<Response, ApiError> {
    let prepare = |state: &FrontendState, fields: Fields, call: Call| {
        let ask = ResponseAsk::parse(fields, state, &call.name)?;
        let prompt = state.encode(&Prompt::Text(ask.text), SpecialTokens::Leave, "input")?;
        let request =
            ask.params.request(format!("resp_{}", call.name), "input", prompt, &state.model, call.deadline)?;
        let wants_scores = ask.params.wants_scores();
        let answer = Answer {
            name: call.name,
            created_at: unix_seconds(),
            model: Arc::clone(&state.model),
            reading: ask.reading,
            echo: ask.echo,
            wants_scores,
        };
        let has_seed = ask.params.has_seed();
        let reply = ResponseReply { answer: Arc::new(answer), delivery: ask.delivery };
        Ok(Prepared { requests: vec![request], has_seed, reply: Some(Arc::new(reply)) })
    };
    asked.answer(PATH, prepare).await
}
