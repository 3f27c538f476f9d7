//! What one connection is waiting for, and when that has taken too long. Time is an argument.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

/// How long a connection may take.
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    /// For the head of a request, from its first byte on.
    pub head: Duration,
    /// Between requests.
    pub idle: Duration,
    /// For taking any byte of what there is for the client.
    pub write: Duration,
}

impl Patience {
    /// Time between looks: what begins after one can't have taken too long before the next.
    pub fn shortest(&self) -> Duration {
        self.head.min(self.write).min(self.idle)
    }
}

/// Why a connection is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Slow {
    /// A request's head does not end.
    Head,
    /// No request comes.
    Idle,
    /// The client does not read.
    Read,
}

/// Whether a connection may go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Look again then.
    Until(Instant),
    /// It is cut.
    Cut(Slow),
}

#[derive(Debug, Clone, Copy)]
enum Phase {
    /// Nothing has come.
    Idle(Instant),
    /// A request has begun to come.
    Head(Instant),
    /// A request is being answered.
    Busy,
}

#[derive(Debug)]
struct State {
    phase: Phase,
    blocked_since: Option<Instant>,
}

/// Shared by a connection's socket, its service and its watcher.
#[derive(Debug)]
pub struct Progress(Mutex<State>);

impl Progress {
    /// Of a new connection.
    pub fn new(now: Instant) -> Self {
        Self(Mutex::new(State { phase: Phase::Idle(now), blocked_since: None }))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Each change is one assignment.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes came.
    pub fn received(&self, now: Instant) {
        let mut state = self.state();
        if matches!(state.phase, Phase::Idle(_)) {
            state.phase = Phase::Head(now);
        }
    }

    /// A request's head is complete.
    pub fn begun(&self) {
        self.state().phase = Phase::Busy;
    }

    /// Its answer is complete.
    pub fn answered(&self, now: Instant) {
        self.state().phase = Phase::Idle(now);
    }

    /// The client took something.
    pub fn sent(&self) {
        self.state().blocked_since = None;
    }

    /// The client takes nothing.
    pub fn blocked(&self, now: Instant) {
        self.state().blocked_since.get_or_insert(now);
    }

    /// Whether it may go on.
    pub fn verdict(&self, now: Instant, patience: &Patience) -> Verdict {
        let state = self.state();
        let reading = match state.phase {
            Phase::Idle(since) => Some((since + patience.idle, Slow::Idle)),
            Phase::Head(since) => Some((since + patience.head, Slow::Head)),
            Phase::Busy => None,
        };
        let writing = state.blocked_since.map(|since| (since + patience.write, Slow::Read));
        let mut next = now + patience.shortest();
        for (limit, slow) in reading.into_iter().chain(writing) {
            if now >= limit {
                return Verdict::Cut(slow);
            }
            next = next.min(limit);
        }
        Verdict::Until(next)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_wait_has_its_limit() {
        let begin = Instant::now();
        let at = |seconds: u64| begin + Duration::from_secs(seconds);
        let seconds = Duration::from_secs;
        let patience = Patience { head: seconds(30), idle: seconds(600), write: seconds(60) };
        let progress = Progress::new(begin);
        assert_eq!(progress.verdict(at(599), &patience), Verdict::Until(at(600)));
        assert_eq!(progress.verdict(at(600), &patience), Verdict::Cut(Slow::Idle));
        progress.received(at(10));
        progress.received(at(20));
        assert_eq!(progress.verdict(at(39), &patience), Verdict::Until(at(40)));
        assert_eq!(progress.verdict(at(40), &patience), Verdict::Cut(Slow::Head));
        progress.begun();
        progress.received(at(50));
        assert_eq!(progress.verdict(at(5000), &patience), Verdict::Until(at(5030)), "an answer may take its time");
        progress.blocked(at(5000));
        progress.blocked(at(5050));
        assert_eq!(progress.verdict(at(5059), &patience), Verdict::Until(at(5060)));
        assert_eq!(progress.verdict(at(5060), &patience), Verdict::Cut(Slow::Read));
        progress.sent();
        progress.answered(at(5061));
        assert_eq!(progress.verdict(at(5062), &patience), Verdict::Until(at(5092)));
    }
}
