//! What the engine is doing, for the heartbeat.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

/// The step under way. Cloning shares it.
#[derive(Debug, Clone, Default)]
pub struct Vitals(Arc<Mutex<Option<Busy>>>);

/// A step that is being computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Busy {
    /// Its epoch.
    pub epoch: u64,
    /// Its number.
    pub step: u64,
    /// When it began.
    pub since: Instant,
}

impl Busy {
    /// How long it has taken so far.
    pub fn lasts(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.since)
    }
}

impl Vitals {
    /// A step begins; it ends when the answer is dropped.
    pub fn begin(&self, epoch: u64, step: u64, now: Instant) -> Underway<'_> {
        self.set(Some(Busy { epoch, step, since: now }));
        Underway(self)
    }

    /// The step under way.
    pub fn busy(&self) -> Option<Busy> {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, busy: Option<Busy>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = busy;
    }
}

/// A step under way; see [`Vitals::begin`].
pub struct Underway<'a>(&'a Vitals);

impl Drop for Underway<'_> {
    fn drop(&mut self) {
        self.0.set(None);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_is_busy_until_it_ends() {
        let (vitals, begun) = (Vitals::default(), Instant::now());
        let underway = vitals.begin(3, 8, begun);
        let busy = vitals.clone().busy().expect("a step is under way");
        assert_eq!((busy.epoch, busy.step), (3, 8));
        assert_eq!(busy.lasts(begun + Duration::from_millis(5)), Duration::from_millis(5));
        drop(underway);
        assert_eq!(vitals.busy(), None);
    }
}
