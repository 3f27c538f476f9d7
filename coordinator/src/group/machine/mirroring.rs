//! Copies of KV rows: who gets them, and who has those of the formation before.

use std::time::Instant;

use phalanx_cluster::id::{Epoch, ShardId};

use super::{Attached, GroupMachine, MirrorTo, Mirrors, Origin};

impl GroupMachine {
    /// Who is to get copies of the ranks' KV rows.
    pub(super) fn choose_mirrors(&self, ranks: &[ShardId], now: Instant) -> Mirrors {
        match self.settings.mirror_to {
            MirrorTo::Nowhere => Mirrors::Nowhere,
            MirrorTo::Spare => self.choose_spare(ranks, now).map_or(Mirrors::Nowhere, Mirrors::Spare),
            MirrorTo::Buddy => {
                let takes_mirror = |s: &ShardId| self.attached.get(s).is_some_and(|a| a.candidate.takes_mirror);
                if ranks.len() > 1 && ranks.iter().all(takes_mirror) { Mirrors::Buddies } else { Mirrors::Nowhere }
            }
        }
    }

    fn choose_spare(&self, ranks: &[ShardId], now: Instant) -> Option<ShardId> {
        let kind = ranks.first().and_then(|s| self.attached.get(s)).map(|a| &a.candidate.kind);
        let spares = self.attached.iter().filter(|(shard, a)| {
            a.candidate.takes_mirror
                && self.may_sit(a)
                && Some(&a.candidate.kind) == kind
                && !ranks.contains(shard)
                && !self.is_doubtful(shard, now)
        });
        let n_prepared = |a: &Attached| a.prepared.iter().filter(|(size, _)| *size == ranks.len()).count();
        let best = spares
            .max_by(|(a_name, a), (b_name, b)| n_prepared(a).cmp(&n_prepared(b)).then_with(|| b_name.cmp(a_name)));
        best.map(|(shard, _)| shard.clone())
    }

    /// Whether the group should be switched because copies could be made now and none are.
    pub(super) fn wants_mirror(&self, now: Instant) -> bool {
        let is_ready = |s: &ShardId| self.attached.get(s).is_some_and(|a| !a.prepared.is_empty());
        self.mirrors == Mirrors::Nowhere
            && match self.choose_mirrors(&self.ranks, now) {
                Mirrors::Nowhere => false,
                Mirrors::Spare(spare) => is_ready(&spare),
                Mirrors::Buddies => true,
            }
    }

    /// Whether copies are being made, or will be, that are not whole yet: a rank that is lost now would be computed again.
    pub(super) fn lacks_copies(&self, now: Instant) -> bool {
        let is_whole = |s: &&ShardId| self.attached.get(*s).is_some_and(|a| a.beat.mirrored == Some(self.epoch));
        self.wants_mirror(now) || !self.mirrors().iter().all(is_whole)
    }

    /// Which lives of shards have copies of the present formation's rows, by rank.
    pub(super) fn holders(&self) -> Vec<Option<Origin>> {
        let holder = |rank| {
            let shard = self.mirrors.holder(rank, &self.ranks)?;
            let incarnation = self.attached.get(shard)?.candidate.incarnation;
            Some(Origin { shard: shard.clone(), incarnation })
        };
        (0..self.ranks.len()).map(holder).collect()
    }

    /// Ranks of which somebody who is there has a copy of the pages of that epoch.
    pub(super) fn copies_for(&self, keep_kv_of: Option<Epoch>) -> Vec<(usize, ShardId)> {
        let held = |(rank, holder): (usize, &Option<Origin>)| {
            let holder = holder.as_ref().filter(|holder| self.is_attached(holder))?;
            Some((rank, holder.shard.clone()))
        };
        keep_kv_of.map_or_else(Vec::new, |_| self.copies.iter().enumerate().filter_map(held).collect())
    }
}
