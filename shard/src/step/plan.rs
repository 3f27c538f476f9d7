//! Checks a plan from the wire against what the shard knows. Nothing changes before the whole plan is found good.

use std::collections::{BTreeMap, BTreeSet};

use phalanx_cluster::seal::{SEAL_BYTES, Seal};
use phalanx_proto::v1::{Chunk, SamplingParams, SequenceStart, StepPlan};

use super::sequence::Sequence;

/// What plans must keep to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Positions in a block.
    pub block_size: usize,
    /// Blocks of the KV cache.
    pub n_blocks: usize,
    /// Most rows of a step.
    pub max_step_rows: usize,
    /// Most sampled rows of a step.
    pub max_sequences: usize,
    /// Most tokens of a sequence.
    pub max_model_len: usize,
    /// Token ids are below it.
    pub vocab: usize,
}

/// What is wrong with a plan.
#[derive(Debug, thiserror::Error, PartialEq)]
pub enum PlanError {
    /// A sequence that was never started, or is dropped already.
    #[error("{what} of sequence {sequence}, which is not known")]
    Unknown {
        /// Part of the plan.
        what: &'static str,
        /// Which sequence.
        sequence: u32,
    },
    /// A sequence is started while it lives, or named twice in one part of the plan.
    #[error("{what} of sequence {sequence}, which is there already")]
    Twice {
        /// Part of the plan.
        what: &'static str,
        /// Which sequence.
        sequence: u32,
    },
    /// A number is out of its range.
    #[error("sequence {sequence}: {what} is {got}, want {want}")]
    Range {
        /// Which sequence.
        sequence: u32,
        /// Which number.
        what: &'static str,
        /// What the plan says.
        got: u64,
        /// What would do.
        want: String,
    },
    /// The sampling parameters are missing or out of range.
    #[error("sequence {sequence}: sampling: {reason}")]
    Sampling {
        /// Which sequence.
        sequence: u32,
        /// What is wrong.
        reason: String,
    },
    /// Too much for one step.
    #[error("{got} {what}, want at most {most}")]
    TooMany {
        /// Rows or sampled rows.
        what: &'static str,
        /// What the plan has.
        got: usize,
        /// What there is room for.
        most: usize,
    },
}

/// A plan that fits the shard's state.
#[derive(Debug, PartialEq)]
pub struct CheckedPlan {
    /// Sequences to forget, first.
    pub dropped: Vec<u32>,
    /// Sequences to add, after that.
    pub started: Vec<(u32, Sequence)>,
    /// Blocks to append, after that.
    pub appended: Vec<(u32, Vec<u32>)>,
    /// Rows to compute.
    pub chunks: Vec<CheckedChunk>,
    /// Rows of all chunks.
    pub n_rows: usize,
}

/// Consecutive positions of one sequence, all of them known tokens with pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CheckedChunk {
    /// Which sequence.
    pub sequence: u32,
    /// First position.
    pub start: usize,
    /// Number of positions, at least 1.
    pub len: usize,
    /// Whether the last row's logits are sampled; then it is the last known token.
    pub sample: bool,
}

/// The numbers of a sequence that chunks are checked against.
#[derive(Clone, Copy)]
struct Extent {
    known: usize,
    computed: Option<usize>,
    n_blocks: usize,
}

/// Checks a plan.
///
/// # Errors
/// Says the first thing that is wrong.
pub fn check(plan: StepPlan, sequences: &BTreeMap<u32, Sequence>, limits: &Limits) -> Result<CheckedPlan, PlanError> {
    let mut extents: BTreeMap<u32, Extent> = sequences.iter().map(|(id, s)| (*id, Extent::of(s))).collect();
    for id in &plan.dropped {
        extents.remove(id).ok_or(PlanError::Unknown { what: "drop", sequence: *id })?;
    }
    let mut started = Vec::with_capacity(plan.started.len());
    for start in plan.started {
        let id = start.sequence;
        let sequence = check_start(start, limits)?;
        if extents.insert(id, Extent::of(&sequence)).is_some() {
            return Err(PlanError::Twice { what: "start", sequence: id });
        }
        started.push((id, sequence));
    }
    let mut appended = Vec::with_capacity(plan.appended.len());
    for append in plan.appended {
        let id = append.sequence;
        check_blocks(id, &append.blocks, limits)?;
        let extent = extents.get_mut(&id).ok_or(PlanError::Unknown { what: "blocks", sequence: id })?;
        extent.n_blocks += append.blocks.len();
        appended.push((id, append.blocks));
    }
    let mut seen = BTreeSet::new();
    let mut chunks = Vec::with_capacity(plan.chunks.len());
    let mut n_rows = 0_usize;
    for chunk in plan.chunks {
        let id = chunk.sequence;
        let extent = extents.get(&id).ok_or(PlanError::Unknown { what: "chunk", sequence: id })?;
        if !seen.insert(id) {
            return Err(PlanError::Twice { what: "chunk", sequence: id });
        }
        let chunk = check_chunk(chunk, *extent, limits)?;
        n_rows += chunk.len;
        chunks.push(chunk);
    }
    if n_rows > limits.max_step_rows {
        return Err(PlanError::TooMany { what: "rows", got: n_rows, most: limits.max_step_rows });
    }
    let n_sampled = chunks.iter().filter(|chunk| chunk.sample).count();
    if n_sampled > limits.max_sequences {
        return Err(PlanError::TooMany { what: "sampled rows", got: n_sampled, most: limits.max_sequences });
    }
    Ok(CheckedPlan { dropped: plan.dropped, started, appended, chunks, n_rows })
}

impl Extent {
    fn of(sequence: &Sequence) -> Self {
        Self { known: sequence.tokens.len(), computed: sequence.computed, n_blocks: sequence.blocks.len() }
    }
}

fn check_start(start: SequenceStart, limits: &Limits) -> Result<Sequence, PlanError> {
    let id = start.sequence;
    let range = |what, got, want| Err(PlanError::Range { sequence: id, what, got, want });
    let n_tokens = start.token_ids.len();
    if n_tokens == 0 || n_tokens > limits.max_model_len {
        return range("number of tokens", n_tokens as u64, format!("1 to {}", limits.max_model_len));
    }
    if let Some(token) = start.token_ids.iter().find(|t| **t as usize >= limits.vocab) {
        return range("token id", u64::from(*token), format!("less than {}", limits.vocab));
    }
    if start.prompt_len == 0 || start.prompt_len as usize > n_tokens {
        return range("prompt length", u64::from(start.prompt_len), format!("1 to {n_tokens}"));
    }
    check_blocks(id, &start.blocks, limits)?;
    let wrong = |reason| PlanError::Sampling { sequence: id, reason };
    let sampling = start.sampling.ok_or_else(|| wrong("is missing".to_owned()))?;
    check_sampled_ids(&sampling, limits).map_err(wrong)?;
    let n_bytes = start.cache_root.len();
    let Some(root) = Seal::from_slice(&start.cache_root) else {
        return range("bytes of the cache root", n_bytes as u64, format!("0 or {SEAL_BYTES}"));
    };
    Sequence::new(start.token_ids, start.prompt_len as usize, start.blocks, root, &sampling)
        .map_err(|error| wrong(error.to_string()))
}

fn check_blocks(sequence: u32, blocks: &[u32], limits: &Limits) -> Result<(), PlanError> {
    match blocks.iter().find(|b| **b as usize >= limits.n_blocks) {
        Some(block) => Err(PlanError::Range {
            sequence,
            what: "block",
            got: u64::from(*block),
            want: format!("less than {}", limits.n_blocks),
        }),
        None => Ok(()),
    }
}

/// Token ids in the sampling parameters; [`Sequence::new`] checks the numbers.
fn check_sampled_ids(s: &SamplingParams, limits: &Limits) -> Result<(), String> {
    let runs = s.bad_words.iter().flat_map(|run| &run.token_ids);
    let ids = s.logit_bias.iter().map(|bias| &bias.token_id).chain(&s.suppressed_token_ids);
    match ids.chain(&s.allowed_token_ids).chain(runs).find(|id| **id as usize >= limits.vocab) {
        Some(id) => Err(format!("token {id} is not below {}", limits.vocab)),
        None => Ok(()),
    }
}

fn check_chunk(chunk: Chunk, extent: Extent, limits: &Limits) -> Result<CheckedChunk, PlanError> {
    let (start, len) = (chunk.start as usize, chunk.len as usize);
    let range =
        |what, got: usize, want| Err(PlanError::Range { sequence: chunk.sequence, what, got: got as u64, want });
    match extent.computed {
        Some(computed) if start != computed => return range("chunk start", start, format!("{computed}")),
        None if start > extent.known => return range("chunk start", start, format!("at most {}", extent.known)),
        _ => {}
    }
    let end = start + len;
    if len == 0 || end > extent.known {
        return range("chunk end", end, format!("{} to {}", start + 1, extent.known));
    }
    if chunk.sample && end != extent.known {
        return range("end of a sampling chunk", end, format!("{}", extent.known));
    }
    if end > limits.max_model_len {
        return range("chunk end", end, format!("at most {}", limits.max_model_len));
    }
    if end > extent.n_blocks * limits.block_size {
        let want = format!("at least {} for {end} positions", end.div_ceil(limits.block_size));
        return range("number of blocks", extent.n_blocks, want);
    }
    Ok(CheckedChunk { sequence: chunk.sequence, start, len, sample: chunk.sample })
}

#[cfg(test)]
mod tests {
    use super::*;
    use phalanx_proto::v1::{BlockAppend, LogitBias};

    const LIMITS: Limits =
        Limits { block_size: 4, n_blocks: 8, max_step_rows: 16, max_sequences: 2, max_model_len: 20, vocab: 100 };

    fn sampling() -> SamplingParams {
        SamplingParams { top_p: 1.0, repetition_penalty: 1.0, ..Default::default() }
    }

    fn start(sequence: u32, n_tokens: u32, blocks: &[u32]) -> SequenceStart {
        SequenceStart {
            sequence,
            token_ids: (0..n_tokens).collect(),
            prompt_len: n_tokens,
            sampling: Some(sampling()),
            blocks: blocks.to_vec(),
            cache_root: Vec::new(),
        }
    }

    fn chunk(sequence: u32, start: u32, len: u32, sample: bool) -> Chunk {
        Chunk { sequence, start, len, sample }
    }

    fn known(computed: Option<usize>) -> BTreeMap<u32, Sequence> {
        let mut sequence =
            Sequence::new(vec![1, 2, 3, 4, 5], 5, vec![0, 1], Seal::EMPTY, &sampling()).expect("good parameters");
        sequence.computed = computed;
        BTreeMap::from([(7, sequence)])
    }

    fn plan() -> StepPlan {
        StepPlan { epoch: 1, step: 1, ..Default::default() }
    }

    fn refused(plan: StepPlan, sequences: &BTreeMap<u32, Sequence>) -> String {
        check(plan, sequences, &LIMITS).expect_err("the plan is bad").to_string()
    }

    #[test]
    fn a_good_plan_is_taken_apart() {
        let plan = StepPlan {
            dropped: vec![7],
            started: vec![start(8, 6, &[2]), start(7, 3, &[0])],
            appended: vec![BlockAppend { sequence: 8, blocks: vec![3] }],
            chunks: vec![chunk(8, 4, 2, true), chunk(7, 0, 2, false)],
            ..plan()
        };
        let checked = check(plan, &known(Some(5)), &LIMITS).expect("the plan is good");
        assert_eq!(checked.n_rows, 4);
        assert_eq!(checked.chunks[0], CheckedChunk { sequence: 8, start: 4, len: 2, sample: true });
        assert_eq!(checked.started[1].1.tokens, [0, 1, 2]);
    }

    #[test]
    fn sequences_must_be_known_and_distinct() {
        let none = BTreeMap::new();
        let text = refused(StepPlan { chunks: vec![chunk(1, 0, 1, false)], ..plan() }, &none);
        assert_eq!(text, "chunk of sequence 1, which is not known");
        assert!(refused(StepPlan { dropped: vec![7, 7], ..plan() }, &known(None)).starts_with("drop of sequence 7"));
        let append = BlockAppend { sequence: 1, blocks: vec![] };
        assert!(refused(StepPlan { appended: vec![append], ..plan() }, &none).starts_with("blocks of sequence 1"));
        let text = refused(StepPlan { started: vec![start(7, 1, &[])], ..plan() }, &known(None));
        assert_eq!(text, "start of sequence 7, which is there already");
        let chunks = vec![chunk(7, 0, 1, false), chunk(7, 1, 1, false)];
        assert!(refused(StepPlan { chunks, ..plan() }, &known(None)).starts_with("chunk of sequence 7, which is"));
        let dropped = StepPlan { dropped: vec![7], chunks: vec![chunk(7, 0, 1, false)], ..plan() };
        assert!(refused(dropped, &known(None)).starts_with("chunk of sequence 7, which is not known"));
    }

    #[test]
    fn chunks_follow_what_is_computed_and_known() {
        let one = |c| StepPlan { chunks: vec![c], ..plan() };
        assert!(refused(one(chunk(7, 3, 1, false)), &known(Some(2))).contains("chunk start is 3, want 2"));
        assert!(refused(one(chunk(7, 6, 1, false)), &known(None)).contains("chunk start is 6, want at most 5"));
        assert!(refused(one(chunk(7, 2, 4, false)), &known(Some(2))).contains("chunk end is 6"));
        assert!(refused(one(chunk(7, 2, 0, false)), &known(Some(2))).contains("chunk end is 2"));
        assert!(refused(one(chunk(7, 0, 4, true)), &known(None)).contains("sampling chunk is 4, want 5"));
        assert!(refused(one(chunk(7, u32::MAX, u32::MAX, true)), &known(None)).contains("chunk start"));
        assert!(check(one(chunk(7, 4, 1, true)), &known(None), &LIMITS).is_ok());
    }

    #[test]
    fn blocks_are_in_range_and_enough() {
        let few = StepPlan { started: vec![start(1, 5, &[0])], chunks: vec![chunk(1, 0, 5, true)], ..plan() };
        assert!(refused(few, &BTreeMap::new()).contains("number of blocks is 1, want at least 2"));
        let far = StepPlan { started: vec![start(1, 5, &[8])], ..plan() };
        assert!(refused(far, &BTreeMap::new()).contains("block is 8, want less than 8"));
        let append = BlockAppend { sequence: 7, blocks: vec![u32::MAX] };
        assert!(refused(StepPlan { appended: vec![append], ..plan() }, &known(None)).contains("less than 8"));
    }

    #[test]
    fn limits_hold() {
        let none = BTreeMap::new();
        let started = vec![start(1, 17, &[0, 1, 2, 3, 4])];
        let rows = StepPlan { started, chunks: vec![chunk(1, 0, 17, true)], ..plan() };
        assert_eq!(refused(rows, &none), "17 rows, want at most 16");
        let started = (0..3).map(|id| start(id, 1, &[id])).collect();
        let three = StepPlan { started, chunks: (0..3).map(|id| chunk(id, 0, 1, true)).collect(), ..plan() };
        assert_eq!(refused(three, &none), "3 sampled rows, want at most 2");
        assert!(refused(StepPlan { started: vec![start(1, 21, &[])], ..plan() }, &none).contains("number of tokens"));
        assert!(refused(StepPlan { started: vec![start(1, 0, &[])], ..plan() }, &none).contains("number of tokens"));
        let token = SequenceStart { token_ids: vec![100], prompt_len: 1, ..start(1, 1, &[]) };
        assert!(refused(StepPlan { started: vec![token], ..plan() }, &none).contains("token id is 100"));
        let long = SequenceStart { prompt_len: 3, ..start(1, 2, &[]) };
        assert!(refused(StepPlan { started: vec![long], ..plan() }, &none).contains("prompt length is 3"));
    }

    #[test]
    fn sampling_parameters_are_numbers_in_range() {
        let with = |sampling| {
            let started = vec![SequenceStart { sampling, ..start(1, 1, &[]) }];
            refused(StepPlan { started, ..plan() }, &BTreeMap::new())
        };
        assert!(with(None).contains("is missing"));
        assert!(with(Some(SamplingParams { temperature: f32::NAN, ..sampling() })).contains("temperature"));
        assert!(with(Some(SamplingParams { top_p: 1.5, ..sampling() })).contains("top_p"));
        assert!(with(Some(SamplingParams { repetition_penalty: -1.0, ..sampling() })).contains("repetition_penalty"));
        let logit_bias = vec![LogitBias { token_id: 100, bias: 1.0 }];
        assert!(with(Some(SamplingParams { logit_bias, ..sampling() })).contains("token 100 is not below 100"));
        assert!(with(Some(SamplingParams { suppressed_token_ids: vec![100], ..sampling() })).contains("token 100"));
    }
}
