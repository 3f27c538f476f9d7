use std::sync::Mutex;

use phalanx_proto::v1::{Sample, SamplingParams, StepPlan, StepResult};
use tokio::sync::mpsc;

use super::*;
use crate::{
    request::{Finish, Queued, StopConditions},
    text::decode::Detokenize,
};

/// Each token is an "x".
struct Crosses;

impl Detokenize for Crosses {
    fn push(&mut self, _: TokenId) -> Option<String> {
        Some("x".to_owned())
    }

    fn finish(&mut self) -> Option<String> {
        None
    }
}

impl Detokenizers for Crosses {
    fn detokenizer(&self, _: bool, _: &[TokenId]) -> Box<dyn Detokenize> {
        Box::new(Crosses)
    }
}

/// Passes plans to the test.
struct Plans(Mutex<mpsc::UnboundedSender<StepPlan>>);

impl PlanSink for Plans {
    fn send(&self, plan: StepPlan) {
        let _ = self.0.lock().expect("no test panics while it holds the lock").send(plan);
    }

    fn idle(&self, _: u64) {}

    fn recovered(&self, _: u64, _: Duration) {}
}

struct Fixture {
    handle: SchedulerHandle,
    plans: mpsc::UnboundedReceiver<StepPlan>,
    sink: Arc<Plans>,
}

const PATIENCE: Duration = Duration::from_secs(20);

impl Fixture {
    async fn new(max_queued_requests: usize) -> Self {
        let limits = Limits {
            block_size: 4,
            max_step_rows: 64,
            max_running: 1,
            max_model_len: 100,
            vocab: 50,
            prefix_caching: true,
        };
        let detokenizers = Box::new(Crosses);
        let config = SchedulerConfig {
            limits,
            recovery: Recovery::default(),
            eos: vec![0],
            detokenizers,
            max_queued_requests,
            max_queued_tokens: 1000,
            labels: GroupLabels::default(),
        };
        let (handle, _) = SchedulerHandle::spawn(config, None).await.expect("the actor starts");
        let (sender, plans) = mpsc::unbounded_channel();
        Self { handle, plans, sink: Arc::new(Plans(Mutex::new(sender))) }
    }

    fn serve(&self, epoch: u64) {
        let plans: Arc<dyn PlanSink> = Arc::clone(&self.sink) as Arc<dyn PlanSink>;
        self.handle.group_event(GroupEvent::Serving { epoch, n_blocks: 10, plans, kept: None });
    }

    async fn plan(&mut self) -> StepPlan {
        let plan = tokio::time::timeout(PATIENCE, self.plans.recv()).await;
        plan.expect("a plan comes in time").expect("the sink lives")
    }

    /// Every sampling row gives token 7.
    fn finish(&self, plan: &StepPlan) {
        let sampling = plan.chunks.iter().filter(|c| c.sample);
        let samples = sampling.map(|c| Sample { sequence: c.sequence, token_id: 7, ..Sample::default() }).collect();
        let result = StepResult { epoch: plan.epoch, step: plan.step, samples, ..StepResult::default() };
        self.handle.group_event(GroupEvent::Stepped(result));
    }

    async fn status(&self) -> Status {
        self.handle.status(PATIENCE).await.expect("the scheduler answers")
    }
}

fn request(max_tokens: u32) -> Request {
    Request {
        id: "r".to_owned(),
        prompt: vec![1, 2, 3],
        n: 1,
        sampling: SamplingParams::default(),
        max_tokens,
        is_open_ended: false,
        stop: StopConditions::default(),
        deadline: None,
        priority: 0,
        cache_root: phalanx_cluster::seal::Seal::EMPTY,
        resume: Vec::new(),
    }
}

async fn next(stream: &mut RequestStream) -> RequestEvent {
    let event = tokio::time::timeout(PATIENCE, stream.events.recv()).await;
    event.expect("an event comes in time").expect("the stream is open")
}

#[tokio::test]
async fn a_request_is_answered_across_a_lost_group() {
    let mut fixture = Fixture::new(4).await;
    let mut stream = fixture.handle.submit(request(2)).expect("there is room");
    assert!(matches!(fixture.handle.readiness(), Readiness::NotReady(_)));
    fixture.serve(1);
    let first = fixture.plan().await;
    assert_eq!(fixture.handle.readiness(), Readiness::Serving);
    fixture.finish(&first);
    let RequestEvent::Output(output) = next(&mut stream).await else { panic!("a token is awaited") };
    assert_eq!((output.text.as_str(), output.token_ids, output.finish), ("x", vec![7], None));

    fixture.handle.group_event(GroupEvent::Lost { epoch: 1, cause: "rank 1 is gone".to_owned(), is_planned: false });
    assert_eq!(fixture.status().await.n_waiting, 1);
    assert_eq!(fixture.handle.readiness(), Readiness::NotReady("rank 1 is gone".to_owned()));
    fixture.serve(2);
    let replay = loop {
        let plan = fixture.plan().await;
        if plan.epoch == 2 {
            break plan;
        }
    };
    assert_eq!(replay.started[0].token_ids, [1, 2, 3, 7]);
    fixture.finish(&replay);
    let RequestEvent::Output(output) = next(&mut stream).await else { panic!("a token is awaited") };
    assert_eq!(output.finish, Some(Finish::Length));
    assert!(matches!(next(&mut stream).await, RequestEvent::Finished(_)));
    assert!(stream.events.recv().await.is_none(), "the stream ends");
    assert_eq!(fixture.status().await, Status { n_blocks: 10, epoch: Some(2), ..Status::default() });
}

#[tokio::test]
async fn one_request_too_many_is_refused_until_others_run() {
    let mut fixture = Fixture::new(2).await;
    let streams = [1, 2].map(|_| fixture.handle.submit(request(9)).expect("there is room"));
    let refused = fixture.handle.submit(request(9)).map(|_| ());
    assert_eq!(
        refused,
        Err(RequestError::Overloaded {
            waiting: 2,
            limit: 2,
            of: Queued::Requests,
            retry_after: Duration::from_secs(1)
        })
    );
    fixture.serve(1);
    fixture.plan().await;
    fixture.status().await;
    let third = fixture.handle.submit(request(9)).expect("one has left the queue");
    drop(streams);
    drop(third);
    let status = fixture.status().await;
    assert_eq!((status.n_requests, status.n_blocks_used), (0, 0));
    drop([1, 2].map(|_| fixture.handle.submit(request(9)).expect("cancelled requests have left the queue")));
}

#[tokio::test]
async fn a_deadline_passes_without_any_other_event() {
    let fixture = Fixture::new(2).await;
    let deadline = Some(Instant::now() + Duration::from_millis(1));
    let mut stream = fixture.handle.submit(Request { deadline, ..request(9) }).expect("there is room");
    assert!(matches!(next(&mut stream).await, RequestEvent::Failed(RequestError::DeadlineExceeded)));
    assert_eq!(fixture.status().await.n_requests, 0);
}

#[tokio::test]
async fn requests_fail_when_the_scheduler_stops() {
    let fixture = Fixture::new(2).await;
    let mut stream = fixture.handle.submit(request(9)).expect("there is room");
    fixture.status().await;
    fixture.handle.stop();
    assert!(matches!(next(&mut stream).await, RequestEvent::Failed(RequestError::Unavailable(_))));
    assert!(stream.events.recv().await.is_none());
}
