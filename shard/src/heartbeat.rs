//! Signs of life between shard and coordinator.
//!
//! They are sent by a thread that does nothing else: they say that the process lives and what its engine does, whatever
//! that is. A process that is stopped falls silent; an engine that hangs shows as busy for longer and longer. The same
//! thread ends the process when a part of it is stuck for good: the engine where no interrupt reaches it, or the runtime
//! that carries the heartbeats and everything else, which a canary on it shows.

use std::{
    io,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use phalanx_proto::v1::{Heartbeat, ShardMessage, shard_message::Message};
use tokio::sync::mpsc::UnboundedSender;

use crate::{
    canary::{Canary, Watchdog},
    engine::{
        interrupt::Interrupt,
        vitals::{Busy, Vitals},
    },
    memory,
    mirror::{Progress, Store},
};

/// Interval of heartbeats before the coordinator says one.
const FIRST_INTERVAL: Duration = Duration::from_secs(1);
/// Shortest interval that is kept, whatever the coordinator says.
const SHORTEST_INTERVAL: Duration = Duration::from_millis(10);

/// Heartbeats of the coordinator that may stay away before it counts as lost: a coordinator takes a shard for lost after
/// ten, and a shard is more patient, for leaving costs its group the epoch.
const MISSED_LIMIT: u32 = 40;
/// However short the interval: a coordinator on a busy machine is not lost before this.
const SHORTEST_SILENCE: Duration = Duration::from_secs(3);

/// Longest time in which the engine must stop what it does when it is told to, and in which the runtime must run.
const STUCK_LIMIT: Duration = Duration::from_secs(10);

/// The thread that sends heartbeats. Clones share it; it ends with the last.
#[derive(Clone)]
pub struct Pulse(Arc<Owner>);

/// What the thread tells of, and watches over.
#[derive(Clone, Default)]
pub struct Watched {
    /// The engine's.
    pub interrupt: Interrupt,
    /// The engine's.
    pub vitals: Vitals,
    /// What is kept of other ranks.
    pub mirror: Option<Store>,
    /// Sings while the runtime lives.
    pub canary: Canary,
}

/// Ends the thread when dropped.
struct Owner(Arc<Shared>);

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    session: Option<Session>,
    is_over: bool,
}

/// A stream to a coordinator.
struct Session {
    sender: UnboundedSender<ShardMessage>,
    interval: Duration,
    /// Of the last heartbeat that was sent.
    sequence: u64,
    /// Of the last that came.
    heard: u64,
}

impl Pulse {
    /// Starts the thread for what it watches.
    ///
    /// # Errors
    /// If the system has no thread left.
    pub fn start(watched: Watched) -> io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let pulse = Self(Arc::new(Owner(shared.clone())));
        thread::Builder::new().name("heartbeat".to_owned()).spawn(move || shared.run(&watched))?;
        Ok(pulse)
    }

    /// From now on heartbeats go there.
    pub fn begin(&self, sender: UnboundedSender<ShardMessage>) {
        let session = Session { sender, interval: FIRST_INTERVAL, sequence: 0, heard: 0 };
        self.change(|state| state.session = Some(session));
    }

    /// They are sent so often.
    pub fn set_interval(&self, interval: Duration) {
        self.change(|state| {
            if let Some(session) = &mut state.session {
                session.interval = interval.max(SHORTEST_INTERVAL);
            }
        });
    }

    /// A heartbeat came from the coordinator.
    pub fn hear(&self, sequence: u64) {
        if let Some(session) = &mut self.0.0.lock().session {
            session.heard = session.heard.max(sequence);
        }
    }

    /// Nobody is there to send them to.
    pub fn end(&self) {
        self.change(|state| state.session = None);
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.0.0.lock());
        self.0.0.changed.notify_one();
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        self.0.lock().is_over = true;
        self.0.changed.notify_one();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Each change is complete in itself.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self, Watched { interrupt, vitals, mirror, canary }: &Watched) {
        let mut watchdog = Watchdog::new(canary.songs(), Instant::now());
        loop {
            let resident_bytes = memory::resident_bytes();
            let mut state = self.lock();
            if state.is_over {
                return;
            }
            let now = Instant::now();
            let mut pause = FIRST_INTERVAL;
            if let Some(session) = &mut state.session {
                pause = session.interval;
                let mirrored = mirror.as_ref().and_then(Store::progress);
                let beat = Heartbeat {
                    resident_bytes,
                    waits_for_rank: interrupt.waits_for(),
                    mirrored_epoch: mirrored.map_or(0, |Progress { epoch, .. }| epoch),
                    mirrored_step: mirrored.map_or(0, |Progress { step, .. }| step),
                    ..session.beat(vitals.busy(), now)
                };
                // A closed channel means that the session ends this moment.
                let _ended = session.sender.send(ShardMessage { message: Some(Message::Heartbeat(beat)) });
            }
            if let Some(ignored) = interrupt.ignored_for(now).filter(|ignored| *ignored > STUCK_LIMIT) {
                tracing::error!(
                    "the engine was told {ignored:?} ago to stop what it does and has not: ending, to be started again"
                );
                std::process::exit(1);
            }
            if let Some(silent) = watchdog.look(canary.songs(), now).filter(|silent| *silent > STUCK_LIMIT) {
                tracing::error!("nothing but this thread has run for {silent:?}: ending, to be started again");
                std::process::exit(1);
            }
            // Waking early for a change costs a heartbeat too many.
            drop(self.changed.wait_timeout(state, pause));
        }
    }
}

impl Session {
    fn beat(&mut self, busy: Option<Busy>, now: Instant) -> Heartbeat {
        self.sequence += 1;
        Heartbeat {
            sequence: self.sequence,
            busy_epoch: busy.map_or(0, |b| b.epoch),
            busy_step: busy.map_or(0, |b| b.step),
            busy_ms: busy.map_or(0, |b| u32::try_from(b.lasts(now).as_millis()).unwrap_or(u32::MAX)),
            heard_sequence: self.heard,
            ..Heartbeat::default()
        }
    }
}

/// Notices when the coordinator is silent for too long.
#[derive(Debug, Clone)]
pub struct Silence {
    interval: Duration,
    heard: Instant,
    looked: Instant,
}

impl Silence {
    /// Of a coordinator that sends a heartbeat in each interval.
    pub fn new(interval: Duration, now: Instant) -> Self {
        Self { interval: interval.max(SHORTEST_INTERVAL), heard: now, looked: now }
    }

    /// Time between looks.
    pub fn interval(&self) -> Duration {
        self.interval
    }

    /// Something came from the coordinator.
    pub fn hear(&mut self, now: Instant) {
        self.heard = now;
    }

    /// How long the coordinator has been silent, if that is too long. Time in which this process did not run itself does
    /// not count: what came in it was not heard yet.
    pub fn look(&mut self, now: Instant) -> Option<Duration> {
        let since = now.saturating_duration_since(self.looked);
        self.looked = now;
        if since > 2 * self.interval {
            self.heard = now.min(self.heard + (since - self.interval));
        }
        let silent = now.saturating_duration_since(self.heard);
        (silent > (self.interval * MISSED_LIMIT).max(SHORTEST_SILENCE)).then_some(silent)
    }
}

impl Default for Silence {
    fn default() -> Self {
        Self::new(FIRST_INTERVAL, Instant::now())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::sync::mpsc;

    /// Looks each interval up to `until`; the first silence.
    fn first(silence: &mut Silence, from: Instant, until: Duration) -> Option<Duration> {
        let mut at = Duration::ZERO;
        while at <= until {
            if let Some(silent) = silence.look(from + at) {
                return Some(silent);
            }
            at += silence.interval();
        }
        None
    }

    #[test]
    fn silence_is_noticed_after_the_limit() {
        let begun = Instant::now();
        let mut silence = Silence::new(Duration::from_secs(1), begun);
        assert_eq!(first(&mut silence, begun, Duration::from_secs(40)), None);
        silence.hear(begun + Duration::from_secs(40));
        let later = begun + Duration::from_secs(41);
        assert_eq!(first(&mut silence, later, Duration::from_secs(60)), Some(Duration::from_secs(41)));
    }

    #[test]
    fn short_intervals_have_patience() {
        let begun = Instant::now();
        let mut silence = Silence::new(Duration::ZERO, begun);
        assert_eq!(silence.interval(), SHORTEST_INTERVAL);
        assert_eq!(first(&mut silence, begun, Duration::from_secs(3)), None);
        assert!(first(&mut silence, begun + Duration::from_secs(3), Duration::from_secs(1)).is_some());
    }

    #[test]
    fn being_held_up_oneself_is_no_silence() {
        let begun = Instant::now();
        let mut silence = Silence::new(Duration::from_millis(50), begun);
        assert_eq!(silence.look(begun + Duration::from_secs(60)), None);
        let again = begun + Duration::from_secs(60);
        assert_eq!(first(&mut silence, again, Duration::from_millis(2900)), None);
        assert!(first(&mut silence, again + Duration::from_millis(2950), Duration::from_secs(1)).is_some());
    }

    #[test]
    fn beats_say_what_the_engine_does() {
        let watched = Watched::default();
        let vitals = watched.vitals.clone();
        let _underway = vitals.begin(5, 9, Instant::now());
        let pulse = Pulse::start(watched).expect("a thread");
        let (sender, mut beats) = mpsc::unbounded_channel();
        pulse.begin(sender);
        pulse.set_interval(Duration::ZERO);
        pulse.hear(17);
        let mut next = || match beats.blocking_recv().and_then(|m| m.message) {
            Some(Message::Heartbeat(beat)) => beat,
            other => panic!("not a heartbeat: {other:?}"),
        };
        let first = next();
        assert_eq!((first.sequence, first.busy_epoch, first.busy_step), (1, 5, 9));
        assert!(first.resident_bytes > 0);
        loop {
            let beat = next();
            if beat.busy_ms >= 20 && beat.heard_sequence == 17 {
                break;
            }
        }
        pulse.end();
        drop(pulse);
        while beats.blocking_recv().is_some() {}
    }
}
