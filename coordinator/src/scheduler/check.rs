//! The invariants of the scheduler, for tests.

use super::{machine::Machine, policy::MAX_IN_FLIGHT};
use crate::sequence::SequenceKey;

impl Machine {
    /// Asserts the invariants of queues and blocks. O(everything).
    pub fn check(&self) {
        let n_held: usize = self.requests.values().map(|r| r.held.len()).sum();
        assert_eq!(self.waiting.len() + self.running.len() + n_held, self.sequences.len(), "queues and sequences");
        for (key, sequence) in &self.sequences {
            assert_eq!(
                sequence.seat.is_some(),
                self.running.contains(&sequence.turn()),
                "{key:?} has a seat if it runs"
            );
            let is_waiting = sequence.waits_at.is_some_and(|place| self.waiting.contains(&place));
            let live = self.requests.get(&key.request).expect("a sequence belongs to a request");
            assert_eq!(sequence.seat.is_none(), is_waiting || live.held.contains(key), "{key:?} waits or is held");
            assert!(sequence.n_output + sequence.n_pending <= sequence.max_tokens, "{key:?} is planned beyond its end");
            let tokens = self.journal.tokens(*key).expect("the journal has every sequence");
            assert_eq!(tokens.len(), sequence.n_known(), "{key:?} in the journal");
            if let Some(seat) = &sequence.seat {
                assert_eq!(seat.tokens, tokens, "{key:?} in the journal");
                assert!(seat.computed <= sequence.n_planned(), "{key:?} is computed beyond what is known");
                let covered = seat.coverage.through(u64::MAX);
                assert_eq!(covered, Some(seat.computed), "{key:?} was computed by plans");
            }
        }
        for (key, live) in &self.requests {
            let range = SequenceKey { request: *key, choice: 0 }..=SequenceKey { request: *key, choice: u32::MAX };
            assert_eq!(self.sequences.range(range).count(), live.n_open, "{key:?} has open choices");
            assert!(live.n_open > 0, "{key:?} is finished");
            let is_armed = live.request.deadline.is_none_or(|at| self.deadlines.contains(&(at, *key)));
            assert!(is_armed, "{key:?} has its deadline");
        }
        assert_eq!(self.journal.len(), self.requests.len(), "requests in the journal");
        let n_deadlines = self.requests.values().filter(|r| r.request.deadline.is_some()).count();
        assert_eq!(self.deadlines.len(), n_deadlines, "deadlines");
        match &self.group {
            Some(group) => {
                group.blocks.check(self.sequences.values().filter_map(|s| s.seat.as_ref()).map(|s| &s.table));
                assert!(group.in_flight.len() <= MAX_IN_FLIGHT, "steps in flight");
                assert!(self.running.len() <= self.limits.max_running, "sequences that run");
            }
            None => assert!(self.running.is_empty(), "something runs without a group"),
        }
        if let Some(former) = &self.former {
            assert!(self.group.is_none(), "pages of a former group while one serves");
            former.blocks.check(former.seats.values().map(|s| &s.table));
            assert!(former.seats.keys().all(|key| self.sequences.contains_key(key)), "pages of a sequence that ended");
        }
    }
}
