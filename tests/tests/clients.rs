//! Stock clients: the openai package and grpcio, from the package index, in a virtual environment of their own.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use phalanx_tests::{
    model_cache::{SMOLLM2, model},
    process::{Cluster, repository},
};
use serde_json::Value;

/// A Python with the client packages; made once per machine and kept beside the build.
fn python() -> PathBuf {
    let requirements = repository().join("tests/clients/requirements.txt");
    let target = std::env::current_exe().expect("the test has a path");
    let target = target.ancestors().nth(3).expect("tests lie in target/PROFILE/deps");
    let folder = target.join("client-venv");
    let marker = folder.join("complete");
    if !marker.exists() {
        let _ = std::fs::remove_dir_all(&folder);
        run(Command::new("python3").args(["-m", "venv"]).arg(&folder));
        let pip = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r"];
        run(Command::new(folder.join("bin/python")).args(pip).arg(&requirements));
        std::fs::write(&marker, "").expect("the environment is writable");
    }
    folder.join("bin/python")
}

fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}: install Python 3 with venv and pip"));
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {}\n{error}", output.status);
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn script(python: &Path, name: &str, target: &str) -> Value {
    let output = run(Command::new(python).arg(repository().join("tests/clients").join(name)).arg(target));
    serde_json::from_str(&output).unwrap_or_else(|e| panic!("{name}: {e}: {output}"))
}

#[tokio::test(flavor = "multi_thread")]
async fn stock_clients_are_served() {
    let python = python();
    let cluster = Cluster::start(&model(SMOLLM2), &["--kv-cache-memory", "128MiB", "--max-model-len", "2048"]);

    let openai = script(&python, "openai_client.py", &cluster.http);
    println!("{openai}");
    assert_eq!(openai["whole"], openai["streamed"], "streamed and whole answers agree");
    assert!(openai["whole"].as_str().is_some_and(|t| !t.is_empty()));
    assert!(openai["streamed_chunks"].as_u64() > Some(1), "the answer came in pieces");
    assert_eq!(openai["whole_usage"], openai["streamed_usage"]);
    assert_eq!(openai["roles"], serde_json::json!(["assistant"]));
    assert!(matches!(openai["finish"].as_str(), Some("stop" | "length")));
    assert_eq!(openai["choices"], serde_json::json!([0, 1]));
    assert!(openai["legacy"].as_str().is_some_and(|t| t.starts_with("The capital of France is Paris")));
    assert_eq!(openai["legacy_first_logprob"], Value::Null);
    assert_eq!(openai["legacy_logprobs"], 10);
    assert!(openai["stopped"].as_str().is_some_and(|t| t.contains(" 8") && !t.contains(" 9")));
    assert_eq!(openai["stopped_reason"], "stop");
    assert_eq!(openai["wrong_model"], "model_not_found");
    assert_eq!(openai["bad_parameter"], "temperature");

    let address = cluster.grpc.trim_start_matches("http://");
    let grpc = script(&python, "grpc_client.py", address);
    println!("{grpc}");
    let services: Vec<_> = grpc["services"].as_array().unwrap().iter().filter_map(Value::as_str).collect();
    assert!(services.contains(&"phalanx.v1.Inference") && services.contains(&"grpc.health.v1.Health"));
    assert!(grpc["text"].as_str().is_some_and(|t| t.starts_with(" Paris")));
    assert_eq!(grpc["tokens"], grpc["usage"]);
    assert_eq!(grpc["deadline"], "DEADLINE_EXCEEDED");
    assert_eq!(grpc["invalid"], "INVALID_ARGUMENT");
    assert_eq!(grpc["health"], 1);
    assert!(cluster.interrupt().success());
}
