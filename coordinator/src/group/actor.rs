//! The group's actor: what it is told, and what it tells others.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use phalanx_cluster::{
    id::{Epoch, ShardId},
    store::MembershipStore,
};
use phalanx_proto::v1::{
    CopiedPages, DrainResponse, Form, Hello, PlanResponse, RolloutEvent, StatusResponse,
    shard_message::Message as FromShard,
};
use ractor::{Actor, ActorProcessingErr, ActorRef, RpcReplyPort};
use tokio::sync::mpsc;

use super::{
    alarm::Alarm,
    change::{ChangeError, RollingRestart},
    drained::{self, DrainedRecord},
    epochs,
    loading::Loading,
    machine::{Candidate, Cause, Event, Given, GroupMachine, Origin, Settings, SliceOf, Standing},
    report,
    state::State,
};
use crate::{metrics::GroupLabels, scheduler::handle::GroupEvent, shard_link::LinkHandle};

/// What the actor is told.
pub enum GroupMsg {
    /// A shard is attached.
    Arrived {
        /// What it said of itself.
        hello: Box<Hello>,
        /// Leads to it.
        link: LinkHandle,
        /// The greatest epoch of another group that it may know.
        knows: Epoch,
    },
    /// A shard is gone.
    Left {
        /// Which.
        from: Origin,
        /// What kind of loss.
        cause: Cause,
        /// Why.
        reason: String,
    },
    /// A shard says something.
    FromShard {
        /// Which.
        from: Arc<Origin>,
        /// What.
        message: Box<FromShard>,
    },
    /// Another group lacks a shard: give one away, if one is free. The answer goes to membership.
    Release {
        /// Names the request.
        ticket: u64,
        /// What kind of shard is meant.
        given: Given,
    },
    /// The store answered: the epoch, or why there is none.
    EpochTaken(Result<Epoch, String>),
    /// The machine wanted to be woken.
    Tick,
    /// A plan was sent to all ranks.
    Planned {
        /// Of which formation.
        epoch: Epoch,
        /// Which step.
        step: u64,
        /// Rows that it computes.
        rows: u32,
    },
    /// The scheduler was put on hold and has no step in flight.
    Idle(Epoch),
    /// Every stream that stood still before this formation has a token again.
    Recovered {
        /// Which formation.
        epoch: Epoch,
        /// The longest that one stood still.
        stall: Duration,
    },
    /// All shards are about to be told to end: their loss is no news.
    Ending,
    /// Somebody wants to know.
    Status(RpcReplyPort<Box<StatusResponse>>),
    /// Take the rank from a shard, and give it none until it is undrained. Answered when it has none.
    Drain {
        /// Which shard.
        shard: ShardId,
        /// Whether another group has a spare, which comes if this one lacks a shard.
        is_helped: bool,
        /// For the answer.
        reply: RpcReplyPort<Result<DrainResponse, ChangeError>>,
    },
    /// A drained shard may have a rank again.
    Undrain {
        /// Which shard.
        shard: ShardId,
        /// For the answer.
        reply: RpcReplyPort<Result<(), ChangeError>>,
    },
    /// Restart shards, one after the other. Goes on even if nobody listens any more.
    RolloutRestart {
        /// Which, and how.
        rollout: RollingRestart,
        /// Takes what happens; closed after "done" or an error.
        events: mpsc::UnboundedSender<Result<RolloutEvent, ChangeError>>,
    },
    /// Who holds what, and what happens if a rank is lost now. What the slices are made of is left out.
    Plan(RpcReplyPort<Box<PlanResponse>>),
}

/// What the process should hear of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Notice {
    /// The group serves.
    Serving {
        /// In which formation.
        epoch: Epoch,
        /// In rank order.
        shards: Vec<ShardId>,
    },
    /// A shard is stuck: whoever runs its process should end it.
    Stuck {
        /// Which.
        shard: ShardId,
        /// Its process, on its host.
        pid: u32,
    },
    /// The group can't be formed as configured.
    GiveUp {
        /// Which.
        group: usize,
        /// Why.
        cause: String,
    },
}

/// What a group tells membership.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ToMembership {
    /// Where it stands; whenever that has changed.
    Stands(Standing),
    /// The answer to `Release`.
    Released {
        /// Which request.
        ticket: u64,
        /// The shard that is no longer here, and its stream; none can go.
        given: Option<(ShardId, u64)>,
    },
}

/// What a group's actor begins with.
pub struct GroupStart {
    /// What it is to be.
    pub config: Arc<GroupConfig>,
    /// Takes what membership must know. Must not block.
    pub membership: Box<dyn Fn(ToMembership) + Send + Sync>,
}

/// What a group is to be.
pub struct GroupConfig {
    /// Which of the cluster's groups, from 0 on.
    pub index: usize,
    /// Labels of its metrics.
    pub labels: GroupLabels,
    /// Ranks, and when to form how.
    pub settings: Settings,
    /// Name for operators.
    pub name: String,
    /// Every formation's `Form`, but for what differs between formations and ranks.
    pub form: Form,
    /// Shards that were attached to the last leader, where each was seen, and until when the first formation waits for those
    /// of them that had a rank.
    pub expected: (BTreeMap<ShardId, String>, Instant),
    /// Whether the leadership that the group belongs to goes on. One that is over forms nothing: the shards are about to find
    /// the next.
    pub leads: Box<dyn Fn() -> bool + Send + Sync>,
    /// Where the epoch lives.
    pub store: Arc<dyn MembershipStore>,
    /// Takes what the scheduler must know. Must not block.
    pub scheduler: Box<dyn Fn(GroupEvent) + Send + Sync>,
    /// Takes what the process must know.
    pub notices: mpsc::UnboundedSender<Notice>,
    /// Takes how far its ranks have loaded.
    pub loading: Arc<Loading>,
    /// The epoch that the scheduler knows to serve.
    pub serving: Mutex<Option<Epoch>>,
}

impl GroupConfig {
    /// Tells the scheduler on behalf of an actor that no longer can.
    pub fn after_crash(&self, cause: &str) {
        self.lost(&format!("the group's actor has ended: {cause}"), false);
    }

    pub(super) fn lost(&self, cause: &str, is_planned: bool) {
        if let Some(epoch) = self.serving.lock().unwrap_or_else(PoisonError::into_inner).take() {
            (self.scheduler)(GroupEvent::Lost { epoch: epoch.raw(), cause: cause.to_owned(), is_planned });
        }
    }
}

/// The actor.
pub struct Group;

impl Actor for Group {
    type Msg = GroupMsg;
    type State = State;
    type Arguments = GroupStart;

    async fn pre_start(&self, myself: ActorRef<GroupMsg>, start: GroupStart) -> Result<State, ActorProcessingErr> {
        let config = &start.config;
        let known = epochs::load(&*config.store, config.index).await?;
        let drained = drained::load(&*config.store, config.index).await?;
        let mut machine = GroupMachine::new(config.settings.clone(), known.epoch, known.ranks, Instant::now());
        machine.remember_drained(drained.clone());
        machine.expect(config.expected.0.clone(), config.expected.1);
        let drained = DrainedRecord::start(Arc::clone(&config.store), config.index, drained);
        let mut state = State::new(start, machine, drained, Alarm::start(myself));
        state.show_standing();
        Ok(state)
    }

    async fn handle(
        &self,
        myself: ActorRef<GroupMsg>,
        message: GroupMsg,
        state: &mut State,
    ) -> Result<(), ActorProcessingErr> {
        let is_tick = matches!(message, GroupMsg::Tick);
        let is_routine = is_routine(&message);
        match message {
            GroupMsg::Arrived { hello, link, knows } => {
                let candidate = Candidate {
                    shard: link.origin().shard.clone(),
                    incarnation: hello.incarnation,
                    kind: kind_of(&hello),
                    memory_bytes: hello.memory_bytes,
                    takes_mirror: !hello.mirror_address.is_empty(),
                    holds: hello.held_pages.map(|held| (held.world_size as usize, held.rank as usize)),
                    copies: copies_of(&hello),
                };
                state.machine.saw(&candidate.shard, link.host());
                state.step(&myself, Event::Outrun(knows), None)?;
                state.seats.insert(*hello, link);
                state.step(&myself, Event::Arrived(candidate), None)?;
            }
            GroupMsg::Left { from, cause, reason } => {
                let pid = state.seats.get(&from.shard).map(|s| s.hello.pid);
                state.seats.remove(&from);
                if let (Some(pid), Cause::Silent) = (pid, cause) {
                    state.notice(Notice::Stuck { shard: from.shard.clone(), pid });
                }
                state.step(&myself, Event::Left { from, cause, reason }, None)?;
            }
            GroupMsg::Release { ticket, given } => state.release(&myself, ticket, given)?,
            GroupMsg::FromShard { from, message } => state.on_message(&myself, &from, *message)?,
            GroupMsg::EpochTaken(Ok(epoch)) => state.step(&myself, Event::EpochTaken(epoch), None)?,
            GroupMsg::EpochTaken(Err(reason)) => {
                tracing::warn!(reason, "the store gives no epoch: the group can't change until it does; trying again");
                state.step(&myself, Event::EpochRefused, None)?;
            }
            GroupMsg::Tick => state.step(&myself, Event::Tick, None)?,
            GroupMsg::Planned { epoch, step, rows } => {
                state.step(&myself, Event::Planned { epoch, step, rows }, None)?;
            }
            GroupMsg::Idle(epoch) => state.step(&myself, Event::Idle(epoch), None)?,
            GroupMsg::Recovered { epoch, stall } => state.step(&myself, Event::Recovered { epoch, stall }, None)?,
            GroupMsg::Ending => state.is_ending = true,
            // Who asked may have given up, here and below.
            GroupMsg::Status(reply) => {
                let status = report::status(&state.config, &state.machine, &state.seats, Instant::now());
                drop(reply.send(Box::new(status)));
            }
            GroupMsg::Plan(reply) => {
                drop(reply.send(Box::new(report::plan(&state.machine, &state.seats, Instant::now()))));
            }
            GroupMsg::Drain { shard, is_helped, reply } => state.drain(&myself, shard, is_helped, reply)?,
            GroupMsg::Undrain { shard, reply } => state.undrain(&myself, shard, reply)?,
            GroupMsg::RolloutRestart { rollout, events } => state.roll_out(&myself, rollout, events)?,
        }
        state.say_what_is_missing();
        if !is_routine {
            state.say_where_it_stands();
            state.show_standing();
        }
        state.alarm.set(state.machine.wakes_at(), is_tick);
        Ok(())
    }
}

/// Ranks of whose pages a shard has copies.
fn copies_of(hello: &Hello) -> BTreeSet<SliceOf> {
    let of_group = |copied: &CopiedPages| {
        let world_size = copied.world_size as usize;
        copied.ranks.iter().map(|rank| (world_size, *rank as usize)).collect()
    };
    hello.copied_pages.as_ref().map(of_group).unwrap_or_default()
}

/// What ranks of one group have in common: version and numerics.
pub fn kind_of(hello: &Hello) -> String {
    format!("{} {}", hello.version, hello.fingerprint)
}

/// What comes with every step, and changes nothing that membership must know.
fn is_routine(message: &GroupMsg) -> bool {
    match message {
        GroupMsg::Planned { .. } => true,
        GroupMsg::FromShard { message, .. } => {
            matches!(**message, FromShard::StepResult(_) | FromShard::Heartbeat(_) | FromShard::LoadProgress(_))
        }
        _ => false,
    }
}
