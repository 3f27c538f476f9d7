//! The `Cluster` service with its actors, over real sockets, with shards that the tests play.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use phalanx_cluster::store::{MembershipStore, embedded::EmbeddedStore};
use phalanx_coordinator::{
    admin::status::StatusSource,
    group::{
        actor::{GroupConfig, Notice},
        machine::{MirrorTo, Settings},
    },
    leadership::{
        CoordinatorRecord, LeadershipView,
        shards::{ShardKeeper, ShardRecord, recorded},
    },
    membership::actor::{Membership, MembershipMsg},
    metrics::GroupLabels,
    scheduler::handle::GroupEvent,
    shard_link::ClusterService,
};
use phalanx_proto::v1::{
    CoordinatorMessage, Failed, Form, Hello, Loaded, Ready, ShardMessage, StatusRequest, StatusResponse, StepPlan,
    StepResult, cluster_client::ClusterClient, coordinator_message::Message as FromCoordinator,
    shard_message::Message as ToCoordinator,
};
use ractor::{Actor, ActorRef, rpc::CallResult};
use tokio::{net::TcpListener, sync::mpsc, time::timeout};
use tokio_stream::wrappers::{TcpListenerStream, UnboundedReceiverStream};
use tonic::{Code, Status, Streaming};

/// Longest that anything may take; reached by failing tests only.
const PATIENCE: Duration = Duration::from_secs(60);

/// A coordinator's part in this, on a free port.
struct Coordinator {
    address: String,
    events: mpsc::UnboundedReceiver<GroupEvent>,
    notices: mpsc::UnboundedReceiver<Notice>,
    membership: ActorRef<MembershipMsg>,
    store: Arc<dyn MembershipStore>,
}

impl Coordinator {
    async fn start(world_size: usize, heartbeat_timeout: Duration) -> Self {
        let (sender, events) = mpsc::unbounded_channel();
        let (notice_sender, notices) = mpsc::unbounded_channel();
        let store: Arc<dyn MembershipStore> = Arc::new(EmbeddedStore::open(None, 64).await.unwrap());
        let config = GroupConfig {
            index: 0,
            labels: GroupLabels::default(),
            settings: Settings {
                world_size,
                give_up_after: Some(1),
                regroup_after: None,
                mirror_to: MirrorTo::Nowhere,
                silent_after: PATIENCE,
            },
            name: "model".to_owned(),
            form: Form { model: "m.gguf".to_owned(), block_size: 16, ..Form::default() },
            expected: (BTreeMap::new(), Instant::now()),
            leads: Box::new(|| true),
            store: Arc::clone(&store),
            scheduler: Box::new(move |event| drop(sender.send(event))),
            notices: notice_sender,
            loading: Arc::default(),
            serving: Mutex::new(None),
        };
        let (membership, _) = Actor::spawn(None, Membership, vec![config]).await.unwrap();
        let CallResult::Success(groups) = membership.call(MembershipMsg::Groups, Some(PATIENCE)).await.unwrap() else {
            panic!("membership does not answer")
        };
        let service = {
            let record = CoordinatorRecord { coordinator_id: "c".to_owned(), ..CoordinatorRecord::default() };
            let view = LeadershipView::alone(record, 7);
            let (keeper, registry) = ShardKeeper::new();
            tokio::spawn(keeper.run(Arc::clone(&store), PATIENCE, view.clone()));
            let status = StatusSource::new(groups.clone(), Vec::new(), view.clone()).with_leases(registry.clone());
            ClusterService::server(membership.clone(), groups, status, heartbeat_timeout, view, registry, None)
        };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let server = tonic::transport::Server::builder().add_service(service);
        tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
        Self { address, events, notices, membership, store }
    }

    async fn event(&mut self) -> GroupEvent {
        timeout(PATIENCE, self.events.recv()).await.expect("an event comes").expect("the group lives")
    }

    /// Waits until the store has these records.
    async fn records(&self, holds: impl Fn(&[ShardRecord]) -> bool) -> Vec<ShardRecord> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let records = recorded(&*self.store).await.unwrap();
            if holds(&records) {
                return records;
            }
            assert!(Instant::now() < deadline, "the store still has {records:?}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    async fn status(&self) -> StatusResponse {
        let mut client = ClusterClient::connect(self.address.clone()).await.unwrap();
        client.status(StatusRequest {}).await.unwrap().into_inner()
    }
}

fn hello(shard_id: &str, incarnation: u64) -> Hello {
    Hello {
        shard_id: shard_id.to_owned(),
        incarnation,
        host_id: "here".to_owned(),
        pid: 7,
        device: "cpu".to_owned(),
        threads: 1,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        fingerprint: "f".to_owned(),
        ..Hello::default()
    }
}

/// A shard that does what the test says.
struct FakeShard {
    sender: mpsc::UnboundedSender<ShardMessage>,
    stream: Streaming<CoordinatorMessage>,
}

impl FakeShard {
    async fn open(coordinator: &Coordinator, first: ToCoordinator) -> Result<Self, Status> {
        let mut client = ClusterClient::connect(coordinator.address.clone()).await.unwrap();
        let (sender, receiver) = mpsc::unbounded_channel();
        sender.send(ShardMessage { message: Some(first) }).unwrap();
        let stream = client.attach(UnboundedReceiverStream::new(receiver)).await?.into_inner();
        Ok(Self { sender, stream })
    }

    async fn attach(coordinator: &Coordinator, shard_id: &str, incarnation: u64) -> Result<Self, Status> {
        Self::open(coordinator, ToCoordinator::Hello(hello(shard_id, incarnation))).await
    }

    fn say(&self, message: ToCoordinator) {
        self.sender.send(ShardMessage { message: Some(message) }).unwrap();
    }

    /// The next message that is no greeting and no heartbeat.
    async fn hear(&mut self) -> FromCoordinator {
        loop {
            let message = timeout(PATIENCE, self.stream.message()).await.expect("a message comes").unwrap();
            match message.expect("the stream goes on").message.unwrap() {
                FromCoordinator::Welcome(_) | FromCoordinator::Heartbeat(_) => {}
                message => return message,
            }
        }
    }

    async fn hear_form(&mut self) -> Form {
        match self.hear().await {
            FromCoordinator::Form(form) => form,
            other => panic!("want Form, got {other:?}"),
        }
    }

    /// Waits for the end of the stream.
    async fn hear_end(&mut self) {
        let end = async { while let Ok(Some(_)) = self.stream.message().await {} };
        timeout(PATIENCE, end).await.expect("the stream ends");
    }
}

/// Loads and gets ready; returns what was formed.
async fn load(shards: &mut [&mut FakeShard], kv_blocks: &[u32]) -> Vec<Form> {
    let mut forms = Vec::new();
    for (shard, kv_blocks) in shards.iter_mut().zip(kv_blocks) {
        let form = shard.hear_form().await;
        let loaded = Loaded {
            epoch: form.epoch,
            weight_bytes: 100,
            kv_blocks: *kv_blocks,
            kv_bytes_per_block: 10,
            ..Loaded::default()
        };
        shard.say(ToCoordinator::Loaded(loaded));
        forms.push(form);
    }
    for shard in shards {
        let FromCoordinator::Serve(serve) = shard.hear().await else { panic!("want Serve") };
        assert_eq!(serve.kv_blocks, *kv_blocks.iter().min().unwrap());
        shard.say(ToCoordinator::Ready(Ready { epoch: serve.epoch, kv_bytes: 70, resident_bytes: 200 }));
    }
    forms
}

fn result(epoch: u64, step: u64) -> ToCoordinator {
    ToCoordinator::StepResult(StepResult { epoch, step, ..StepResult::default() })
}

#[tokio::test]
async fn shards_form_a_group_and_step() {
    let mut coordinator = Coordinator::start(2, PATIENCE).await;
    assert_eq!(coordinator.status().await.phase, "waiting");
    let mut b = FakeShard::attach(&coordinator, "b", 1).await.unwrap();
    let mut a = FakeShard::attach(&coordinator, "a", 1).await.unwrap();
    let forms = load(&mut [&mut a, &mut b], &[9, 7]).await;
    assert_eq!((forms[0].rank, forms[1].rank, forms[0].world_size), (0, 1, 2));
    assert_eq!(forms[0].peers, forms[1].peers);
    assert_eq!(forms[0].peers.iter().map(|p| p.shard_id.as_str()).collect::<Vec<_>>(), ["a", "b"]);
    assert_eq!((forms[0].collective_secret.len(), forms[0].model.as_str()), (32, "m.gguf"));
    assert_eq!(forms[0].collective_secret, forms[1].collective_secret);

    let GroupEvent::Serving { epoch: 1, n_blocks: 7, plans, .. } = coordinator.event().await else { panic!("serving") };
    plans.send(StepPlan { epoch: 1, step: 1, ..StepPlan::default() });
    for shard in [&mut a, &mut b] {
        assert!(matches!(shard.hear().await, FromCoordinator::StepPlan(plan) if plan.step == 1));
    }
    // Rank 1's result, and one of another epoch, are not the scheduler's business.
    b.say(result(1, 1));
    a.say(result(9, 1));
    a.say(result(1, 2));
    assert!(matches!(coordinator.event().await, GroupEvent::Stepped(r) if r.step == 2));

    let status = coordinator.status().await;
    assert_eq!((status.epoch, status.phase.as_str(), status.world_size), (1, "serving", 2));
    let members: Vec<_> =
        status.members.iter().map(|m| (m.shard_id.as_str(), m.rank, m.weight_bytes, m.kv_bytes)).collect();
    assert_eq!(members, [("a", Some(0), 100, 70), ("b", Some(1), 100, 70)]);
}

#[tokio::test]
async fn a_broken_stream_is_a_loss_and_its_shard_gets_its_rank_back() {
    let mut coordinator = Coordinator::start(2, PATIENCE).await;
    let mut a = FakeShard::attach(&coordinator, "a", 1).await.unwrap();
    let mut b = FakeShard::attach(&coordinator, "b", 1).await.unwrap();
    let first = load(&mut [&mut a, &mut b], &[5, 5]).await;
    let GroupEvent::Serving { plans, .. } = coordinator.event().await else { panic!("serving") };

    drop(a);
    let GroupEvent::Lost { epoch: 1, cause, .. } = coordinator.event().await else { panic!("lost") };
    assert!(cause.contains("rank 0 (a)"), "{cause}");
    assert!(matches!(b.hear().await, FromCoordinator::Retire(r) if r.epoch == 1));
    plans.send(StepPlan { epoch: 1, step: 1, ..StepPlan::default() });

    let mut a = FakeShard::attach(&coordinator, "a", 2).await.unwrap();
    let second = load(&mut [&mut a, &mut b], &[5, 5]).await;
    assert_eq!((second[0].epoch, second[0].rank, second[1].rank), (2, 0, 1), "and b never saw the late plan");
    assert_ne!(second[0].collective_secret, first[0].collective_secret);
    assert!(matches!(coordinator.event().await, GroupEvent::Serving { epoch: 2, .. }));
}

#[tokio::test]
async fn a_silent_shard_is_a_loss() {
    let mut coordinator = Coordinator::start(1, Duration::from_millis(200)).await;
    let mut shard = FakeShard::attach(&coordinator, "a", 1).await.unwrap();
    load(&mut [&mut shard], &[5]).await;
    assert!(matches!(coordinator.event().await, GroupEvent::Serving { .. }));
    let GroupEvent::Lost { cause, .. } = coordinator.event().await else { panic!("lost") };
    assert!(cause.contains("silent"), "{cause}");
    shard.hear_end().await;
}

#[tokio::test]
async fn who_does_not_fit_is_refused() {
    let coordinator = Coordinator::start(2, PATIENCE).await;
    let refused = async |first: ToCoordinator| FakeShard::open(&coordinator, first).await.err().expect("refused");
    let old = refused(ToCoordinator::Hello(Hello { version: "0.0.1".to_owned(), ..hello("a", 1) })).await;
    assert_eq!(old.code(), Code::FailedPrecondition);
    assert!(old.message().contains("0.0.1"), "{old}");
    let unnamed = refused(ToCoordinator::Hello(hello("a/b", 1))).await;
    assert_eq!(unnamed.code(), Code::InvalidArgument);
    let rude = refused(result(1, 1)).await;
    assert_eq!(rude.code(), Code::InvalidArgument);

    let _a = FakeShard::attach(&coordinator, "a", 1).await.unwrap();
    let twin = refused(ToCoordinator::Hello(hello("a", 2))).await;
    assert_eq!(twin.code(), Code::AlreadyExists);
    assert!(twin.message().contains("--shard-id"), "{twin}");
}

#[tokio::test]
async fn a_shard_that_dials_again_replaces_its_own_stream() {
    let coordinator = Coordinator::start(1, PATIENCE).await;
    let mut first = FakeShard::attach(&coordinator, "a", 1).await.unwrap();
    assert_eq!(first.hear_form().await.epoch, 1);
    let mut second = FakeShard::attach(&coordinator, "a", 1).await.unwrap();
    first.hear_end().await;
    assert_eq!(second.hear_form().await.epoch, 2);
    // The end of the old stream does not take the new one with it.
    assert_eq!(coordinator.status().await.members.len(), 1);
}

#[tokio::test]
async fn a_model_that_no_shard_can_load_is_given_up() {
    let mut coordinator = Coordinator::start(1, PATIENCE).await;
    let mut shard = FakeShard::attach(&coordinator, "a", 1).await.unwrap();
    let epoch = shard.hear_form().await.epoch;
    shard.say(ToCoordinator::Failed(Failed { epoch, step: 0, error: "unknown architecture \"x\"".to_owned() }));
    let notice = timeout(PATIENCE, coordinator.notices.recv()).await.unwrap().unwrap();
    assert!(
        matches!(&notice, Notice::GiveUp { cause, .. } if cause.contains("unknown architecture \"x\"")),
        "{notice:?}"
    );
}

#[tokio::test]
async fn shards_are_told_to_shut_down() {
    let coordinator = Coordinator::start(2, PATIENCE).await;
    let mut shard = FakeShard::attach(&coordinator, "a", 1).await.unwrap();
    let shutdown = |reply| MembershipMsg::Shutdown { reason: "end".to_owned(), reply };
    coordinator.membership.call(shutdown, Some(PATIENCE)).await.unwrap();
    assert!(matches!(shard.hear().await, FromCoordinator::Shutdown(s) if s.reason == "end"));
}

#[tokio::test]
async fn attached_shards_have_a_record_in_the_store() {
    let coordinator = Coordinator::start(2, PATIENCE).await;
    let first = FakeShard::attach(&coordinator, "a", 1).await.unwrap();
    let _b = FakeShard::attach(&coordinator, "b", 5).await.unwrap();
    let records = coordinator.records(|r| r.len() == 2).await;
    assert_eq!((records[0].shard_id.as_str(), records[1].incarnation), ("a", 5));
    assert_eq!((records[0].host.as_str(), records[0].coordinator_id.as_str(), records[0].term), ("127.0.0.1", "c", 7));
    let shows = async || coordinator.status().await.members.iter().map(|m| m.lease_ms.is_some()).collect::<Vec<_>>();
    while shows().await != [true, true] {
        tokio::task::yield_now().await;
    }
    drop(first);
    coordinator.records(|r| r.len() == 1 && r[0].shard_id == "b").await;
}
