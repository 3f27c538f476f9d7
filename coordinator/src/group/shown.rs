//! What the group's metrics show of the present.

use std::time::Instant;

use phalanx_cluster::id::ShardId;

use super::{meters::Standing, state::State};

impl State {
    /// Shows what a shard's device does, if it has a rank.
    pub(super) fn show_device(&mut self, shard: &ShardId) {
        if let (Some(rank), Some((used, total))) = (self.machine.rank_of(shard), self.seats.device_memory(shard)) {
            self.meters.alive(rank, used, total, Instant::now());
        }
    }

    /// Shows what the group is, in numbers.
    pub(super) fn show_standing(&mut self) {
        let now = Instant::now();
        let roles: Vec<_> = self.seats.iter().map(|(shard, _)| self.machine.role_of(shard, now)).collect();
        let ranks = self.machine.ranks();
        let is_there = |rank: usize| ranks.get(rank).is_some_and(|shard| self.seats.get(shard).is_some());
        for rank in (0..self.meters.n_ranks()).filter(|rank| !is_there(*rank)) {
            self.meters.vacate(rank);
        }
        self.meters.show(&Standing {
            epoch: self.machine.epoch().raw(),
            is_serving: self.plans.is_some(),
            n_ranks: ranks.len(),
            n_wanted: self.config.settings.world_size,
            roles: &roles,
        });
    }
}
