//! The `coordinator` program, which is the `shard` and the `cluster` program too: this file alone links the shard.

use std::{ffi::OsString, path::Path, process::ExitCode};

use phalanx_coordinator::{
    certs,
    cluster_cli::{self, CLUSTER},
    grammars::trial,
    run, security,
    spawn::SHARD,
};

fn main() -> ExitCode {
    let args: Vec<OsString> = std::env::args_os().collect();
    let name = args.first().and_then(|a| Path::new(a).file_name());
    if name.is_some_and(|n| n == SHARD) {
        return phalanx_shard::main_from(args);
    }
    if name.is_some_and(|n| n == CLUSTER) {
        return cluster_cli::main_from(args);
    }
    match args.get(1).and_then(|a| a.to_str()) {
        Some(SHARD) => phalanx_shard::main_from(args.into_iter().skip(1)),
        Some("bench") => phalanx_shard::bench::main_from(args.into_iter().skip(1)),
        Some(CLUSTER) => cluster_cli::main_from(args.into_iter().skip(1)),
        // `coordinator rollout restart` and the like.
        Some(word) if cluster_cli::is_command(word.as_ref()) => cluster_cli::main_from(args),
        Some("key") => security::cli::main_from(args.into_iter().skip(1)),
        Some(trial::COMMAND) => trial::main_from(args.into_iter().skip(1)),
        Some("certs") => certs::main_from(args.into_iter().skip(1)),
        _ => run::main_from(args),
    }
}
