//! A tensor-parallel group: ranks that step together.

pub mod actor;
mod alarm;
pub mod change;
mod drained;
mod epochs;
pub mod machine;
pub mod plans;
pub mod progress;
mod report;
mod seats;
mod state;
