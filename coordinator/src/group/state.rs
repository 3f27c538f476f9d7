//! What the group's actor does: what it hears (`heard`) to events, the machine's actions to messages.

mod heard;

use std::{
    collections::BTreeMap,
    sync::{Arc, PoisonError},
    time::Instant,
};

use phalanx_cluster::id::{Epoch, ShardId};
use phalanx_proto::v1::{
    DrainResponse, Form, Prepare, Retire, RolloutEvent, Serve, Shutdown, StepResult, coordinator_message::Message,
};
use ractor::{ActorProcessingErr, ActorRef, RpcReplyPort};
use rustix::rand::{GetRandomFlags, getrandom};
use tokio::sync::mpsc;

use super::{
    actor::{GroupConfig, GroupMsg, GroupStart, Notice, ToMembership},
    alarm::Alarm,
    change::{ChangeError, RollingRestart},
    drained::DrainedRecord,
    epochs,
    machine::{self, Action, Cause, Changed, Event, Given, GroupMachine, MirrorTo, Mirrors, Standing, Ticket, Turned},
    meters::Meters,
    plans::GroupPlans,
    progress::LoadProgress,
    seats::Seats,
};
use crate::scheduler::handle::{GroupEvent, Kept};

/// Bytes that name a formation's shared memory and authenticate its connections.
const SECRET_BYTES: usize = 32;

type DrainReply = RpcReplyPort<Result<DrainResponse, ChangeError>>;
type UndrainReply = RpcReplyPort<Result<(), ChangeError>>;
type RolloutEvents = mpsc::UnboundedSender<Result<RolloutEvent, ChangeError>>;

/// Somebody who waits for a change.
enum Asker {
    Drain(DrainReply),
    Undrain(UndrainReply),
}

/// What the actor knows.
pub struct State {
    pub(super) config: Arc<GroupConfig>,
    pub(super) machine: GroupMachine,
    pub(super) seats: Seats,
    pub(super) alarm: Alarm,
    pub(super) is_ending: bool,
    drained: DrainedRecord,
    pub(super) plans: Option<Arc<GroupPlans>>,
    progress: Option<LoadProgress>,
    pub(super) meters: Meters,
    told_to_wait: Option<String>,
    membership: Box<dyn Fn(ToMembership) + Send + Sync>,
    told_standing: Option<Standing>,
    askers: BTreeMap<Ticket, Asker>,
    next_ticket: Ticket,
    rollout: Option<RolloutEvents>,
    /// The greatest epoch that was taken.
    latest: Epoch,
}

impl State {
    pub(super) fn new(start: GroupStart, machine: GroupMachine, drained: DrainedRecord, alarm: Alarm) -> Self {
        let latest = machine.epoch();
        let config = start.config;
        let meters = Meters::new(&config.labels, config.settings.world_size);
        let seats = Seats::new(config.labels.clone());
        Self {
            config,
            membership: start.membership,
            told_standing: None,
            machine,
            seats,
            alarm,
            is_ending: false,
            drained,
            plans: None,
            progress: None,
            meters,
            told_to_wait: None,
            askers: BTreeMap::new(),
            next_ticket: 1,
            rollout: None,
            latest,
        }
    }

    pub(super) fn drain(
        &mut self,
        myself: &ActorRef<GroupMsg>,
        shard: ShardId,
        is_helped: bool,
        reply: DrainReply,
    ) -> Result<(), ActorProcessingErr> {
        let ticket = self.ticket(Asker::Drain(reply));
        self.step(myself, Event::Drain { ticket, shard, is_helped }, None)?;
        self.drained.set(self.machine.drained());
        Ok(())
    }

    pub(super) fn undrain(
        &mut self,
        myself: &ActorRef<GroupMsg>,
        shard: ShardId,
        reply: UndrainReply,
    ) -> Result<(), ActorProcessingErr> {
        let ticket = self.ticket(Asker::Undrain(reply));
        self.step(myself, Event::Undrain { ticket, shard }, None)?;
        self.drained.set(self.machine.drained());
        Ok(())
    }

    /// Gives a shard to another group, if one is free. It has left when membership hears of it.
    pub(super) fn release(
        &mut self,
        myself: &ActorRef<GroupMsg>,
        ticket: u64,
        given: Given,
    ) -> Result<(), ActorProcessingErr> {
        let shard = self.machine.can_give(given, Instant::now());
        let link = shard.and_then(|shard| self.seats.get(&shard)).map(|seat| seat.link.clone());
        if let Some(link) = &link {
            let from = link.origin().clone();
            tracing::info!(shard = %from.shard, group = self.config.index, "giving a shard to another group");
            self.seats.remove(&from);
            let reason = "another group needs it".to_owned();
            self.step(myself, Event::Left { from, cause: Cause::Lost, reason }, None)?;
        }
        let given = link.map(|link| (link.origin().shard.clone(), link.stream()));
        (self.membership)(ToMembership::Released { ticket, given });
        Ok(())
    }

    pub(super) fn say_where_it_stands(&mut self) {
        let standing = self.machine.standing();
        if self.told_standing.as_ref() != Some(&standing) {
            (self.membership)(ToMembership::Stands(standing.clone()));
            self.told_standing = Some(standing);
        }
    }

    pub(super) fn roll_out(
        &mut self,
        myself: &ActorRef<GroupMsg>,
        rollout: RollingRestart,
        events: RolloutEvents,
    ) -> Result<(), ActorProcessingErr> {
        if self.machine.is_rolling() {
            let why = "a rolling restart is under way: wait for its end".to_owned();
            // Who asked may have given up.
            drop(events.send(Err(ChangeError::Impossible(why))));
            return Ok(());
        }
        self.rollout = Some(events);
        let RollingRestart { but, return_limit } = rollout;
        self.step(myself, Event::Rollout { but, return_limit }, None)
    }

    fn ticket(&mut self, asker: Asker) -> Ticket {
        let ticket = self.next_ticket;
        self.next_ticket += 1;
        self.askers.insert(ticket, asker);
        ticket
    }

    pub(super) fn step(
        &mut self,
        myself: &ActorRef<GroupMsg>,
        event: Event,
        mut result: Option<StepResult>,
    ) -> Result<(), ActorProcessingErr> {
        if let Event::EpochTaken(epoch) = &event {
            self.latest = self.latest.max(*epoch);
        }
        for action in self.machine.step(Instant::now(), event) {
            match action {
                Action::TakeEpoch(after) => self.take_epoch(myself, after.max(self.latest)),
                Action::Form { epoch, ranks, keep_kv_of, keep_sealed, mirrors, copies } => {
                    self.form(epoch, ranks, (keep_kv_of, keep_sealed), &mirrors, &copies)?;
                }
                Action::Serve { epoch, kv_blocks } => {
                    tracing::info!(%epoch, kv_blocks, "all ranks are loaded");
                    for shard in self.machine.ranks() {
                        self.seats.tell(shard, Message::Serve(Serve { epoch: epoch.raw(), kv_blocks }));
                    }
                }
                Action::Serving { epoch, kv_blocks, kept } => self.serving(myself, epoch, kv_blocks, kept),
                Action::Hold(epoch) => (self.config.scheduler)(GroupEvent::Hold { epoch: epoch.raw() }),
                Action::Resume(epoch) => (self.config.scheduler)(GroupEvent::Resume { epoch: epoch.raw() }),
                Action::Lost { epoch, cause, reason, is_planned } => self.lost(epoch, cause, &reason, is_planned),
                Action::Retire { epoch, shard, keep_kv } => {
                    self.seats.tell(&shard, Message::Retire(Retire { epoch: epoch.raw(), keep_kv }));
                }
                Action::Prepare { shard, world_size, ranks } => self.prepare(&shard, world_size, &ranks),
                Action::Evict { shard, cause } => self.evict(&shard, cause),
                Action::Shutdown { shard, reason } => {
                    tracing::info!(%shard, reason, "telling a shard to end");
                    self.seats.tell(&shard, Message::Shutdown(Shutdown { reason }));
                }
                Action::Deliver => {
                    if let Some(result) = result.take() {
                        (self.config.scheduler)(GroupEvent::Stepped(result));
                    }
                }
                Action::CountFenced => self.meters.fenced(),
                Action::WarnSlow(shard) => {
                    tracing::warn!(%shard, "a rank keeps the others waiting: its machine is slow or busy");
                }
                Action::Answer(ticket, answer) => self.answer(ticket, answer),
                Action::Turned(turned) => self.turned(turned),
                Action::GiveUp(cause) => self.notice(Notice::GiveUp { group: self.config.index, cause }),
            }
        }
        Ok(())
    }

    fn take_epoch(&self, myself: &ActorRef<GroupMsg>, after: Epoch) {
        let (store, myself) = (Arc::clone(&self.config.store), myself.clone());
        tokio::spawn(async move {
            let taken = epochs::take(&*store, after).await.map_err(|e| e.to_string());
            // The actor may have ended: its successor asks again.
            let _ = myself.cast(GroupMsg::EpochTaken(taken));
        });
    }

    fn form(
        &mut self,
        epoch: Epoch,
        ranks: Vec<ShardId>,
        (keep_kv_of, keep_sealed_kv): (Option<Epoch>, bool),
        mirrors: &Mirrors,
        copies: &[(usize, ShardId)],
    ) -> Result<(), ActorProcessingErr> {
        if !(self.config.leads)() {
            tracing::debug!(%epoch, "this leadership is over: nothing is formed");
            return Ok(());
        }
        let shards: Vec<&str> = ranks.iter().map(|s| s.0.as_str()).collect();
        let keep_kv_of_epoch = keep_kv_of.map_or(0, Epoch::raw);
        tracing::info!(%epoch, ?shards, keep_kv_of_epoch, keep_sealed_kv, "forming");
        let mut collective_secret = vec![0; SECRET_BYTES];
        let filled = getrandom(&mut collective_secret, GetRandomFlags::empty())?;
        if filled != SECRET_BYTES {
            return Err("the system gave too few random bytes".into());
        }
        let form = Form {
            epoch: epoch.raw(),
            world_size: u32::try_from(ranks.len()).unwrap_or(u32::MAX),
            peers: self.seats.peers(&ranks),
            collective_secret,
            keep_kv_of_epoch,
            keep_sealed_kv,
            kv_blocks: self.machine.last_kv_blocks(),
            ..self.config.form.clone()
        };
        let n_sources = mirrors.sources(ranks.len());
        for (index, shard) in ranks.iter().enumerate() {
            let mirror = mirrors.holder(index, &ranks).and_then(|holder| self.seats.mirror(holder, n_sources));
            let copy = copies.iter().find(|(of, _)| *of == index);
            let form = Form {
                rank: u32::try_from(index).unwrap_or(u32::MAX),
                mirrors: mirror.into_iter().collect(),
                kv_from: copy.and_then(|(_, holder)| self.seats.mirror(holder, n_sources)),
                ..form.clone()
            };
            self.seats.tell(shard, Message::Form(form));
        }
        self.progress = Some(LoadProgress::new(ranks.len()));
        self.config.loading.begin(self.config.index, ranks.len());
        let (store, group) = (Arc::clone(&self.config.store), self.config.index);
        tokio::spawn(async move {
            if let Err(error) = epochs::remember_ranks(&*store, group, epoch, ranks).await {
                tracing::warn!(%error, "the ranks can't be kept in the store");
            }
        });
        Ok(())
    }

    fn prepare(&self, shard: &ShardId, world_size: usize, ranks: &[usize]) {
        let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        let form = Form {
            epoch: self.machine.epoch().raw(),
            world_size: count(world_size),
            kv_blocks: self.machine.last_kv_blocks(),
            ..self.config.form.clone()
        };
        let reserve_kv = self.config.settings.mirror_to != MirrorTo::Spare;
        tracing::info!(%shard, world_size, ?ranks, "a spare is to load slices ahead");
        let ranks = ranks.iter().map(|r| count(*r)).collect();
        self.seats.tell(shard, Message::Prepare(Prepare { form: Some(form), ranks, reserve_kv }));
    }

    fn serving(&mut self, myself: &ActorRef<GroupMsg>, epoch: Epoch, kv_blocks: u32, kept: Option<machine::Kept>) {
        self.progress = None;
        self.config.loading.serves();
        let shards = self.machine.ranks().to_vec();
        let links = shards.iter().filter_map(|s| self.seats.get(s)).map(|seat| seat.link.clone()).collect();
        for (rank, shard) in shards.iter().enumerate() {
            self.meters.take(rank, &shard.0);
        }
        let plans = GroupPlans::new(epoch, links, myself.clone());
        let (kept_through_step, kept_blocks) = match &kept {
            Some(machine::Kept::Through(_, step)) => (Some(*step), None),
            Some(machine::Kept::Sealed(blocks)) => (None, Some(blocks.len())),
            None => (None, None),
        };
        tracing::info!(%epoch, kv_blocks, kept_through_step, kept_blocks, "serving");
        self.plans = Some(Arc::clone(&plans));
        *self.config.serving.lock().unwrap_or_else(PoisonError::into_inner) = Some(epoch);
        let n_blocks = kv_blocks as usize;
        let kept = kept.map(|kept| match kept {
            machine::Kept::Through(epoch, through_step) => Kept::Rows { epoch: epoch.raw(), through_step },
            machine::Kept::Sealed(blocks) => Kept::Sealed(blocks),
        });
        (self.config.scheduler)(GroupEvent::Serving { epoch: epoch.raw(), n_blocks, plans, kept });
        self.notice(Notice::Serving { epoch, shards });
    }

    fn lost(&mut self, epoch: Epoch, cause: Cause, reason: &str, is_planned: bool) {
        if self.is_ending {
            tracing::debug!(%epoch, reason, "the group ends");
        } else if is_planned {
            tracing::info!(%epoch, cause = cause.name(), "the group is switched");
        } else {
            tracing::warn!(%epoch, reason, "the group is lost; running requests wait for the next");
        }
        if let Some(plans) = self.plans.take() {
            plans.end();
        }
        if !self.is_ending {
            self.meters.ended(cause);
        }
        self.config.lost(reason, is_planned);
    }

    fn evict(&mut self, shard: &ShardId, cause: Cause) {
        let Some(seat) = self.seats.get(shard) else { return };
        tracing::warn!(%shard, cause = cause.name(), "closing the stream of a shard that is stuck");
        let (from, pid) = (seat.link.origin().clone(), seat.hello.pid);
        seat.link.close();
        self.seats.remove(&from);
        self.notice(Notice::Stuck { shard: shard.clone(), pid });
    }

    pub(super) fn notice(&self, notice: Notice) {
        // The process is about to end: nobody listens any more if it already does.
        let _ = self.config.notices.send(notice);
    }

    fn answer(&mut self, ticket: Ticket, answer: Result<Changed, ChangeError>) {
        // Who asked may have given up.
        match self.askers.remove(&ticket) {
            Some(Asker::Drain(reply)) => drop(reply.send(answer.map(|changed| DrainResponse {
                successor: changed.successor.map(|s| s.0).unwrap_or_default(),
                stall_ms: u32::try_from(changed.stall.as_millis()).unwrap_or(u32::MAX),
                epoch: self.machine.epoch().raw(),
            }))),
            Some(Asker::Undrain(reply)) => drop(reply.send(answer.map(|_| ()))),
            None => {}
        }
    }

    fn turned(&mut self, turned: Result<Turned, ChangeError>) {
        let is_last = !matches!(&turned, Ok(turned) if turned.shard.is_some());
        let event = turned.map(|turned| RolloutEvent {
            shard_id: turned.shard.map(|s| s.0).unwrap_or_default(),
            phase: turned.phase.to_owned(),
            done: u32::try_from(turned.done).unwrap_or(u32::MAX),
            total: u32::try_from(turned.total).unwrap_or(u32::MAX),
            stall_ms: u32::try_from(turned.stall.as_millis()).unwrap_or(u32::MAX),
        });
        match &event {
            Ok(event) => tracing::info!(
                shard = event.shard_id,
                phase = event.phase,
                done = event.done,
                total = event.total,
                "rolling restart"
            ),
            Err(error) => tracing::warn!(%error, "the rolling restart has ended early"),
        }
        if let Some(events) = &self.rollout {
            // It goes on even if nobody listens any more.
            let _ = events.send(event);
        }
        if is_last {
            self.rollout = None;
        }
    }

    pub(super) fn say_what_is_missing(&mut self) {
        let missing = self.machine.waits_for();
        if missing != self.told_to_wait {
            if let Some(missing) = missing.as_ref().filter(|_| !self.is_ending) {
                tracing::info!("waiting: {missing}");
            }
            self.told_to_wait = missing;
        }
    }
}
