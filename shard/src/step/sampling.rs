//! From rows of logits to the tokens and scores of the wire.

use bytemuck::{Pod, Zeroable};
use phalanx_cluster::grammar::Mask;
use phalanx_kernels::RowMath;
use phalanx_proto::v1::{TokenScore, TopToken};

use super::{grammar::Refusal, sequence::Sequence};
use crate::sampler::{self, SamplingError, Score, Scratch, penalties};

/// What ranks tell each other where no token can be chosen. Such a row is the end of its own sequence only: the others of
/// the step are not to blame, and all ranks know of it.
pub(super) const NO_TOKEN: u32 = u32::MAX;

/// The best token of a rank's slice of the vocabulary, as ranks send it to each other.
#[derive(Debug, Clone, Copy, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub(super) struct Candidate {
    logit: f32,
    /// Index in the whole vocabulary.
    token: u32,
}

impl Candidate {
    /// Loses to every token that can be chosen.
    pub(super) const NONE: Self = Self { logit: f32::NEG_INFINITY, token: NO_TOKEN };

    /// A token; NaN is as bad as minus infinity: neither can be chosen.
    pub(super) fn new(logit: f32, token: u32) -> Self {
        if logit > f32::NEG_INFINITY { Self { logit, token } } else { Self::NONE }
    }

    /// The one with the larger logit, or the lower id. Any order of comparing candidates finds the same one.
    pub(super) fn better(self, other: Self) -> Self {
        if other.logit > self.logit || (other.logit == self.logit && other.token < self.token) { other } else { self }
    }

    /// The token, or [`NO_TOKEN`].
    pub(super) fn token(self) -> u32 {
        if self == Self::NONE { NO_TOKEN } else { self.token }
    }
}

/// Memory that rows reuse.
#[derive(Debug, Default)]
pub(super) struct Scratches {
    pub sampler: Scratch,
    /// A row with penalties.
    adjusted: Vec<f32>,
}

impl Scratches {
    /// For sampling with these functions.
    pub fn new(math: RowMath) -> Self {
        Self { sampler: Scratch::new(math), ..Self::default() }
    }
}

/// Applies penalties and biases to the logits of the vocabulary from `vocab_start` on.
pub(super) fn adjust(sequence: &Sequence, vocab_start: usize, logits: &mut [f32]) {
    if let Some(counts) = &sequence.counts {
        penalties::apply(&sequence.sampling, counts, vocab_start as u32, logits);
    }
}

/// Rank 0's choice for a row.
#[derive(Debug, Default)]
pub(super) struct Chosen {
    /// The token, or [`NO_TOKEN`].
    pub token: u32,
    /// Its score, if that is asked for.
    pub score: Option<TokenScore>,
    /// Why there is no token, if it is the grammar's fault.
    pub refusal: Option<Refusal>,
}

/// Chooses the next token of a sequence and scores it, if that is asked for. `allowed`: what the sequence's grammar allows.
/// `logits`: raw, over the whole vocabulary; changed.
pub(super) fn choose(
    sequence: &Sequence,
    allowed: Option<Result<Mask, Refusal>>,
    logits: &mut [f32],
    scratch: &mut Scratches,
) -> Result<Chosen, SamplingError> {
    let allowed = match allowed.transpose() {
        Ok(allowed) => allowed,
        Err(refusal) => return Ok(Chosen { token: NO_TOKEN, score: None, refusal: Some(refusal) }),
    };
    match try_to_choose(sequence, allowed.as_ref(), logits, scratch) {
        Ok((token, score)) => Ok(Chosen { token, score, refusal: None }),
        Err(SamplingError::NoCandidate { .. }) => Ok(Chosen { token: NO_TOKEN, ..Chosen::default() }),
        Err(error) => Err(error),
    }
}

fn try_to_choose(
    sequence: &Sequence,
    allowed: Option<&Mask>,
    logits: &mut [f32],
    scratch: &mut Scratches,
) -> Result<(u32, Option<TokenScore>), SamplingError> {
    let n_output = sequence.n_output() as u64;
    match sequence.logprobs {
        None => {
            restrict(sequence, allowed, logits);
            Ok((sampler::choose(&sequence.sampling, n_output, logits, &mut scratch.sampler)?, None))
        }
        Some(n_top) if sequence.counts.is_none() && allowed.is_none() => {
            let token = sampler::choose(&sequence.sampling, n_output, logits, &mut scratch.sampler)?;
            Ok((token, Some(score(logits, token, n_top, &mut scratch.sampler)?)))
        }
        Some(n_top) => {
            // Scores are of the model, not of what penalties or a grammar make of it.
            let Scratches { sampler, adjusted } = scratch;
            adjusted.clear();
            adjusted.extend_from_slice(logits);
            restrict(sequence, allowed, adjusted);
            let token = sampler::choose(&sequence.sampling, n_output, adjusted, sampler)?;
            Ok((token, Some(score(logits, token, n_top, sampler)?)))
        }
    }
}

/// [`adjust`], and takes away what the grammar does not allow. What a minimum length holds back is not held back where the
/// grammar allows nothing else.
fn restrict(sequence: &Sequence, allowed: Option<&Mask>, logits: &mut [f32]) {
    let Some(allowed) = allowed else { return adjust(sequence, 0, logits) };
    let held_back = sequence.sampling.held_back(sequence.n_output() as u64);
    match &sequence.counts {
        Some(counts) if !held_back.is_empty() && !allowed.has_other_than(held_back) => {
            penalties::apply(&sequence.sampling.without_minimum(), counts, 0, logits);
        }
        _ => adjust(sequence, 0, logits),
    }
    allowed.apply(logits);
}

/// Scores a token. `logits`: raw, over the whole vocabulary.
pub(super) fn score(
    logits: &[f32],
    token: u32,
    n_top: usize,
    scratch: &mut Scratch,
) -> Result<TokenScore, SamplingError> {
    sampler::score(logits, token, n_top, scratch).map(to_wire)
}

fn to_wire(score: Score) -> TokenScore {
    TokenScore {
        token_id: score.token_id,
        logprob: score.logprob,
        rank: score.rank,
        top: score.top.into_iter().map(|(token_id, logprob)| TopToken { token_id, logprob }).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_larger_logit_wins_and_then_the_lower_id() {
        let (a, b, c) = (Candidate::new(1.0, 7), Candidate::new(2.0, 9), Candidate::new(2.0, 3));
        for order in [[a, b, c], [c, b, a], [b, a, c]] {
            assert_eq!(order.into_iter().fold(Candidate::NONE, Candidate::better), c);
        }
    }

    #[test]
    fn what_is_no_number_cant_be_chosen() {
        let nan = Candidate::new(f32::NAN, 0);
        assert_eq!(nan.better(Candidate::new(-1e30, 5)).token(), 5);
        assert_eq!(Candidate::NONE.better(nan).token(), NO_TOKEN);
        assert_eq!(Candidate::new(f32::NEG_INFINITY, 1).token(), NO_TOKEN);
    }
}
