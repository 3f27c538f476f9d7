//! The same request gives the same bits: alone and among 32 others, with any chunk size, with a prefix-cache hit and
//! without, after preemption, and at every tensor parallel size.

use phalanx_tests::{
    client::{Answer, generate, generate_all, metric},
    model_cache::{SMOLLM2, model},
    process::Cluster,
    workload,
};

const VOCAB: u64 = 49152;

fn start(args: &[&str]) -> Cluster {
    let mut all = vec!["--max-model-len", "1024"];
    if !args.contains(&"--kv-cache-memory") {
        all.extend(["--kv-cache-memory", "256MiB"]);
    }
    all.extend(args);
    Cluster::start(&model(SMOLLM2), &all)
}

/// Tokens and log-probabilities of all answers, without how much the prefix cache helped.
fn essence(answers: Vec<Answer>) -> Vec<Answer> {
    answers.into_iter().map(Answer::essence).collect()
}

/// The workload one request at a time, without sharing anything: the reference for the tests below.
async fn alone(cluster: &Cluster) -> Vec<Answer> {
    let mut answers = Vec::new();
    for request in workload::mixed(32, VOCAB, 96, 24) {
        answers.push(generate(&cluster.grpc, request).await.expect("the request is answered"));
    }
    essence(answers)
}

async fn together(cluster: &Cluster) -> Vec<Answer> {
    let requests = workload::mixed(32, VOCAB, 96, 24);
    essence(generate_all(&cluster.grpc, requests).await.expect("the requests are answered"))
}

fn assert_same(what: &str, expected: &[Answer], got: &[Answer]) {
    for (index, (expected, got)) in expected.iter().zip(got).enumerate() {
        assert_eq!(expected, got, "{what}: request {index}");
    }
    assert_eq!(expected.len(), got.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn batch_chunks_cache_preemption_and_world_size_change_no_bit() {
    let cluster = start(&["--tensor-parallel-size", "1", "--no-enable-prefix-caching"]);
    let expected = alone(&cluster).await;
    assert_same("among 31 others", &expected, &together(&cluster).await);
    assert!(cluster.interrupt().success());

    let cluster = start(&["--tensor-parallel-size", "2"]);
    assert_same("TP 2, prefix cache filling", &expected, &together(&cluster).await);
    let hits = metric(&cluster.http, "prefix_cache_hit_tokens_total");
    assert_same("TP 2, prefix cache full", &expected, &together(&cluster).await);
    assert!(metric(&cluster.http, "prefix_cache_hit_tokens_total") > hits, "the second round hits the prefix cache");
    assert!(cluster.interrupt().success());

    let cluster = start(&["--tensor-parallel-size", "2", "--max-num-batched-tokens", "16", "--max-num-seqs", "5"]);
    assert_same("TP 2, chunks of at most 16 rows", &expected, &together(&cluster).await);
    assert!(cluster.interrupt().success());

    for size in ["3", "4"] {
        let cluster = start(&["--tensor-parallel-size", size]);
        assert_same(&format!("TP {size}"), &expected, &together(&cluster).await);
        assert!(cluster.interrupt().success());
    }

    // Blocks for little more than the longest sequence: most are preempted and computed again.
    let cluster = start(&["--tensor-parallel-size", "1", "--kv-cache-memory", "6MiB", "--max-model-len", "192"]);
    assert_same("tiny KV cache", &expected, &together(&cluster).await);
    assert!(metric(&cluster.http, "preemptions_total") > 0.0, "blocks ran out at least once");
    assert!(cluster.interrupt().success());

    let cluster = start(&["--tensor-parallel-size", "2", "--collective", "tcp"]);
    assert_same("TP 2 over TCP", &expected, &together(&cluster).await);
    assert!(cluster.interrupt().success());
}

#[tokio::test(flavor = "multi_thread")]
async fn every_instruction_set_gives_the_same_bits() {
    let mut first: Option<Vec<Answer>> = None;
    // Each with what the system calls the feature that it needs.
    let features = [("avx2", "avx2"), ("avx-vnni", "avx_vnni"), ("avx512", "avx512_vnni"), ("amx", "amx_int8")];
    let here = |isa| features.iter().all(|(name, feature)| *name != isa || cpu_has(feature));
    for isa in ["auto", "scalar", "avx2", "avx-vnni", "avx512", "amx"] {
        if !here(isa) {
            println!("{isa}: not on this machine");
            continue;
        }
        let cluster = start(&["--tensor-parallel-size", "2", "--isa", isa]);
        let requests = workload::mixed(6, VOCAB, 24, 6);
        let answers = essence(generate_all(&cluster.grpc, requests).await.expect("the requests are answered"));
        assert!(cluster.interrupt().success());
        match &first {
            Some(first) => assert_same(isa, first, &answers),
            None => first = Some(answers),
        }
    }
}

fn cpu_has(feature: &str) -> bool {
    let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    cpu.split_whitespace().any(|word| word == feature)
}
