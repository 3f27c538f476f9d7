//! Continuous batching: which rows of which sequences run in the next step.

pub mod handle;
