//! `POST /tokenize` and `POST /detokenize`, as vLLM has them.

use axum::{Json, extract::State};
use phalanx_cluster::id::TokenId;
use serde::Serialize;

use super::{
    FrontendState,
    error::ApiError,
    fields::Integer,
    json_body::JsonBody,
    messages,
    neutral::take_template_variables,
    prompt::{Ending, Prompt, Rendering, SpecialTokens},
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

enum Source {
    Text(String),
    Chat(Rendering),
}

/// Of `prompt` or `messages`, exactly one.
pub async fn tokenize(
    State(state): State<FrontendState>,
    JsonBody(mut fields): JsonBody,
) -> Result<Json<Tokenized>, ApiError> {
    state.check_model(fields.take::<String>("model")?.as_deref())?;
    let adds = fields.take::<bool>("add_special_tokens")?;
    let source = match (fields.take::<String>("prompt")?, fields.take("messages")?) {
        (Some(text), None) => Source::Text(text),
        (None, Some(messages)) => Source::Chat(Rendering {
            messages: messages::parse(messages)?,
            ending: Ending::take(&mut fields)?,
            variables: take_template_variables(&mut fields)?,
        }),
        (None, None) => return Err(ApiError::missing("prompt")),
        (Some(_), Some(_)) => return Err(ApiError::invalid("messages", "can't stand beside 'prompt'")),
    };
    let wants_texts = fields.flag("return_token_strs")?;
    fields.finish()?;
    let work = move |state: &FrontendState| {
        let (text, field, default) = match &source {
            Source::Text(text) => (text.clone(), "prompt", true),
            Source::Chat(rendering) => (state.render(rendering)?, "messages", false),
        };
        let special_tokens = if adds.unwrap_or(default) { SpecialTokens::Add } else { SpecialTokens::Leave };
        state.encode(&Prompt::Text(text), special_tokens, field)
    };
    let tokens = state.blocking(work).await?;
    let texts = || tokens.iter().map(|id| state.model.tokenizer.token_text(*id)).collect();
    let token_strs = wants_texts.then(texts);
    Ok(Json(Tokenized { count: tokens.len(), max_model_len: state.model.max_model_len, tokens, token_strs }))
}

/// Special tokens stay in the text.
pub async fn detokenize(
    State(state): State<FrontendState>,
    JsonBody(mut fields): JsonBody,
) -> Result<Json<Detokenized>, ApiError> {
    state.check_model(fields.take::<String>("model")?.as_deref())?;
    let tokens = fields.require::<Vec<Integer>>("tokens")?;
    fields.finish()?;
    let work = move |state: &FrontendState| {
        let ids = state.encode(&Prompt::Ids(tokens), SpecialTokens::Leave, "tokens")?;
        Ok(state.model.tokenizer.decode(&ids, false))
    };
    Ok(Json(Detokenized { prompt: state.blocking(work).await? }))
}
