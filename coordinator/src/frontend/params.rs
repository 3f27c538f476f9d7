//! Parameters of a generation, from what a client typed to what the scheduler takes. HTTP and gRPC share this way.

mod forbidden;

use std::{fmt::Display, ops::RangeInclusive, time::Instant};

use phalanx_cluster::{id::TokenId, seal::Seal};
use phalanx_proto::v1::{LogitBias, SamplingParams, ThoughtLimit};
use serde_json::Value;

use super::{
    error::ApiError,
    fields::{Fields, FromJson, Integer, kind},
    structured::{self, Wanted},
    tools::budget::{self, ThoughtBudget},
};
use crate::{
    grammars,
    request::{Request, StopConditions},
    served_model::ServedModel,
};

/// Most choices per prompt.
pub const MAX_N: u32 = 128;
/// Most alternatives per scored token.
pub const MAX_LOGPROBS: u32 = 20;
/// Most stop strings.
pub const MAX_STOP_STRINGS: usize = 16;
/// Longest stop string, in bytes.
pub const MAX_STOP_BYTES: usize = 1024;
/// Most stop token ids.
pub const MAX_STOP_TOKENS: usize = 256;
/// Most entries of `logit_bias`.
pub const MAX_LOGIT_BIAS: usize = 1024;

/// Longest `cache_salt`, in bytes.
pub const MAX_SALT_BYTES: usize = 1024;

/// Most ids of `allowed_token_ids`.
pub const MAX_ALLOWED_TOKENS: usize = 4096;

/// Parameters as a client gave them, of the right types but otherwise unchecked. `None` is unset.
#[derive(Debug, Default)]
pub struct RawParams {
    /// See [`SamplingParams`]; unset is the model's default, else 1.
    pub temperature: Option<f32>,
    /// -1 and 0 keep all tokens; unset is the model's default, else 0.
    pub top_k: Option<Integer>,
    /// See [`SamplingParams`]; unset is the model's default, else 1.
    pub top_p: Option<f32>,
    /// See [`SamplingParams`]; unset is the model's default, else 0.
    pub min_p: Option<f32>,
    /// See [`SamplingParams`]; unset is the model's default, else 1.
    pub repetition_penalty: Option<f32>,
    /// See [`SamplingParams`]; unset is 0.
    pub presence_penalty: Option<f32>,
    /// See [`SamplingParams`]; unset is 0.
    pub frequency_penalty: Option<f32>,
    /// Token ids and what is added to their logits.
    pub logit_bias: Vec<(Integer, f32)>,
    /// Unset draws one. Negative ones are taken modulo 2^64.
    pub seed: Option<Integer>,
    /// Choices; unset is 1.
    pub n: Option<Integer>,
    /// Lower goes first; unset is 0.
    pub priority: Option<Integer>,
    /// Name of the field that `max_tokens` came from, for errors; empty is `max_tokens`.
    pub max_tokens_field: &'static str,
    /// Most tokens per choice; unset is `default_max_tokens`.
    pub max_tokens: Option<Integer>,
    /// What unset `max_tokens` means, as far as the context has room; `None` is the model's default, else the whole room.
    pub default_max_tokens: Option<u32>,
    /// Tokens before any may end the choice.
    pub min_tokens: Option<Integer>,
    /// Stop strings.
    pub stop: Vec<String>,
    /// Stop tokens.
    pub stop_token_ids: Vec<Integer>,
    /// See [`StopConditions`].
    pub ignore_eos: bool,
    /// See [`StopConditions`].
    pub include_stop_str_in_output: bool,
    /// Unset is true.
    pub skip_special_tokens: Option<bool>,
    /// Special tokens that texts show all the same.
    pub shown_tokens: Vec<TokenId>,
    /// Alternatives per output token; unset is no scores.
    pub logprobs: Option<Integer>,
    /// Alternatives per prompt token; unset is no scores.
    pub prompt_logprobs: Option<Integer>,
    /// Whether the prompt is scored even if `prompt_logprobs` is unset. Then `max_tokens` may be 0.
    pub score_prompt: bool,
    /// What the output has to follow.
    pub structured: Option<Wanted>,
    /// How long it may think.
    pub thought_budget: Option<ThoughtBudget>,
    /// The same once it is known how the model thinks, and the field that it came in.
    pub thought_limit: Option<(String, ThoughtLimit)>,
    /// The only tokens that may be chosen; `None` is all.
    pub allowed_token_ids: Option<Vec<Integer>>,
    /// Words that may not be written.
    pub bad_words: Vec<String>,
    /// How many of a prompt's tokens are read, the last ones; -1 is as many as fit, unset is all.
    pub truncate_prompt_tokens: Option<Integer>,
    /// Requests share what is computed of prompts with those of the same salt alone; unset is none.
    pub cache_salt: Option<String>,
}

impl RawParams {
    /// Takes the fields that say how tokens are drawn, and with whom prompts are shared, which all of OpenAI's APIs have in common.
    pub fn take_drawing(fields: &mut Fields) -> Result<Self, ApiError> {
        Ok(Self {
            temperature: fields.take("temperature")?,
            top_k: fields.take("top_k")?,
            top_p: fields.take("top_p")?,
            min_p: fields.take("min_p")?,
            repetition_penalty: fields.take("repetition_penalty")?,
            presence_penalty: fields.take("presence_penalty")?,
            frequency_penalty: fields.take("frequency_penalty")?,
            seed: fields.take("seed")?,
            cache_salt: fields.take("cache_salt")?,
            ..Self::default()
        })
    }

    /// Takes the fields that completions and chat completions have in common.
    pub fn take_shared(fields: &mut Fields) -> Result<Self, ApiError> {
        Ok(Self {
            logit_bias: fields.take::<BiasMap>("logit_bias")?.unwrap_or_default().0,
            n: fields.take("n")?,
            priority: fields.take("priority")?,
            max_tokens: fields.take("max_tokens")?,
            min_tokens: fields.take("min_tokens")?,
            stop: fields.take::<StopList>("stop")?.unwrap_or_default().0,
            stop_token_ids: fields.take("stop_token_ids")?.unwrap_or_default(),
            ignore_eos: fields.flag("ignore_eos")?,
            include_stop_str_in_output: fields.flag("include_stop_str_in_output")?,
            skip_special_tokens: fields.take("skip_special_tokens")?,
            prompt_logprobs: fields.take("prompt_logprobs")?,
            structured: structured::take(fields)?,
            allowed_token_ids: fields.take("allowed_token_ids")?,
            bad_words: fields.take("bad_words")?.unwrap_or_default(),
            truncate_prompt_tokens: fields.take("truncate_prompt_tokens")?,
            ..Self::take_drawing(fields)?
        })
    }
}

/// `stop`: one string, or several.
#[derive(Default)]
struct StopList(Vec<String>);

impl FromJson for StopList {
    fn from_json(value: Value, at: &str) -> Result<Self, ApiError> {
        match value {
            Value::String(one) => Ok(Self(vec![one])),
            Value::Array(_) => FromJson::from_json(value, at).map(Self),
            other => Err(ApiError::wrong_type(at, "a string or a list of strings", kind(&other))),
        }
    }
}

/// `logit_bias`: an object from token ids, written as strings, to numbers.
#[derive(Default)]
struct BiasMap(Vec<(Integer, f32)>);

impl FromJson for BiasMap {
    fn from_json(value: Value, at: &str) -> Result<Self, ApiError> {
        let entries = Fields::from_json(value, at)?.into_entries().into_iter();
        let entry = |(key, bias): (String, Value)| {
            let id = key.parse::<Integer>().map_err(|_| ApiError::invalid(at, "has a key that is not a token id"))?;
            Ok((id, f32::from_json(bias, &format!("{at}.{id}"))?))
        };
        entries.map(entry).collect::<Result<_, _>>().map(Self)
    }
}

/// Checked parameters, still without a prompt.
#[derive(Debug, Clone)]
pub struct Params {
    sampling: SamplingParams,
    seed: Option<u64>,
    /// Choices per prompt.
    pub n: u32,
    priority: i32,
    max_tokens_field: &'static str,
    max_tokens: Option<u32>,
    default_max_tokens: u32,
    stop: StopConditions,
    truncation: Option<Truncation>,
    cache_root: Seal,
}

/// How many of a prompt's tokens are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Truncation {
    /// The last ones, so many.
    Last(usize),
    /// As many of the last ones as leave room for the output.
    Fitting,
}

impl Params {
    /// Checks everything that does not depend on the prompt.
    pub fn check(raw: RawParams, model: &ServedModel) -> Result<Self, ApiError> {
        let defaults = model.defaults;
        let max_tokens_field = if raw.max_tokens_field.is_empty() { "max_tokens" } else { raw.max_tokens_field };
        let positive = |name, value: Option<f32>, default, most| match value.unwrap_or(default) {
            x if x > 0.0 && x <= most => Ok(x),
            _ => Err(ApiError::invalid(name, format!("must be greater than 0 and at most {most}"))),
        };
        let n_vocab = Integer::try_from(model.vocab).unwrap_or(Integer::MAX);
        let token = |name: &str, id: Integer| -> Result<TokenId, ApiError> {
            TokenId::try_from(id).ok().filter(|_| id < n_vocab).ok_or_else(|| {
                ApiError::invalid(name, format!("has the token id {id}, but ids are from 0 to {}", n_vocab - 1))
            })
        };
        let logprobs = in_range("logprobs", raw.logprobs, 0..=MAX_LOGPROBS)?;
        let prompt_logprobs = in_range("prompt_logprobs", raw.prompt_logprobs, 0..=MAX_LOGPROBS)?;
        // One request is scored once: with as many alternatives as the greediest of echo and prompt_logprobs wants.
        let echoed = raw.score_prompt.then(|| logprobs.unwrap_or(0));
        let prompt_logprobs = prompt_logprobs.max(echoed);
        let least_tokens = u32::from(prompt_logprobs.is_none());
        at_most("stop", "strings", raw.stop.len(), MAX_STOP_STRINGS)?;
        if raw.stop.iter().any(|s| s.is_empty() || s.len() > MAX_STOP_BYTES) {
            return Err(ApiError::invalid("stop", format!("must have strings of 1 to {MAX_STOP_BYTES} bytes")));
        }
        at_most("stop_token_ids", "ids", raw.stop_token_ids.len(), MAX_STOP_TOKENS)?;
        at_most("logit_bias", "entries", raw.logit_bias.len(), MAX_LOGIT_BIAS)?;
        let bias = |(id, bias): &(Integer, f32)| -> Result<LogitBias, ApiError> {
            let bias = number_in("logit_bias", Some(*bias), 0.0, -100.0..=100.0)?;
            Ok(LogitBias { token_id: token("logit_bias", *id)?, bias })
        };
        let stop_token = |id: &Integer| token("stop_token_ids", *id);
        let seeds = Integer::from(i64::MIN)..=Integer::from(u64::MAX);
        if raw.seed.is_some_and(|seed| !seeds.contains(&seed)) {
            return Err(ApiError::invalid("seed", "must be an integer of 64 bits"));
        }
        let priorities = Integer::from(i32::MIN)..=Integer::from(i32::MAX);
        let priority = in_integer_range("priority", raw.priority, priorities)?;
        let top_k = in_integer_range("top_k", raw.top_k, -1..=Integer::from(u32::MAX))?;
        let allowed_token_ids =
            forbidden::allowed(raw.allowed_token_ids.as_deref(), |id| token("allowed_token_ids", id))?;
        let bad_words = forbidden::bad_words(&raw.bad_words, &model.tokenizer)?;
        let stop = StopConditions {
            strings: raw.stop,
            token_ids: raw.stop_token_ids.iter().map(stop_token).collect::<Result<_, _>>()?,
            ignore_eos: raw.ignore_eos,
            include_in_output: raw.include_stop_str_in_output,
            skip_special_tokens: raw.skip_special_tokens.unwrap_or(true),
            shown_tokens: raw.shown_tokens,
        };
        let min_tokens = in_range("min_tokens", raw.min_tokens, 0..=u32::MAX)?.unwrap_or(0);
        let held_back = stop.token_ids.iter().chain(&model.eos).copied().filter(|_| min_tokens > 0);
        if raw.structured.is_some() && !(allowed_token_ids.is_empty() && bad_words.is_empty()) {
            let field = if bad_words.is_empty() { "allowed_token_ids" } else { "bad_words" };
            return Err(ApiError::invalid(
                field,
                "can't stand beside a grammar: there may come a moment without any token",
            ));
        }
        forbidden::check_choice_is_left(&allowed_token_ids, &bad_words, held_back, model.vocab)?;
        let truncation = match raw.truncate_prompt_tokens {
            Some(-1) => Some(Truncation::Fitting),
            n => in_range("truncate_prompt_tokens", n, 1..=u32::MAX)?.map(|n| Truncation::Last(n as usize)),
        };
        let mut params = Self {
            sampling: SamplingParams {
                temperature: number_in("temperature", raw.temperature.or(defaults.temperature), 1.0, 0.0..=2.0)?,
                // -1 keeps all, too.
                top_k: top_k.map_or(defaults.top_k, |k| u32::try_from(k).ok()).unwrap_or(0),
                top_p: positive("top_p", raw.top_p.or(defaults.top_p), 1.0, 1.0)?,
                min_p: number_in("min_p", raw.min_p.or(defaults.min_p), 0.0, 0.0..=1.0)?,
                repetition_penalty: positive(
                    "repetition_penalty",
                    raw.repetition_penalty.or(defaults.repetition_penalty),
                    1.0,
                    10.0,
                )?,
                presence_penalty: number_in("presence_penalty", raw.presence_penalty, 0.0, -2.0..=2.0)?,
                frequency_penalty: number_in("frequency_penalty", raw.frequency_penalty, 0.0, -2.0..=2.0)?,
                logit_bias: raw.logit_bias.iter().map(bias).collect::<Result<_, _>>()?,
                seed: 0,
                min_tokens,
                suppressed_token_ids: Vec::new(),
                logprobs,
                prompt_logprobs,
                grammar: raw.structured.map(|w| grammars::to_wire(w.grammar, w.field, raw.ignore_eos)),
                allowed_token_ids,
                bad_words,
            },
            // Two's complement: distinct seeds stay distinct, but for those beyond i64 that alias the negative ones.
            seed: raw.seed.map(|seed| seed as u64),
            n: in_range("n", raw.n, 1..=MAX_N)?.unwrap_or(1),
            priority: priority.and_then(|p| i32::try_from(p).ok()).unwrap_or(0),
            max_tokens_field,
            max_tokens: in_range(max_tokens_field, raw.max_tokens, least_tokens..=u32::MAX)?,
            default_max_tokens: raw.default_max_tokens.or(defaults.max_new_tokens).unwrap_or(u32::MAX),
            stop,
            truncation,
            cache_root: match &raw.cache_salt {
                None => Seal::EMPTY,
                Some(salt) if (1..=MAX_SALT_BYTES).contains(&salt.len()) => Seal::root(salt),
                Some(_) => {
                    return Err(ApiError::invalid("cache_salt", format!("must have 1 to {MAX_SALT_BYTES} bytes")));
                }
            },
        };
        if let Some((field, limit)) = raw.thought_limit {
            budget::check_end_may_come(&field, &limit, &params.sampling)?;
            grammars::limit_thoughts(&mut params.sampling.grammar, field, limit);
        }
        Ok(params)
    }

    /// Whether the client named a seed.
    pub fn has_seed(&self) -> bool {
        self.seed.is_some()
    }

    /// Whether tokens are drawn rather than the most probable ones taken.
    pub fn draws(&self) -> bool {
        self.sampling.temperature > 0.0
    }

    /// How tokens are chosen, but for the seed.
    pub fn sampling(&self) -> &SamplingParams {
        &self.sampling
    }

    /// Whether output tokens are scored.
    pub fn wants_scores(&self) -> bool {
        self.sampling.logprobs.is_some()
    }

    /// Whether special tokens are left out of texts.
    pub fn skip_special_tokens(&self) -> bool {
        self.stop.skip_special_tokens
    }

    /// Leaves the last tokens of a prompt, if that was asked for; whether any are cut off.
    pub fn truncate(&self, prompt: &mut Vec<TokenId>, model: &ServedModel) -> bool {
        let kept = match self.truncation {
            None => return false,
            Some(Truncation::Last(n)) => n,
            Some(Truncation::Fitting) => {
                let output = self.max_tokens.unwrap_or(if self.default_max_tokens == u32::MAX {
                    1
                } else {
                    self.default_max_tokens
                });
                model.max_model_len.saturating_sub(output as usize).max(1)
            }
        };
        let n_cut = prompt.len().saturating_sub(kept);
        prompt.drain(..n_cut);
        n_cut > 0
    }

    /// A request for a prompt, which must fit the context together with the output. `prompt_field` names it in errors.
    pub fn request(
        &self,
        id: String,
        prompt_field: &str,
        mut prompt: Vec<TokenId>,
        model: &ServedModel,
        deadline: Option<Instant>,
    ) -> Result<Request, ApiError> {
        self.truncate(&mut prompt, model);
        let (context, n_prompt) = (model.max_model_len, prompt.len());
        if n_prompt == 0 {
            return Err(ApiError::invalid(prompt_field, "must not be empty"));
        }
        let room = context.saturating_sub(n_prompt);
        let default = self.default_max_tokens.min(u32::try_from(room).unwrap_or(u32::MAX));
        let max_tokens = self.max_tokens.unwrap_or(default.max(1));
        if n_prompt > context || max_tokens as usize > room {
            return Err(too_long(prompt_field, context, n_prompt, &format!("{max_tokens}"), self.max_tokens_field));
        }
        let min_tokens = self.sampling.min_tokens;
        if min_tokens > max_tokens {
            let reason = format!("is {min_tokens}, more than '{}', {max_tokens}", self.max_tokens_field);
            return Err(ApiError::invalid("min_tokens", reason));
        }
        let seed = self.seed.unwrap_or_else(random_seed);
        let sampling = SamplingParams { seed, ..self.sampling.clone() };
        let is_open_ended = self.max_tokens.is_none() && self.default_max_tokens == u32::MAX;
        Ok(Request {
            id,
            prompt,
            n: self.n,
            sampling,
            max_tokens,
            is_open_ended,
            stop: self.stop.clone(),
            deadline,
            priority: self.priority,
            cache_root: self.cache_root,
            resume: Vec::new(),
        })
    }
}

/// Prompt and output don't fit.
pub fn too_long(
    prompt_field: &str,
    context: usize,
    n_prompt: impl Display,
    max_tokens: &str,
    max_tokens_field: &str,
) -> ApiError {
    let message = format!(
        "'{prompt_field}' is too long: the model's context length is {context} tokens, but the prompt has {n_prompt} and \
         '{max_tokens_field}' is {max_tokens}: shorten the prompt or ask for fewer tokens"
    );
    ApiError::context_exceeded(prompt_field, message)
}

/// An integer within bounds; unset stays unset.
pub fn in_range(name: &str, value: Option<Integer>, range: RangeInclusive<u32>) -> Result<Option<u32>, ApiError> {
    let wide = Integer::from(*range.start())..=Integer::from(*range.end());
    Ok(in_integer_range(name, value, wide)?.and_then(|x| u32::try_from(x).ok()))
}

fn in_integer_range(
    name: &str,
    value: Option<Integer>,
    range: RangeInclusive<Integer>,
) -> Result<Option<Integer>, ApiError> {
    match value {
        Some(x) if !range.contains(&x) => {
            let reason = format!("must be an integer from {} to {}, got {x}", range.start(), range.end());
            Err(ApiError::invalid(name, reason))
        }
        other => Ok(other),
    }
}

/// A number within bounds. NaN, which gRPC can carry, is in none.
fn number_in(name: &str, value: Option<f32>, default: f32, range: RangeInclusive<f32>) -> Result<f32, ApiError> {
    let x = value.unwrap_or(default);
    if !range.contains(&x) {
        return Err(ApiError::invalid(name, format!("must be from {} to {}, got {x}", range.start(), range.end())));
    }
    Ok(x)
}

/// A list within its bound.
pub fn at_most(name: &str, what: &str, got: usize, most: usize) -> Result<(), ApiError> {
    if got > most {
        return Err(ApiError::invalid(name, format!("has {got} {what}, at most {most} are possible")));
    }
    Ok(())
}

/// A seed for a request that brings none. The fixed bits of a version 4 UUID meet random ones.
fn random_seed() -> u64 {
    let (high, low) = uuid::Uuid::new_v4().as_u64_pair();
    high ^ low
}

#[cfg(test)]
mod tests;
