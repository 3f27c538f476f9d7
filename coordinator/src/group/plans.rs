//! Where the scheduler's plans go: to every rank of one formation.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use phalanx_cluster::id::Epoch;
use phalanx_proto::v1::{StepPlan, coordinator_message::Message};

use ractor::ActorRef;

use super::actor::GroupMsg;
use crate::{metrics as names, scheduler::handle::PlanSink, shard_link::LinkHandle};

/// Links of one formation, in rank order. Plans are dropped once the formation is over.
pub struct GroupPlans {
    epoch: Epoch,
    links: Vec<LinkHandle>,
    /// Hears of every plan, to notice when its results are late.
    group: ActorRef<GroupMsg>,
    over: AtomicBool,
}

impl GroupPlans {
    /// Of the ranks that serve in `epoch`.
    pub fn new(epoch: Epoch, links: Vec<LinkHandle>, group: ActorRef<GroupMsg>) -> Arc<Self> {
        Arc::new(Self { epoch, links, group, over: AtomicBool::new(false) })
    }

    /// Drops every plan from now on.
    pub fn end(&self) {
        self.over.store(true, Ordering::Release);
    }
}

impl PlanSink for GroupPlans {
    fn send(&self, plan: StepPlan) {
        if plan.epoch != self.epoch.raw() || self.over.load(Ordering::Acquire) {
            metrics::counter!(names::FENCED).increment(1);
            return;
        }
        let Some((last, others)) = self.links.split_last() else { return };
        let rows = plan.chunks.iter().fold(0u32, |rows, chunk| rows.saturating_add(chunk.len));
        self.tell_group(GroupMsg::Planned { epoch: self.epoch, step: plan.step, rows });
        for link in others {
            link.send(Message::StepPlan(plan.clone()));
        }
        last.send(Message::StepPlan(plan));
    }

    fn idle(&self, epoch: u64) {
        self.tell_group(GroupMsg::Idle(Epoch::from_raw(epoch)));
    }

    fn recovered(&self, epoch: u64, stall: Duration) {
        self.tell_group(GroupMsg::Recovered { epoch: Epoch::from_raw(epoch), stall });
    }
}

impl GroupPlans {
    fn tell_group(&self, message: GroupMsg) {
        if self.group.cast(message).is_err() {
            // Supervision tells the scheduler that the group is lost.
            tracing::debug!(epoch = %self.epoch, "the group's actor has ended");
        }
    }
}
