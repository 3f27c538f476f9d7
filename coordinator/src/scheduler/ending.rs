//! What is told of a request when it is over: how long each part of its life took, and how it ended.

use std::time::Instant;

use super::{
    event::{Action, Measure},
    machine::{LiveRequest, Machine},
};
use crate::{
    journal::Entry,
    request::{Finish, RequestError, Usage},
    sequence::{RequestKey, SequenceKey},
};

/// How a request, or a choice of it, ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// At its end: end of sequence, a stop token or a stop string.
    Stop,
    /// At the most that it may have.
    Length,
    /// Nobody waits for it any more, or its deadline passed.
    Abort,
    /// It failed.
    Error,
}

impl Ending {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Stop, Self::Length, Self::Abort, Self::Error];

    /// As metrics and traces spell it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::Abort => "abort",
            Self::Error => "error",
        }
    }

    pub(super) fn of_error(error: &RequestError) -> Self {
        match error {
            RequestError::DeadlineExceeded => Self::Abort,
            _ => Self::Error,
        }
    }
}

impl From<&Finish> for Ending {
    fn from(finish: &Finish) -> Self {
        match finish {
            Finish::EndOfSequence | Finish::StopToken(_) | Finish::StopString(_) | Finish::ContentFilter => Self::Stop,
            Finish::Length => Self::Length,
        }
    }
}

/// When what happened to a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Times {
    /// It came to the scheduler.
    pub arrived: Instant,
    /// It ran for the first time.
    pub admitted: Option<Instant>,
    /// Its first token came.
    pub first_token: Option<Instant>,
    /// Its last token so far came.
    pub last_token: Option<Instant>,
}

impl Times {
    pub(super) fn new(arrived: Instant) -> Self {
        Self { arrived, admitted: None, first_token: None, last_token: None }
    }

    pub(super) fn token(&mut self, now: Instant) {
        self.first_token.get_or_insert(now);
        self.last_token = Some(now);
    }
}

/// A request that is over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ended {
    /// Who it was here.
    pub key: RequestKey,
    /// Its name in logs and answers.
    pub id: String,
    /// How its last choice ended.
    pub ending: Ending,
    /// When what happened.
    pub times: Times,
    /// When it was over.
    pub at: Instant,
    /// Tokens.
    pub usage: Usage,
    /// Tokens of its longest choice that is complete.
    pub longest: usize,
    /// Choices that it asked for.
    pub n: u32,
    /// Choices that were not complete.
    pub n_open: usize,
    /// Most tokens per choice that it asked for.
    pub max_tokens: u32,
    /// How often sequences of it were put back to waiting for want of blocks.
    pub n_preempted: u32,
}

impl Machine {
    /// Removes a request and all its choices; their blocks are free for the next plan.
    pub(super) fn forget(&mut self, key: RequestKey, ending: Ending, out: &mut Vec<Action>) {
        let Some(live) = self.requests.remove(&key) else { return };
        if let Some(deadline) = live.request.deadline {
            self.deadlines.remove(&(deadline, key));
        }
        for choice in 0..live.request.n {
            self.remove_sequence(SequenceKey { request: key, choice });
        }
        self.quarantine.clear(key);
        self.journal.append(Entry::Ended(key));
        // There is a request, so something has happened.
        let at = self.now.unwrap_or(live.times.arrived);
        out.push(Action::Measure(Measure::Ended(Box::new(ended(at, key, ending, live)))));
    }
}

fn ended(at: Instant, key: RequestKey, ending: Ending, live: LiveRequest) -> Ended {
    Ended {
        key,
        id: live.request.id.clone(),
        ending,
        times: live.times,
        at,
        usage: live.usage,
        longest: live.longest,
        n: live.request.n,
        n_open: live.n_open,
        max_tokens: live.request.max_tokens,
        n_preempted: live.n_preempted,
    }
}
