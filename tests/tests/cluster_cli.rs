//! The `cluster` program, as operators and their scripts run it.

use std::process::{Command, Output};

use phalanx_tests::{
    golden,
    process::{Cluster, binary},
};
use serde_json::Value;

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

#[test]
fn a_cluster_shows_itself() {
    let args = ["--tensor-parallel-size", "2", "--kv-cache-memory", "16MiB"];
    let running = Cluster::start(&golden::tiny("llama"), &args);
    let seen = status(&running.grpc);
    assert_eq!((&seen["phase"], &seen["world_size"]), (&"serving".into(), &2.into()), "{seen}");
    assert!(seen["epoch"].as_u64().is_some_and(|epoch| epoch > 0), "{seen}");
    let members = seen["members"].as_array().expect("a list");
    let ranks: Vec<_> = members.iter().map(|m| m["rank"].as_u64()).collect();
    assert_eq!(ranks, [Some(0), Some(1)], "{seen}");
    let mut pids: Vec<_> = members.iter().filter_map(|m| m["pid"].as_u64()).collect();
    pids.sort_unstable();
    assert_eq!(pids, running.local_shards().into_iter().map(u64::from).collect::<Vec<_>>());

    let table = said(&running.grpc, &["status"]);
    assert!(table.contains("serving") && table.contains("local-0") && table.contains("local-1"), "{table}");
    // One that does not answer is passed over.
    let both = format!("http://127.0.0.1:1,{}", running.grpc);
    assert!(said(&both, &["status"]).contains("local-1"));
    assert!(running.interrupt().success());
}

#[test]
fn nobody_there_is_a_failure_that_says_what_to_do() {
    let error = refused("http://127.0.0.1:1", &["status"]);
    assert!(error.contains("http://127.0.0.1:1") && error.contains("--coordinator"), "{error}");
    refused("http://127.0.0.1:1", &["drain", "local-0"]);
}
