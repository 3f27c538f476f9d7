//! From logits to a token: pure functions over one row.
//!
//! [`sample`] applies [`penalties`], then temperature and filters. [`score()`] says how probable the model found a token.
//! Draws are a function of the sequence's seed and of the token's place in the output, so that a replayed sequence goes
//! on with the same tokens.

mod filter;
pub mod penalties;
mod score;
mod select;

use phalanx_kernels::rng;
use phalanx_proto::v1::SamplingParams;

use self::select::Candidate;
pub use self::{
    filter::Scratch,
    penalties::TokenCounts,
    score::{Score, score},
};

/// Temperatures below this are greedy: dividing by them would overflow.
const LEAST_TEMPERATURE: f32 = 1e-5;

/// What can be wrong with a row or with what is asked of it.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum SamplingError {
    /// A parameter is out of its range.
    #[error("sampling parameter {name}: want {want}, got {got}")]
    Parameter {
        /// Its name.
        name: &'static str,
        /// Its range.
        want: &'static str,
        /// Its value.
        got: f32,
    },
    /// No token can be chosen.
    #[error("none of {vocab_size} logits is above minus infinity: all tokens are held back, or the weights are broken")]
    NoCandidate {
        /// Length of the row.
        vocab_size: usize,
    },
    /// A token is not in the vocabulary.
    #[error("token {token_id} is not in a vocabulary of {vocab_size}")]
    UnknownToken {
        /// The token.
        token_id: u32,
        /// Length of the row.
        vocab_size: usize,
    },
}

/// How the next token of a sequence is chosen, checked. See `SamplingParams` of the wire for units and ranges.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    temperature: f32,
    /// Number of tokens kept; none keeps all.
    top_k: Option<usize>,
    top_p: f32,
    min_p: f32,
    repetition_penalty: f32,
    presence_penalty: f32,
    frequency_penalty: f32,
    logit_bias: Vec<(u32, f32)>,
    seed: u64,
    min_tokens: u32,
    suppressed_token_ids: Vec<u32>,
    /// Ascending; none are all.
    allowed_token_ids: Vec<u32>,
    /// Each at least one token long.
    bad_words: Vec<Vec<u32>>,
}

impl Sampling {
    /// The most probable token, always.
    #[must_use]
    pub fn greedy() -> Self {
        Self {
            temperature: 0.0,
            top_k: None,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: 0,
            min_tokens: 0,
            suppressed_token_ids: Vec::new(),
            allowed_token_ids: Vec::new(),
            bad_words: Vec::new(),
        }
    }

    /// Whether the row's most probable token is always chosen, so that no draw is made.
    #[must_use]
    pub fn is_greedy(&self) -> bool {
        self.temperature < LEAST_TEMPERATURE
    }

    /// Tokens that may not be chosen as the output's token of this index.
    #[must_use]
    pub fn held_back(&self, output_idx: u64) -> &[u32] {
        if output_idx < u64::from(self.min_tokens) { &self.suppressed_token_ids } else { &[] }
    }

    /// The same, but that nothing is held back.
    #[must_use]
    pub fn without_minimum(&self) -> Self {
        Self { min_tokens: 0, ..self.clone() }
    }

    /// Whether logits stay as they are before the choice; then no counts are needed.
    #[must_use]
    pub fn keeps_logits(&self) -> bool {
        self.repetition_penalty == 1.0
            && self.presence_penalty == 0.0
            && self.frequency_penalty == 0.0
            && self.logit_bias.is_empty()
            && (self.min_tokens == 0 || self.suppressed_token_ids.is_empty())
            && self.allowed_token_ids.is_empty()
            && self.bad_words.is_empty()
    }
}

impl TryFrom<&SamplingParams> for Sampling {
    type Error = SamplingError;

    /// Checks ranges. `top_p` and `repetition_penalty` are off if they are 0, which is how the wire leaves them out.
    fn try_from(params: &SamplingParams) -> Result<Self, SamplingError> {
        // Comparisons with NaN are false: NaN is out of every range.
        let check = |name, want, got: f32, is_good: bool| {
            if is_good { Ok(got) } else { Err(SamplingError::Parameter { name, want, got }) }
        };
        let off_at_zero = |value: f32| if value == 0.0 { 1.0 } else { value };
        let (t, p, m, r) =
            (params.temperature, off_at_zero(params.top_p), params.min_p, off_at_zero(params.repetition_penalty));
        let (presence, frequency) = (params.presence_penalty, params.frequency_penalty);
        let two = -2.0..=2.0;
        Ok(Self {
            temperature: check("temperature", "0 to 100", t, (0.0..=100.0).contains(&t))?,
            top_k: (params.top_k > 0).then_some(params.top_k as usize),
            top_p: check("top_p", "above 0, at most 1", p, p > 0.0 && p <= 1.0)?,
            min_p: check("min_p", "0 to 1", m, (0.0..=1.0).contains(&m))?,
            repetition_penalty: check("repetition_penalty", "above 0, at most 10", r, r > 0.0 && r <= 10.0)?,
            presence_penalty: check("presence_penalty", "-2 to 2", presence, two.contains(&presence))?,
            frequency_penalty: check("frequency_penalty", "-2 to 2", frequency, two.contains(&frequency))?,
            logit_bias: params
                .logit_bias
                .iter()
                .map(|bias| {
                    check("logit_bias", "a finite number", bias.bias, bias.bias.is_finite())
                        .map(|value| (bias.token_id, value))
                })
                .collect::<Result<_, _>>()?,
            seed: params.seed,
            min_tokens: params.min_tokens,
            suppressed_token_ids: params.suppressed_token_ids.clone(),
            allowed_token_ids: {
                let mut ids = params.allowed_token_ids.clone();
                ids.sort_unstable();
                ids
            },
            bad_words: {
                let runs = params.bad_words.iter().map(|run| run.token_ids.clone());
                runs.filter(|run| !run.is_empty()).collect()
            },
        })
    }
}

/// Chooses the next token of a sequence.
///
/// `logits`: `[vocabulary]`, raw; changed by penalties and biases. `counts`: the sequence's tokens so far; their number in
/// the output is the counter of the draw. NaN logits are never chosen.
///
/// # Errors
/// [`SamplingError::NoCandidate`] if all logits are NaN or minus infinity.
pub fn sample(
    sampling: &Sampling,
    counts: &TokenCounts,
    logits: &mut [f32],
    scratch: &mut Scratch,
) -> Result<u32, SamplingError> {
    penalties::apply(sampling, counts, 0, logits);
    choose(sampling, counts.output_len(), logits, scratch)
}

/// [`sample`] for logits to which [`penalties::apply`] was applied already (on the ranks, to a slice each).
///
/// `output_idx`: index of the chosen token in the output, the counter of the draw.
///
/// # Errors
/// As [`sample`].
pub fn choose(
    sampling: &Sampling,
    output_idx: u64,
    logits: &[f32],
    scratch: &mut Scratch,
) -> Result<u32, SamplingError> {
    let best = scratch.math.largest(logits).ok_or(SamplingError::NoCandidate { vocab_size: logits.len() })?;
    // An index is below the length of the row, and ids are 32 bits wide.
    let best = Candidate { logit: best.0, token_id: best.1 as u32 };
    if sampling.is_greedy() || sampling.top_k == Some(1) {
        return Ok(best.token_id);
    }
    let draw = rng::uniform(sampling.seed, output_idx, 0);
    Ok(filter::draw(&sampling.into(), best, logits, draw, scratch))
}

#[cfg(test)]
mod tests;
