//! `phalanx.v1.Inference`, and the standard health and reflection services.

use std::{
    pin::Pin,
    sync::Arc,
    time::{Duration, Instant},
};

use futures::Stream;
use phalanx_proto::v1::{
    self, FILE_DESCRIPTOR_SET, FinishReason, GenerateRequest, GenerateResponse,
    generate_request::Prompt as WirePrompt,
    inference_server::{Inference, InferenceServer},
};
use serde_json::{Map, json};
use tonic::{Code, Response, Status, metadata::MetadataMap, service::Routes};
use tonic_health::pb::health_server::HealthServer;
use tracing::Instrument;

use super::{
    FrontendState,
    error::ApiError,
    fields::Integer,
    generation::{Generation, Progress},
    messages,
    observe::Record,
    params::{Params, RawParams},
    prompt::{Ending, Prompt, Rendering, SpecialTokens},
};
use crate::request::{Finish, Request};

pub mod health;

/// Label of the call in metrics.
const ENDPOINT: &str = "phalanx.v1.Inference/Generate";
/// Longest `request_id` that is kept.
const LONGEST_REQUEST_ID: usize = 128;

/// Services for clients: inference, health, reflection (v1 and v1alpha). Further services can be added to them.
pub fn grpc_routes(state: FrontendState) -> Result<Routes, tonic_reflection::server::Error> {
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    let limit = state.limits.max_body_bytes;
    Ok(Routes::new(HealthServer::new(health::HealthService::new(Arc::clone(&state.submit))))
        .add_service(reflection().build_v1()?)
        .add_service(reflection().build_v1alpha()?)
        .add_service(InferenceServer::new(InferenceService::new(state)).max_decoding_message_size(limit)))
}

/// The inference service.
pub struct InferenceService {
    state: FrontendState,
}

impl InferenceService {
    /// Over the same state as the HTTP endpoints.
    pub fn new(state: FrontendState) -> Self {
        Self { state }
    }

    async fn submit(
        &self,
        call: GenerateRequest,
        id: String,
        deadline: Option<Instant>,
    ) -> Result<Generation, ApiError> {
        let model = Some(call.model.as_str()).filter(|name| !name.is_empty());
        self.state.check_model(model)?;
        let (raw, prompt) = parse(call)?;
        let params = Params::check(raw, &self.state.model)?;
        let prepare = move |state: &FrontendState| -> Result<Request, ApiError> {
            let (prompt, special_tokens, field) = match prompt {
                Source::Plain(prompt, field) => (prompt, SpecialTokens::Add, field),
                Source::Chat(rendering) => (Prompt::Text(state.render(&rendering)?), SpecialTokens::Leave, "chat"),
            };
            let ids = state.encode(&prompt, special_tokens, field)?;
            params.request(id, field, ids, &state.model, deadline)
        };
        let request = self.state.blocking(prepare).await?;
        self.state.submit_all(vec![request])
    }
}

enum Source {
    /// With the field's name.
    Plain(Prompt, &'static str),
    Chat(Rendering),
}

/// The wire has fields that no answer takes into account yet: who relies on them must hear of it.
fn refuse_unserved(call: &GenerateRequest) -> Result<(), ApiError> {
    let asked = [
        ("resume_key", !call.resume_key.is_empty()),
        ("resume_from", !call.resume_from.is_empty()),
        ("priority", call.priority != 0),
    ];
    match asked.into_iter().find(|(_, is_asked)| *is_asked) {
        Some((field, _)) => Err(ApiError::unsupported(field)),
        None => Ok(()),
    }
}

/// From the wire's types to the common raw ones.
fn parse(call: GenerateRequest) -> Result<(RawParams, Source), ApiError> {
    refuse_unserved(&call)?;
    let source = match call.prompt {
        None => return Err(ApiError::missing("prompt")),
        Some(WirePrompt::Text(text)) => Source::Plain(Prompt::Text(text), "text"),
        Some(WirePrompt::TokenIds(list)) => {
            Source::Plain(Prompt::Ids(list.ids.into_iter().map(Integer::from).collect()), "token_ids")
        }
        Some(WirePrompt::Chat(chat)) => {
            let message = |m: v1::ChatMessage| json!({"role": m.role, "content": m.content});
            let messages = messages::parse(chat.messages.into_iter().map(message).collect())?;
            Source::Chat(Rendering { messages, ending: Ending::GenerationPrompt, variables: Map::new() })
        }
    };
    let raw = RawParams {
        temperature: call.temperature,
        top_k: call.top_k.map(Integer::from),
        top_p: call.top_p,
        min_p: call.min_p,
        repetition_penalty: call.repetition_penalty,
        presence_penalty: call.presence_penalty,
        frequency_penalty: call.frequency_penalty,
        logit_bias: call.logit_bias.iter().map(|b| (Integer::from(b.token_id), b.bias)).collect(),
        seed: call.seed.map(Integer::from),
        n: call.n.map(Integer::from),
        max_tokens: call.max_tokens.map(Integer::from),
        min_tokens: call.min_tokens.map(Integer::from),
        stop: call.stop,
        stop_token_ids: call.stop_token_ids.into_iter().map(Integer::from).collect(),
        ignore_eos: call.ignore_eos,
        logprobs: call.logprobs.map(Integer::from),
        prompt_logprobs: call.prompt_logprobs.map(Integer::from),
        ..RawParams::default()
    };
    Ok((raw, source))
}

#[tonic::async_trait]
impl Inference for InferenceService {
    type GenerateStream = Pin<Box<dyn Stream<Item = Result<GenerateResponse, Status>> + Send>>;

    async fn generate(
        &self,
        request: tonic::Request<GenerateRequest>,
    ) -> Result<Response<Self::GenerateStream>, Status> {
        let arrived_at = Instant::now();
        let own = request_deadline(request.metadata(), arrived_at);
        let call = request.into_inner();
        let request_id = Some(&call.request_id).filter(|id| {
            !id.is_empty() && id.len() <= LONGEST_REQUEST_ID && id.bytes().all(|byte| byte.is_ascii_graphic())
        });
        let request_id = request_id.cloned().unwrap_or_else(|| uuid::Uuid::new_v4().simple().to_string());
        let span = tracing::info_span!("request", endpoint = ENDPOINT, request_id);
        let record = Record::begin(ENDPOINT.to_owned(), "cancelled", span.clone());
        let failed = |error: ApiError| {
            let status = Status::from(error);
            record.end(code_name(status.code()));
            status
        };
        let deadline = self.state.deadline(arrived_at, own.map_err(failed)?);
        let generation = self.submit(call, request_id.clone(), deadline).instrument(span).await.map_err(failed)?;
        Ok(Response::new(Box::pin(responses(generation, request_id, record))))
    }
}

/// Messages of a call. Dropping the stream cancels the request.
fn responses(
    generation: Generation,
    request_id: String,
    record: Record,
) -> impl Stream<Item = Result<GenerateResponse, Status>> + Send {
    futures::stream::unfold((generation, request_id, record), |(mut generation, request_id, record)| async move {
        let response = match generation.next().await? {
            Ok(progress) => {
                if matches!(progress, Progress::Finished(_)) {
                    record.end(code_name(Code::Ok));
                }
                Ok(message(progress, &request_id))
            }
            Err(error) => {
                let status = Status::from(record.span().in_scope(|| ApiError::from(error)));
                record.end(code_name(status.code()));
                Err(status)
            }
        };
        Some((response, (generation, request_id, record)))
    })
}

fn message(progress: Progress, request_id: &str) -> GenerateResponse {
    let mut message = GenerateResponse { request_id: request_id.to_owned(), ..GenerateResponse::default() };
    match progress {
        Progress::PromptScored { scores, .. } => message.prompt_scores = scores,
        Progress::Output { output, .. } => {
            message.index = output.index;
            message.text = output.text;
            message.token_ids = output.token_ids;
            message.scores = output.scores;
            message.set_finish_reason(match output.finish {
                None => FinishReason::Unspecified,
                Some(Finish::Length) => FinishReason::Length,
                Some(Finish::EndOfSequence | Finish::StopToken(_) | Finish::StopString(_)) => FinishReason::Stop,
            });
        }
        Progress::Finished(usage) => {
            message.usage = Some(v1::Usage {
                prompt_tokens: usage.prompt_tokens,
                completion_tokens: usage.completion_tokens,
                cached_tokens: usage.cached_tokens,
            });
        }
    }
    message
}

/// The call's own deadline, from the header that gRPC defines for it: up to eight digits and a unit.
fn request_deadline(metadata: &MetadataMap, arrived_at: Instant) -> Result<Option<Instant>, ApiError> {
    let Some(value) = metadata.get("grpc-timeout") else { return Ok(None) };
    let timeout = value.to_str().ok().and_then(parse_timeout);
    let timeout = timeout.ok_or_else(|| ApiError::invalid("grpc-timeout", "must be digits and one of H M S m u n"))?;
    // A deadline beyond what the clock can say is none.
    Ok(arrived_at.checked_add(timeout))
}

fn parse_timeout(text: &str) -> Option<Duration> {
    let unit = text.chars().last().filter(char::is_ascii)?;
    let digits = &text[..text.len() - 1];
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let count: u64 = digits.parse().ok()?;
    match unit {
        'H' => Some(Duration::from_secs(count * 3600)),
        'M' => Some(Duration::from_secs(count * 60)),
        'S' => Some(Duration::from_secs(count)),
        'm' => Some(Duration::from_millis(count)),
        'u' => Some(Duration::from_micros(count)),
        'n' => Some(Duration::from_nanos(count)),
        _ => None,
    }
}

/// A code as metrics show it: `deadline_exceeded`.
fn code_name(code: Code) -> String {
    let mut name = String::new();
    for letter in format!("{code:?}").chars() {
        if letter.is_ascii_uppercase() && !name.is_empty() {
            name.push('_');
        }
        name.push(letter.to_ascii_lowercase());
    }
    name
}

#[cfg(test)]
mod tests;
