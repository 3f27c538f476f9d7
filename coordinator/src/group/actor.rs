//! The group's actor: messages to events, the machine's actions to messages.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

use phalanx_cluster::{
    id::{Epoch, ShardId},
    store::{Expected, MembershipStore, StoreError, Swap},
};
use phalanx_proto::v1::{
    DrainResponse, Form, Hello, Loaded, Member, Peer, PlanResponse, Ready, Retire, RolloutEvent, Serve, StatusResponse,
    StepResult, coordinator_message::Message, shard_message::Message as FromShard,
};
use ractor::{Actor, ActorProcessingErr, ActorRef, RpcReplyPort};
use rustix::rand::{GetRandomFlags, getrandom};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use super::{
    change::ChangeError,
    machine::{Action, Candidate, Event, GroupMachine, Origin},
    plans::GroupPlans,
    progress::LoadProgress,
};
use crate::{metrics as names, scheduler::handle::GroupEvent, shard_link::LinkHandle};

/// Where the epoch lies in the store.
const EPOCH_KEY: &str = "group/0/epoch";
/// Bytes that name a formation's shared memory and authenticate its connections.
const SECRET_BYTES: usize = 32;
/// Attempts to take an epoch while others take theirs.
const SWAP_ATTEMPTS: usize = 16;

/// What the actor is told.
pub enum GroupMsg {
    /// A shard is attached.
    Arrived {
        /// What it said of itself.
        hello: Box<Hello>,
        /// Leads to it.
        link: LinkHandle,
    },
    /// A shard is gone.
    Left {
        /// Which.
        from: Origin,
        /// Why.
        cause: String,
    },
    /// A shard says something.
    FromShard {
        /// Which.
        from: Arc<Origin>,
        /// What.
        message: Box<FromShard>,
    },
    /// The store answered: the epoch, or why there is none.
    EpochTaken(Result<Epoch, String>),
    /// A pause is over.
    PauseOver,
    /// All shards are about to be told to end: their loss is no news.
    Ending,
    /// Somebody wants to know.
    Status(RpcReplyPort<Box<StatusResponse>>),
    /// Take the rank from a shard, and give it none until it is undrained. Answered when it has none.
    Drain {
        /// Which shard.
        shard: ShardId,
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
    /// Restart shards, one after the other.
    RolloutRestart {
        /// Those that are left as they are.
        but: Vec<ShardId>,
        /// Takes what happens; closed after "done" or an error.
        events: mpsc::UnboundedSender<Result<RolloutEvent, ChangeError>>,
    },
    /// Who holds what, and what happens if a rank is lost now.
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
    /// The group can't be formed as configured.
    GiveUp(String),
}

/// What a group is to be.
pub struct GroupConfig {
    /// Ranks.
    pub world_size: usize,
    /// Name for operators.
    pub name: String,
    /// Every formation's `Form`, but for what differs between formations and ranks.
    pub form: Form,
    /// Where the epoch lives.
    pub store: Arc<dyn MembershipStore>,
    /// Takes what the scheduler must know. Must not block.
    pub scheduler: Box<dyn Fn(GroupEvent) + Send + Sync>,
    /// Takes what the process must know.
    pub notices: mpsc::UnboundedSender<Notice>,
    /// See [`GroupMachine::new`].
    pub give_up_after: Option<u32>,
    /// The epoch that the scheduler knows to serve.
    pub serving: Mutex<Option<Epoch>>,
}

impl GroupConfig {
    /// Tells the scheduler on behalf of an actor that no longer can.
    pub fn after_crash(&self, cause: &str) {
        self.lost(&format!("the group's actor has ended: {cause}"));
    }

    fn lost(&self, cause: &str) {
        if let Some(epoch) = self.serving.lock().unwrap_or_else(PoisonError::into_inner).take() {
            (self.scheduler)(GroupEvent::Lost { epoch: epoch.raw(), cause: cause.to_owned(), is_planned: false });
        }
    }
}

/// What the store keeps.
#[derive(Debug, Default, Serialize, Deserialize)]
struct EpochRecord {
    epoch: u64,
    ranks: Vec<ShardId>,
}

/// The actor.
pub struct Group;

/// A shard as the group knows it.
struct Seat {
    hello: Hello,
    link: LinkHandle,
    memory: Memory,
    /// Rank under which its memory is shown.
    shown_as: Option<usize>,
}

#[derive(Default, Clone, Copy)]
struct Memory {
    weights: u64,
    kv: u64,
    resident: u64,
}

/// What the actor knows.
pub struct State {
    config: Arc<GroupConfig>,
    machine: GroupMachine,
    seats: BTreeMap<ShardId, Seat>,
    plans: Option<Arc<GroupPlans>>,
    progress: Option<LoadProgress>,
    told_to_wait: Option<String>,
    is_ending: bool,
}

impl Actor for Group {
    type Msg = GroupMsg;
    type State = State;
    type Arguments = Arc<GroupConfig>;

    async fn pre_start(
        &self,
        _myself: ActorRef<GroupMsg>,
        config: Arc<GroupConfig>,
    ) -> Result<State, ActorProcessingErr> {
        let record = match config.store.get(EPOCH_KEY).await? {
            Some(record) => serde_json::from_slice(&record.value)
                .map_err(|e| format!("the store's {EPOCH_KEY} is damaged ({e}): delete it to begin at epoch 1"))?,
            None => EpochRecord::default(),
        };
        let epoch = Epoch::from_raw(record.epoch);
        let machine = GroupMachine::new(config.world_size, epoch, record.ranks, config.give_up_after);
        metrics::gauge!(names::EPOCH).set(record.epoch as f64);
        Ok(State {
            config,
            machine,
            seats: BTreeMap::new(),
            plans: None,
            progress: None,
            told_to_wait: None,
            is_ending: false,
        })
    }

    async fn handle(
        &self,
        myself: ActorRef<GroupMsg>,
        message: GroupMsg,
        state: &mut State,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            GroupMsg::Arrived { hello, link } => {
                let candidate = Candidate {
                    shard: link.origin().shard.clone(),
                    incarnation: hello.incarnation,
                    kind: format!("{} {}", hello.version, hello.fingerprint),
                };
                let seat = Seat { hello: *hello, link, memory: Memory::default(), shown_as: None };
                state.seats.insert(candidate.shard.clone(), seat);
                state.step(&myself, Event::Arrived(candidate), None)?;
            }
            GroupMsg::Left { from, cause } => {
                state.forget(&from);
                state.step(&myself, Event::Left { from, cause }, None)?;
            }
            GroupMsg::FromShard { from, message } => state.on_message(&myself, &from, *message)?,
            GroupMsg::EpochTaken(Ok(epoch)) => state.step(&myself, Event::EpochTaken(epoch), None)?,
            GroupMsg::EpochTaken(Err(reason)) => {
                tracing::warn!(reason, "no group can be formed without the store; trying again");
                state.step(&myself, Event::EpochRefused, None)?;
            }
            GroupMsg::PauseOver => state.step(&myself, Event::PauseOver, None)?,
            GroupMsg::Ending => state.is_ending = true,
            GroupMsg::Status(reply) => {
                // Who asked may have given up.
                let _ = reply.send(Box::new(state.status()));
            }
            GroupMsg::Drain { shard, reply } => drop(reply.send(Err(state.cannot_change(&shard)))),
            GroupMsg::Undrain { shard, reply } => drop(reply.send(Err(state.cannot_change(&shard)))),
            GroupMsg::RolloutRestart { events, .. } => {
                drop(events.send(Err(ChangeError::Impossible("this group can't be changed yet".to_owned()))));
            }
            GroupMsg::Plan(reply) => drop(reply.send(Box::new(PlanResponse::default()))),
        }
        state.say_what_is_missing();
        Ok(())
    }
}

impl State {
    fn on_message(
        &mut self,
        myself: &ActorRef<GroupMsg>,
        from: &Origin,
        message: FromShard,
    ) -> Result<(), ActorProcessingErr> {
        let from = || from.clone();
        let event = match message {
            FromShard::StepResult(result) => {
                let event = Event::Stepped { from: from(), epoch: Epoch::from_raw(result.epoch) };
                return self.step(myself, event, Some(result));
            }
            FromShard::Heartbeat(beat) => {
                self.remember(&from(), |memory| memory.resident = beat.resident_bytes);
                return Ok(());
            }
            FromShard::LoadProgress(progress) => {
                let rank = self.machine.rank_of(&from().shard);
                if let (Some(rank), true) = (rank, progress.epoch == self.machine.epoch().raw())
                    && let Some(shown) = &mut self.progress
                {
                    shown.update(rank, progress.done_bytes, progress.total_bytes);
                }
                return Ok(());
            }
            FromShard::Loaded(loaded) => {
                self.on_loaded(&from(), &loaded);
                Event::Loaded { from: from(), epoch: Epoch::from_raw(loaded.epoch), kv_blocks: loaded.kv_blocks }
            }
            FromShard::Ready(ready) => {
                self.on_ready(&from(), &ready);
                Event::Ready { from: from(), epoch: Epoch::from_raw(ready.epoch) }
            }
            FromShard::Failed(failed) => {
                let error = match failed.step {
                    0 => failed.error,
                    step => format!("step {step}: {}", failed.error),
                };
                tracing::error!(shard = %from().shard, epoch = failed.epoch, error, "a shard has failed");
                Event::Failed { from: from(), epoch: Epoch::from_raw(failed.epoch), error }
            }
            FromShard::Hello(_) | FromShard::Prepared(_) | FromShard::Leaving(_) => return Ok(()),
        };
        self.step(myself, event, None)
    }

    fn on_loaded(&mut self, from: &Origin, loaded: &Loaded) {
        self.remember(from, |memory| memory.weights = loaded.weight_bytes);
        if let Some(rank) = self.machine.rank_of(&from.shard) {
            tracing::info!(
                rank,
                shard = %from.shard,
                epoch = loaded.epoch,
                weight_bytes = loaded.weight_bytes,
                kv_blocks = loaded.kv_blocks,
                kv_bytes_per_block = loaded.kv_bytes_per_block,
                "loaded"
            );
        }
    }

    fn on_ready(&mut self, from: &Origin, ready: &Ready) {
        self.remember(from, |memory| {
            memory.kv = ready.kv_bytes;
            memory.resident = ready.resident_bytes;
        });
        if let Some(rank) = self.machine.rank_of(&from.shard) {
            tracing::info!(
                rank,
                shard = %from.shard,
                epoch = ready.epoch,
                kv_bytes = ready.kv_bytes,
                resident_bytes = ready.resident_bytes,
                "ready"
            );
        }
    }

    fn remember(&mut self, from: &Origin, change: impl FnOnce(&mut Memory)) {
        let rank = self.machine.rank_of(&from.shard);
        let Some(seat) = self.seats.get_mut(&from.shard).filter(|s| s.link.origin() == from) else { return };
        change(&mut seat.memory);
        if seat.shown_as != rank {
            if let Some(before) = seat.shown_as {
                show_memory(&from.shard, before, Memory::default());
            }
            seat.shown_as = rank;
        }
        if let Some(rank) = rank {
            show_memory(&from.shard, rank, seat.memory);
        }
    }

    fn forget(&mut self, from: &Origin) {
        if self.seats.get(&from.shard).is_some_and(|s| s.link.origin() == from)
            && let Some(Seat { shown_as: Some(rank), .. }) = self.seats.remove(&from.shard)
        {
            show_memory(&from.shard, rank, Memory::default());
        }
    }

    fn step(
        &mut self,
        myself: &ActorRef<GroupMsg>,
        event: Event,
        mut result: Option<StepResult>,
    ) -> Result<(), ActorProcessingErr> {
        for action in self.machine.step(event) {
            match action {
                Action::TakeEpoch(after) => {
                    let (store, myself) = (Arc::clone(&self.config.store), myself.clone());
                    tokio::spawn(async move {
                        let taken = take_epoch(&*store, after).await.map_err(|e| e.to_string());
                        // The actor may have ended: its successor asks again.
                        let _ = myself.cast(GroupMsg::EpochTaken(taken));
                    });
                }
                Action::Form { epoch, ranks } => self.form(epoch, ranks)?,
                Action::Serve { epoch, kv_blocks } => {
                    tracing::info!(%epoch, kv_blocks, "all ranks are loaded");
                    self.tell_ranks(&Message::Serve(Serve { epoch: epoch.raw(), kv_blocks }));
                }
                Action::Serving { epoch, kv_blocks } => self.serving(epoch, kv_blocks),
                Action::Lost { epoch, cause } => {
                    if self.is_ending {
                        tracing::debug!(%epoch, cause, "the group ends");
                    } else {
                        tracing::warn!(%epoch, cause, "the group is lost; running requests wait for the next");
                    }
                    if let Some(plans) = self.plans.take() {
                        plans.end();
                    }
                    let kind = if cause.contains("has failed") { "failed" } else { "lost" };
                    metrics::counter!(names::FAILOVERS, "cause" => kind).increment(u64::from(!self.is_ending));
                    self.config.lost(&cause);
                }
                Action::Retire { epoch, shard } => {
                    self.tell(&shard, Message::Retire(Retire { epoch: epoch.raw(), keep_kv: false }));
                }
                Action::Deliver => {
                    if let Some(result) = result.take() {
                        (self.config.scheduler)(GroupEvent::Stepped(result));
                    }
                }
                Action::CountFenced => metrics::counter!(names::FENCED).increment(1),
                Action::Pause(pause) => {
                    tracing::info!(pause_ms = pause.as_millis() as u64, "pausing before the group forms again");
                    let _timer = myself.send_after(pause, || GroupMsg::PauseOver);
                }
                Action::GiveUp(cause) => {
                    // The process is about to end: nobody listens any more if it already does.
                    let _ = self.config.notices.send(Notice::GiveUp(cause));
                }
            }
        }
        Ok(())
    }

    fn form(&mut self, epoch: Epoch, ranks: Vec<ShardId>) -> Result<(), ActorProcessingErr> {
        let shards: Vec<&str> = ranks.iter().map(|s| s.0.as_str()).collect();
        tracing::info!(%epoch, ?shards, "forming");
        metrics::gauge!(names::EPOCH).set(epoch.raw() as f64);
        let mut collective_secret = vec![0; SECRET_BYTES];
        let filled = getrandom(&mut collective_secret, GetRandomFlags::empty())?;
        if filled != SECRET_BYTES {
            return Err("the system gave too few random bytes".into());
        }
        let peers: Vec<Peer> = (0u32..)
            .zip(&ranks)
            .filter_map(|(rank, shard)| {
                let hello = &self.seats.get(shard)?.hello;
                Some(Peer {
                    rank,
                    shard_id: shard.0.clone(),
                    host_id: hello.host_id.clone(),
                    collective_address: hello.collective_address.clone(),
                    weight: 1.0,
                })
            })
            .collect();
        for (rank, shard) in (0u32..).zip(&ranks) {
            let form = Form {
                epoch: epoch.raw(),
                rank,
                world_size: u32::try_from(ranks.len()).unwrap_or(u32::MAX),
                peers: peers.clone(),
                collective_secret: collective_secret.clone(),
                ..self.config.form.clone()
            };
            self.tell(shard, Message::Form(form));
        }
        self.progress = Some(LoadProgress::new(ranks.len()));
        let store = Arc::clone(&self.config.store);
        tokio::spawn(async move {
            // Only so that a restarted coordinator gives shards their former ranks.
            if let Err(error) = remember_ranks(&*store, epoch, ranks).await {
                tracing::warn!(%error, "the ranks can't be kept in the store");
            }
        });
        Ok(())
    }

    fn serving(&mut self, epoch: Epoch, kv_blocks: u32) {
        self.progress = None;
        let mut seats: Vec<_> = self
            .seats
            .iter()
            .filter_map(|(shard, seat)| Some((self.machine.rank_of(shard)?, shard, &seat.link)))
            .collect();
        seats.sort_by_key(|(rank, ..)| *rank);
        let plans = GroupPlans::new(epoch, seats.iter().map(|(_, _, link)| (*link).clone()).collect());
        let shards: Vec<ShardId> = seats.iter().map(|(_, shard, _)| (*shard).clone()).collect();
        tracing::info!(%epoch, kv_blocks, "serving");
        self.plans = Some(Arc::clone(&plans));
        *self.config.serving.lock().unwrap_or_else(PoisonError::into_inner) = Some(epoch);
        let n_blocks = kv_blocks as usize;
        (self.config.scheduler)(GroupEvent::Serving { epoch: epoch.raw(), n_blocks, plans, kept: None });
        // The process may be ending.
        let _ = self.config.notices.send(Notice::Serving { epoch, shards });
    }

    fn tell(&self, shard: &ShardId, message: Message) {
        // A shard without a seat has left: its departure is on its way to the machine.
        if let Some(seat) = self.seats.get(shard) {
            seat.link.send(message);
        }
    }

    fn tell_ranks(&self, message: &Message) {
        for (shard, seat) in &self.seats {
            if self.machine.rank_of(shard).is_some() {
                seat.link.send(message.clone());
            }
        }
    }

    fn say_what_is_missing(&mut self) {
        let missing = self.machine.waits_for();
        if missing != self.told_to_wait {
            if let Some(missing) = missing.as_ref().filter(|_| !self.is_ending) {
                tracing::info!("waiting: {missing}");
            }
            self.told_to_wait = missing;
        }
    }

    fn cannot_change(&self, shard: &ShardId) -> ChangeError {
        match self.seats.contains_key(shard) {
            true => ChangeError::Impossible("this group can't be changed yet".to_owned()),
            false => ChangeError::UnknownShard(shard.clone()),
        }
    }

    fn status(&self) -> StatusResponse {
        let member = |(shard, seat): (&ShardId, &Seat)| Member {
            shard_id: shard.0.clone(),
            rank: self.machine.rank_of(shard).and_then(|r| u32::try_from(r).ok()),
            device: seat.hello.device.clone(),
            pid: seat.hello.pid,
            host_id: seat.hello.host_id.clone(),
            weight_bytes: seat.memory.weights,
            kv_bytes: seat.memory.kv,
            resident_bytes: seat.memory.resident,
            ..Member::default()
        };
        StatusResponse {
            epoch: self.machine.epoch().raw(),
            phase: self.machine.phase().to_owned(),
            world_size: u32::try_from(self.config.world_size).unwrap_or(u32::MAX),
            model: self.config.name.clone(),
            members: self.seats.iter().map(member).collect(),
            ..StatusResponse::default()
        }
    }
}

fn show_memory(shard: &ShardId, rank: usize, memory: Memory) {
    let rank = rank.to_string();
    for (kind, bytes) in [("weights", memory.weights), ("kv", memory.kv), ("resident", memory.resident)] {
        metrics::gauge!(names::SHARD_MEMORY, "shard" => shard.0.clone(), "rank" => rank.clone(), "kind" => kind)
            .set(bytes as f64);
    }
}

/// Puts an epoch greater than `after`, and than any before, in force.
async fn take_epoch(store: &dyn MembershipStore, after: Epoch) -> Result<Epoch, StoreError> {
    let mut found = store.get(EPOCH_KEY).await?;
    for _ in 0..SWAP_ATTEMPTS {
        let record = found.as_ref().and_then(|r| serde_json::from_slice::<EpochRecord>(&r.value).ok());
        let record = record.unwrap_or_default();
        let next = Epoch::from_raw(record.epoch).max(after).next();
        let value = encode(&EpochRecord { epoch: next.raw(), ranks: record.ranks });
        match store.compare_and_swap(EPOCH_KEY, Expected::found(found.as_ref()), value, None).await? {
            Swap::Done(_) => return Ok(next),
            Swap::Conflict(other) => found = other,
        }
    }
    Err(StoreError::Unavailable { at: EPOCH_KEY.to_owned(), reason: "others keep taking epochs".to_owned() })
}

async fn remember_ranks(store: &dyn MembershipStore, epoch: Epoch, ranks: Vec<ShardId>) -> Result<(), StoreError> {
    let found = store.get(EPOCH_KEY).await?;
    let is_ours = |value: &[u8]| serde_json::from_slice::<EpochRecord>(value).is_ok_and(|r| r.epoch == epoch.raw());
    if let Some(record) = found.filter(|r| is_ours(&r.value)) {
        let value = encode(&EpochRecord { epoch: epoch.raw(), ranks });
        // A conflict means that a newer epoch is in force: its ranks count.
        store.compare_and_swap(EPOCH_KEY, Expected::found(Some(&record)), value, None).await?;
    }
    Ok(())
}

fn encode(record: &EpochRecord) -> Vec<u8> {
    serde_json::to_vec(record).expect("numbers and strings can be written as JSON")
}

#[cfg(test)]
mod tests {
    use phalanx_cluster::store::embedded::EmbeddedStore;

    use super::*;

    #[tokio::test]
    async fn epochs_grow_and_ranks_are_kept() {
        let store = EmbeddedStore::open(None, 64).await.unwrap();
        let first = take_epoch(&store, Epoch::default()).await.unwrap();
        assert_eq!(first.raw(), 1);
        let ranks = vec![ShardId("b".to_owned()), ShardId("a".to_owned())];
        remember_ranks(&store, first, ranks.clone()).await.unwrap();
        assert_eq!(take_epoch(&store, Epoch::from_raw(7)).await.unwrap().raw(), 8);
        // Late ranks of an older epoch change nothing.
        remember_ranks(&store, first, Vec::new()).await.unwrap();
        let record: EpochRecord = serde_json::from_slice(&store.get(EPOCH_KEY).await.unwrap().unwrap().value).unwrap();
        assert_eq!((record.epoch, record.ranks), (8, ranks));
    }

    #[tokio::test]
    async fn two_coordinators_never_take_the_same_epoch() {
        let store = EmbeddedStore::open(None, 64).await.unwrap();
        let taken = futures::future::join_all((0..8).map(|_| take_epoch(&store, Epoch::default()))).await;
        let mut taken: Vec<u64> = taken.into_iter().map(|e| e.unwrap().raw()).collect();
        taken.sort_unstable();
        assert_eq!(taken, (1..=8).collect::<Vec<_>>());
    }
}
