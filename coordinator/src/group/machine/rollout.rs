//! Restarting shards one after the other, each when the one before it is back.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use phalanx_cluster::id::ShardId;

use super::{Action, Attached, Candidate, Cause, GroupMachine, Phase, Turned};
use crate::group::change::ChangeError;

/// Longest wait for a shard that was told to end to be there again, unless another one is asked for.
const RETURN_LIMIT: Duration = Duration::from_secs(120);
/// Longest wait for a shard that is back to have loaded a slice ahead.
const PREPARE_LIMIT: Duration = Duration::from_secs(120);
/// Longest wait for copies of KV rows to be whole again before the next turn: a mirror may have no memory for them.
const MIRROR_LIMIT: Duration = Duration::from_secs(20);

/// A rolling restart.
#[derive(Debug, Clone)]
pub(super) struct Rollout {
    queue: VecDeque<ShardId>,
    done: usize,
    total: usize,
    turn: Option<Turn>,
    /// Longest wait for a shard that was told to end to be there again.
    return_limit: Duration,
    /// Of all turns that are over.
    longest_stall: Duration,
}

#[derive(Debug, Clone)]
struct Turn {
    shard: ShardId,
    /// The life that ends.
    incarnation: u64,
    stage: Stage,
    stall: Duration,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// It gives its rank away.
    Draining,
    /// It was told to end, then.
    Restarting(Instant),
    /// It was back, then; it is done when it serves or has loaded a slice.
    Rejoining(Instant),
    /// It has been back since then; copies of KV rows are being made whole, so that the next turn computes nothing again.
    Mirroring(Instant),
}

impl Rollout {
    /// Whose turn it is.
    pub(super) fn shard(&self) -> Option<&ShardId> {
        self.turn.as_ref().map(|turn| &turn.shard)
    }

    /// When patience with the present turn ends.
    pub(super) fn limit(&self) -> Option<Instant> {
        match self.turn.as_ref()?.stage {
            Stage::Draining => None,
            Stage::Restarting(since) => Some(since + self.return_limit),
            Stage::Rejoining(since) => Some(since + PREPARE_LIMIT),
            Stage::Mirroring(since) => Some(since + MIRROR_LIMIT),
        }
    }
}

impl GroupMachine {
    /// Whether a rolling restart is under way.
    pub fn is_rolling(&self) -> bool {
        self.rollout.is_some()
    }

    pub(super) fn on_rollout(&mut self, but: &[ShardId], return_limit: Option<Duration>, now: Instant) {
        if self.rollout.is_some() {
            let why = "a rolling restart is under way: wait for its end".to_owned();
            return self.push(Action::Turned(Err(ChangeError::Impossible(why))));
        }
        // Spares first, so that they are there when the ranks' turns come; then the last rank to the first.
        let mut queue: Vec<ShardId> = self.attached.keys().filter(|s| !but.contains(s)).cloned().collect();
        if queue.is_empty() && but.is_empty() {
            let why = "no shard is attached".to_owned();
            return self.push(Action::Turned(Err(ChangeError::Impossible(why))));
        }
        queue.sort_by_key(|shard| self.rank_of(shard).map(std::cmp::Reverse));
        self.rollout = Some(Rollout {
            done: 0,
            total: queue.len(),
            queue: queue.into(),
            turn: None,
            return_limit: return_limit.unwrap_or(RETURN_LIMIT),
            longest_stall: Duration::ZERO,
        });
        self.next_turn(now);
    }

    fn next_turn(&mut self, now: Instant) {
        let Some(rollout) = &mut self.rollout else { return };
        while let Some(shard) = rollout.queue.pop_front() {
            let Some(attached) = self.attached.get_mut(&shard) else {
                // It has gone by itself: what comes back is new.
                rollout.done += 1;
                continue;
            };
            attached.leaves.get_or_insert(Cause::Rollout);
            let incarnation = attached.candidate.incarnation;
            rollout.turn = Some(Turn { shard, incarnation, stage: Stage::Draining, stall: Duration::ZERO });
            self.tell_turn("draining");
            self.dismiss();
            self.advance_rollout(now);
            self.reconsider(now);
            return;
        }
        let Rollout { done, total, longest_stall: stall, .. } = *rollout;
        let turned = Turned { shard: None, phase: "done", done, total, stall };
        self.rollout = None;
        self.push(Action::Turned(Ok(turned)));
    }

    fn tell_turn(&mut self, phase: &'static str) {
        if let Some(Rollout { done, total, turn: Some(turn), .. }) = &self.rollout {
            let turned =
                Turned { shard: Some(turn.shard.clone()), phase, done: *done, total: *total, stall: turn.stall };
            self.push(Action::Turned(Ok(turned)));
        }
    }

    /// Requests stood still for so long, and go on.
    pub(super) fn note_stall(&mut self, stall: Duration) {
        if let Some(Rollout { turn: Some(turn), .. }) = &mut self.rollout {
            turn.stall = turn.stall.max(stall);
        }
    }

    fn set_stage(&mut self, stage: Stage) {
        if let Some(Rollout { turn: Some(turn), .. }) = &mut self.rollout {
            turn.stage = stage;
        }
    }

    /// A shard is attached.
    pub(super) fn on_returned(&mut self, candidate: &Candidate, now: Instant) {
        if let Some(Rollout { turn: Some(turn), .. }) = &self.rollout
            && turn.shard == candidate.shard
            && turn.incarnation != candidate.incarnation
        {
            if turn.stage == Stage::Draining {
                // It ended before it was told to.
                self.tell_turn("restarting");
            }
            self.set_stage(Stage::Rejoining(now));
        }
    }

    /// Whether this life of a shard is the one that is being restarted: its stream broke before it heard so.
    pub(super) fn is_to_restart(&self, candidate: &Candidate) -> bool {
        let turn = self.rollout.as_ref().and_then(|rollout| rollout.turn.as_ref());
        turn.is_some_and(|turn| turn.shard == candidate.shard && turn.incarnation == candidate.incarnation)
    }

    /// Goes on with the present turn as far as it goes.
    pub(super) fn advance_rollout(&mut self, now: Instant) {
        let Some(Rollout { turn: Some(turn), .. }) = &self.rollout else { return };
        let shard = turn.shard.clone();
        let attached = self.attached.get(&shard);
        match turn.stage {
            Stage::Draining => {
                let is_told = attached.is_none_or(|a| a.candidate.incarnation != turn.incarnation || a.is_dismissed);
                if is_told {
                    self.set_stage(Stage::Restarting(now));
                    self.tell_turn("restarting");
                }
            }
            Stage::Restarting(_) => {}
            Stage::Rejoining(since) => {
                let is_ready = |a: &Attached| {
                    self.rank_of(&shard).is_some() || !a.prepared.is_empty() || !self.is_to_prepare(&shard, a)
                };
                let is_late = now >= since + PREPARE_LIMIT;
                let is_back = attached.is_some_and(|a| is_late || is_ready(a) && self.recovering.is_none());
                if self.phase == Phase::Serving && is_back {
                    self.set_stage(Stage::Mirroring(now));
                    self.advance_rollout(now);
                }
            }
            Stage::Mirroring(since) => {
                let is_late = now >= since + MIRROR_LIMIT;
                let is_settled = self.recovering.is_none() && !self.lacks_copies(now);
                if self.phase == Phase::Serving && (is_settled || is_late) {
                    self.end_turn(now);
                }
            }
        }
    }

    fn end_turn(&mut self, now: Instant) {
        if let Some(rollout) = &mut self.rollout {
            rollout.done += 1;
            let stall = rollout.turn.as_ref().map_or(Duration::ZERO, |turn| turn.stall);
            rollout.longest_stall = rollout.longest_stall.max(stall);
        }
        self.tell_turn("returned");
        self.next_turn(now);
    }

    /// Ends a rolling restart whose present shard does not come back.
    pub(super) fn rollout_tick(&mut self, now: Instant) {
        let Some(Rollout { turn: Some(turn), done, total, return_limit, .. }) = &self.rollout else { return };
        match turn.stage {
            Stage::Restarting(since) if now >= since + *return_limit => {
                let why = format!(
                    "{} did not come back within {} s ({done} of {total} are done): start it again, then ask again",
                    turn.shard,
                    return_limit.as_secs()
                );
                self.rollout = None;
                self.push(Action::Turned(Err(ChangeError::Failed(why))));
            }
            Stage::Rejoining(since) if now >= since + PREPARE_LIMIT => {
                // Also if it has left again, or the group does not serve: that is noticed by others.
                match self.attached.contains_key(&turn.shard) && self.phase == Phase::Serving {
                    true => self.advance_rollout(now),
                    false => self.set_stage(Stage::Restarting(now)),
                }
            }
            Stage::Mirroring(since) if now >= since + MIRROR_LIMIT => {
                match (self.attached.contains_key(&turn.shard), self.phase == Phase::Serving) {
                    (true, true) => self.advance_rollout(now),
                    // The group was lost meanwhile, or is being switched.
                    (true, false) => self.set_stage(Stage::Mirroring(now)),
                    (false, _) => self.set_stage(Stage::Restarting(now)),
                }
            }
            _ => {}
        }
    }
}
