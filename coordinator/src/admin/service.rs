//! `phalanx.v1.Admin`.

use std::{pin::Pin, sync::Arc, time::Duration};

use futures::{Stream, StreamExt};
use phalanx_cluster::id::ShardId;
use phalanx_proto::v1::{
    DrainRequest, DrainResponse, PlanRequest, PlanResponse, RolloutEvent, RolloutRestartRequest, StepDownRequest,
    StepDownResponse, UndrainRequest, UndrainResponse,
    admin_server::{self, AdminServer},
};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::{Request, Response, Status};

use super::{AdminError, Control, RollingRestart};
use crate::leadership::standby::LEADER_METADATA;

impl From<AdminError> for Status {
    fn from(error: AdminError) -> Self {
        let message = error.to_string();
        match error {
            AdminError::UnknownShard { .. } => Self::not_found(message),
            AdminError::Refused(_) => Self::failed_precondition(message),
            AdminError::NotLeader(leader) => {
                let Some(leader) = leader.and_then(|l| l.grpc.parse().ok()) else { return Self::unavailable(message) };
                let mut status = Self::failed_precondition(message);
                status.metadata_mut().insert(LEADER_METADATA, leader);
                status
            }
            AdminError::GivenUp(_) => Self::aborted(message),
            AdminError::Unavailable(_) => Self::unavailable(message),
        }
    }
}

/// The service.
pub struct AdminService(Arc<dyn Control>);

impl AdminService {
    /// As a gRPC service.
    pub fn server(control: Arc<dyn Control>) -> AdminServer<Self> {
        AdminServer::new(Self(control))
    }
}

/// What was asked, for the log: who changed what is the first question after a surprise.
fn note<T>(request: &Request<T>, wish: &str, shard: &str) {
    let peer = request.remote_addr().map(|peer| peer.to_string());
    tracing::info!(peer, shard, "an operator asks: {wish}");
}

#[tonic::async_trait]
impl admin_server::Admin for AdminService {
    type RolloutRestartStream = Pin<Box<dyn Stream<Item = Result<RolloutEvent, Status>> + Send>>;

    async fn drain(&self, request: Request<DrainRequest>) -> Result<Response<DrainResponse>, Status> {
        note(&request, "drain", &request.get_ref().shard_id);
        Ok(Response::new(self.0.drain(ShardId(request.into_inner().shard_id)).await?))
    }

    async fn undrain(&self, request: Request<UndrainRequest>) -> Result<Response<UndrainResponse>, Status> {
        note(&request, "undrain", &request.get_ref().shard_id);
        self.0.undrain(ShardId(request.into_inner().shard_id)).await?;
        Ok(Response::new(UndrainResponse {}))
    }

    async fn rollout_restart(
        &self,
        request: Request<RolloutRestartRequest>,
    ) -> Result<Response<Self::RolloutRestartStream>, Status> {
        note(&request, "rollout restart", "");
        let request = request.into_inner();
        let rollout = RollingRestart {
            but: request.restarted.into_iter().map(ShardId).collect(),
            return_limit: request.return_timeout_s.map(|s| Duration::from_secs(s.into())),
        };
        let events = UnboundedReceiverStream::new(self.0.rollout_restart(rollout).await?);
        Ok(Response::new(Box::pin(events.map(|event| event.map_err(Status::from)))))
    }

    async fn plan(&self, _request: Request<PlanRequest>) -> Result<Response<PlanResponse>, Status> {
        Ok(Response::new(self.0.plan().await?))
    }

    async fn step_down(&self, request: Request<StepDownRequest>) -> Result<Response<StepDownResponse>, Status> {
        note(&request, "step down", "");
        Ok(Response::new(StepDownResponse { leader: self.0.step_down().await? }))
    }
}
