//! `GET /v1/models`: which model is served.

use axum::{
    Json,
    extract::{Path, State, rejection::PathRejection},
};
use serde::Serialize;

use super::{FrontendState, error::ApiError};

/// A model as OpenAI lists it, with vLLM's additions.
#[derive(Debug, Serialize)]
pub struct Model {
    id: String,
    object: &'static str,
    created: u64,
    owned_by: &'static str,
    root: String,
    parent: Option<String>,
    max_model_len: usize,
}

/// A list of them.
#[derive(Debug, Serialize)]
pub struct Models {
    object: &'static str,
    data: Vec<Model>,
}

fn model(state: &FrontendState, id: &str) -> Model {
    Model {
        id: id.to_owned(),
        object: "model",
        created: state.model.created,
        owned_by: "phalanx",
        root: state.model.name(),
        parent: None,
        max_model_len: state.model.max_model_len,
    }
}

/// `GET /v1/models`: one entry per name.
pub async fn list(State(state): State<FrontendState>) -> Json<Models> {
    let data = state.model.names.iter().map(|name| model(&state, name)).collect();
    Json(Models { object: "list", data })
}

/// `GET /v1/models/{id}`. Ids may contain slashes.
pub async fn retrieve(
    State(state): State<FrontendState>,
    id: Result<Path<String>, PathRejection>,
) -> Result<Json<Model>, ApiError> {
    let Path(id) = id.map_err(|_| ApiError::invalid("model", "must be UTF-8"))?;
    state.check_model(Some(&id))?;
    Ok(Json(model(&state, &id)))
}
