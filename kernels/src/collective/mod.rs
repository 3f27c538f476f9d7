//! Operations across the ranks of a group.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

/// What can go wrong between ranks. After any error the collective is unusable and its group must re-form.
#[derive(Debug, thiserror::Error)]
pub enum CollectiveError {
    /// The group was told to stop.
    #[error("collective of epoch {epoch}: aborted")]
    Aborted {
        /// Epoch of the group.
        epoch: u64,
    },
    /// A rank did not arrive in time.
    #[error("collective of epoch {epoch}: rank {rank} did not arrive within {after:?}")]
    Timeout {
        /// Epoch of the group.
        epoch: u64,
        /// The rank that is missing.
        rank: usize,
        /// How long was waited.
        after: Duration,
    },
    /// A rank's process or connection is gone.
    #[error("collective of epoch {epoch}: rank {rank} is gone: {reason}")]
    PeerLost {
        /// Epoch of the group.
        epoch: u64,
        /// The lost rank.
        rank: usize,
        /// What was seen.
        reason: String,
    },
    /// The group could not be connected.
    #[error("collective of epoch {epoch}: {reason}")]
    Setup {
        /// Epoch of the group.
        epoch: u64,
        /// What was wrong and what to do.
        reason: String,
    },
    /// Ranks disagree about what they do.
    #[error("collective of epoch {epoch}: rank {rank} sent {got}, want {want}")]
    Mismatch {
        /// Epoch of the group.
        epoch: u64,
        /// The rank that sent it.
        rank: usize,
        /// What this rank expected.
        want: String,
        /// What came.
        got: String,
    },
}

/// Lets another thread end a collective that is waiting. Cloning shares the flag.
#[derive(Debug, Clone, Default)]
pub struct AbortFlag(Arc<AtomicBool>);

impl AbortFlag {
    /// Every waiting and later operation returns [`CollectiveError::Aborted`].
    pub fn abort(&self) {
        self.0.store(true, Ordering::Release);
    }

    /// Whether [`AbortFlag::abort`] was called.
    pub fn is_aborted(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

/// Ranks that compute in lock-step. Every rank calls the same operations in the same order.
///
/// No operation waits longer than the time limit the collective was made with, and each ends soon after
/// [`AbortFlag::abort`].
pub trait Collective: Send {
    /// This rank.
    fn rank(&self) -> usize;

    /// Number of ranks.
    fn world_size(&self) -> usize;

    /// Short name, such as `shm` or `tcp`.
    fn name(&self) -> &'static str;

    /// Ends operations from another thread.
    fn abort_flag(&self) -> AbortFlag;

    /// Adds element-wise over all ranks (wrapping); every rank has the sum afterwards. Lengths are equal on all ranks.
    fn all_reduce(&mut self, values: &mut [i64]) -> Result<(), CollectiveError>;

    /// Concatenates what the ranks give, in rank order, on every rank. `lens[rank]` is each rank's length in bytes;
    /// `mine.len() == lens[self.rank()]`, `all.len()` is their sum.
    fn all_gather(&mut self, mine: &[u8], lens: &[usize], all: &mut [u8]) -> Result<(), CollectiveError>;

    /// The same, but only rank 0 gets the result; other ranks pass an empty `all`.
    fn gather(&mut self, mine: &[u8], lens: &[usize], all: &mut [u8]) -> Result<(), CollectiveError>;

    /// Rank 0's bytes to every rank.
    fn broadcast(&mut self, bytes: &mut [u8]) -> Result<(), CollectiveError>;
}
