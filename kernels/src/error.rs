//! What can go wrong on a device.

/// An operation that a device could not do.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// Operands do not fit each other.
    #[error("{op}: want {want}, got {got}")]
    Shape {
        /// The operation.
        op: &'static str,
        /// What the operation needs.
        want: String,
        /// What it was given.
        got: String,
    },
    /// The device has no memory left.
    #[error("{what}: no memory for {bytes} bytes on {device}: lower --kv-cache-memory or --max-num-batched-tokens")]
    OutOfMemory {
        /// What was to be allocated.
        what: &'static str,
        /// How much of it.
        bytes: u64,
        /// On which device.
        device: String,
    },
    /// The device or instruction set is not here.
    #[error("device {name}: {reason}")]
    NoDevice {
        /// As the operator named it.
        name: String,
        /// Why it can't be used, and what can.
        reason: String,
    },
    /// A collective failed inside an operation.
    #[error(transparent)]
    Collective(#[from] crate::collective::CollectiveError),
}
