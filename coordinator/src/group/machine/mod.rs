//! Which shards take which rank, in which epoch, when they may serve, and when that ends. Pure: events and the time in,
//! actions out.
//!
//! ```text
//!                                                             ┌──────── idle ────────┐
//!                                                             ▼                      │
//! Waiting ──enough shards──▶ Taking ──epoch──▶ Loading ──▶ Starting ──▶ Serving ──hold──▶ Holding
//!    ▲                         ▲                  │            │           │             │
//!    │                      Pausing ◀──failed─────┴────────────┴───────────┴─────────────┤
//!    └──too few─────────────────── a rank is lost, stuck or silent ──────────────────────┘
//! ```
//!
//! A formation ends on purpose only between two steps (`Holding`, until the scheduler has none in flight); the next one
//! then begins at once, with the KV pages of the ranks that stay.
//!
//! **Invariants.** Epochs of formations grow. No shard has two ranks. Results reach the scheduler from rank 0 of the
//! serving epoch only, and each `Serving` is followed by exactly one `Lost` before the next.

mod changes;
mod event;
mod expected;
mod formation;
mod inherited;
mod mirroring;
mod results;
mod rollout;
mod seating;
mod standing;
mod watch;

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use phalanx_cluster::id::{Epoch, ShardId};

pub use event::{
    Action, Beat, Candidate, Cause, Changed, Event, Kept, MirrorTo, Mirrors, Origin, Slice, Ticket, Turned,
};
use expected::Expected;
pub use expected::{COPIED_OWNERS_LIMIT, OWNERS_LIMIT};
use results::Results;
use rollout::Rollout;
pub use seating::SliceOf;
use seating::{Owners, Sitter};
pub use standing::{Given, Standing};
use watch::{StepWatch, Witness};

/// How long a shard that was found stuck, slow or failing is seated only if nobody else is there.
const DOUBT: Duration = Duration::from_secs(60);
/// Between looks at who waits for whom.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// What a group is to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// Ranks.
    pub world_size: usize,
    /// Failures in a row, before anything was served, after which each one more is said to be the end.
    pub give_up_after: Option<u32>,
    /// Time without enough shards after which fewer ranks serve; never if unset.
    pub regroup_after: Option<Duration>,
    /// Where ranks copy their KV rows to.
    pub mirror_to: MirrorTo,
    /// A rank without a sign of life for so long counts as silent when somebody must be to blame for a late step.
    pub silent_after: Duration,
}

/// Where a group is.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Phase {
    /// Too few shards are there.
    Waiting,
    /// An epoch is asked of the store.
    Taking,
    /// Until then, after a failure.
    Pausing(Instant),
    /// What each rank has loaded, and when one last made progress.
    Loading(Vec<Option<Slice>>, Instant),
    /// Ranks that are ready, and since when they are awaited.
    Starting(Vec<bool>, Instant),
    Serving,
    /// No more plans; a switch follows once no step is in flight. Why, and since when.
    Holding(Cause, Instant),
}

/// A shard that is attached.
#[derive(Debug, Clone)]
struct Attached {
    candidate: Candidate,
    /// Slices that it has loaded beside the one it serves with.
    prepared: BTreeSet<SliceOf>,
    /// What it was asked to load.
    asked: Option<(usize, Vec<usize>)>,
    /// Since when it has not done all of that.
    asked_at: Option<Instant>,
    /// It took too long: others no longer wait for it.
    prepares_in_vain: bool,
    /// It is to end as soon as it has no rank; why.
    leaves: Option<Cause>,
    /// It was told to end.
    is_dismissed: bool,
    beat: Beat,
    /// As of that sign of life.
    copies_are_near: bool,
    heard: Instant,
}

/// KV pages that ranks keep from an earlier formation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Pages {
    epoch: Epoch,
    world_size: usize,
    kv_blocks: u32,
}

/// Somebody who waits until a shard has no rank.
#[derive(Debug, Clone)]
struct Waiter {
    ticket: Ticket,
    shard: ShardId,
    rank: Option<usize>,
}

/// The state of one group.
#[derive(Debug, Clone)]
pub struct GroupMachine {
    settings: Settings,
    epoch: Epoch,
    /// Taken ahead, so that the next formation need not ask.
    reserved: Option<Epoch>,
    /// The greatest epoch that a shard may know which came from another group: the next one is greater.
    outrun: Epoch,
    /// The store is being asked.
    is_taking: bool,
    /// When to ask the store again for an epoch in reserve.
    reserve_at: Option<Instant>,
    phase: Phase,
    attached: BTreeMap<ShardId, Attached>,
    /// Lives that were found stuck, slow or failing, and until when that counts.
    doubts: BTreeMap<ShardId, (u64, Instant)>,
    owners: Owners,
    expected: Expected,
    /// Of the present formation, else of the last one; in rank order.
    ranks: Vec<ShardId>,
    /// KV blocks of the present formation.
    kv_blocks: u32,
    /// Who gets copies of KV rows in the present formation.
    mirrors: Mirrors,
    /// Who had copies in the formation that served last: by rank.
    copies: Vec<Option<Origin>>,
    /// What ranks keep of the formation that served last.
    pages: Option<Pages>,
    /// What the pages of the present formation hold, until the scheduler knows.
    kept: Option<Kept>,
    drained: BTreeSet<ShardId>,
    waiters: Vec<Waiter>,
    rollout: Option<Rollout>,
    watch: StepWatch,
    /// Of the present formation's steps.
    results: Results,
    /// Since when a switch waits for copies of KV rows.
    awaits_copies: Option<Instant>,
    look_at: Instant,
    warned_slow: Option<ShardId>,
    /// Since when too few shards are there.
    short_since: Option<Instant>,
    /// Bytes of the whole model, once a formation has loaded it.
    weight_bytes: Option<u64>,
    /// When plans last stopped, if none are taken since.
    stopped: Option<Instant>,
    /// How long running requests stood still in the last change.
    stall: Duration,
    /// Since when the group serves, while not all requests that stood still have a token again.
    recovering: Option<Instant>,
    failures: u32,
    /// Why the last formation came to nothing, until one serves.
    last_failure: Option<String>,
    /// Who failed first in the last formations, and in how many in a row.
    first_to_fail: Option<(ShardId, u32)>,
    healthy_steps: u32,
    has_served: bool,
    actions: Vec<Action>,
}

impl GroupMachine {
    /// A group that last had `ranks` in `epoch` (nobody in epoch 0 if it is new).
    pub fn new(settings: Settings, epoch: Epoch, ranks: Vec<ShardId>, now: Instant) -> Self {
        let settings = Settings { world_size: settings.world_size.max(1), ..settings };
        Self {
            settings,
            epoch,
            reserved: None,
            outrun: epoch,
            is_taking: false,
            reserve_at: None,
            phase: Phase::Waiting,
            attached: BTreeMap::new(),
            doubts: BTreeMap::new(),
            owners: Owners::new(ranks.clone()),
            expected: Expected::default(),
            ranks,
            kv_blocks: 0,
            mirrors: Mirrors::Nowhere,
            copies: Vec::new(),
            pages: None,
            kept: None,
            drained: BTreeSet::new(),
            waiters: Vec::new(),
            rollout: None,
            watch: StepWatch::default(),
            results: Results::default(),
            awaits_copies: None,
            look_at: now,
            warned_slow: None,
            short_since: None,
            weight_bytes: None,
            stopped: None,
            stall: Duration::ZERO,
            recovering: None,
            failures: 0,
            last_failure: None,
            first_to_fail: None,
            healthy_steps: 0,
            has_served: false,
            actions: Vec::new(),
        }
    }

    /// The latest epoch that was formed.
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// Ranks of the present formation, else that are wanted.
    pub fn world_size(&self) -> usize {
        if self.is_formed() { self.ranks.len() } else { self.settings.world_size }
    }

    /// As operators know it: "waiting", "forming", "loading", "serving" or "switching".
    pub fn phase(&self) -> &'static str {
        match self.phase {
            Phase::Waiting => "waiting",
            Phase::Taking | Phase::Pausing(_) => "forming",
            Phase::Loading(..) | Phase::Starting(..) => "loading",
            Phase::Serving => "serving",
            Phase::Holding(..) => "switching",
        }
    }

    /// KV blocks of the last formation of this world size that served; 0 if none has.
    pub fn last_kv_blocks(&self) -> u32 {
        self.pages.filter(|p| p.world_size == self.ranks.len()).map_or(0, |p| p.kv_blocks)
    }

    /// Shards of the present formation in rank order; empty if there is none.
    pub fn ranks(&self) -> &[ShardId] {
        if self.is_formed() { &self.ranks } else { &[] }
    }

    /// Shards that get copies of KV rows in the present formation.
    pub fn mirrors(&self) -> BTreeSet<&ShardId> {
        (0..self.ranks.len()).filter_map(|rank| self.mirrors.holder(rank, &self.ranks)).collect()
    }

    /// Rank of a shard in the present formation.
    pub fn rank_of(&self, shard: &ShardId) -> Option<usize> {
        self.ranks().iter().position(|r| r == shard)
    }

    /// What a shard is to the group: "rank", "spare", "joining" (seated only if nobody else is there), "draining" or
    /// "drained".
    pub fn role_of(&self, shard: &ShardId, now: Instant) -> &'static str {
        let leaves = self.attached.get(shard).is_some_and(|a| a.leaves.is_some());
        match (self.rank_of(shard), self.drained.contains(shard) || leaves) {
            (Some(_), true) => "draining",
            (Some(_), false) => "rank",
            (None, true) => "drained",
            (None, false) if self.is_doubtful(shard, now) => "joining",
            (None, false) => "spare",
        }
    }

    /// Ranks of the present world size that a shard has loaded beside the one it serves with.
    pub fn prepared_ranks(&self, shard: &ShardId) -> Vec<usize> {
        let world_size = self.world_size();
        let prepared = self.attached.get(shard).into_iter().flat_map(|a| &a.prepared);
        prepared.filter(|(size, _)| *size == world_size).map(|(_, rank)| *rank).collect()
    }

    /// Who would take a rank of the present formation if its shard were lost now.
    pub fn successor_of(&self, rank: usize, now: Instant) -> Option<ShardId> {
        let shard = self.ranks().get(rank)?;
        self.seats(self.ranks.len(), now, |s| s != shard)?.get(rank).cloned()
    }

    /// Since a shard's last sign of life.
    pub fn silent_for(&self, shard: &ShardId, now: Instant) -> Duration {
        self.attached.get(shard).map_or(Duration::MAX, |a| now.saturating_duration_since(a.heard))
    }

    /// See [`Settings::regroup_after`].
    pub fn regroup_after(&self) -> Option<Duration> {
        self.settings.regroup_after.filter(|_| self.settings.world_size > 1)
    }

    /// When `Tick` is due, if nothing happens before.
    pub fn wakes_at(&self) -> Option<Instant> {
        let by_phase = match &self.phase {
            // Fewer ranks are not formed either before owners were waited for.
            Phase::Waiting => self.awaits_others_until().or_else(|| self.regroups_at()),
            Phase::Taking => None,
            Phase::Pausing(until) => Some(*until),
            Phase::Loading(_, since) => Some(*since + formation::LOAD_LIMIT),
            Phase::Starting(_, since) => Some(*since + formation::START_LIMIT),
            Phase::Serving => {
                let look = self.watch.is_busy().then_some(self.look_at + LOOK_EVERY);
                let recovery = self.recovering.map(|since| since + changes::RECOVERY_LIMIT);
                // Who is trusted again may be given copies.
                let trust = self.doubts.values().map(|(_, until)| *until).min();
                let copies = self.catch_up_limit();
                [self.watch.due(), look, self.prepare_limit(), recovery, trust, copies].into_iter().flatten().min()
            }
            Phase::Holding(_, since) => {
                [self.watch.due(), Some(*since + changes::HOLD_LIMIT)].into_iter().flatten().min()
            }
        };
        let rollout = self.rollout.as_ref().and_then(Rollout::limit);
        [by_phase, self.reserve_at, rollout].into_iter().flatten().min()
    }

    fn is_formed(&self) -> bool {
        matches!(self.phase, Phase::Loading(..) | Phase::Starting(..) | Phase::Serving | Phase::Holding(..))
    }

    /// Whether plans of the present formation may be in flight.
    fn is_running(&self) -> bool {
        matches!(self.phase, Phase::Serving | Phase::Holding(..))
    }

    /// Handles one event.
    pub fn step(&mut self, now: Instant, event: Event) -> Vec<Action> {
        match event {
            Event::Arrived(candidate) => self.on_arrived(candidate, now),
            Event::Left { from, cause, reason } => {
                if self.is_attached(&from) {
                    self.forget(&from.shard, cause, &reason, now);
                }
            }
            Event::EpochTaken(epoch) => self.on_epoch(epoch, now),
            Event::EpochRefused => self.on_epoch_refused(now),
            Event::Outrun(epoch) => self.on_outrun(epoch),
            Event::Tick => self.on_tick(now),
            Event::Progress { from, epoch } => {
                self.hear(&from, now);
                if self.rank_in(&from, epoch).is_some()
                    && let Phase::Loading(_, since) = &mut self.phase
                {
                    *since = now;
                }
            }
            Event::Loaded { from, epoch, slice } => self.of_rank(&from, epoch, now, |m, rank| {
                m.on_loaded(rank, slice, now);
            }),
            Event::Ready { from, epoch } => self.of_rank(&from, epoch, now, |m, rank| m.on_ready(rank, now)),
            Event::Failed { from, epoch, error } => self.of_rank(&from, epoch, now, |m, rank| {
                m.on_failed(rank, &from.shard, &error, now);
            }),
            Event::Stepped { from, epoch, step } => self.of_rank(&from, epoch, now, |m, rank| {
                m.on_stepped(rank, step, now);
            }),
            Event::Planned { epoch, step, rows } => {
                if epoch == self.epoch && self.is_running() {
                    self.watch.planned(step, rows, self.ranks.len(), now);
                }
            }
            Event::Prepared { from, world_size, rank } => {
                self.on_prepared(&from, (world_size, rank), now);
            }
            Event::Beat { from, beat } => {
                self.on_beat(&from, beat, now);
            }
            Event::Idle(epoch) => self.on_idle(epoch, now),
            Event::Recovered { epoch, stall } => self.on_recovered(epoch, stall, now),
            Event::Leaving(from) => self.on_leaving(&from, now),
            Event::Drain { ticket, shard, is_helped } => self.on_drain(ticket, shard, is_helped, now),
            Event::Undrain { ticket, shard } => self.on_undrain(ticket, &shard, now),
            Event::Rollout { but, return_limit } => self.on_rollout(&but, return_limit, now),
        }
        std::mem::take(&mut self.actions)
    }

    fn push(&mut self, action: Action) {
        self.actions.push(action);
    }

    fn is_attached(&self, from: &Origin) -> bool {
        self.attached.get(&from.shard).is_some_and(|a| a.candidate.incarnation == from.incarnation)
    }

    fn life(&mut self, from: &Origin) -> Option<&mut Attached> {
        self.attached.get_mut(&from.shard).filter(|a| a.candidate.incarnation == from.incarnation)
    }

    fn hear(&mut self, from: &Origin, now: Instant) {
        if let Some(attached) = self.life(from) {
            attached.heard = now;
        }
    }

    /// The rank that a message is from, if it belongs to the present formation.
    fn rank_in(&self, from: &Origin, epoch: Epoch) -> Option<usize> {
        if epoch == self.epoch && self.is_attached(from) { self.rank_of(&from.shard) } else { None }
    }

    /// Handles what a rank of the present formation says; counts what somebody else says.
    fn of_rank(&mut self, from: &Origin, epoch: Epoch, now: Instant, handle: impl FnOnce(&mut Self, usize)) {
        self.hear(from, now);
        match self.rank_in(from, epoch) {
            Some(rank) => handle(self, rank),
            None => self.push(Action::CountFenced),
        }
    }

    fn may_sit(&self, attached: &Attached) -> bool {
        attached.leaves.is_none() && !self.drained.contains(&attached.candidate.shard)
    }

    fn is_doubtful(&self, shard: &ShardId, now: Instant) -> bool {
        let incarnation = self.attached.get(shard).map(|a| a.candidate.incarnation);
        self.doubts.get(shard).is_some_and(|(life, until)| Some(*life) == incarnation && now < *until)
    }

    fn doubt(&mut self, shard: &ShardId, now: Instant) {
        if let Some(attached) = self.attached.get(shard) {
            self.doubts.insert(shard.clone(), (attached.candidate.incarnation, now + DOUBT));
        }
    }

    /// Who would take which rank, of those that may and that `also` allows.
    fn seats(&self, world_size: usize, now: Instant, also: impl Fn(&ShardId) -> bool) -> Option<Vec<ShardId>> {
        let mut kinds: BTreeMap<&str, Vec<Sitter<'_>>> = BTreeMap::new();
        for (shard, attached) in &self.attached {
            if self.may_sit(attached) && also(shard) && self.has_memory_for(world_size, attached) {
                let is_doubtful = self.is_doubtful(shard, now);
                let has_copies = self.mirrors == Mirrors::Spare(shard.clone());
                // What an earlier leader left is wanted until something else has been computed.
                let brought = Some(&attached.candidate).filter(|_| !self.has_served);
                let sitter = Sitter {
                    shard,
                    is_doubtful,
                    prepared: &attached.prepared,
                    has_copies,
                    holds: brought.and_then(|candidate| candidate.holds),
                    copies: brought.map(|candidate| &candidate.copies),
                };
                kinds.entry(&attached.candidate.kind).or_default().push(sitter);
            }
        }
        let returning = |sitters: &[Sitter<'_>]| sitters.iter().filter(|s| self.ranks.contains(s.shard)).count();
        let enough = kinds.into_values().filter(|sitters| sitters.len() >= world_size);
        let mut sitters = enough.max_by_key(|sitters| (returning(sitters), sitters.len()))?;
        // Where nothing else decides: those that had a rank, in its order, then by name.
        sitters.sort_by_key(|s| self.ranks.iter().position(|r| r == s.shard).unwrap_or(usize::MAX));
        self.owners.seat(world_size, &sitters)
    }

    /// What is known of each rank.
    fn witnesses(&self, now: Instant) -> Vec<Witness> {
        let witness = |shard| match self.attached.get(shard) {
            Some(attached) => {
                let beat = attached.beat;
                // What it said of another epoch is no news.
                let waits_for = beat.waits_for.filter(|_| beat.busy.is_some_and(|(epoch, _)| epoch == self.epoch));
                Witness { silent: now.saturating_duration_since(attached.heard), beat: Beat { waits_for, ..beat } }
            }
            None => Witness { silent: Duration::MAX, beat: Beat::default() },
        };
        self.ranks.iter().map(witness).collect()
    }
}

#[cfg(test)]
mod tests;
