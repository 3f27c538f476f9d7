//! [`Control`] of a coordinator that leads, over its group and its leadership; and of one that stands by.

use std::{sync::Arc, time::Duration};

use phalanx_cluster::{id::ShardId, model_config::ModelConfig, partition::PartitionPlan};
use phalanx_proto::v1::{DrainResponse, PlanResponse, StatusResponse};
use ractor::{RpcReplyPort, rpc::CallResult};
use tokio::{sync::mpsc, time::timeout};

use super::{AdminError, Control, LeaderAddress, RollingRestart, RolloutEvents, RolloutPhase, status::StatusSource};
use crate::{
    group::{actor::GroupMsg, change::ChangeError},
    leadership::{LeadershipView, View, actor::LeadershipHandle},
    membership::actor::GroupAddress,
};

/// Longest wait for what the group knows. Changes take as long as they take.
const CALL_LIMIT: Duration = Duration::from_secs(5);
/// Longest wait for another coordinator to take over.
const STEP_DOWN_LIMIT: Duration = Duration::from_secs(30);

/// Of one leadership.
#[derive(Clone)]
pub struct Leading {
    group: GroupAddress,
    status: StatusSource,
    leadership: LeadershipHandle,
    shape: Arc<ModelConfig>,
}

impl Leading {
    /// Over the parts of a leadership. `shape` is the model's.
    pub fn new(
        group: GroupAddress,
        status: StatusSource,
        leadership: LeadershipHandle,
        shape: Arc<ModelConfig>,
    ) -> Self {
        Self { group, status, leadership, shape }
    }

    async fn ask<T: Send + 'static>(
        &self,
        message: impl FnOnce(RpcReplyPort<T>) -> GroupMsg,
        limit: Option<Duration>,
    ) -> Result<T, AdminError> {
        match self.group.get().call(message, limit).await {
            Ok(CallResult::Success(answer)) => Ok(answer),
            Ok(CallResult::Timeout) => Err(AdminError::Unavailable("the group is busy: try again".to_owned())),
            // It has ended, and a reply that nobody gives ends with it.
            Ok(CallResult::SenderError) | Err(_) => Err(self.interrupted()),
        }
    }

    /// Why a change that was begun here has no end.
    fn interrupted(&self) -> AdminError {
        let view = self.leadership.view().get();
        match view.session {
            Some(_) => AdminError::GivenUp("the group was started again meanwhile: ask again".to_owned()),
            None => not_leading(&view),
        }
    }

    async fn refused(&self, error: ChangeError) -> AdminError {
        match error {
            ChangeError::UnknownShard(shard) => {
                let members = self.status().await.map(|s| s.members).unwrap_or_default();
                AdminError::UnknownShard { shard: shard.0, known: members.into_iter().map(|m| m.shard_id).collect() }
            }
            // Asking again, or another leader, would not help.
            ChangeError::Impossible(why) | ChangeError::Failed(why) => AdminError::Refused(why),
        }
    }
}

fn not_leading(view: &View) -> AdminError {
    // One that leads no longer may not know of another yet.
    let other = view.leader.as_ref().filter(|leader| !leader.record.is_same_life(&view.me));
    AdminError::NotLeader(other.map(|leader| LeaderAddress {
        http: format!("http://{}", leader.record.http_address),
        grpc: leader.record.grpc_url(),
    }))
}

#[tonic::async_trait]
impl Control for Leading {
    async fn status(&self) -> Result<StatusResponse, AdminError> {
        self.status.status().await
    }

    async fn drain(&self, shard: ShardId) -> Result<DrainResponse, AdminError> {
        match self.ask(|reply| GroupMsg::Drain { shard, reply }, None).await? {
            Ok(drained) => Ok(drained),
            Err(error) => Err(self.refused(error).await),
        }
    }

    async fn undrain(&self, shard: ShardId) -> Result<(), AdminError> {
        match self.ask(|reply| GroupMsg::Undrain { shard, reply }, None).await? {
            Ok(()) => Ok(()),
            Err(error) => Err(self.refused(error).await),
        }
    }

    async fn rollout_restart(&self, rollout: RollingRestart) -> Result<RolloutEvents, AdminError> {
        let (events, mut received) = mpsc::unbounded_channel();
        let asked = self.group.get().cast(GroupMsg::RolloutRestart { rollout, events });
        asked.map_err(|_| self.interrupted())?;
        let (sender, told) = mpsc::unbounded_channel();
        let (view, own) = (self.leadership.view(), self.clone());
        tokio::spawn(async move {
            loop {
                let event = tokio::select! {
                    event = received.recv() => event,
                    // Nobody listens: dropping our end tells the group.
                    () = sender.closed() => return,
                };
                let is_last = matches!(&event, Some(Ok(event)) if event.phase == RolloutPhase::Done.name());
                let event = match event {
                    Some(Ok(event)) => Ok(event),
                    Some(Err(error)) => Err(own.refused(error).await),
                    None if view.session().is_some() => Err(own.interrupted()),
                    None => Err(AdminError::GivenUp("this coordinator leads no longer".to_owned())),
                };
                let is_last = is_last || event.is_err();
                if sender.send(event).is_err() || is_last {
                    return;
                }
            }
        });
        Ok(told)
    }

    async fn plan(&self) -> Result<PlanResponse, AdminError> {
        let mut plan = *self.ask(GroupMsg::Plan, Some(CALL_LIMIT)).await?;
        fill_slices(&mut plan, &self.shape)?;
        Ok(plan)
    }

    async fn step_down(&self) -> Result<String, AdminError> {
        let mut view = self.leadership.view();
        let me = view.get().me;
        if view.get().others().next().is_none() {
            let why = "there is no other coordinator to lead: start one with the same --store first";
            return Err(AdminError::Refused(why.to_owned()));
        }
        self.leadership.step_down();
        let other_leads = view.wait_for(|v| v.leader.as_ref().is_some_and(|l| !l.record.is_same_life(&me)));
        match timeout(STEP_DOWN_LIMIT, other_leads).await.ok().and_then(|v| v.leader) {
            Some(leader) => Ok(leader.record.coordinator_id),
            None => {
                let why = format!("no other coordinator has taken over within {} s", STEP_DOWN_LIMIT.as_secs());
                Err(AdminError::GivenUp(why))
            }
        }
    }
}

/// Says what each rank holds. The group knows who they are, the model how it is dealt to so many.
fn fill_slices(plan: &mut PlanResponse, shape: &ModelConfig) -> Result<(), AdminError> {
    if plan.ranks.is_empty() {
        return Ok(());
    }
    // All ranks have the same speed: as in `Peer::weight`.
    let slices = PartitionPlan::new(shape, &vec![1.0; plan.ranks.len()])
        .map_err(|error| AdminError::Refused(error.to_string()))?;
    for (rank, slice) in plan.ranks.iter_mut().zip(slices.ranks) {
        let range = |range: std::ops::Range<usize>| format!("{}..{}", range.start, range.end);
        rank.q_heads = range(slice.q_heads);
        rank.kv_heads = range(slice.kv_heads);
        rank.ffn_columns = range(slice.ffn);
        rank.vocabulary = range(slice.vocab);
    }
    Ok(())
}

/// Of a coordinator that stands by: names the leader.
pub struct StandingBy(LeadershipView);

impl StandingBy {
    /// As it shows in this view.
    pub fn new(view: LeadershipView) -> Self {
        Self(view)
    }

    fn refuse<T>(&self) -> Result<T, AdminError> {
        Err(not_leading(&self.0.get()))
    }
}

#[tonic::async_trait]
impl Control for StandingBy {
    async fn status(&self) -> Result<StatusResponse, AdminError> {
        self.refuse()
    }

    async fn drain(&self, _shard: ShardId) -> Result<DrainResponse, AdminError> {
        self.refuse()
    }

    async fn undrain(&self, _shard: ShardId) -> Result<(), AdminError> {
        self.refuse()
    }

    async fn rollout_restart(&self, _rollout: RollingRestart) -> Result<RolloutEvents, AdminError> {
        self.refuse()
    }

    async fn plan(&self) -> Result<PlanResponse, AdminError> {
        self.refuse()
    }

    async fn step_down(&self) -> Result<String, AdminError> {
        self.refuse()
    }
}
