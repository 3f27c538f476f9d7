//! What operators see: the group's members, the scheduler's load, and who leads.

use std::time::Duration;

use phalanx_proto::v1::{Load, StatusResponse};
use ractor::rpc::CallResult;

use super::AdminError;
use crate::{
    group::actor::GroupMsg,
    leadership::{LeadershipView, shards::ShardRegistry},
    membership::actor::GroupAddress,
    scheduler::{actor::SchedulerHandle, event::Status},
};

/// Longest wait for the group.
const CALL_LIMIT: Duration = Duration::from_secs(5);
/// Longest wait for the scheduler: a status without load is better than none.
const LOAD_LIMIT: Duration = Duration::from_secs(1);

/// Asks everybody who knows a part. Clones ask the same.
#[derive(Clone)]
pub struct StatusSource {
    group: GroupAddress,
    scheduler: Option<SchedulerHandle>,
    leadership: LeadershipView,
    leases: Option<ShardRegistry>,
}

impl StatusSource {
    /// Of one leadership. Without a scheduler no load is told.
    pub fn new(group: GroupAddress, scheduler: Option<SchedulerHandle>, leadership: LeadershipView) -> Self {
        Self { group, scheduler, leadership, leases: None }
    }

    /// Shows how the leases of members stand.
    pub fn with_leases(self, leases: ShardRegistry) -> Self {
        Self { leases: Some(leases), ..self }
    }

    /// The present state.
    ///
    /// # Errors
    /// If the group does not answer.
    pub async fn status(&self) -> Result<StatusResponse, AdminError> {
        let CallResult::Success(status) =
            self.group.get().call(GroupMsg::Status, Some(CALL_LIMIT)).await.unwrap_or(CallResult::SenderError)
        else {
            let why = "the group does not answer: it is busy, or being started again";
            return Err(AdminError::Unavailable(why.to_owned()));
        };
        let load = match &self.scheduler {
            Some(scheduler) => scheduler.status(LOAD_LIMIT).await.map(load_of),
            None => None,
        };
        let mut status = *status;
        if let Some(leases) = &self.leases {
            leases.show(&mut status.members);
        }
        let view = self.leadership.get();
        let term = view.session.map_or(0, |s| s.term);
        Ok(StatusResponse { term, coordinators: view.listed(), load, ..status })
    }
}

fn load_of(status: Status) -> Load {
    let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    Load {
        requests: count(status.n_requests),
        sequences_waiting: count(status.n_waiting),
        sequences_running: count(status.n_running),
        kv_blocks_used: count(status.n_blocks_used),
        kv_blocks: count(status.n_blocks),
    }
}
