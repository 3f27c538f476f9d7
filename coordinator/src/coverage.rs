//! How far plans have come with a sequence, step by step.
//!
//! When a group is lost its pages may survive up to some step, which can be earlier than the last plan and even earlier
//! than the last result. This remembers what the pages hold after any step, at the cost of a few numbers: while a sequence
//! gets one position in each step, all those steps are one run.

/// Positions `..end` are computed after `step`, `..end + 1` after `step + 1`, and so on for `n_steps` steps.
#[derive(Debug, Clone, Copy)]
struct Run {
    step: u64,
    end: usize,
    n_steps: u64,
}

/// What the pages of a seat hold after each step of an epoch.
#[derive(Debug, Clone, Default)]
pub struct Coverage {
    runs: Vec<Run>,
}

impl Coverage {
    /// `end` positions are there before the first step.
    pub fn from_start(end: usize) -> Self {
        Self { runs: vec![Run { step: 0, end, n_steps: 1 }] }
    }

    /// A plan computes positions up to `end`. Steps and ends grow.
    pub fn extend(&mut self, step: u64, end: usize) {
        match self.runs.last_mut() {
            Some(run) if run.step + run.n_steps == step && run.end as u64 + run.n_steps == end as u64 => {
                run.n_steps += 1;
            }
            _ => self.runs.push(Run { step, end, n_steps: 1 }),
        }
    }

    /// Positions that are computed after `step`; `None` if the seat is younger.
    pub fn through(&self, step: u64) -> Option<usize> {
        let idx = self.runs.partition_point(|run| run.step <= step).checked_sub(1)?;
        let run = self.runs[idx];
        let n_more = (step - run.step).min(run.n_steps - 1);
        // At most as many as there are positions.
        Some(run.end + n_more as usize)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn nothing_is_there_before_the_first_step() {
        let mut coverage = Coverage::default();
        assert_eq!(coverage.through(u64::MAX), None);
        coverage.extend(7, 100);
        assert_eq!((coverage.through(6), coverage.through(7), coverage.through(99)), (None, Some(100), Some(100)));
        assert_eq!(Coverage::from_start(12).through(0), Some(12));
    }

    #[test]
    fn a_long_answer_is_one_run() {
        let mut coverage = Coverage::default();
        coverage.extend(1, 500);
        (2..5000).for_each(|step| coverage.extend(step, 499 + step as usize));
        assert_eq!(coverage.runs.len(), 1);
        assert_eq!(coverage.through(1234), Some(499 + 1234));
    }

    proptest! {
        #[test]
        fn every_step_is_remembered(plans in prop::collection::vec((1_u64..4, 1_usize..4), 1..60)) {
            let (mut coverage, mut after) = (Coverage::default(), Vec::new());
            let (mut step, mut end) = (0, 0);
            for (steps, positions) in plans {
                after.extend((1..steps).map(|_| if end == 0 { None } else { Some(end) }));
                (step, end) = (step + steps, end + positions);
                coverage.extend(step, end);
                after.push(Some(end));
            }
            for (step, want) in (1..).zip(after) {
                prop_assert_eq!(coverage.through(step), want);
            }
        }
    }
}
