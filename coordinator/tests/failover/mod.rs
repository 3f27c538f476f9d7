//! The parts of the simulated cluster.

pub mod clients;
pub mod coordinator;
pub mod shard;
pub mod world;
