//! Outcomes as text.

use std::{fmt::Write as _, time::Duration};

use super::lab::{Outcome, Report};

/// One line about a round.
pub fn line(row: &str, index: usize, outcome: &Outcome) -> String {
    let detection = outcome.detection.map_or("-".to_owned(), |d| format!("{} ms", d.as_millis()));
    let mut text = format!(
        "{row} round {index}: {} requests, {} lost, {:?}, detected after {detection}, first token again after {} ms, longest stall {} ms, \
         last first token {} ms, {} replayed tokens, {} descriptors, {} KiB",
        outcome.requests,
        outcome.lost,
        outcome.difference,
        outcome.resumed.as_millis(),
        outcome.stall.as_millis(),
        outcome.first_token.as_millis(),
        outcome.replayed,
        outcome.resources.descriptors,
        outcome.resources.resident_kib,
    );
    for problem in &outcome.problems {
        let _infallible = write!(text, "\n    PROBLEM: {problem}");
    }
    text
}

/// Heading of the matrix.
pub const HEADING: &str = "\
| row | fault | model | rounds | requests | lost | duplicated / missing | different | detection ms p50 / max | \
longest stall ms p50 / p99 (fault-free) | descriptors, MiB: first → last | seed |
|---|---|---|---|---|---|---|---|---|---|---|---|";

/// A row of the matrix.
pub fn markdown(report: &Report) -> String {
    let outcomes = &report.outcomes;
    let requests: usize = outcomes.iter().map(|o| o.requests).sum();
    let lost: usize = outcomes.iter().map(|o| o.lost).sum();
    let sum = outcomes.iter().fold(super::compare::Difference::default(), |sum, o| sum.plus(o.difference));
    let detections: Vec<_> = outcomes.iter().filter_map(|o| o.detection).collect();
    let stalls: Vec<_> = outcomes.iter().map(|o| o.stall).collect();
    let detection = if detections.is_empty() {
        "-".to_owned()
    } else {
        format!("{} / {}", quantile(&detections, 50), quantile(&detections, 100))
    };
    let held = |outcome: Option<&Outcome>| {
        outcome.map_or("-".to_owned(), |o| format!("{}, {}", o.resources.descriptors, o.resources.resident_kib >> 10))
    };
    format!(
        "| `{}` | {} | {} | {} | {requests} | {lost} | {} / {} | {} | {detection} | {} / {} ({}) | {} → {} | {} |",
        report.row,
        report.fault,
        report.model,
        outcomes.len(),
        sum.duplicated,
        sum.missing,
        sum.different,
        quantile(&stalls, 50),
        quantile(&stalls, 99),
        report.quiet_gap.as_millis(),
        held(outcomes.first()),
        held(outcomes.last()),
        report.seed,
    )
}

/// The least value that `percent` of all do not exceed, in milliseconds.
pub fn quantile(values: &[Duration], percent: usize) -> u128 {
    let mut sorted = values.to_vec();
    sorted.sort_unstable();
    let index = (sorted.len() * percent).div_ceil(100).saturating_sub(1);
    sorted.get(index).map_or(0, Duration::as_millis)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_values_that_were_measured() {
        let values: Vec<_> = (1..=20).map(Duration::from_millis).collect();
        assert_eq!(quantile(&values, 50), 10);
        assert_eq!(quantile(&values, 99), 20);
        assert_eq!(quantile(&values[..1], 50), 1);
        assert_eq!(quantile(&[], 50), 0);
    }
}
