//! What operators see: members of all groups, the schedulers' load, and who leads.

use std::time::Duration;

use futures::future::join_all;
use phalanx_proto::v1::{Load, StatusResponse};
use ractor::rpc::CallResult;

use super::AdminError;
use crate::{
    group::{actor::GroupMsg, report},
    leadership::{LeadershipView, shards::ShardRegistry},
    membership::groups::{GroupAddress, Groups},
    scheduler::{actor::SchedulerHandle, event::Status},
};

/// Longest wait for the group.
const CALL_LIMIT: Duration = Duration::from_secs(5);
/// Longest wait for the scheduler: a status without load is better than none.
const LOAD_LIMIT: Duration = Duration::from_secs(1);

/// Asks everybody who knows a part. Clones ask the same.
#[derive(Clone)]
pub struct StatusSource {
    groups: Groups,
    schedulers: Vec<SchedulerHandle>,
    leadership: LeadershipView,
    leases: Option<ShardRegistry>,
}

impl StatusSource {
    /// Of one leadership. Without schedulers no load is told.
    pub fn new(groups: Groups, schedulers: Vec<SchedulerHandle>, leadership: LeadershipView) -> Self {
        Self { groups, schedulers, leadership, leases: None }
    }

    /// Shows how the leases of members stand.
    pub fn with_leases(self, leases: ShardRegistry) -> Self {
        Self { leases: Some(leases), ..self }
    }

    /// The present state.
    ///
    /// # Errors
    /// If a group does not answer.
    pub async fn status(&self) -> Result<StatusResponse, AdminError> {
        let ask = |group: &GroupAddress| {
            let group = group.get();
            async move { group.call(GroupMsg::Status, Some(CALL_LIMIT)).await }
        };
        let mut groups = Vec::new();
        for answer in join_all(self.groups.all().iter().map(ask)).await {
            let Ok(CallResult::Success(status)) = answer else {
                let why = "a group does not answer: it is busy, or being started again";
                return Err(AdminError::Unavailable(why.to_owned()));
            };
            groups.push(*status);
        }
        let mut status = report::together(groups);
        if let Some(leases) = &self.leases {
            leases.show(&mut status.members);
        }
        let loads: Option<Vec<Status>> = self.loads().await.into_iter().collect();
        let load = loads.filter(|loads| !loads.is_empty()).map(|loads| load_of(&loads));
        let view = self.leadership.get();
        let term = view.session.map_or(0, |s| s.term);
        Ok(StatusResponse { term, coordinators: view.listed(), load, ..status })
    }

    /// What each group's scheduler has to do; `None` if it does not answer.
    pub async fn loads(&self) -> Vec<Option<Status>> {
        join_all(self.schedulers.iter().map(|scheduler| scheduler.status(LOAD_LIMIT))).await
    }
}

/// Of all groups together.
fn load_of(states: &[Status]) -> Load {
    let sum =
        |number: fn(&Status) -> usize| u32::try_from(states.iter().map(number).sum::<usize>()).unwrap_or(u32::MAX);
    Load {
        requests: sum(|s| s.n_requests),
        sequences_waiting: sum(|s| s.n_waiting),
        sequences_running: sum(|s| s.n_running),
        kv_blocks_used: sum(|s| s.n_blocks_used),
        kv_blocks: sum(|s| s.n_blocks),
    }
}
