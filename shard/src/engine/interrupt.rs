//! Ends what the engine thread is doing, from another thread.

use std::sync::{Arc, Mutex, PoisonError};

use phalanx_kernels::collective::AbortFlag;

/// Counts what commands are valid. Whoever learns that the engine's group is over advances it: the engine then stops
/// loading, its collective ends, and commands of an earlier generation are skipped. Cloning shares it.
#[derive(Debug, Clone, Default)]
pub struct Interrupt(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    generation: u64,
    abort: Option<AbortFlag>,
}

impl Interrupt {
    /// Interrupts what is going on. Returns the generation of commands from now on.
    pub fn advance(&self) -> u64 {
        self.locked(|state| {
            state.generation += 1;
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
        let generation = interrupt.advance();
        assert!(first.is_aborted());
        let second = interrupt.abort_flag(generation);
        assert!(!second.is_aborted());
    }

    #[test]
    fn a_flag_for_a_past_generation_is_raised() {
        let interrupt = Interrupt::default();
        interrupt.advance();
        assert!(interrupt.abort_flag(0).is_aborted());
    }
}
