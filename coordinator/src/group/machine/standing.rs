//! What a group says of itself to whoever shares shards out among groups.

use std::{collections::BTreeSet, time::Instant};

use phalanx_cluster::id::{Epoch, ShardId};

use super::{GroupMachine, Mirrors};

/// Where a group stands.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Standing {
    /// The latest epoch that it formed in.
    pub epoch: Epoch,
    /// Whether there is a formation, however far.
    pub is_formed: bool,
    /// Shards of the present formation, in rank order.
    pub ranks: Vec<ShardId>,
    /// Shards that may have no rank until an operator says so; attached or not.
    pub drained: BTreeSet<ShardId>,
    /// Shards that are about to end.
    pub leaving: BTreeSet<ShardId>,
    /// A shard that is restarted on purpose, and awaited here.
    pub awaited: Option<ShardId>,
    /// Whether a rolling restart is under way: nobody goes until it is over.
    pub is_rolling: bool,
}

/// What another group asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Given {
    /// A shard beyond those that this group needs.
    Spare,
    /// Any shard, if this group has too few to be formed.
    Idle,
}

impl GroupMachine {
    /// Where the group stands.
    pub fn standing(&self) -> Standing {
        let leaving = self.attached.iter().filter(|(_, a)| a.leaves.is_some()).map(|(shard, _)| shard.clone());
        Standing {
            epoch: self.epoch,
            is_formed: self.is_formed(),
            ranks: self.ranks().to_vec(),
            drained: self.drained.clone(),
            leaving: leaving.collect(),
            awaited: self.rollout.as_ref().and_then(|r| r.shard().cloned()),
            is_rolling: self.is_rolling(),
        }
    }

    /// The shard that can go to another group now, if any can: rather one that keeps no copies of KV rows, and rather one
    /// that was not lately found stuck, slow or failing.
    pub fn can_give(&self, given: Given, now: Instant) -> Option<ShardId> {
        if self.is_rolling() {
            return None;
        }
        let usable = || self.attached.iter().filter(|(_, a)| self.may_sit(a)).map(|(shard, _)| shard);
        let (n_usable, wanted) = (usable().count(), self.settings.world_size);
        let is_given = match given {
            Given::Spare => n_usable > wanted,
            Given::Idle => n_usable < wanted && !self.is_formed(),
        };
        // The former ranks have their slices, and perhaps their pages.
        let free = usable().filter(|shard| given == Given::Idle || !self.ranks.contains(shard));
        let has_copies = |shard: &ShardId| self.mirrors == Mirrors::Spare(shard.clone());
        free.filter(|_| is_given).min_by_key(|shard| (self.is_doubtful(shard, now), has_copies(shard))).cloned()
    }
}
