//! Sixteen clients' requests: seeded, of every kind that could go wrong differently.

use phalanx_proto::v1::{GenerateRequest, LogitBias, TokenIds, generate_request::Prompt};
use serde_json::{Value, json};

use super::setup::Model;
use crate::workload::Numbers;

/// Clients of a load.
pub const CLIENTS: usize = 16;

/// How a request is made.
#[derive(Debug, Clone)]
pub enum Call {
    /// `Inference/Generate`.
    Grpc(Box<GenerateRequest>),
    /// A streamed POST.
    Http {
        /// Path.
        path: &'static str,
        /// Body.
        body: Value,
    },
}

/// One client's request.
#[derive(Debug, Clone)]
pub struct Job {
    /// Its kind, for messages.
    pub kind: &'static str,
    /// The request.
    pub call: Call,
    /// Choices.
    pub n: usize,
}

/// Sizes that fit a model's context and speed.
#[derive(Debug, Clone, Copy)]
pub struct Sizes {
    /// Vocabulary.
    pub vocab: u64,
    /// Longest random prompt, in tokens.
    pub prompt: usize,
    /// Sentences of the shared beginning of chats.
    pub sentences: usize,
    /// Tokens of the longest outputs; the shortest have half.
    pub tokens: u32,
}

impl Sizes {
    /// For rows that need nothing special.
    pub fn of(model: Model) -> Self {
        match model {
            Model::Tiny => Self { vocab: 384, prompt: 60, sentences: 1, tokens: 300 },
            Model::Smollm2 => Self { vocab: 49_152, prompt: 160, sentences: 20, tokens: 96 },
        }
    }
}

const SENTENCES: [&str; 4] = [
    "You keep the log of a lighthouse and answer in short plain sentences. ",
    "The lamp burns from dusk to dawn, and the horn sounds twice a minute in fog. ",
    "Ships are noted with their name, their flag, the hour and the weather. ",
    "Never guess a number that nobody has told you. ",
];

const QUESTIONS: [&str; 6] = [
    "Which ships passed last night?",
    "What is the weather like today?",
    "Tell me about the storm of last week.",
    "Write a list of ten things to repair.",
    "Who was on watch, and what was seen?",
    "How does the lamp work?",
];

/// The load of a seed.
pub fn mix(seed: u64, sizes: Sizes) -> Vec<Job> {
    let mut numbers = Numbers(seed);
    let system: String = (0..sizes.sentences).map(|i| SENTENCES[i % SENTENCES.len()]).collect();
    (0..CLIENTS).map(|index| job(index, &mut numbers, &system, sizes)).collect()
}

/// Prompts of about so many tokens, of which no two have a block in common, and outputs of `tokens`: greedy and sampled,
/// over gRPC and HTTP.
pub fn long(seed: u64, vocab: u64, prompt: usize, tokens: u32) -> Vec<Job> {
    let mut numbers = Numbers(seed);
    let job = |index: usize| {
        let n_prompt = prompt - usize::try_from(numbers.below(prompt as u64 / 16 + 1)).unwrap_or(0);
        let ids = numbers.tokens(n_prompt, vocab);
        let temperature = if index.is_multiple_of(2) { 0.0 } else { 0.9 };
        let seed = numbers.below(1 << 40);
        if index % 4 < 2 {
            let request = GenerateRequest {
                prompt: Some(Prompt::TokenIds(TokenIds { ids })),
                temperature: Some(temperature),
                seed: Some(seed),
                max_tokens: Some(tokens),
                ignore_eos: true,
                logprobs: Some(1),
                ..GenerateRequest::default()
            };
            return Job { kind: "grpc, long prompt", call: Call::Grpc(Box::new(request)), n: 1 };
        }
        let body = json!({
            "prompt": ids, "max_tokens": tokens, "temperature": temperature, "seed": seed, "ignore_eos": true,
            "stream": true, "stream_options": {"include_usage": true}, "return_token_ids": true,
        });
        Job { kind: "completions, long prompt", call: Call::Http { path: "/v1/completions", body }, n: 1 }
    };
    (0..CLIENTS).map(job).collect()
}

fn job(index: usize, numbers: &mut Numbers, system: &str, sizes: Sizes) -> Job {
    let below = |numbers: &mut Numbers, bound: u64| numbers.below(bound.max(1));
    let n_tokens = sizes.tokens / 2 + u32::try_from(below(numbers, u64::from(sizes.tokens / 2))).unwrap_or(0);
    let n_prompt = 4 + usize::try_from(below(numbers, sizes.prompt as u64 - 4)).unwrap_or(0);
    let ids = numbers.tokens(n_prompt, sizes.vocab);
    let question = QUESTIONS[usize::try_from(below(numbers, QUESTIONS.len() as u64)).unwrap_or(0)];
    let seed = numbers.below(1 << 40);
    let grpc = |change: &dyn Fn(&mut GenerateRequest)| {
        let mut request = GenerateRequest {
            prompt: Some(Prompt::TokenIds(TokenIds { ids: ids.clone() })),
            temperature: Some(0.9),
            seed: Some(seed),
            max_tokens: Some(n_tokens),
            ignore_eos: true,
            logprobs: Some(1),
            ..GenerateRequest::default()
        };
        change(&mut request);
        Call::Grpc(Box::new(request))
    };
    let http = |path: &'static str, prompt: Value, change: Value| {
        let mut body = json!({
            "max_tokens": n_tokens, "temperature": 0.9, "seed": seed, "ignore_eos": true,
            "stream": true, "stream_options": {"include_usage": true}, "return_token_ids": true,
        });
        for more in [prompt, change] {
            for (key, value) in more.as_object().into_iter().flatten() {
                body[key.as_str()] = value.clone();
            }
        }
        Call::Http { path, body }
    };
    let completions = |change| http("/v1/completions", json!({"prompt": ids.clone()}), change);
    let chat = |change| {
        let messages = json!([{"role": "system", "content": system}, {"role": "user", "content": question}]);
        http("/v1/chat/completions", json!({"messages": messages}), change)
    };
    let (kind, call, n) = match index % 8 {
        0 => ("grpc greedy", grpc(&|r| r.temperature = Some(0.0)), 1),
        1 => ("grpc sampled, top_p", grpc(&|r| r.top_p = Some(0.8)), 1),
        2 => ("grpc n = 2", grpc(&|r| r.n = Some(2)), 2),
        3 => ("completions greedy, logprobs", completions(json!({"temperature": 0, "logprobs": 2})), 1),
        4 => {
            // One that is rarely met but often begun, and one that ends some outputs early.
            let change = json!({"stop": [" the lamp of the", "\n\n"], "ignore_eos": false, "min_tokens": 16});
            ("chat with stop strings", chat(change), 1)
        }
        5 => ("chat greedy, shared prefix", chat(json!({"temperature": 0})), 1),
        6 => {
            let change =
                json!({"frequency_penalty": 0.6, "presence_penalty": 0.3, "logprobs": true, "top_logprobs": 3});
            ("chat sampled, penalties", chat(change), 1)
        }
        _ => {
            let change = |r: &mut GenerateRequest| {
                r.repetition_penalty = Some(1.2);
                r.min_p = Some(0.02);
                r.logit_bias = vec![LogitBias { token_id: 260, bias: 1.5 }];
            };
            ("grpc sampled, repetition penalty, bias", grpc(&change), 1)
        }
    };
    Job { kind, call, n }
}
