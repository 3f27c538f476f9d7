//! Forming a group: which shards take which rank, in which epoch, and when it may serve. Pure: events in, actions out.
//!
//! ```text
//! Waiting ──enough shards──▶ Taking ──epoch──▶ Loading ──all loaded──▶ Starting ──all ready──▶ Serving
//!    ▲                         │                  │                       │                      │
//!    └──too few────────────────┴────────────────── a rank is lost or has failed ─────────────────┘
//! ```
//!
//! **Invariants.** Epochs of formations grow. No shard has two ranks. Results reach the scheduler from rank 0 of the
//! serving epoch only, and each `Serving` is followed by exactly one `Lost` before the next.

use std::{collections::BTreeMap, time::Duration};

use phalanx_cluster::id::{Epoch, ShardId};

/// Pause after the second failure in a row; doubles from there.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
/// Longest pause between formations.
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// Steps after which a group counts as healthy: failures before are forgotten.
const HEALTHY_STEPS: u32 = 64;

/// A shard that could take a rank.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
    /// Its name.
    pub shard: ShardId,
    /// Which life of its process.
    pub incarnation: u64,
    /// Ranks of one group have this in common: version and numerics.
    pub kind: String,
}

/// One life of a shard: where a message came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Origin {
    /// Which shard.
    pub shard: ShardId,
    /// Which life of its process.
    pub incarnation: u64,
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
        /// Why, for the log.
        cause: String,
    },
    /// The store has this epoch in force for us.
    EpochTaken(Epoch),
    /// The store could not say.
    EpochRefused,
    /// The pause is over.
    PauseOver,
    /// A rank has loaded its slice and has memory for this many KV blocks.
    Loaded {
        /// Who says so.
        from: Origin,
        /// Of which formation.
        epoch: Epoch,
        /// Blocks it has memory for.
        kv_blocks: u32,
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
    /// A rank finished a step.
    Stepped {
        /// Who says so.
        from: Origin,
        /// Of which formation.
        epoch: Epoch,
    },
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
    },
    /// Tell the scheduler that the group is over.
    Lost {
        /// Which formation.
        epoch: Epoch,
        /// Why.
        cause: String,
    },
    /// Tell a shard to leave the group of this epoch.
    Retire {
        /// Which formation.
        epoch: Epoch,
        /// Who.
        shard: ShardId,
    },
    /// The result that is being handled is rank 0's: pass it to the scheduler.
    Deliver,
    /// A message of another epoch or of a dead process was dropped.
    CountFenced,
    /// Send `PauseOver` after this time.
    Pause(Duration),
    /// The group can't be formed as configured: end, with this message.
    GiveUp(String),
}

/// Where a group is.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Phase {
    Waiting,
    Taking,
    Pausing,
    /// Blocks of each rank that has loaded.
    Loading(Vec<Option<u32>>),
    /// Ranks that are ready, and the blocks of all.
    Starting(Vec<bool>, u32),
    Serving,
}

/// The state of one group.
#[derive(Debug, Clone)]
pub struct GroupMachine {
    world_size: usize,
    /// Failures in a row, before anything was served, after which it is not tried again.
    give_up_after: Option<u32>,
    epoch: Epoch,
    phase: Phase,
    attached: BTreeMap<ShardId, Candidate>,
    /// Of the present formation, else of the last one; in rank order.
    ranks: Vec<ShardId>,
    failures: u32,
    healthy_steps: u32,
    has_served: bool,
}

impl GroupMachine {
    /// A group of `world_size` ranks that last had `ranks` in `epoch` (nobody in epoch 0 if it is new). Gives up after
    /// that many failures in a row if it never served.
    pub fn new(world_size: usize, epoch: Epoch, ranks: Vec<ShardId>, give_up_after: Option<u32>) -> Self {
        Self {
            world_size,
            give_up_after,
            epoch,
            phase: Phase::Waiting,
            attached: BTreeMap::new(),
            ranks,
            failures: 0,
            healthy_steps: 0,
            has_served: false,
        }
    }

    /// The latest epoch that is known.
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// As operators know it: "waiting", "forming", "loading" or "serving".
    pub fn phase(&self) -> &'static str {
        match self.phase {
            Phase::Waiting => "waiting",
            Phase::Taking | Phase::Pausing => "forming",
            Phase::Loading(_) | Phase::Starting(..) => "loading",
            Phase::Serving => "serving",
        }
    }

    /// Rank of a shard in the present formation.
    pub fn rank_of(&self, shard: &ShardId) -> Option<usize> {
        if self.is_formed() { self.ranks.iter().position(|r| r == shard) } else { None }
    }

    /// What is missing while the group waits.
    pub fn waits_for(&self) -> Option<String> {
        if self.phase != Phase::Waiting {
            return None;
        }
        let (have, want) = (self.attached.len(), self.world_size);
        Some(if have < want {
            format!("{have} of {want} shards are attached")
        } else {
            format!("{have} shards are attached, but no {want} of them have version and numerics in common")
        })
    }

    fn is_formed(&self) -> bool {
        matches!(self.phase, Phase::Loading(_) | Phase::Starting(..) | Phase::Serving)
    }

    /// Handles one event.
    pub fn step(&mut self, event: Event) -> Vec<Action> {
        match event {
            Event::Arrived(candidate) => {
                let mut actions = Vec::new();
                if let Some(old) = self.attached.insert(candidate.shard.clone(), candidate) {
                    // Its former life ended without a word.
                    actions.extend(self.on_gone(&old.shard, "the process was replaced by a new one"));
                }
                if self.phase == Phase::Waiting {
                    actions.extend(self.try_to_form());
                }
                actions
            }
            Event::Left { from, cause } => {
                if !self.is_attached(&from) {
                    return Vec::new();
                }
                self.attached.remove(&from.shard);
                self.on_gone(&from.shard, &cause)
            }
            Event::EpochTaken(epoch) => self.on_epoch(epoch),
            Event::EpochRefused if self.phase == Phase::Taking => {
                self.phase = Phase::Pausing;
                vec![Action::Pause(FIRST_PAUSE)]
            }
            Event::PauseOver if self.phase == Phase::Pausing => self.try_to_form(),
            Event::EpochRefused | Event::PauseOver => Vec::new(),
            Event::Loaded { from, epoch, kv_blocks } => match self.rank_in(&from, epoch) {
                Some(rank) => self.on_loaded(rank, kv_blocks),
                None => vec![Action::CountFenced],
            },
            Event::Ready { from, epoch } => match self.rank_in(&from, epoch) {
                Some(rank) => self.on_ready(rank),
                None => vec![Action::CountFenced],
            },
            Event::Failed { from, epoch, error } => match self.rank_in(&from, epoch) {
                Some(rank) => self.on_failed(rank, &from.shard, &error),
                None => vec![Action::CountFenced],
            },
            Event::Stepped { from, epoch } => match self.rank_in(&from, epoch) {
                Some(rank) if self.phase == Phase::Serving => self.on_stepped(rank),
                _ => vec![Action::CountFenced],
            },
        }
    }

    fn is_attached(&self, from: &Origin) -> bool {
        self.attached.get(&from.shard).is_some_and(|c| c.incarnation == from.incarnation)
    }

    /// The rank that a message is from, if it belongs to the present formation.
    fn rank_in(&self, from: &Origin, epoch: Epoch) -> Option<usize> {
        if epoch == self.epoch && self.is_attached(from) { self.rank_of(&from.shard) } else { None }
    }

    fn on_gone(&mut self, shard: &ShardId, cause: &str) -> Vec<Action> {
        match self.rank_of(shard) {
            Some(rank) => {
                let mut actions = self.dissolve(&format!("rank {rank} ({shard}) is lost: {cause}"), Some(shard));
                actions.extend(self.try_to_form());
                actions
            }
            None => Vec::new(),
        }
    }

    fn on_epoch(&mut self, epoch: Epoch) -> Vec<Action> {
        if self.phase != Phase::Taking || epoch <= self.epoch {
            return vec![Action::CountFenced];
        }
        self.epoch = epoch;
        // Shards may have left meanwhile.
        match self.select() {
            Some(ranks) => {
                self.ranks.clone_from(&ranks);
                self.phase = Phase::Loading(vec![None; self.world_size]);
                vec![Action::Form { epoch, ranks }]
            }
            None => {
                self.phase = Phase::Waiting;
                Vec::new()
            }
        }
    }

    fn on_loaded(&mut self, rank: usize, kv_blocks: u32) -> Vec<Action> {
        let Phase::Loading(loaded) = &mut self.phase else { return vec![Action::CountFenced] };
        if kv_blocks == 0 {
            let shard = self.ranks[rank].clone();
            return self.on_failed(rank, &shard, "no memory for a single KV block; raise --kv-cache-memory");
        }
        loaded[rank] = Some(kv_blocks);
        let Some(all) = loaded.iter().copied().collect::<Option<Vec<u32>>>() else { return Vec::new() };
        let kv_blocks = all.into_iter().min().unwrap_or(0);
        self.phase = Phase::Starting(vec![false; self.world_size], kv_blocks);
        vec![Action::Serve { epoch: self.epoch, kv_blocks }]
    }

    fn on_ready(&mut self, rank: usize) -> Vec<Action> {
        let Phase::Starting(ready, kv_blocks) = &mut self.phase else { return vec![Action::CountFenced] };
        ready[rank] = true;
        if !ready.iter().all(|r| *r) {
            return Vec::new();
        }
        let kv_blocks = *kv_blocks;
        self.phase = Phase::Serving;
        self.has_served = true;
        self.healthy_steps = 0;
        vec![Action::Serving { epoch: self.epoch, kv_blocks }]
    }

    fn on_stepped(&mut self, rank: usize) -> Vec<Action> {
        if rank != 0 {
            return Vec::new();
        }
        self.healthy_steps = self.healthy_steps.saturating_add(1);
        if self.healthy_steps == HEALTHY_STEPS {
            self.failures = 0;
        }
        vec![Action::Deliver]
    }

    fn on_failed(&mut self, rank: usize, shard: &ShardId, error: &str) -> Vec<Action> {
        self.failures += 1;
        let cause = format!("rank {rank} ({shard}) has failed: {error}");
        let mut actions = self.dissolve(&cause, None);
        if !self.has_served && self.give_up_after.is_some_and(|limit| self.failures >= limit) {
            // Nothing ends this pause: the process is about to.
            self.phase = Phase::Pausing;
            actions.push(Action::GiveUp(cause));
        } else if self.failures == 1 {
            actions.extend(self.try_to_form());
        } else {
            let doublings = (self.failures - 2).min(16);
            self.phase = Phase::Pausing;
            actions.push(Action::Pause((FIRST_PAUSE * 2u32.pow(doublings)).min(LONGEST_PAUSE)));
        }
        actions
    }

    /// Ends the present formation. `gone` needs no message.
    fn dissolve(&mut self, cause: &str, gone: Option<&ShardId>) -> Vec<Action> {
        let epoch = self.epoch;
        let mut actions = Vec::new();
        if self.phase == Phase::Serving {
            actions.push(Action::Lost { epoch, cause: cause.to_owned() });
        }
        // Survivors may hang in a sum that will never be complete: they must hear of it before anything else happens.
        let survivors = self.ranks.iter().filter(|s| Some(*s) != gone && self.attached.contains_key(s));
        actions.extend(survivors.map(|shard| Action::Retire { epoch, shard: shard.clone() }));
        self.phase = Phase::Waiting;
        actions
    }

    fn try_to_form(&mut self) -> Vec<Action> {
        if self.select().is_some() {
            self.phase = Phase::Taking;
            vec![Action::TakeEpoch(self.epoch)]
        } else {
            self.phase = Phase::Waiting;
            Vec::new()
        }
    }

    /// Who takes which rank: those that had one keep it, the others follow by name.
    fn select(&self) -> Option<Vec<ShardId>> {
        let mut kinds: BTreeMap<&str, Vec<&ShardId>> = BTreeMap::new();
        for candidate in self.attached.values() {
            kinds.entry(&candidate.kind).or_default().push(&candidate.shard);
        }
        let returning = |shards: &[&ShardId]| shards.iter().filter(|s| self.ranks.contains(s)).count();
        let enough = kinds.into_values().filter(|shards| shards.len() >= self.world_size);
        let shards = enough.max_by_key(|shards| (returning(shards), shards.len()))?;
        let mut ranks: Vec<Option<&ShardId>> =
            (0..self.world_size).map(|rank| self.ranks.get(rank).filter(|s| shards.contains(s))).collect();
        let mut others = shards.into_iter().filter(|s| !ranks.contains(&Some(s))).collect::<Vec<_>>().into_iter();
        for rank in &mut ranks {
            *rank = rank.or_else(|| others.next());
        }
        ranks.into_iter().map(|r| r.cloned()).collect()
    }
}

#[cfg(test)]
#[path = "machine_tests.rs"]
mod tests;
