//! `POST /v1/completions`.

use std::sync::Arc;

use axum::{
    Json,
    response::{IntoResponse, Response},
};
use phalanx_cluster::id::TokenId;
use phalanx_proto::v1::TokenScore;
use serde::Serialize;
use serde_json::Value;

use super::{
    FrontendState,
    asked::{Asked, Call},
    error::ApiError,
    fields::Fields,
    generation::{Collected, Collection, Generation, StopReason, UsageObject, finish_reason, unix_seconds},
    logprobs::{LegacyLogprobs, LegacyWriter, TokenNames, prompt_logprobs},
    neutral::{self, Delivery, StreamedUsage},
    params::{MAX_LOGPROBS, MAX_N, Params, RawParams, in_range},
    prompt::{Prompt, Prompts, SpecialTokens},
    reply::Reply,
    sse::{self, Chunk, Chunks, Payload},
    streams::Prepared,
};
use crate::{
    request::{Output, Request, Usage},
    served_model::ServedModel,
};

/// Where it is.
pub const PATH: &str = "/v1/completions";

/// `max_tokens` if unset, as OpenAI and vLLM have it.
const DEFAULT_MAX_TOKENS: u32 = 16;

/// A request, checked but not yet tokenized.
struct CompletionRequest {
    prompts: Vec<Prompt>,
    special_tokens: SpecialTokens,
    delivery: Delivery,
    params: Params,
    wants: Wants,
    name: Option<String>,
}

/// Takes `best_of`: so many choices are made of each prompt, and the `n` best of them told. How many that is, if fewer.
fn take_best_of(fields: &mut Fields, raw: &mut RawParams, delivery: Delivery) -> Result<Option<u32>, ApiError> {
    let Some(best_of) = in_range("best_of", fields.take("best_of")?, 1..=MAX_N)? else { return Ok(None) };
    let n = in_range("n", raw.n, 1..=MAX_N)?.unwrap_or(1);
    if best_of < n {
        return Err(ApiError::invalid("best_of", format!("is {best_of}, less than 'n', {n}")));
    }
    if best_of == n {
        return Ok(None);
    }
    if delivery != Delivery::Whole {
        return Err(ApiError::invalid("best_of", "can't be more than 'n' when 'stream' is true"));
    }
    raw.n = Some(best_of.into());
    // They are compared by their scores.
    raw.logprobs.get_or_insert(0);
    Ok(Some(n))
}

/// What answers contain besides new text.
#[derive(Debug, Clone, Copy)]
struct Wants {
    echo: bool,
    logprobs: Option<u32>,
    prompt_logprobs: Option<u32>,
    token_ids: bool,
    token_names: TokenNames,
    skip_special_tokens: bool,
    /// Choices per prompt that are told.
    n_kept: u32,
}

impl CompletionRequest {
    fn parse(mut fields: Fields, state: &FrontendState) -> Result<Self, ApiError> {
        state.check_model(fields.take::<String>("model")?.as_deref())?;
        let prompts = fields.require::<Prompts>("prompt")?.0;
        let delivery = Delivery::take(&mut fields)?;
        let mut raw = RawParams::take_shared(&mut fields)?;
        raw.default_max_tokens = Some(DEFAULT_MAX_TOKENS);
        let logprobs = fields.take("logprobs")?;
        raw.logprobs = logprobs;
        neutral::check_prompt_logprobs(raw.prompt_logprobs, delivery)?;
        let echo = fields.flag("echo")?;
        // An echo without output still goes through the shards: one path, and it costs little.
        raw.score_prompt = echo && (raw.logprobs.is_some() || raw.max_tokens == Some(0));
        let n_kept = take_best_of(&mut fields, &mut raw, delivery)?;
        let special_tokens = match fields.take("add_special_tokens")? {
            Some(false) => SpecialTokens::Leave,
            Some(true) | None => SpecialTokens::Add,
        };
        let token_ids = fields.flag("return_token_ids")?;
        let token_names = TokenNames::take(&mut fields)?;
        let name = neutral::take_request_id(&mut fields)?;
        neutral::take_of_completions(&mut fields)?;
        fields.finish()?;
        let logprobs = in_range("logprobs", logprobs, 0..=MAX_LOGPROBS)?;
        let prompt_logprobs = in_range("prompt_logprobs", raw.prompt_logprobs, 0..=MAX_LOGPROBS)?;
        let params = Params::check(raw, &state.model)?;
        let n_choices = prompts.len().saturating_mul(params.n as usize);
        let limit = state.limits.max_choices;
        if n_choices > limit {
            let reason = format!("asks for {n_choices} choices in all, at most {limit} are possible in one request");
            return Err(ApiError::invalid("prompt", reason));
        }
        let limit = state.limits.max_prompts;
        if prompts.len() > limit {
            let reason = format!("has {} prompts, at most {limit} are possible in one request", prompts.len());
            return Err(ApiError::invalid("prompt", reason));
        }
        let skip_special_tokens = params.skip_special_tokens();
        let n_kept = n_kept.unwrap_or(params.n);
        let wants = Wants { echo, logprobs, prompt_logprobs, token_ids, token_names, skip_special_tokens, n_kept };
        Ok(Self { prompts, special_tokens, delivery, params, wants, name })
    }

    /// A request per prompt, and what answers need of the prompts.
    fn prepare(
        &self,
        state: &FrontendState,
        id: &str,
        deadline: Option<std::time::Instant>,
    ) -> Result<(Vec<Request>, Vec<Encoded>), ApiError> {
        let is_list = self.prompts.len() > 1;
        let mut requests = Vec::with_capacity(self.prompts.len());
        let mut encoded = Vec::with_capacity(self.prompts.len());
        for (index, prompt) in self.prompts.iter().enumerate() {
            let field = if is_list { format!("prompt[{index}]") } else { "prompt".to_owned() };
            let name = if is_list { format!("{id}-{index}") } else { id.to_owned() };
            let mut ids = state.encode(prompt, self.special_tokens, &field)?;
            let is_cut = self.params.truncate(&mut ids, &state.model);
            let text = match prompt {
                _ if !self.wants.echo => String::new(),
                Prompt::Text(text) if !is_cut => state.repeated(text.clone()),
                _ => state.model.tokenizer.decode(&ids, self.wants.skip_special_tokens),
            };
            let n_tokens = ids.len();
            let kept_ids = if self.wants.echo || self.wants.token_ids { ids.clone() } else { Vec::new() };
            requests.push(self.params.request(name, &field, ids, &state.model, deadline)?);
            encoded.push(Encoded { text, ids: kept_ids, n_tokens });
        }
        Ok((requests, encoded))
    }
}

/// A prompt, as far as the answer repeats it.
struct Encoded {
    text: String,
    ids: Vec<TokenId>,
    n_tokens: usize,
}

/// The endpoint.
pub async fn create(asked: Asked) -> Result<Response, ApiError> {
    let prepare = |state: &FrontendState, fields: Fields, call: Call| {
        let completion = CompletionRequest::parse(fields, state)?;
        let id = format!("cmpl-{}", completion.name.as_ref().unwrap_or(&call.name));
        // Clients may give the same name twice; here each request has its own.
        let (requests, prompts) = completion.prepare(state, &format!("cmpl-{}", call.name), call.deadline)?;
        let model = Arc::clone(&state.model);
        let answer = Answer { id, created: unix_seconds(), model, wants: completion.wants, prompts };
        let n = completion.params.n;
        let reply = CompletionReply { answer: Arc::new(answer), delivery: completion.delivery, n };
        let has_seed = completion.params.has_seed();
        Ok(Prepared { requests, has_seed, reply: Some(Arc::new(reply)) })
    };
    asked.answer(PATH, prepare).await
}

/// What all parts of an answer share.
struct Answer {
    id: String,
    created: u64,
    model: Arc<ServedModel>,
    wants: Wants,
    prompts: Vec<Encoded>,
}

#[derive(Serialize)]
struct Completion<U> {
    id: String,
    object: &'static str,
    created: u64,
    model: String,
    system_fingerprint: String,
    choices: Vec<Choice>,
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<U>,
}

#[derive(Serialize)]
struct Choice {
    index: usize,
    text: String,
    logprobs: Option<LegacyLogprobs>,
    finish_reason: Option<&'static str>,
    stop_reason: Option<StopReason>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_logprobs: Option<Vec<Value>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<Vec<TokenId>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<Vec<TokenId>>,
}

impl Answer {
    fn object<U>(&self, choices: Vec<Choice>, usage: Option<U>) -> Completion<U> {
        Completion {
            id: self.id.clone(),
            object: "text_completion",
            created: self.created,
            model: self.model.name(),
            system_fingerprint: self.model.fingerprint.clone(),
            choices,
            usage,
        }
    }

    fn writer(&self) -> Option<LegacyWriter> {
        self.wants
            .logprobs
            .map(|n_top| LegacyWriter::new(n_top, self.wants.skip_special_tokens, self.wants.token_names))
    }

    /// Part of a choice. `prompt` is set in the part that begins it, with the prompt's scores.
    fn choice(
        &self,
        index: usize,
        prompt: Option<(&Encoded, &[TokenScore])>,
        part: Collection,
        writer: Option<&mut LegacyWriter>,
    ) -> Choice {
        let tokenizer = &self.model.tokenizer;
        let echoed = prompt.filter(|_| self.wants.echo);
        let logprobs = writer.map(|writer| {
            let mut logprobs = LegacyLogprobs::default();
            if let Some((prompt, scores)) = echoed {
                writer.prompt(tokenizer, &prompt.ids, scores, &prompt.text, &mut logprobs);
            }
            writer.output(tokenizer, &part.scores, &mut logprobs);
            logprobs
        });
        let text = match echoed {
            Some((prompt, _)) => format!("{}{}", prompt.text, part.text),
            None => part.text,
        };
        Choice {
            index,
            text,
            logprobs,
            finish_reason: part.finish.as_ref().map(finish_reason),
            stop_reason: StopReason::of(part.finish.as_ref()),
            prompt_logprobs: None,
            prompt_token_ids: prompt.filter(|_| self.wants.token_ids).map(|(prompt, _)| prompt.ids.clone()),
            token_ids: self.wants.token_ids.then_some(part.token_ids),
        }
    }

    fn whole(&self, mut collected: Collected, n: u32) -> Completion<UsageObject> {
        let n_kept = self.wants.n_kept;
        if n_kept < n {
            collected.keep_best(n as usize, n_kept as usize);
        }
        let Collected { choices, prompt_scores, usage, .. } = collected;
        let choice = |(index, part): (usize, Collection)| {
            let prompt_idx = index / n_kept as usize;
            let scores = prompt_scores[prompt_idx].as_deref();
            let prompt = (&self.prompts[prompt_idx], scores.unwrap_or_default());
            let mut choice = self.choice(index, Some(prompt), part, self.writer().as_mut());
            let asked = self.wants.prompt_logprobs.zip(scores);
            choice.prompt_logprobs = asked.map(|(n_top, scores)| prompt_logprobs(&self.model.tokenizer, scores, n_top));
            choice
        };
        let choices = choices.into_iter().enumerate().map(choice).collect();
        self.object(choices, Some(usage.into()))
    }
}

/// Answers to one request.
struct CompletionReply {
    answer: Arc<Answer>,
    delivery: Delivery,
    /// Choices per prompt.
    n: u32,
}

impl Reply for CompletionReply {
    fn delivery(&self) -> Delivery {
        self.delivery
    }

    fn whole(&self, collected: Collected) -> Response {
        Json(self.answer.whole(collected, self.n)).into_response()
    }

    fn chunks(&self) -> Box<dyn Chunks> {
        let answer = Arc::clone(&self.answer);
        let n_prompts = answer.prompts.len();
        let choices = vec![
            StreamedChoice { has_begun: false, n_tokens: 0, writer: answer.writer() };
            n_prompts * self.n as usize
        ];
        let prompt_scores = vec![Vec::new(); n_prompts];
        Box::new(CompletionChunks { answer, usage: self.delivery.usage(), n: self.n, choices, prompt_scores })
    }

    fn reveals(&self) -> Option<&'static str> {
        let wants = &self.answer.wants;
        wants.logprobs.map(|_| "logprobs").or(wants.token_ids.then_some("return_token_ids"))
    }

    fn kept_bytes(&self) -> usize {
        let prompt = |prompt: &Encoded| size_of::<Encoded>() + prompt.text.len() + size_of_val(prompt.ids.as_slice());
        size_of::<Answer>() + self.answer.prompts.iter().map(prompt).sum::<usize>()
    }
}

/// Chunks of a streamed completion.
struct CompletionChunks {
    answer: Arc<Answer>,
    usage: StreamedUsage,
    n: u32,
    choices: Vec<StreamedChoice>,
    prompt_scores: Vec<Vec<TokenScore>>,
}

#[derive(Clone)]
struct StreamedChoice {
    has_begun: bool,
    n_tokens: usize,
    writer: Option<LegacyWriter>,
}

impl Chunks for CompletionChunks {
    fn prompt_scored(&mut self, prompt_idx: usize, scores: Vec<TokenScore>) {
        self.prompt_scores[prompt_idx] = scores;
    }

    fn output(&mut self, prompt_idx: usize, output: Output) -> Vec<Chunk> {
        let index = Generation::choice_index(self.n, prompt_idx, &output);
        let Some(choice) = self.choices.get_mut(index) else { return Vec::new() };
        let begins = !std::mem::replace(&mut choice.has_begun, true);
        choice.n_tokens += output.token_ids.len();
        let repeats = begins && (self.answer.wants.echo || self.answer.wants.token_ids);
        let has_more = !output.scores.is_empty() || output.finish.is_some() || self.answer.wants.token_ids;
        if output.text.is_empty() && !repeats && !has_more {
            return Vec::new();
        }
        let Output { index: _, text, token_ids, scores, finish } = output;
        let prompt = begins.then(|| (&self.answer.prompts[prompt_idx], self.prompt_scores[prompt_idx].as_slice()));
        let part = Collection { text, pieces: Vec::new(), token_ids, scores, finish };
        let n_tokens = choice.n_tokens;
        let choice = self.answer.choice(index, prompt, part, choice.writer.as_mut());
        let usage = self.usage.of_chunk(self.answer.prompts[prompt_idx].n_tokens, n_tokens);
        vec![Chunk::Body(sse::json(&self.answer.object(vec![choice], usage)).into())]
    }

    fn finished(&mut self, usage: Usage) -> Option<Payload> {
        let last = || sse::json(&self.answer.object(Vec::new(), Some(UsageObject::from(usage)))).into();
        (self.usage != StreamedUsage::Omitted).then(last)
    }
}
