//! Which KV pages the shard has, for its introduction to the next coordinator.

use std::sync::{Arc, Mutex, PoisonError};

use phalanx_proto::v1::HeldPages;

/// The pages of the present or the last group. Cloning shares it.
///
/// What counts is what the engine says when it is asked to take a rank; this says whether asking is worth while.
#[derive(Debug, Clone, Default)]
pub struct Held(Arc<Mutex<Option<HeldPages>>>);

impl Held {
    /// What there is now.
    pub fn set(&self, pages: Option<HeldPages>) {
        // Each change is complete in itself, so a panicking thread leaves nothing half done.
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = pages;
    }

    /// What there is.
    pub fn get(&self) -> Option<HeldPages> {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
