//! What Ollama's clients ask of the model.

use axum::{Json, extract::State};
use serde_json::{Value, json};

use crate::frontend::{FrontendState, error::ApiError, json_body::JsonBody};

/// A date that never comes: the model stays as long as the server does.
const NEVER: &str = "9999-01-01T00:00:00Z";

fn details(state: &FrontendState) -> Value {
    let facts = &state.model.facts;
    json!({
        "parent_model": "",
        "format": facts.format,
        "family": facts.architecture,
        "families": [facts.architecture],
        "parameter_size": facts.weights_in_words(),
        "quantization_level": facts.weight_type,
    })
}

fn created(state: &FrontendState) -> String {
    let seconds = i64::try_from(state.model.created).unwrap_or(0);
    jiff::Timestamp::from_second(seconds).unwrap_or(jiff::Timestamp::UNIX_EPOCH).to_string()
}

fn entry(state: &FrontendState, name: &str) -> Value {
    json!({
        "name": name,
        "model": name,
        "size": state.model.facts.bytes,
        "digest": state.model.facts.identity,
        "details": details(state),
    })
}

/// `GET /api/tags`: an entry per name.
pub async fn tags(State(state): State<FrontendState>) -> Json<Value> {
    let entry = |name: &String| {
        let mut entry = entry(&state, name);
        entry["modified_at"] = created(&state).into();
        entry
    };
    Json(json!({"models": state.model.names.iter().map(entry).collect::<Vec<_>>()}))
}

/// `GET /api/ps`: what is loaded, which is the served model.
pub async fn ps(State(state): State<FrontendState>) -> Json<Value> {
    let mut entry = entry(&state, &state.model.name());
    entry["expires_at"] = NEVER.into();
    entry["size_vram"] = 0.into();
    entry["context_length"] = state.model.max_model_len.into();
    Json(json!({"models": [entry]}))
}

/// `POST /api/show`.
pub async fn show(State(state): State<FrontendState>, body: JsonBody) -> Result<Json<Value>, ApiError> {
    let work = move |state: &FrontendState| {
        let mut fields = body.parse()?;
        // Older clients say `name`.
        let older = fields.take::<String>("name")?;
        let name = match fields.take::<String>("model")?.or(older) {
            Some(name) => name,
            None => return Err(ApiError::missing("model")),
        };
        state.check_model(Some(name.strip_suffix(":latest").unwrap_or(&name)))?;
        fields.take::<bool>("verbose")?;
        fields.finish()?;
        let architecture = &state.model.facts.architecture;
        let template = state.model.chat_template.as_ref().map_or("", |template| template.source());
        Ok(json!({
            "modelfile": "",
            "parameters": "",
            "template": template,
            "details": details(state),
            "model_info": {
                "general.architecture": architecture,
                "general.parameter_count": state.model.facts.n_weights,
                (format!("{architecture}.context_length")): state.model.max_model_len,
                (format!("{architecture}.vocab_size")): state.model.vocab,
            },
            "capabilities": state.capabilities(),
            "modified_at": created(state),
        }))
    };
    state.blocking(work).await.map(Json)
}
