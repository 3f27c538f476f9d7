//! The `shard` program.

use std::process::ExitCode;

fn main() -> ExitCode {
    phalanx_shard::main_from(std::env::args_os())
}
