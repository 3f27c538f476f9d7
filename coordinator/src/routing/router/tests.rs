use std::sync::atomic::{AtomicUsize, Ordering};

use phalanx_proto::v1::StepPlan;

use super::*;
use crate::{
    request::{Output, Queued, ResumedChoice, StopConditions, Usage},
    scheduler::handle::PlanSink,
};

/// A scheduler that is played by the test.
#[derive(Default)]
struct Fake {
    taken: Mutex<Vec<(Request, Outbox)>>,
    is_full: Mutex<bool>,
    n_cancelled: Arc<AtomicUsize>,
}

impl Submit for Fake {
    fn submit(&self, request: Request) -> Result<RequestStream, RequestError> {
        if *self.is_full.lock().unwrap() {
            let retry_after = Duration::from_secs(1);
            return Err(RequestError::Overloaded { waiting: 1, limit: 1, of: Queued::Requests, retry_after });
        }
        let (outbox, events) = outbox::channel();
        self.taken.lock().unwrap().push((request, outbox));
        let n_cancelled = Arc::clone(&self.n_cancelled);
        let cancel = move || {
            n_cancelled.fetch_add(1, Ordering::SeqCst);
        };
        Ok(RequestStream { events, _cancel: CancelOnDrop(Some(Box::new(cancel))) })
    }

    fn readiness(&self) -> Readiness {
        Readiness::NotReady("a fake".to_owned())
    }
}

impl Fake {
    fn n_taken(&self) -> usize {
        self.taken.lock().unwrap().len()
    }

    /// Tells the client of the latest request.
    fn tell(&self, token: u32) {
        let output = Output { text: token.to_string(), token_ids: vec![token], ..Output::default() };
        self.taken.lock().unwrap().last().expect("a request was taken").1.send(RequestEvent::Output(output));
    }

    fn finish(&self) {
        let taken = self.taken.lock().unwrap();
        taken.last().expect("a request was taken").1.send(RequestEvent::Finished(Usage::default()));
    }

    fn resumed(&self) -> Vec<ResumedChoice> {
        self.taken.lock().unwrap().last().expect("a request was taken").0.resume.clone()
    }
}

struct NoPlans;

impl PlanSink for NoPlans {
    fn send(&self, _plan: StepPlan) {}

    fn idle(&self, _epoch: u64) {}

    fn recovered(&self, _epoch: u64, _stall: Duration) {}
}

struct Fixture {
    router: Router,
    groups: [Arc<Fake>; 2],
}

impl Fixture {
    fn new() -> Self {
        let groups = [Arc::<Fake>::default(), Arc::default()];
        let settings =
            Settings { groups: 2, block_size: 16, prefix_caching: true, leave_after: Duration::from_millis(20) };
        let submits = groups.iter().map(|group| Arc::clone(group) as Arc<dyn Submit>).collect();
        let fixture = Self { router: Router::new(settings, submits), groups };
        fixture.serve(0);
        fixture.serve(1);
        fixture
    }

    fn serve(&self, group: usize) {
        let plans = Arc::new(NoPlans);
        self.router.group_event(group, &GroupEvent::Serving { epoch: 1, n_blocks: 10, plans, kept: None });
    }

    fn lose(&self, group: usize) {
        let lost = GroupEvent::Lost { epoch: 1, cause: "it is gone".to_owned(), is_planned: false };
        self.router.group_event(group, &lost);
    }

    fn load(&self) -> Vec<usize> {
        let demand = self.router.0.machine().demand(&request());
        self.router.0.machine().choose(&demand)
    }
}

fn request() -> Request {
    Request {
        id: "r".to_owned(),
        prompt: vec![1, 2, 3],
        n: 1,
        sampling: Default::default(),
        max_tokens: 100,
        is_open_ended: false,
        stop: StopConditions::default(),
        deadline: None,
        priority: 0,
        cache_root: phalanx_cluster::seal::Seal::EMPTY,
        resume: Vec::new(),
    }
}

async fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !condition() {
        assert!(Instant::now() < deadline, "waited in vain until {what}");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

async fn token(stream: &mut RequestStream) -> Option<u32> {
    match stream.events.recv().await? {
        RequestEvent::Output(output) => Some(output.token_ids[0]),
        RequestEvent::Finished(_) => None,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_request_goes_on_at_another_group_without_a_token_twice() {
    let fixture = Fixture::new();
    let [first, second] = &fixture.groups;
    let mut stream = fixture.router.submit(request()).unwrap();
    first.tell(7);
    first.tell(8);
    assert_eq!((token(&mut stream).await, token(&mut stream).await), (Some(7), Some(8)));
    fixture.lose(0);
    eventually("the other group has it", || second.n_taken() == 1).await;
    assert_eq!(second.resumed(), [ResumedChoice { tokens: vec![7, 8], scores: Vec::new() }]);
    assert_eq!(first.n_cancelled.load(Ordering::SeqCst), 1, "its own group forgets it");
    // Nothing that the first group says counts any more.
    first.tell(99);
    [7, 8, 9].into_iter().for_each(|token| second.tell(token));
    second.finish();
    assert_eq!((token(&mut stream).await, token(&mut stream).await), (Some(9), None));
    fixture.serve(0);
    eventually("nobody has load", || fixture.load() == [0, 1]).await;
}

#[tokio::test]
async fn a_short_absence_changes_nothing() {
    let fixture = Fixture::new();
    let mut stream = fixture.router.submit(request()).unwrap();
    fixture.lose(0);
    fixture.serve(0);
    // Long after it would have left.
    tokio::time::sleep(Duration::from_millis(60)).await;
    fixture.groups[0].tell(7);
    assert_eq!(token(&mut stream).await, Some(7));
    assert_eq!(fixture.groups[1].n_taken(), 0);
}

#[tokio::test]
async fn a_request_moves_twice_without_a_token_and_then_stays() {
    let fixture = Fixture::new();
    let [first, second] = &fixture.groups;
    let mut stream = fixture.router.submit(request()).unwrap();
    fixture.lose(0);
    eventually("the second group has it", || second.n_taken() == 1).await;
    fixture.serve(0);
    fixture.lose(1);
    eventually("the first group has it again", || first.n_taken() == 2).await;
    fixture.serve(1);
    fixture.lose(0);
    tokio::time::sleep(Duration::from_millis(60)).await;
    assert_eq!(second.n_taken(), 1, "it may be the cause of all this");
    // A token shows that it is not.
    fixture.serve(0);
    first.tell(7);
    assert_eq!(token(&mut stream).await, Some(7));
    fixture.lose(0);
    eventually("the second group has it again", || second.n_taken() == 2).await;
}

#[tokio::test]
async fn a_full_group_is_passed_by_and_a_full_cluster_says_so() {
    let fixture = Fixture::new();
    *fixture.groups[0].is_full.lock().unwrap() = true;
    let _stream = fixture.router.submit(request()).unwrap();
    assert_eq!(fixture.groups[1].n_taken(), 1);
    *fixture.groups[1].is_full.lock().unwrap() = true;
    assert!(matches!(fixture.router.submit(request()), Err(RequestError::Overloaded { .. })));
}

#[tokio::test]
async fn a_request_that_no_other_group_takes_goes_on_at_its_own() {
    let fixture = Fixture::new();
    let mut stream = fixture.router.submit(request()).unwrap();
    *fixture.groups[1].is_full.lock().unwrap() = true;
    fixture.lose(0);
    tokio::time::sleep(Duration::from_millis(60)).await;
    fixture.serve(0);
    fixture.groups[0].tell(7);
    assert_eq!(token(&mut stream).await, Some(7));
    fixture.groups[0].finish();
    assert_eq!(token(&mut stream).await, None);
}

#[tokio::test]
async fn whoever_goes_away_is_cancelled_and_no_load() {
    let fixture = Fixture::new();
    let stream = fixture.router.submit(request()).unwrap();
    assert_eq!(fixture.load(), [1, 0]);
    drop(stream);
    eventually("the group hears of it", || fixture.groups[0].n_cancelled.load(Ordering::SeqCst) == 1).await;
    eventually("it is no load any more", || fixture.load() == [0, 1]).await;
}
