//! How a coordinator comes to lead, and when it ceases to: events in, actions out.
//!
//! Leading is safe without clocks: whatever a leader says carries its term, and shards refuse the lower one. So a lease
//! only decides *when* somebody else may try, a store that does not answer ends no leadership, and a wrong suspicion costs
//! time, never tokens.

use std::time::{Duration, Instant};

use phalanx_cluster::store::Expected;

use super::{CoordinatorRecord, Leader, Session};

/// Renewals in a lease's time to live.
const RENEWALS: u32 = 3;
/// Attempts to reach a silent store in a lease's time to live.
const RETRIES: u32 = 8;
/// A coordinator that was told to step down leaves the others this many times to live to take over.
const HOLD_OFF: u32 = 3;

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// The store showed who holds the key, at a revision.
    Seen {
        /// Who, in which term.
        holder: Option<Leader>,
        /// When this was so, in the store's count.
        revision: u64,
    },
    /// A look at the key was not answered.
    LookFailed(String),
    /// An attempt took the key.
    Won {
        /// Our term.
        term: u64,
    },
    /// An attempt came too late.
    Refused,
    /// An attempt was not answered: it may have won all the same.
    AttemptFailed(String),
    /// Our lease was renewed.
    Renewed {
        /// Of this term.
        term: u64,
    },
    /// Our lease is over.
    LeaseEnded {
        /// Of this term.
        term: u64,
    },
    /// A renewal was not answered.
    RenewalFailed {
        /// Of this term.
        term: u64,
        /// As the store's error says.
        reason: String,
    },
    /// The process that led in this term is dead: its connections broke and its port is closed.
    LeaderDied {
        /// Its term.
        term: u64,
    },
    /// Somebody knows of a term.
    Challenged {
        /// The greatest that it knows.
        term: u64,
    },
    /// Give leadership to somebody else, and stand by.
    StepDown,
    /// Give leadership to somebody else, and never lead again.
    Resign,
    /// Time has passed.
    Tick,
}

/// What is to be done, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Try to take the key; answered by `Won`, `Refused` or `AttemptFailed`.
    Attempt(Expected),
    /// See who holds the key; answered by `Seen` or `LookFailed`.
    Look,
    /// Renew our lease; answered by `Renewed`, `LeaseEnded` or `RenewalFailed`.
    Renew {
        /// Of this term.
        term: u64,
    },
    /// Keep the lease that the key has: an attempt won though its answer was lost.
    Adopt(Leader),
    /// End our lease.
    Release {
        /// Of this term.
        term: u64,
    },
    /// Tell everybody: [`Machine::session`] or [`Machine::leader`] has changed.
    Publish,
    /// For people.
    Warn(String),
    /// For people.
    Info(String),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Waits for the key. Until the instant somebody else may have it.
    Standby(Option<Instant>),
    Leading {
        term: u64,
        renew_at: Instant,
        is_renewing: bool,
    },
    Resigned,
}

/// One coordinator's part in the election.
pub struct Machine {
    me: CoordinatorRecord,
    ttl: Duration,
    /// Nobody else uses the store: who holds the key is gone.
    is_alone: bool,
    state: State,
    sessions: u64,
    /// Who holds the key as far as is known.
    holder: Option<Leader>,
    /// What is known was so at this revision.
    revision: u64,
    is_attempting: bool,
    is_looking: bool,
    look_at: Instant,
    /// The next look decides whether we still lead.
    challenge: Option<u64>,
    /// Said once.
    is_silent: bool,
}

impl Machine {
    /// A candidate whose leases live for `ttl`. `is_alone` says that no other process uses the store.
    pub fn new(now: Instant, me: CoordinatorRecord, ttl: Duration, is_alone: bool) -> Self {
        Self {
            me,
            ttl,
            is_alone,
            state: State::Standby(None),
            sessions: 0,
            holder: None,
            revision: 0,
            is_attempting: false,
            is_looking: false,
            look_at: now,
            challenge: None,
            is_silent: false,
        }
    }

    /// Set while this coordinator leads.
    pub fn session(&self) -> Option<Session> {
        match self.state {
            State::Leading { term, .. } => Some(Session { number: self.sessions, term }),
            _ => None,
        }
    }

    /// Who leads.
    pub fn leader(&self) -> Option<Leader> {
        match self.state {
            State::Leading { term, .. } => Some(Leader { record: self.me.clone(), term }),
            // We gave it up, whatever the store still says.
            _ => self.holder.clone().filter(|h| !h.record.is_same_life(&self.me)),
        }
    }

    /// When a `Tick` is due.
    pub fn wake_at(&self) -> Instant {
        let renewal = match self.state {
            State::Leading { renew_at, is_renewing: false, .. } => Some(renew_at),
            _ => None,
        };
        let look = if self.is_looking { None } else { Some(self.look_at) };
        let both = renewal.into_iter().chain(look).min();
        // Both are under way: their answers come as events.
        both.unwrap_or(self.look_at + self.ttl)
    }

    /// What follows from an event.
    pub fn step(&mut self, now: Instant, event: Event) -> Vec<Action> {
        let mut actions = Vec::new();
        let before = (self.session(), self.leader());
        self.on_event(now, event, &mut actions);
        if before != (self.session(), self.leader()) {
            actions.push(Action::Publish);
        }
        actions
    }

    fn on_event(&mut self, now: Instant, event: Event, actions: &mut Vec<Action>) {
        match event {
            Event::Seen { holder, revision } => {
                self.is_looking = false;
                self.answered(actions);
                self.on_seen(now, holder, revision, actions);
            }
            Event::LookFailed(reason) => {
                self.is_looking = false;
                self.look_at = now + self.ttl / RETRIES;
                self.unanswered(&reason, actions);
                if let (Some(challenge), State::Leading { term, .. }) = (self.challenge.take(), self.state) {
                    let warning = format!(
                        "somebody knows term {challenge}, ours is {term}, and the store does not answer: another leads"
                    );
                    actions.push(Action::Warn(warning));
                    self.give_up(State::Standby(None), actions);
                }
            }
            Event::Won { term } => {
                self.is_attempting = false;
                self.answered(actions);
                self.on_won(now, term, actions);
            }
            Event::Refused => {
                self.is_attempting = false;
                self.answered(actions);
                self.look(now, actions);
            }
            Event::AttemptFailed(reason) => {
                self.is_attempting = false;
                self.look_at = now + self.ttl / RETRIES;
                self.unanswered(&reason, actions);
            }
            Event::Renewed { term } => {
                if self.renewal_over(term, now + self.ttl / RENEWALS) {
                    self.answered(actions);
                    // A lease may live while its key is gone or somebody else's.
                    self.look(now, actions);
                }
            }
            Event::LeaseEnded { term } => {
                if self.renewal_over(term, now + self.ttl / RENEWALS) {
                    self.answered(actions);
                    actions.push(Action::Warn("our lease has ended: trying to lead on".to_owned()));
                    self.attempt(Expected::Absent, actions);
                }
            }
            Event::RenewalFailed { term, reason } => {
                if self.renewal_over(term, now + self.ttl / RETRIES) {
                    self.unanswered(&reason, actions);
                }
            }
            Event::LeaderDied { term } => {
                if matches!(self.state, State::Standby(_))
                    && self.holder.as_ref().is_some_and(|h| h.term == term)
                    && !self.is_attempting
                {
                    actions.push(Action::Info(format!("the leader of term {term} is dead: taking over")));
                    self.attempt(Expected::Unchanged(term), actions);
                }
            }
            Event::Challenged { term: known } => {
                if self.session().is_some_and(|s| known > s.term) {
                    self.challenge = self.challenge.max(Some(known));
                    self.look(now, actions);
                }
            }
            Event::StepDown => {
                if self.session().is_some() {
                    actions.push(Action::Info("stepping down".to_owned()));
                    self.give_up(State::Standby(Some(now + self.ttl * HOLD_OFF)), actions);
                }
            }
            Event::Resign => self.give_up(State::Resigned, actions),
            Event::Tick => {
                if let State::Leading { term, renew_at, is_renewing } = &mut self.state
                    && !*is_renewing
                    && now >= *renew_at
                {
                    *is_renewing = true;
                    actions.push(Action::Renew { term: *term });
                }
                if now >= self.look_at {
                    self.look(now, actions);
                }
            }
        }
    }

    fn on_seen(&mut self, now: Instant, holder: Option<Leader>, revision: u64, actions: &mut Vec<Action>) {
        if revision < self.revision {
            return;
        }
        self.revision = revision;
        self.holder = holder;
        let challenge = self.challenge.take();
        let holder = self.holder.clone();
        match (self.state, holder) {
            (State::Leading { .. }, None) => {
                actions.push(Action::Warn("nobody holds the leader's key: taking it again".to_owned()));
                self.attempt(Expected::Absent, actions);
            }
            (State::Leading { term, .. }, Some(holder)) if holder.record.is_same_life(&self.me) => {
                if holder.term > term {
                    self.lead(now, holder.term);
                    actions.push(Action::Adopt(holder));
                } else if let Some(challenge) = challenge {
                    actions.push(Action::Warn(format!(
                        "somebody claims to know term {challenge}, but by the store we lead, in term {term}: it comes \
                         from another store, or from one that was emptied; restart whoever says so"
                    )));
                }
            }
            (State::Leading { term, .. }, Some(holder)) => {
                if holder.term > term {
                    let other = &holder.record.coordinator_id;
                    actions.push(Action::Warn(format!("{other} leads in term {}, ours was {term}", holder.term)));
                    self.give_up(State::Standby(None), actions);
                }
            }
            (State::Standby(hold), None) => {
                if hold.is_none_or(|until| now >= until) {
                    self.state = State::Standby(None);
                    self.attempt(Expected::Absent, actions);
                }
            }
            (State::Standby(hold), Some(holder)) => {
                let is_ours = holder.record.is_same_life(&self.me);
                if is_ours && hold.is_some_and(|until| now < until) {
                    return;
                }
                self.state = State::Standby(None);
                if is_ours || self.is_alone || self.me.succeeds(&holder.record) {
                    self.attempt(Expected::Unchanged(holder.term), actions);
                }
            }
            (State::Resigned, _) => {}
        }
    }

    fn on_won(&mut self, now: Instant, term: u64, actions: &mut Vec<Action>) {
        let is_overtaken = self.holder.as_ref().is_some_and(|h| h.term > term);
        let holds_off = matches!(self.state, State::Standby(Some(_)) | State::Resigned);
        if is_overtaken || holds_off || self.session().is_some_and(|s| s.term > term) {
            actions.push(Action::Release { term });
            return;
        }
        self.revision = self.revision.max(term);
        self.holder = Some(Leader { record: self.me.clone(), term });
        self.lead(now, term);
        actions.push(Action::Info(format!("leading in term {term}")));
    }

    fn lead(&mut self, now: Instant, term: u64) {
        if self.session().is_none() {
            self.sessions += 1;
        }
        self.state = State::Leading { term, renew_at: now + self.ttl / RENEWALS, is_renewing: false };
        self.look_at = now + self.ttl;
    }

    fn give_up(&mut self, next: State, actions: &mut Vec<Action>) {
        if let State::Leading { term, .. } = self.state {
            actions.push(Action::Release { term });
        }
        self.challenge = None;
        self.state = next;
    }

    /// Whether a renewal's answer is about the present term.
    fn renewal_over(&mut self, of: u64, next: Instant) -> bool {
        match &mut self.state {
            State::Leading { term, renew_at, is_renewing } if *term == of => {
                *is_renewing = false;
                *renew_at = next;
                true
            }
            _ => false,
        }
    }

    fn attempt(&mut self, expected: Expected, actions: &mut Vec<Action>) {
        if !self.is_attempting {
            self.is_attempting = true;
            actions.push(Action::Attempt(expected));
        }
    }

    fn look(&mut self, now: Instant, actions: &mut Vec<Action>) {
        self.look_at = now + self.ttl;
        if !self.is_looking {
            self.is_looking = true;
            actions.push(Action::Look);
        }
    }

    fn answered(&mut self, actions: &mut Vec<Action>) {
        if std::mem::take(&mut self.is_silent) {
            actions.push(Action::Info("the store answers again".to_owned()));
        }
    }

    fn unanswered(&mut self, reason: &str, actions: &mut Vec<Action>) {
        if !std::mem::replace(&mut self.is_silent, true) {
            let duty = if self.session().is_some() { "leading on" } else { "standing by" };
            actions.push(Action::Warn(format!("{reason}; {duty}, membership can't change")));
        }
    }
}

#[cfg(test)]
#[path = "machine_tests.rs"]
mod tests;
