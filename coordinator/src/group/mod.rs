//! A tensor-parallel group: ranks that step together.

pub mod actor;
mod alarm;
pub mod change;
mod drained;
mod epochs;
pub mod machine;
mod mirror_lag;
pub mod plans;
pub mod progress;
mod report;
mod seats;
mod state;
