//! Tiny checkpoints as people have them (bf16 safetensors folders) against the float32 reference: one per kind of rotary
//! embedding and of head layout, at every tensor parallel size that fits.

use phalanx_tests::{golden, process::Cluster};

/// Relative to the spread of logits, as the weights are wide on purpose.
const FLOAT32_LOGPROB: f64 = 2e-3;

async fn check(name: &str, world_sizes: &[usize]) {
    let golden = golden::load(&format!("arch/{name}/golden.json.gz"));
    let spread = golden.cases.iter().map(|c| {
        let (low, high) = c.last_logits.iter().fold((f64::MAX, f64::MIN), |(l, h), x| (l.min(*x), h.max(*x)));
        high - low
    });
    let spread = spread.fold(1.0, f64::max);
    for dtype in ["float32", "auto"] {
        let mut first = None;
        for world_size in world_sizes {
            let size = world_size.to_string();
            let args = ["--tensor-parallel-size", &size, "--dtype", dtype, "--kv-cache-memory", "64MiB"];
            let cluster = Cluster::start(&golden::tiny(name), &args);
            let outcome = golden::run(&cluster.grpc, &golden).await;
            assert!(cluster.interrupt().success());
            if let Some(first) = &first {
                assert!(*first == outcome, "{name} {dtype}: TP = {world_size} differs from TP = {}", world_sizes[0]);
                continue;
            }
            let off = golden::difference(&golden, &outcome);
            println!("{name} {dtype}: spread {spread:.1}, {off:?}");
            if dtype == "float32" {
                let bound = FLOAT32_LOGPROB * spread;
                assert!(off.max <= bound && off.prompt_max <= bound, "{name}: spread {spread}, {off:?}");
                golden::check_greedy(&golden, &outcome, 2.0 * bound);
            } else {
                assert!(off.mean <= 0.01 && off.p99 <= 0.05, "{name}: spread {spread}, {off:?}");
                golden::check_greedy(&golden, &outcome, 0.1);
            }
            first = Some(outcome);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn llama() {
    check("llama", &[1, 2, 3, 4]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn llama_with_one_kv_head() {
    check("llama-one-kv-head", &[1, 3]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn rope_linear() {
    check("llama-rope-linear", &[1]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn rope_llama3() {
    check("llama-rope-llama3", &[1]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn qwen2_with_yarn() {
    check("qwen2-rope-yarn", &[1, 2]).await;
}
