//! What processes hold, and whether it grows: file descriptors and memory.

use std::{collections::BTreeMap, fs};

/// Descriptors that a process may have more at the end than at the begin: connections come and go.
const DESCRIPTOR_SLACK: f64 = 12.0;
/// Memory that a process may have more: allocators keep what a burst of requests needed, and one burst is larger than another.
const MEMORY_SLACK_KIB: f64 = 12.0 * 1024.0;
/// The same for each round: a leak of a descriptor or of a request's tokens each round is above it.
const DESCRIPTORS_A_ROUND: f64 = 0.3;
/// Memory that a round may leave, after the slack.
const MEMORY_A_ROUND_KIB: f64 = 128.0;
/// Rounds before a process has met everything once.
const WARM_UP: usize = 2;
/// Rounds that say whether something grows.
const ENOUGH: usize = 4;

/// What the processors of this machine have done since it was started, in ticks.
#[derive(Debug, Clone, Copy)]
pub struct Processors {
    all: u64,
    stolen: u64,
}

impl Processors {
    /// Until now; `None` if the system does not say.
    pub fn now() -> Option<Self> {
        Self::of(&fs::read_to_string("/proc/stat").ok()?)
    }

    /// From the first line of proc_stat(5): user, nice, system, idle, iowait, irq, softirq, steal; what follows is in them.
    fn of(stat: &str) -> Option<Self> {
        let numbers = stat.lines().next()?.strip_prefix("cpu ")?.split_whitespace();
        let ticks: Vec<u64> = numbers.take(8).map_while(|ticks| ticks.parse().ok()).collect();
        Some(Self { all: ticks.iter().sum(), stolen: *ticks.get(7)? })
    }

    /// The share of their time since `before` in which the machine's host ran something else there.
    pub fn stolen_since(self, before: Self) -> Option<f64> {
        let all = self.all.checked_sub(before.all).filter(|all| *all > 0)?;
        Some(self.stolen.saturating_sub(before.stolen) as f64 / all as f64)
    }
}

/// What kind of process it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// A coordinator.
    Coordinator,
    /// A shard.
    Shard,
}

impl Role {
    /// For messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::Coordinator => "coordinator",
            Self::Shard => "shard",
        }
    }
}

/// What a process holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Held {
    /// Process id.
    pub pid: u32,
    /// Its kind.
    pub role: Role,
    /// Open file descriptors.
    pub descriptors: usize,
    /// Resident memory, but for large pages where only those that asked for them have any: weights and KV pages, which have a
    /// fixed size and are touched piece by piece.
    pub resident_kib: u64,
}

impl Held {
    /// Of a process; of one that is gone, nothing.
    pub fn of(pid: u32, role: Role) -> Self {
        let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count);
        let memory = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
        let kib = |name: &str| -> u64 {
            let line = memory.lines().find_map(|line| line.strip_prefix(name));
            line.and_then(|line| line.trim().trim_end_matches(" kB").parse().ok()).unwrap_or(0)
        };
        let large = if are_large_pages_asked_for() { kib("AnonHugePages:") } else { 0 };
        Self { pid, role, descriptors, resident_kib: kib("Rss:").saturating_sub(large) }
    }
}

/// Whether nobody has large pages who did not ask for them.
fn are_large_pages_asked_for() -> bool {
    let mode = fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled").unwrap_or_default();
    mode.contains("[madvise]")
}

/// Descriptors and memory of all processes of a kind together.
pub fn total(held: &[Held], role: Role) -> (usize, u64) {
    let of_role = held.iter().filter(|h| h.role == role);
    of_role.fold((0, 0), |(descriptors, kib), h| (descriptors + h.descriptors, kib + h.resident_kib))
}

/// What grows with the rounds in processes that live through several of them.
pub fn leaks(rounds: &[&[Held]]) -> Vec<String> {
    let mut lives: BTreeMap<(u32, Role), Vec<&Held>> = BTreeMap::new();
    for held in rounds.iter().copied().flatten() {
        lives.entry((held.pid, held.role)).or_default().push(held);
    }
    let mut problems = Vec::new();
    for ((pid, role), life) in lives {
        let Some(life) = life.get(WARM_UP..).filter(|life| life.len() >= ENOUGH) else { continue };
        let rounds = life.len() as f64;
        let mut check = |what: &str, values: Vec<f64>, allowed: f64| {
            let grown = growth(&values);
            if grown > allowed {
                let (name, n) = (role.name(), values.len());
                problems.push(format!("{what} of {name} {pid} grew by {grown:.0} in {n} rounds: {values:?}"));
            }
        };
        let descriptors = life.iter().map(|h| h.descriptors as f64).collect();
        check("descriptors", descriptors, DESCRIPTOR_SLACK + DESCRIPTORS_A_ROUND * rounds);
        let memory = life.iter().map(|h| h.resident_kib as f64).collect();
        check("resident KiB", memory, MEMORY_SLACK_KIB + MEMORY_A_ROUND_KIB * rounds);
    }
    problems
}

/// The slope of the line through all values (least squares), over all of them: what one outlier can't make.
fn growth(values: &[f64]) -> f64 {
    let n = values.len() as f64;
    let (mean_x, mean_y) = ((n - 1.0) / 2.0, values.iter().sum::<f64>() / n);
    let points = values.iter().enumerate().map(|(x, y)| (x as f64 - mean_x, y - mean_y));
    let (above, below) = points.fold((0.0, 0.0), |(above, below), (x, y)| (above + x * y, below + x * x));
    if below == 0.0 { 0.0 } else { above / below * (n - 1.0) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rounds(n: usize, of: impl Fn(usize) -> (usize, u64)) -> Vec<Vec<Held>> {
        let held = |round| {
            let (descriptors, resident_kib) = of(round);
            vec![Held { pid: 7, role: Role::Shard, descriptors, resident_kib }]
        };
        (0..n).map(held).collect()
    }

    fn found(rounds: &[Vec<Held>]) -> usize {
        leaks(&rounds.iter().map(Vec::as_slice).collect::<Vec<_>>()).len()
    }

    #[test]
    fn stolen_time_is_the_eighth_number() {
        let of = |stat: &str| Processors::of(stat);
        let before = of("cpu  100 20 30 800 5 0 5 40 7 7\ncpu0 1 2 3\n").unwrap();
        let now = of("cpu  150 20 30 830 5 0 5 60 9 9\n").unwrap();
        assert_eq!(now.stolen_since(before), Some(0.2));
        assert_eq!(before.stolen_since(now), None);
        assert!(of("cpu  1 2 3\n").is_none() && of("").is_none());
    }

    #[test]
    fn what_grows_with_every_round_is_a_leak_and_what_settles_is_none() {
        assert_eq!(found(&rounds(50, |_| (20, 30 << 10))), 0);
        assert_eq!(found(&rounds(50, |round| (20 + round, 30 << 10))), 1, "a descriptor each round");
        assert_eq!(found(&rounds(50, |round| (20, (30 << 10) + 500 * round as u64))), 1, "half a MiB each round");
        assert_eq!(
            found(&rounds(50, |round| (20 + 8 * usize::from(round % 7 == 3), 40 << 10))),
            0,
            "connections come and go"
        );
        assert_eq!(found(&rounds(50, |round| (20, if round < 2 { 10 << 10 } else { 40 << 10 }))), 0, "a warm-up");
        assert_eq!(found(&rounds(5, |round| (20 + 9 * round, 30 << 10))), 0, "too few rounds to say");
    }
}
