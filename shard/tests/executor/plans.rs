//! Bad plans are errors on every rank, never panics.

use phalanx_kernels::ops::Precision;
use phalanx_proto::v1::{Chunk, SequenceStart, StepPlan};
use phalanx_shard::offline::greedy;

use crate::tiny::{TinyModel, prompt, small};

fn start(sequence: u32, len: usize, blocks: &[u32]) -> SequenceStart {
    SequenceStart {
        sequence,
        token_ids: prompt(1, len),
        prompt_len: len as u32,
        sampling: Some(greedy()),
        blocks: blocks.to_vec(),
        cache_root: Vec::new(),
    }
}

#[test]
fn a_bad_plan_fails_the_step() {
    let model = TinyModel::new("llama", true);
    let bad = [
        (
            StepPlan { chunks: vec![Chunk { sequence: 5, start: 0, len: 1, sample: true }], ..StepPlan::default() },
            "not known",
        ),
        (StepPlan { started: vec![start(0, 5, &[128])], ..StepPlan::default() }, "less than 128"),
        (
            StepPlan {
                started: vec![start(0, 20, &[0])],
                chunks: vec![Chunk { sequence: 0, start: 0, len: 20, sample: true }],
                ..StepPlan::default()
            },
            "number of blocks",
        ),
    ];
    for (plan, want) in bad {
        let mut group = model.group(small(2, Precision::Auto));
        let error = group.step(plan).expect_err("the plan is bad").to_string();
        assert!(error.contains(want), "{error}");
    }
}

#[test]
fn a_chunk_that_does_not_sample_emits_nothing() {
    let mut group = TinyModel::new("llama", true).group(small(2, Precision::Auto));
    let chunks = vec![Chunk { sequence: 0, start: 0, len: 5, sample: false }];
    let plan = StepPlan { started: vec![start(0, 8, &[0])], chunks, ..StepPlan::default() };
    let result = group.step(plan).expect("a good plan");
    assert!(result.samples.is_empty() && result.prompt_scores.is_empty());
    assert_eq!(group.step(StepPlan::default()).expect("an empty plan").samples, []);
}
