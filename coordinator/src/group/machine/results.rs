//! When steps had their results, and so how far copies of KV rows are behind them.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

/// Copies that lack only rows of steps within this time are as good as any: ranks gather the rows of a few steps before
/// they send them. Computing them again takes no longer than computing them took.
const NEAR: Duration = Duration::from_millis(100);

/// Results of the steps of a formation.
#[derive(Debug, Clone, Default)]
pub(super) struct Results {
    /// The last step with a result.
    last: u64,
    /// The last one of before those in `recent`.
    settled: u64,
    /// Steps of the last [`NEAR`], and when they had their results.
    recent: VecDeque<(u64, Instant)>,
}

impl Results {
    /// A new formation has no results.
    pub(super) fn begin(&mut self) {
        *self = Self::default();
    }

    /// A step has its result.
    pub(super) fn stepped(&mut self, step: u64, now: Instant) {
        if step > self.last {
            self.last = step;
            self.recent.push_back((step, now));
        }
        while let Some((step, _)) = self.recent.front().filter(|(_, at)| is_settled(*at, now)) {
            self.settled = *step;
            self.recent.pop_front();
        }
    }

    /// Steps whose rows are not among copies that have those through `step`.
    pub(super) fn lag(&self, step: u64) -> u64 {
        self.last.saturating_sub(step)
    }

    /// Whether copies with the rows through `step` lack nothing but what was computed within the last [`NEAR`].
    pub(super) fn is_near(&self, step: u64, now: Instant) -> bool {
        let settled = self.recent.iter().take_while(|(_, at)| is_settled(*at, now)).last();
        step >= settled.map_or(self.settled, |(step, _)| *step)
    }
}

fn is_settled(at: Instant, now: Instant) -> bool {
    now.saturating_duration_since(at) > NEAR
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_are_near_if_they_lack_only_recent_rows() {
        let begun = Instant::now();
        let at = |ms| begun + Duration::from_millis(ms);
        let mut results = Results::default();
        assert!(results.is_near(0, begun), "no step yet");
        for step in 1..=20 {
            results.stepped(step, at(10 * step));
        }
        results.stepped(19, at(201));
        assert_eq!((results.lag(20), results.lag(17), results.lag(21)), (0, 3, 0));
        assert!(results.is_near(10, at(201)), "step 11 had its result 91 ms ago");
        assert!(!results.is_near(9, at(201)));
        // No step runs any more: what is lacking is old at last.
        assert!(results.is_near(19, at(300)));
        assert!(!results.is_near(19, at(301)));
        assert!(results.is_near(20, at(10_000)));
        assert!(results.recent.len() <= 11, "older ones are not kept: {results:?}");
        results.begin();
        assert!(results.is_near(0, at(301)));
    }
}
