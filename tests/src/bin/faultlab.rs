//! The full fault matrix: `cargo run -p phalanx-tests --bin faultlab -- --help`.

use std::{process::ExitCode, time::SystemTime};

use clap::Parser;
use phalanx_tests::faults::{
    lab::{self, Options},
    report, rows,
};

/// Runs rows of the fault matrix and prints them as a table. Build the programs first: `cargo build --workspace`.
#[derive(Debug, Parser)]
struct Flags {
    /// Rows to run; all if none is named
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    row: Vec<String>,
    /// Rounds of each row
    #[arg(long, default_value_t = 20)]
    rounds: usize,
    /// Decides requests and moments; drawn and printed if it is not given
    #[arg(long, env = "FAULT_SEED")]
    seed: Option<u64>,
    /// Only the rows of the short matrix
    #[arg(long)]
    short: bool,
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
    let mut chosen = Vec::new();
    for name in &flags.row {
        match rows::by_name(name) {
            Some(row) => chosen.push(row),
            None => {
                eprintln!("no row is called {name}; --list prints them");
                return ExitCode::from(2);
            }
        }
    }
    if chosen.is_empty() {
        chosen = rows::all();
    }
    let drawn = || SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(1, |d| d.as_secs() % 1_000_000);
    let seed = flags.seed.unwrap_or_else(drawn);
    let options = Options { seed, rounds: flags.rounds, full: !flags.short, verbose: flags.verbose };
    println!("seed {seed}");
    println!("{}", report::HEADING);
    let mut good = true;
    for row in chosen.into_iter().filter(|row| row.short || !flags.short) {
        if let Some(why) = row.obstacle() {
            eprintln!("{}: skipped, {why}", row.name);
            continue;
        }
        let report = lab::run(row, &options);
        println!("{}", report::markdown(&report));
        for problem in &report.problems {
            eprintln!("{}: PROBLEM: {problem}", row.name);
        }
        good &= report.is_good();
    }
    if good { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
