//! Keeps ranks of one host from sharing a processor.
//!
//! Two ranks on one processor run in turn: each waits, asleep, while the other computes. To the kernel that looks like
//! one busy thread, so it sees nothing to balance, and where any other thread of whatever priority has the second
//! processor it leaves them together for hundreds of ms, at half their speed. They know better: a rank that goes to
//! sleep for a peer on its own processor moves away.

use std::time::{Duration, Instant};

use rustix::thread::{CpuSet, sched_getaffinity, sched_getcpu, sched_setaffinity};

/// How often a rank moves at most: where others compute too, there may be no better place.
const MOVE_EVERY: Duration = Duration::from_millis(5);

/// Where a rank's thread runs.
pub(super) struct Placement {
    /// Whether there is a processor for every rank.
    has_room: bool,
    moved_at: Option<Instant>,
}

impl Placement {
    pub fn new(world_size: usize, n_cores: usize) -> Self {
        Self { has_room: world_size <= n_cores, moved_at: None }
    }

    /// The processor that the calling thread runs on.
    pub fn here() -> u32 {
        u32::try_from(sched_getcpu()).unwrap_or(u32::MAX)
    }

    /// Moves the calling thread away if the peer that it is about to sleep for was last on the same processor.
    pub fn part_from(&mut self, peer: u32) {
        if !self.has_room || peer != Self::here() || self.moved_at.is_some_and(|at| at.elapsed() < MOVE_EVERY) {
            return;
        }
        self.moved_at = Some(Instant::now());
        let Ok(allowed) = sched_getaffinity(None) else { return };
        if let Some(others) = without(&allowed, peer as usize)
            // The kernel moves a thread at once that may not stay where it is.
            && sched_setaffinity(None, &others).is_ok()
        {
            // What was allowed a moment ago.
            let _restored = sched_setaffinity(None, &allowed);
        }
    }
}

/// The processors but one, if any are left.
fn without(allowed: &CpuSet, processor: usize) -> Option<CpuSet> {
    if processor >= CpuSet::MAX_CPU {
        return None;
    }
    let mut others = *allowed;
    others.unset(processor);
    (others.count() > 0).then_some(others)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(processors: &[usize]) -> CpuSet {
        let mut set = CpuSet::new();
        processors.iter().for_each(|processor| set.set(*processor));
        set
    }

    #[test]
    fn there_must_be_another_processor() {
        assert_eq!(without(&set(&[0, 3]), 3), Some(set(&[0])));
        assert_eq!(without(&set(&[3]), 3), None);
        assert_eq!(without(&set(&[3]), usize::MAX), None);
    }

    #[test]
    fn a_thread_that_moved_may_run_where_it_might_before() {
        let allowed = sched_getaffinity(None).expect("of this thread");
        let mut placement = Placement::new(2, 2);
        for _ in 0..20 {
            placement.moved_at = None;
            placement.part_from(Placement::here());
            assert_eq!(sched_getaffinity(None).expect("of this thread"), allowed);
        }
    }

    #[test]
    fn ranks_stay_where_moving_is_no_use() {
        let mut crowded = Placement::new(3, 2);
        crowded.part_from(Placement::here());
        let mut apart = Placement::new(2, 2);
        apart.part_from(u32::MAX);
        assert!(crowded.moved_at.is_none() && apart.moved_at.is_none());
    }
}
