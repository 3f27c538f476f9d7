//! What a request must get, straight from the definitions, and random requests.

use std::time::{Duration, Instant};

use phalanx_cluster::seal::Seal;
use phalanx_coordinator::request::{Finish, Request, StopConditions};
use phalanx_proto::v1::{SamplingParams, TokenScore};

use super::{letter, mix, next_token, prefix_hash, score};

pub const VOCAB: usize = 11;
pub const EOS: u32 = 10;
pub const MAX_MODEL_LEN: usize = 64;

/// Everything that is random, from one seed.
pub struct Luck(pub u64);

impl Luck {
    pub fn below(&mut self, n: usize) -> usize {
        self.0 = mix(self.0, 1);
        (self.0 % n as u64) as usize
    }

    pub fn within(&mut self, low: usize, high: usize) -> usize {
        low + self.below(high - low + 1)
    }

    pub fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }
}

/// What a choice has got, or must get.
#[derive(Debug, Default, Clone, PartialEq)]
pub struct Choice {
    pub tokens: Vec<u32>,
    pub text: String,
    pub scores: Vec<TokenScore>,
    pub finish: Option<Finish>,
}

/// What a request must get, straight from the definitions.
pub fn expected(request: &Request, index: u32) -> Choice {
    let stop = &request.stop;
    let mut sampling = SamplingParams { seed: request.seed_of(index), ..request.sampling.clone() };
    sampling.suppressed_token_ids = stop.token_ids.clone();
    if !stop.ignore_eos {
        sampling.suppressed_token_ids.push(EOS);
    }
    let mut known = request.prompt.clone();
    let mut choice = Choice::default();
    // Text before this is not searched: the detokenizer gave it out before min_tokens was reached.
    let (mut searched_from, mut pending) = (0, 0);
    let max_tokens = (request.max_tokens as usize).min(MAX_MODEL_LEN - request.prompt.len());
    while choice.tokens.len() < max_tokens {
        let hash = prefix_hash(&known);
        let token = next_token(hash, choice.tokens.len(), &sampling, VOCAB);
        known.push(token);
        choice.tokens.push(token);
        if request.sampling.logprobs.is_some() {
            choice.scores.push(score(hash, token));
        }
        if token == EOS && !stop.ignore_eos {
            choice.finish = Some(Finish::EndOfSequence);
        } else if stop.token_ids.contains(&token) {
            choice.finish = Some(Finish::StopToken(token));
        }
        if choice.finish.is_some() {
            if stop.include_in_output {
                choice.text.push(letter(token));
            }
            cut(&mut choice.text, stop, searched_from);
            return choice;
        }
        choice.text.push(letter(token));
        pending = if token % 3 == 2 { pending + 1 } else { 0 };
        if choice.tokens.len() < request.sampling.min_tokens as usize {
            searched_from = choice.text.len() - pending;
            continue;
        }
        // Letters that the detokenizer holds are seen later, but are cut at the same place.
        let visible = if choice.tokens.len() == max_tokens { 0 } else { pending };
        let mut seen = choice.text[..choice.text.len() - visible].to_owned();
        if let Some(matched) = cut(&mut seen, stop, searched_from) {
            choice.text = seen;
            choice.finish = Some(Finish::StopString(matched));
            return choice;
        }
    }
    choice.finish = Some(Finish::Length);
    choice
}

/// Cuts text at the stop string that ends first.
fn cut(text: &mut String, stop: &StopConditions, from: usize) -> Option<String> {
    for end in from + 1..=text.len() {
        let ending = stop.strings.iter().filter(|s| text[from..end].ends_with(s.as_str()));
        if let Some(longest) = ending.max_by_key(|s| s.len()).cloned() {
            text.truncate(if stop.include_in_output { end } else { end - longest.len() });
            return Some(longest);
        }
    }
    None
}

/// Random tokens.
pub fn tokens(luck: &mut Luck, n: usize) -> Vec<u32> {
    (0..n).map(|_| luck.below(VOCAB) as u32).collect()
}

/// A random request; its prompt begins like others'.
pub fn request(luck: &mut Luck, idx: usize, heads: &[Vec<u32>], now: Instant) -> Request {
    let head = &heads[luck.below(heads.len())];
    let mut prompt = head[..luck.within(0, head.len())].to_vec();
    let tail = luck.within(1, 8);
    prompt.extend(tokens(luck, tail));
    let prompt_logprobs = luck.one_in(5).then_some(0);
    let max_tokens = if prompt_logprobs.is_some() && luck.one_in(2) { 0 } else { luck.within(1, 14) };
    let n_stops = luck.below(3);
    let strings = (0..n_stops).map(|_| {
        let len = luck.within(1, 3);
        tokens(luck, len).into_iter().map(letter).collect()
    });
    let strings: Vec<String> = strings.collect();
    let sampling = SamplingParams {
        seed: luck.below(4) as u64,
        min_tokens: if luck.one_in(3) { luck.within(0, max_tokens) as u32 } else { 0 },
        logprobs: luck.one_in(3).then_some(0),
        prompt_logprobs,
        ..SamplingParams::default()
    };
    Request {
        id: format!("request-{idx}"),
        prompt,
        n: if luck.one_in(4) { luck.within(2, 3) as u32 } else { 1 },
        sampling,
        max_tokens: max_tokens as u32,
        is_open_ended: false,
        stop: StopConditions {
            strings,
            token_ids: if luck.one_in(4) { tokens(luck, 1) } else { Vec::new() },
            ignore_eos: luck.one_in(3),
            include_in_output: luck.one_in(3),
            skip_special_tokens: true,
            shown_tokens: Vec::new(),
        },
        deadline: luck.one_in(10).then(|| now + Duration::from_millis(luck.below(80) as u64)),
        priority: 0,
        cache_root: if luck.one_in(3) { Seal::root(["a", "b"][luck.below(2)]) } else { Seal::EMPTY },
        resume: Vec::new(),
    }
}
