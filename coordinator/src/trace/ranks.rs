//! What ranks have computed, so that a request can be told what they did while it ran.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicU64, Ordering},
    },
};

/// What one shard has computed with one rank.
#[derive(Debug)]
pub struct RankTotal {
    rank: usize,
    shard: String,
    steps: AtomicU64,
    compute_us: AtomicU64,
    collective_us: AtomicU64,
}

impl RankTotal {
    /// It has computed a step.
    pub fn stepped(&self, compute_us: u64, collective_us: u64) {
        self.steps.fetch_add(1, Ordering::Relaxed);
        self.compute_us.fetch_add(compute_us, Ordering::Relaxed);
        self.collective_us.fetch_add(collective_us, Ordering::Relaxed);
    }

    fn read(&self) -> [u64; 3] {
        [&self.steps, &self.compute_us, &self.collective_us].map(|n| n.load(Ordering::Relaxed))
    }
}

/// What a rank did over some time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Work {
    /// Which rank.
    pub rank: usize,
    /// Which shard had it.
    pub shard: String,
    /// Steps that it computed.
    pub steps: u64,
    /// Microseconds of its own work in them.
    pub compute_us: u64,
    /// Microseconds in collectives.
    pub collective_us: u64,
}

/// Totals at a moment.
#[derive(Debug, Clone, Default)]
pub struct Mark(Vec<(Arc<RankTotal>, [u64; 3])>);

/// Who has which rank of which group now.
#[derive(Debug, Default)]
pub struct Ranks(RwLock<BTreeMap<(usize, usize), Arc<RankTotal>>>);

impl Ranks {
    /// A shard takes a rank of a group.
    pub fn take(&self, group: usize, rank: usize, shard: &str) -> Arc<RankTotal> {
        let mut ranks = self.0.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(total) = ranks.get(&(group, rank)).filter(|total| total.shard == shard) {
            return Arc::clone(total);
        }
        let [steps, compute_us, collective_us] = [0; 3].map(AtomicU64::new);
        let total = Arc::new(RankTotal { rank, shard: shard.to_owned(), steps, compute_us, collective_us });
        ranks.insert((group, rank), Arc::clone(&total));
        total
    }

    /// What a group's ranks have computed so far.
    pub fn mark(&self, group: usize) -> Mark {
        let ranks = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let of_group = ranks.range((group, 0)..=(group, usize::MAX));
        Mark(of_group.map(|(_, total)| (Arc::clone(total), total.read())).collect())
    }

    /// What they, and those that have their ranks now, have computed since.
    pub fn since(&self, group: usize, mark: &Mark) -> Vec<Work> {
        let begun = |total: &Arc<RankTotal>| mark.0.iter().find(|(of, _)| Arc::ptr_eq(of, total));
        let newcomers = self.mark(group).0.into_iter().filter(|(total, _)| begun(total).is_none());
        let newcomers = newcomers.map(|(total, _)| (total, [0; 3]));
        let all = mark.0.iter().cloned().chain(newcomers);
        let work = all.map(|(total, before)| {
            let now = total.read();
            let [steps, compute_us, collective_us] = std::array::from_fn(|i| now[i].saturating_sub(before[i]));
            Work { rank: total.rank, shard: total.shard.clone(), steps, compute_us, collective_us }
        });
        work.filter(|work| work.steps > 0).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_is_that_since_the_mark_whoever_has_the_rank() {
        let ranks = Ranks::default();
        let (a, b, other) = (ranks.take(0, 0, "a"), ranks.take(0, 1, "b"), ranks.take(1, 0, "c"));
        a.stepped(10, 1);
        let mark = ranks.mark(0);
        a.stepped(20, 2);
        b.stepped(30, 3);
        other.stepped(40, 4);
        assert!(Arc::ptr_eq(&a, &ranks.take(0, 0, "a")), "it had it already");
        let successor = ranks.take(0, 1, "d");
        successor.stepped(50, 5);
        let work = ranks.since(0, &mark);
        let told: Vec<_> =
            work.iter().map(|w| (w.rank, w.shard.as_str(), w.steps, w.compute_us, w.collective_us)).collect();
        assert_eq!(told, [(0, "a", 1, 20, 2), (1, "b", 1, 30, 3), (1, "d", 1, 50, 5)]);
    }
}
