//! The real models against the float32 reference, at tensor parallel sizes 1, 2 and 3: exact weights and activations
//! must agree tightly, the default path no worse than llama.cpp, and every size must give the same bits.

use phalanx_tests::{
    golden::{self, Outcome},
    model_cache::{QWEN_05B, QWEN_15B, SMOLLM2, model},
    process::Cluster,
};

/// Largest difference of any log-probability on the float32 path.
const FLOAT32_LOGPROB: f64 = 2e-3;
/// Margin below which the float32 path may choose another token.
const FLOAT32_MARGIN: f64 = 4e-3;
/// Margin below which the default path may choose another token.
const AUTO_MARGIN: f64 = 0.5;

/// Differences of llama.cpp on the same file and steps: the default path must not be worse.
struct Bar {
    mean: f64,
    p99: f64,
}

async fn outcome_of(alias: &str, golden: &golden::Golden, dtype: &str, world_size: usize) -> Outcome {
    let size = world_size.to_string();
    let args =
        ["--tensor-parallel-size", &size, "--dtype", dtype, "--kv-cache-memory", "512MiB", "--max-model-len", "2048"];
    let cluster = Cluster::start(&model(alias), &args);
    let outcome = golden::run(&cluster.grpc, golden).await;
    assert!(cluster.interrupt().success());
    outcome
}

async fn check(alias: &str, file: &str, bar: Bar) {
    let golden = golden::load(&format!("real/{file}"));
    for dtype in ["float32", "auto"] {
        let mut first: Option<Outcome> = None;
        for world_size in [1, 2, 3] {
            let outcome = outcome_of(alias, &golden, dtype, world_size).await;
            if let Some(first) = &first {
                assert!(*first == outcome, "{alias} {dtype}: TP = {world_size} differs from TP = 1");
                continue;
            }
            let off = golden::difference(&golden, &outcome);
            println!("{alias} {dtype}: {off:?}");
            if dtype == "float32" {
                assert!(off.max <= FLOAT32_LOGPROB && off.prompt_max <= FLOAT32_LOGPROB, "{alias}: {off:?}");
                golden::check_greedy(&golden, &outcome, FLOAT32_MARGIN);
            } else {
                assert!(off.mean <= bar.mean && off.p99 <= bar.p99, "{alias}: {off:?}");
                golden::check_greedy(&golden, &outcome, AUTO_MARGIN);
            }
            first = Some(outcome);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn smollm2_matches_the_reference() {
    check(SMOLLM2, "smollm2-135m-instruct-q4_1.prompts.json.gz", Bar { mean: 0.030, p99: 0.17 }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn qwen_05b_matches_the_reference() {
    check(QWEN_05B, "qwen2.5-coder-0.5b-instruct-q4_k_m.prompts.json.gz", Bar { mean: 0.009, p99: 0.08 }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn qwen_15b_matches_the_reference() {
    check(QWEN_15B, "qwen2.5-coder-1.5b-instruct-q4_k_m.prompts.json.gz", Bar { mean: 0.025, p99: 0.13 }).await;
}
