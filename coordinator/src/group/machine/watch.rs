//! Whether steps come back in time, and who is to blame if not.
//!
//! A step is expected to take as long as steps with about as many rows took. It is overdue after eight times that,
//! but not within a second, and never later than one second beyond twice the expectation.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use super::event::Beat;

/// Longest wait for a step of a kind that was never seen.
const UNKNOWN_LIMIT: Duration = Duration::from_secs(60);
/// Shortest wait for any step.
const LEAST_LIMIT: Duration = Duration::from_secs(1);
/// So many times the expected time, if that is longer.
const TOLERANCE: u32 = 8;
/// Weight of the newest step in the expectation.
const NEWEST: f64 = 0.2;
/// Most doublings of the limits after steps that were overdue.
const MOST_PATIENCE: u32 = 8;
/// Looks in a row at which the same rank kept the others waiting, before it is called slow.
const SLOW_LOOKS: u32 = 40;
/// Steps must take so many times the expectation of better days for a rank to be called slow.
const SLOW_FACTOR: f64 = 3.0;

/// A plan whose results are awaited.
#[derive(Debug, Clone)]
struct InFlight {
    step: u64,
    rows: u32,
    sent: Instant,
    /// By rank.
    done: Vec<bool>,
}

/// What is known of one rank when somebody must be to blame.
#[derive(Debug, Clone, Copy)]
pub struct Witness {
    /// Since its last sign of life.
    pub silent: Duration,
    /// What it said then.
    pub beat: Beat,
}

/// The steps of one group, over all its formations.
#[derive(Debug, Clone)]
pub struct StepWatch {
    in_flight: VecDeque<InFlight>,
    /// When the last step was complete.
    completed: Option<Instant>,
    /// Expected seconds of a step by the logarithm of its rows.
    expected: [Option<f64>; 24],
    /// The best that the expectation has been.
    best: [Option<f64>; 24],
    patience: u32,
    /// Who kept the others waiting at so many looks in a row.
    laggard: Option<(usize, u32)>,
}

impl Default for StepWatch {
    fn default() -> Self {
        Self {
            in_flight: VecDeque::new(),
            completed: None,
            expected: [None; 24],
            best: [None; 24],
            patience: 1,
            laggard: None,
        }
    }
}

fn class(rows: u32) -> usize {
    (rows.max(1).ilog2() as usize).min(23)
}

impl StepWatch {
    /// A new formation: nothing is in flight.
    pub fn begin(&mut self) {
        self.in_flight.clear();
        self.completed = None;
        self.laggard = None;
    }

    /// A plan was sent to so many ranks.
    pub fn planned(&mut self, step: u64, rows: u32, world_size: usize, now: Instant) {
        self.in_flight.push_back(InFlight { step, rows, sent: now, done: vec![false; world_size] });
    }

    /// A rank finished a step.
    pub fn stepped(&mut self, rank: usize, step: u64, now: Instant) {
        if let Some(flight) = self.in_flight.iter_mut().find(|f| f.step == step)
            && let Some(done) = flight.done.get_mut(rank)
        {
            *done = true;
        }
        while let Some(front) = self.in_flight.front().filter(|f| f.done.iter().all(|d| *d)) {
            let began = self.completed.map_or(front.sent, |c| c.max(front.sent));
            let (rows, took) = (front.rows, now.saturating_duration_since(began).as_secs_f64());
            self.learn(rows, took);
            self.completed = Some(now);
            self.in_flight.pop_front();
        }
    }

    fn learn(&mut self, rows: u32, took: f64) {
        let class = class(rows);
        let expected = &mut self.expected[class];
        let learned = expected.map_or(took, |e| e + NEWEST * (took - e));
        *expected = Some(learned);
        let best = &mut self.best[class];
        *best = Some(best.map_or(learned, |b| b.min(learned)));
    }

    /// Seconds that a step with so many rows takes by the steps of about its size, else by smaller ones in proportion.
    fn expect(&self, rows: u32) -> Option<f64> {
        let class = class(rows);
        let known = (0..=class).rev().find_map(|c| self.expected[c].map(|e| (c, e)));
        known.map(|(c, expected)| expected * f64::from(1u32 << (class - c).min(16)))
    }

    fn limit(&self, rows: u32) -> Duration {
        let limit = match self.expect(rows) {
            Some(expected) => {
                let expected = Duration::from_secs_f64(expected.clamp(0.0, UNKNOWN_LIMIT.as_secs_f64()));
                (TOLERANCE * expected).max(LEAST_LIMIT).min(2 * expected + Duration::from_secs(1))
            }
            None => UNKNOWN_LIMIT,
        };
        limit * self.patience
    }

    /// When the oldest step in flight is overdue.
    pub fn due(&self) -> Option<Instant> {
        let front = self.in_flight.front()?;
        let began = self.completed.map_or(front.sent, |c| c.max(front.sent));
        Some(began + self.limit(front.rows))
    }

    /// Whether a step is in flight.
    pub fn is_busy(&self) -> bool {
        !self.in_flight.is_empty()
    }

    /// The step that is overdue, and the ranks that are to blame; all are if nobody in particular is. A rank without a
    /// sign of life for `silent_after` counts as silent.
    pub fn blame(&mut self, witnesses: &[Witness], silent_after: Duration) -> Option<(u64, Vec<usize>)> {
        let front = self.in_flight.front()?;
        self.patience = (self.patience * 2).min(MOST_PATIENCE);
        Some((front.step, guilty(&front.done, witnesses, silent_after)))
    }

    /// The group has been healthy for a while: limits as usual.
    pub fn calm(&mut self) {
        self.patience = 1;
    }

    /// A look at who waits for whom. Says which rank has kept the others waiting for long, if steps suffer from it.
    pub fn look(&mut self, witnesses: &[Witness]) -> Option<usize> {
        let front = self.in_flight.front()?;
        let waiting = |w: &Witness| w.beat.waits_for.is_some();
        let mut working = (0..witnesses.len()).filter(|r| !waiting(&witnesses[*r]));
        let laggard = match (working.next(), working.next()) {
            (Some(rank), None) if witnesses.len() > 1 => rank,
            _ => {
                // One look in between does not clear a rank, many do.
                self.laggard = self.laggard.map(|(rank, looks)| (rank, looks.saturating_sub(1)));
                return None;
            }
        };
        let looks = match self.laggard {
            Some((rank, looks)) if rank == laggard => looks + 1,
            Some((rank, looks)) if looks > 1 => {
                self.laggard = Some((rank, looks - 2));
                return None;
            }
            _ => 1,
        };
        self.laggard = Some((laggard, looks));
        let class = class(front.rows);
        let suffers = match (self.expected[class], self.best[class]) {
            (Some(now), Some(best)) => now > SLOW_FACTOR * best,
            _ => false,
        };
        (looks >= SLOW_LOOKS && suffers).then_some(laggard)
    }
}

fn guilty(done: &[bool], witnesses: &[Witness], silent_after: Duration) -> Vec<usize> {
    let ranks = || 0..done.len().min(witnesses.len());
    let some_but_not_all = |found: Vec<usize>| (!found.is_empty() && found.len() < done.len()).then_some(found);
    let silent = ranks().filter(|r| witnesses[*r].silent > silent_after).collect();
    let unfinished: Vec<usize> = ranks().filter(|r| !done[*r]).collect();
    let waits_for_nobody = unfinished.iter().copied().filter(|r| witnesses[*r].beat.waits_for.is_none()).collect();
    some_but_not_all(silent)
        .or_else(|| some_but_not_all(waits_for_nobody))
        .or_else(|| some_but_not_all(unfinished))
        .unwrap_or_else(|| ranks().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);
    const SILENT: Duration = Duration::from_millis(400);

    fn alive(waits_for: Option<usize>) -> Witness {
        Witness { silent: 20 * MS, beat: Beat { waits_for, ..Beat::default() } }
    }

    fn silent(waits_for: Option<usize>) -> Witness {
        Witness { silent: 900 * MS, ..alive(waits_for) }
    }

    /// Runs one step of two ranks; returns its end.
    fn run(watch: &mut StepWatch, step: u64, rows: u32, start: Instant, took: Duration) -> Instant {
        watch.planned(step, rows, 2, start);
        watch.stepped(0, step, start + took);
        assert!(watch.is_busy(), "the other rank has not finished");
        watch.stepped(1, step, start + took);
        assert!(!watch.is_busy());
        start + took
    }

    #[test]
    fn limits_follow_what_steps_took() {
        let mut watch = StepWatch::default();
        let start = Instant::now();
        watch.planned(1, 16, 2, start);
        assert_eq!(watch.due(), Some(start + UNKNOWN_LIMIT));
        watch.begin();
        let end = run(&mut watch, 1, 16, start, 10 * MS);
        watch.planned(2, 16, 2, end);
        let wait = |watch: &StepWatch, since: Instant| watch.due().unwrap() - since;
        assert!((1000 * MS..1021 * MS).contains(&wait(&watch, end)), "{:?}", wait(&watch, end));
        watch.begin();
        watch.planned(3, 2048, 2, end);
        // 128 times the rows: 1.28 s, at most one second beyond twice that.
        assert!((3500 * MS..3600 * MS).contains(&wait(&watch, end)), "{:?}", wait(&watch, end));
    }

    #[test]
    fn a_step_that_waits_behind_another_has_its_time_from_then_on() {
        let mut watch = StepWatch::default();
        let start = Instant::now();
        let start = run(&mut watch, 1, 1, start, 10 * MS);
        watch.planned(2, 1, 2, start);
        watch.planned(3, 1, 2, start);
        let first = watch.due().unwrap();
        watch.stepped(0, 2, start + 900 * MS);
        watch.stepped(1, 2, start + 900 * MS);
        assert!(watch.due().unwrap() >= first + 800 * MS);
    }

    #[test]
    fn each_overdue_step_makes_the_watch_more_patient() {
        let mut watch = StepWatch::default();
        let start = run(&mut watch, 1, 1, Instant::now(), 10 * MS);
        watch.planned(2, 1, 2, start);
        let before = watch.due().unwrap() - start;
        assert_eq!(watch.blame(&[alive(None), alive(None)], SILENT), Some((2, vec![0, 1])));
        assert_eq!(watch.due().unwrap() - start, 2 * before);
        watch.calm();
        assert_eq!(watch.due().unwrap() - start, before);
    }

    #[test]
    fn who_is_silent_or_waits_for_nobody_is_to_blame() {
        let none = [false, false, false];
        assert_eq!(guilty(&none, &[alive(Some(1)), silent(None), alive(Some(1))], SILENT), [1]);
        assert_eq!(guilty(&none, &[alive(Some(1)), alive(None), alive(Some(1))], SILENT), [1]);
        assert_eq!(guilty(&[true, false, true], &[alive(None), alive(None), alive(None)], SILENT), [1]);
        assert_eq!(guilty(&none, &[alive(Some(1)), alive(Some(2)), alive(Some(0))], SILENT), [0, 1, 2]);
        assert_eq!(guilty(&none, &[silent(None), silent(None), silent(None)], SILENT), [0, 1, 2]);
    }

    #[test]
    fn a_rank_that_keeps_the_others_waiting_is_slow_only_if_steps_suffer() {
        let mut watch = StepWatch::default();
        let mut at = Instant::now();
        let look = [alive(Some(1)), alive(None)];
        let slow = |watch: &mut StepWatch, at: Instant, step: u64| {
            watch.planned(step, 1, 2, at);
            let found = (0..2 * SLOW_LOOKS).find_map(|_| watch.look(&look));
            watch.begin();
            found
        };
        for step in 1..50 {
            at = run(&mut watch, step, 1, at, 10 * MS);
        }
        assert_eq!(slow(&mut watch, at, 50), None, "steps are as fast as ever");
        for step in 51..100 {
            at = run(&mut watch, step, 1, at, 100 * MS);
        }
        assert_eq!(slow(&mut watch, at, 100), Some(1));
        let turns = [alive(None), alive(Some(0))];
        watch.planned(101, 1, 2, at);
        assert!((0..1000).all(|n| watch.look(if n % 2 == 0 { &look } else { &turns }).is_none()), "they take turns");
    }
}
