//! The [`Machine`] with a store: a thread of its own, with a runtime of its own, so that a lease lives however busy the
//! rest of the process is.

use std::{
    collections::BTreeMap,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use futures::StreamExt;
use phalanx_cluster::store::{
    self, MembershipStore, OpenOptions, StoreError,
    election::{self, Attempt, Election},
};
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::{sleep, timeout},
};

use super::{
    CoordinatorRecord, Leader, LeadershipView, View,
    machine::{Action, Event, Machine},
    registry,
    shards::{ShardKeeper, ShardRegistry},
};

/// Key that the leader holds.
const LEADER_KEY: &str = "leader";
/// Pause before a store is tried again.
const RETRY_PAUSE: Duration = Duration::from_millis(200);
/// Bounds of the time for one answer of the store.
const SHORTEST_CALL: Duration = Duration::from_millis(500);
const LONGEST_CALL: Duration = Duration::from_secs(5);

/// How the thread gets its store.
pub enum StoreSource {
    /// The process's own: it needs no connection.
    Shared(Arc<dyn MembershipStore>),
    /// A connection whose tasks run on the thread.
    Open {
        /// As [`store::open`] takes it.
        url: String,
        /// As [`store::open`] takes them.
        options: OpenOptions,
    },
}

/// What a candidate is.
pub struct LeadershipConfig {
    /// This coordinator.
    pub me: CoordinatorRecord,
    /// How long a leader may be silent before another may lead.
    pub ttl: Duration,
    /// Whether no other process uses the store.
    pub is_alone: bool,
    /// Where the key lies.
    pub store: StoreSource,
}

/// What the thread is told.
enum Input {
    Event(Event),
    Won(election::Leadership),
    Registered(Vec<CoordinatorRecord>),
    Resign(oneshot::Sender<()>),
}

/// Talks to the thread. Clones talk to the same.
#[derive(Clone)]
pub struct LeadershipHandle {
    inputs: mpsc::UnboundedSender<Input>,
    view: LeadershipView,
    shards: ShardRegistry,
}

impl LeadershipHandle {
    /// Starts the thread, which campaigns from now on.
    ///
    /// # Errors
    /// If the system gives no thread.
    pub fn start(config: LeadershipConfig) -> std::io::Result<Self> {
        let (inputs, receiver) = mpsc::unbounded_channel();
        let first = View { me: config.me.clone(), coordinators: vec![config.me.clone()], ..View::default() };
        let (sender, view) = watch::channel(first);
        let (keeper, shards) = ShardKeeper::new();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        // Weak, so that the thread ends with the last handle.
        let own = inputs.downgrade();
        thread::Builder::new().name("leadership".to_owned()).spawn(move || {
            runtime.block_on(run(config, own, receiver, keeper, sender));
            // A call to a silent store holds up nobody.
            runtime.shutdown_background();
        })?;
        Ok(Self { inputs, view: LeadershipView::new(view), shards })
    }

    /// Keeps the records of shards in the store, on the thread that keeps leases.
    pub fn shards(&self) -> ShardRegistry {
        self.shards.clone()
    }

    /// What is known.
    pub fn view(&self) -> LeadershipView {
        self.view.clone()
    }

    /// Somebody knows of this term: a leader of a lower one asks the store whether it still leads.
    pub fn challenge(&self, term: u64) {
        self.tell(Event::Challenged { term });
    }

    /// The process that led in this term is dead.
    pub fn leader_died(&self, term: u64) {
        self.tell(Event::LeaderDied { term });
    }

    /// Gives leadership to somebody else. Who takes it shows in the view.
    pub fn step_down(&self) {
        self.tell(Event::StepDown);
    }

    /// Gives leadership to somebody else for good, and waits until the store knows.
    pub async fn resign(&self) {
        let (done, told) = oneshot::channel();
        if self.inputs.send(Input::Resign(done)).is_ok() {
            // An error means that the thread has ended, and with it what it held.
            let _ = timeout(LONGEST_CALL, told).await;
        }
    }

    fn tell(&self, event: Event) {
        // Nobody listens when the process is being torn down.
        let _ = self.inputs.send(Input::Event(event));
    }
}

async fn run(
    config: LeadershipConfig,
    own: mpsc::WeakUnboundedSender<Input>,
    mut inputs: mpsc::UnboundedReceiver<Input>,
    shards: ShardKeeper,
    view: watch::Sender<View>,
) {
    let Some(store) = open(&config.store, &view).await else { return };
    let Ok(value) = serde_json::to_vec(&config.me) else {
        tracing::error!("this coordinator's record can't be written as JSON");
        return;
    };
    let registrar = registry::Registrar::new(Arc::clone(&store), config.me.clone(), value.clone(), config.ttl);
    let (kept, registered) = registrar.kept();
    let registration = tokio::spawn(kept.run());
    tokio::spawn(shards.run(Arc::clone(&store), config.ttl, LeadershipView::new(view.subscribe())));
    let listeners = own.clone();
    tokio::spawn(async move {
        registrar
            .watch(|coordinators| match listeners.upgrade() {
                Some(inputs) => inputs.send(Input::Registered(coordinators)).is_ok(),
                None => false,
            })
            .await;
    });

    let election = Election::new(store, LEADER_KEY, config.ttl);
    tokio::spawn(watch_key(election.clone(), own.clone()));
    let call_limit = config.ttl.clamp(SHORTEST_CALL, LONGEST_CALL);
    let machine = Machine::new(Instant::now(), config.me, config.ttl, config.is_alone);
    let mut shell = Shell { machine, election, value, leases: BTreeMap::new(), own, view, call_limit };
    loop {
        let wake_at = tokio::time::Instant::from_std(shell.machine.wake_at());
        let input = tokio::select! {
            input = inputs.recv() => input,
            () = tokio::time::sleep_until(wake_at) => Some(Input::Event(Event::Tick)),
        };
        match input {
            // All handles are gone.
            None => return,
            Some(Input::Event(event)) => shell.step(event),
            Some(Input::Won(leadership)) => {
                let term = leadership.term();
                shell.leases.insert(term, Arc::new(leadership));
                shell.step(Event::Won { term });
            }
            Some(Input::Registered(coordinators)) => shell.view.send_modify(|v| v.coordinators = coordinators),
            Some(Input::Resign(done)) => {
                let held: Vec<_> = shell.leases.values().cloned().collect();
                shell.step(Event::Resign);
                for leadership in held {
                    release(leadership, call_limit).await;
                }
                registered.send_replace(None);
                if !registration.is_finished() {
                    // Its own task revokes the lease; a short wait, so that others know before the process is gone.
                    let _ = timeout(call_limit, registered.closed()).await;
                }
                // Who asked may have given up.
                let _ = done.send(());
            }
        }
    }
}

async fn open(source: &StoreSource, view: &watch::Sender<View>) -> Option<Arc<dyn MembershipStore>> {
    match source {
        StoreSource::Shared(store) => Some(Arc::clone(store)),
        StoreSource::Open { url, options } => loop {
            match store::open(url, options).await {
                Ok(store) => return Some(store),
                Err(error) => tracing::warn!(%error, "no connection for leadership; trying again"),
            }
            if view.is_closed() {
                return None;
            }
            sleep(RETRY_PAUSE).await;
        },
    }
}

/// A leader as the store shows it.
fn leader_of(leader: election::Leader) -> Leader {
    // Whoever holds the key leads, readable or not.
    let record = serde_json::from_slice(&leader.value).unwrap_or_else(|error| {
        tracing::warn!(%error, "the leader's record can't be read");
        CoordinatorRecord::default()
    });
    Leader { record, term: leader.term }
}

/// Says every change of the key as soon as the store does. What it misses, the machine's own looks find.
async fn watch_key(election: Election, own: mpsc::WeakUnboundedSender<Input>) {
    let say = |(leader, revision): (Option<election::Leader>, u64)| {
        let event = Event::Seen { holder: leader.map(leader_of), revision };
        own.upgrade().is_some_and(|inputs| inputs.send(Input::Event(event)).is_ok())
    };
    loop {
        let watched = async {
            let (leader, revision) = election.look().await?;
            let mut changes = Box::pin(election.changes(revision).await?);
            if !say((leader, revision)) {
                return Ok(());
            }
            while let Some(change) = changes.next().await {
                if !say(change?) {
                    return Ok(());
                }
            }
            Ok::<_, StoreError>(())
        };
        if let Err(error) = watched.await {
            tracing::debug!(%error, "the leader's key can't be watched; trying again");
        }
        if own.upgrade().is_none() {
            return;
        }
        sleep(RETRY_PAUSE).await;
    }
}

struct Shell {
    machine: Machine,
    election: Election,
    value: Vec<u8>,
    /// Leases of the terms that we have or had.
    leases: BTreeMap<u64, Arc<election::Leadership>>,
    own: mpsc::WeakUnboundedSender<Input>,
    view: watch::Sender<View>,
    call_limit: Duration,
}

impl Shell {
    fn step(&mut self, event: Event) {
        for action in self.machine.step(Instant::now(), event) {
            match action {
                Action::Attempt(expected) => {
                    let (election, value) = (self.election.clone(), self.value.clone());
                    self.ask(async move { election.attempt(value, expected).await }, |answer| match answer {
                        Ok(Attempt::Won(leadership)) => Input::Won(leadership),
                        Ok(Attempt::Held(_)) => Input::Event(Event::Refused),
                        Err(error) => Input::Event(Event::AttemptFailed(error)),
                    });
                }
                Action::Look => {
                    let election = self.election.clone();
                    self.ask(async move { election.look().await }, |answer| match answer {
                        Ok((leader, revision)) => Input::Event(Event::Seen { holder: leader.map(leader_of), revision }),
                        Err(error) => Input::Event(Event::LookFailed(error)),
                    });
                }
                Action::Renew { term } => self.renew(term),
                Action::Adopt(leader) => self.adopt(leader.term),
                Action::Release { term } => {
                    if let Some(leadership) = self.leases.remove(&term) {
                        tokio::spawn(release(leadership, self.call_limit));
                    }
                }
                Action::Publish => {
                    let (session, leader) = (self.machine.session(), self.machine.leader());
                    self.leases.retain(|term, _| session.is_some_and(|s| *term >= s.term));
                    self.view.send_modify(|view| (view.session, view.leader) = (session, leader));
                }
                Action::Warn(text) => tracing::warn!("{text}"),
                Action::Info(text) => tracing::info!("{text}"),
            }
        }
    }

    fn renew(&self, term: u64) {
        let lease = self.leases.get(&term).cloned();
        let call = async move {
            match lease {
                Some(lease) => match lease.keep_alive().await {
                    Ok(()) => Ok(true),
                    Err(StoreError::LeaseEnded(_)) => Ok(false),
                    Err(error) => Err(error),
                },
                // Being adopted: the next renewal finds it.
                None => Ok(true),
            }
        };
        self.ask(call, move |answer| {
            Input::Event(match answer {
                Ok(true) => Event::Renewed { term },
                Ok(false) => Event::LeaseEnded { term },
                Err(reason) => Event::RenewalFailed { term, reason },
            })
        });
    }

    /// The record is read again: the machine does not know leases.
    fn adopt(&self, term: u64) {
        let (election, own) = (self.election.clone(), self.own.clone());
        tokio::spawn(async move {
            let found = election.leader().await.ok().flatten().filter(|l| l.term == term);
            if let (Some(leadership), Some(inputs)) = (found.and_then(|l| election.adopt(&l)), own.upgrade()) {
                let _ = inputs.send(Input::Won(leadership));
            }
        });
    }

    /// Calls the store, in bounded time, and says what it answered.
    fn ask<T: Send + 'static>(
        &self,
        call: impl Future<Output = Result<T, StoreError>> + Send + 'static,
        input: impl FnOnce(Result<T, String>) -> Input + Send + 'static,
    ) {
        let (own, limit) = (self.own.clone(), self.call_limit);
        tokio::spawn(async move {
            let answer = match timeout(limit, call).await {
                Ok(answer) => answer.map_err(|e| e.to_string()),
                Err(_) => Err(format!("the store does not answer within {limit:?}")),
            };
            if let Some(inputs) = own.upgrade() {
                let _ = inputs.send(input(answer));
            }
        });
    }
}

async fn release(leadership: Arc<election::Leadership>, limit: Duration) {
    match timeout(limit, leadership.release()).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::warn!(%error, "leadership can't be given back: its lease has to end"),
        Err(_) => tracing::warn!("leadership can't be given back within {limit:?}: its lease has to end"),
    }
}
