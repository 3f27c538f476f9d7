//! Requests of many kinds, the same in every run: what determinism is tested with.

use phalanx_proto::v1::{GenerateRequest, LogitBias, TokenIds, generate_request::Prompt};

/// Small deterministic numbers (SplitMix64; Steele et al., 2014).
pub struct Numbers(pub u64);

impl Numbers {
    /// A number below `bound`.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % bound
    }

    /// `len` ordinary token ids below `vocab`.
    pub fn tokens(&mut self, len: usize, vocab: u64) -> Vec<u32> {
        // The first ids are special tokens in the models that tests use.
        (0..len).map(|_| u32::try_from(100 + self.below(vocab - 100)).expect("vocabularies are small")).collect()
    }
}

/// `count` requests: greedy and sampled, short and long, some with a shared prefix, penalties, biases, log-probabilities
/// or several choices. `vocab` bounds the token ids.
pub fn mixed(count: usize, vocab: u64, max_prompt: usize, max_tokens: u32) -> Vec<GenerateRequest> {
    let mut numbers = Numbers(42);
    let shared = numbers.tokens(max_prompt / 2, vocab);
    let mut requests = Vec::with_capacity(count);
    for index in 0..count {
        let mut ids = if index % 3 == 0 { shared.clone() } else { Vec::new() };
        let len = 1 + usize::try_from(numbers.below(max_prompt as u64 / 2)).expect("small");
        ids.extend(numbers.tokens(len, vocab));
        let mut request = GenerateRequest {
            prompt: Some(Prompt::TokenIds(TokenIds { ids })),
            max_tokens: Some(1 + u32::try_from(numbers.below(u64::from(max_tokens))).expect("small")),
            temperature: Some(if index % 2 == 0 { 0.0 } else { 0.9 }),
            seed: Some(1000 + index as u64),
            ignore_eos: true,
            logprobs: Some(2),
            ..GenerateRequest::default()
        };
        match index % 8 {
            1 => request.top_p = Some(0.8),
            2 => request.repetition_penalty = Some(1.3),
            3 => request.top_k = Some(20),
            4 => request.frequency_penalty = Some(0.7),
            5 => request.min_p = Some(0.05),
            6 => request.logit_bias = vec![LogitBias { token_id: 260, bias: 2.5 }],
            7 => request.n = Some(2),
            _ => {}
        }
        requests.push(request);
    }
    requests
}
