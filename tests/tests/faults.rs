//! The short fault matrix: one fault a row under sixteen streams, each compared token by token with its fault-free self.
//!
//! The full matrix, and how to replay a seed: `tests/faults/README.md`.

use phalanx_tests::faults::{
    lab::{Options, run},
    report, rows,
};

/// Replays a run: `FAULT_SEED=N cargo test -p phalanx-tests --test faults`.
fn seed() -> u64 {
    std::env::var("FAULT_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(1)
}

#[test]
fn no_fault_of_the_short_matrix_changes_a_token() {
    let options = Options { seed: seed(), rounds: 1, full: false, verbose: false };
    println!("FAULT_SEED={}\n{}", options.seed, report::HEADING);
    let mut bad = Vec::new();
    for row in rows::all().into_iter().filter(|row| row.short) {
        if let Some(why) = row.obstacle() {
            println!("{}: skipped, {why}", row.name);
            continue;
        }
        let report = run(row, &options);
        println!("{}", report::markdown(&report));
        if !report.is_good() {
            let problems = report.problems.iter().chain(report.outcomes.iter().flat_map(|o| &o.problems));
            bad.push(format!("{}: {:?}", row.name, problems.collect::<Vec<_>>()));
        }
    }
    assert!(bad.is_empty(), "seed {}:\n{}", options.seed, bad.join("\n"));
}
