//! A coordinator: the real machines of scheduler and group, and what their actors remember.

use std::collections::BTreeMap;

use phalanx_cluster::id::{Epoch, ShardId};
use phalanx_coordinator::{
    group::machine::{Candidate, GroupMachine, Origin},
    scheduler::{
        event::{Kept, Limits, Recovery},
        machine::Machine,
    },
};

use crate::fake::{Letters, oracle::EOS};

/// The formation that served last.
#[derive(Debug, Clone, Copy)]
pub struct Served {
    pub epoch: u64,
    pub n_blocks: usize,
}

/// One life of a coordinator.
pub struct Coordinator {
    pub term: u64,
    pub is_alive: bool,
    pub group: GroupMachine,
    pub scheduler: Machine,
    /// Its end of the link to each shard, and the incarnation at the other end.
    pub links: BTreeMap<usize, (u64, u64)>,
    /// Ranks of the present formation, each with what it has kept.
    pub ranks: Vec<(usize, Option<u64>)>,
    pub served: Option<Served>,
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
    /// Begins with nothing but what the store has.
    pub fn new(term: u64, epoch: u64, world_size: usize, limits: Limits, recovery: Recovery) -> Self {
        Self {
            term,
            is_alive: true,
            group: GroupMachine::new(world_size, Epoch::from_raw(epoch), Vec::new(), None),
            scheduler: Machine::new(limits, recovery, vec![EOS], Box::new(Letters)),
            links: BTreeMap::new(),
            ranks: Vec::new(),
            served: None,
        }
    }

    /// Who speaks on a link.
    pub fn origin(&self, shard: usize) -> Option<Origin> {
        let (_, incarnation) = *self.links.get(&shard)?;
        Some(Origin { shard: name(shard), incarnation })
    }

    /// A shard as the group sees it.
    pub fn candidate(shard: usize, incarnation: u64) -> Candidate {
        Candidate { shard: name(shard), incarnation, kind: "same".to_owned() }
    }

    /// What all ranks have kept of the formation that served last.
    pub fn kept(&self, n_blocks: usize) -> Option<Kept> {
        let served = self.served.filter(|s| s.n_blocks == n_blocks)?;
        let through_step = self.ranks.iter().map(|(_, kept)| *kept).min()??;
        Some(Kept { epoch: served.epoch, through_step })
    }
}
