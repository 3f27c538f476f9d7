//! Requests that may be what kills shards.
//!
//! Whoever has rows in flight when a group is lost unplanned may be guilty, and mostly nobody is: processes are killed
//! and machines fail. A token clears a request. One that was there at several losses without a token between them is a
//! suspect: it is tried alone, no other request's rows in its steps, so that if it is guilty it reaches the limit and
//! fails, and nobody else does. Whoever was lost least often is tried first: processes that are killed again and again for
//! other reasons meet another one each time.

use std::collections::BTreeSet;

use super::{event::Action, machine::Machine};
use crate::{
    request::RequestError,
    sequence::{RequestKey, SequenceKey},
};

/// Losses without progress after which a request is tried alone, unless the limit is less.
const SUSPECT_AFTER: u32 = 2;

/// Who is under suspicion.
#[derive(Default)]
pub(super) struct Quarantine {
    suspects: BTreeSet<RequestKey>,
    on_trial: Option<RequestKey>,
    /// A trial has just ended: others get a step before the next.
    is_others_turn: bool,
}

/// Whose rows the next plan may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Allowed {
    /// Everybody's.
    All,
    /// Those of requests that are under no suspicion.
    Unsuspected,
    /// Those of one request.
    Only(RequestKey),
    /// Nobody's, until the steps in flight have ended.
    Nobody,
}

impl Quarantine {
    /// The group is over: whoever was tried is tried again from the beginning.
    pub(super) fn end_trial(&mut self) {
        self.on_trial = None;
        self.is_others_turn = false;
    }

    /// The request made progress, or ended.
    pub(super) fn clear(&mut self, key: RequestKey) {
        self.suspects.remove(&key);
        if self.on_trial == Some(key) {
            self.on_trial = None;
            self.is_others_turn = true;
        }
    }

    fn allows(&self, allowed: Allowed, key: RequestKey) -> bool {
        match allowed {
            Allowed::All => true,
            Allowed::Unsuspected => !self.suspects.contains(&key),
            Allowed::Only(one) => one == key,
            Allowed::Nobody => false,
        }
    }
}

impl Machine {
    /// Counts a loss for all who had rows in flight. Those that reach the limit fail.
    pub(super) fn blame(&mut self, out: &mut Vec<Action>) {
        let Some(group) = &self.group else { return };
        let present: BTreeSet<_> = group.in_flight.iter().flat_map(|s| &s.chunks).map(|c| c.key.request).collect();
        for key in present {
            let Some(live) = self.requests.get_mut(&key) else { continue };
            live.losses += 1;
            let (losses, limit) = (live.losses, self.recovery.max_replays);
            if losses > limit {
                self.fail(key, RequestError::Poison { losses }, out);
            } else if losses >= SUSPECT_AFTER.min(limit) {
                self.quarantine.suspects.insert(key);
            }
        }
    }

    /// A request got something done: whatever killed shards before, it was not that.
    pub(super) fn absolve(&mut self, key: RequestKey) {
        if let Some(live) = self.requests.get_mut(&key).filter(|live| live.losses > 0) {
            live.losses = 0;
            self.quarantine.clear(key);
        }
    }

    /// Whose rows the next plan may have.
    ///
    /// A trial begins when nobody else has anything to compute again: it would be lost once more if the suspect is
    /// guilty. While it lasts others wait; between two of them they get a step.
    pub(super) fn allowed(&mut self) -> Allowed {
        let Some(next) = self.next_suspect() else { return Allowed::All };
        if self.quarantine.on_trial.is_none() && (self.quarantine.is_others_turn || self.others_replay()) {
            return Allowed::Unsuspected;
        }
        let key = *self.quarantine.on_trial.get_or_insert(next);
        let in_flight = self.group.iter().flat_map(|g| &g.in_flight).flat_map(|s| &s.chunks);
        let is_alone = in_flight.map(|c| c.key.request).all(|k| k == key);
        if is_alone { Allowed::Only(key) } else { Allowed::Nobody }
    }

    /// Whoever was allowed has no rows, and no step is in flight after which they may have: lets somebody else try. Says
    /// whether there is anybody.
    pub(super) fn give_way(&mut self, allowed: Allowed) -> bool {
        match allowed {
            Allowed::All | Allowed::Nobody => false,
            Allowed::Unsuspected => {
                // They may wait for what a suspect holds.
                self.quarantine.on_trial = self.next_suspect();
                true
            }
            // It has just failed for another reason.
            Allowed::Only(key) => {
                self.quarantine.clear(key);
                true
            }
        }
    }

    fn next_suspect(&self) -> Option<RequestKey> {
        let losses = |key: &RequestKey| self.requests.get(key).map_or(0, |live| live.losses);
        self.quarantine.suspects.iter().min_by_key(|key| (losses(key), **key)).copied()
    }

    fn others_replay(&self) -> bool {
        let suspects = &self.quarantine.suspects;
        self.sequences.values().any(|s| s.replay_until > 0 && !suspects.contains(&s.key.request))
    }

    /// Others had their chance of a step, if they were allowed one.
    pub(super) fn end_turn_of_others(&mut self, allowed: Allowed, is_planned: bool) {
        if allowed == Allowed::Unsuspected && is_planned {
            self.quarantine.is_others_turn = false;
        }
    }

    pub(super) fn allows(&self, allowed: Allowed, key: SequenceKey) -> bool {
        self.quarantine.allows(allowed, key.request)
    }
}
