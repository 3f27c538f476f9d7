//! A group in one process, a thread per rank: for benchmarks and for tests against references.
//!
//! It drives the very executor that shards run, without coordinator, link or scheduler.

use std::{
    collections::VecDeque,
    ops::ControlFlow,
    path::Path,
    sync::{Arc, mpsc},
    thread,
    time::Duration,
};

use phalanx_cluster::{
    checkpoint::{self, Checkpoint},
    partition::PartitionPlan,
};
use phalanx_kernels::{
    Isa,
    collective::{self, AbortFlag, Collective, CollectiveConfig, PeerAddress},
    ops::{KvShape, Precision},
    pages::KvPages,
};
use phalanx_proto::v1::{Chunk, SamplingParams, SequenceStart, StepPlan, StepResult, TokenScore};

use crate::{
    device::DeviceConfig,
    engine::EngineError,
    host,
    layer::scratch::{PASS_ROWS, Scratch},
    mirror::{Mirrors, RowsIdentity, Source, Target},
    model::{self, LoadError},
    step::{Executor, Limits, seals::Seals},
};

/// Longest wait of a rank for another.
const TIME_LIMIT: Duration = Duration::from_secs(300);
const EPOCH: u64 = 1;

/// Shape of a local group.
#[derive(Debug, Clone)]
pub struct LocalConfig {
    /// Ranks.
    pub world_size: usize,
    /// Threads of each rank.
    pub threads: usize,
    /// How numbers are kept.
    pub precision: Precision,
    /// Instruction set; `None` for the fastest.
    pub isa: Option<Isa>,
    /// Collective; `None` for the fastest.
    pub collective: Option<String>,
    /// Positions in a KV block, a multiple of 16.
    pub block_size: usize,
    /// KV blocks.
    pub kv_blocks: usize,
    /// Most rows of a step.
    pub max_step_rows: usize,
    /// Most rows that go through the layers together.
    pub max_pass_rows: usize,
    /// Most sampled rows of a step.
    pub max_sequences: usize,
    /// Where ranks copy their KV rows to.
    pub mirrors: Vec<Target>,
}

impl LocalConfig {
    /// `world_size` ranks of one thread each, with pages for 64 Ki positions and steps of up to 512 rows.
    pub fn new(world_size: usize, precision: Precision) -> Self {
        Self {
            world_size,
            threads: 1,
            precision,
            isa: None,
            collective: None,
            block_size: 16,
            kv_blocks: 4096,
            max_step_rows: 512,
            max_pass_rows: PASS_ROWS,
            max_sequences: 256,
            mirrors: Vec::new(),
        }
    }
}

/// What to generate.
#[derive(Debug, Clone, PartialEq)]
pub struct LocalRequest {
    /// Prompt.
    pub prompt: Vec<u32>,
    /// Tokens to generate; no token ends the sequence early. 0 only scores the prompt.
    pub max_tokens: usize,
    /// How to choose them.
    pub sampling: SamplingParams,
}

/// What was generated.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct LocalOutput {
    /// Tokens.
    pub tokens: Vec<u32>,
    /// Their scores, if `logprobs` were asked for.
    pub scores: Vec<TokenScore>,
    /// Scores of the prompt's tokens from the second on, if `prompt_logprobs` were asked for.
    pub prompt_scores: Vec<TokenScore>,
}

/// Parameters that always take the most probable token.
pub fn greedy() -> SamplingParams {
    SamplingParams { top_p: 1.0, repetition_penalty: 1.0, ..SamplingParams::default() }
}

/// A group whose ranks are threads of this process.
pub struct LocalGroup {
    ranks: Vec<RankThread>,
    abort: AbortFlag,
    step: u64,
    config: LocalConfig,
}

struct RankThread {
    plans: Option<mpsc::Sender<StepPlan>>,
    results: mpsc::Receiver<Result<StepResult, EngineError>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl LocalGroup {
    /// Loads a checkpoint.
    ///
    /// # Errors
    /// As loading on a shard.
    pub fn load(path: &Path, config: LocalConfig) -> Result<Self, EngineError> {
        Self::of(Arc::from(checkpoint::open(path)?), config)
    }

    /// Loads an open checkpoint.
    ///
    /// # Errors
    /// As loading on a shard.
    pub fn of(checkpoint: Arc<dyn Checkpoint>, config: LocalConfig) -> Result<Self, EngineError> {
        Self::with_pages(checkpoint, config, Vec::new())
    }

    /// Loads an open checkpoint; ranks take over these pages, in rank order, instead of empty ones.
    ///
    /// # Errors
    /// As loading on a shard; also if the pages don't fit.
    pub fn with_pages(
        checkpoint: Arc<dyn Checkpoint>,
        config: LocalConfig,
        pages: Vec<KvPages>,
    ) -> Result<Self, EngineError> {
        let mut pages = pages.into_iter();
        let plan = PartitionPlan::new(checkpoint.config(), &vec![1.0; config.world_size]).map_err(LoadError::from)?;
        let plan = Arc::new(plan);
        let peer = PeerAddress { host_id: host::host_id(), address: String::new() };
        let secret = uuid::Uuid::new_v4().into_bytes().to_vec();
        let abort = AbortFlag::default();
        let mut ranks = Vec::with_capacity(config.world_size);
        for rank in 0..config.world_size {
            let collective = CollectiveConfig {
                epoch: EPOCH,
                rank,
                world_size: config.world_size,
                secret: secret.clone(),
                peers: vec![peer.clone(); config.world_size],
                time_limit: TIME_LIMIT,
            };
            let (checkpoint, plan, config, abort) = (checkpoint.clone(), plan.clone(), config.clone(), abort.clone());
            let pages = pages.next();
            let (plan_sender, plans) = mpsc::channel::<StepPlan>();
            let (result_sender, results) = mpsc::channel();
            let body = move || {
                let made = start(checkpoint.as_ref(), &plan, &config, &collective, abort.clone(), pages);
                // The first answer is about loading.
                let (mut executor, mut collective, mut mirrors) = match made {
                    Ok(made) => made,
                    Err(error) => {
                        abort.abort();
                        let _nobody_listens = result_sender.send(Err(error));
                        return;
                    }
                };
                if result_sender.send(Ok(StepResult::default())).is_err() {
                    return;
                }
                for plan in plans {
                    let step = plan.step;
                    let result = executor.run(plan, collective.as_mut()).map_err(EngineError::from);
                    let has_run = result.is_ok();
                    if !has_run {
                        abort.abort();
                    }
                    if result_sender.send(result).is_err() {
                        return;
                    }
                    if has_run {
                        executor.seal_step();
                        if mirrors.step_done(step, &mut executor.pages()).is_err() {
                            return;
                        }
                    }
                }
            };
            let thread = thread::Builder::new()
                .name(format!("rank {rank}"))
                .spawn(body)
                .map_err(|error| EngineError::BadForm(format!("no thread for rank {rank}: {error}")))?;
            ranks.push(RankThread { plans: Some(plan_sender), results, thread: Some(thread) });
        }
        let mut group = Self { ranks, abort, step: 0, config };
        group.gather_results()?;
        Ok(group)
    }

    /// Runs one step on all ranks; epoch and step number are filled in. Returns rank 0's result.
    ///
    /// # Errors
    /// If the plan is bad or a rank fails; the group is of no use then.
    pub fn step(&mut self, mut plan: StepPlan) -> Result<StepResult, EngineError> {
        self.step += 1;
        (plan.epoch, plan.step) = (EPOCH, self.step);
        for rank in &self.ranks {
            if let Some(plans) = &rank.plans {
                // A rank that is gone has said why.
                let _gone = plans.send(plan.clone());
            }
        }
        self.gather_results()
    }

    /// Generates for all requests together: new rows for running sequences first, then chunks of prompts, as many rows
    /// as fit a step.
    ///
    /// # Errors
    /// As [`LocalGroup::step`]; also if the blocks don't suffice.
    pub fn generate(&mut self, requests: &[LocalRequest]) -> Result<Vec<LocalOutput>, EngineError> {
        let mut outputs = vec![LocalOutput::default(); requests.len()];
        let mut computed = vec![0; requests.len()];
        let mut waiting: VecDeque<usize> = (0..requests.len()).collect();
        let mut running: Vec<usize> = Vec::new();
        let mut next_block = 0;
        while !waiting.is_empty() || !running.is_empty() {
            let mut plan = StepPlan::default();
            let mut budget = self.config.max_step_rows;
            let mut started = Vec::new();
            for idx in running.iter().copied().chain(waiting.iter().copied()) {
                if budget == 0 || plan.chunks.len() == self.config.max_sequences {
                    break;
                }
                let request = &requests[idx];
                if computed[idx] == 0 {
                    let n_blocks = (request.prompt.len() + request.max_tokens).div_ceil(self.config.block_size);
                    plan.started.push(SequenceStart {
                        sequence: idx as u32,
                        token_ids: request.prompt.clone(),
                        prompt_len: request.prompt.len() as u32,
                        sampling: Some(request.sampling.clone()),
                        blocks: (next_block..next_block + n_blocks as u32).collect(),
                        cache_root: Vec::new(),
                    });
                    next_block += n_blocks as u32;
                    started.push(idx);
                }
                let known = request.prompt.len() + outputs[idx].tokens.len();
                let len = budget.min(known - computed[idx]);
                let sample = computed[idx] + len == known && request.max_tokens > 0;
                plan.chunks.push(Chunk { sequence: idx as u32, start: computed[idx] as u32, len: len as u32, sample });
                computed[idx] += len;
                budget -= len;
            }
            waiting.retain(|idx| !started.contains(idx));
            running.extend(started);
            let result = self.step(plan)?;
            for sample in result.samples {
                let output = &mut outputs[sample.sequence as usize];
                output.tokens.push(sample.token_id);
                output.scores.extend(sample.score);
            }
            for scores in result.prompt_scores {
                outputs[scores.sequence as usize].prompt_scores.extend(scores.scores);
            }
            running.retain(|idx| {
                computed[*idx] < requests[*idx].prompt.len() || outputs[*idx].tokens.len() < requests[*idx].max_tokens
            });
        }
        self.step(StepPlan { dropped: (0..requests.len() as u32).collect(), ..StepPlan::default() })?;
        Ok(outputs)
    }

    /// One answer of every rank; the first error of any, preferring one that is not the consequence of another's.
    fn gather_results(&mut self) -> Result<StepResult, EngineError> {
        let mut first = None;
        let mut failed: Option<EngineError> = None;
        for (idx, rank) in self.ranks.iter().enumerate() {
            match rank.results.recv() {
                Ok(Ok(result)) if idx == 0 => first = Some(result),
                Ok(Ok(_)) => {}
                Ok(Err(error)) if failed.as_ref().is_none_or(is_consequence) => failed = Some(error),
                Ok(Err(_)) => {}
                Err(_) => {
                    self.abort.abort();
                    failed.get_or_insert_with(|| EngineError::OutOfOrder(format!("rank {idx} has ended")));
                }
            }
        }
        match (failed, first) {
            (None, Some(result)) => Ok(result),
            (Some(error), _) => Err(error),
            (None, None) => Err(EngineError::BadForm("a group without ranks".to_owned())),
        }
    }
}

impl Drop for LocalGroup {
    fn drop(&mut self) {
        self.abort.abort();
        for rank in &mut self.ranks {
            rank.plans = None;
            if let Some(thread) = rank.thread.take() {
                // A rank's panic has shown as its missing answer.
                let _panicked = thread.join();
            }
        }
    }
}

fn is_consequence(error: &EngineError) -> bool {
    error.to_string().contains("aborted")
}

fn start(
    checkpoint: &dyn Checkpoint,
    plan: &PartitionPlan,
    config: &LocalConfig,
    collective: &CollectiveConfig,
    abort: AbortFlag,
    pages: Option<KvPages>,
) -> Result<(Executor, Box<dyn Collective>, Mirrors), EngineError> {
    let force = config.collective.as_deref();
    let joined = collective::connect_abortable(collective, None, force, abort.clone())?;
    let device = DeviceConfig { name: "cpu".to_owned(), threads: config.threads, isa: config.isa };
    let mut ops = device.open(config.precision)?;
    let mut progress = |_| if abort.is_aborted() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) };
    let model = model::load(checkpoint, plan, collective.rank, ops.as_mut(), &mut progress)?;
    let scratch = Scratch::new(ops.as_mut(), &model.shape, config.max_step_rows.min(config.max_pass_rows))?;
    let shape = KvShape {
        n_layers: model.layers.len(),
        n_blocks: config.kv_blocks,
        block_size: config.block_size,
        n_kv_heads: model.shape.n_kv_heads(),
        head_dim: model.shape.config.head_dim,
    };
    match pages {
        Some(pages) => ops.adopt_kv(pages)?,
        None if shape.n_kv_heads > 0 => ops.alloc_kv(shape)?,
        None => {}
    }
    let source = Source {
        term: 1,
        epoch: EPOCH,
        rank: collective.rank as u32,
        world_size: config.world_size as u32,
        n_sources: config.world_size as u32,
        shape,
        precision: config.precision,
        // Nobody else takes these rows.
        identity: RowsIdentity::default(),
    };
    let mirrors = Mirrors::start(source, config.mirrors.clone());
    let limits = Limits {
        block_size: config.block_size,
        n_blocks: config.kv_blocks,
        max_step_rows: config.max_step_rows,
        max_sequences: config.max_sequences,
        max_model_len: model.shape.config.context_length,
        vocab: model.shape.config.vocab,
    };
    Ok((Executor::new(ops, model, scratch, Seals::new(config.kv_blocks, config.block_size), limits), joined, mirrors))
}
