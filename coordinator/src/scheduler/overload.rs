//! How many may wait, and when it is worth to come back.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::request::{Queued, RequestError};

/// Admissions that the rate is measured over.
const WINDOW: usize = 64;
/// Shortest and longest time that is told.
const RETRY_AFTER: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

/// The bounds of the queue.
pub struct Gate {
    requests: Bound,
    prompt_tokens: Bound,
    pace: Mutex<Pace>,
}

struct Bound {
    free: Arc<Semaphore>,
    limit: usize,
}

/// A place in the queue; free again when dropped.
pub struct Place {
    _request: OwnedSemaphorePermit,
    _prompt_tokens: OwnedSemaphorePermit,
}

impl Bound {
    fn new(limit: usize) -> Self {
        let limit = limit.clamp(1, Semaphore::MAX_PERMITS.min(u32::MAX as usize));
        Self { free: Arc::new(Semaphore::new(limit)), limit }
    }

    fn taken(&self) -> usize {
        self.limit.saturating_sub(self.free.available_permits())
    }

    fn take(&self, n: usize) -> Option<OwnedSemaphorePermit> {
        // One that is larger than the bound gets it all: it would never fit otherwise.
        let n = n.min(self.limit) as u32;
        Arc::clone(&self.free).try_acquire_many_owned(n).ok()
    }
}

impl Gate {
    /// At most so many requests wait, with so many prompt tokens together.
    pub fn new(max_requests: usize, max_prompt_tokens: usize) -> Self {
        let pace = Mutex::new(Pace::default());
        Self { requests: Bound::new(max_requests), prompt_tokens: Bound::new(max_prompt_tokens), pace }
    }

    /// A place in the queue for a prompt of so many tokens.
    ///
    /// # Errors
    /// [`RequestError::Overloaded`] if there is none.
    pub fn enter(&self, n_prompt_tokens: usize, now: Instant) -> Result<Place, RequestError> {
        if self.requests.taken() == 0 {
            self.pace().begin(now);
        }
        let Some(request) = self.requests.take(1) else {
            return Err(self.overloaded(&self.requests, Queued::Requests, now));
        };
        let Some(prompt_tokens) = self.prompt_tokens.take(n_prompt_tokens) else {
            drop(request);
            return Err(self.overloaded(&self.prompt_tokens, Queued::PromptTokens, now));
        };
        Ok(Place { _request: request, _prompt_tokens: prompt_tokens })
    }

    /// A request left the queue and runs.
    pub fn admitted(&self, now: Instant) {
        self.pace().admit(now);
    }

    fn overloaded(&self, bound: &Bound, of: Queued, now: Instant) -> RequestError {
        let retry_after = self.pace().retry_after(now, self.requests.taken());
        RequestError::Overloaded { waiting: bound.taken(), limit: bound.limit, of, retry_after }
    }

    fn pace(&self) -> std::sync::MutexGuard<'_, Pace> {
        // Every change of it is whole.
        self.pace.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How fast the queue is worked off, since it was last empty: what was before says nothing of how fast it can be.
#[derive(Debug, Default)]
struct Pace {
    /// When counting began: the admission before the first of the window, or the first request in an empty queue.
    since: Option<Instant>,
    admissions: VecDeque<Instant>,
}

impl Pace {
    fn begin(&mut self, now: Instant) {
        self.since = Some(now);
        self.admissions.clear();
    }

    fn admit(&mut self, now: Instant) {
        self.admissions.push_back(now);
        if self.admissions.len() > WINDOW {
            self.since = self.admissions.pop_front();
        }
    }

    /// When those who wait now will have left the queue, at the measured rate. As long as nobody has, each takes at least
    /// as long as has passed.
    fn retry_after(&self, now: Instant, n_waiting: usize) -> Duration {
        let passed = self.since.map_or(Duration::ZERO, |since| now.saturating_duration_since(since));
        let per_request = passed.as_secs_f64() / self.admissions.len().max(1) as f64;
        let seconds = (per_request * n_waiting as f64).ceil();
        Duration::try_from_secs_f64(seconds).unwrap_or(RETRY_AFTER.1).clamp(RETRY_AFTER.0, RETRY_AFTER.1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clients_come_back_when_the_queue_is_worked_off() {
        let begun = Instant::now();
        let at = |ms| begun + Duration::from_millis(ms);
        let mut pace = Pace::default();
        assert_eq!(pace.retry_after(at(0), 1000), Duration::from_secs(1), "nothing is known");
        pace.begin(at(0));
        assert_eq!(pace.retry_after(at(3000), 4), Duration::from_secs(12), "none in 3 s");
        (1..=10).for_each(|n| pace.admit(at(n * 500)));
        assert_eq!(pace.retry_after(at(5000), 40), Duration::from_secs(20));
        assert_eq!(pace.retry_after(at(5000), 1000), Duration::from_secs(60));
        // Later ones count alone.
        (1..=200).for_each(|n| pace.admit(at(5000 + n * 10)));
        assert_eq!(pace.retry_after(at(7000), 400), Duration::from_secs(4));
        assert_eq!(pace.retry_after(at(7000), 1), Duration::from_secs(1));
    }

    #[test]
    fn what_was_before_the_queue_was_empty_does_not_count() {
        let begun = Instant::now();
        let at = |s| begun + Duration::from_secs(s);
        let gate = Gate::new(2, 100);
        drop(gate.enter(1, at(0)).ok());
        gate.admitted(at(0));
        let _places = [3600, 3601].map(|s| gate.enter(1, at(s)).expect("there is room"));
        gate.admitted(at(3602));
        let refused = gate.enter(1, at(3603)).map(|_| ());
        let want = Duration::from_secs(6);
        assert!(
            matches!(refused, Err(RequestError::Overloaded { retry_after, .. }) if retry_after == want),
            "{refused:?}"
        );
    }

    #[test]
    fn requests_and_prompt_tokens_are_bounded() {
        let (gate, now) = (Gate::new(3, 100), Instant::now());
        let first = gate.enter(60, now).ok();
        let refused = gate.enter(50, now).map(|_| ());
        let is_full = |of| matches!(refused, Err(RequestError::Overloaded { of: o, .. }) if o == of);
        assert!(is_full(Queued::PromptTokens), "{refused:?}");
        let others: Vec<_> = (0..2).map(|_| gate.enter(20, now).ok()).collect();
        assert!(others.iter().all(Option::is_some));
        assert!(matches!(
            gate.enter(1, now),
            Err(RequestError::Overloaded { waiting: 3, limit: 3, of: Queued::Requests, .. })
        ));
        drop((first, others));
        assert!(gate.enter(5000, now).is_ok(), "a long prompt may wait alone");
    }
}
