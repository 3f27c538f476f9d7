//! Continuous batching: which rows of which sequences run in the next step.
//!
//! [`machine::Machine`] is the scheduler itself, without clock, sockets or luck; [`actor`] is the shell around it.

pub mod actor;
mod check;
pub mod ending;
pub mod event;
pub mod handle;
pub mod machine;
pub mod meters;
pub mod outbox;
mod outcome;
mod overload;
mod planning;
pub mod policy;
mod quarantine;
mod replay;
mod resumption;
