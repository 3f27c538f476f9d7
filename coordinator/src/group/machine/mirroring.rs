//! Copies of KV rows: who gets them, and who has those of the formation before.

use std::time::{Duration, Instant};

use phalanx_cluster::id::{Epoch, ShardId};

use super::{Attached, Beat, GroupMachine, MirrorTo, Mirrors, Origin, Phase};

/// Longest wait of a planned change for copies that are far behind: a mirror may have no memory for them, or too little of
/// the processors.
const CATCH_UP_LIMIT: Duration = Duration::from_secs(5);

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
        self.wants_mirror(now) || !self.mirrors().iter().all(|s| self.mirrored_step(s).is_some())
    }

    /// The last step of the present formation of which a shard has whole copies, as far as is known.
    fn mirrored_step(&self, shard: &ShardId) -> Option<u64> {
        let (epoch, step) = self.attached.get(shard)?.beat.mirrored?;
        (epoch == self.epoch).then_some(step)
    }

    /// Steps of the present formation whose rows one of its mirrors lacks, as far as is known; `None` without mirrors, or
    /// while one has not everything from before the formation.
    pub fn mirror_lag(&self) -> Option<u64> {
        let lags = self.mirrors().into_iter().map(|s| self.mirrored_step(s).map(|step| self.results.lag(step)));
        lags.collect::<Option<Vec<u64>>>()?.into_iter().max()
    }

    /// A sign of life.
    pub(super) fn on_beat(&mut self, from: &Origin, beat: Beat, now: Instant) {
        let epoch = self.epoch;
        // How far copies are behind is known at this moment only: steps go on until the next sign.
        let are_near = beat.mirrored.is_some_and(|(of, step)| of == epoch && self.results.is_near(step, now));
        if let Some(attached) = self.life(from) {
            (attached.beat, attached.copies_are_near, attached.heard) = (beat, are_near, now);
        }
        if self.is_rolling() {
            self.advance_rollout(now);
        }
        if self.awaits_copies.is_some() {
            self.reconsider(now);
        }
    }

    /// Whether a planned change to so many ranks had better wait: copies are far behind, so that whoever takes a rank
    /// would compute much again.
    pub(super) fn waits_for_copies(&mut self, world_size: usize, now: Instant) -> bool {
        let are_near =
            |s: &&ShardId| self.mirrored_step(s).is_some() && self.attached.get(*s).is_some_and(|a| a.copies_are_near);
        // Other slices have other rows.
        if world_size != self.ranks.len() || self.mirrors().iter().all(are_near) {
            return false;
        }
        let since = *self.awaits_copies.get_or_insert(now);
        now < since + CATCH_UP_LIMIT
    }

    /// When the patience with copies that are far behind ends.
    pub(super) fn catch_up_limit(&self) -> Option<Instant> {
        self.awaits_copies.filter(|_| self.phase == Phase::Serving).map(|since| since + CATCH_UP_LIMIT)
    }

    /// Ends the wait for copies that are far behind.
    pub(super) fn stop_waiting_for_copies(&mut self, now: Instant) {
        if self.catch_up_limit().is_some_and(|limit| now >= limit) {
            self.reconsider(now);
        }
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
