//! Shows whether the asynchronous runtime still runs: a task on it that does nothing but count.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

/// Time between two songs.
const INTERVAL: Duration = Duration::from_millis(100);

/// Counts while the runtime lives. Cloning shares it.
#[derive(Debug, Clone, Default)]
pub struct Canary(Arc<AtomicU64>);

impl Canary {
    /// Sings for ever; to be run on the runtime that is watched.
    pub async fn sing(self) -> ! {
        loop {
            self.0.fetch_add(1, Ordering::Relaxed);
            tokio::time::sleep(INTERVAL).await;
        }
    }

    /// How often it sang.
    pub fn songs(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Notices when a canary falls silent. Pure.
#[derive(Debug, Clone)]
pub struct Watchdog {
    songs: u64,
    /// Time since the last song in which the watchdog itself was awake.
    silent: Duration,
    looked: Instant,
}

/// Time between two looks that counts at most. When it was longer the whole process did not run.
const LONGEST_LOOK: Duration = Duration::from_secs(2);

impl Watchdog {
    /// Of a canary that sang so often.
    pub fn new(songs: u64, now: Instant) -> Self {
        Self { songs, silent: Duration::ZERO, looked: now }
    }

    /// How long the canary has been silent; `None` if it sang since the last look, or never: then nobody runs it.
    ///
    /// Time in which the process was stopped counts little: the canary could not sing in it.
    pub fn look(&mut self, songs: u64, now: Instant) -> Option<Duration> {
        let since = now.saturating_duration_since(self.looked).min(LONGEST_LOOK);
        self.looked = now;
        if songs == 0 || songs != self.songs {
            (self.songs, self.silent) = (songs, Duration::ZERO);
            return None;
        }
        self.silent += since;
        Some(self.silent)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn silence_is_measured_from_the_last_song() {
        let begun = Instant::now();
        let mut watchdog = Watchdog::new(1, begun);
        assert_eq!(watchdog.look(2, begun + SECOND), None);
        assert_eq!(watchdog.look(2, begun + 2 * SECOND), Some(SECOND));
        assert_eq!(watchdog.look(2, begun + 3 * SECOND), Some(2 * SECOND));
        assert_eq!(watchdog.look(3, begun + 4 * SECOND), None);
        assert_eq!(watchdog.look(3, begun + 5 * SECOND), Some(SECOND));
    }

    #[test]
    fn a_stopped_process_has_no_dead_canary() {
        let begun = Instant::now();
        let mut watchdog = Watchdog::new(7, begun);
        assert_eq!(watchdog.look(7, begun + 3600 * SECOND), Some(LONGEST_LOOK));
        assert_eq!(watchdog.look(8, begun + 3601 * SECOND), None);
    }

    #[test]
    fn a_canary_that_was_never_let_out_is_not_missed() {
        let begun = Instant::now();
        let mut watchdog = Watchdog::new(0, begun);
        assert_eq!(watchdog.look(0, begun + 60 * SECOND), None);
    }

    #[tokio::test]
    async fn it_sings_while_the_runtime_runs() {
        let canary = Canary::default();
        let task = tokio::spawn(canary.clone().sing());
        while canary.songs() < 3 {
            tokio::task::yield_now().await;
        }
        task.abort();
    }
}
