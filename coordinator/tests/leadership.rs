//! Coordinators that share a store: who leads, who follows, what a silent store and a dead leader change.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use futures::{StreamExt, stream::BoxStream};
use phalanx_cluster::store::{
    Expected, LeaseId, Listing, MembershipStore, Record, Revision, StoreError, Swap, Watch, embedded::EmbeddedStore,
};
use phalanx_coordinator::leadership::{
    CoordinatorRecord, LeadershipView, View,
    actor::{LeadershipConfig, LeadershipHandle, StoreSource},
    follower,
    journal_feed::{JournalFeed, ReplicatedJournal},
    service::{FeedSlot, LeadershipService},
    standby::{LEADER_METADATA, StandbyCluster},
};
use phalanx_proto::dial::Dialer;
use phalanx_proto::v1::{
    JournalBegan, JournalEntry, JournalSynced, JournalTokens, LeaderRequest, LeaderResponse, StatusRequest,
    cluster_client::ClusterClient, journal_entry::What, leadership_client::LeadershipClient,
};
use tokio::{
    net::TcpListener,
    runtime::Runtime,
    time::{sleep, timeout},
};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::Code;

/// Longest that anything may take; reached by failing tests only.
const PATIENCE: Duration = Duration::from_secs(120);
/// Between looks.
const POLL: Duration = Duration::from_millis(10);
/// A lease that no pause of a busy machine ends.
const LONG_TTL: Duration = Duration::from_secs(60);
const SHORT_TTL: Duration = Duration::from_millis(500);

/// A connection to a store that can be cut.
struct Cuttable {
    store: Arc<dyn MembershipStore>,
    is_cut: AtomicBool,
}

impl Cuttable {
    fn new(store: Arc<dyn MembershipStore>) -> Arc<Self> {
        Arc::new(Self { store, is_cut: AtomicBool::new(false) })
    }

    fn cut(&self, is_cut: bool) {
        self.is_cut.store(is_cut, Ordering::SeqCst);
    }

    fn there(&self) -> Result<&dyn MembershipStore, StoreError> {
        if self.is_cut.load(Ordering::SeqCst) {
            return Err(StoreError::Unavailable { at: "test".to_owned(), reason: "cut".to_owned() });
        }
        Ok(&*self.store)
    }
}

#[async_trait]
impl MembershipStore for Cuttable {
    async fn put(&self, key: &str, value: Vec<u8>, lease: Option<LeaseId>) -> Result<Revision, StoreError> {
        self.there()?.put(key, value, lease).await
    }

    async fn get(&self, key: &str) -> Result<Option<Record>, StoreError> {
        self.there()?.get(key).await
    }

    async fn list(&self, prefix: &str) -> Result<Listing, StoreError> {
        self.there()?.list(prefix).await
    }

    async fn delete(&self, key: &str) -> Result<bool, StoreError> {
        self.there()?.delete(key).await
    }

    async fn compare_and_swap(
        &self,
        key: &str,
        expected: Expected,
        value: Vec<u8>,
        lease: Option<LeaseId>,
    ) -> Result<Swap, StoreError> {
        self.there()?.compare_and_swap(key, expected, value, lease).await
    }

    async fn grant_lease(&self, ttl: Duration) -> Result<LeaseId, StoreError> {
        self.there()?.grant_lease(ttl).await
    }

    async fn keep_alive(&self, lease: LeaseId) -> Result<(), StoreError> {
        self.there()?.keep_alive(lease).await
    }

    async fn revoke_lease(&self, lease: LeaseId) -> Result<(), StoreError> {
        self.there()?.revoke_lease(lease).await
    }

    async fn watch(&self, _prefix: &str, _after: Revision) -> Result<Watch, StoreError> {
        // Whoever is cut off hears of nothing: looks alone must do.
        Err(StoreError::Unavailable { at: "test".to_owned(), reason: "no watches".to_owned() })
    }
}

async fn store() -> Arc<dyn MembershipStore> {
    Arc::new(EmbeddedStore::open(None, 64).await.unwrap())
}

fn record(name: &str) -> CoordinatorRecord {
    CoordinatorRecord { coordinator_id: name.to_owned(), grpc_address: name.to_owned(), ..CoordinatorRecord::default() }
}

fn candidate(store: &Arc<dyn MembershipStore>, me: CoordinatorRecord, ttl: Duration) -> LeadershipHandle {
    let store = StoreSource::Shared(Arc::clone(store));
    LeadershipHandle::start(LeadershipConfig { me, ttl, is_alone: false, store }).unwrap()
}

async fn until(mut view: LeadershipView, what: &str, condition: impl FnMut(&View) -> bool) -> View {
    let last = view.get();
    timeout(PATIENCE, view.wait_for(condition))
        .await
        .unwrap_or_else(|_| panic!("waited in vain until {what}: {last:?}"))
}

async fn leads(candidate: &LeadershipHandle) -> u64 {
    let view = until(candidate.view(), "it leads", |v| v.session.is_some()).await;
    view.session.unwrap().term
}

async fn follows(candidate: &LeadershipHandle, name: &str) -> u64 {
    let is_followed =
        |v: &View| v.session.is_none() && v.leader.as_ref().is_some_and(|l| l.record.coordinator_id == name);
    until(candidate.view(), "it follows", is_followed).await.leader.unwrap().term
}

#[tokio::test(flavor = "multi_thread")]
async fn one_leads_and_the_next_one_follows() {
    let store = store().await;
    let a = candidate(&store, record("a"), LONG_TTL);
    let first = leads(&a).await;
    let b = candidate(&store, record("b"), LONG_TTL);
    assert_eq!(follows(&b, "a").await, first);
    let both = until(a.view(), "both are registered", |v| v.coordinators.len() == 2).await;
    assert_eq!(both.listed().iter().map(|c| c.role.as_str()).collect::<Vec<_>>(), ["leader", "standby"]);
    assert_eq!(both.others().map(|c| c.coordinator_id.as_str()).collect::<Vec<_>>(), ["b"]);

    // Who resigns is succeeded at once, in a greater term, and is known no more.
    a.resign().await;
    let second = leads(&b).await;
    assert!(second > first);
    assert_eq!(follows(&a, "b").await, second);
    until(b.view(), "a is gone", |v| v.coordinators.len() == 1).await;

    // Stepping down is no farewell.
    let c = candidate(&store, record("c"), LONG_TTL);
    follows(&c, "b").await;
    b.step_down();
    let third = leads(&c).await;
    assert!(third > second);
    assert_eq!(follows(&b, "c").await, third);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lease_that_nobody_renews_is_another_ones_chance() {
    let store = store().await;
    let a = candidate(&store, record("a"), SHORT_TTL);
    leads(&a).await;
    let b = candidate(&store, record("b"), SHORT_TTL);
    let first = follows(&b, "a").await;
    // Its thread ends without a word, as if it was killed.
    drop(a);
    assert!(leads(&b).await > first);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_without_its_store_leads_on_and_takes_its_key_again() {
    let store = store().await;
    let cuttable = Cuttable::new(Arc::clone(&store));
    let connection: Arc<dyn MembershipStore> = cuttable.clone();
    let a = candidate(&connection, record("a"), SHORT_TTL);
    let first = leads(&a).await;
    cuttable.cut(true);
    // The lease ends, and with it the key.
    let gone = async {
        while store.get("leader").await.unwrap().is_some() {
            sleep(POLL).await;
        }
    };
    timeout(PATIENCE, gone).await.expect("the lease ends");
    assert_eq!(a.view().session().map(|s| (s.number, s.term)), Some((1, first)));
    cuttable.cut(false);
    let view = until(a.view(), "it has a new term", |v| v.session.is_some_and(|s| s.term > first)).await;
    assert_eq!(view.session.unwrap().number, 1, "nothing was dropped");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_without_its_store_believes_who_knows_a_greater_term() {
    let store = store().await;
    let cuttable = Cuttable::new(Arc::clone(&store));
    let connection: Arc<dyn MembershipStore> = cuttable.clone();
    let a = candidate(&connection, record("a"), SHORT_TTL);
    let first = leads(&a).await;
    // Whoever asks the store learns that it is wrong.
    a.challenge(first + 1000);
    cuttable.cut(true);
    let b = candidate(&store, record("b"), LONG_TTL);
    let second = leads(&b).await;
    assert!(second > first);
    a.challenge(second);
    until(a.view(), "it steps down", |v| v.session.is_none()).await;
    cuttable.cut(false);
    assert_eq!(follows(&a, "b").await, second);
}

/// A coordinator's services on a socket of its own.
struct Node {
    leadership: LeadershipHandle,
    journal: Arc<ReplicatedJournal>,
    address: String,
    /// All of its sockets.
    runtime: DropLater,
}

/// A runtime may not be dropped where others run.
struct DropLater(Option<Runtime>);

impl DropLater {
    fn shutdown_background(mut self) {
        self.0.take().unwrap().shutdown_background();
    }
}

impl Drop for DropLater {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

/// Says what it was given, then waits.
struct Said(Vec<JournalEntry>);

impl JournalFeed for Said {
    fn subscribe(&self) -> BoxStream<'static, JournalEntry> {
        futures::stream::iter(self.0.clone()).chain(futures::stream::pending()).boxed()
    }
}

impl Node {
    async fn start(store: &Arc<dyn MembershipStore>, says: Vec<JournalEntry>) -> Self {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let leadership = candidate(store, record(&address), LONG_TTL);
        let feed = FeedSlot::default();
        feed.set(Some(Arc::new(Said(says))));
        let services = tonic::transport::Server::builder()
            .add_service(LeadershipService::server(leadership.clone(), feed))
            .add_service(StandbyCluster::server(Dialer::default(), leadership.view()));
        runtime.spawn(async move {
            let listener = TcpListener::from_std(listener).unwrap();
            services.serve_with_incoming(TcpListenerStream::new(listener)).await.unwrap();
        });
        let journal = Arc::new(ReplicatedJournal::default());
        runtime.spawn(follower::follow(Dialer::default(), leadership.clone(), journal.clone()));
        Self { leadership, journal, address, runtime: DropLater(Some(runtime)) }
    }

    async fn asked(&self, known_term: u64) -> LeaderResponse {
        let mut client = LeadershipClient::connect(format!("http://{}", self.address)).await.unwrap();
        client.leader(LeaderRequest { known_term }).await.unwrap().into_inner()
    }
}

fn journal() -> Vec<JournalEntry> {
    let entry = |key: &str, what| JournalEntry { key: key.to_owned(), what: Some(what) };
    vec![
        entry("k", What::Began(JournalBegan { request_hash: vec![1], choices: 1, seed: 5 })),
        entry("k", What::Tokens(JournalTokens { choice: 0, token_ids: vec![7, 8], scores: Vec::new() })),
        entry("", What::Synced(JournalSynced {})),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn a_standby_has_the_journal_and_takes_over_from_the_dead_at_once() {
    let store = store().await;
    let a = Node::start(&store, journal()).await;
    let first = leads(&a.leadership).await;
    let b = Node::start(&store, Vec::new()).await;
    follows(&b.leadership, &a.address).await;

    let asked = (a.asked(0).await, b.asked(0).await);
    assert_eq!((asked.0.term, asked.0.is_leader, asked.1.term, asked.1.is_leader), (first, true, first, false));
    assert_eq!(asked.1.grpc_address, a.address);
    let copied = async {
        while b.journal.get("k").is_none_or(|r| r.choices[0].token_ids != [7, 8]) {
            sleep(POLL).await;
        }
    };
    timeout(PATIENCE, copied).await.expect("the journal is copied");
    assert_eq!(b.journal.get("k").unwrap().seed, 5);

    // Its sockets close, its lease lives: nobody waits a minute for that.
    a.runtime.shutdown_background();
    let second = leads(&b.leadership).await;
    assert!(second > first);
    assert!(b.journal.get("k").is_some());
    // It was not dead after all: it finds out.
    assert_eq!(follows(&a.leadership, &b.address).await, second);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_standby_says_who_leads() {
    let store = store().await;
    let a = Node::start(&store, Vec::new()).await;
    leads(&a.leadership).await;
    let b = Node::start(&store, Vec::new()).await;
    follows(&b.leadership, &a.address).await;
    let mut client = ClusterClient::connect(format!("http://{}", b.address)).await.unwrap();
    let refused = client.attach(futures::stream::pending()).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    let leader = refused.metadata().get(LEADER_METADATA).unwrap().to_str().unwrap();
    assert_eq!(leader, format!("http://{}", a.address));
    // Passed on once: what answers at the leader's address here is no leader's service.
    let status = client.status(StatusRequest {}).await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition);
}
