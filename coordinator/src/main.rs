//! The `coordinator` program, which is the `shard` and the `cluster` program too: this file alone links the shard.

use std::{
    ffi::{OsStr, OsString},
    path::Path,
    process::ExitCode,
};

use phalanx_cluster::manual;
use phalanx_coordinator::{
    batch, certs,
    cluster_cli::{self, CLUSTER},
    config::Flags,
    grammars::trial,
    run, security,
    spawn::SHARD,
};

/// musl's own has one lock for all threads.
#[cfg(target_env = "musl")]
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// A word that, as the first argument, makes the program another one.
struct Entry {
    name: &'static str,
    /// Its command line; `None` for what people don't call.
    spec: Option<fn() -> clap::Command>,
    /// Runs it. The first argument is its name.
    run: fn(Vec<OsString>) -> ExitCode,
}

/// All of them, but for the commands of `cluster`, which are words of their own too.
static ENTRIES: &[Entry] = &[
    Entry { name: SHARD, spec: Some(phalanx_shard::spec), run: |args| phalanx_shard::main_from(args) },
    Entry { name: CLUSTER, spec: Some(cluster_cli::spec), run: |args| cluster_cli::main_from(args) },
    Entry { name: "certs", spec: Some(certs::spec), run: |args| certs::main_from(args) },
    Entry { name: "key", spec: Some(security::cli::spec), run: |args| security::cli::main_from(args) },
    Entry { name: "batch", spec: Some(batch::cli::spec), run: |args| batch::cli::main_from(args) },
    Entry { name: "bench", spec: Some(phalanx_shard::bench::spec), run: |args| phalanx_shard::bench::main_from(args) },
    Entry { name: trial::COMMAND, spec: None, run: |args| trial::main_from(args.into_iter()) },
];

fn entry(name: &OsStr) -> Option<&'static Entry> {
    ENTRIES.iter().find(|entry| name == entry.name)
}

/// The command line with everything that a first argument may be.
fn spec() -> clap::Command {
    let entries = ENTRIES.iter().filter_map(|entry| Some((entry.spec?)().name(entry.name)));
    manual::with_commands(Flags::spec().subcommands(entries).subcommands(cluster_cli::commands()))
}

fn main() -> ExitCode {
    let args: Vec<OsString> = std::env::args_os().collect();
    let name = args.first().and_then(|a| Path::new(a).file_name());
    // Under the name of another program it is that one.
    if let Some(entry) = name.and_then(entry).filter(|entry| matches!(entry.name, SHARD | CLUSTER)) {
        return (entry.run)(args);
    }
    match args.get(1) {
        Some(word) if manual::is_command(word) => return manual::main_from(spec(), args),
        // `coordinator rollout restart` and the like.
        Some(word) if cluster_cli::is_command(word) => return cluster_cli::main_from(args),
        _ => {}
    }
    match args.get(1).and_then(|word| entry(word)) {
        Some(entry) => (entry.run)(args.into_iter().skip(1).collect()),
        None => run::main_from(args),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_word_is_one_command() {
        spec().debug_assert();
    }
}
