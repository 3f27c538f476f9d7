//! A group's metrics. Gauges end with the group's actor.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use metrics::{Counter, Histogram};
use phalanx_proto::v1::StepResult;

use super::machine::Cause;
use crate::{
    metrics::{self as names, GroupLabels, Present},
    trace::{self, RankTotal},
};

/// Roles of attached shards, as `GroupMachine::role_of` names them.
const ROLES: [&str; 5] = ["rank", "spare", "joining", "draining", "drained"];
/// Least time over which the use of a device is measured.
const WINDOW: Duration = Duration::from_secs(1);

/// Handles of all of them.
pub struct Meters {
    labels: GroupLabels,
    epoch: Present,
    serving: Present,
    ranks_held: Present,
    ranks_wanted: Present,
    shards: [Present; 5],
    mirror_lag: Present,
    ended: [Counter; Cause::ALL.len()],
    fenced: Counter,
    ranks: Vec<RankMeters>,
}

/// Of one rank, whoever has it.
struct RankMeters {
    compute: Histogram,
    collective: Histogram,
    gauges: Option<RankGauges>,
    /// Who has it, for traces.
    total: Option<Arc<RankTotal>>,
}

struct RankGauges {
    used: Present,
    total: Present,
    utilization: Present,
    since: Instant,
    busy: Duration,
}

/// What a group is at a moment.
pub struct Standing<'a> {
    /// Epoch of its present or last formation.
    pub epoch: u64,
    /// Whether it takes plans.
    pub is_serving: bool,
    /// Ranks that it has.
    pub n_ranks: usize,
    /// Ranks that it was asked to have.
    pub n_wanted: usize,
    /// What each attached shard is there for.
    pub roles: &'a [&'static str],
}

impl Meters {
    /// Makes them for a group of so many ranks: all are there from now on, with nothing counted.
    pub fn new(labels: &GroupLabels, n_ranks: usize) -> Self {
        let present = |name| Present::new(name, labels.own.clone());
        let ended =
            |cause: Cause| metrics::counter!(names::FAILOVERS, labels.with([("cause", cause.name().to_owned())]));
        let mut meters = Self {
            labels: labels.clone(),
            epoch: present(names::EPOCH),
            serving: present(names::GROUP_SERVING),
            ranks_held: present(names::RANKS),
            ranks_wanted: present(names::RANKS_WANTED),
            shards: ROLES.map(|role| Present::new(names::SHARDS, labels.with([("role", role.to_owned())]))),
            mirror_lag: Present::or(f64::NAN, names::MIRROR_LAG, labels.own.clone()),
            ended: Cause::ALL.map(ended),
            fenced: metrics::counter!(names::FENCED),
            ranks: Vec::new(),
        };
        for rank in 0..n_ranks {
            let now = Instant::now();
            meters.gauges(rank, now);
            meters.vacate(rank);
        }
        meters
    }

    /// Shows how many steps the mirrors are behind; `None` while nobody has a whole copy.
    pub fn mirror_lag(&self, steps: Option<u64>) {
        self.mirror_lag.set(steps.map_or(f64::NAN, |steps| steps as f64));
    }

    /// Counts a formation that has ended.
    pub fn ended(&self, cause: Cause) {
        self.ended[cause as usize].increment(1);
    }

    /// Counts a message of an old epoch.
    pub fn fenced(&self) {
        self.fenced.increment(1);
    }

    /// Shows what the group is.
    pub fn show(&self, standing: &Standing<'_>) {
        self.epoch.set(standing.epoch as f64);
        self.serving.set(f64::from(u8::from(standing.is_serving)));
        self.ranks_held.set(standing.n_ranks as f64);
        self.ranks_wanted.set(standing.n_wanted as f64);
        for (role, shards) in ROLES.iter().zip(&self.shards) {
            shards.set(standing.roles.iter().filter(|r| *r == role).count() as f64);
        }
    }

    /// A rank has computed a step.
    pub fn stepped(&mut self, rank: usize, result: &StepResult, now: Instant) {
        let collective = Duration::from_micros(result.collective_us);
        let compute = Duration::from_micros(result.compute_us).saturating_sub(collective);
        self.gauges(rank, now).busy += compute;
        let meters = &self.ranks[rank];
        if let Some(total) = &meters.total {
            total.stepped(compute.as_micros() as u64, result.collective_us);
        }
        meters.compute.record(compute);
        meters.collective.record(collective);
    }

    /// A shard with a rank gave a sign of life: shows its memory, and what it computed lately.
    pub fn alive(&mut self, rank: usize, used_bytes: u64, total_bytes: u64, now: Instant) {
        let gauges = self.gauges(rank, now);
        gauges.used.set(used_bytes as f64);
        gauges.total.set(total_bytes as f64);
        let elapsed = now.saturating_duration_since(gauges.since);
        if elapsed >= WINDOW {
            // A step that took longer than the window is told at its end: the rest of it counts for the next one.
            let busy = gauges.busy.min(elapsed);
            gauges.utilization.set(busy.as_secs_f64() / elapsed.as_secs_f64());
            gauges.busy -= busy;
            gauges.since = now;
        }
    }

    /// A shard has the rank now.
    pub fn take(&mut self, rank: usize, shard: &str) {
        if let Some(tracer) = trace::active() {
            self.gauges(rank, Instant::now());
            self.ranks[rank].total = Some(tracer.ranks().take(self.labels.index, rank, shard));
        }
    }

    /// Nobody has the rank any more.
    pub fn vacate(&mut self, rank: usize) {
        if let Some(meters) = self.ranks.get_mut(rank) {
            meters.gauges = None;
            meters.total = None;
        }
    }

    /// Ranks that were ever seen.
    pub fn n_ranks(&self) -> usize {
        self.ranks.len()
    }

    fn gauges(&mut self, rank: usize, now: Instant) -> &mut RankGauges {
        let labels = &self.labels;
        while self.ranks.len() <= rank {
            let of = self.ranks.len().to_string();
            let phase = |phase: &str| {
                let labels = labels.with([("rank", of.clone()), ("phase", phase.to_owned())]);
                metrics::histogram!(names::STEP_PHASE, labels)
            };
            let (compute, collective) = (phase("compute"), phase("collective"));
            self.ranks.push(RankMeters { compute, collective, gauges: None, total: None });
        }
        self.ranks[rank].gauges.get_or_insert_with(|| {
            let present = |name| Present::new(name, labels.with([("rank", rank.to_string())]));
            RankGauges {
                used: present(names::MEMORY_USED),
                total: present(names::MEMORY_TOTAL),
                utilization: present(names::UTILIZATION),
                since: now,
                busy: Duration::ZERO,
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frontend::prometheus;

    #[test]
    fn a_rank_that_computes_half_of_the_time_is_half_used() {
        let recorder = prometheus::recorder().unwrap().build_recorder();
        let handle = recorder.handle();
        metrics::with_local_recorder(&recorder, || {
            let utilization = || {
                let text = handle.render();
                let line = text.lines().find_map(|l| l.strip_prefix("gpu_utilization{rank=\"1\"} ")).unwrap();
                line.parse::<f64>().unwrap()
            };
            let mut meters = Meters::new(&GroupLabels::default(), 2);
            assert!(handle.render().contains("phalanx_failovers_total{cause=\"drain\"} 0"));
            assert!(handle.render().contains("phalanx_step_phase_seconds_count{rank=\"1\",phase=\"collective\"} 0"));
            let begun = Instant::now();
            meters.alive(1, 10, 20, begun);
            let step = StepResult { compute_us: 700_000, collective_us: 200_000, ..StepResult::default() };
            meters.stepped(1, &step, begun);
            meters.alive(1, 10, 20, begun + WINDOW / 2);
            assert_eq!(utilization(), 0.0, "too early to say");
            meters.alive(1, 10, 20, begun + WINDOW);
            assert_eq!(utilization(), 0.5);
            // Told late: it began in this window already.
            let long = StepResult { compute_us: 1_500_000, ..StepResult::default() };
            meters.stepped(1, &long, begun + WINDOW);
            meters.alive(1, 10, 20, begun + 2 * WINDOW);
            assert_eq!(utilization(), 1.0);
            meters.alive(1, 10, 20, begun + 3 * WINDOW);
            assert_eq!(utilization(), 0.5);
            meters.vacate(1);
            assert_eq!(utilization(), 0.0);
        });
    }
}
