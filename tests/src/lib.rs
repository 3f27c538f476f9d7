//! Harness of the end-to-end tests: starts real processes on free ports, talks to them as a client would, and compares
//! with golden data. Nothing here knows the inside of a process.

pub mod client;
pub mod faults;
pub mod golden;
pub mod model_cache;
pub mod offline;
pub mod process;
pub mod programs;
pub mod python;
pub mod resuming;
pub mod workload;
