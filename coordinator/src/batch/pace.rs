//! How many lines are asked for at once. Pure: what happens and the time in, a number out.
//!
//! As many as may be, until a server says that it has enough: then as many as it has taken, not before it said, and one more
//! at a time for as long as it goes well.

use std::time::{Duration, Instant};

/// Longest pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// What is known of the server's patience.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pace {
    most: usize,
    width: usize,
    /// Good answers since `width` has changed.
    n_good: usize,
    paused_until: Option<Instant>,
}

impl Pace {
    /// So many at once, at least one, unless the server says no.
    pub fn new(most: usize) -> Self {
        let most = most.max(1);
        Self { most, width: most, n_good: 0, paused_until: None }
    }

    /// A line was answered.
    pub fn on_answer(&mut self) {
        self.n_good += 1;
        if self.n_good >= self.width && self.width < self.most {
            (self.width, self.n_good) = (self.width + 1, 0);
        }
    }

    /// The server has enough: `n_running` others are still being answered.
    pub fn on_refusal(&mut self, now: Instant, retry_after: Duration, n_running: usize) {
        (self.width, self.n_good) = (n_running.clamp(1, self.width), 0);
        let until = now + retry_after.min(LONGEST_PAUSE);
        self.paused_until = Some(self.paused_until.map_or(until, |paused| paused.max(until)));
    }

    /// Whether one more may be asked for.
    pub fn allows(&self, now: Instant, n_running: usize) -> bool {
        n_running < self.width && self.paused_until.is_none_or(|until| until <= now)
    }

    /// When that may change by itself.
    pub fn resumes_at(&self, now: Instant) -> Option<Instant> {
        self.paused_until.filter(|until| *until > now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_narrow_and_answers_widen() {
        let now = Instant::now();
        let mut pace = Pace::new(8);
        assert!(pace.allows(now, 7) && !pace.allows(now, 8));
        // Eight were asked for, three were taken.
        for n_running in [7, 6, 5, 4, 3] {
            pace.on_refusal(now, Duration::from_secs(2), n_running);
        }
        assert!(!pace.allows(now, 0), "not before the server said");
        assert_eq!(pace.resumes_at(now), Some(now + Duration::from_secs(2)));
        let later = now + Duration::from_secs(2);
        assert!(pace.allows(later, 2) && !pace.allows(later, 3));
        (0..3).for_each(|_| pace.on_answer());
        assert!(pace.allows(later, 3) && !pace.allows(later, 4));
        (0..100).for_each(|_| pace.on_answer());
        assert!(!pace.allows(later, 8), "never more than there may be");
    }

    #[test]
    fn one_is_always_tried_again() {
        let now = Instant::now();
        let mut pace = Pace::new(4);
        pace.on_refusal(now, Duration::from_secs(100_000), 0);
        assert_eq!(pace.resumes_at(now), Some(now + LONGEST_PAUSE));
        assert!(pace.allows(now + LONGEST_PAUSE, 0));
    }
}
