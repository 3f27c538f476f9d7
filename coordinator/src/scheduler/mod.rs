//! Continuous batching: which rows of which sequences run in the next step.
//!
//! [`machine::Machine`] is the scheduler itself, without clock, sockets or luck; [`actor`] is the shell around it.

pub mod actor;
pub mod event;
pub mod handle;
pub mod machine;
mod outcome;
mod planning;
pub mod policy;
