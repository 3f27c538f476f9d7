//! The full fault matrix: `cargo run -p phalanx-tests --bin faultlab -- --help`.

use std::{
    fs,
    path::PathBuf,
    process::ExitCode,
    time::{Instant, SystemTime},
};

use clap::Parser;
use phalanx_tests::faults::{
    lab::{self, Options},
    report,
    rows::{self, Row},
};

/// Runs rows of the fault matrix and prints them as a table. Build the programs first: `cargo build --workspace`.
#[derive(Debug, Parser)]
struct Flags {
    /// Rows to run; all if none is named
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    row: Vec<String>,
    /// Rows to leave out
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    skip: Vec<String>,
    /// Rounds of each row
    #[arg(long, default_value_t = 20)]
    rounds: usize,
    /// Decides requests and moments; drawn and printed if it is not given
    #[arg(long, env = "FAULT_SEED")]
    seed: Option<u64>,
    /// Only the rows of the short matrix, and no long rounds
    #[arg(long)]
    short: bool,
    /// Write all that was measured, round by round, as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Print the logs of good rounds too
    #[arg(long)]
    verbose: bool,
    /// Print the names of all rows, and end
    #[arg(long)]
    list: bool,
}

fn main() -> ExitCode {
    let flags = Flags::parse();
    if flags.list {
        for row in rows::all() {
            println!("{:32} {}", row.name, row.fault);
        }
        return ExitCode::SUCCESS;
    }
    if let Some(name) = flags.row.iter().chain(&flags.skip).find(|name| rows::by_name(name).is_none()) {
        eprintln!("no row is called {name}; --list prints them");
        return ExitCode::from(2);
    }
    let is_chosen = |row: &&Row| {
        let is_named = flags.row.iter().any(|name| name == row.name);
        let is_due = flags.row.is_empty() && (row.short || !flags.short);
        (is_named || is_due) && !flags.skip.iter().any(|name| name == row.name)
    };
    let drawn = || SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(1, |d| d.as_secs() % 1_000_000);
    let seed = flags.seed.unwrap_or_else(drawn);
    let options = Options { seed, rounds: flags.rounds, full: !flags.short, verbose: flags.verbose };
    println!("seed {seed}");
    println!("{}", report::HEADING);
    let began = Instant::now();
    let mut good = true;
    let mut reports = Vec::new();
    // In the order of the matrix, whatever the order on the command line.
    for row in rows::all().into_iter().filter(is_chosen) {
        if let Some(why) = row.obstacle() {
            eprintln!("{}: skipped, {why}", row.name);
            continue;
        }
        let report = lab::run(row, &options);
        println!("{}", report::markdown(&report));
        for problem in &report.problems {
            eprintln!("{}: PROBLEM: {problem}", row.name);
        }
        eprintln!("{}: {:.1} s, {:.1} s in all", row.name, report.took.as_secs_f64(), began.elapsed().as_secs_f64());
        good &= report.is_good();
        reports.push(report::json(&report));
        // After each row: whatever ends the run, what was measured stays.
        if let Some(path) = &flags.json
            && let Err(error) = fs::write(path, format!("{:#}\n", serde_json::Value::from(reports.clone())))
        {
            eprintln!("--json {}: {error}", path.display());
            return ExitCode::FAILURE;
        }
    }
    if good { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
