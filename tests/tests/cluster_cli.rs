//! The `cluster` program, as operators and their scripts run it.

use std::{
    process::{Command, Output},
    sync::Arc,
};

use phalanx_tests::{
    client::{HttpAnswer, get, post},
    faults::{
        deployment::{Deployment, own_id},
        setup::{Clients, Model, Setup, StoreKind},
    },
    golden,
    process::{Cluster, Process, binary, wait_until},
};
use serde_json::{Value, json};

fn cluster(coordinator: &str, args: &[&str]) -> Output {
    let mut command = Command::new(binary("cluster"));
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("PHALANX_")) {
        command.env_remove(name);
    }
    command.args(args).args(["--coordinator", coordinator]).output().expect("the program starts")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// What a command says that works.
fn said(coordinator: &str, args: &[&str]) -> String {
    let output = cluster(coordinator, args);
    assert!(output.status.success(), "{args:?}: {}", text(&output.stderr));
    text(&output.stdout)
}

/// What a command says that does not work.
fn refused(coordinator: &str, args: &[&str]) -> String {
    let output = cluster(coordinator, args);
    let error = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{args:?}: {}{error}", text(&output.stdout));
    assert!(error.starts_with("cluster: ") && !error.contains("panicked"), "{error}");
    error
}

fn status(coordinator: &str) -> Value {
    serde_json::from_str(&said(coordinator, &["status", "--json"])).expect("it is JSON")
}

fn over_http(http: &str, wish: &str, shard: &str) -> HttpAnswer {
    post(&format!("{http}/admin/{wish}"), &json!({"shard": shard})).expect("it answers")
}

fn member(status: &Value, name: &str) -> Value {
    let members = status["members"].as_array().expect("a list");
    members.iter().find(|m| m["shard_id"] == name).cloned().unwrap_or_default()
}

/// Name of the shard with this rank, or of the spare.
fn who_has(status: &Value, rank: Option<u64>) -> String {
    let members = status["members"].as_array().expect("a list");
    let holder = members.iter().find(|m| m["rank"].as_u64() == rank).expect("somebody has it");
    holder["shard_id"].as_str().expect("a name").to_owned()
}

fn pids(status: &Value) -> Vec<u64> {
    let members = status["members"].as_array().expect("a list");
    members.iter().filter_map(|m| m["pid"].as_u64()).collect()
}

/// Waits until every spare has loaded a slice ahead.
fn wait_prepared(coordinator: &str, shards: usize) {
    wait_until("spares have loaded ahead", || {
        let status = status(coordinator);
        let members = status["members"].as_array().expect("a list");
        let is_ready = |m: &Value| m["role"] == "rank" || m["prepared_ranks"].as_array().is_some_and(|r| !r.is_empty());
        status["phase"] == "serving" && members.len() == shards && members.iter().all(is_ready)
    });
}

const TP_2: [&str; 4] = ["--tensor-parallel-size", "2", "--kv-cache-memory", "16MiB"];

#[test]
fn a_cluster_shows_itself() {
    let running = Cluster::start(&golden::tiny("llama"), &TP_2);
    let seen = status(&running.grpc);
    assert_eq!((&seen["phase"], &seen["world_size"]), (&"serving".into(), &2.into()), "{seen}");
    assert!(seen["epoch"].as_u64().is_some_and(|epoch| epoch > 0), "{seen}");
    assert!(seen["load"]["kv_blocks"].as_u64().is_some_and(|n| n > 0), "{seen}");
    assert_eq!(seen["load"]["requests"], 0, "{seen}");
    assert_eq!(seen["coordinators"][0]["role"], "leader", "{seen}");
    let members = seen["members"].as_array().expect("a list");
    let ranks: Vec<_> = members.iter().map(|m| m["rank"].as_u64()).collect();
    assert_eq!(ranks, [Some(0), Some(1)], "{seen}");
    let mut pids = pids(&seen);
    pids.sort_unstable();
    assert_eq!(pids, running.local_shards().into_iter().map(u64::from).collect::<Vec<_>>());

    let table = said(&running.grpc, &["status"]);
    assert!(table.contains("serving") && table.contains("local-0") && table.contains("local-1"), "{table}");
    let plan: Value = serde_json::from_str(&said(&running.grpc, &["plan", "--json"])).expect("it is JSON");
    let ranks = plan["ranks"].as_array().expect("a list");
    assert_eq!(ranks.len(), 2, "{plan}");
    assert!(ranks[0]["q_heads"].as_str().is_some_and(|r| r.starts_with("0..")), "{plan}");
    assert!(ranks[0]["successor"].is_null(), "{plan}");
    assert!(said(&running.grpc, &["plan"]).contains("wait for the shard's return"));
    // One that does not answer is passed over.
    let both = format!("http://127.0.0.1:1,{}", running.grpc);
    assert!(said(&both, &["status"]).contains("local-1"));
    let error = refused(&running.grpc, &["step-down"]);
    assert!(error.contains("no other coordinator"), "{error}");
    assert!(running.interrupt().success());
}

#[test]
fn nobody_there_is_a_failure_that_says_what_to_do() {
    let error = refused("http://127.0.0.1:1", &["status"]);
    assert!(error.contains("http://127.0.0.1:1") && error.contains("--coordinator"), "{error}");
    refused("http://127.0.0.1:1", &["drain", "local-0"]);
    refused("http://127.0.0.1:1", &["rollout", "restart"]);
}

#[test]
fn ranks_are_drained_to_a_spare_and_back() {
    let args = [&TP_2[..], &["--local-shards", "3"]].concat();
    let running = Cluster::start(&golden::tiny("llama"), &args);
    wait_prepared(&running.grpc, 3);
    // Whoever came first has a rank.
    let seen = status(&running.grpc);
    let [first, second, spare] = [Some(0), Some(1), None].map(|rank| who_has(&seen, rank));
    let drained = said(&running.grpc, &["drain", &first]);
    assert!(drained.starts_with(&format!("{first} is drained; {spare} has its rank since epoch ")), "{drained}");
    let seen = status(&running.grpc);
    assert_eq!(member(&seen, &first)["role"], "drained", "{seen}");
    assert_eq!(member(&seen, &spare)["rank"], 0, "{seen}");
    // Nobody is left for the other rank.
    let error = refused(&running.grpc, &["drain", &second]);
    assert!(error.contains("rank 1") && error.contains("attach a spare first"), "{error}");
    let error = refused(&running.grpc, &["drain", "nobody"]);
    assert!(error.contains("\"nobody\"") && error.contains("local-0, local-1, local-2"), "{error}");
    said(&running.grpc, &["undrain", &first]);
    wait_prepared(&running.grpc, 3);

    // The same over HTTP.
    let answer = over_http(&running.http, "drain", &second);
    let body = answer.json().expect("it is JSON");
    assert_eq!((answer.status, body["successor"].as_str()), (200, Some(first.as_str())), "{body}");
    let answer = over_http(&running.http, "drain", "nobody");
    assert!(answer.status == 404 && answer.body.contains("local-0, local-1, local-2"), "{}", answer.body);
    let body = get(&format!("{}/admin/status", running.http)).and_then(|a| a.json()).expect("it is JSON");
    assert_eq!(member(&body, &second)["role"], "drained", "{body}");
    assert!(running.interrupt().success());
}

#[test]
fn all_shards_are_restarted_one_after_the_other() {
    for shards in ["3", "2"] {
        let args = [&TP_2[..], &["--local-shards", shards]].concat();
        let running = Cluster::start(&golden::tiny("llama"), &args);
        let n_shards: usize = shards.parse().expect("a number");
        wait_prepared(&running.grpc, n_shards);
        let before = status(&running.grpc);
        let told = said(&running.grpc, &["rollout", "restart"]);
        assert!(told.contains(&format!("done: {shards} shards restarted")), "{told}");
        let after = status(&running.grpc);
        assert_eq!(after["phase"], "serving", "{after}");
        assert_eq!(pids(&after).len(), n_shards, "{after}");
        assert!(pids(&after).iter().all(|pid| !pids(&before).contains(pid)), "{before} {after}");
        let log = running.process.log();
        assert!(!log.contains("unexpectedly") && !log.contains(" WARN "), "it is no accident:\n{log}");
        assert!(running.interrupt().success());
    }
}

#[test]
fn a_drained_shard_is_restarted_too_and_stays_drained() {
    let args = [&TP_2[..], &["--local-shards", "3"]].concat();
    let running = Cluster::start(&golden::tiny("llama"), &args);
    wait_prepared(&running.grpc, 3);
    said(&running.grpc, &["drain", "local-2"]);
    let told = said(&running.grpc, &["rollout", "restart"]);
    assert!(told.contains("done: 3 shards restarted"), "{told}");
    let seen = status(&running.grpc);
    assert_eq!(member(&seen, "local-2")["role"], "drained", "{seen}");
    assert!(running.interrupt().success());
}

#[test]
fn a_shard_that_nobody_starts_again_is_named() {
    let args = ["--tensor-parallel-size", "1", "--local-shards", "0", "--kv-cache-memory", "16MiB"];
    let mut running = Cluster::launch(&golden::tiny("llama"), &args);
    running.wait_listening();
    let shard = ["--coordinator", &running.grpc, "--threads", "1", "--shard-id", "alone"].map(str::to_owned);
    let mut shard = Process::start("shard", &shard);
    running.wait_ready();
    let output = cluster(&running.grpc, &["rollout", "restart", "--timeout", "1"]);
    let error = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{error}");
    assert!(error.contains("alone did not come back within 1 s"), "{error}");
    assert!(shard.wait().success(), "it was told to end");
    assert!(running.interrupt().success());
}

/// Two coordinators on one etcd, and a shard of their own.
fn two_coordinators() -> (Arc<tokio::runtime::Runtime>, Deployment) {
    let runtime = Arc::new(tokio::runtime::Runtime::new().expect("a runtime"));
    let setup =
        Setup { coordinators: 2, store: StoreKind::Etcd(1), clients: Clients::OfLeader, ..Setup::own(Model::Tiny, 1) };
    let deployment = Deployment::start(&runtime, &setup).expect("it starts");
    (runtime, deployment)
}

#[test]
fn leadership_is_handed_over_and_drains_outlive_it() {
    let (_runtime, deployment) = two_coordinators();
    let leader = deployment.leader().expect("one leads");
    let standby = deployment.standby().expect("one stands by");
    let (first, second) = (&deployment.coordinators[leader], &deployment.coordinators[standby]);

    // Any coordinator may be asked: a standby names the leader.
    said(&second.grpc, &["drain", &own_id(2)]);
    let answer = over_http(&second.http, "undrain", &own_id(2));
    assert!(answer.status == 421 && answer.body.contains(&first.http), "{}", answer.body);

    let both = format!("{},{}", first.grpc, second.grpc);
    let told = said(&both, &["step-down"]);
    assert!(told.contains(" leads"), "{told}");
    wait_until("the standby leads", || deployment.leads(standby) && !deployment.leads(leader));
    wait_until("the next leader serves with the same shards", || {
        let output = cluster(&both, &["status", "--json"]);
        let seen: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
        seen["phase"] == "serving" && seen["members"].as_array().is_some_and(|m| m.len() == 3)
    });
    assert_eq!(member(&status(&both), &own_id(2))["role"], "drained");
    said(&both, &["undrain", &own_id(2)]);
    let problems = deployment.end();
    assert!(problems.is_empty(), "{problems:?}");
}
