//! `grpc.health.v1.Health`, answered from the scheduler's readiness at the time of the call.

use std::{pin::Pin, sync::Arc, time::Duration};

use futures::Stream;
use phalanx_proto::v1::inference_server::SERVICE_NAME;
use tokio::time::{Interval, MissedTickBehavior};
use tonic::{Request, Response, Status};
use tonic_health::pb::{
    HealthCheckRequest, HealthCheckResponse, health_check_response::ServingStatus, health_server::Health,
};

use crate::scheduler::handle::{Readiness, Submit};

/// How often a watcher looks.
const WATCH_INTERVAL: Duration = Duration::from_millis(250);

/// Says whether inference is served.
pub struct HealthService {
    submit: Arc<dyn Submit>,
}

impl HealthService {
    /// Asks this scheduler.
    pub fn new(submit: Arc<dyn Submit>) -> Self {
        Self { submit }
    }
}

fn is_known(service: &str) -> bool {
    service.is_empty() || service == SERVICE_NAME
}

fn status_of(submit: &dyn Submit) -> ServingStatus {
    match submit.readiness() {
        Readiness::Serving => ServingStatus::Serving,
        Readiness::NotReady(_) => ServingStatus::NotServing,
    }
}

struct Watching {
    submit: Arc<dyn Submit>,
    interval: Interval,
    is_known: bool,
    last: Option<ServingStatus>,
}

#[tonic::async_trait]
impl Health for HealthService {
    type WatchStream = Pin<Box<dyn Stream<Item = Result<HealthCheckResponse, Status>> + Send>>;

    async fn check(&self, request: Request<HealthCheckRequest>) -> Result<Response<HealthCheckResponse>, Status> {
        if !is_known(&request.get_ref().service) {
            return Err(Status::not_found("no such service"));
        }
        Ok(Response::new(HealthCheckResponse { status: status_of(self.submit.as_ref()).into() }))
    }

    /// Sends the present status at once and every other one as it comes.
    async fn watch(&self, request: Request<HealthCheckRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let mut interval = tokio::time::interval(WATCH_INTERVAL);
        interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let is_known = is_known(&request.get_ref().service);
        let watching = Watching { submit: Arc::clone(&self.submit), interval, is_known, last: None };
        let changes = futures::stream::unfold(watching, |mut watching| async move {
            loop {
                watching.interval.tick().await;
                let unknown = ServingStatus::ServiceUnknown;
                let now = if watching.is_known { status_of(watching.submit.as_ref()) } else { unknown };
                if watching.last.replace(now) != Some(now) {
                    return Some((Ok(HealthCheckResponse { status: now.into() }), watching));
                }
            }
        });
        Ok(Response::new(Box::pin(changes)))
    }
}
