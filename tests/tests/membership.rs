//! Shards in the store: each that is attached has a record under a lease, and losing the store loses nobody.

use std::{sync::Arc, thread, time::Duration};

use phalanx_cluster::store::{self, MembershipStore, OpenOptions, Record};
use phalanx_proto::v1::{StatusRequest, StatusResponse, cluster_client::ClusterClient};
use phalanx_tests::{
    client::{generate, greedy},
    faults::etcd::Etcd,
    model_cache::{SMOLLM2, model},
    process::{Cluster, PATIENCE, Process},
};
use rustix::process::Signal;
use serde_json::Value;
use tokio::time::{Instant, sleep};

const PROMPT: [u32; 5] = [504, 3575, 282, 4649, 314];
/// Nobody counts as silent, however busy this machine is.
const COMMON: &[&str] = &[
    "--local-shards",
    "0",
    "--tensor-parallel-size",
    "1",
    "--kv-cache-memory",
    "64MiB",
    "--heartbeat-timeout-ms",
    "600000",
];
/// How long the store is away.
const OUTAGE: Duration = Duration::from_secs(5);

/// Polls until something holds.
async fn until<T>(what: &str, mut look: impl AsyncFnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look().await {
            return found;
        }
        assert!(Instant::now() < deadline, "waited in vain until {what}");
        sleep(Duration::from_millis(25)).await;
    }
}

struct Setup {
    cluster: Cluster,
    etcd: Etcd,
    store: Arc<dyn MembershipStore>,
}

impl Setup {
    async fn start(args: &[&str]) -> Self {
        let etcd = Etcd::start(1).unwrap();
        let url = etcd.url();
        let store = store::open(&url, &OpenOptions::default()).await.unwrap();
        let store_options = ["--store", &url];
        let mut cluster = Cluster::launch(&model(SMOLLM2), &[&store_options, COMMON, args].concat());
        cluster.wait_listening();
        Self { cluster, etcd, store }
    }

    /// Starts a shard and waits until it has a record.
    async fn shard(&self, name: &str) -> Process {
        let args = ["--coordinator", &self.cluster.grpc, "--threads", "1", "--shard-id", name];
        let process = Process::start("shard", &args.map(str::to_owned));
        self.record(name, |record| record.is_some()).await;
        process
    }

    /// Waits for what is to be true of a shard's record.
    async fn record(&self, shard: &str, holds: impl Fn(Option<&Record>) -> bool) -> Option<Record> {
        let key = format!("shards/{shard}");
        let look = async || self.store.get(&key).await.ok().filter(|found| holds(found.as_ref()));
        until(&format!("the record of {shard} is right"), look).await
    }

    async fn status(&self) -> Option<StatusResponse> {
        let mut client = ClusterClient::connect(self.cluster.grpc.clone()).await.ok()?;
        Some(client.status(StatusRequest {}).await.ok()?.into_inner())
    }
}

fn json(record: &Record) -> Value {
    serde_json::from_slice(&record.value).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shard_has_a_record_from_its_arrival_to_its_end() {
    // Longer than anything here may take: no record goes by itself.
    let mut setup = Setup::start(&["--leader-ttl-ms", "600000"]).await;
    let east = setup.shard("east").await;
    let mut west = setup.shard("west").await;
    setup.cluster.wait_ready();

    let record = setup.record("east", |r| r.is_some()).await.unwrap();
    assert!(record.lease.is_some(), "{record:?}");
    let said = json(&record);
    assert_eq!((&said["shard_id"], &said["pid"]), (&"east".into(), &east.pid().into()));
    assert_eq!((&said["host"], &said["device"], &said["threads"]), (&"127.0.0.1".into(), &"cpu".into(), &1.into()));
    let leader = setup.store.get("leader").await.unwrap().unwrap();
    assert_eq!(
        (&said["coordinator_id"], &said["term"]),
        (&json(&leader)["coordinator_id"], &leader.mod_revision.into())
    );
    assert!(!String::from_utf8_lossy(&record.value).contains("secret"), "{said}");
    let status = setup.status().await.unwrap();
    assert_eq!(status.members.len(), 2);
    assert!(status.members.iter().all(|m| m.lease_ms.is_some()), "{status:?}");

    east.signal(Signal::KILL);
    setup.record("east", |r| r.is_none()).await;
    west.signal(Signal::TERM);
    assert!(west.wait().success());
    setup.record("west", |r| r.is_none()).await;
    assert!(setup.store.get("leader").await.unwrap().is_some(), "the leader's lease lives on");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_is_away_detaches_nobody() {
    let mut setup = Setup::start(&["--leader-ttl-ms", "1000"]).await;
    let _east = setup.shard("east").await;
    setup.cluster.wait_ready();
    let before = setup.status().await.unwrap();
    let expected = generate(&setup.cluster.grpc, greedy(&PROMPT, 200)).await.unwrap().essence();

    setup.etcd.kill(0);
    let grpc = setup.cluster.grpc.clone();
    let call = tokio::spawn(async move { generate(&grpc, greedy(&PROMPT, 200)).await });
    thread::sleep(OUTAGE);
    setup.etcd.restart(0).unwrap();
    setup.etcd.wait_healthy().unwrap();
    assert_eq!(call.await.unwrap().unwrap().essence(), expected);

    // Once the store has taken the record away: it comes back by itself, under another lease.
    let lost = setup.record("east", |r| r.is_some()).await.unwrap().lease.unwrap();
    let revoked = async || setup.store.revoke_lease(lost).await.ok();
    until("the lease is revoked", revoked).await;
    setup.record("east", |r| r.is_some_and(|r| r.lease.is_some_and(|l| l != lost))).await;
    let shown = async || setup.status().await.filter(|s| s.members.iter().all(|m| m.lease_ms.is_some()));
    let after = until("the lease is shown", shown).await;

    let lives = |status: &StatusResponse| status.members.iter().map(|m| m.incarnation).collect::<Vec<_>>();
    assert_eq!(lives(&after), lives(&before));
    let log = setup.cluster.process.log();
    assert!(!log.contains("no longer leads") && !log.contains("standing by"), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_next_coordinator_knows_whom_to_expect() {
    let lasting = ["--leader-ttl-ms", "600000"];
    let mut setup = Setup::start(&lasting).await;
    let east = setup.shard("east").await;
    setup.cluster.wait_ready();
    setup.cluster.process.signal(Signal::KILL);
    setup.cluster.process.wait();
    east.signal(Signal::STOP);

    let url = setup.etcd.url();
    let port = setup.cluster.grpc.rsplit(':').next().unwrap().to_owned();
    let mut args = vec![model(SMOLLM2).display().to_string()];
    let again = ["--port", "0", "--grpc-port", &port, "--store", &url];
    args.extend(again.iter().chain(COMMON).chain(&lasting).map(|a| (*a).to_owned()));
    setup.cluster.process = Process::start("coordinator", &args);
    let waits_for = async || setup.status().await.map(|s| s.waits_for).filter(|w| !w.is_empty());
    let waits_for = until("the group waits", waits_for).await;
    assert_eq!(waits_for, "0 of 1 shards are attached; waiting for shard east, last seen at 127.0.0.1");
    let log = setup.cluster.process.log();
    assert!(log.contains("seen before") && log.contains("east"), "{log}");
    east.signal(Signal::CONT);
    setup.cluster.wait_ready();
}
