//! The forward pass against the formulas.

use phalanx_kernels::ops::Precision;
use phalanx_proto::v1::SamplingParams;
use phalanx_shard::offline::{LocalRequest, greedy};

use crate::{
    oracle,
    tiny::{TinyModel, prompt, small},
};

/// Largest difference of a log-probability from f64.
const TOLERANCE: f64 = 1e-4;

fn matches_formulas(model: &TinyModel) {
    let tokens = prompt(1, 40);
    let want = oracle::log_probabilities(model, &tokens);
    let mut group = model.group(small(1, Precision::Float32));
    let sampling = SamplingParams { prompt_logprobs: Some(3), ..greedy() };
    let request = LocalRequest { prompt: tokens.clone(), max_tokens: 1, sampling };
    let output = group.generate(std::slice::from_ref(&request)).expect("a good plan").remove(0);
    assert_eq!(output.prompt_scores.len(), tokens.len() - 1);
    for (position, score) in output.prompt_scores.iter().enumerate() {
        let want = &want[position];
        assert_eq!(score.token_id, tokens[position + 1]);
        let difference = (f64::from(score.logprob) - want[score.token_id as usize]).abs();
        assert!(difference < TOLERANCE, "position {position}: {difference}");
        for top in &score.top {
            let difference = (f64::from(top.logprob) - want[top.token_id as usize]).abs();
            assert!(difference < TOLERANCE, "position {position}, top {}: {difference}", top.token_id);
        }
    }
    let (best, margin) = oracle::best(&want[tokens.len() - 1]);
    assert!(margin > TOLERANCE, "choose another seed: the best two tokens are {margin} apart");
    assert_eq!(output.tokens, [best]);
}

#[test]
fn llama_computes_its_formulas() {
    matches_formulas(&TinyModel::new("llama", true));
}

#[test]
fn an_own_output_matrix_is_used() {
    matches_formulas(&TinyModel::new("llama", false));
}

#[test]
fn qwen2_computes_its_formulas_with_biases() {
    matches_formulas(&TinyModel::new("qwen2", true));
}
