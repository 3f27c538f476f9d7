//! The parts of the simulated cluster.

mod at_coordinators;
mod at_shards;
pub mod clients;
pub mod coordinator;
pub mod faults;
pub mod shard;
pub mod totals;
pub mod world;
