//! The engine: owns device, weights, KV pages and collective, on an OS thread of its own.
//!
//! [`machine`] decides (pure), [`worker`] does it (the thread), [`actor`] passes messages between it and the link.
//! [`interrupt`] ends what it does, [`vitals`] says what that is. What outlives a group: the open file (`checkpoints`),
//! slices (`slice`, on a `shelf`), also such as were loaded `ahead`, and with them KV pages (`kept`, or
//! taken over from what other ranks have `mirrored` here). [`held`] says which.

pub mod actor;
mod ahead;
mod checkpoints;
pub mod held;
pub mod interrupt;
mod kept;
pub mod machine;
mod mirrored;
mod rank;
mod shelf;
mod slice;
pub mod standing;
pub mod vitals;
pub mod worker;

pub use rank::{EngineError, RankConfig};
