//! One stream of tokens being made: plain data.
//!
//! There are no phases. A sequence has `known` tokens and `computed` positions, and every plan moves `computed` towards
//! `known`; whether that is a long prompt or one new token is only a matter of how many are missing.

use std::time::Instant;

use phalanx_cluster::id::TokenId;
use phalanx_proto::v1::SamplingParams;

use crate::{coverage::Coverage, kv::block_table::BlockTable, text::decode::OutputText};

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

/// A running sequence's place in the order of service. The last ones give their blocks up first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Turn {
    /// Lower goes first.
    pub priority: i32,
    /// Among equals the oldest goes first.
    pub key: SequenceKey,
}

/// A waiting sequence's place in the queue.
///
/// Those that ran when a group was lost go first, and of these the ones that clients are in the middle of reading. Among equals of
/// these the shortest goes first. In any order the last one goes on when all rows are computed, so the longest stall is the
/// same; the sum of all stalls is the least this way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// `false` goes first.
    pub is_new: bool,
    /// Lower goes first.
    pub priority: i32,
    /// `false` goes first: it ran, and a client has some of its tokens.
    pub is_unread: bool,
    /// Positions to compute again.
    pub n_replayed: usize,
    /// Among equals the oldest goes first.
    pub key: SequenceKey,
}

/// What a running sequence has on the shards.
#[derive(Debug)]
pub struct Seat {
    /// Its slot number on the wire, from the first plan of the epoch that computes rows of it.
    pub slot: Option<u32>,
    /// Known tokens: prompt, then output. Restored from the journal at admission.
    pub tokens: Vec<TokenId>,
    /// Positions whose keys and values are computed by plans sent so far.
    pub computed: usize,
    /// How many of them are after each of those plans.
    pub coverage: Coverage,
    /// Where they are.
    pub table: BlockTable,
}

/// One choice of a request.
#[derive(Debug)]
pub struct Sequence {
    /// Who it is.
    pub key: SequenceKey,
    /// Lower goes first.
    pub priority: i32,
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
    /// Positions below this were computed before a loss; 0 once they are there again.
    pub replay_until: usize,
    /// When the last token before a loss came, until the first one after it.
    pub stalled_since: Option<Instant>,
    /// Its place in the queue while it waits there.
    pub waits_at: Option<Place>,
    /// Present while it runs.
    pub seat: Option<Seat>,
}

impl Sequence {
    /// Its place among those that run.
    pub fn turn(&self) -> Turn {
        Turn { priority: self.priority, key: self.key }
    }

    /// Its place among those that wait, now.
    pub fn place(&self) -> Place {
        Place {
            is_new: self.replay_until == 0,
            priority: self.priority,
            is_unread: self.replay_until == 0 || self.n_output == 0,
            n_replayed: self.replay_until,
            key: self.key,
        }
    }

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
