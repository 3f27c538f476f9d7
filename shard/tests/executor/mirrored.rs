//! Ranks that are lost and taken over with the rows that a mirror has of them.

use std::{
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use phalanx_kernels::{ops::Precision, pages::KvPages};
use phalanx_proto::v1::{Chunk, SequenceStart, StepPlan};
use phalanx_shard::{
    mirror::{Progress, Receiver, Store, Taking},
    offline::{LocalConfig, LocalGroup, greedy},
};

use crate::tiny::{TinyModel, prompt, small};

/// Far longer than anything here takes.
const AMPLE: Duration = Duration::from_secs(60);
const BLOCKS: [[u32; 4]; 2] = [[9, 2, 30, 4], [7, 8, 1, 11]];

/// A mirror of all ranks, for each rank that is to be lost.
struct Mirror {
    store: Store,
    receiver: Receiver,
}

impl Mirror {
    fn new() -> Self {
        let store = Store::new(1 << 30);
        let receiver = Receiver::start(([127, 0, 0, 1], 0).into(), store.clone()).expect("a port");
        Self { store, receiver }
    }

    /// Steps without rows until the mirror has every row before.
    fn await_rows(&self, group: &mut LocalGroup, n_steps: &mut u64) {
        let begun = Instant::now();
        let before = *n_steps;
        while self.store.progress().is_none_or(|Progress { step, .. }| step < before) {
            assert!(begun.elapsed() < AMPLE, "{:?} of {before} steps", self.store.progress());
            group.step(StepPlan::default()).expect("a plan without rows");
            *n_steps += 1;
            thread::yield_now();
        }
    }

    fn pages(&self, rank: u32) -> KvPages {
        let taking = Taking { term: 1, epoch: 2, rank, kv_of_epoch: 1, sealed_kv: false };
        let adopted = self.store.adopt(taking).expect("rows");
        adopted.pages.expect("a rank with KV heads")
    }
}

/// All tokens of two sequences.
type Tokens = [Vec<u32>; 2];

fn starts(tokens: &Tokens, prompt_lens: [usize; 2]) -> Vec<SequenceStart> {
    (0..2)
        .map(|idx| SequenceStart {
            sequence: idx as u32,
            token_ids: tokens[idx].clone(),
            prompt_len: prompt_lens[idx] as u32,
            sampling: Some(greedy()),
            blocks: BLOCKS[idx].to_vec(),
            cache_root: Vec::new(),
        })
        .collect()
}

/// Computes what is known and not computed, in one step, and appends what is sampled.
fn step(group: &mut LocalGroup, tokens: &mut Tokens, computed: &mut [usize; 2], started: Vec<SequenceStart>) {
    let chunk = |idx: usize| Chunk {
        sequence: idx as u32,
        start: computed[idx] as u32,
        len: (tokens[idx].len() - computed[idx]) as u32,
        sample: true,
    };
    let plan = StepPlan { started, chunks: vec![chunk(0), chunk(1)], ..StepPlan::default() };
    let result = group.step(plan).expect("a good plan");
    for sample in result.samples {
        let idx = sample.sequence as usize;
        computed[idx] = tokens[idx].len();
        tokens[idx].push(sample.token_id);
    }
}

#[test]
fn ranks_taken_over_from_a_mirror_go_on_with_the_same_tokens() {
    let model = TinyModel::new("llama", true);
    let prompts = [prompt(5, 21), prompt(6, 9)];
    let prompt_lens = [21, 9];
    for precision in [Precision::Auto, Precision::Float32] {
        let mut want = prompts.clone();
        let mut computed = [0; 2];
        let mut group = model.group(small(2, precision));
        for i in 0..24 {
            let started = if i == 0 { starts(&want, prompt_lens) } else { Vec::new() };
            step(&mut group, &mut want, &mut computed, started);
        }

        let mirrors = [Mirror::new(), Mirror::new()];
        let config = LocalConfig {
            mirrors: mirrors.iter().map(|mirror| mirror.receiver.target("spare", 2)).collect(),
            ..small(2, precision)
        };
        let mut group = model.group(config);
        let (mut tokens, mut computed, mut n_steps) = (prompts.clone(), [0; 2], 0);
        for i in 0..14 {
            let started = if i == 0 { starts(&tokens, prompt_lens) } else { Vec::new() };
            step(&mut group, &mut tokens, &mut computed, started);
            n_steps += 1;
        }
        mirrors.iter().for_each(|mirror| mirror.await_rows(&mut group, &mut n_steps));
        // Both ranks are lost; no row is computed again.
        drop(group);
        let pages = vec![mirrors[0].pages(0), mirrors[1].pages(1)];
        let mut group =
            LocalGroup::with_pages(Arc::new(model.clone()), small(2, precision), pages).expect("fitting pages");
        for i in 14..24 {
            let started = if i == 14 { starts(&tokens, prompt_lens) } else { Vec::new() };
            step(&mut group, &mut tokens, &mut computed, started);
        }
        assert_eq!(tokens, want, "{precision:?}");
    }
}
