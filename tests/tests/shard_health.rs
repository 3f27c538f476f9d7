//! A shard's own port, as an orchestrator and Prometheus ask it.

use phalanx_tests::{
    client::{generate, greedy},
    golden,
    process::{Cluster, Process, wait_until},
};
use rustix::process::Signal;

/// Where a shard that was started with `--health-port 0` answers.
fn health_of(shard: &Process) -> String {
    let address = || {
        let log = shard.log();
        let line = log.lines().find(|line| line.contains("probes are answered"))?;
        Some(line.rsplit_once("address=")?.1.trim().to_owned())
    };
    wait_until("the shard says where it answers", || address().is_some());
    format!("http://{}", address().expect("it was there"))
}

fn get(url: &str) -> (u16, String) {
    let agent: ureq::Agent = ureq::Agent::config_builder().http_status_as_error(false).build().into();
    let mut answer = agent.get(url).call().unwrap_or_else(|e| panic!("{url}: {e}"));
    (answer.status().as_u16(), answer.body_mut().read_to_string().expect("a text"))
}

/// A sample of the shard's metrics; `None` if it is not there.
fn metric(health: &str, name: &str) -> Option<f64> {
    let (status, text) = get(&format!("{health}/metrics"));
    assert_eq!(status, 200);
    let line = text.lines().find(|line| line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' '])))?;
    line.rsplit_once(' ')?.1.parse().ok()
}

fn shard(coordinator: &str, name: &str) -> Process {
    let args = ["--coordinator", coordinator, "--threads", "1", "--shard-id", name, "--health-port", "0"];
    Process::start("shard", &args.map(str::to_owned))
}

#[tokio::test(flavor = "multi_thread")]
async fn ranks_and_spares_say_when_they_are_ready() {
    // Nothing listens on port 1.
    let lonely = shard("http://127.0.0.1:1", "lonely");
    let health = health_of(&lonely);
    assert_eq!(get(&format!("{health}/livez")).0, 200);
    let (status, reason) = get(&format!("{health}/readyz"));
    assert!(status == 503 && reason.contains("no coordinator"), "{status} {reason}");
    assert_eq!(metric(&health, "phalanx_shard_attached"), Some(0.0));
    drop(lonely);

    let options = ["--local-shards", "0", "--tensor-parallel-size", "1", "--kv-cache-memory", "32MiB"];
    let mut cluster = Cluster::launch(&golden::tiny("llama"), &options);
    cluster.wait_listening();
    let first = shard(&cluster.grpc, "first");
    cluster.wait_ready();
    let second = shard(&cluster.grpc, "second");
    let (first_health, second_health) = (health_of(&first), health_of(&second));
    for health in [&first_health, &second_health] {
        wait_until("the shard is ready", || get(&format!("{health}/readyz")).0 == 200);
    }
    wait_until("the spare has loaded", || metric(&second_health, "phalanx_shard_prepared_ranks") == Some(1.0));
    let answer = generate(&cluster.grpc, greedy(&[5, 6, 7], 4)).await.expect("it is answered");
    assert_eq!(answer.choices[0].token_ids.len(), 4);
    assert_eq!(metric(&first_health, "phalanx_shard_serving"), Some(1.0));
    assert!(metric(&first_health, "phalanx_shard_steps_total") >= Some(4.0));
    assert!(metric(&first_health, "phalanx_shard_weight_bytes") > Some(0.0));
    assert!(metric(&first_health, "phalanx_shard_resident_bytes") > Some(0.0));
    assert_eq!(metric(&second_health, "phalanx_shard_serving"), Some(0.0));
    assert_eq!(metric(&second_health, "phalanx_shard_epoch"), None, "it has no rank");

    first.signal(Signal::KILL);
    wait_until("the spare serves", || metric(&second_health, "phalanx_shard_serving") == Some(1.0));
    assert_eq!(get(&format!("{second_health}/readyz")).0, 200);
    assert!(metric(&second_health, "phalanx_shard_epoch") > Some(1.0));
    assert!(cluster.interrupt().success());
}
