//! Math on a device: CPU kernels chosen at run time, weight layouts, and collectives between ranks.
//!
//! This crate knows tensors, layouts and devices; it knows nothing of models, requests or gRPC. Start with [`ops`].

pub mod collective;
pub mod cpu;
pub mod error;
mod layout;
pub mod ops;
pub mod pages;
pub mod parallel;
pub mod reference;
pub mod rng;
pub mod slots;
mod tensor;

pub use cpu::{CpuConfig, CpuOps, Isa, RowMath};
