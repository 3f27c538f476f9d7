//! Copies of KV rows in the memory of a spare, so that losing a rank loses no rows.
//!
//! Each rank copies the rows that it wrote in a step (`sender`) and sends them behind the step, on a thread of its own
//! (`lane`), as `frame`s over a connection that both sides have proved to be theirs (`handshake`). A spare takes
//! them in (`receiver`) and keeps them as pages (`store`), which a device takes over as they are: taking the rank of
//! a lost shard then costs the same at any length of context. Where there is no spare, another rank keeps the copy, and
//! whoever takes the rank fetches it from there (`fetch`). Frames also say what full blocks hold (`step/seals.rs`), so that a
//! copy is of use to a leader that knows nothing of the epoch that wrote it.
//!
//! **Invariant.** A step never waits for a mirror, and no mirror claims rows that it has not.

mod fetch;
mod frame;
mod handshake;
mod lane;
mod receiver;
mod sender;
mod store;
#[cfg(test)]
mod tests;

pub use fetch::{FetchError, fetch};
pub use handshake::{RowsIdentity, Source};
pub use lane::Target;
pub use receiver::Receiver;
pub use sender::Mirrors;
pub use store::{Adopted, Copied, Progress, Store, Taking};
