//! Reference outputs made with Hugging Face transformers in float32, and how an answer is compared with them.

use std::{fs::File, path::Path};

use flate2::read::GzDecoder;
use serde::Deserialize;

use crate::{
    client::{Answer, generate_all, greedy},
    process::repository,
};

/// A file of reference cases.
#[derive(Debug, Deserialize)]
pub struct Golden {
    /// The cases.
    pub cases: Vec<Case>,
}

/// A prompt and what the reference made of it.
#[derive(Debug, Deserialize)]
pub struct Case {
    /// Name; the files of tiny models have none.
    #[serde(default)]
    pub id: String,
    /// Prompt tokens.
    pub prompt_ids: Vec<u32>,
    /// Log-probability of each prompt token given those before it; null for the first.
    pub prompt_logprobs: Vec<Option<f64>>,
    /// Logits of the last prompt position (tiny models only).
    #[serde(default)]
    pub last_logits: Vec<f64>,
    /// Greedy continuation.
    pub steps: Vec<Step>,
}

/// One greedy step of the reference.
#[derive(Debug, Deserialize)]
pub struct Step {
    /// The token.
    pub id: u32,
    /// Its log-probability.
    pub logprob: f64,
    /// How far it is ahead of the second best.
    pub margin: f64,
}

/// Reads `tests/golden/PATH` (gzipped JSON).
///
/// # Panics
/// If it is missing or not of this form.
pub fn load(path: &str) -> Golden {
    let path = repository().join("tests/golden").join(path);
    let file = File::open(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_reader(GzDecoder::new(file)).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// What the cluster made of the cases: each scored teacher-forced, and each continued greedily.
#[derive(Debug, PartialEq)]
pub struct Outcome {
    /// Answers whose prompt is prompt + reference steps.
    pub forced: Vec<Answer>,
    /// Greedy continuations of the prompt.
    pub greedy: Vec<Answer>,
}

/// Runs all cases at once against a cluster.
///
/// # Panics
/// If a request fails.
pub async fn run(grpc: &str, golden: &Golden) -> Outcome {
    let forced = golden.cases.iter().map(|case| {
        let mut prompt = case.prompt_ids.clone();
        prompt.extend(case.steps.iter().map(|s| s.id));
        let mut request = greedy(&prompt, 1);
        request.prompt_logprobs = Some(0);
        request
    });
    let forced = generate_all(grpc, forced.collect()).await.expect("teacher-forced requests are answered");
    let continued = golden.cases.iter().map(|case| {
        let mut request = greedy(&case.prompt_ids, u32::try_from(case.steps.len()).expect("few steps"));
        request.logprobs = Some(0);
        request
    });
    let greedy = generate_all(grpc, continued.collect()).await.expect("greedy requests are answered");
    let essence = |answers: Vec<Answer>| answers.into_iter().map(Answer::essence).collect();
    Outcome { forced: essence(forced), greedy: essence(greedy) }
}

/// Absolute log-probability differences over the reference's own steps, and over the prompts.
#[derive(Debug)]
pub struct Difference {
    /// Mean over the steps.
    pub mean: f64,
    /// 99th percentile over the steps.
    pub p99: f64,
    /// Largest over the steps.
    pub max: f64,
    /// Largest over the prompt tokens.
    pub prompt_max: f64,
}

/// Compares teacher-forced scores with the reference.
///
/// # Panics
/// If an answer does not score exactly the tokens of its case.
pub fn difference(golden: &Golden, outcome: &Outcome) -> Difference {
    let mut steps = Vec::new();
    let mut prompt_max: f64 = 0.0;
    for (case, answer) in golden.cases.iter().zip(&outcome.forced) {
        let expected = case.prompt_logprobs[1..].iter().map(|l| l.expect("only the first has none"));
        let expected: Vec<f64> = expected.chain(case.steps.iter().map(|s| s.logprob)).collect();
        assert_eq!(
            answer.prompt_scores.len(),
            expected.len(),
            "{}: scores of all prompt tokens but the first",
            case.id
        );
        let ids = case.prompt_ids[1..].iter().copied().chain(case.steps.iter().map(|s| s.id));
        let n_prompt = case.prompt_ids.len() - 1;
        for (position, ((score, id), expected)) in answer.prompt_scores.iter().zip(ids).zip(expected).enumerate() {
            assert_eq!(score.token_id, id, "{}: token at {position}", case.id);
            let off = (f64::from(score.logprob) - expected).abs();
            assert!(!off.is_nan(), "{}: NaN at {position}", case.id);
            if position < n_prompt { prompt_max = prompt_max.max(off) } else { steps.push(off) }
        }
    }
    steps.sort_by(f64::total_cmp);
    let mean = steps.iter().sum::<f64>() / steps.len() as f64;
    let p99 = steps[(steps.len() - 1) * 99 / 100];
    Difference { mean, p99, max: steps[steps.len() - 1], prompt_max }
}

/// Checks greedy tokens: a token may part from the reference only where the reference's own margin is below
/// `tolerance`; after that the case is not compared any more. Returns how many steps agreed.
///
/// # Panics
/// If a token differs where it may not.
pub fn check_greedy(golden: &Golden, outcome: &Outcome, tolerance: f64) -> usize {
    let mut agreed = 0;
    for (case, answer) in golden.cases.iter().zip(&outcome.greedy) {
        let tokens = &answer.choices[0].token_ids;
        assert_eq!(tokens.len(), case.steps.len(), "{}: all steps are made", case.id);
        for (index, (step, token)) in case.steps.iter().zip(tokens).enumerate() {
            if step.id != *token {
                let margin = step.margin;
                assert!(margin < tolerance, "{}: step {index}: {token} for {} at margin {margin}", case.id, step.id);
                break;
            }
            agreed += 1;
        }
    }
    agreed
}

/// Path of a tiny checkpoint folder.
pub fn tiny(name: &str) -> std::path::PathBuf {
    repository().join(Path::new("tests/golden/arch")).join(name)
}
