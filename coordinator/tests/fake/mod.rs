//! A shard without a model: it keeps to the contract of `step.proto`, refuses what a shard refuses, and notices when
//! pages do not hold what their sequence needs.
//!
//! Its "model" makes the next token from a hash of all tokens so far, so a single wrong, missing or stale position
//! changes the output.

#![allow(dead_code, reason = "each test binary uses its part")]

pub mod oracle;

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use phalanx_cluster::seal::Seal;
use phalanx_coordinator::text::decode::{Detokenize, Detokenizers};
use phalanx_proto::v1::{PromptScores, Sample, SamplingParams, StepPlan, StepResult, TokenScore};
use phalanx_shard::step::seals::{SealedPrefix, Seals};

/// Mixes a number into a hash: one round of SplitMix64 (Steele et al., 2014).
pub fn mix(hash: u64, value: u64) -> u64 {
    let mut z = hash.wrapping_add(value).wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Hash of a whole prefix.
pub fn prefix_hash(tokens: &[u32]) -> u64 {
    tokens.iter().fold(1, |hash, token| mix(hash, u64::from(*token)))
}

/// The token that follows a prefix.
pub fn next_token(hash: u64, n_output: usize, sampling: &SamplingParams, vocab: usize) -> u32 {
    let suppresses = n_output < sampling.min_tokens as usize;
    let mut draw = mix(hash, sampling.seed);
    loop {
        let token = (draw % vocab as u64) as u32;
        if !(suppresses && sampling.suppressed_token_ids.contains(&token)) {
            return token;
        }
        draw = mix(draw, 1);
    }
}

/// The score of a token that follows a prefix.
pub fn score(hash: u64, token: u32) -> TokenScore {
    TokenScore { token_id: token, logprob: -((hash % 1000) as f32), rank: 1, top: Vec::new() }
}

struct Live {
    tokens: Vec<u32>,
    prompt_len: usize,
    sampling: SamplingParams,
    blocks: Vec<u32>,
    computed: Option<usize>,
    sealed: SealedPrefix,
    /// Rows of another one would do as well; they are not to be shared.
    salt: u64,
}

/// Position and prefix hash that each slot of each page holds.
pub type Pages = Vec<Vec<Option<(usize, u64)>>>;

/// Of one epoch.
pub struct FakeShard {
    pub epoch: u64,
    pub vocab: usize,
    pub block_size: usize,
    pub max_step_rows: usize,
    pub max_sequences: usize,
    pub max_model_len: usize,
    pub queue: VecDeque<StepPlan>,
    last_step: u64,
    live: BTreeMap<u32, Live>,
    pages: Pages,
    /// A shard's own: what it says of its pages.
    seals: Seals,
}

impl FakeShard {
    pub fn new(epoch: u64, n_blocks: usize, limits: phalanx_coordinator::scheduler::event::Limits) -> Self {
        Self {
            epoch,
            vocab: limits.vocab,
            block_size: limits.block_size,
            max_step_rows: limits.max_step_rows,
            max_sequences: limits.max_running,
            max_model_len: limits.max_model_len,
            queue: VecDeque::new(),
            last_step: 0,
            live: BTreeMap::new(),
            pages: vec![vec![None; limits.block_size]; n_blocks],
            seals: Seals::new(n_blocks, limits.block_size),
        }
    }

    /// With the pages of an earlier epoch, and what is known of them.
    pub fn with_pages(self, pages: Pages, seals: Seals) -> Self {
        assert_eq!(pages.len(), self.pages.len(), "blocks of kept pages");
        Self { pages, seals, ..self }
    }

    /// What the pages hold.
    pub fn pages(&self) -> &Pages {
        &self.pages
    }

    /// What is known of them.
    pub fn seals(&self) -> &Seals {
        &self.seals
    }

    /// The last step that was executed.
    pub fn last_step(&self) -> u64 {
        self.last_step
    }

    /// Whether the step that comes next computes rows of a sequence with this seed.
    pub fn next_computes(&self, seed: u64) -> bool {
        let Some(plan) = self.queue.front() else { return false };
        let has_seed = |sampling: Option<&SamplingParams>| sampling.is_some_and(|s| s.seed == seed);
        plan.chunks.iter().any(|chunk| {
            let start = plan.started.iter().find(|s| s.sequence == chunk.sequence);
            match start {
                Some(start) => has_seed(start.sampling.as_ref()),
                None => has_seed(self.live.get(&chunk.sequence).map(|l| &l.sampling)),
            }
        })
    }

    /// Ends in the middle of the step that was to come next: some of its rows are written, and worth nothing. Gives the
    /// pages back, and what is known of them.
    pub fn abort(mut self, mut is_written: impl FnMut() -> bool) -> (Pages, Seals) {
        if let Some(plan) = self.queue.pop_front() {
            self.apply_deltas(&plan);
            self.unseal(&plan);
            for chunk in &plan.chunks {
                let live = &self.live[&chunk.sequence];
                for position in chunk.start as usize..(chunk.start + chunk.len) as usize {
                    if is_written() {
                        let page = live.blocks[position / self.block_size] as usize;
                        self.pages[page][position % self.block_size] = Some((position, u64::MAX));
                    }
                }
            }
        }
        (self.pages, self.seals)
    }

    fn unseal(&mut self, plan: &StepPlan) {
        for chunk in &plan.chunks {
            let written = chunk.start as usize..(chunk.start + chunk.len) as usize;
            self.seals.unseal(&self.live[&chunk.sequence].blocks, written);
        }
    }

    /// Executes the oldest plan that was sent.
    pub fn run_next(&mut self) -> Option<StepResult> {
        let plan = self.queue.pop_front()?;
        Some(self.run(plan))
    }

    fn run(&mut self, plan: StepPlan) -> StepResult {
        assert_eq!(plan.epoch, self.epoch, "epoch of the plan");
        assert_eq!(plan.step, self.last_step + 1, "steps follow each other");
        self.last_step = plan.step;
        assert!(!plan.chunks.is_empty(), "step {} has nothing to do", plan.step);
        self.apply_deltas(&plan);
        self.check_rows(&plan);
        self.unseal(&plan);

        let (mut samples, mut prompt_scores) = (Vec::new(), Vec::new());
        for chunk in &plan.chunks {
            let (start, end) = (chunk.start as usize, (chunk.start + chunk.len) as usize);
            let live = self.live.get_mut(&chunk.sequence).expect("check_rows looked");
            let mut hash = prefix_hash(&live.tokens[..start]);
            let mut scores = Vec::new();
            for position in start..end {
                hash = mix(hash, u64::from(live.tokens[position]));
                let page = live.blocks[position / self.block_size] as usize;
                self.pages[page][position % self.block_size] = Some((position, hash ^ live.salt));
                if live.sampling.prompt_logprobs.is_some() && position + 1 < live.prompt_len {
                    scores.push(score(hash, live.tokens[position + 1]));
                }
            }
            live.computed = Some(end);
            if !scores.is_empty() {
                prompt_scores.push(PromptScores { sequence: chunk.sequence, start: chunk.start + 1, scores });
            }
            if chunk.sample {
                let token = next_token(hash, live.tokens.len() - live.prompt_len, &live.sampling, self.vocab);
                live.tokens.push(token);
                let score = live.sampling.logprobs.map(|_| score(hash, token));
                samples.push(Sample { sequence: chunk.sequence, token_id: token, score, ..Sample::default() });
            }
        }
        // A step writes all its rows before it reads any: a chunk may begin behind what another chunk of it computes.
        for chunk in &plan.chunks {
            let live = &self.live[&chunk.sequence];
            let mut hash = 1;
            for (position, token) in live.tokens[..chunk.start as usize].iter().enumerate() {
                hash = mix(hash, u64::from(*token));
                let page = live.blocks[position / self.block_size] as usize;
                let held = self.pages[page][position % self.block_size];
                let slot = chunk.sequence;
                assert_eq!(
                    held,
                    Some((position, hash ^ live.salt)),
                    "step {}: slot {slot}, position {position}",
                    plan.step
                );
            }
        }
        for chunk in &plan.chunks {
            let Some(live) = self.live.get_mut(&chunk.sequence) else { continue };
            let n_computed = (chunk.start + chunk.len) as usize;
            self.seals.seal(&mut live.sealed, &live.tokens, &live.blocks, n_computed);
        }
        StepResult { epoch: plan.epoch, step: plan.step, samples, prompt_scores, compute_us: 100, collective_us: 0 }
    }

    fn apply_deltas(&mut self, plan: &StepPlan) {
        for slot in &plan.dropped {
            assert!(self.live.remove(slot).is_some(), "step {}: dropped slot {slot} is not known", plan.step);
        }
        for start in &plan.started {
            let tokens = start.token_ids.clone();
            assert!(!tokens.is_empty() && tokens.len() <= self.max_model_len, "tokens of a start");
            assert!((1..=tokens.len()).contains(&(start.prompt_len as usize)), "prompt of a start");
            let sampling = start.sampling.clone().expect("a start has parameters");
            assert!(sampling.suppressed_token_ids.iter().all(|t| (*t as usize) < self.vocab), "suppressed ids");
            let prompt_len = start.prompt_len as usize;
            let root = Seal::from_slice(&start.cache_root).expect("a seal, or nothing");
            let salt = u64::from_le_bytes(*root.bytes().first_chunk().expect("a seal has more bytes"));
            let (blocks, sealed) = (start.blocks.clone(), SealedPrefix::new(root));
            let live = Live { tokens, prompt_len, sampling, blocks, computed: None, sealed, salt };
            let slot = start.sequence;
            assert!(!plan.dropped.contains(&slot), "slot {slot} is reused by the plan that drops it");
            assert!(self.live.insert(slot, live).is_none(), "slot {slot} is started twice");
        }
        for append in &plan.appended {
            let live = self.live.get_mut(&append.sequence).expect("blocks are for a live sequence");
            live.blocks.extend(&append.blocks);
        }
        for live in self.live.values() {
            let distinct: BTreeSet<_> = live.blocks.iter().collect();
            assert_eq!(distinct.len(), live.blocks.len(), "a sequence has a block twice");
            assert!(live.blocks.iter().all(|b| (*b as usize) < self.pages.len()), "blocks are in range");
        }
    }

    fn check_rows(&self, plan: &StepPlan) {
        let mut owners: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
        for (slot, live) in &self.live {
            live.blocks.iter().for_each(|b| owners.entry(*b).or_default().push(*slot));
        }
        let mut seen = BTreeSet::new();
        for (position, chunk) in plan.chunks.iter().enumerate() {
            let slot = chunk.sequence;
            let live = self.live.get(&slot).unwrap_or_else(|| panic!("step {}: slot {slot} is unknown", plan.step));
            assert!(seen.insert(slot), "two chunks of slot {slot}");
            let (start, end) = (chunk.start as usize, (chunk.start + chunk.len) as usize);
            assert!(chunk.len > 0 && end <= live.tokens.len(), "slot {slot}: rows {start}..{end}");
            if let Some(computed) = live.computed {
                assert_eq!(start, computed, "slot {slot} goes on where it was");
            }
            assert!(!chunk.sample || end == live.tokens.len(), "slot {slot} samples behind its last token");
            assert!(end <= live.blocks.len() * self.block_size, "slot {slot} has too few blocks");
            for idx in start / self.block_size..end.div_ceil(self.block_size) {
                let page = live.blocks[idx];
                let page_end = (idx + 1) * self.block_size;
                // Whoever is started by this very plan behind this chunk may share what it fills.
                let others = owners[&page].iter().filter(|owner| **owner != slot);
                let may_share = |other: &u32| {
                    let is_new = self.live[other].computed.is_none();
                    let behind = plan.chunks[position + 1..].iter().find(|c| c.sequence == *other);
                    end >= page_end && is_new && behind.is_some_and(|c| c.start as usize >= page_end)
                };
                let step = plan.step;
                assert!(others.clone().all(may_share), "step {step}: page {page} is written while {others:?} share it");
            }
        }
        let n_rows: u32 = plan.chunks.iter().map(|c| c.len).sum();
        assert!(n_rows as usize <= self.max_step_rows, "{n_rows} rows");
        assert!(plan.chunks.iter().filter(|c| c.sample).count() <= self.max_sequences, "sampled rows");
    }
}

/// Token 0 is "a", token 1 "b" and so on; each third token's letter comes out with the next one.
pub struct Letters;

#[derive(Default)]
struct Held(String);

impl Detokenize for Held {
    fn push(&mut self, id: u32) -> Option<String> {
        self.0.push(letter(id));
        if id % 3 == 2 { None } else { Some(std::mem::take(&mut self.0)) }
    }

    fn finish(&mut self) -> Option<String> {
        (!self.0.is_empty()).then(|| std::mem::take(&mut self.0))
    }
}

impl Detokenizers for Letters {
    fn detokenizer(&self, _skip_special_tokens: bool, _shown: &[u32]) -> Box<dyn Detokenize> {
        Box::new(Held::default())
    }
}

/// Text of a token.
pub fn letter(id: u32) -> char {
    char::from_u32('a' as u32 + id).unwrap_or('?')
}
