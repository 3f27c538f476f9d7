//! The same bits, however the work is cut: ranks, rows, chunks, restarts.

use phalanx_kernels::ops::Precision;
use phalanx_proto::v1::{Chunk, LogitBias, SamplingParams, SequenceStart, StepPlan, TokenRun};
use phalanx_shard::offline::{LocalConfig, LocalGroup, LocalOutput, LocalRequest, greedy};

use crate::tiny::{TinyModel, prompt, small};

/// Every way of choosing tokens, with prompts of many lengths.
fn requests() -> Vec<LocalRequest> {
    let penalized = SamplingParams {
        repetition_penalty: 1.3,
        presence_penalty: 0.4,
        frequency_penalty: 0.2,
        logit_bias: vec![LogitBias { token_id: 3, bias: 2.0 }, LogitBias { token_id: 200, bias: -1.0 }],
        ..greedy()
    };
    let drawn = SamplingParams { temperature: 1.0, seed: 42, ..greedy() };
    [
        greedy(),
        penalized.clone(),
        SamplingParams { logprobs: Some(4), ..penalized.clone() },
        drawn.clone(),
        SamplingParams { temperature: 0.7, top_k: 20, top_p: 0.9, min_p: 0.01, seed: 1, ..penalized },
        SamplingParams { logprobs: Some(2), prompt_logprobs: Some(2), seed: 2, ..drawn.clone() },
        SamplingParams { prompt_logprobs: Some(0), ..greedy() },
        SamplingParams {
            allowed_token_ids: (3..90).collect(),
            bad_words: (3..40).map(|id| TokenRun { token_ids: vec![id + 1, id] }).collect(),
            ..greedy()
        },
        SamplingParams { min_tokens: 4, suppressed_token_ids: (0..150).collect(), ..greedy() },
    ]
    .into_iter()
    .enumerate()
    .map(|(idx, sampling)| LocalRequest { prompt: prompt(idx as u64, 3 + 7 * idx), max_tokens: 9, sampling })
    .collect()
}

fn generate(model: &TinyModel, config: LocalConfig) -> Vec<LocalOutput> {
    model.group(config).generate(&requests()).expect("good plans")
}

/// Bits of scores too: `PartialEq` of floats would take 0 for -0.
fn assert_same(got: &[LocalOutput], want: &[LocalOutput], what: &str) {
    let bits = |output: &LocalOutput| -> Vec<u32> {
        output.scores.iter().chain(&output.prompt_scores).map(|score| score.logprob.to_bits()).collect()
    };
    for (idx, (got, want)) in got.iter().zip(want).enumerate() {
        assert_eq!(got, want, "{what}, request {idx}");
        assert_eq!(bits(got), bits(want), "{what}, request {idx}");
    }
    assert_eq!(got.len(), want.len());
}

#[test]
fn any_world_size_gives_the_same_bits() {
    for (architecture, tied, precision) in
        [("llama", true, Precision::Float32), ("llama", false, Precision::Auto), ("qwen2", true, Precision::Auto)]
    {
        let model = TinyModel::new(architecture, tied);
        let want = generate(&model, small(1, precision));
        assert!(want.iter().all(|output| output.tokens.len() == 9));
        for world_size in 2..=4 {
            let got = generate(&model, small(world_size, precision));
            assert_same(&got, &want, &format!("{architecture}, {world_size} ranks"));
        }
        let threads = LocalConfig { threads: 3, ..small(1, precision) };
        assert_same(&generate(&model, threads), &want, "3 threads");
    }
}

#[test]
fn any_chunking_gives_the_same_bits() {
    let model = TinyModel::new("llama", true);
    let want = generate(&model, small(1, Precision::Auto));
    for max_step_rows in [1, 3, 17] {
        let config = LocalConfig { max_step_rows, ..small(2, Precision::Auto) };
        assert_same(&generate(&model, config), &want, &format!("steps of {max_step_rows} rows"));
    }
    for max_pass_rows in [1, 3, 17, 40] {
        let config = LocalConfig { max_pass_rows, ..small(2, Precision::Auto) };
        assert_same(&generate(&model, config), &want, &format!("passes of {max_pass_rows} rows"));
    }
}

#[test]
fn alone_and_among_others_is_the_same() {
    let model = TinyModel::new("llama", true);
    let together = generate(&model, small(1, Precision::Auto));
    let mut group = model.group(small(1, Precision::Auto));
    for (idx, request) in requests().iter().enumerate() {
        let alone = group.generate(std::slice::from_ref(request)).expect("good plans");
        assert_same(&alone, &together[idx..=idx], "alone");
    }
}

#[test]
fn a_replayed_sequence_goes_on_with_the_same_tokens() {
    let model = TinyModel::new("qwen2", true);
    let mut group = model.group(small(2, Precision::Auto));
    for request in requests() {
        let whole = group.generate(std::slice::from_ref(&request)).expect("good plans").remove(0);
        let (known, rest) = (4, 5);
        let mut replayed = Vec::new();
        let mut tokens = request.prompt.clone();
        tokens.extend(&whole.tokens[..known]);
        let n_tokens = tokens.len();
        let started = vec![SequenceStart {
            sequence: 0,
            token_ids: tokens,
            prompt_len: request.prompt.len() as u32,
            sampling: Some(request.sampling.clone()),
            blocks: (0..8).collect(),
            cache_root: Vec::new(),
        }];
        let chunks = vec![Chunk { sequence: 0, start: 0, len: n_tokens as u32, sample: true }];
        let result = group.step(StepPlan { started, chunks, ..StepPlan::default() }).expect("a good plan");
        replayed.push(result.samples[0].token_id);
        for idx in 0..rest - 1 {
            let chunks = vec![Chunk { sequence: 0, start: (n_tokens + idx) as u32, len: 1, sample: true }];
            let result = group.step(StepPlan { chunks, ..StepPlan::default() }).expect("a good plan");
            replayed.push(result.samples[0].token_id);
        }
        group.step(StepPlan { dropped: vec![0], ..StepPlan::default() }).expect("a good plan");
        assert_eq!(replayed, whole.tokens[known..]);
    }
}

#[test]
fn shared_blocks_stand_for_computed_ones() {
    let model = TinyModel::new("llama", true);
    let mut group = model.group(small(2, Precision::Auto));
    let (first, mut second) = (prompt(1, 40), prompt(1, 40));
    second[35] = 9;
    let sampling = SamplingParams { logprobs: Some(5), ..greedy() };
    let start = |sequence, tokens: &[u32], blocks: &[u32]| SequenceStart {
        sequence,
        token_ids: tokens.to_vec(),
        prompt_len: tokens.len() as u32,
        sampling: Some(sampling.clone()),
        blocks: blocks.to_vec(),
        cache_root: Vec::new(),
    };
    let run = |group: &mut LocalGroup, start: SequenceStart, from: u32| {
        let chunks = vec![Chunk { sequence: start.sequence, start: from, len: 40 - from, sample: true }];
        let plan = StepPlan { started: vec![start], chunks, ..StepPlan::default() };
        group.step(plan).expect("a good plan").samples.remove(0)
    };
    run(&mut group, start(1, &first, &[0, 1, 2]), 0);
    let whole = run(&mut group, start(2, &second, &[3, 4, 5]), 0);
    // Two full blocks of the first sequence.
    let shared = run(&mut group, start(3, &second, &[0, 1, 6]), 32);
    assert_eq!((shared.token_id, &shared.score), (whole.token_id, &whole.score));
    // All but the last token cached.
    let last = run(&mut group, start(4, &second, &[3, 4, 5]), 39);
    assert_eq!((last.token_id, &last.score), (whole.token_id, &whole.score));
    // Blocks that the same step fills.
    let chunk = |sequence, from: u32| Chunk { sequence, start: from, len: 40 - from, sample: true };
    let plan = StepPlan {
        dropped: vec![1, 2, 3, 4],
        started: vec![start(5, &first, &[7, 8, 9]), start(6, &second, &[7, 8, 10])],
        chunks: vec![chunk(5, 0), chunk(6, 32)],
        ..StepPlan::default()
    };
    let both = group.step(plan).expect("a good plan").samples;
    assert_eq!((both[1].token_id, &both[1].score), (whole.token_id, &whole.score));
}

#[test]
fn both_ways_of_being_greedy_choose_the_same() {
    let model = TinyModel::new("llama", true);
    let mut group = model.group(small(2, Precision::Auto));
    let with = |logprobs, temperature| LocalRequest {
        prompt: prompt(5, 20),
        max_tokens: 12,
        sampling: SamplingParams { logprobs, temperature, repetition_penalty: 1.2, ..greedy() },
    };
    let requests = [with(None, 0.0), with(Some(1), 0.0), with(None, 1e-6), with(None, 1e-4)];
    let outputs = group.generate(&requests).expect("good plans");
    for output in &outputs[1..] {
        assert_eq!(output.tokens, outputs[0].tokens);
    }
    assert!(outputs[0].tokens.iter().any(|token| *token != outputs[0].tokens[0]));
}
