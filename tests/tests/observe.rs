//! What operators see of a running cluster: metrics, probes, its state, its log.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
};

use phalanx_tests::{
    client::{generate_all, get, greedy, metric, post},
    golden,
    process::{Cluster, Process, repository, wait_until},
};
use serde_json::json;

const N_REQUESTS: u32 = 6;
const N_TOKENS: u32 = 12;
/// Beyond the blocks that requests share.
const PROMPT: [u32; 20] = [5; 20];

fn start(args: &[&str]) -> Cluster {
    Cluster::start(&golden::tiny("llama"), &[&["--kv-cache-memory", "32MiB", "--block-size", "16"], args].concat())
}

/// Families of a scrape, with their types.
fn families(text: &str) -> BTreeMap<String, String> {
    let types = text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split_once(' '));
    types.map(|(name, kind)| (name.to_owned(), kind.to_owned())).collect()
}

/// What `docs/metrics.md` has.
fn documented() -> BTreeMap<String, String> {
    let text = fs::read_to_string(repository().join("docs/metrics.md")).expect("the documentation is there");
    let row = |line: &str| {
        let (name, rest) = line.strip_prefix("| `")?.split_once("` | ")?;
        Some((name.to_owned(), rest.split(' ').next()?.to_owned()))
    };
    text.lines().filter_map(row).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_metric_is_scraped_and_tells_the_truth() {
    let cluster = start(&[]);
    let scrape = || get(&format!("{}/metrics", cluster.http)).unwrap().body;
    // Before the first request: no query of a dashboard finds nothing.
    wait_until("shards have told their memory", || scrape().contains("shard_memory_bytes"));
    assert_eq!(families(&scrape()), documented());
    let text = scrape();
    let helped: BTreeSet<&str> =
        text.lines().filter_map(|line| line.strip_prefix("# HELP ")?.split_once(' ')).map(|(name, _)| name).collect();
    assert_eq!(helped.len(), families(&text).len(), "each has a help text");

    let value = |name: &str| metric(&cluster.http, name);
    let endpoint = "{endpoint=\"phalanx.v1.Inference/Generate\"";
    assert_eq!(value(&format!("inference_requests_total{endpoint},status=\"ok\"}}")), 0.0);
    let requests = (0..N_REQUESTS).map(|_| greedy(&PROMPT, N_TOKENS)).collect();
    let answers = generate_all(&cluster.grpc, requests).await.unwrap();
    assert!(answers.iter().all(|answer| answer.usage.completion_tokens == N_TOKENS));
    let (n, tokens) = (f64::from(N_REQUESTS), f64::from(N_REQUESTS * N_TOKENS));
    let prompts = n * PROMPT.len() as f64;
    let engine = format!("{{model_name=\"{}\",engine=\"0\"", served_model(&cluster));
    // A request is counted when its client has read everything.
    wait_until("all requests are counted", || {
        value(&format!("inference_requests_total{endpoint},status=\"ok\"}}")) == n
    });
    for (name, wanted) in [
        (format!("inference_latency_seconds_count{endpoint}}}"), n),
        ("tokens_generated_total".to_owned(), tokens),
        ("prompt_tokens_total".to_owned(), prompts),
        ("time_to_first_token_seconds_count".to_owned(), n),
        ("inter_token_latency_seconds_count".to_owned(), tokens - n),
        ("queue_length".to_owned(), 0.0),
        ("sequences_running".to_owned(), 0.0),
        ("kv_blocks_used".to_owned(), 0.0),
        ("phalanx_is_leader".to_owned(), 1.0),
        ("phalanx_group_serving".to_owned(), 1.0),
        ("phalanx_ranks".to_owned(), 2.0),
        ("phalanx_ranks_wanted".to_owned(), 2.0),
        ("phalanx_shards{role=\"rank\"}".to_owned(), 2.0),
        ("phalanx_shards{role=\"spare\"}".to_owned(), 0.0),
        (format!("vllm:generation_tokens_total{engine}}}"), tokens),
        (format!("vllm:prompt_tokens_total{engine}}}"), prompts),
        (format!("vllm:request_success_total{engine},finished_reason=\"length\"}}"), n),
        (format!("vllm:request_success_total{engine},finished_reason=\"stop\"}}"), 0.0),
        (format!("vllm:e2e_request_latency_seconds_count{engine}}}"), n),
        (format!("vllm:request_queue_time_seconds_count{engine}}}"), n),
        (format!("vllm:request_prefill_time_seconds_count{engine}}}"), n),
        (format!("vllm:request_decode_time_seconds_count{engine}}}"), n),
        (format!("vllm:request_generation_tokens_sum{engine}}}"), tokens),
        (format!("vllm:request_prompt_tokens_sum{engine}}}"), prompts),
        (format!("vllm:request_params_n_sum{engine}}}"), n),
    ] {
        assert_eq!(value(&name), wanted, "{name}");
    }
    // Every prompt token was computed, or found in the cache; every token and every step is in a histogram.
    let by_source = |source: &str| value(&format!("vllm:prompt_tokens_by_source_total{engine},source=\"{source}\"}}"));
    assert_eq!(by_source("local_compute") + by_source("local_cache_hit"), prompts);
    assert_eq!(by_source("local_cache_hit"), value(&format!("vllm:prompt_tokens_cached_total{engine}}}")));
    let n_steps = value("step_seconds_count");
    assert!(n_steps >= f64::from(N_TOKENS), "{n_steps} steps");
    assert_eq!(value("batch_size_count"), n_steps);
    assert!(value("batch_size_sum") >= tokens, "each sequence was in as many steps as it has tokens");
    assert!(value(&format!("vllm:iteration_tokens_total_sum{engine}}}")) >= tokens);
    for rank in ["0", "1"] {
        let of = |name: &str| value(&format!("{name}{{rank=\"{rank}\"}}"));
        let (used, total) = (of("gpu_memory_used"), of("gpu_memory_total"));
        assert!(used > 1e6 && used <= total, "rank {rank} uses {used} of {total}");
        assert!((0.0..=1.0).contains(&of("gpu_utilization")));
        let phase = |phase: &str| format!("phalanx_step_phase_seconds_count{{rank=\"{rank}\",phase=\"{phase}\"}}");
        wait_until("every rank has told of every step", || value(&phase("compute")) == n_steps);
        assert_eq!(value(&phase("collective")), n_steps);
    }
    assert!(cluster.interrupt().success());
}

fn served_model(cluster: &Cluster) -> String {
    let models = get(&format!("{}/v1/models", cluster.http)).unwrap().json().unwrap();
    models["data"][0]["id"].as_str().expect("a model has a name").to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn probes_say_what_is_missing() {
    let mut cluster = Cluster::launch(
        &golden::tiny("llama"),
        &["--tensor-parallel-size", "1", "--local-shards", "0", "--kv-cache-memory", "32MiB"],
    );
    cluster.wait_listening();
    let probe = |path: &str| get(&format!("{}{path}", cluster.http)).unwrap();
    assert_eq!(probe("/livez").status, 200);
    for path in ["/readyz", "/startupz"] {
        wait_until("it says that a shard is missing", || {
            let answer = probe(path);
            assert_eq!(answer.status, 503, "{path}: {answer:?}");
            answer.json().unwrap()["reason"].as_str().is_some_and(|why| why.contains("shard"))
        });
    }
    let args = ["--coordinator", &cluster.grpc, "--threads", "1", "--shard-id", "a", "--log-format", "json"];
    let shard = Process::start("shard", &args.map(str::to_owned));
    wait_until("a request of one token is answered", || probe("/readyz").status == 200);
    assert_eq!(probe("/startupz").status, 200);
    assert!(metric(&cluster.http, "tokens_generated_total") >= 1.0, "it was really tried");
    let log = shard.log();
    let line = log.lines().find(|line| line.contains("\"starting\"")).unwrap_or_else(|| panic!("{log}"));
    let line: serde_json::Value = serde_json::from_str(line).expect("a line of the log is a JSON object");
    assert_eq!((&line["message"], &line["shard"]), (&json!("starting"), &json!("a")));
    drop(shard);
    wait_until("it is ready no longer", || probe("/readyz").status == 503);
    assert_eq!((probe("/startupz").status, probe("/livez").status), (200, 200), "it had started");
    assert!(cluster.interrupt().success());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_cluster_is_shown_and_requests_are_named_in_a_log_of_json() {
    let cluster = start(&["--log-format", "json", "--log-level", "debug"]);
    let shown = get(&format!("{}/debug/cluster", cluster.http)).unwrap();
    assert_eq!(shown.status, 200, "{shown:?}");
    let shown = shown.json().unwrap();
    let group = &shown["groups"][0];
    assert_eq!((&group["phase"], &group["world_size"]), (&json!("serving"), &json!(2)), "{shown}");
    assert_eq!((&group["ranks"][1]["rank"], &group["epoch"]), (&json!(1), &group["load"]["serving_epoch"]));
    assert_eq!(group["load"]["sequences"], json!({"waiting": 0, "held": 0, "running": 0}));
    assert!(group["load"]["kv_blocks"]["total"].as_u64().unwrap() > 0);
    assert_eq!(shown["shards"].as_array().unwrap().len(), 2);

    let answer =
        post(&format!("{}/v1/completions", cluster.http), &json!({"prompt": [5, 6], "max_tokens": 2})).unwrap();
    assert_eq!(answer.status, 200, "{answer:?}");
    let named = |line: &serde_json::Value| {
        line["message"] == "request ended"
            && line["span"]["request_id"].as_str().is_some_and(|id| id.len() == 32)
            && line["span"]["endpoint"] == "/v1/completions"
    };
    let is_told = || cluster.process.log().lines().filter_map(|l| serde_json::from_str(l).ok()).any(|l| named(&l));
    wait_until("the log has the request with its id", is_told);
    assert!(cluster.interrupt().success());
}
