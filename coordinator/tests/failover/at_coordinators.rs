//! What coordinators do: the actors around the machines of group and scheduler.

use std::collections::BTreeSet;

use phalanx_cluster::id::Epoch;
use phalanx_coordinator::{
    group::machine::{Action as GroupAction, Beat, Cause, Event as GroupEvent, Kept as InPages, Slice},
    request::RequestEvent,
    scheduler::event::{Action, Event, Kept},
    sequence::RequestKey,
};
use phalanx_proto::v1::StepResult;

use super::{
    coordinator::{Coordinator, number},
    faults::Trouble,
    shard::{Form, Health, ToShard},
    world::{FromShard, Happening, World},
};

impl World {
    pub(super) fn tell(&mut self, coordinator: usize, shard: usize, message: ToShard) {
        if let Some((link, _)) = self.coordinators[coordinator].links.get(&shard).copied() {
            self.post(link, true, Happening::ToShard { shard, link, message });
        }
    }

    pub(super) fn at_coordinator(&mut self, at: usize, shard: usize, link: u64, incarnation: u64, message: FromShard) {
        if let FromShard::Hello { holds, copies } = message {
            self.coordinators[at].links.insert(shard, (link, incarnation));
            let candidate = Coordinator::candidate(shard, incarnation, holds, copies);
            return self.group_event(at, GroupEvent::Arrived(candidate), None);
        }
        if self.coordinators[at].links.get(&shard).is_none_or(|(l, _)| *l != link) {
            return;
        }
        let Some(from) = self.coordinators[at].origin(shard) else { return };
        match message {
            FromShard::Hello { .. } => {}
            FromShard::Loaded { epoch, kept, sealed, n_blocks } => {
                let slice = Slice { kv_blocks: n_blocks as u32, weight_bytes: 1, kept_through: kept, sealed };
                self.group_event(at, GroupEvent::Loaded { from, epoch: Epoch::from_raw(epoch), slice }, None);
            }
            FromShard::Prepared { world_size, rank } => {
                self.group_event(at, GroupEvent::Prepared { from, world_size, rank }, None);
            }
            FromShard::Ready { epoch } => {
                self.group_event(at, GroupEvent::Ready { from, epoch: Epoch::from_raw(epoch) }, None);
            }
            FromShard::Result(result) => {
                let (epoch, step) = (Epoch::from_raw(result.epoch), result.step);
                self.group_event(at, GroupEvent::Stepped { from, epoch, step }, Some(result));
            }
            FromShard::Beat { mirrored: (epoch, step) } => {
                let beat = Beat { mirrored: Some((Epoch::from_raw(epoch), step)), ..Beat::default() };
                self.group_event(at, GroupEvent::Beat { from, beat }, None);
            }
            FromShard::Leaving => self.group_event(at, GroupEvent::Leaving(from), None),
        }
    }

    pub(super) fn down(&mut self, at: usize, shard: usize, link: u64) {
        if self.coordinators[at].links.get(&shard).is_none_or(|(l, _)| *l != link) {
            return;
        }
        let Some(from) = self.coordinators[at].origin(shard) else { return };
        self.coordinators[at].links.remove(&shard);
        self.cut.insert(link);
        self.after(1, Happening::DownAtShard { shard, link });
        let reason = "the link is down".to_owned();
        self.group_event(at, GroupEvent::Left { from, cause: Cause::Lost, reason }, None);
    }

    pub(super) fn group_event(&mut self, at: usize, event: GroupEvent, result: Option<StepResult>) {
        if !self.coordinators[at].is_alive {
            return;
        }
        let mut result = result;
        let now = self.now();
        for action in self.coordinators[at].group.step(now, event) {
            if self.is_verbose {
                println!("    coordinator {at}: {action:?}");
            }
            match action {
                GroupAction::TakeEpoch(after) => self.take_epoch(at, after.raw()),
                GroupAction::Form { epoch, ranks, keep_kv_of, keep_sealed, mirrors, copies } => {
                    for rank in 0..ranks.len() {
                        if let Some(holder) = mirrors.holder(rank, &ranks).map(number)
                            && let Some((_, incarnation)) = self.coordinators[at].links.get(&holder)
                        {
                            self.holders.insert((epoch.raw(), rank), (holder, *incarnation));
                        }
                    }
                    let ranks: Vec<usize> = ranks.iter().map(number).collect();
                    let distinct: BTreeSet<_> = ranks.iter().collect();
                    assert_eq!(distinct.len(), ranks.len(), "no shard has two ranks");
                    assert!((1..=self.world_size).contains(&ranks.len()), "ranks of the group");
                    self.totals.n_smaller += usize::from(ranks.len() < self.world_size);
                    self.coordinators[at].ranks.clone_from(&ranks);
                    let (epoch, keep_kv_of) = (epoch.raw(), keep_kv_of.map(Epoch::raw));
                    for (rank, shard) in ranks.iter().enumerate() {
                        let copy_at = copies.iter().find(|(of, _)| *of == rank).map(|(_, holder)| number(holder));
                        let form = Form { epoch, rank, ranks: ranks.clone(), keep_kv_of, keep_sealed, copy_at };
                        self.tell(at, *shard, ToShard::Form(form));
                    }
                }
                GroupAction::Serve { epoch, kv_blocks } => {
                    for shard in self.coordinators[at].ranks.clone() {
                        self.tell(at, shard, ToShard::Serve { epoch: epoch.raw(), n_blocks: kv_blocks as usize });
                    }
                }
                GroupAction::Serving { epoch, kv_blocks, kept } => {
                    let (epoch, n_blocks) = (epoch.raw(), kv_blocks as usize);
                    let kept = kept.map(|kept| match kept {
                        InPages::Through(of, through_step) => Kept::Rows { epoch: of.raw(), through_step },
                        InPages::Sealed(blocks) => Kept::Sealed(blocks),
                    });
                    self.totals.n_kept += usize::from(matches!(kept, Some(Kept::Rows { .. })));
                    self.totals.n_inherited += usize::from(matches!(kept, Some(Kept::Sealed(_))));
                    assert!(self.planner_of.insert(epoch, (at, None)).is_none(), "epoch {epoch} is served twice");
                    self.scheduler_event(at, Event::GroupServing { epoch, n_blocks, kept });
                }
                GroupAction::Hold(epoch) => self.scheduler_event(at, Event::Hold { epoch: epoch.raw() }),
                GroupAction::Resume(epoch) => self.scheduler_event(at, Event::Resume { epoch: epoch.raw() }),
                GroupAction::Lost { epoch, is_planned, .. } => {
                    self.totals.n_lost_groups += usize::from(!is_planned);
                    self.totals.n_switched += usize::from(is_planned);
                    self.scheduler_event(at, Event::GroupLost { epoch: epoch.raw(), is_planned });
                }
                GroupAction::Retire { epoch, shard, keep_kv } => {
                    self.tell(at, number(&shard), ToShard::Retire { epoch: epoch.raw(), keep_kv });
                }
                GroupAction::Prepare { shard, world_size, ranks } => {
                    self.tell(at, number(&shard), ToShard::Prepare { world_size, ranks });
                }
                GroupAction::Evict { shard, .. } => self.evict(at, number(&shard)),
                GroupAction::Shutdown { shard, .. } => self.tell(at, number(&shard), ToShard::Shutdown),
                GroupAction::Deliver => {
                    if let Some(result) = result.take() {
                        self.scheduler_event(at, Event::Stepped(result));
                    }
                }
                GroupAction::CountFenced
                | GroupAction::WarnSlow(_)
                | GroupAction::Answer(..)
                | GroupAction::Turned(_) => {}
                GroupAction::GiveUp(cause) => panic!("given up: {cause}"),
            }
        }
        self.arm(at);
    }

    /// Wakes the group's machine when it wants to be woken.
    fn arm(&mut self, at: usize) {
        let Some(wakes_at) = self.coordinators[at].group.wakes_at() else { return };
        let ms = wakes_at.saturating_duration_since(self.begun).as_nanos().div_ceil(1_000_000) as u64;
        let ms = ms.max(self.now_ms);
        if self.coordinators[at].wakes_at_ms.is_none_or(|armed| ms < armed) {
            self.coordinators[at].wakes_at_ms = Some(ms);
            self.after(ms - self.now_ms, Happening::Tick { coordinator: at, at_ms: ms });
        }
    }

    pub(super) fn tick(&mut self, at: usize, at_ms: u64) {
        if self.coordinators[at].wakes_at_ms == Some(at_ms) {
            self.coordinators[at].wakes_at_ms = None;
            self.group_event(at, GroupEvent::Tick, None);
        }
    }

    /// Closes the link to a shard that is stuck; its keeper may kill it.
    fn evict(&mut self, at: usize, shard: usize) {
        self.totals.n_evicted += 1;
        let Some((link, _)) = self.coordinators[at].links.remove(&shard) else { return };
        self.cut.insert(link);
        self.after(1, Happening::DownAtShard { shard, link });
        if self.luck.one_in(2) && self.shards[shard].health != Health::Dead {
            self.kill(shard);
        }
    }

    /// Compare-and-swap in the store, as the group's actor does it.
    pub(super) fn take_epoch(&mut self, at: usize, after: u64) {
        let mut epoch = None;
        if self.now_ms >= self.store_away_until_ms {
            self.stored_epoch = self.stored_epoch.max(after) + 1;
            epoch = Some(self.stored_epoch);
        }
        // The swap may be done and the answer lost.
        if self.trouble != Trouble::None && self.luck.one_in(30) {
            epoch = None;
        }
        self.totals.n_refused_epochs += usize::from(epoch.is_none());
        let ms = self.luck.below(5) as u64;
        self.after(ms, Happening::EpochAnswer { coordinator: at, epoch });
    }

    pub(super) fn scheduler_event(&mut self, at: usize, event: Event) {
        if !self.coordinators[at].is_alive {
            return;
        }
        let now = self.now();
        let actions = self.coordinators[at].scheduler.step(now, event);
        self.coordinators[at].scheduler.check();
        for action in actions {
            match action {
                Action::SendPlan(plan) => {
                    if self.is_verbose {
                        println!("    coordinator {at}: {plan:?}");
                    }
                    let stream =
                        self.planner_of.get_mut(&plan.epoch).expect("an epoch is served before it is planned for");
                    assert_eq!(stream.0, at, "one coordinator plans in an epoch");
                    assert!(
                        stream.1.is_none_or(|last| plan.step == last + 1),
                        "step {} after {:?}",
                        plan.step,
                        stream.1
                    );
                    stream.1 = Some(plan.step);
                    for shard in self.coordinators[at].ranks.clone() {
                        self.tell(at, shard, ToShard::Plan(plan.clone()));
                    }
                    let rows = plan.chunks.iter().map(|c| c.len).sum();
                    let planned = GroupEvent::Planned { epoch: Epoch::from_raw(plan.epoch), step: plan.step, rows };
                    self.group_event(at, planned, None);
                }
                Action::Idle(epoch) => {
                    let ms = self.luck.below(3) as u64;
                    self.after(ms, Happening::Idle { coordinator: at, epoch });
                }
                Action::Recovered { epoch, stall } => {
                    let ms = self.luck.below(3) as u64;
                    self.after(ms, Happening::Recovered { coordinator: at, epoch, stall });
                }
                Action::Emit(key, event) => self.emit(at, key, event),
                Action::Warn(reason) => panic!("{reason}"),
                Action::Admitted(_) | Action::Measure(_) => {}
            }
        }
    }

    pub(super) fn emit(&mut self, at: usize, key: RequestKey, event: RequestEvent) {
        let client = key.0 as usize;
        if self.is_verbose {
            println!("    coordinator {at} to client {client}: {event:?}");
        }
        // An old leader's clients have gone to the new one.
        if self.lives_at[client] == at {
            self.clients[client].take(event);
        }
    }
}
