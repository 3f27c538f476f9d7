//! The engine: owns device, weights, KV pages and collective, on an OS thread of its own.
//!
//! [`machine`] decides (pure), [`worker`] does it (the thread), [`actor`] passes messages between it and the link.

pub mod actor;
pub mod interrupt;
pub mod machine;
mod rank;
pub mod worker;

pub use rank::{EngineError, RankConfig};
