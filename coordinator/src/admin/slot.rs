//! One [`Control`] behind the servers for the life of the process: what answers changes with leadership.

use std::sync::{Arc, PoisonError, RwLock};

use phalanx_cluster::id::ShardId;
use phalanx_proto::v1::{DrainResponse, PlanResponse, StatusResponse};

use super::{AdminError, Control, RollingRestart, RolloutEvents, debug::Loads};

/// Passes each wish to what is set when it comes. Clones are the same slot.
#[derive(Clone)]
pub struct ControlSlot(Arc<RwLock<Arc<dyn Control>>>);

impl ControlSlot {
    /// With this one at first.
    pub fn new(control: Arc<dyn Control>) -> Self {
        Self(Arc::new(RwLock::new(control)))
    }

    /// Wishes that come from now on go to this one.
    pub fn set(&self, control: Arc<dyn Control>) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = control;
    }

    fn get(&self) -> Arc<dyn Control> {
        Arc::clone(&self.0.read().unwrap_or_else(PoisonError::into_inner))
    }
}

#[tonic::async_trait]
impl Control for ControlSlot {
    async fn status(&self) -> Result<StatusResponse, AdminError> {
        self.get().status().await
    }

    async fn drain(&self, shard: ShardId) -> Result<DrainResponse, AdminError> {
        self.get().drain(shard).await
    }

    async fn undrain(&self, shard: ShardId) -> Result<(), AdminError> {
        self.get().undrain(shard).await
    }

    async fn rollout_restart(&self, rollout: RollingRestart) -> Result<RolloutEvents, AdminError> {
        self.get().rollout_restart(rollout).await
    }

    async fn plan(&self) -> Result<PlanResponse, AdminError> {
        self.get().plan().await
    }

    async fn loads(&self) -> Result<Loads, AdminError> {
        self.get().loads().await
    }

    async fn step_down(&self) -> Result<String, AdminError> {
        self.get().step_down().await
    }
}
