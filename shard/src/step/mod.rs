//! One step: from the plan on the wire to tokens.

pub mod executor;
pub mod grammar;
pub mod plan;
mod sampling;
pub mod seals;
pub mod sequence;
mod timed;

use phalanx_kernels::{collective::CollectiveError, error::KernelError};

use crate::sampler::SamplingError;

pub use executor::Executor;
pub use plan::{Limits, PlanError};

/// Why a step failed. The group has to re-form after it.
#[derive(Debug, thiserror::Error)]
pub enum StepError {
    /// The plan makes no sense.
    #[error("step plan: {0}")]
    Plan(#[from] PlanError),
    /// An operation failed.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// No token could be chosen.
    #[error(transparent)]
    Sampling(#[from] SamplingError),
    /// Another rank did not take part.
    #[error(transparent)]
    Collective(#[from] CollectiveError),
}
