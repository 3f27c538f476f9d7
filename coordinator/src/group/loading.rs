//! How far this process is with starting: what its ranks have loaded, and whether it ever served.

use std::{
    collections::BTreeMap,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

/// What a rank of a group has loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RankLoading {
    /// Which group.
    pub group: usize,
    /// Which rank.
    pub rank: usize,
    /// Bytes of its slice that are there.
    pub loaded_bytes: u64,
    /// Bytes of its slice; 0 until it has said so.
    pub total_bytes: u64,
}

/// What groups say of their loading. Lives as long as the process.
#[derive(Debug, Default)]
pub struct Loading {
    ranks: Mutex<BTreeMap<(usize, usize), (u64, u64)>>,
    has_served: AtomicBool,
}

impl Loading {
    /// A group is being formed of so many ranks.
    pub fn begin(&self, group: usize, n_ranks: usize) {
        let mut ranks = self.lock();
        ranks.retain(|(of, _), _| *of != group);
        ranks.extend((0..n_ranks).map(|rank| ((group, rank), (0, 0))));
    }

    /// A rank has loaded more.
    pub fn update(&self, group: usize, rank: usize, loaded_bytes: u64, total_bytes: u64) {
        if let Some(state) = self.lock().get_mut(&(group, rank)) {
            *state = (loaded_bytes.min(total_bytes), total_bytes);
        }
    }

    /// A group serves.
    pub fn serves(&self) {
        self.has_served.store(true, Ordering::Relaxed);
    }

    /// Whether any group ever served.
    pub fn has_served(&self) -> bool {
        self.has_served.load(Ordering::Relaxed)
    }

    /// All ranks that are known, in order.
    pub fn ranks(&self) -> Vec<RankLoading> {
        let rank = |((group, rank), (loaded_bytes, total_bytes)): (&(usize, usize), &(u64, u64))| RankLoading {
            group: *group,
            rank: *rank,
            loaded_bytes: *loaded_bytes,
            total_bytes: *total_bytes,
        };
        self.lock().iter().map(rank).collect()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<(usize, usize), (u64, u64)>> {
        self.ranks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
