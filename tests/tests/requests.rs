//! What a running cluster does with requests that end early, are wrong, or ask for everything.

use std::{fmt::Write as _, time::Duration};

use phalanx_tests::{
    client::{generate, get, greedy, metric, post, post_raw, post_stream},
    model_cache::{SMOLLM2, model},
    process::{Cluster, wait_until},
    workload::Numbers,
};
use serde_json::{Value, json};

fn start() -> Cluster {
    Cluster::start(&model(SMOLLM2), &["--kv-cache-memory", "256MiB", "--max-model-len", "2048"])
}

#[tokio::test(flavor = "multi_thread")]
async fn cancelled_requests_free_their_blocks() {
    let cluster = start();
    let total = metric(&cluster.http, "kv_blocks");
    assert!(total > 0.0);
    // HTTP streams and gRPC calls that would run for thousands of tokens.
    let body = json!({"model": "default", "prompt": "Once upon a time", "max_tokens": 1900, "stream": true, "ignore_eos": true});
    let models = get(&format!("{}/v1/models", cluster.http)).unwrap().json().unwrap();
    let name = models["data"][0]["id"].as_str().unwrap().to_owned();
    let body = {
        let mut b = body;
        b["model"] = json!(name);
        b
    };
    let mut streams = Vec::new();
    for _ in 0..4 {
        let mut stream = post_stream(&format!("{}/v1/completions", cluster.http), &body).unwrap();
        stream.next().unwrap().unwrap();
        streams.push(stream);
    }
    let calls: Vec<_> = (0..4)
        .map(|i| {
            let grpc = cluster.grpc.clone();
            tokio::spawn(async move { generate(&grpc, greedy(&[504, 3575, 282, 100 + i], 1900)).await })
        })
        .collect();
    wait_until("eight sequences run", || metric(&cluster.http, "sequences_running") == 8.0);
    assert!(metric(&cluster.http, "kv_blocks_used") > 0.0);
    drop(streams);
    calls.iter().for_each(tokio::task::JoinHandle::abort);
    wait_until("all blocks are free", || metric(&cluster.http, "kv_blocks_used") == 0.0);
    let tokens = metric(&cluster.http, "tokens_generated_total");
    assert!(tokens < 8.0 * 1900.0, "the requests did not run to their end");
    assert_eq!(metric(&cluster.http, "sequences_running"), 0.0);
    // A deadline ends a call just the same.
    let late =
        tokio::time::timeout(Duration::from_millis(300), generate(&cluster.grpc, greedy(&[504, 3575], 1900))).await;
    assert!(late.is_err(), "1900 tokens take longer");
    wait_until("its blocks are free", || metric(&cluster.http, "kv_blocks_used") == 0.0);
    assert!(cluster.interrupt().success());
}

/// Bodies that are wrong in one way each.
fn malformed(model: &str) -> Vec<(&'static str, Vec<u8>)> {
    let chat = json!({"model": model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2});
    let completion = json!({"model": model, "prompt": "Hi", "max_tokens": 2});
    let mut all: Vec<(&'static str, Vec<u8>)> = Vec::new();
    let mut numbers = Numbers(7);
    for (path, good) in [("/v1/chat/completions", &chat), ("/v1/completions", &completion)] {
        let text = serde_json::to_vec(good).unwrap();
        for cut in 0..text.len().min(24) {
            all.push((path, text[..cut].to_vec()));
        }
        let mut change = |field: &str, value: Value| {
            let mut body = good.clone();
            body[field] = value;
            all.push((path, serde_json::to_vec(&body).unwrap()));
        };
        let fields =
            ["temperature", "top_p", "n", "max_tokens", "stop", "seed", "presence_penalty", "frequency_penalty"];
        for field in fields {
            change(field, json!({"wrong": "type"}));
            change(field, json!([[1]]));
        }
        for (field, values) in [
            ("temperature", vec![json!(-0.1), json!(1e9), json!("warm")]),
            ("top_p", vec![json!(-1), json!(1.5), json!("x")]),
            ("n", vec![json!(0), json!(-1), json!(100_000), json!(1.5)]),
            ("max_tokens", vec![json!(-1), json!(1e12), json!(2.5), json!("2")]),
            ("presence_penalty", vec![json!(3), json!(-3)]),
            ("frequency_penalty", vec![json!(3), json!(-3)]),
            ("logit_bias", vec![json!({"x": 1}), json!({"999999999": 1}), json!({"1": 1000}), json!([1])]),
            ("stop", vec![json!([""]), json!([1]), json!(vec!["a"; 100])]),
            ("stream", vec![json!("yes"), json!(1)]),
            ("top_k", vec![json!(-5), json!("x")]),
            ("min_p", vec![json!(-1), json!(2)]),
            ("model", vec![json!("no-such-model"), json!(1)]),
            ("no_such_field", vec![json!(1)]),
            ("repetition_penalty", vec![json!(0), json!(-1)]),
            ("stop_token_ids", vec![json!("x"), json!([-1])]),
            ("min_tokens", vec![json!(-1), json!(100)]),
        ] {
            for value in values {
                change(field, value);
            }
        }
        all.push((path, b"\xff\xfe\x00".to_vec()));
        all.push((path, b"null".to_vec()));
        all.push((path, b"[]".to_vec()));
        let mut deep = String::new();
        for _ in 0..100_000 {
            let _ = write!(deep, "[");
        }
        all.push((path, deep.into_bytes()));
        for _ in 0..12 {
            let mut noise = text.clone();
            let at = usize::try_from(numbers.below(noise.len() as u64)).unwrap();
            noise[at] = 0x01;
            all.push((path, noise));
        }
    }
    let long = "word ".repeat(5000);
    all.push(("/v1/completions", serde_json::to_vec(&json!({"model": model, "prompt": long})).unwrap()));
    all.push(("/v1/completions", serde_json::to_vec(&json!({"model": model, "prompt": [1, 2, 999_999_999]})).unwrap()));
    all.push(("/v1/completions", serde_json::to_vec(&json!({"model": model, "prompt": [-1]})).unwrap()));
    all.push(("/v1/completions", serde_json::to_vec(&json!({"model": model, "prompt": [""]})).unwrap()));
    all.push((
        "/v1/completions",
        serde_json::to_vec(&json!({"model": model, "prompt": "x", "logprobs": 1000})).unwrap(),
    ));
    all.push(("/v1/completions", serde_json::to_vec(&json!({"prompt": 5, "model": model})).unwrap()));
    for messages in
        [json!([]), json!("hi"), json!([{"role": "wizard", "content": "x"}]), json!([{"content": "x"}]), json!([1])]
    {
        all.push(("/v1/chat/completions", serde_json::to_vec(&json!({"model": model, "messages": messages})).unwrap()));
    }
    all
}

#[tokio::test(flavor = "multi_thread")]
async fn malformed_requests_get_clear_errors_and_the_server_goes_on() {
    let cluster = start();
    let models = get(&format!("{}/v1/models", cluster.http)).unwrap().json().unwrap();
    let name = models["data"][0]["id"].as_str().unwrap().to_owned();
    let question = json!({"model": name, "messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 8, "temperature": 0});
    let ask = || post(&format!("{}/v1/chat/completions", cluster.http), &question).unwrap().json().unwrap();
    let before = ask();
    let bodies = malformed(&name);
    assert!(bodies.len() >= 200, "{} malformed requests", bodies.len());
    for (path, body) in &bodies {
        let answer = post_raw(&format!("{}{path}", cluster.http), body).unwrap();
        let shown = String::from_utf8_lossy(&body[..body.len().min(200)]).into_owned();
        assert!((400..500).contains(&answer.status), "{path} {shown}: {answer:?}");
        let error = answer.json().unwrap_or_else(|e| panic!("{path} {shown}: {e}"));
        assert!(error["error"]["message"].as_str().is_some_and(|m| !m.is_empty()), "{path} {shown}: {error}");
        assert!(error["error"]["type"].is_string(), "{path} {shown}: {error}");
    }
    let unknown = post(&format!("{}/v1/completions", cluster.http), &json!({"model": "nope", "prompt": "x"})).unwrap();
    assert_eq!(unknown.status, 404);
    assert_eq!(get(&format!("{}/no/such/path", cluster.http)).unwrap().status, 404);
    let too_long = json!({"model": name, "prompt": "word ".repeat(5000)});
    let too_long = post(&format!("{}/v1/completions", cluster.http), &too_long).unwrap();
    assert!(too_long.body.contains("2048"), "the error names the context: {too_long:?}");
    let after = ask();
    assert_eq!(before["choices"], after["choices"], "the same answer as before");
    for path in ["/health", "/livez", "/ready", "/readyz", "/startupz", "/version", "/metrics", "/v1/models"] {
        assert_eq!(get(&format!("{}{path}", cluster.http)).unwrap().status, 200, "{path}");
    }
    let metrics = get(&format!("{}/metrics", cluster.http)).unwrap().body;
    for name in [
        "inference_requests_total",
        "inference_latency_seconds",
        "tokens_generated_total",
        "batch_size",
        "queue_length",
        "time_to_first_token_seconds",
        "inter_token_latency_seconds",
        "kv_blocks_used",
        "kv_blocks",
        "prefix_cache_hit_tokens_total",
        "shard_memory_bytes",
    ] {
        assert!(metrics.contains(name), "{name} is in /metrics");
    }
    assert!(cluster.interrupt().success());
}
