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
use prost::Message as _;
use serde_json::json;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Response, Status, metadata::MetadataMap, service::Routes};
use tonic_health::pb::health_server::HealthServer;
use tracing::Instrument;

use super::{
    FrontendState,
    error::ApiError,
    fields::{Fields, FromJson, Integer},
    generation::{Generation, Progress},
    messages,
    observe::{Record, TRACEPARENT},
    params::{Params, RawParams},
    prompt::{Prompt, Rendering, SpecialTokens},
    streams::{
        Prepared,
        key::{self, Keyed},
        position::{Place, Position},
    },
    structured,
};
use crate::{
    request::{Finish, Request},
    security::{
        audit::{Account, Origin},
        keys::Principal,
    },
};

pub mod health;

/// Label of the call in metrics.
pub const ENDPOINT: &str = "phalanx.v1.Inference/Generate";
/// Messages that wait for a client that reads slowly, beside those in its connection.
const UNREAD_MESSAGES: usize = 64;
/// Longest `request_id` that is kept.
const LONGEST_REQUEST_ID: usize = 128;

/// Services for clients: inference, health, reflection (v1 and v1alpha). Further services can be added to them.
pub fn grpc_routes(state: FrontendState) -> Result<Routes, tonic_reflection::server::Error> {
    let inference = InferenceService::new(state.clone());
    grpc_routes_with(state, inference)
}

/// The same with another inference service in front.
pub fn grpc_routes_with(
    state: FrontendState,
    inference: impl Inference,
) -> Result<Routes, tonic_reflection::server::Error> {
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    let limit = state.limits.max_body_bytes;
    Ok(Routes::new(HealthServer::new(health::HealthService::new(Arc::clone(&state.submit))))
        .add_service(reflection().build_v1()?)
        .add_service(reflection().build_v1alpha()?)
        .add_service(InferenceServer::new(inference).max_decoding_message_size(limit)))
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

    /// Who calls, where keys are needed; the call counts.
    fn principal(&self, metadata: &MetadataMap) -> Result<Option<Arc<Principal>>, ApiError> {
        let principal = self.state.security.authenticate(metadata.as_ref())?;
        if let Some(principal) = &principal {
            self.state.security.count_request(principal)?;
        }
        Ok(principal)
    }

    async fn submit(
        &self,
        call: GenerateRequest,
        keyed: Option<&Keyed>,
        id: String,
        deadline: Option<Instant>,
        record: &Record,
    ) -> Result<Generation, ApiError> {
        let state = self.state.noting_in(record);
        if let Some((generation, _)) = state.known(keyed)? {
            return Ok(generation);
        }
        let model = Some(call.model.as_str()).filter(|name| !name.is_empty());
        state.check_model(model)?;
        let (raw, prompt) = parse(call, &state)?;
        let params = Params::check(raw, &state.model)?;
        let has_seed = params.has_seed();
        let prepare = move |state: &FrontendState| -> Result<Request, ApiError> {
            let (prompt, special_tokens, field) = match prompt {
                Source::Plain(prompt, special_tokens, field) => (prompt, special_tokens, field),
                Source::Chat(rendering) => (Prompt::Text(state.render(&rendering)?), SpecialTokens::Leave, "chat"),
            };
            let ids = state.encode(&prompt, special_tokens, field)?;
            params.request(id, field, ids, &state.model, deadline)
        };
        let mut requests = vec![state.blocking(prepare).await?];
        state.admit_grammars(&mut requests).await?;
        let prepared = Prepared { requests, has_seed, reply: None };
        state.moderate(&prepared, record).await?;
        let (generation, _) = state.begin(keyed, prepared, record)?;
        Ok(generation)
    }
}

/// What makes the call resumable, if anything does.
fn keyed(call: &GenerateRequest, metadata: &MetadataMap) -> Result<Option<Keyed>, ApiError> {
    if call.resume_key.is_empty() && !metadata.contains_key(key::FORWARDERS_KEY) {
        return match call.resume_from.is_empty() {
            true => Ok(None),
            false => Err(ApiError::invalid("resume_from", "is only possible with 'resume_key'")),
        };
    }
    // The same question is the same request, however it is named and whatever of its answer is known.
    let asked = GenerateRequest {
        request_id: String::new(),
        resume_key: String::new(),
        resume_from: Vec::new(),
        ..call.clone()
    };
    let has = Position::after_tokens(&call.resume_from);
    let keyed = Keyed::of_grpc(&call.resume_key, metadata, ENDPOINT, &asked.encode_to_vec(), has)?;
    let n = call.n.unwrap_or(1) as usize;
    if call.resume_from.len() > n {
        return Err(ApiError::invalid("resume_from", format!("names more than the {n} choices there are")));
    }
    Ok(keyed)
}

enum Source {
    /// With the field's name.
    Plain(Prompt, SpecialTokens, &'static str),
    Chat(Rendering),
}

/// From the wire's types to the common raw ones.
fn parse(call: GenerateRequest, state: &FrontendState) -> Result<(RawParams, Source), ApiError> {
    let framing = call.add_special_tokens;
    let source = match call.prompt {
        None => return Err(ApiError::missing("prompt")),
        Some(WirePrompt::Text(text)) => {
            let special_tokens = if framing == Some(false) { SpecialTokens::Leave } else { SpecialTokens::Add };
            Source::Plain(Prompt::Text(text), special_tokens, "text")
        }
        Some(_) if framing.is_some() => {
            return Err(ApiError::invalid("add_special_tokens", "is only possible with 'text'"));
        }
        Some(WirePrompt::TokenIds(list)) => {
            let ids = list.ids.into_iter().map(Integer::from).collect();
            Source::Plain(Prompt::Ids(ids), SpecialTokens::Leave, "token_ids")
        }
        Some(WirePrompt::Chat(chat)) => Source::Chat(rendering(chat, state)?),
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
        priority: Some(call.priority.into()),
        include_stop_str_in_output: call.include_stop_str_in_output,
        skip_special_tokens: call.skip_special_tokens,
        allowed_token_ids: Some(call.allowed_token_ids)
            .filter(|ids| !ids.is_empty())
            .map(|ids| ids.into_iter().map(Integer::from).collect()),
        bad_words: call.bad_words,
        truncate_prompt_tokens: call.truncate_prompt_tokens.map(Integer::from),
        cache_salt: call.cache_salt,
        structured: call.structured_output.map(structured::of_grpc).transpose()?.flatten(),
        ..RawParams::default()
    };
    Ok((raw, source))
}

/// The same as over HTTP, by way of JSON.
fn rendering(chat: v1::ChatMessages, state: &FrontendState) -> Result<Rendering, ApiError> {
    let message = |m: v1::ChatMessage| json!({"role": m.role, "content": m.content});
    let messages = messages::parse(chat.messages.into_iter().map(message).collect())?;
    let options = json!({
        "add_generation_prompt": chat.add_generation_prompt,
        "continue_final_message": chat.continue_final_message,
        "reasoning_effort": chat.reasoning_effort,
    });
    Rendering::take(&mut Fields::from_json(options, "chat")?, messages, state)
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
        let (metadata, _, call) = request.into_parts();
        let request_id = Some(&call.request_id).filter(|id| {
            !id.is_empty() && id.len() <= LONGEST_REQUEST_ID && id.bytes().all(|byte| byte.is_ascii_graphic())
        });
        let request_id = request_id.cloned().unwrap_or_else(|| uuid::Uuid::new_v4().simple().to_string());
        let span = tracing::info_span!("request", endpoint = ENDPOINT, request_id, trace_id = tracing::field::Empty);
        let traceparent = metadata.get(TRACEPARENT).and_then(|value| value.to_str().ok());
        let record = Record::begin(ENDPOINT.to_owned(), "cancelled", span.clone()).traced(&request_id, traceparent);
        let record = Arc::new(record.named(&request_id));
        record.submits([request_id.as_str()]);
        let failed = |error: ApiError| {
            let status = Status::from(error);
            record.end(code_name(status.code()));
            status
        };
        if let Some(audit) = self.state.security.audit() {
            let origin = Origin::new(metadata.as_ref(), request_id.clone(), "gRPC", ENDPOINT);
            let ticket = audit.ticket().await.map_err(|error| failed(error.into()))?;
            record.audit(Account::new(audit, ticket, origin));
        }
        let principal = self.principal(&metadata).map_err(failed)?;
        if let Some(principal) = &principal {
            record.identify(Arc::clone(principal));
        }
        let deadline = self.state.deadline(arrived_at, own.map_err(failed)?);
        // Hashing a long prompt takes a core for a while.
        let keying = self.state.blocking(move |_| Ok((keyed(&call, &metadata)?, call)));
        let (keyed, call) = keying.await.map_err(failed)?;
        let keyed = keyed.map(|keyed| keyed.owned_by(principal.as_deref()));
        let submitted = self.submit(call, keyed.as_ref(), request_id.clone(), deadline, &record);
        let submitted = submitted.instrument(span).await;
        let generation = submitted.map_err(failed)?;
        let walked = vec![Place::default(); generation.n_choices()];
        let has = keyed.map(|keyed| keyed.has).unwrap_or_default();
        let generation = generation.recorded(Arc::clone(&record));
        let hides_tokens = self.state.hides_tokens();
        let answer = Answer { generation, request_id, walked, has, hides_tokens, record };
        let (sender, receiver) = mpsc::channel(UNREAD_MESSAGES);
        tokio::spawn(answer.send(sender, self.state.limits.write_timeout));
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }
}

/// A call's answer. Dropping it cancels the request, unless it can be resumed.
struct Answer {
    generation: Generation,
    request_id: String,
    /// Place in each choice.
    walked: Vec<Place>,
    /// What the client had when it called.
    has: Position,
    /// Whether token ids are kept back: they would tell what is redacted.
    hides_tokens: bool,
    record: Arc<Record>,
}

impl Answer {
    /// Sends all messages. Ends early if nobody takes one for a while: what a client does not read is not kept for it.
    async fn send(mut self, client: mpsc::Sender<Result<GenerateResponse, Status>>, patience: Duration) {
        loop {
            let next = tokio::select! {
                next = self.next() => next,
                () = client.closed() => return,
            };
            let Some(message) = next else { return };
            if client.send_timeout(message, patience).await.is_err() {
                return;
            }
        }
    }

    async fn next(&mut self) -> Option<Result<GenerateResponse, Status>> {
        loop {
            match self.generation.next().await? {
                Ok(progress) => {
                    if matches!(progress, Progress::Finished(_)) {
                        self.record.end(code_name(Code::Ok));
                    }
                    if let Some(message) = self.message(progress) {
                        return Some(Ok(message));
                    }
                }
                Err(error) => {
                    let status = Status::from(self.record.span().in_scope(|| ApiError::from(error)));
                    self.record.end(code_name(status.code()));
                    return Some(Err(status));
                }
            }
        }
    }

    /// None if the client has it.
    fn message(&mut self, progress: Progress) -> Option<GenerateResponse> {
        let mut message = GenerateResponse { request_id: self.request_id.clone(), ..GenerateResponse::default() };
        match progress {
            Progress::PromptScored { scores, .. } => {
                let has_begun = (0..self.walked.len()).any(|index| self.has.choice(index).tokens() > 0);
                if has_begun {
                    return None;
                }
                message.prompt_scores = scores;
            }
            Progress::Output { output, .. } => {
                let index = output.index as usize;
                let place = self.walked.get_mut(index)?;
                *place = place.step(output.token_ids.len());
                if *place <= self.has.choice(index) {
                    return None;
                }
                message.position = place.tokens();
                message.index = output.index;
                message.text = output.text;
                message.token_ids = if self.hides_tokens { Vec::new() } else { output.token_ids };
                message.scores = output.scores;
                message.set_finish_reason(match output.finish {
                    None => FinishReason::Unspecified,
                    Some(Finish::Length) => FinishReason::Length,
                    Some(Finish::ContentFilter) => FinishReason::ContentFilter,
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
        Some(message)
    }
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
pub fn code_name(code: Code) -> String {
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
