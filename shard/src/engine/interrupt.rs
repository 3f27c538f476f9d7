//! Ends what the engine thread is doing, from another thread, and notices if that has no effect.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use phalanx_kernels::collective::AbortFlag;

/// Counts what commands are valid. Whoever learns that the engine's group is over advances it: the engine then stops
/// loading, its collective ends, and commands of an earlier generation are skipped. Cloning shares it.
#[derive(Debug, Clone, Default)]
pub struct Interrupt(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    generation: u64,
    abort: Option<AbortFlag>,
    /// Since when the engine has not taken a command of the present generation, if it has not.
    ignored_since: Option<Instant>,
}

impl Interrupt {
    /// Interrupts what is going on. Returns the generation of commands from now on.
    pub fn advance(&self, now: Instant) -> u64 {
        self.locked(|state| {
            state.generation += 1;
            state.ignored_since.get_or_insert(now);
            if let Some(abort) = state.abort.take() {
                abort.abort();
            }
            state.generation
        })
    }

    /// The generation of commands now.
    pub fn generation(&self) -> u64 {
        self.locked(|state| state.generation)
    }

    /// The engine takes a command of this generation.
    pub fn heed(&self, generation: u64, now: Instant) {
        self.locked(|state| {
            // Commands of the past are on their way to the present.
            let is_present = state.generation == generation;
            state.ignored_since = state.ignored_since.filter(|_| !is_present).map(|_| now);
        });
    }

    /// How long the engine has been told to stop what it does and has not. Nothing that it does may take long to stop:
    /// after a while it is stuck where no interrupt reaches it.
    pub fn ignored_for(&self, now: Instant) -> Option<Duration> {
        self.locked(|state| state.ignored_since.map(|since| now.saturating_duration_since(since)))
    }

    /// A flag that is raised when `generation` is over (at once if it is).
    pub fn abort_flag(&self, generation: u64) -> AbortFlag {
        let flag = AbortFlag::default();
        self.locked(|state| {
            if state.generation == generation {
                state.abort = Some(flag.clone());
            } else {
                flag.abort();
            }
        });
        flag
    }

    /// The rank that the present collective waits for.
    pub fn waits_for(&self) -> Option<u32> {
        self.locked(|state| state.abort.as_ref().and_then(AbortFlag::waits_for))
    }

    fn locked<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        // Each change is complete in itself, so a panicking thread leaves nothing half done.
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn advancing_aborts_the_current_collective_only() {
        let interrupt = Interrupt::default();
        let first = interrupt.abort_flag(0);
        assert!(!first.is_aborted());
        let generation = interrupt.advance(Instant::now());
        assert!(first.is_aborted());
        let second = interrupt.abort_flag(generation);
        assert!(!second.is_aborted());
    }

    #[test]
    fn a_flag_for_a_past_generation_is_raised() {
        let interrupt = Interrupt::default();
        interrupt.advance(Instant::now());
        assert!(interrupt.abort_flag(0).is_aborted());
    }

    #[test]
    fn an_interrupt_that_is_not_heeded_shows() {
        let (interrupt, start) = (Interrupt::default(), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(interrupt.ignored_for(at(0)), None);
        interrupt.advance(at(1));
        let last = interrupt.advance(at(3));
        assert_eq!(interrupt.ignored_for(at(5)), Some(Duration::from_secs(4)));
        // One of the past says that the engine moves.
        interrupt.heed(last - 1, at(6));
        assert_eq!(interrupt.ignored_for(at(8)), Some(Duration::from_secs(2)));
        interrupt.heed(last, at(9));
        assert_eq!(interrupt.ignored_for(at(20)), None);
        interrupt.heed(last, at(21));
        assert_eq!(interrupt.ignored_for(at(22)), None);
    }
}
