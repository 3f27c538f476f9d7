//! The scheduler as an actor: a clock, mailboxes and channels around [`Machine`].

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use phalanx_cluster::id::TokenId;
use ractor::{Actor, ActorCell, ActorProcessingErr, ActorRef, RpcReplyPort, SpawnErr, concurrency::JoinHandle};
use tokio::sync::watch;

use super::{
    ending::Ended,
    event::{Action, Event, Limits, Measure, Recovery, Status},
    handle::{CancelOnDrop, GroupEvent, PlanSink, Readiness, RequestStream, Submit},
    machine::Machine,
    meters::Meters,
    outbox::{self, MOST_UNREAD_BYTES, Outbox},
    overload::{Gate, Place},
};
use crate::{
    metrics::GroupLabels,
    request::{Request, RequestError, RequestEvent},
    sequence::RequestKey,
    text::decode::Detokenizers,
    trace::{self, ranks::Mark},
};

/// How late a deadline may be noticed.
const TICK: Duration = Duration::from_millis(50);
/// Requests that may wait, unless configured otherwise.
pub const DEFAULT_MAX_QUEUED_REQUESTS: usize = 1024;

/// What the scheduler is made of.
pub struct SchedulerConfig {
    /// Limits of steps and of the model.
    pub limits: Limits,
    /// What requests may go through.
    pub recovery: Recovery,
    /// Ids that end a sequence.
    pub eos: Vec<TokenId>,
    /// Tokens to text; a `Tokenizer` is one.
    pub detokenizers: Box<dyn Detokenizers>,
    /// Requests that may wait for their first step; one more is refused as overload.
    pub max_queued_requests: usize,
    /// Prompt tokens that those may have together.
    pub max_queued_tokens: usize,
    /// Labels of its metrics.
    pub labels: GroupLabels,
}

/// What the actor is told. [`SchedulerHandle`] says it.
pub enum SchedulerMsg {
    /// A request, with its place in the queue.
    Submit {
        /// Who it is.
        key: RequestKey,
        /// What to do.
        request: Box<Request>,
        /// Where its events go.
        events: Outbox,
        /// Its place in the queue, free again when it runs.
        place: Option<Place>,
    },
    /// A client went away.
    Cancel(RequestKey),
    /// Something happened to the group.
    Group(GroupEvent),
    /// Deadlines may have passed.
    Tick,
    /// Somebody wants to know.
    Status(RpcReplyPort<Status>),
}

/// Talks to the scheduler. Clones are the same scheduler.
#[derive(Clone)]
pub struct SchedulerHandle {
    actor: ActorRef<SchedulerMsg>,
    next_key: Arc<AtomicU64>,
    gate: Arc<Gate>,
    readiness: watch::Receiver<Readiness>,
}

impl SchedulerHandle {
    /// Starts the scheduler, without a group, under a supervisor if there is one.
    ///
    /// # Errors
    /// If the actor can't be started.
    pub async fn spawn(
        config: SchedulerConfig,
        supervisor: Option<ActorCell>,
    ) -> Result<(Self, JoinHandle<()>), SpawnErr> {
        let waiting = Readiness::NotReady("no group of shards has formed yet".to_owned());
        let (ready, readiness) = watch::channel(waiting);
        let gate = Arc::new(Gate::new(config.max_queued_requests, config.max_queued_tokens));
        let start = (config, ready, Arc::clone(&gate));
        let (actor, join) = match supervisor {
            Some(supervisor) => Actor::spawn_linked(None, Scheduler, start, supervisor).await?,
            None => Actor::spawn(None, Scheduler, start).await?,
        };
        let handle = Self { actor, next_key: Arc::new(AtomicU64::new(0)), gate, readiness };
        Ok((handle, join))
    }

    /// Tells what happened to the group, in order. Never blocks; says nothing if the scheduler has stopped.
    pub fn group_event(&self, event: GroupEvent) {
        if self.actor.cast(SchedulerMsg::Group(event)).is_err() {
            tracing::debug!("the scheduler has stopped: a group event is dropped");
        }
    }

    /// The present state in numbers; `None` if the scheduler has stopped or takes longer than `timeout`.
    pub async fn status(&self, timeout: Duration) -> Option<Status> {
        let result = self.actor.call(SchedulerMsg::Status, Some(timeout)).await;
        result.ok().and_then(|reply| reply.success_or(()).ok())
    }

    /// Changes whenever readiness does.
    pub fn watch_readiness(&self) -> watch::Receiver<Readiness> {
        self.readiness.clone()
    }

    /// Ends the scheduler: live requests fail as unavailable.
    pub fn stop(&self) {
        self.actor.stop(Some("the server shuts down".to_owned()));
    }
}

impl Submit for SchedulerHandle {
    fn submit(&self, request: Request) -> Result<RequestStream, RequestError> {
        // Who was let in by an earlier coordinator is not refused by this one.
        let is_resumed = request.resume.iter().any(|choice| !choice.tokens.is_empty());
        let place = if is_resumed { None } else { Some(self.gate.enter(request.prompt.len(), Instant::now())?) };
        let key = RequestKey(self.next_key.fetch_add(1, Ordering::Relaxed));
        let (sender, events) = outbox::channel();
        let message = SchedulerMsg::Submit { key, request: Box::new(request), events: sender, place };
        if self.actor.cast(message).is_err() {
            return Err(RequestError::Unavailable("the scheduler has stopped".to_owned()));
        }
        let actor = self.actor.clone();
        let cancel = move || {
            // If the scheduler has stopped there is nothing to cancel.
            let _ = actor.cast(SchedulerMsg::Cancel(key));
        };
        Ok(RequestStream { events, _cancel: CancelOnDrop(Some(Box::new(cancel))) })
    }

    fn readiness(&self) -> Readiness {
        self.readiness.borrow().clone()
    }
}

struct Client {
    events: Outbox,
    /// Held while the request waits for its first step.
    place: Option<Place>,
    /// What ranks had computed when it began to run, where there are traces.
    since: Option<Mark>,
}

struct State {
    machine: Machine,
    clients: BTreeMap<RequestKey, Client>,
    plans: Option<Arc<dyn PlanSink>>,
    readiness: watch::Sender<Readiness>,
    gate: Arc<Gate>,
    meters: Meters,
    /// Which of the cluster's groups it is for.
    index: usize,
    /// Requests whose clients leave too much unread.
    unread: Vec<RequestKey>,
    is_tick_armed: bool,
}

struct Scheduler;

impl Actor for Scheduler {
    type Msg = SchedulerMsg;
    type State = State;
    type Arguments = (SchedulerConfig, watch::Sender<Readiness>, Arc<Gate>);

    async fn pre_start(
        &self,
        _myself: ActorRef<SchedulerMsg>,
        (config, readiness, gate): Self::Arguments,
    ) -> Result<State, ActorProcessingErr> {
        let machine = Machine::new(config.limits, config.recovery, config.eos, config.detokenizers);
        let mut state = State {
            machine,
            clients: BTreeMap::new(),
            plans: None,
            readiness,
            gate,
            meters: Meters::new(&config.labels, &config.limits),
            index: config.labels.index,
            unread: Vec::new(),
            is_tick_armed: false,
        };
        state.record_status();
        Ok(state)
    }

    async fn handle(
        &self,
        myself: ActorRef<SchedulerMsg>,
        message: SchedulerMsg,
        state: &mut State,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            SchedulerMsg::Submit { key, request, events, place } => {
                state.clients.insert(key, Client { events, place, since: None });
                state.step(Event::Submit(key, request));
            }
            SchedulerMsg::Cancel(key) => {
                state.step(Event::Cancel(key));
                state.clients.remove(&key);
            }
            SchedulerMsg::Group(event) => state.on_group(event),
            SchedulerMsg::Tick => {
                state.is_tick_armed = false;
                state.step(Event::Tick);
            }
            SchedulerMsg::Status(reply) => {
                // Who asked may have given up.
                let _ = reply.send(state.machine.status());
                return Ok(());
            }
        }
        if !state.is_tick_armed && state.machine.next_deadline().is_some() {
            state.is_tick_armed = true;
            myself.send_after(TICK, || SchedulerMsg::Tick);
        }
        Ok(())
    }

    async fn post_stop(&self, _myself: ActorRef<SchedulerMsg>, state: &mut State) -> Result<(), ActorProcessingErr> {
        state.readiness.send_replace(Readiness::NotReady("the server shuts down".to_owned()));
        let actions = state.machine.fail_all(&RequestError::Unavailable("the server shuts down".to_owned()));
        state.perform(actions);
        Ok(())
    }
}

impl State {
    fn step(&mut self, event: Event) {
        let actions = self.machine.step(Instant::now(), event);
        self.perform(actions);
        while let Some(key) = self.unread.pop() {
            let Some(client) = self.clients.remove(&key) else { continue };
            tracing::warn!(key = key.0, "a client leaves too much of its answer unread: its request is cancelled");
            client.events.send(RequestEvent::Failed(RequestError::Unread { limit: MOST_UNREAD_BYTES }));
            let actions = self.machine.step(Instant::now(), Event::Cancel(key));
            self.perform(actions);
        }
        self.record_status();
    }

    fn on_group(&mut self, event: GroupEvent) {
        match event {
            GroupEvent::Serving { epoch, n_blocks, plans, kept } => {
                let actions = self.machine.step(Instant::now(), Event::GroupServing { epoch, n_blocks, kept });
                if self.machine.status().epoch == Some(epoch) {
                    self.plans = Some(plans);
                    self.readiness.send_replace(Readiness::Serving);
                }
                self.perform(actions);
                self.record_status();
            }
            GroupEvent::Lost { epoch, cause, is_planned } => {
                self.step(Event::GroupLost { epoch, is_planned });
                if self.machine.status().epoch.is_none() {
                    self.plans = None;
                    self.readiness.send_replace(Readiness::NotReady(cause));
                }
            }
            GroupEvent::Hold { epoch } => self.step(Event::Hold { epoch }),
            GroupEvent::Resume { epoch } => self.step(Event::Resume { epoch }),
            GroupEvent::Stepped(result) => {
                let begun = Instant::now();
                self.step(Event::Stepped(result));
                self.meters.scheduled(begun.elapsed());
            }
        }
    }

    fn perform(&mut self, actions: Vec<Action>) {
        for action in actions {
            match action {
                Action::SendPlan(plan) => match &self.plans {
                    Some(plans) => plans.send(plan),
                    None => tracing::error!(epoch = plan.epoch, step = plan.step, "a plan has nowhere to go"),
                },
                Action::Idle(epoch) => {
                    if let Some(plans) = &self.plans {
                        plans.idle(epoch);
                    }
                }
                Action::Recovered { epoch, stall } => {
                    if let Some(plans) = &self.plans {
                        plans.recovered(epoch, stall);
                    }
                }
                Action::Emit(key, event) => self.emit(key, event),
                Action::Admitted(key) => {
                    if let (Some(tracer), Some(client)) = (trace::active(), self.clients.get_mut(&key)) {
                        client.since = Some(tracer.ranks().mark(self.index));
                    }
                    if self.clients.get_mut(&key).and_then(|client| client.place.take()).is_some() {
                        self.gate.admitted(Instant::now());
                    }
                }
                Action::Measure(measure) => {
                    self.meters.record(&measure);
                    if let Measure::Ended(ended) = measure {
                        self.trace(ended);
                    }
                }
                Action::Warn(reason) => tracing::warn!("{reason}"),
            }
        }
    }

    fn trace(&mut self, ended: Box<Ended>) {
        let Some(tracer) = trace::active() else { return };
        let since = self.clients.get_mut(&ended.key).and_then(|client| client.since.take());
        let work = since.map(|since| tracer.ranks().since(self.index, &since)).unwrap_or_default();
        tracer.ended(ended, work);
    }

    fn emit(&mut self, key: RequestKey, event: RequestEvent) {
        let is_last = matches!(event, RequestEvent::Finished(_) | RequestEvent::Failed(_));
        let has_room = self.clients.get(&key).is_none_or(|client| client.events.send(event));
        if is_last {
            self.clients.remove(&key);
        } else if !has_room {
            self.unread.push(key);
        }
    }

    fn record_status(&mut self) {
        let status = self.machine.status();
        self.meters.show(&status);
        if status.n_requests == 0 && status.n_blocks_used > 0 {
            tracing::error!(n_blocks = status.n_blocks_used, "blocks are in use though no request lives");
        }
    }
}

#[cfg(test)]
mod tests;
