//! Outcomes as text.

use std::{fmt::Write as _, time::Duration};

use serde_json::{Value, json};

use super::{
    lab::{Outcome, Report},
    resources::{Role, total},
};

/// One line about a round.
pub fn line(row: &str, index: usize, outcome: &Outcome) -> String {
    let detection = outcome.detection.map_or("-".to_owned(), |d| format!("{} ms", d.as_millis()));
    let stolen =
        outcome.stolen.map_or(String::new(), |share| format!(", {:.1} % of it stolen by the host", 100.0 * share));
    let (coordinators, shards) = (total(&outcome.held, Role::Coordinator), total(&outcome.held, Role::Shard));
    let mut text = format!(
        "{row} round {index}: {} requests, {} lost, {:?}, detected after {detection}, first token again after {} ms, longest stall {} ms, \
         last first token {} ms, {} replayed tokens; coordinators hold {} descriptors, {} KiB; shards {}, {} KiB; {:.1} s{stolen}",
        outcome.requests,
        outcome.lost,
        outcome.difference,
        outcome.resumed.as_millis(),
        outcome.stall.as_millis(),
        outcome.first_token.as_millis(),
        outcome.replayed,
        coordinators.0,
        coordinators.1,
        shards.0,
        shards.1,
        outcome.took.as_secs_f64(),
    );
    for problem in &outcome.problems {
        let _infallible = write!(text, "\n    PROBLEM: {problem}");
    }
    text
}

/// Heading of the matrix.
pub const HEADING: &str = "\
| row | fault | model | rounds | requests | lost | duplicated / missing | different | detection ms p50 / max | \
longest stall ms p50 / p99 (fault-free) | descriptors, MiB: first → last round, coordinators; shards | seed |
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
    let held = |role| {
        let of = |outcome: Option<&Outcome>| {
            outcome.map_or("-".to_owned(), |o| {
                let (descriptors, kib) = total(&o.held, role);
                format!("{descriptors}, {}", kib >> 10)
            })
        };
        format!("{} → {}", of(outcomes.first()), of(outcomes.last()))
    };
    format!(
        "| `{}` | {} | {} | {} | {requests} | {lost} | {} / {} | {} | {detection} | {} / {} ({}) | {}; {} | {} |",
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
        held(Role::Coordinator),
        held(Role::Shard),
        report.seed,
    )
}

/// A report with all that was measured, for programs.
pub fn json(report: &Report) -> Value {
    let ms = |time: Duration| time.as_secs_f64() * 1000.0;
    let outcome = |o: &Outcome| {
        let held = o.held.iter().map(|h| {
            json!({"pid": h.pid, "role": h.role.name(), "descriptors": h.descriptors, "resident_kib": h.resident_kib})
        });
        json!({
            "requests": o.requests,
            "lost": o.lost,
            "duplicated": o.difference.duplicated,
            "missing": o.difference.missing,
            "different": o.difference.different,
            "detection_ms": o.detection.map(ms),
            "resumed_ms": ms(o.resumed),
            "stall_ms": ms(o.stall),
            "first_token_ms": ms(o.first_token),
            "replayed_tokens": o.replayed,
            "held": held.collect::<Vec<_>>(),
            "took_ms": ms(o.took),
            "stolen": o.stolen,
            "problems": o.problems,
        })
    };
    json!({
        "row": report.row,
        "fault": report.fault,
        "model": report.model,
        "seed": report.seed,
        "fault_free_gap_ms": ms(report.quiet_gap),
        "fault_free_first_token_ms": ms(report.quiet_first_token),
        "rounds": report.outcomes.iter().map(outcome).collect::<Vec<_>>(),
        "problems": report.problems,
        "took_ms": ms(report.took),
    })
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
