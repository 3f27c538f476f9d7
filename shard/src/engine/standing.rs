//! Where the engine stands, for whoever asks the shard's health port: what it was told, and what came of it.

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use phalanx_proto::v1::shard_message::Message;

use super::worker::Command;

/// How long a shard that was told nothing yet is not trusted to be needed for nothing.
const SETTLED_AFTER: Duration = Duration::from_secs(5);

/// Cloning shares it.
#[derive(Clone, Default)]
pub struct Standing(Arc<Mutex<State>>);

/// What is known at a moment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct State {
    /// Since when there is a coordinator, if there is one.
    pub attached_since: Option<Instant>,
    /// Place in a group, if it has one or is taking one.
    pub seat: Option<Seat>,
    /// Ranks that it was told to load ahead.
    pub asked_ahead: BTreeSet<u32>,
    /// Those of them that it has.
    pub prepared: BTreeSet<u32>,
    /// Since when it has neither seat nor anything to load, if so.
    pub idle_since: Option<Instant>,
    /// What went wrong with the last thing that it was told.
    pub failure: Option<String>,
    /// Bytes of the last slice that it took.
    pub weight_bytes: u64,
    /// Bytes of the present group's KV pages.
    pub kv_bytes: u64,
    /// Steps that were computed.
    pub n_steps: u64,
    /// Time that they took, without what follows.
    pub computing: Duration,
    /// Time that they waited for other ranks.
    pub in_collectives: Duration,
    /// What it was told and could not do.
    pub n_failures: u64,
}

/// A place in a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seat {
    /// Of the group.
    pub epoch: u64,
    /// Place.
    pub rank: u32,
    /// Places.
    pub world_size: u32,
    /// Whether plans are taken.
    pub is_serving: bool,
}

impl Standing {
    /// What is known now.
    pub fn get(&self) -> State {
        self.lock().clone()
    }

    /// The engine takes a command.
    pub(super) fn told(&self, command: &Command, now: Instant) {
        let mut state = self.lock();
        match command {
            Command::Attached(_) => {
                state.attached_since = Some(now);
                state.idle_since = Some(now);
            }
            Command::Detached => {
                state.attached_since = None;
                state.prepared.clear();
                state.asked_ahead.clear();
                state.unseat(now);
            }
            Command::Prepare(prepare) => {
                state.asked_ahead = prepare.ranks.iter().copied().collect();
                state.prepared.clear();
            }
            Command::Form(form) => {
                let (epoch, rank, world_size) = (form.epoch, form.rank, form.world_size);
                state.seat = Some(Seat { epoch, rank, world_size, is_serving: false });
                (state.kv_bytes, state.failure, state.idle_since) = (0, None, None);
            }
            Command::Retire(retire) => {
                if state.seat.is_some_and(|seat| seat.epoch == retire.epoch) {
                    state.unseat(now);
                }
            }
            Command::Serve(_) | Command::Plan(_) | Command::LoadedAhead(_) | Command::End => {}
        }
    }

    /// The engine says something.
    pub(super) fn said(&self, message: &Message, now: Instant) {
        let mut state = self.lock();
        match message {
            Message::Loaded(loaded) => state.weight_bytes = loaded.weight_bytes,
            Message::Ready(ready) => {
                state.kv_bytes = ready.kv_bytes;
                if let Some(seat) = &mut state.seat {
                    seat.is_serving = seat.epoch == ready.epoch;
                }
            }
            Message::Prepared(prepared) => drop(state.prepared.insert(prepared.rank)),
            Message::StepResult(result) => {
                let waited = Duration::from_micros(result.collective_us);
                state.n_steps += 1;
                state.computing += Duration::from_micros(result.compute_us).saturating_sub(waited);
                state.in_collectives += waited;
            }
            Message::Failed(failed) => {
                state.unseat(now);
                state.failure = Some(failed.error.clone());
                state.n_failures += 1;
            }
            _ => {}
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Each change is complete in itself.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn unseat(&mut self, now: Instant) {
        self.seat = None;
        self.kv_bytes = 0;
        self.idle_since = Some(now);
    }

    /// Whether nobody need wait for this shard; else what it waits for. It serves, or has loaded what it was told to load
    /// ahead, or was told nothing for a while, as a drained one, and one whose group waits for others.
    ///
    /// # Errors
    /// The reason.
    pub fn readiness(&self, now: Instant) -> Result<(), String> {
        if self.attached_since.is_none() {
            return Err("no coordinator has taken it in".to_owned());
        }
        if let Some(Seat { rank, epoch, is_serving, .. }) = self.seat {
            return if is_serving { Ok(()) } else { Err(format!("rank {rank} of epoch {epoch} is being loaded")) };
        }
        if let Some(failure) = &self.failure {
            return Err(format!("it failed: {failure}"));
        }
        if !self.prepared.is_empty() {
            return Ok(());
        }
        if !self.asked_ahead.is_empty() {
            return Err("weights are being loaded ahead".to_owned());
        }
        match self.idle_since {
            Some(since) if now.saturating_duration_since(since) >= SETTLED_AFTER => Ok(()),
            _ => Err("it has just joined".to_owned()),
        }
    }
}

#[cfg(test)]
mod tests {
    use phalanx_proto::v1::{Failed, Form, Loaded, Prepare, Prepared, Ready, Retire, StepResult};
    use tokio::sync::mpsc;

    use super::*;

    fn attached(standing: &Standing, now: Instant) {
        standing.told(&Command::Attached(mpsc::unbounded_channel().0), now);
    }

    fn form(epoch: u64) -> Command {
        Command::Form(Form { epoch, rank: 1, world_size: 2, ..Form::default() })
    }

    #[test]
    fn a_rank_is_ready_while_it_serves() {
        let (standing, now) = (Standing::default(), Instant::now());
        let reason = |standing: &Standing| standing.get().readiness(now).unwrap_err();
        assert!(reason(&standing).contains("no coordinator"));
        attached(&standing, now);
        assert!(reason(&standing).contains("just joined"));
        standing.told(&form(3), now);
        standing.said(&Message::Loaded(Loaded { epoch: 3, weight_bytes: 70, ..Loaded::default() }), now);
        assert!(reason(&standing).contains("rank 1 of epoch 3"));
        standing.said(&Message::Ready(Ready { epoch: 3, kv_bytes: 9, resident_bytes: 100 }), now);
        assert_eq!(standing.get().readiness(now), Ok(()));
        let result = StepResult { compute_us: 500, collective_us: 200, ..StepResult::default() };
        standing.said(&Message::StepResult(result), now);
        let state = standing.get();
        assert_eq!((state.weight_bytes, state.kv_bytes, state.n_steps), (70, 9, 1));
        assert_eq!((state.computing.as_micros(), state.in_collectives.as_micros()), (300, 200));
        standing.said(&Message::Failed(Failed { epoch: 3, step: 2, error: "no memory".to_owned() }), now);
        assert!(reason(&standing).contains("no memory"));
        standing.told(&form(4), now);
        assert!(reason(&standing).contains("epoch 4"), "a failure is over with the next form");
        standing.told(&Command::Detached, now);
        assert!(reason(&standing).contains("no coordinator"));
    }

    #[test]
    fn a_spare_is_ready_when_it_has_loaded() {
        let (standing, now) = (Standing::default(), Instant::now());
        attached(&standing, now);
        standing.told(&Command::Prepare(Prepare { ranks: vec![0, 1], ..Prepare::default() }), now);
        assert!(standing.get().readiness(now + SETTLED_AFTER).unwrap_err().contains("ahead"));
        standing.said(&Message::Prepared(Prepared { rank: 0, ..Prepared::default() }), now);
        assert_eq!(standing.get().readiness(now), Ok(()));
        standing.told(&Command::Prepare(Prepare { ranks: vec![1], ..Prepare::default() }), now);
        assert!(standing.get().readiness(now).is_err(), "it is to load something else");
    }

    #[test]
    fn whoever_is_told_nothing_holds_nobody_up() {
        let (standing, now) = (Standing::default(), Instant::now());
        attached(&standing, now);
        standing.told(&form(3), now);
        standing.told(&Command::Retire(Retire { epoch: 2, keep_kv: true }), now);
        assert!(standing.get().seat.is_some(), "that was another group");
        standing.told(&Command::Retire(Retire { epoch: 3, keep_kv: true }), now);
        assert!(standing.get().readiness(now).is_err());
        assert_eq!(standing.get().readiness(now + SETTLED_AFTER), Ok(()));
    }
}
