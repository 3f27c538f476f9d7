//! Changes on purpose: who prepares for what, when a switch is worth a pause between two steps, and who asked for it.
//!
//! What is wanted is derived anew from who is there whenever something has changed, so a loss in the middle of a change
//! needs no care: the next formation takes it into account.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use phalanx_cluster::id::{Epoch, ShardId};

use super::{Action, Attached, Cause, Changed, GroupMachine, Origin, Phase, Ticket, Waiter, seating::SliceOf};
use crate::group::change::ChangeError;

/// Longest wait for the scheduler to have no step in flight. A step that is late is noticed before.
pub(super) const HOLD_LIMIT: Duration = Duration::from_secs(60);
/// Longest wait, before the next change, for requests that stood still in the last one: one may lack memory to go on.
pub(super) const RECOVERY_LIMIT: Duration = Duration::from_secs(10);
/// Longest wait for a successor to load its slice ahead; then it loads while the group waits.
const PREPARE_LIMIT: Duration = Duration::from_secs(120);

impl GroupMachine {
    /// The group serves and something has changed: asks spares to prepare, answers who waits, and switches if that is
    /// wanted and everybody is ready.
    pub(super) fn reconsider(&mut self, now: Instant) {
        if self.phase != Phase::Serving {
            return;
        }
        self.dismiss();
        self.advance_rollout(now);
        if self.phase != Phase::Serving {
            // The next turn of a rolling restart has come here already.
            return;
        }
        let wanted = self.settings.world_size;
        let size = if self.seats(wanted, now, |_| true).is_some() { wanted } else { self.ranks.len() };
        let next = self.seats(size, now, |_| true);
        if self.recovering.is_none() {
            // Until then processors and memory are for those who wait.
            self.ask_to_prepare(size, next.as_deref(), now);
        }
        self.settle();
        if self.recovering.is_some() {
            // Nobody stands still twice in a row.
            return;
        }
        let Some(cause) = self.wants_switch(next.as_deref(), now) else {
            self.awaits_copies = None;
            return;
        };
        if self.reserved.is_none() {
            // The store's answer brings us back here.
            self.reserve();
            return;
        }
        let next_size = next.map_or(self.ranks.len(), |next| next.len());
        if self.waits_for_copies(next_size, now) {
            return;
        }
        self.awaits_copies = None;
        self.phase = Phase::Holding(cause, now);
        self.stopped = Some(now);
        self.push(Action::Hold(self.epoch));
    }

    /// Why the group should be switched to `next` now.
    fn wants_switch(&self, next: Option<&[ShardId]>, now: Instant) -> Option<Cause> {
        let leaving = || self.ranks.iter().find_map(|s| self.attached.get(s)?.leaves);
        let Some(next) = next else {
            // Nobody can take over. Who was asked to end goes between two steps at least.
            return leaving();
        };
        if next == self.ranks {
            return self.wants_mirror(now).then_some(Cause::Mirror);
        }
        let is_ready = |(rank, shard): (usize, &ShardId)| {
            // A rank that stays in the group under another number has nothing to prepare with.
            self.ranks.contains(shard)
                || self
                    .attached
                    .get(shard)
                    .is_some_and(|a| a.prepared.contains(&(next.len(), rank)) || a.prepares_in_vain)
        };
        if !next.iter().enumerate().all(is_ready) {
            return None;
        }
        let is_drained = || self.ranks.iter().any(|s| self.drained.contains(s));
        Some(match leaving() {
            Some(cause) => cause,
            None if is_drained() => Cause::Drain,
            None if next.len() != self.ranks.len() => Cause::Regroup,
            None => Cause::Slow,
        })
    }

    /// When the patience with shards that prepare ends.
    pub(super) fn prepare_limit(&self) -> Option<Instant> {
        self.attached.values().filter_map(|a| a.asked_at).min().map(|at| at + PREPARE_LIMIT)
    }

    /// Loses patience with shards that take too long to prepare.
    pub(super) fn stop_waiting_for_preparation(&mut self, now: Instant) {
        for attached in self.attached.values_mut() {
            if attached.asked_at.is_some_and(|at| now >= at + PREPARE_LIMIT) {
                attached.asked_at = None;
                attached.prepares_in_vain = true;
            }
        }
    }

    /// Asks every spare to load the slices that it is most likely to need.
    fn ask_to_prepare(&mut self, size: usize, next: Option<&[ShardId]>, now: Instant) {
        let spares = self.attached.iter().filter(|(shard, a)| self.is_to_prepare(shard, a));
        let spares: Vec<ShardId> = spares.map(|(shard, _)| shard.clone()).collect();
        for (index, shard) in spares.into_iter().enumerate() {
            let seat = next.and_then(|n| n.iter().position(|s| *s == shard));
            let first = seat.unwrap_or(index % size.max(1));
            let ranks: Vec<usize> = (0..size).map(|r| (first + r) % size).collect();
            let Some(attached) = self.attached.get_mut(&shard) else { continue };
            let already = attached.asked.as_ref();
            // The order matters only as long as somebody must take a rank.
            let is_asked = already.is_some_and(|(s, r)| *s == size && (seat.is_none() || *r == ranks));
            let is_loaded = ranks.iter().all(|r| attached.prepared.contains(&(size, *r)));
            if is_asked || (is_loaded && already.is_some()) {
                continue;
            }
            attached.asked = Some((size, ranks.clone()));
            attached.asked_at = Some(now);
            attached.prepares_in_vain = false;
            self.push(Action::Prepare { shard, world_size: size, ranks });
        }
    }

    /// Shards that get no rank until they are undrained, attached or not.
    pub fn drained(&self) -> &BTreeSet<ShardId> {
        &self.drained
    }

    /// Who was drained under a former leader.
    pub fn remember_drained(&mut self, drained: BTreeSet<ShardId>) {
        self.drained = drained;
    }

    /// Whether a shard of this kind is asked to load slices ahead.
    pub(super) fn is_to_prepare(&self, shard: &ShardId, attached: &Attached) -> bool {
        let kind = self.ranks.first().and_then(|s| self.attached.get(s)).map(|a| &a.candidate.kind);
        self.may_sit(attached) && !self.ranks.contains(shard) && Some(&attached.candidate.kind) == kind
    }

    /// A shard has loaded a slice ahead.
    pub(super) fn on_prepared(&mut self, from: &Origin, slice: SliceOf, now: Instant) {
        let Some(attached) = self.life(from) else { return };
        attached.prepared.insert(slice);
        let (world_size, ranks) = attached.asked.clone().unwrap_or_default();
        if ranks.iter().all(|rank| attached.prepared.contains(&(world_size, *rank))) {
            attached.asked_at = None;
        }
        self.reconsider(now);
    }

    /// No step is in flight: the switch.
    pub(super) fn on_idle(&mut self, epoch: Epoch, now: Instant) {
        match self.phase {
            Phase::Holding(cause, _) if epoch == self.epoch => {
                self.dissolve(cause, "a planned change", true, now);
                self.try_to_form(now);
            }
            _ => self.push(Action::CountFenced),
        }
    }

    /// All that stood still goes on.
    pub(super) fn on_recovered(&mut self, epoch: Epoch, stall: Duration, now: Instant) {
        if epoch != self.epoch || self.recovering.is_none() {
            return self.push(Action::CountFenced);
        }
        self.stall = self.stall.max(stall);
        self.recovered(now);
    }

    pub(super) fn stop_waiting_for_recovery(&mut self, now: Instant) {
        if let Some(since) = self.recovering.filter(|since| now >= *since + RECOVERY_LIMIT) {
            self.stall = self.stall.max(now - since);
            self.recovered(now);
        }
    }

    fn recovered(&mut self, now: Instant) {
        self.recovering = None;
        self.note_stall(self.stall);
        self.reconsider(now);
    }

    pub(super) fn give_up_switch(&mut self, now: Instant) {
        self.phase = Phase::Serving;
        self.stopped = None;
        self.push(Action::Resume(self.epoch));
        self.look_at = now;
    }

    /// A rank keeps the others waiting: a spare that has loaded its slice takes its place.
    pub(super) fn on_slow(&mut self, rank: Option<usize>, now: Instant) {
        let Some((rank, shard)) = rank.and_then(|r| Some((r, self.ranks.get(r)?.clone()))) else { return };
        if self.warned_slow.as_ref() != Some(&shard) {
            self.warned_slow = Some(shard.clone());
            self.push(Action::WarnSlow(shard.clone()));
        }
        let size = self.ranks.len();
        let successor = self.successor_of(rank, now);
        let is_ready = |s: &ShardId| {
            self.attached.get(s).is_some_and(|a| a.prepared.contains(&(size, rank))) && !self.is_doubtful(s, now)
        };
        if successor.as_ref().is_some_and(is_ready) {
            self.doubt(&shard, now);
        }
    }

    pub(super) fn on_leaving(&mut self, from: &Origin, now: Instant) {
        if let Some(attached) = self.life(from) {
            attached.leaves.get_or_insert(Cause::Drain);
            self.dismiss();
            self.reconsider(now);
        }
    }

    pub(super) fn on_drain(&mut self, ticket: Ticket, shard: ShardId, is_helped: bool, now: Instant) {
        if !self.attached.contains_key(&shard) {
            return self.push(Action::Answer(ticket, Err(ChangeError::UnknownShard(shard))));
        }
        let rank = self.rank_of(&shard);
        if let Some(rank) = rank
            && !is_helped
            && self.seats(self.ranks.len(), now, |s| *s != shard).is_none()
        {
            let why = format!("no other shard can take rank {rank} from {shard}: attach a spare first");
            return self.push(Action::Answer(ticket, Err(ChangeError::Impossible(why))));
        }
        self.drained.insert(shard.clone());
        if rank.is_none() {
            return self.push(Action::Answer(ticket, Ok(Changed::default())));
        }
        self.waiters.push(Waiter { ticket, shard, rank });
        self.reconsider(now);
    }

    pub(super) fn on_undrain(&mut self, ticket: Ticket, shard: &ShardId, now: Instant) {
        if !self.drained.remove(shard) && !self.attached.contains_key(shard) {
            return self.push(Action::Answer(ticket, Err(ChangeError::UnknownShard(shard.clone()))));
        }
        // Whoever waited for the drain waits for nothing now.
        let (over, waiters): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.waiters).into_iter().partition(|w| w.shard == *shard);
        self.waiters = waiters;
        for Waiter { ticket, shard, .. } in over {
            let error = ChangeError::Failed(format!("{shard} was undrained meanwhile"));
            self.push(Action::Answer(ticket, Err(error)));
        }
        self.push(Action::Answer(ticket, Ok(Changed::default())));
        match self.phase {
            Phase::Waiting => self.try_to_form(now),
            _ => self.reconsider(now),
        }
    }

    /// Answers those who waited for a shard to have no rank, and for requests to go on.
    fn settle(&mut self) {
        if self.recovering.is_some() {
            return;
        }
        for waiter in std::mem::take(&mut self.waiters) {
            if self.rank_of(&waiter.shard).is_some() {
                self.waiters.push(waiter);
            } else {
                let successor = waiter.rank.and_then(|r| self.ranks.get(r).cloned());
                let changed = Changed { successor, stall: self.stall };
                self.push(Action::Answer(waiter.ticket, Ok(changed)));
            }
        }
    }

    /// Tells those who are to end, and have no rank, to do so.
    pub(super) fn dismiss(&mut self) {
        let ranks = self.ranks().to_vec();
        let mut dismissed = Vec::new();
        for (shard, attached) in &mut self.attached {
            if let Some(cause) = attached.leaves.filter(|_| !attached.is_dismissed && !ranks.contains(shard)) {
                attached.is_dismissed = true;
                let reason = match cause {
                    Cause::Rollout => "rolling restart",
                    _ => "it asked to leave and has no rank",
                };
                dismissed.push(Action::Shutdown { shard: shard.clone(), reason: reason.to_owned() });
            }
        }
        self.actions.extend(dismissed);
    }
}
