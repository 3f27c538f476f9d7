//! What happens to a group, and what is to be done about it.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use phalanx_cluster::{
    id::{Epoch, ShardId},
    seal::Seal,
};

use super::seating::SliceOf;
use crate::group::change::ChangeError;

/// Where ranks are to copy their KV rows to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum MirrorTo {
    /// Nowhere.
    #[default]
    Nowhere,
    /// To a spare, if there is one.
    Spare,
    /// Each to the next rank.
    Buddy,
}

/// Who gets copies of whose KV rows in a formation.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Mirrors {
    /// Nobody.
    #[default]
    Nowhere,
    /// This spare, of all ranks.
    Spare(ShardId),
    /// Each rank, of the one before it; the first one, of the last.
    Buddies,
}

impl Mirrors {
    /// Who gets copies of a rank's rows.
    pub fn holder<'a>(&'a self, rank: usize, ranks: &'a [ShardId]) -> Option<&'a ShardId> {
        match self {
            Self::Nowhere => None,
            Self::Spare(shard) => Some(shard),
            Self::Buddies => ranks.get((rank + 1) % ranks.len().max(1)),
        }
    }

    /// How many ranks copy their rows to one shard, of so many.
    pub fn sources(&self, world_size: usize) -> usize {
        match self {
            Self::Nowhere => 0,
            Self::Spare(_) => world_size,
            Self::Buddies => 1,
        }
    }
}

/// A shard that could take a rank.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
    /// Its name.
    pub shard: ShardId,
    /// Which life of its process.
    pub incarnation: u64,
    /// Ranks of one group have this in common: version and numerics.
    pub kind: String,
    /// Memory for weights and KV pages; 0 if it does not say.
    pub memory_bytes: u64,
    /// Whether it takes copies of KV rows.
    pub takes_mirror: bool,
    /// The rank whose KV pages it brought along.
    pub holds: Option<SliceOf>,
    /// Ranks of whose pages it brought copies along.
    pub copies: BTreeSet<SliceOf>,
}

impl Candidate {
    /// Whether it brought pages of this rank along, its own or a copy.
    pub(super) fn has_pages_of(&self, slice: SliceOf) -> bool {
        self.holds == Some(slice) || self.copies.contains(&slice)
    }
}

/// One life of a shard: where a message came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Origin {
    /// Which shard.
    pub shard: ShardId,
    /// Which life of its process.
    pub incarnation: u64,
}

/// Why a formation ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Cause {
    /// A stream broke.
    Lost,
    /// A rank said that it can't go on.
    Failed,
    /// A shard gave no sign of life, or heard none.
    Silent,
    /// A step, or loading, took too long.
    Deadline,
    /// A rank computes much slower than the others, and a spare is there.
    Slow,
    /// A rank is given to another shard on purpose.
    Drain,
    /// A shard is restarted on purpose.
    Rollout,
    /// Another number of ranks.
    Regroup,
    /// A spare is to get copies of KV rows.
    Mirror,
}

impl Cause {
    /// All of them, in their order.
    pub const ALL: [Self; 9] = [
        Self::Lost,
        Self::Failed,
        Self::Silent,
        Self::Deadline,
        Self::Slow,
        Self::Drain,
        Self::Rollout,
        Self::Regroup,
        Self::Mirror,
    ];

    /// As metrics spell it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Lost => "lost",
            Self::Failed => "failed",
            Self::Silent => "silent",
            Self::Deadline => "deadline",
            Self::Slow => "slow",
            Self::Drain => "drain",
            Self::Rollout => "rollout",
            Self::Regroup => "regroup",
            Self::Mirror => "mirror",
        }
    }
}

/// Names one request for a change until it is answered.
pub type Ticket = u64;

/// What a shard says of itself with each sign of life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Beat {
    /// The step that it computes, and of which epoch.
    pub busy: Option<(Epoch, u64)>,
    /// The rank that it waits for in a collective.
    pub waits_for: Option<usize>,
    /// The last step of which it has a whole copy of the rows of all ranks that copy theirs to it, and of all before it; and of
    /// which epoch.
    pub mirrored: Option<(Epoch, u64)>,
}

/// What a rank says when it has loaded its slice.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Slice {
    /// KV blocks that it has memory for.
    pub kv_blocks: u32,
    /// Memory of its weights.
    pub weight_bytes: u64,
    /// Where pages were to be kept: the last step whose rows they hold.
    pub kept_through: Option<u64>,
    /// Where pages were to be kept for what they hold: blocks that are sealed.
    pub sealed: Option<BTreeMap<u32, Seal>>,
}

/// What the pages of a formation hold on every rank.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kept {
    /// The rows of this epoch's steps, up to which one.
    Through(Epoch, u64),
    /// In these blocks the rows of the tokens that their seals name.
    Sealed(Vec<(u32, Seal)>),
}

/// What happens to a group.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// A shard is attached.
    Arrived(Candidate),
    /// A shard is gone.
    Left {
        /// Which.
        from: Origin,
        /// What kind of loss.
        cause: Cause,
        /// Why, for the log.
        reason: String,
    },
    /// The store has this epoch in force for us.
    EpochTaken(Epoch),
    /// The store could not say.
    EpochRefused,
    /// A shard is about to arrive that may know epochs of other groups up to this one.
    Outrun(Epoch),
    /// Time has passed: [`wakes_at`](super::GroupMachine::wakes_at) is reached.
    Tick,
    /// A rank loads.
    Progress {
        /// Who says so.
        from: Origin,
        /// Of which formation.
        epoch: Epoch,
    },
    /// A rank has loaded its slice.
    Loaded {
        /// Who says so.
        from: Origin,
        /// Of which formation.
        epoch: Epoch,
        /// What it has.
        slice: Slice,
    },
    /// A spare has loaded the slice of a rank.
    Prepared {
        /// Who says so.
        from: Origin,
        /// Ranks of the group that the slice is for.
        world_size: usize,
        /// Which rank.
        rank: usize,
    },
    /// A rank takes plans.
    Ready {
        /// Who says so.
        from: Origin,
        /// Of which formation.
        epoch: Epoch,
    },
    /// A rank could not do what was asked.
    Failed {
        /// Who says so.
        from: Origin,
        /// Of which formation.
        epoch: Epoch,
        /// What it said.
        error: String,
    },
    /// A plan was sent to all ranks.
    Planned {
        /// Of which formation.
        epoch: Epoch,
        /// Counts from 1 in each epoch.
        step: u64,
        /// Rows that it computes.
        rows: u32,
    },
    /// A rank finished a step.
    Stepped {
        /// Who says so.
        from: Origin,
        /// Of which formation.
        epoch: Epoch,
        /// Which step.
        step: u64,
    },
    /// A sign of life.
    Beat {
        /// Whose.
        from: Origin,
        /// What it says.
        beat: Beat,
    },
    /// The scheduler was put on hold, and no step is in flight.
    Idle(Epoch),
    /// Every stream that stood still before this formation has a token again.
    Recovered {
        /// Which formation.
        epoch: Epoch,
        /// The longest that one stood still.
        stall: Duration,
    },
    /// A shard was asked to end, and wants to give its rank away first.
    Leaving(Origin),
    /// Take the rank from a shard, and give it none until it is undrained.
    Drain {
        /// For the answer.
        ticket: Ticket,
        /// Which shard.
        shard: ShardId,
        /// Whether another group has a spare, which comes if this group lacks one.
        is_helped: bool,
    },
    /// A drained shard may have a rank again.
    Undrain {
        /// For the answer.
        ticket: Ticket,
        /// Which shard.
        shard: ShardId,
    },
    /// Restart the shards, one after the other.
    Rollout {
        /// Those that are left as they are.
        but: Vec<ShardId>,
        /// Longest wait for one to be there again, if not the usual one.
        return_limit: Option<Duration>,
    },
}

/// What came of a change.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Changed {
    /// Who has the rank now, if there was one.
    pub successor: Option<ShardId>,
    /// How long running requests stood still.
    pub stall: Duration,
}

/// One thing that happened in a rolling restart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Turned {
    /// Whose turn it is; none at the end.
    pub shard: Option<ShardId>,
    /// "draining", "restarting", "returned" or "done".
    pub phase: &'static str,
    /// Shards that are done
    pub done: usize,
    /// of so many.
    pub total: usize,
    /// The longest that running requests stood still in this turn; at the end: in any turn.
    pub stall: Duration,
}

/// What is to be done, in this order.
#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    /// Put an epoch greater than this one in force, by compare-and-swap; answer `EpochTaken` or `EpochRefused`.
    TakeEpoch(Epoch),
    /// Tell these shards their ranks: the index.
    Form {
        /// Of which formation.
        epoch: Epoch,
        /// In rank order.
        ranks: Vec<ShardId>,
        /// KV pages of this epoch are wanted.
        keep_kv_of: Option<Epoch>,
        /// KV pages are wanted whatever formation wrote them, for what their blocks hold.
        keep_sealed: bool,
        /// Who gets copies of KV rows.
        mirrors: Mirrors,
        /// Ranks of which somebody has a copy of the pages that are wanted, and who.
        copies: Vec<(usize, ShardId)>,
    },
    /// Tell all ranks to allocate this many KV blocks and take plans.
    Serve {
        /// Of which formation.
        epoch: Epoch,
        /// Blocks.
        kv_blocks: u32,
    },
    /// Tell the scheduler that plans are taken.
    Serving {
        /// Of which formation.
        epoch: Epoch,
        /// Blocks.
        kv_blocks: u32,
        /// What pages hold.
        kept: Option<Kept>,
    },
    /// Tell the scheduler to plan nothing more, and to say when no step is in flight.
    Hold(Epoch),
    /// Tell the scheduler to plan again.
    Resume(Epoch),
    /// Tell the scheduler that the group is over.
    Lost {
        /// Which formation.
        epoch: Epoch,
        /// What kind of end.
        cause: Cause,
        /// Why.
        reason: String,
        /// Whether it ended on purpose, between two steps.
        is_planned: bool,
    },
    /// Tell a shard to leave the group of this epoch.
    Retire {
        /// Which formation.
        epoch: Epoch,
        /// Who.
        shard: ShardId,
        /// Whether the next formation may want its KV pages.
        keep_kv: bool,
    },
    /// Tell a spare to load the slices of ranks.
    Prepare {
        /// Who.
        shard: ShardId,
        /// Ranks of the group that the slices are for.
        world_size: usize,
        /// Most wanted first.
        ranks: Vec<usize>,
    },
    /// Close the stream of a shard that is taken for dead or stuck.
    Evict {
        /// Whose.
        shard: ShardId,
        /// Why.
        cause: Cause,
    },
    /// Tell a shard to end.
    Shutdown {
        /// Who.
        shard: ShardId,
        /// Why.
        reason: String,
    },
    /// The result that is being handled is rank 0's: pass it to the scheduler.
    Deliver,
    /// A message of another epoch or of a dead process was dropped.
    CountFenced,
    /// A rank is much slower than the others: which shard.
    WarnSlow(ShardId),
    /// Tell who asked for a change.
    Answer(Ticket, Result<Changed, ChangeError>),
    /// Tell who asked for a rolling restart. The end is "done" or an error.
    Turned(Result<Turned, ChangeError>),
    /// The group can't be formed as configured: end with this message, unless another group can.
    GiveUp(String),
}
