//! Many requests from a file: `coordinator batch`, and `/v1/files` with `/v1/batches`. Whoever is killed in between, every line is
//! answered, and stands in the output once.

use std::{fs, path::Path, time::Instant};

use phalanx_tests::{
    client::{get, post},
    model_cache::{SMOLLM2, model},
    offline::{results, said, upload},
    process::{Cluster, Process, children, is_alive, wait_until},
};
use rustix::process::Signal;
use serde_json::{Value, json};

const ANSWER: u32 = 12;
const KEY: &str = "a-key-of-the-offline-tests";

/// A line to one of the three endpoints.
fn line(n: usize) -> String {
    let (url, body) = match n % 3 {
        0 => ("/v1/completions", json!({"prompt": format!("Number {n} is"), "temperature": 0, "max_tokens": ANSWER})),
        1 => {
            let messages = json!([{"role": "user", "content": format!("Say {n}.")}]);
            ("/v1/chat/completions", json!({"messages": messages, "seed": n, "max_tokens": ANSWER}))
        }
        _ => {
            let input = format!("What comes after {n}?");
            ("/v1/responses", json!({"input": input, "temperature": 0, "max_output_tokens": ANSWER}))
        }
    };
    json!({"custom_id": format!("line-{n}"), "method": "POST", "url": url, "body": body}).to_string()
}

fn batch(arguments: &[&str], input: &Path, output: &Path) -> Process {
    let files = ["-i", input.to_str().unwrap(), "-o", output.to_str().unwrap()];
    let arguments: Vec<_> = ["batch"].iter().chain(arguments).chain(&files).map(|a| (*a).to_owned()).collect();
    Process::start("coordinator", &arguments)
}

fn n_lines(path: &Path) -> usize {
    fs::read(path).map_or(0, |text| text.iter().filter(|byte| **byte == b'\n').count())
}

#[test]
fn a_killed_batch_goes_on_and_does_no_line_twice() {
    let folder = tempfile::tempdir().unwrap();
    let (input, output) = (folder.path().join("in.jsonl"), folder.path().join("out.jsonl"));
    let model = model(SMOLLM2);
    let started = [model.to_str().unwrap(), "--threads-per-shard", "1", "--kv-cache-memory", "128MiB"];
    let started = [&started[..], &["--max-model-len", "1024", "--max-num-seqs", "3", "--api-key", KEY]].concat();
    let refused = json!({"custom_id": "refused", "method": "POST", "url": "/v1/completions", "body": {"prompt": ""}});
    let mut lines: Vec<_> = (0..24).map(line).collect();
    lines.extend(["nonsense".to_owned(), refused.to_string()]);
    fs::write(&input, lines.join("\n")).unwrap();

    let mut first = batch(&started, &input, &output);
    wait_until("some lines are done", || n_lines(&output) >= 4 || first.ended().is_some());
    assert!(first.ended().is_none(), "it ended too soon:\n{}", first.log());
    let shards = children(first.pid());
    first.signal(Signal::KILL);
    first.wait();
    wait_until("its shards are gone", || !shards.iter().any(|pid| is_alive(*pid)));
    // As if it had been killed while it wrote.
    let before = fs::read_to_string(&output).unwrap();
    let n_before = before.lines().count();
    assert!(n_before < lines.len(), "nothing is left to do");
    fs::write(&output, format!("{before}{{\"id\":\"batch_req_")).unwrap();

    let mut second = batch(&started, &input, &output);
    assert_eq!(second.wait().code(), Some(3), "some lines can't be answered:\n{}", second.log());
    assert!(second.log().contains(&format!("{n_before} of 26 lines are done")), "{}", second.log());
    let after = fs::read_to_string(&output).unwrap();
    assert!(after.starts_with(&before), "what was done is left as it was");
    let here = results(&after);
    assert_eq!(here.len(), lines.len());
    for n in 0..24 {
        assert_eq!(here[&format!("line-{n}")]["response"]["status_code"], 200, "{n}");
    }
    assert_eq!(here["refused"]["response"]["status_code"], 400);
    assert_eq!(
        (&here["nobody"]["error"]["code"], &here["nobody"]["error"]["line"]),
        (&json!("invalid_json_line"), &json!(25))
    );

    // Nothing is left to do: no model is started for that.
    let mut third = batch(&started, &input, &output);
    assert_eq!(third.wait().code(), Some(3), "{}", third.log());
    assert_eq!(fs::read_to_string(&output).unwrap(), after);

    // A server that runs says the same.
    let arguments =
        ["--kv-cache-memory", "128MiB", "--max-model-len", "1024", "--api-key", KEY, "--response-cache", "8MiB"];
    let cluster = Cluster::start(&model, &arguments);
    let good = folder.path().join("good.jsonl");
    fs::write(&good, lines[..24].join("\n")).unwrap();
    let there = folder.path().join("there.jsonl");
    let mut remote = batch(&["--url", &cluster.http, "--api-key", KEY], &good, &there);
    assert_eq!(remote.wait().code(), Some(0), "{}", remote.log());
    let there = results(&fs::read_to_string(&there).unwrap());
    assert_eq!(there.len(), 24);
    for (name, line) in &there {
        assert_eq!(said(line), said(&here[name]), "{name}");
    }

    // All of it was certain, so it is not computed again.
    let again = folder.path().join("again.jsonl");
    let mut remote = batch(&["--url", &cluster.http, "--api-key", KEY], &good, &again);
    assert_eq!(remote.wait().code(), Some(0), "{}", remote.log());
    for (name, line) in &results(&fs::read_to_string(&again).unwrap()) {
        assert_eq!(said(line), said(&there[name]), "{name}");
    }
    let metrics = ureq::get(format!("{}/metrics", cluster.http)).header("authorization", format!("Bearer {KEY}"));
    let metrics = metrics.call().unwrap().body_mut().read_to_string().unwrap();
    assert!(metrics.contains("\nphalanx_response_cache_hits_total 24\n"), "{metrics}");

    // What can't be meant is refused before anything is asked.
    let doubled = folder.path().join("doubled.jsonl");
    fs::write(&doubled, [line(1), line(1)].join("\n")).unwrap();
    let mut wrong = batch(&["--url", &cluster.http], &doubled, &folder.path().join("new.jsonl"));
    assert_eq!(wrong.wait().code(), Some(1));
    assert!(wrong.log().contains("same custom_id"), "{}", wrong.log());
    let mut wrong = batch(&["--url", &cluster.http], &good, &output);
    assert_eq!(wrong.wait().code(), Some(1));
    assert!(wrong.log().contains("give another output"), "{}", wrong.log());
    let mut wrong = batch(&["--url", &cluster.http, "--max-num-seqs", "3"], &good, &output);
    assert_eq!(wrong.wait().code(), Some(2));
    assert!(cluster.interrupt().success());
}

#[test]
fn a_batch_survives_its_coordinator() {
    let folder = tempfile::tempdir().unwrap();
    let files = folder.path().to_str().unwrap();
    let arguments =
        ["--kv-cache-memory", "128MiB", "--max-model-len", "1024", "--max-num-seqs", "4", "--files-dir", files];
    let model = model(SMOLLM2);
    let mut cluster = Cluster::start(&model, &arguments);
    let lines: Vec<_> = (0..60).step_by(3).map(line).collect();
    let file = upload(&cluster.http, lines.join("\n").as_bytes());
    let asked = json!({"input_file_id": file["id"], "endpoint": "/v1/completions", "completion_window": "24h"});
    let made = post(&format!("{}/v1/batches", cluster.http), &asked).unwrap().json().unwrap();
    let id = made["id"].as_str().unwrap_or_else(|| panic!("{made}")).to_owned();
    let state = |http: &str| get(&format!("{http}/v1/batches/{id}")).unwrap().json().unwrap();
    let done = |batch: &Value| batch["request_counts"]["completed"].as_u64().unwrap();
    wait_until("some lines are done", || done(&state(&cluster.http)) >= 3);
    let before = state(&cluster.http);
    assert_eq!(before["status"], "in_progress", "{before}");
    cluster.process.signal(Signal::KILL);
    cluster.process.wait();

    let cluster = Cluster::start(&model, &arguments);
    let at_once = state(&cluster.http);
    assert!(done(&at_once) <= 20, "{at_once}");
    // Clients are answered beside it.
    let client = json!({"prompt": "The capital of France is", "temperature": 0, "max_tokens": 2});
    let began = Instant::now();
    let answer = post(&format!("{}/v1/completions", cluster.http), &client).unwrap();
    println!("a client beside the batch: {:?} in {:?}", answer.status, began.elapsed());
    assert_eq!(answer.status, 200);
    wait_until("the batch is over", || state(&cluster.http)["status"] == "completed");
    let batch = state(&cluster.http);
    assert_eq!(batch["request_counts"], json!({"total": 20, "completed": 20, "failed": 0}));
    let content = format!("{}/v1/files/{}/content", cluster.http, batch["output_file_id"].as_str().unwrap());
    let results = results(&get(&content).unwrap().body);
    assert_eq!(results.len(), 20);
    assert!(results.values().all(|line| line["response"]["status_code"] == 200));
    // What was told before the crash is what was computed: the same question has the same answer now.
    for n in [0, 27] {
        let asked: Value = serde_json::from_str(&line(n)).unwrap();
        let now = post(&format!("{}/v1/completions", cluster.http), &asked["body"]).unwrap().json().unwrap();
        assert_eq!(now["choices"][0]["text"], results[&format!("line-{n}")]["response"]["body"]["choices"][0]["text"]);
    }
    // Salts keep apart what is computed of prompts.
    let salted = |salt: &Value| {
        let prompt = "One two three four five six seven eight nine ten. ".repeat(6);
        let body = json!({"prompt": prompt, "temperature": 0, "max_tokens": 4, "cache_salt": salt});
        let answer = post(&format!("{}/v1/completions", cluster.http), &body).unwrap().json().unwrap();
        let cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap();
        (answer["choices"][0]["text"].clone(), cached > 0)
    };
    let (text, _) = salted(&Value::Null);
    for (salt, is_cached) in [(json!(null), true), (json!("a"), false), (json!("a"), true), (json!("b"), false)] {
        assert_eq!(salted(&salt), (text.clone(), is_cached), "{salt}");
    }
    let metrics = get(&format!("{}/metrics", cluster.http)).unwrap().body;
    let shown = |name: &str| metrics.lines().any(|l| l.starts_with(name));
    assert!(shown("phalanx_batches_total{status=\"completed\"} 1") && shown("phalanx_batches_unfinished 0"));
    assert!(cluster.interrupt().success());
}
