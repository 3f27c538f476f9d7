//! A rank of a tensor-parallel group: owns a device, a slice of the weights and of the KV cache, and executes step plans.
//!
//! - [`model`]: families of models, loading a rank's slice. [`layer`]: what layers are made of.
//! - [`step`]: from a plan to tokens. [`sampler`]: from logits to a token.
//! - [`engine`]: epochs, the thread that computes. [`link`]: the stream to the coordinator.
//! - `health`: a port for probes.
//! - [`mirror`]: copies of KV rows at a spare.
//! - [`offline`]: a group in one process, for tests and for [`mod@bench`].

mod background;
pub mod bench;
mod canary;
pub mod config;
pub mod device;
pub mod engine;
mod failpoint;
mod health;
mod heartbeat;
mod host;
pub mod layer;
pub mod link;
mod memory;
pub mod mirror;
pub mod model;
pub mod offline;
mod run;
pub mod sampler;
pub mod step;
pub mod weights;

pub use run::{main_from, spec};
