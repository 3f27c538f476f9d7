//! One stream of tokens being made: plain data.
//!
//! There are no phases. A sequence has `known` tokens and `computed` positions, and every plan moves `computed` towards
//! `known`; whether that is a long prompt or one new token is only a matter of how many are missing.

use std::time::Instant;

use phalanx_cluster::id::TokenId;
use phalanx_proto::v1::SamplingParams;

use crate::{kv::block_table::BlockTable, text::decode::OutputText};

/// A request, by its place in the order of arrival.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestKey(pub u64);

/// A choice of a request. Keys sort in order of arrival, which is the order of service.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SequenceKey {
    /// Whose choice.
    pub request: RequestKey,
    /// Which of its choices.
    pub choice: u32,
}

/// What a running sequence has on the shards.
#[derive(Debug)]
pub struct Seat {
    /// Its slot number on the wire.
    pub slot: u32,
    /// Known tokens: prompt, then output. Restored from the journal at admission.
    pub tokens: Vec<TokenId>,
    /// Positions whose keys and values are computed by plans sent so far.
    pub computed: usize,
    /// Where they are.
    pub table: BlockTable,
}

/// One choice of a request.
#[derive(Debug)]
pub struct Sequence {
    /// Who it is.
    pub key: SequenceKey,
    /// Prompt tokens.
    pub prompt_len: usize,
    /// Most output tokens.
    pub max_tokens: usize,
    /// Output tokens so far.
    pub n_output: usize,
    /// Tokens that plans in flight sample: at most one per plan.
    pub n_pending: usize,
    /// How tokens are chosen.
    pub sampling: SamplingParams,
    /// Its text.
    pub text: OutputText,
    /// When its last token came.
    pub last_token_at: Option<Instant>,
    /// Present while it runs.
    pub seat: Option<Seat>,
}

impl Sequence {
    /// Tokens that are known to the coordinator.
    pub fn n_known(&self) -> usize {
        self.prompt_len + self.n_output
    }

    /// Tokens that the shards know when all plans sent so far are done.
    pub fn n_planned(&self) -> usize {
        self.n_known() + self.n_pending
    }

    /// Whether plans in flight bring the last token that it may have.
    pub fn is_planned_to_its_end(&self) -> bool {
        self.n_output + self.n_pending >= self.max_tokens
    }

    /// Whether it only has its prompt computed, for the scores.
    pub fn is_score_only(&self) -> bool {
        self.max_tokens == 0
    }
}
