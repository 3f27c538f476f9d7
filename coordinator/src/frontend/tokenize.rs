//! `POST /tokenize` and `POST /detokenize` as vLLM has them, `POST /apply-template` as llama.cpp's server does.

use axum::{Json, extract::State};
use phalanx_cluster::id::TokenId;
use serde::Serialize;

use super::{
    FrontendState,
    error::ApiError,
    fields::{Fields, Integer},
    json_body::JsonBody,
    messages,
    prompt::{Prompt, Rendering, SpecialTokens},
    tools::toolbox::Toolbox,
};

/// Token ids of a text.
#[derive(Debug, Serialize)]
pub struct Tokenized {
    count: usize,
    max_model_len: usize,
    tokens: Vec<TokenId>,
    token_strs: Option<Vec<String>>,
}

/// Text of token ids.
#[derive(Debug, Serialize)]
pub struct Detokenized {
    prompt: String,
}

/// Of `prompt` or `messages`, exactly one.
pub async fn tokenize(State(state): State<FrontendState>, body: JsonBody) -> Result<Json<Tokenized>, ApiError> {
    state.blocking(move |state| tokens_of(state, body.parse()?)).await.map(Json)
}

fn tokens_of(state: &FrontendState, mut fields: Fields) -> Result<Tokenized, ApiError> {
    state.check_model(fields.take::<String>("model")?.as_deref())?;
    let adds = fields.take::<bool>("add_special_tokens")?;
    let (text, field, default) = match (fields.take::<String>("prompt")?, fields.take("messages")?) {
        (Some(text), None) => (text, "prompt", true),
        (None, Some(messages)) => {
            let mut rendering = Rendering::take(&mut fields, messages::parse(messages)?, state)?;
            state.offer(&mut rendering, &Toolbox::take(&mut fields)?)?;
            (state.render(&rendering)?, "messages", false)
        }
        (None, None) => return Err(ApiError::missing("prompt")),
        (Some(_), Some(_)) => return Err(ApiError::invalid("messages", "can't stand beside 'prompt'")),
    };
    let wants_texts = fields.flag("return_token_strs")?;
    fields.finish()?;
    let special_tokens = if adds.unwrap_or(default) { SpecialTokens::Add } else { SpecialTokens::Leave };
    let tokens = state.encode(&Prompt::Text(text), special_tokens, field)?;
    let texts = || tokens.iter().map(|id| state.model.tokenizer.token_text(*id)).collect();
    let token_strs = wants_texts.then(texts);
    Ok(Tokenized { count: tokens.len(), max_model_len: state.model.max_model_len, tokens, token_strs })
}

/// Special tokens stay in the text.
pub async fn detokenize(State(state): State<FrontendState>, body: JsonBody) -> Result<Json<Detokenized>, ApiError> {
    let work = move |state: &FrontendState| {
        let mut fields = body.parse()?;
        state.check_model(fields.take::<String>("model")?.as_deref())?;
        let tokens = fields.require::<Vec<Integer>>("tokens")?;
        fields.finish()?;
        let ids = state.encode(&Prompt::Ids(tokens), SpecialTokens::Leave, "tokens")?;
        Ok(Detokenized { prompt: state.model.tokenizer.decode(&ids, false) })
    };
    state.blocking(work).await.map(Json)
}

/// A chat as the model reads it.
#[derive(Debug, Serialize)]
pub struct Rendered {
    prompt: String,
}

/// What chat completions make of the same messages.
pub async fn apply_template(State(state): State<FrontendState>, body: JsonBody) -> Result<Json<Rendered>, ApiError> {
    let work = move |state: &FrontendState| {
        let mut fields = body.parse()?;
        state.check_model(fields.take::<String>("model")?.as_deref())?;
        let messages = messages::parse(fields.require("messages")?)?;
        let mut rendering = Rendering::take(&mut fields, messages, state)?;
        state.offer(&mut rendering, &Toolbox::take(&mut fields)?)?;
        fields.finish()?;
        Ok(Rendered { prompt: state.repeated(state.render(&rendering)?) })
    };
    state.blocking(work).await.map(Json)
}
