//! The `cluster` program: see [`phalanx_coordinator::cluster_cli`].

use std::process::ExitCode;

fn main() -> ExitCode {
    phalanx_coordinator::cluster_cli::main_from(std::env::args_os())
}
