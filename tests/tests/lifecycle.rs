//! Starting, joining and ending: nothing is left behind, whoever is killed, and a killed shard loses no token.

use std::collections::BTreeSet;

use phalanx_tests::{
    client::{generate, get, greedy, metric},
    model_cache::{SMOLLM2, model},
    process::{Cluster, Process, is_alive, shared_memory_files, signal_pid, wait_until},
};
use rustix::process::Signal;

const PROMPT: [u32; 5] = [504, 3575, 282, 4649, 314];

#[tokio::test(flavor = "multi_thread")]
async fn ctrl_c_and_kill_leave_nothing_behind() {
    let before: BTreeSet<String> = shared_memory_files().into_iter().collect();
    let cluster = Cluster::start(&model(SMOLLM2), &["--kv-cache-memory", "64MiB"]);
    assert_eq!(get(&format!("{}/ready", cluster.http)).unwrap().status, 200);
    let shards = cluster.local_shards();
    assert_eq!(shards.len(), 2);
    let log = cluster.process.log();
    assert!(cluster.interrupt().success(), "{log}");
    assert!(shards.iter().all(|pid| !is_alive(*pid)), "the shards ended with the coordinator");

    let mut killed = Cluster::start(&model(SMOLLM2), &["--kv-cache-memory", "64MiB"]);
    let shards = killed.local_shards();
    killed.process.signal(Signal::KILL);
    killed.process.wait();
    wait_until("the shards of a killed coordinator end", || shards.iter().all(|pid| !is_alive(*pid)));

    let after: BTreeSet<String> = shared_memory_files().into_iter().collect();
    let left: Vec<_> = after.difference(&before).collect();
    // Tests beside this one form groups at the same time: only names that stay are left behind.
    wait_until("no shared memory is left", || left.iter().all(|name| !shared_memory_files().contains(name)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_shard_loses_no_token() {
    let cluster = Cluster::start(&model(SMOLLM2), &["--kv-cache-memory", "64MiB", "--max-model-len", "1024"]);
    let expected = generate(&cluster.grpc, greedy(&PROMPT, 400)).await.unwrap().essence();
    for victim in [0, 1] {
        let tokens = metric(&cluster.http, "tokens_generated_total");
        let grpc = cluster.grpc.clone();
        let call = tokio::spawn(async move { generate(&grpc, greedy(&PROMPT, 400)).await });
        wait_until("the stream runs", || metric(&cluster.http, "tokens_generated_total") > tokens + 20.0);
        let shards = cluster.local_shards();
        signal_pid(shards[victim], Signal::KILL);
        let answer = call.await.unwrap().expect("the stream goes on").essence();
        assert_eq!(expected, answer, "after shard {victim} was killed");
    }
    assert!(metric(&cluster.http, "phalanx_epoch") >= 3.0);
    assert!(cluster.interrupt().success());
}

#[tokio::test(flavor = "multi_thread")]
async fn shards_join_from_elsewhere() {
    let reference = Cluster::start(&model(SMOLLM2), &["--tensor-parallel-size", "1", "--kv-cache-memory", "64MiB"]);
    let expected = generate(&reference.grpc, greedy(&PROMPT, 32)).await.unwrap().essence();
    assert!(reference.interrupt().success());

    let args = ["--local-shards", "0", "--kv-cache-memory", "64MiB", "--collective", "tcp"];
    let mut cluster = Cluster::launch(&model(SMOLLM2), &args);
    cluster.wait_listening();
    let not_ready = get(&format!("{}/ready", cluster.http)).unwrap();
    assert_eq!(not_ready.status, 503, "{not_ready:?}");
    assert_eq!(get(&format!("{}/health", cluster.http)).unwrap().status, 200);
    let shard = |name: &str| {
        let args = ["--coordinator", &cluster.grpc, "--threads", "1", "--shard-id", name];
        Process::start("shard", &args.map(str::to_owned))
    };
    let mut shards = [shard("east"), shard("west")];
    cluster.wait_ready();
    let answer = generate(&cluster.grpc, greedy(&PROMPT, 32)).await.unwrap().essence();
    assert_eq!(expected, answer);
    assert!(cluster.interrupt().success());
    for shard in &mut shards {
        assert!(shard.wait().success(), "told to shut down");
    }
}
