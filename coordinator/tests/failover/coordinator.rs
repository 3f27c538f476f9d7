//! A coordinator: the real machines of scheduler and group, and what their actors remember.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Instant,
};

use phalanx_cluster::id::{Epoch, ShardId};
use phalanx_coordinator::{
    group::machine::{Candidate, GroupMachine, OWNERS_LIMIT, Origin, Settings, SliceOf},
    scheduler::{
        event::{Limits, Recovery},
        machine::Machine,
    },
};

use crate::fake::{Letters, oracle::EOS};

/// One life of a coordinator.
pub struct Coordinator {
    pub term: u64,
    pub is_alive: bool,
    pub group: GroupMachine,
    pub scheduler: Machine,
    /// Its end of the link to each shard, and the incarnation at the other end.
    pub links: BTreeMap<usize, (u64, u64)>,
    /// Ranks of the present formation.
    pub ranks: Vec<usize>,
    /// When the group's machine is woken next.
    pub wakes_at_ms: Option<u64>,
}

/// Name of a shard.
pub fn name(shard: usize) -> ShardId {
    ShardId(format!("shard-{shard}"))
}

/// Number of a shard.
pub fn number(shard: &ShardId) -> usize {
    shard.0.trim_start_matches("shard-").parse().expect("shards have numbers")
}

impl Coordinator {
    /// Begins with nothing but what the store has: the epoch, who had the ranks, and who is recorded to be alive.
    pub fn new(
        term: u64,
        (epoch, owners, alive): (u64, Vec<ShardId>, Vec<ShardId>),
        settings: Settings,
        limits: Limits,
        recovery: Recovery,
        now: Instant,
    ) -> Self {
        let seen = owners.iter().chain(&alive).map(|shard| (shard.clone(), "here".to_owned())).collect();
        let mut group = GroupMachine::new(settings, Epoch::from_raw(epoch), owners, now);
        group.expect(seen, now + OWNERS_LIMIT);
        Self {
            term,
            is_alive: true,
            group,
            scheduler: Machine::new(limits, recovery, vec![EOS], Box::new(Letters)),
            links: BTreeMap::new(),
            ranks: Vec::new(),
            wakes_at_ms: None,
        }
    }

    /// Who speaks on a link.
    pub fn origin(&self, shard: usize) -> Option<Origin> {
        let (_, incarnation) = *self.links.get(&shard)?;
        Some(Origin { shard: name(shard), incarnation })
    }

    /// A shard as the group sees it.
    pub fn candidate(shard: usize, incarnation: u64, holds: Option<SliceOf>, copies: BTreeSet<SliceOf>) -> Candidate {
        Candidate {
            shard: name(shard),
            incarnation,
            kind: "same".to_owned(),
            memory_bytes: 0,
            takes_mirror: !(shard as u64 + incarnation).is_multiple_of(4),
            holds,
            copies,
        }
    }
}
