//! What a coordinator that does not lead says to shards and operators.

use std::time::Duration;

use phalanx_cluster::error_text::with_causes;
use phalanx_proto::{
    dial::Dialer,
    v1::{
        CoordinatorMessage, ShardMessage, StatusRequest, StatusResponse,
        cluster_client::ClusterClient,
        cluster_server::{self, ClusterServer},
    },
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming, metadata::MetadataValue};

use super::{LeadershipView, View};
use crate::{
    request::{Request as Work, RequestError},
    scheduler::handle::{Readiness, RequestStream, Submit},
};

/// Metadata of a refusal: where the leader is, as `http://HOST:PORT`, or `https://` where it wants TLS.
pub const LEADER_METADATA: &str = "phalanx-leader";
/// Set on calls that were passed on, so that they are not passed on again.
const FORWARDED_METADATA: &str = "phalanx-forwarded";
/// Longest wait for the leader.
const CALL_LIMIT: Duration = Duration::from_secs(5);

/// The `Cluster` service of a standby.
pub struct StandbyCluster {
    dialer: Dialer,
    view: LeadershipView,
}

impl StandbyCluster {
    /// As a gRPC service.
    pub fn server(dialer: Dialer, view: LeadershipView) -> ClusterServer<Self> {
        ClusterServer::new(Self { dialer, view })
    }
}

/// Says who leads instead.
pub fn not_leading(view: &View) -> Status {
    let Some(leader) = &view.leader else {
        return Status::failed_precondition("this coordinator stands by; nobody is known to lead");
    };
    let id = &leader.record.coordinator_id;
    let mut status = Status::failed_precondition(format!("this coordinator stands by; {id} leads"));
    if let Ok(address) = MetadataValue::try_from(leader.record.grpc_url()) {
        status.metadata_mut().insert(LEADER_METADATA, address);
    }
    status
}

#[tonic::async_trait]
impl cluster_server::Cluster for StandbyCluster {
    type AttachStream = ReceiverStream<Result<CoordinatorMessage, Status>>;

    async fn attach(&self, _request: Request<Streaming<ShardMessage>>) -> Result<Response<Self::AttachStream>, Status> {
        Err(not_leading(&self.view.get()))
    }

    async fn status(&self, request: Request<StatusRequest>) -> Result<Response<StatusResponse>, Status> {
        let Some(leader) = self.view.get().leader else {
            return Err(Status::unavailable("this coordinator stands by; nobody is known to lead"));
        };
        if request.metadata().contains_key(FORWARDED_METADATA) {
            return Err(not_leading(&self.view.get()));
        }
        let channel = self
            .dialer
            .endpoint(&leader.record.grpc_address)
            .map_err(|e| Status::internal(with_causes(&e)))?
            .connect_timeout(CALL_LIMIT)
            .timeout(CALL_LIMIT)
            .connect()
            .await
            .map_err(|e| {
                Status::unavailable(format!("{} leads, but: {}", leader.record.coordinator_id, with_causes(&e)))
            })?;
        let mut call = Request::new(StatusRequest {});
        call.metadata_mut().insert(FORWARDED_METADATA, MetadataValue::from_static("1"));
        ClusterClient::new(channel).status(call).await
    }
}

/// Takes no request: the leader does.
pub struct StandbySubmit {
    view: LeadershipView,
}

impl StandbySubmit {
    /// Says who leads.
    pub fn new(view: LeadershipView) -> Self {
        Self { view }
    }
}

impl Submit for StandbySubmit {
    fn submit(&self, _request: Work) -> Result<RequestStream, RequestError> {
        Err(RequestError::Unavailable(not_leading(&self.view.get()).message().to_owned()))
    }

    /// A standby serves by forwarding.
    fn readiness(&self) -> Readiness {
        let view = self.view.get();
        match view.leader {
            // Elected, but the scheduler has not taken over yet: there is nobody to forward to.
            _ if view.session.is_some() => Readiness::NotReady("this coordinator is about to lead".to_owned()),
            Some(_) => Readiness::Serving,
            None => Readiness::NotReady("no coordinator leads".to_owned()),
        }
    }
}
