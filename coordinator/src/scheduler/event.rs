//! What the scheduler is told and what it answers.

use std::time::Duration;

use phalanx_cluster::seal::Seal;
use phalanx_proto::v1::{StepPlan, StepResult};

use super::ending::{Ended, Ending};
use crate::{
    request::{Request, RequestEvent},
    sequence::RequestKey,
};

/// Limits of a step and of the model, fixed for the life of the process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Positions of a KV block.
    pub block_size: usize,
    /// Most rows of a step (`--max-num-batched-tokens`), at least 1.
    pub max_step_rows: usize,
    /// Most sequences that run (`--max-num-seqs`), at least 1.
    pub max_running: usize,
    /// Most tokens of a sequence, prompt and output.
    pub max_model_len: usize,
    /// Token ids are below it.
    pub vocab: usize,
    /// Whether sequences share the blocks of equal beginnings (`--enable-prefix-caching`).
    pub prefix_caching: bool,
}

/// How much trouble a request may meet before it is given up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Recovery {
    /// How often a request is computed again without progress (`--max-replays`), at least once: at one more loss it fails.
    pub max_replays: u32,
    /// How long requests wait while no group serves (`--no-group-timeout`).
    pub no_group_timeout: Duration,
}

impl Default for Recovery {
    fn default() -> Self {
        Self { max_replays: 3, no_group_timeout: Duration::from_secs(60) }
    }
}

/// What the KV pages of a new group hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kept {
    /// What an epoch of this leadership left.
    Rows {
        /// Epoch whose plans wrote the rows.
        epoch: u64,
        /// All rows that steps up to this one wrote are there, on every rank, and so are the rows that were there when the
        /// epoch began; 0: only those.
        through_step: u64,
    },
    /// Blocks in which every rank has the rows of the tokens that the seals name, whoever had them computed.
    Sealed(Vec<(u32, Seal)>),
}

/// Something that happened.
#[derive(Debug, Clone)]
pub enum Event {
    /// A request came. Keys are distinct; requests of equal priority are served in order of their keys.
    Submit(RequestKey, Box<Request>),
    /// Nobody waits for the request any more.
    Cancel(RequestKey),
    /// A group takes plans from step 1 on.
    GroupServing {
        /// Epoch of its plans.
        epoch: u64,
        /// KV blocks on every rank.
        n_blocks: usize,
        /// What they hold; empty if nothing is said.
        kept: Option<Kept>,
    },
    /// The group is over.
    GroupLost {
        /// Which.
        epoch: u64,
        /// Whether it ended on purpose.
        is_planned: bool,
    },
    /// Plan nothing more, and say when no step is in flight.
    Hold {
        /// Which group.
        epoch: u64,
    },
    /// Plan again.
    Resume {
        /// Which group.
        epoch: u64,
    },
    /// Rank 0 finished a step.
    Stepped(StepResult),
    /// Time has passed.
    Tick,
}

/// Something to do. Actions are done in the order of the list.
#[derive(Debug, Clone)]
pub enum Action {
    /// Send a plan to all ranks.
    SendPlan(StepPlan),
    /// Tell the group of this epoch that it was put on hold and has no step in flight.
    Idle(u64),
    /// Tell the group of this epoch, once, that every stream that stood still before it served has a token again.
    Recovered {
        /// Which group.
        epoch: u64,
        /// The longest that one stood still.
        stall: Duration,
    },
    /// Tell a client. After `Finished` or `Failed` the request is forgotten.
    Emit(RequestKey, RequestEvent),
    /// A request left the queue: it runs for the first time.
    Admitted(RequestKey),
    /// Record a measurement.
    Measure(Measure),
    /// Log that a shard broke its contract.
    Warn(String),
}

/// A measurement.
#[derive(Debug, Clone, PartialEq)]
pub enum Measure {
    /// Prompt tokens came in.
    PromptTokens(usize),
    /// The prefix cache was asked.
    PrefixLookup {
        /// For so many tokens.
        n_queried: usize,
        /// And had so many.
        n_hit: usize,
    },
    /// A request runs for the first time.
    Prefilling {
        /// With so many prompt tokens.
        n_prompt: usize,
        /// Of which the prefix cache had these.
        n_cached: usize,
    },
    /// A sequence was put back because blocks ran out.
    Preempted,
    /// A request's first token, so long after its arrival.
    FirstToken(Duration),
    /// A token, so long after the one before it in its sequence.
    InterToken(Duration),
    /// A token was generated.
    Token,
    /// Positions are computed again that had been computed before a loss.
    Replayed(usize),
    /// The first token of a running sequence after a loss, so long after its last one before.
    Stalled(Duration),
    /// A step came back.
    Step {
        /// Sequences in it.
        n_sequences: usize,
        /// Rows in it.
        n_rows: usize,
        /// Wall time on rank 0.
        took: Duration,
    },
    /// A message of another epoch was dropped.
    Fenced,
    /// A choice is complete.
    Completed(Ending),
    /// A request is over.
    Ended(Box<Ended>),
}

/// Numbers of the present state.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Status {
    /// Sequences that wait for blocks or a place.
    pub n_waiting: usize,
    /// Those of them that wait for the prompt of their request's first choice.
    pub n_held: usize,
    /// Sequences that run.
    pub n_running: usize,
    /// Steps whose result is awaited.
    pub n_in_flight: usize,
    /// Blocks that sequences hold.
    pub n_blocks_used: usize,
    /// Blocks there are; 0 while no group serves.
    pub n_blocks: usize,
    /// Live requests.
    pub n_requests: usize,
    /// Epoch of the serving group.
    pub epoch: Option<u64>,
}
