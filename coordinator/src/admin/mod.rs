//! What operators change: draining, rolling restarts, plans, leadership.
//!
//! [`Control`] is what can be asked of the coordinator that leads. [`service`] offers it over gRPC, for the `cluster`
//! program; [`http`] over HTTP, for `curl`.

pub mod control;
pub mod debug;
pub mod http;
pub mod json;
pub mod service;
pub mod slot;
pub mod status;
#[cfg(test)]
pub mod testing;

use phalanx_cluster::id::ShardId;
use phalanx_proto::v1::{DrainResponse, PlanResponse, RolloutEvent, StatusResponse};
use tokio::sync::mpsc;

use debug::Loads;

pub use crate::group::change::RollingRestart;

/// Where the leader answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeaderAddress {
    /// HTTP, as `http://HOST:PORT`.
    pub http: String,
    /// gRPC, as `http://HOST:PORT`.
    pub grpc: String,
}

/// Why an operator's wish is not fulfilled.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AdminError {
    /// There is no such shard.
    #[error("no shard is named {shard:?}; {}", known_shards(.known))]
    UnknownShard {
        /// As it was named.
        shard: String,
        /// Those that are attached.
        known: Vec<String>,
    },
    /// It can't be done as things are, or failed. Says why, and what would help.
    #[error("{0}")]
    Refused(String),
    /// Only the leader can do that.
    #[error("this coordinator does not lead; {}", leader_is(.0.as_ref()))]
    NotLeader(Option<LeaderAddress>),
    /// It was begun and can't be ended here, because the leader or the group has changed: ask again.
    #[error("{0}")]
    GivenUp(String),
    /// Nothing answers at the moment.
    #[error("{0}")]
    Unavailable(String),
}

fn known_shards(known: &[String]) -> String {
    if known.is_empty() { "no shards are attached".to_owned() } else { format!("attached are {}", known.join(", ")) }
}

fn leader_is(leader: Option<&LeaderAddress>) -> String {
    match leader {
        Some(LeaderAddress { http, grpc }) => format!("the leader's HTTP API is {http}, its gRPC {grpc}"),
        None => "no leader is known at the moment".to_owned(),
    }
}

/// Events of a rollout; an error is the last one.
pub type RolloutEvents = mpsc::UnboundedReceiver<Result<RolloutEvent, AdminError>>;

/// What can be asked of the coordinator that leads.
#[tonic::async_trait]
pub trait Control: Send + Sync + 'static {
    /// Members, ranks, epochs.
    async fn status(&self) -> Result<StatusResponse, AdminError>;
    /// Takes the rank from a shard; ends when it has none.
    async fn drain(&self, shard: ShardId) -> Result<DrainResponse, AdminError>;
    /// Lets a shard take ranks again.
    async fn undrain(&self, shard: ShardId) -> Result<(), AdminError>;
    /// Restarts all shards but those that are named.
    async fn rollout_restart(&self, rollout: RollingRestart) -> Result<RolloutEvents, AdminError>;
    /// What each rank holds, and who takes over.
    async fn plan(&self) -> Result<PlanResponse, AdminError>;
    /// What there is to do at the moment.
    async fn loads(&self) -> Result<Loads, AdminError>;
    /// Gives leadership away; ends when another coordinator leads, and names it.
    async fn step_down(&self) -> Result<String, AdminError>;
}

/// What a [`RolloutEvent`] says of its shard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RolloutPhase {
    /// Another shard is about to take its rank.
    Draining,
    /// It was told to end.
    Restarting,
    /// It is attached again, and loaded if it is to have a rank.
    Returned,
    /// Of no shard: all are restarted.
    Done,
}

impl RolloutPhase {
    const ALL: &[Self] = &[Self::Draining, Self::Restarting, Self::Returned, Self::Done];

    /// As messages spell it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Draining => "draining",
            Self::Restarting => "restarting",
            Self::Returned => "returned",
            Self::Done => "done",
        }
    }

    /// From a message.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|phase| phase.name() == name)
    }
}
