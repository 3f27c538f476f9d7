//! A tensor-parallel group: ranks that step together.

pub mod actor;
pub mod change;
pub mod machine;
pub mod plans;
pub mod progress;
