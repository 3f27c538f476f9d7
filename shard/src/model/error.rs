//! Why a model can't be loaded.

use std::path::PathBuf;

use phalanx_cluster::{checkpoint::CheckpointError, partition::PartitionError};
use phalanx_kernels::error::KernelError;

/// Why a rank's slice of a model can't be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The checkpoint can't be read, or lacks a tensor.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The device refused a tensor.
    #[error("{what}: {source}")]
    Device {
        /// What was being put on the device.
        what: String,
        /// What the device said.
        source: KernelError,
    },
    /// No family of that name.
    #[error("{file}: architecture {name:?} is not supported; supported are: {supported}")]
    UnknownArchitecture {
        /// Which checkpoint.
        file: PathBuf,
        /// What it says it is.
        name: String,
        /// What there is.
        supported: String,
    },
    /// The checkpoint has a tensor that the family's code does not read: it would compute something else.
    #[error("{file}: tensor {tensor}: models of architecture {architecture:?} with this tensor are not supported")]
    UnreadTensor {
        /// Which checkpoint.
        file: PathBuf,
        /// Which tensor.
        tensor: String,
        /// The family.
        architecture: String,
    },
    /// The model can't be dealt to that many ranks.
    #[error(transparent)]
    Partition(#[from] PartitionError),
    /// A family asked for a tensor that it does not list.
    #[error("architecture {architecture:?} reads tensor {tensor:?}, which it does not list as a {kind}: a bug")]
    Unlisted {
        /// The family.
        architecture: &'static str,
        /// Which tensor.
        tensor: &'static str,
        /// Norm or matrix.
        kind: &'static str,
    },
    /// Loading was told to stop.
    #[error("loading was interrupted")]
    Interrupted,
}
