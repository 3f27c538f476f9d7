//! [`Control`] of a coordinator that leads, over its groups and its leadership; and of one that stands by.

use std::{sync::Arc, time::Duration};

use phalanx_cluster::{id::ShardId, model_config::ModelConfig, partition::PartitionPlan};
use phalanx_proto::v1::{DrainResponse, PlanResponse, RolloutEvent, StatusResponse};
use ractor::{RpcReplyPort, rpc::CallResult};
use tokio::{sync::mpsc, time::timeout};

use super::{
    AdminError, Control, LeaderAddress, RollingRestart, RolloutEvents, RolloutPhase, debug::Loads, status::StatusSource,
};
use crate::{
    frontend::streams::Streams,
    group::{actor::GroupMsg, change::ChangeError, report},
    leadership::{LeadershipView, View, actor::LeadershipHandle},
    membership::groups::{GroupAddress, Groups},
};

/// Longest wait for what the group knows. Changes take as long as they take.
const CALL_LIMIT: Duration = Duration::from_secs(5);
/// Longest wait for another coordinator to take over.
const STEP_DOWN_LIMIT: Duration = Duration::from_secs(30);

/// Of one leadership.
#[derive(Clone)]
pub struct Leading {
    groups: Groups,
    status: StatusSource,
    leadership: LeadershipHandle,
    shape: Arc<ModelConfig>,
    streams: Option<Arc<Streams>>,
}

impl Leading {
    /// Over the parts of a leadership. `shape` is the model's.
    pub fn new(groups: Groups, status: StatusSource, leadership: LeadershipHandle, shape: Arc<ModelConfig>) -> Self {
        Self { groups, status, leadership, shape, streams: None }
    }

    /// Tells of the answers that can be asked for again, too.
    #[must_use]
    pub fn with_streams(self, streams: Arc<Streams>) -> Self {
        Self { streams: Some(streams), ..self }
    }

    async fn ask<T: Send + 'static>(
        &self,
        group: &GroupAddress,
        message: impl FnOnce(RpcReplyPort<T>) -> GroupMsg,
        limit: Option<Duration>,
    ) -> Result<T, AdminError> {
        match group.get().call(message, limit).await {
            Ok(CallResult::Success(answer)) => Ok(answer),
            Ok(CallResult::Timeout) => Err(AdminError::Unavailable("the group is busy: try again".to_owned())),
            // It has ended, and a reply that nobody gives ends with it.
            Ok(CallResult::SenderError) | Err(_) => Err(self.interrupted()),
        }
    }

    /// The group that a shard belongs to.
    async fn group_of(&self, shard: &ShardId) -> Result<&GroupAddress, AdminError> {
        match self.groups.of(shard) {
            Some(group) => Ok(group),
            None => Err(self.refused(ChangeError::UnknownShard(shard.clone())).await),
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

impl Leading {
    /// Restarts group by group, so that the others serve meanwhile.
    async fn roll_out(
        self,
        groups: Vec<GroupAddress>,
        mut rollout: RollingRestart,
        mut progress: Progress,
        sender: mpsc::UnboundedSender<Result<RolloutEvent, AdminError>>,
    ) {
        let view = self.leadership.view();
        for group in groups {
            let (events, mut received) = mpsc::unbounded_channel();
            if group.get().cast(GroupMsg::RolloutRestart { rollout: rollout.clone(), events }).is_err() {
                // Nobody may listen, here and below.
                drop(sender.send(Err(self.interrupted())));
                return;
            }
            loop {
                let event = tokio::select! {
                    event = received.recv() => event,
                    // Nobody listens: dropping our end tells the group.
                    () = sender.closed() => return,
                };
                let event = match event {
                    Some(Ok(event)) => Ok(event),
                    Some(Err(error)) => Err(self.refused(error).await),
                    None if view.session().is_some() => Err(self.interrupted()),
                    None => Err(AdminError::GivenUp("this coordinator leads no longer".to_owned())),
                };
                let is_group_done = matches!(&event, Ok(event) if event.phase == RolloutPhase::Done.name());
                let is_over = event.is_err();
                if let Ok(RolloutEvent { shard_id, phase, .. }) = &event
                    && phase == RolloutPhase::Returned.name()
                {
                    // It may be in another group by the time that that one's turn comes.
                    rollout.but.push(ShardId(shard_id.clone()));
                }
                let event = event.map(|event| progress.of_all(event));
                if let Some(event) = event.transpose()
                    && (sender.send(event).is_err() || is_over)
                {
                    return;
                }
                if is_group_done {
                    break;
                }
            }
        }
    }
}

/// What is told of a rolling restart of all groups: each of them counts its own shards only.
struct Progress {
    total: u32,
    groups_left: usize,
    /// In the groups that are done.
    done: u32,
    longest_stall_ms: u32,
}

impl Progress {
    fn new(total: u32, groups: usize) -> Self {
        Self { total, groups_left: groups, done: 0, longest_stall_ms: 0 }
    }

    /// As an event of all groups; none if it is the end of one that is not the last.
    fn of_all(&mut self, event: RolloutEvent) -> Option<RolloutEvent> {
        let done = self.done.saturating_add(event.done);
        let mut event = RolloutEvent { done, total: self.total.max(done), ..event };
        if event.phase == RolloutPhase::Done.name() {
            self.done = done;
            self.groups_left = self.groups_left.saturating_sub(1);
            self.longest_stall_ms = self.longest_stall_ms.max(event.stall_ms);
            event.stall_ms = self.longest_stall_ms;
            event.total = done;
            return Some(event).filter(|_| self.groups_left == 0);
        }
        Some(event)
    }
}

fn not_leading(view: &View) -> AdminError {
    // One that leads no longer may not know of another yet.
    let other = view.leader.as_ref().filter(|leader| !leader.record.is_same_life(&view.me));
    AdminError::NotLeader(
        other.map(|leader| LeaderAddress { http: leader.record.http_url(), grpc: leader.record.grpc_url() }),
    )
}

#[tonic::async_trait]
impl Control for Leading {
    async fn status(&self) -> Result<StatusResponse, AdminError> {
        self.status.status().await
    }

    async fn drain(&self, shard: ShardId) -> Result<DrainResponse, AdminError> {
        let group = self.group_of(&shard).await?;
        let is_helped = self.groups.others_have_spares(&shard);
        match self.ask(group, |reply| GroupMsg::Drain { shard, is_helped, reply }, None).await? {
            Ok(drained) => Ok(drained),
            Err(error) => Err(self.refused(error).await),
        }
    }

    async fn undrain(&self, shard: ShardId) -> Result<(), AdminError> {
        let group = self.group_of(&shard).await?;
        match self.ask(group, |reply| GroupMsg::Undrain { shard, reply }, None).await? {
            Ok(()) => Ok(()),
            Err(error) => Err(self.refused(error).await),
        }
    }

    async fn rollout_restart(&self, rollout: RollingRestart) -> Result<RolloutEvents, AdminError> {
        let members = self.status().await?.members;
        let groups: Vec<GroupAddress> = (0..)
            .zip(self.groups.all())
            .filter(|(index, _)| members.iter().any(|m| m.group == *index))
            .map(|(_, group)| group.clone())
            .collect();
        if groups.is_empty() {
            return Err(AdminError::Refused("no shard is attached".to_owned()));
        }
        let total = members.iter().filter(|m| !rollout.but.iter().any(|but| but.0 == m.shard_id)).count();
        let progress = Progress::new(u32::try_from(total).unwrap_or(u32::MAX), groups.len());
        let (sender, told) = mpsc::unbounded_channel();
        tokio::spawn(self.clone().roll_out(groups, rollout, progress, sender));
        Ok(told)
    }

    async fn plan(&self) -> Result<PlanResponse, AdminError> {
        let mut plans = Vec::new();
        for group in self.groups.all() {
            let mut plan = *self.ask(group, GroupMsg::Plan, Some(CALL_LIMIT)).await?;
            fill_slices(&mut plan, &self.shape)?;
            plans.push(plan);
        }
        Ok(report::plans_together(plans))
    }

    async fn loads(&self) -> Result<Loads, AdminError> {
        let n_streams = self.streams.as_ref().map_or(0, |streams| streams.len());
        Ok(Loads { groups: self.status.loads().await, n_streams })
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

    async fn loads(&self) -> Result<Loads, AdminError> {
        self.refuse()
    }

    async fn step_down(&self) -> Result<String, AdminError> {
        self.refuse()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(phase: RolloutPhase, done: u32, total: u32, stall_ms: u32) -> RolloutEvent {
        let shard_id = if phase == RolloutPhase::Done { "" } else { "a" }.to_owned();
        RolloutEvent { shard_id, phase: phase.name().to_owned(), done, total, stall_ms }
    }

    #[test]
    fn a_rollout_of_several_groups_is_told_as_one() {
        let mut progress = Progress::new(5, 2);
        let mut tell = |phase, done, total, stall_ms| {
            progress.of_all(event(phase, done, total, stall_ms)).map(|e| (e.phase, e.done, e.total, e.stall_ms))
        };
        let shown = |phase: RolloutPhase, done, total, stall_ms| Some((phase.name().to_owned(), done, total, stall_ms));
        assert_eq!(tell(RolloutPhase::Returned, 2, 3, 40), shown(RolloutPhase::Returned, 2, 5, 40));
        assert_eq!(tell(RolloutPhase::Done, 3, 3, 90), None, "there is another group");
        assert_eq!(tell(RolloutPhase::Draining, 0, 2, 0), shown(RolloutPhase::Draining, 3, 5, 0));
        assert_eq!(tell(RolloutPhase::Done, 2, 2, 10), shown(RolloutPhase::Done, 5, 5, 90));
    }
}
