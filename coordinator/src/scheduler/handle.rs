//! How the rest of the coordinator talks to the scheduler.

use std::{sync::Arc, time::Duration};

use phalanx_proto::v1::{StepPlan, StepResult};

pub use super::event::Kept;
use super::outbox::RequestEvents;
use crate::request::{Request, RequestError};

/// Sends a step plan to every rank of the group. Must not block.
pub trait PlanSink: Send + Sync {
    /// Queues the plan; a plan of an epoch that is over is dropped.
    fn send(&self, plan: StepPlan);

    /// No step of the epoch is in flight and none will be planned until `Resume`: the answer to `Hold`, once for each.
    fn idle(&self, epoch: u64);

    /// Every stream that stood still before the group served has a token again; the longest did for so long. Told once.
    fn recovered(&self, epoch: u64, stall: Duration);
}

/// What a group tells the scheduler.
pub enum GroupEvent {
    /// The group takes plans from now on, beginning with step 1. KV pages are empty, unless `kept`.
    Serving {
        /// Epoch that plans must carry.
        epoch: u64,
        /// KV blocks on every rank.
        n_blocks: usize,
        /// Where plans go.
        plans: Arc<dyn PlanSink>,
        /// What the pages hold of an earlier epoch.
        kept: Option<Kept>,
    },
    /// The group is over: running sequences go back to waiting and are replayed when the next one serves.
    Lost {
        /// Which group.
        epoch: u64,
        /// For the log and for clients that can't wait.
        cause: String,
        /// Whether it ended on purpose: then no request can be to blame.
        is_planned: bool,
    },
    /// The group is about to be switched: no more plans, and [`PlanSink::idle`] once no step is in flight. Pages stay.
    Hold {
        /// Which group.
        epoch: u64,
    },
    /// The switch was given up: plans again.
    Resume {
        /// Which group.
        epoch: u64,
    },
    /// Rank 0 finished a step.
    Stepped(StepResult),
}

/// A request's events. Dropping it cancels the request: its blocks are free within one step.
pub struct RequestStream {
    /// In order; ends after `Finished` or `Failed`.
    pub events: RequestEvents,
    pub(crate) _cancel: CancelOnDrop,
}

/// Runs its closure when dropped.
pub(crate) struct CancelOnDrop(pub(crate) Option<Box<dyn FnOnce() + Send + Sync>>);

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        if let Some(cancel) = self.0.take() {
            cancel();
        }
    }
}

/// Takes requests. Frontends hold an `Arc<dyn Submit>`.
pub trait Submit: Send + Sync {
    /// Queues a request, or says at once why not.
    fn submit(&self, request: Request) -> Result<RequestStream, RequestError>;

    /// Whether requests are being served now; else why not.
    fn readiness(&self) -> Readiness;
}

/// Whether the cluster serves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Readiness {
    /// A group takes plans.
    Serving,
    /// Not now: what is being waited for.
    NotReady(String),
}
