//! What a shard knows of a sequence. All ranks know the same.

use std::sync::Arc;

use phalanx_cluster::seal::Seal;
use phalanx_proto::v1::{Grammar, SamplingParams};

use super::seals::SealedPrefix;
use crate::sampler::{Sampling, SamplingError, TokenCounts};

/// A stream of tokens being made.
#[derive(Debug, Clone, PartialEq)]
pub struct Sequence {
    /// All known tokens: prompt, then output.
    pub tokens: Vec<u32>,
    /// How many of them are prompt.
    pub prompt_len: usize,
    /// Positions whose keys and values are in the pages; `None` until the first chunk says how many the prefix cache has.
    pub computed: Option<usize>,
    /// Pages: position p is in `blocks[p / block_size]`.
    pub blocks: Vec<u32>,
    /// Of these, the ones that were sealed for it.
    pub sealed: SealedPrefix,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Score each output token, with this many most probable ones.
    pub logprobs: Option<usize>,
    /// The same for prompt tokens.
    pub prompt_logprobs: Option<usize>,
    /// Where logits depend on them.
    pub counts: Option<TokenCounts>,
    /// What the output has to follow.
    pub grammar: Option<Arc<Grammar>>,
}

impl Sequence {
    /// A sequence of which nothing was computed by this group yet. Its seals begin with `root`.
    ///
    /// # Errors
    /// If a sampling parameter is out of its range.
    pub fn new(
        tokens: Vec<u32>,
        prompt_len: usize,
        blocks: Vec<u32>,
        root: Seal,
        params: &SamplingParams,
    ) -> Result<Self, SamplingError> {
        let sampling = Sampling::try_from(params)?;
        let (prompt, output) = tokens.split_at(prompt_len.min(tokens.len()));
        let counts = (!sampling.keeps_logits()).then(|| TokenCounts::new(prompt, output));
        Ok(Self {
            tokens,
            prompt_len,
            computed: None,
            blocks,
            sealed: SealedPrefix::new(root),
            sampling,
            logprobs: params.logprobs.map(|n| n as usize),
            prompt_logprobs: params.prompt_logprobs.map(|n| n as usize),
            counts,
            grammar: params.grammar.clone().map(Arc::new),
        })
    }

    /// Appends a sampled token.
    pub fn push(&mut self, token: u32) {
        self.tokens.push(token);
        if let Some(counts) = &mut self.counts {
            counts.push(token);
        }
    }

    /// Number of output tokens so far: the index of the next one, and the counter of its random numbers.
    pub fn n_output(&self) -> usize {
        self.tokens.len() - self.prompt_len
    }

    /// Whether the choice needs no more than the largest logit, which ranks find without sending them around.
    pub fn is_plain_greedy(&self) -> bool {
        // Rank 0 alone knows what a grammar allows.
        self.sampling.is_greedy() && self.logprobs.is_none() && self.grammar.is_none()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_replayed_sequence_is_like_in_its_first_life() {
        let params = SamplingParams { presence_penalty: 1.0, ..Default::default() };
        let new = |tokens| Sequence::new(tokens, 2, vec![0], Seal::EMPTY, &params).expect("good parameters");
        let mut first = new(vec![5, 6]);
        first.push(6);
        first.push(7);
        assert_eq!(first.n_output(), 2);
        assert_eq!(first, new(vec![5, 6, 6, 7]));
    }

    #[test]
    fn tokens_are_counted_only_where_logits_depend_on_them() {
        let with = |params| Sequence::new(vec![1], 1, vec![], Seal::EMPTY, &params).expect("good parameters");
        assert!(with(SamplingParams::default()).counts.is_none());
        assert!(with(SamplingParams { frequency_penalty: 0.5, ..Default::default() }).counts.is_some());
    }

    #[test]
    fn scores_make_greedy_look_at_whole_rows() {
        let with = |params| {
            Sequence::new(vec![1], 1, vec![], Seal::EMPTY, &params).expect("good parameters").is_plain_greedy()
        };
        assert!(with(SamplingParams::default()));
        assert!(!with(SamplingParams { logprobs: Some(0), ..Default::default() }));
        assert!(!with(SamplingParams { temperature: 1.0, ..Default::default() }));
        assert!(!with(SamplingParams { grammar: Some(Grammar::default()), ..Default::default() }));
    }
}
