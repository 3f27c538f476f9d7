//! A rank of a tensor-parallel group: owns a device, a slice of the weights and of the KV cache, and executes step plans.

pub mod weights;
