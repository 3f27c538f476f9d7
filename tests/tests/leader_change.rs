//! A change of leader computes next to nothing again: shards bring their KV pages along.

use std::time::Duration;

use phalanx_proto::v1::{GenerateRequest, StatusRequest, cluster_client::ClusterClient};
use phalanx_tests::{
    client::{Answer, generate_all, greedy, metric},
    faults::etcd::Etcd,
    model_cache::{SMOLLM2, model},
    process::{Cluster, PATIENCE, Process, wait_until},
    workload::Numbers,
};
use rustix::process::Signal;
use tokio::time::{sleep, timeout};

const STREAMS: u32 = 6;
const PROMPT: u32 = 160;
const ANSWER: u32 = 160;
/// Positions of a KV block.
const BLOCK: u32 = 16;
const VOCAB: u64 = 49_152;
/// Streams with a token, and tokens of all.
const BEGUN: &str = "time_to_first_token_seconds_count";
const TOLD: &str = "tokens_generated_total";
/// Nobody counts as silent, however busy this machine is.
const COMMON: &[&str] = &["--kv-cache-memory", "64MiB", "--heartbeat-timeout-ms", "600000"];

fn requests(seed: u64) -> Vec<GenerateRequest> {
    let mut numbers = Numbers(seed);
    let mut request = |n: u32| {
        let prompt = numbers.tokens(PROMPT as usize, VOCAB);
        let seeded = GenerateRequest { temperature: Some(0.8), seed: Some(n.into()), ..greedy(&prompt, ANSWER) };
        if n.is_multiple_of(2) { greedy(&prompt, ANSWER) } else { seeded }
    };
    (0..STREAMS).map(&mut request).collect()
}

fn essence(answers: Vec<Answer>) -> Vec<Answer> {
    answers.into_iter().map(Answer::essence).collect()
}

fn coordinator(store: &str) -> Cluster {
    let args = ["--store", store, "--local-shards", "0", "--tensor-parallel-size", "2"];
    let mut cluster = Cluster::launch(&model(SMOLLM2), &[&args, COMMON].concat());
    cluster.wait_listening();
    cluster
}

fn leads(cluster: &Cluster) -> bool {
    metric(&cluster.http, "phalanx_is_leader") > 0.0
}

/// Coordinators that a leader knows of, and tells its shards of.
async fn n_known(leader: &Cluster) -> usize {
    let Ok(mut client) = ClusterClient::connect(leader.grpc.clone()).await else { return 0 };
    client.status(StatusRequest {}).await.map_or(0, |status| status.into_inner().coordinators.len())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_next_leader_goes_on_with_the_pages_that_shards_kept() {
    let single = Cluster::start(&model(SMOLLM2), &[&["--tensor-parallel-size", "1"], COMMON].concat());
    let mut expected = Vec::new();
    for seed in [1, 2] {
        expected.push(essence(generate_all(&single.grpc, requests(seed)).await.expect("the streams end")));
    }
    assert!(single.interrupt().success());

    let etcd = Etcd::start(1).expect("etcd starts");
    let mut leader = coordinator(&etcd.url());
    wait_until("the first coordinator leads", || leads(&leader));
    let coordinators = leader.grpc.clone();
    let shard = |name: &str| {
        let args = ["--coordinator", &coordinators, "--threads", "1", "--shard-id", name];
        Process::start("shard", &args.map(str::to_owned))
    };
    let shards = [shard("first"), shard("second")];
    leader.wait_ready();

    for (seed, signal) in [(1, Signal::KILL), (2, Signal::TERM)] {
        let next = coordinator(&etcd.url());
        // Shards hear of it from the leader.
        let both_known = async {
            while n_known(&leader).await < 2 {
                sleep(Duration::from_millis(25)).await;
            }
        };
        timeout(PATIENCE, both_known).await.expect("the leader hears of the standby");
        let grpc = next.grpc.clone();
        let now = |name: &str| metric(&leader.http, name);
        let (n_begun, n_told) = (now(BEGUN), now(TOLD));
        let answers = tokio::spawn(async move { generate_all(&grpc, requests(seed)).await });
        wait_until("every stream has a token", || now(BEGUN) - n_begun >= f64::from(STREAMS));
        // The streams stand still from here on, with a step half done.
        shards[1].signal(Signal::STOP);
        let n_told = now(TOLD) - n_told;
        assert!(n_told < f64::from(STREAMS * ANSWER / 2), "{n_told} tokens: the streams were too quick for this test");
        leader.process.signal(signal);
        wait_until("the other coordinator leads", || leads(&next));
        shards[1].signal(Signal::CONT);

        let answers = answers.await.expect("the call does not panic").expect("no stream is lost");
        assert_eq!(essence(answers), expected[seed as usize - 1], "{signal:?}");
        // Of each stream the last block, which was not full, and at most the one before, which a rank may not have done.
        let replayed = metric(&next.http, "phalanx_replayed_tokens_total");
        assert!(replayed < f64::from(STREAMS * 2 * BLOCK), "{signal:?}: {replayed} positions were computed again");
        let found = metric(&next.http, "prefix_cache_hit_tokens_total");
        assert!(found >= f64::from(STREAMS * (PROMPT - BLOCK)), "{signal:?}: {found} positions were found");
        println!("{signal:?}: {replayed} positions computed again, {found} found");
        // One that hands over ends by itself.
        leader.process.wait();
        leader = next;
    }
}
