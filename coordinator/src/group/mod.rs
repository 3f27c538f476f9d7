//! A tensor-parallel group: ranks that step together.

pub mod actor;
mod alarm;
pub mod change;
pub mod drained;
pub mod epochs;
pub mod loading;
pub mod machine;
pub mod meters;
pub mod plans;
pub mod progress;
pub mod report;
mod seats;
mod shown;
mod state;
