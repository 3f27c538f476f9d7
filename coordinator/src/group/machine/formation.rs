//! Forming, serving and ending: the way of one formation.

use std::time::{Duration, Instant};

use phalanx_cluster::id::{Epoch, ShardId};

use super::{
    Action, Attached, Candidate, Cause, GroupMachine, Kept, LOOK_EVERY, Mirrors, Pages, Phase, Slice, inherited,
};

/// Pause after the first failure: the news of a peer's death, which may be its cause, is on the way.
const NEWS_PAUSE: Duration = Duration::from_millis(30);
/// Pause after the second failure in a row; doubles from there.
pub(super) const FIRST_PAUSE: Duration = Duration::from_millis(250);
/// Longest pause between formations.
pub(super) const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// Between questions to a store that does not answer.
const STORE_PAUSE: Duration = Duration::from_secs(1);
/// Steps after which a group counts as healthy: failures before are forgotten.
pub(super) const HEALTHY_STEPS: u32 = 64;
/// Longest wait for progress in loading.
pub(super) const LOAD_LIMIT: Duration = Duration::from_secs(120);
/// Longest wait for KV pages to be allocated.
pub(super) const START_LIMIT: Duration = Duration::from_secs(60);
/// Formations in a row that a shard may be the first to fail before others are tried in its place.
const MOST_FAILURES: u32 = 2;

impl GroupMachine {
    pub(super) fn on_arrived(&mut self, candidate: Candidate, now: Instant) {
        let shard = candidate.shard.clone();
        if self.attached.contains_key(&shard) {
            // Its former life, or connection, ended without a word.
            self.forget(&shard, Cause::Lost, "the process was replaced by a new one", now);
        }
        self.on_returned(&candidate, now);
        self.expect_heirs(&candidate, now);
        let leaves = self.is_to_restart(&candidate).then_some(Cause::Rollout);
        let attached = Attached {
            candidate,
            prepared: Default::default(),
            asked: None,
            asked_at: None,
            prepares_in_vain: false,
            leaves,
            is_dismissed: false,
            copies_are_near: false,
            beat: Default::default(),
            heard: now,
        };
        self.attached.insert(shard, attached);
        self.dismiss();
        match self.phase {
            Phase::Waiting => self.try_to_form(now),
            Phase::Serving => self.reconsider(now),
            _ => {}
        }
    }

    /// A shard is gone.
    pub(super) fn forget(&mut self, shard: &ShardId, cause: Cause, reason: &str, now: Instant) {
        let rank = self.rank_of(shard);
        self.attached.remove(shard);
        if self.mirrors == Mirrors::Spare(shard.clone()) {
            self.mirrors = Mirrors::Nowhere;
        }
        match rank {
            Some(rank) => {
                self.dissolve(cause, &format!("rank {rank} ({shard}) is lost: {reason}"), false, now);
                self.try_to_form(now);
            }
            // Somebody may have counted on it.
            None if self.phase == Phase::Serving => self.reconsider(now),
            None => {}
        }
    }

    /// A shard is stuck: as good as gone, whatever its stream says.
    pub(super) fn evict(&mut self, shards: &[ShardId], cause: Cause, reason: &str, now: Instant) {
        self.dissolve(cause, reason, false, now);
        for shard in shards {
            self.doubt(shard, now);
            self.attached.remove(shard);
            self.push(Action::Evict { shard: shard.clone(), cause });
        }
        self.try_to_form(now);
    }

    pub(super) fn on_epoch(&mut self, epoch: Epoch, now: Instant) {
        self.is_taking = false;
        if epoch <= self.epoch.max(self.outrun) || self.reserved.is_some_and(|r| epoch <= r) {
            self.push(Action::CountFenced);
            if self.phase == Phase::Taking {
                self.try_to_form(now);
            }
            return;
        }
        self.reserved = Some(epoch);
        match self.phase {
            Phase::Taking => self.try_to_form(now),
            _ => self.reconsider(now),
        }
    }

    /// A shard refuses epochs that are not greater than what it knows: one in reserve may be too old.
    pub(super) fn on_outrun(&mut self, epoch: Epoch) {
        self.outrun = self.outrun.max(epoch);
        if self.reserved.take_if(|reserved| *reserved <= epoch).is_some() {
            self.reserve();
        }
    }

    pub(super) fn on_epoch_refused(&mut self, now: Instant) {
        self.is_taking = false;
        if self.phase == Phase::Taking {
            self.phase = Phase::Pausing(now + FIRST_PAUSE);
        } else {
            self.reserve_at = Some(now + STORE_PAUSE);
        }
    }

    pub(super) fn on_tick(&mut self, now: Instant) {
        if self.reserve_at.is_some_and(|at| now >= at) {
            self.reserve_at = None;
            self.reserve();
        }
        let n_doubts = self.doubts.len();
        self.doubts.retain(|_, (_, until)| now < *until);
        if self.doubts.len() < n_doubts {
            self.reconsider(now);
        }
        self.stop_waiting_for_recovery(now);
        self.stop_waiting_for_copies(now);
        let has_waited = self.has_waited_for_others(now);
        match self.phase.clone() {
            Phase::Waiting if has_waited || self.regroups_at().is_some_and(|at| now >= at) => self.try_to_form(now),
            Phase::Pausing(until) if now >= until => self.try_to_form(now),
            Phase::Loading(slices, since) if now >= since + LOAD_LIMIT => {
                let late: Vec<bool> = slices.iter().map(Option::is_none).collect();
                self.evict_late(&late, "loading", LOAD_LIMIT, now);
            }
            Phase::Starting(ready, since) if now >= since + START_LIMIT => {
                let late: Vec<bool> = ready.iter().map(|r| !r).collect();
                self.evict_late(&late, "starting", START_LIMIT, now);
            }
            Phase::Serving | Phase::Holding(..) => self.look(now),
            _ => {}
        }
        self.rollout_tick(now);
    }

    fn evict_late(&mut self, late: &[bool], what: &str, limit: Duration, now: Instant) {
        let shards: Vec<ShardId> = self.ranks.iter().zip(late).filter(|(_, l)| **l).map(|(s, _)| s.clone()).collect();
        let names: Vec<&str> = shards.iter().map(|s| s.0.as_str()).collect();
        let reason = format!("{what}: no progress of {} for {} s", names.join(", "), limit.as_secs());
        self.evict(&shards, Cause::Deadline, &reason, now);
    }

    /// Whether steps are late, and who keeps the others waiting.
    fn look(&mut self, now: Instant) {
        let witnesses = self.witnesses(now);
        self.stop_waiting_for_preparation(now);
        if self.watch.due().is_some_and(|due| now >= due) {
            let Some((step, guilty)) = self.watch.blame(&witnesses, self.settings.silent_after) else { return };
            let is_everyone = guilty.len() == self.ranks.len();
            let shards: Vec<ShardId> = guilty.iter().filter_map(|r| self.ranks.get(*r).cloned()).collect();
            let names: Vec<&str> = shards.iter().map(|s| s.0.as_str()).collect();
            let reason = format!("step {step} is overdue; stuck: {}", names.join(", "));
            if is_everyone && self.ranks.len() > 1 {
                // Nobody in particular is to blame: the same shards get another chance.
                self.dissolve(Cause::Deadline, &reason, false, now);
                self.fail(&reason, now);
            } else {
                self.evict(&shards, Cause::Deadline, &reason, now);
            }
            return;
        }
        if now >= self.look_at + LOOK_EVERY && self.phase == Phase::Serving {
            self.look_at = now;
            let slow = self.watch.look(&witnesses);
            self.on_slow(slow, now);
            self.reconsider(now);
        } else if let Phase::Holding(_, since) = self.phase
            && now >= since + super::changes::HOLD_LIMIT
        {
            self.give_up_switch(now);
        }
    }

    /// When fewer ranks may serve than are wanted.
    pub(super) fn regroups_at(&self) -> Option<Instant> {
        let after = self.settings.regroup_after?;
        let is_possible = self.settings.world_size > 1 && self.attached.values().any(|a| self.may_sit(a));
        self.short_since.filter(|_| is_possible).map(|since| since + after)
    }

    /// Who could form a group now: as many ranks as are wanted, else as many as can after a while without them.
    fn select(&self, now: Instant) -> Option<Vec<ShardId>> {
        if self.awaits_others_until().is_some_and(|until| now < until) {
            return None;
        }
        let wanted = self.settings.world_size;
        self.seats(wanted, now, |_| true).or_else(|| {
            self.regroups_at().filter(|at| now >= *at)?;
            (1..wanted).rev().find_map(|size| self.seats(size, now, |_| true))
        })
    }

    /// Whether a shard's memory is enough for a slice of the model, as far as both are known.
    pub(super) fn has_memory_for(&self, world_size: usize, attached: &Attached) -> bool {
        let (Some(all), memory) = (self.weight_bytes, attached.candidate.memory_bytes) else { return true };
        // Matrices that every rank has whole are counted once for each rank in `all`: on the safe side.
        memory == 0 || world_size >= self.settings.world_size || all / (world_size.max(1) as u64) < memory
    }

    /// Forms a group, asks for an epoch to form it in, or waits.
    pub(super) fn try_to_form(&mut self, now: Instant) {
        let Some(ranks) = self.select(now) else {
            self.phase = Phase::Waiting;
            self.short_since.get_or_insert(now);
            return;
        };
        match self.reserved.take() {
            Some(epoch) => self.form(epoch, ranks, now),
            None => {
                self.phase = Phase::Taking;
                self.reserve();
            }
        }
    }

    pub(super) fn reserve(&mut self) {
        if !self.is_taking && self.reserved.is_none() {
            self.is_taking = true;
            self.push(Action::TakeEpoch(self.epoch.max(self.outrun)));
        }
    }

    fn form(&mut self, epoch: Epoch, ranks: Vec<ShardId>, now: Instant) {
        self.epoch = epoch;
        self.mirrors = self.choose_mirrors(&ranks, now);
        self.owners.record(&ranks);
        self.ranks.clone_from(&ranks);
        self.stop_expecting();
        if ranks.len() == self.settings.world_size {
            self.short_since = None;
        }
        for shard in &ranks {
            if let Some(attached) = self.attached.get_mut(shard) {
                // What a rank has beside its slice is its own affair: it is asked again when it is a spare again.
                (attached.asked, attached.asked_at) = (None, None);
                attached.prepared.clear();
            }
        }
        let keep_kv_of = self.pages.filter(|p| p.world_size == ranks.len()).map(|p| p.epoch);
        self.phase = Phase::Loading(vec![None; ranks.len()], now);
        let keep_sealed = self.inherits(&ranks);
        let (mirrors, copies) = (self.mirrors.clone(), self.copies_for(keep_kv_of));
        self.push(Action::Form { epoch, ranks, keep_kv_of, keep_sealed, mirrors, copies });
    }

    pub(super) fn on_loaded(&mut self, rank: usize, slice: Slice, now: Instant) {
        let Phase::Loading(slices, since) = &mut self.phase else { return self.push(Action::CountFenced) };
        *since = now;
        if slice.kv_blocks == 0 {
            let shard = self.ranks[rank].clone();
            self.on_failed(rank, &shard, "no memory for a single KV block; raise --kv-cache-memory", now);
            return;
        }
        slices[rank] = Some(slice);
        let Some(all) = slices.iter().cloned().collect::<Option<Vec<Slice>>>() else { return };
        self.weight_bytes = Some(all.iter().map(|s| s.weight_bytes).sum());
        let least = all.iter().map(|s| s.kv_blocks).min().unwrap_or(0);
        let through = all.iter().map(|s| s.kept_through).collect::<Option<Vec<u64>>>();
        let through = through.and_then(|t| t.into_iter().min());
        // Tables point into the pages: they mean something only if there are as many as before.
        let kept = self.pages.filter(|p| p.world_size == all.len() && p.kv_blocks <= least).zip(through);
        self.kv_blocks = kept.map_or(least, |(pages, _)| pages.kv_blocks);
        let rows = kept.map(|(pages, through)| Kept::Through(pages.epoch, through));
        self.kept = rows.or_else(|| inherited::agreed(&all).map(Kept::Sealed));
        self.phase = Phase::Starting(vec![false; all.len()], now);
        self.push(Action::Serve { epoch: self.epoch, kv_blocks: self.kv_blocks });
    }

    pub(super) fn on_ready(&mut self, rank: usize, now: Instant) {
        let Phase::Starting(ready, _) = &mut self.phase else { return self.push(Action::CountFenced) };
        ready[rank] = true;
        if !ready.iter().all(|r| *r) {
            return;
        }
        self.phase = Phase::Serving;
        self.pages = None;
        self.has_served = true;
        self.last_failure = None;
        self.healthy_steps = 0;
        self.watch.begin();
        self.results.begin();
        self.awaits_copies = None;
        self.look_at = now;
        self.stall = self.stopped.take().map_or(Duration::ZERO, |since| now.saturating_duration_since(since));
        self.recovering = Some(now);
        let (epoch, kv_blocks, kept) = (self.epoch, self.kv_blocks, self.kept.take());
        self.push(Action::Serving { epoch, kv_blocks, kept });
        self.reserve();
        self.reconsider(now);
    }

    pub(super) fn on_stepped(&mut self, rank: usize, step: u64, now: Instant) {
        if !self.is_running() {
            return self.push(Action::CountFenced);
        }
        self.watch.stepped(rank, step, now);
        if rank != 0 {
            return;
        }
        self.results.stepped(step, now);
        self.healthy_steps = self.healthy_steps.saturating_add(1);
        if self.healthy_steps == HEALTHY_STEPS {
            self.failures = 0;
            self.first_to_fail = None;
            self.watch.calm();
        }
        self.push(Action::Deliver);
    }

    pub(super) fn on_failed(&mut self, rank: usize, shard: &ShardId, error: &str, now: Instant) {
        let cause = format!("rank {rank} ({shard}) has failed: {error}");
        let times = match &self.first_to_fail {
            Some((before, times)) if before == shard => times + 1,
            _ => 1,
        };
        self.first_to_fail = Some((shard.clone(), times));
        if times >= MOST_FAILURES {
            self.doubt(shard, now);
        }
        self.dissolve(Cause::Failed, &cause, false, now);
        self.fail(&cause, now);
    }

    /// Tries again after a pause that grows. After a few times it says that it would give up: whether that is the end depends
    /// on other groups.
    fn fail(&mut self, cause: &str, now: Instant) {
        self.failures += 1;
        self.last_failure = Some(cause.to_owned());
        if !self.has_served && self.settings.give_up_after.is_some_and(|limit| self.failures >= limit) {
            self.push(Action::GiveUp(cause.to_owned()));
        }
        let pause = match self.failures {
            1 => NEWS_PAUSE,
            n => (FIRST_PAUSE * 2u32.pow((n - 2).min(16))).min(LONGEST_PAUSE),
        };
        self.phase = Phase::Pausing(now + pause);
    }

    /// Ends the present formation.
    pub(super) fn dissolve(&mut self, cause: Cause, reason: &str, is_planned: bool, now: Instant) {
        if !self.is_formed() {
            return;
        }
        let epoch = self.epoch;
        if self.is_running() {
            self.pages = Some(Pages { epoch, world_size: self.ranks.len(), kv_blocks: self.kv_blocks });
            self.copies = self.holders();
            self.stopped.get_or_insert(now);
            self.push(Action::Lost { epoch, cause, reason: reason.to_owned(), is_planned });
        }
        // What an earlier leader left is wanted until something else has been computed.
        let keep_kv = self.pages.is_some() || !self.has_served;
        // Survivors may hang in a sum that will never be complete: they must hear of it before anything else happens.
        let survivors: Vec<ShardId> = self.ranks.iter().filter(|s| self.attached.contains_key(s)).cloned().collect();
        for shard in survivors {
            self.push(Action::Retire { epoch, shard, keep_kv });
        }
        self.watch.begin();
        self.recovering = None;
        self.kept = None;
        self.phase = Phase::Waiting;
        self.dismiss();
        self.advance_rollout(now);
    }
}
