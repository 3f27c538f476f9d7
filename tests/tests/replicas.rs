//! Several groups beside each other answer like one, and one goes on with what another leaves.

use phalanx_proto::v1::{
    DrainRequest, GenerateRequest, StatusRequest, StatusResponse, admin_client::AdminClient,
    cluster_client::ClusterClient,
};
use phalanx_tests::{
    client::{Answer, generate, generate_all, get, greedy, metric},
    golden,
    model_cache::{SMOLLM2, model},
    process::{Cluster, Process, signal_pid, wait_until},
    workload,
};
use rustix::process::Signal;
use tokio::runtime::Handle;

const VOCAB: u64 = 384;

fn start(args: &[&str]) -> Cluster {
    Cluster::start(&golden::tiny("llama"), &[&["--kv-cache-memory", "32MiB"], args].concat())
}

fn essence(answers: Vec<Answer>) -> Vec<Answer> {
    answers.into_iter().map(Answer::essence).collect()
}

/// Streams that run for a while.
fn long() -> Vec<GenerateRequest> {
    let mut numbers = workload::Numbers(7);
    (0..8).map(|_| greedy(&numbers.tokens(20, VOCAB), 250)).collect()
}

async fn ask(grpc: String) -> Option<StatusResponse> {
    let mut client = ClusterClient::connect(grpc).await.ok()?;
    Some(client.status(StatusRequest {}).await.ok()?.into_inner())
}

/// What the coordinator says once a condition holds.
fn wait_for(cluster: &Cluster, what: &str, condition: impl Fn(&StatusResponse) -> bool) -> StatusResponse {
    let mut last = None;
    wait_until(what, || {
        let answer = tokio::task::block_in_place(|| Handle::current().block_on(ask(cluster.grpc.clone())));
        last = answer.filter(|status| condition(status));
        last.is_some()
    });
    last.expect("it was there a moment ago")
}

fn all_serve(status: &StatusResponse) -> bool {
    status.groups.len() == 2 && status.groups.iter().all(|group| group.phase == "serving")
}

/// Sends the long streams, and returns when they run.
fn begin(cluster: &Cluster) -> tokio::task::JoinHandle<anyhow::Result<Vec<Answer>>> {
    let tokens = metric(&cluster.http, "tokens_generated_total");
    let grpc = cluster.grpc.clone();
    let call = tokio::spawn(async move { generate_all(&grpc, long()).await });
    wait_until("the streams run", || metric(&cluster.http, "tokens_generated_total") > tokens + 80.0);
    call
}

#[tokio::test(flavor = "multi_thread")]
async fn two_groups_answer_like_one_and_share_a_spare() {
    let single = start(&["--tensor-parallel-size", "1"]);
    let requests = || workload::mixed(24, VOCAB, 96, 24);
    let mut expected = Vec::new();
    for request in requests() {
        expected.push(generate(&single.grpc, request).await.expect("the request is answered"));
    }
    let expected = essence(expected);
    let streams = essence(generate_all(&single.grpc, long()).await.expect("the streams end"));
    assert!(single.interrupt().success());

    // Without copies of KV rows nothing is changed on purpose: an epoch that stays is a group that never stopped.
    let args = ["--replicas", "2", "--tensor-parallel-size", "1", "--local-shards", "3", "--kv-mirror", "off"];
    let cluster = start(&args);
    let whole = |status: &StatusResponse| all_serve(status) && status.members.len() == 3;
    let status = wait_for(&cluster, "both groups serve, and a spare is there", whole);
    assert_ne!(status.groups[0].epoch, status.groups[1].epoch, "epochs are unique");
    let answers = essence(generate_all(&cluster.grpc, requests()).await.expect("the requests are answered"));
    assert_eq!(expected, answers);
    for group in ["0", "1"] {
        let steps = format!("phalanx_schedule_seconds_count{{group=\"{group}\"}}");
        assert!(metric(&cluster.http, &steps) > 0.0, "{steps}: this group has computed steps");
    }

    // One rank of the group that has no spare.
    let spare = status.members.iter().find(|m| m.rank.is_none()).expect("one has no rank").group;
    let rank = status.members.iter().find(|m| m.group != spare && m.rank.is_some()).expect("it serves");
    let (lost, other) = (rank.group as usize, spare as usize);
    let call = begin(&cluster);
    signal_pid(rank.pid, Signal::KILL);
    assert_eq!(streams, essence(call.await.unwrap().expect("the streams go on")));
    let after = wait_for(&cluster, "both groups serve, and a spare is there again", whole);
    assert!(after.groups[lost].epoch > status.groups[lost].epoch.max(status.groups[other].epoch));
    assert_eq!(after.groups[other].epoch, status.groups[other].epoch, "the other group never stopped");

    // A rank of the group that has no spare is drained: the other group's comes.
    let spare = after.members.iter().find(|m| m.rank.is_none()).expect("one has no rank");
    let rank = after.members.iter().find(|m| m.group != spare.group).expect("it serves");
    let mut admin = AdminClient::connect(cluster.grpc.clone()).await.unwrap();
    let request = DrainRequest { shard_id: rank.shard_id.clone() };
    let drained = admin.drain(request).await.expect("there is a spare").into_inner();
    assert_eq!(drained.successor, spare.shard_id);
    let refused = admin.drain(DrainRequest { shard_id: spare.shard_id.clone() }).await.expect_err("nobody is left");
    assert!(refused.message().contains("attach a spare first"), "{refused}");
    assert!(cluster.interrupt().success());
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_of_a_group_that_does_not_come_back_go_on_at_another() {
    let mut cluster = Cluster::launch(
        &golden::tiny("llama"),
        &["--replicas", "2", "--tensor-parallel-size", "1", "--local-shards", "0", "--kv-cache-memory", "32MiB"],
    );
    cluster.wait_listening();
    let shard = |name: &str| {
        let args = ["--coordinator", &cluster.grpc, "--threads", "1", "--shard-id", name];
        Process::start("shard", &args.map(str::to_owned))
    };
    let (first, second) = (shard("first"), shard("second"));
    let status = wait_for(&cluster, "both groups serve", all_serve);
    let expected = essence(generate_all(&cluster.grpc, long()).await.expect("the streams end"));
    let group = status.members.iter().find(|m| m.shard_id == "first").expect("it is attached").group as usize;
    let call = begin(&cluster);
    first.signal(Signal::KILL);
    assert_eq!(expected, essence(call.await.unwrap().expect("the streams go on")));
    assert!(metric(&cluster.http, "phalanx_moved_requests_total") > 0.0);
    let status = wait_for(&cluster, "the loss is known", |s| s.groups[group].phase == "waiting");
    assert_eq!(status.groups[1 - group].phase, "serving");
    assert_eq!(get(&format!("{}/ready", cluster.http)).unwrap().status, 200, "one group is enough");
    // What comes back serves again.
    let again = shard("first");
    wait_for(&cluster, "both groups serve again", all_serve);
    assert_eq!(expected, essence(generate_all(&cluster.grpc, long()).await.expect("the streams end")));
    assert!(cluster.interrupt().success());
    drop((again, second));
}

#[test]
fn groups_that_can_never_be_formed_end_the_coordinator() {
    // Not enough for one block.
    let args = ["--replicas", "2", "--tensor-parallel-size", "1", "--kv-cache-memory", "64KiB"];
    let mut cluster = Cluster::launch(&model(SMOLLM2), &args);
    assert!(!cluster.process.wait().success());
    let log = cluster.process.log();
    assert!(log.contains("the model can't be served: rank 0"), "{log}");
    assert!(log.contains("raise --kv-cache-memory"), "{log}");
}
