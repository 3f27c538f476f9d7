//! Runs a plan: embedding and layers (`executor/forward.rs`), logits, choice of tokens.
//!
//! **Invariant.** What a sequence's tokens and scores are depends on its own tokens and parameters only: not on the
//! other rows of the step, the chunking, the world size or which rank computes. Ops promise it of every operation; the
//! choice of a token looks at one whole row of logits, or compares its slices' largest elements.

mod forward;

use std::{collections::BTreeMap, ops::Range, sync::Arc, time::Instant};

use forward::passes;

use phalanx_kernels::{
    collective::Collective,
    error::KernelError,
    ops::{Buf, Ops, RowChunk, StepRows},
};
use phalanx_proto::v1::{PromptScores, Sample, StepPlan, StepResult};

use super::{
    StepError,
    grammar::{Followed, Grammars, Refusal},
    plan::{self, CheckedPlan, Limits},
    sampling::{self, Candidate, Chosen, NO_TOKEN},
    seals::Seals,
    sequence::Sequence,
    timed::Timed,
};
use crate::{
    layer::{
        rows::RowSelection,
        scratch::{LOGIT_ROWS, Scratch},
    },
    model::LoadedModel,
};

/// The KV pages of a rank, between two steps.
pub struct Pages<'a> {
    /// The device that has them.
    pub ops: &'a mut dyn Ops,
    /// What blocks hold.
    pub seals: &'a Seals,
    /// The rows that the last step wrote.
    pub last_chunks: &'a [RowChunk],
}

/// Executes plans on one rank.
pub struct Executor {
    ops: Box<dyn Ops>,
    model: LoadedModel,
    scratch: Scratch,
    host: HostScratch,
    rows: StepRows,
    /// Of a step that takes several passes: those of one.
    pass_rows: RowSelection,
    /// Of a pass: those whose logits are wanted.
    wanted_rows: RowSelection,
    /// Where the last pass left the residual stream.
    residual: Buf,
    limits: Limits,
    sequences: BTreeMap<u32, Sequence>,
    seals: Seals,
    /// Sequences with rows in the last step, if it ran completely and they were not looked at for seals yet.
    to_seal: Vec<u32>,
    grammars: Option<Arc<Grammars>>,
    /// Rank 0: sequences under a grammar.
    followed: BTreeMap<u32, Arc<Followed>>,
}

/// Memory of the host for one step, kept between steps.
#[derive(Default)]
struct HostScratch {
    ids: Vec<u32>,
    local_ids: Vec<u32>,
    wanted: Vec<Wanted>,
    row_indices: Vec<u32>,
    argmax: Vec<(f32, u32)>,
    /// Of the greedy rows of the step, in order.
    candidates: Vec<Candidate>,
    /// This rank's logits of the rows of a block that rank 0 looks at.
    mine: Vec<f32>,
    /// Rank 0: the same of all ranks.
    all: Vec<f32>,
    /// Rank 0: one whole row.
    row: Vec<f32>,
    lens: Vec<usize>,
    sampling: sampling::Scratches,
}

/// A row whose logits are wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Wanted {
    row: u32,
    sequence: u32,
    purpose: Purpose,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Purpose {
    /// Rank 0 scores the prompt token of this position, which follows the row.
    Score { position: usize },
    /// Every rank finds the largest logit of its slice.
    Greedy,
    /// Rank 0 chooses.
    Sample,
}

/// What rank 0 has found in logits of the step.
#[derive(Default)]
struct Choices {
    /// Of rows that it chooses for, in order.
    chosen: Vec<Chosen>,
    prompt_scores: Vec<PromptScores>,
}

impl Executor {
    /// Of a loaded model and scratch memory: steps of more rows than it has room for take several passes. The device has its KV pages already, with what
    /// `seals` say.
    pub fn new(ops: Box<dyn Ops>, model: LoadedModel, scratch: Scratch, seals: Seals, limits: Limits) -> Self {
        let sampling = sampling::Scratches::new(ops.row_math());
        Self {
            residual: scratch.residual,
            ops,
            model,
            scratch,
            host: HostScratch { sampling, ..HostScratch::default() },
            rows: StepRows::default(),
            pass_rows: RowSelection::default(),
            wanted_rows: RowSelection::default(),
            limits,
            sequences: BTreeMap::new(),
            seals,
            to_seal: Vec::new(),
            grammars: None,
            followed: BTreeMap::new(),
        }
    }

    /// Makes sequences under a grammar possible. Rank 0 alone needs it.
    pub fn follow_grammars(&mut self, grammars: Arc<Grammars>) {
        self.grammars = Some(grammars);
    }

    /// Gives back what the executor was made of; sequences are forgotten.
    pub fn into_parts(self) -> (Box<dyn Ops>, LoadedModel, Scratch, Seals) {
        (self.ops, self.model, self.scratch, self.seals)
    }

    /// Seals the blocks that the last step filled, and those that its new sequences had before. Nobody's token waits for it.
    pub fn seal_step(&mut self) {
        self.seals.begin_step();
        for id in self.to_seal.drain(..) {
            if let Some(Sequence { sealed, tokens, blocks, computed: Some(n_computed), .. }) =
                self.sequences.get_mut(&id)
            {
                self.seals.seal(sealed, tokens, blocks, *n_computed);
            }
        }
    }

    /// The pages, and what is known of them.
    pub fn pages(&mut self) -> Pages<'_> {
        Pages { ops: self.ops.as_mut(), seals: &self.seals, last_chunks: &self.rows.chunks }
    }

    /// [`Ops::prefault`].
    pub fn prefault(&mut self, is_idle: bool) -> bool {
        self.ops.prefault(is_idle)
    }

    /// Executes a plan; all ranks do so with the same plan. Rank 0's result has the tokens.
    ///
    /// # Errors
    /// If the plan is bad, or the device or another rank fails. The executor is of no use after an error: sequences may
    /// have been changed already.
    pub fn run(&mut self, plan: StepPlan, collective: &mut dyn Collective) -> Result<StepResult, StepError> {
        let begun = Instant::now();
        let (epoch, step) = (plan.epoch, plan.step);
        let plan = plan::check(plan, &self.sequences, &self.limits)?;
        let mut collective = Timed::new(collective);
        let plan = self.admit(plan, collective.rank() == 0);
        self.unseal(&plan);
        let (samples, prompt_scores) = if plan.n_rows == 0 {
            self.rows.chunks.clear();
            (Vec::new(), Vec::new())
        } else {
            self.note_rows(&plan);
            let (mut choices, mut n_wanted) = (Choices::default(), 0);
            for pass in passes(plan.n_rows, self.scratch.max_rows) {
                let wanted = self.forward(pass, n_wanted, &mut collective)?;
                n_wanted = wanted.end;
                self.look_at_logits(wanted, &mut collective, &mut choices)?;
            }
            self.choose(&plan, choices, &mut collective)?
        };
        self.to_seal.extend(plan.chunks.iter().map(|chunk| chunk.sequence));
        let micros = |d: std::time::Duration| u64::try_from(d.as_micros()).unwrap_or(u64::MAX);
        Ok(StepResult {
            epoch,
            step,
            samples,
            prompt_scores,
            compute_us: micros(begun.elapsed()),
            collective_us: micros(collective.spent),
        })
    }

    /// Applies the plan's changes to the sequences.
    fn admit(&mut self, mut plan: CheckedPlan, is_rank_zero: bool) -> CheckedPlan {
        for id in &plan.dropped {
            self.sequences.remove(id);
            self.followed.remove(id);
        }
        for (id, sequence) in plan.started.iter().filter(|_| is_rank_zero) {
            let Some(grammar) = &sequence.grammar else { continue };
            let followed = match &self.grammars {
                Some(grammars) => grammars.begin(grammar, &sequence.tokens[sequence.prompt_len..]),
                None => Followed::refused("it was started without them"),
            };
            self.followed.insert(*id, followed);
        }
        self.sequences.extend(plan.started.drain(..));
        for (id, blocks) in plan.appended.drain(..) {
            if let Some(sequence) = self.sequences.get_mut(&id) {
                sequence.blocks.extend(blocks);
            }
        }
        plan
    }

    /// Whatever becomes of this step, the blocks that it writes to no longer hold what they did.
    fn unseal(&mut self, plan: &CheckedPlan) {
        self.to_seal.clear();
        for chunk in &plan.chunks {
            if let Some(sequence) = self.sequences.get(&chunk.sequence) {
                self.seals.unseal(&sequence.blocks, chunk.start..chunk.start + chunk.len);
            }
        }
    }

    /// Computes the logits of wanted rows of the last pass, block by block, and looks at them.
    fn look_at_logits(
        &mut self,
        of_pass: Range<usize>,
        collective: &mut dyn Collective,
        choices: &mut Choices,
    ) -> Result<(), StepError> {
        let wanted = std::mem::take(&mut self.host.wanted);
        for block in wanted[of_pass].chunks(LOGIT_ROWS.min(self.scratch.max_rows)) {
            self.logits(block)?;
            self.greedy_candidates(block)?;
            self.rank_zero_choices(block, collective, choices)?;
        }
        self.host.wanted = wanted;
        Ok(())
    }

    /// Chooses tokens. Every rank appends them to its sequences.
    fn choose(
        &mut self,
        plan: &CheckedPlan,
        Choices { chosen, prompt_scores }: Choices,
        collective: &mut dyn Collective,
    ) -> Result<(Vec<Sample>, Vec<PromptScores>), StepError> {
        let wanted = std::mem::take(&mut self.host.wanted);
        let greedy = self.agree_on_greedy(collective)?;
        let sampled = self.broadcast_chosen(&wanted, &chosen, collective)?;

        let is_rank_zero = collective.rank() == 0;
        let (mut greedy, mut sampled, mut chosen) = (greedy.into_iter(), sampled.into_iter(), chosen.into_iter());
        let mut samples = Vec::with_capacity(if is_rank_zero { plan.chunks.len() } else { 0 });
        for w in &wanted {
            let token = match w.purpose {
                Purpose::Score { .. } => continue,
                Purpose::Greedy => greedy.next(),
                Purpose::Sample => sampled.next(),
            };
            let choice = if w.purpose == Purpose::Sample { chosen.next() } else { None };
            let Chosen { score, refusal, .. } = choice.unwrap_or_default();
            let (Some(token), Some(sequence)) = (token, self.sequences.get_mut(&w.sequence)) else { continue };
            let failed = token == NO_TOKEN;
            // Any token does for a sequence that is over: the plan for the next step may be on its way already.
            let token_id = if failed { 0 } else { token };
            sequence.push(token_id);
            if let (Some(grammars), Some(followed)) = (&self.grammars, self.followed.get(&w.sequence))
                && !failed
            {
                grammars.push(followed, token_id);
            }
            if is_rank_zero {
                let no_grammars = matches!(refusal, Some(Refusal::OfShard(_)));
                let grammar_error = refusal.map(|refusal| refusal.to_string()).unwrap_or_default();
                samples.push(Sample { sequence: w.sequence, token_id, score, failed, grammar_error, no_grammars });
            }
        }
        self.host.wanted = wanted;
        Ok((samples, prompt_scores))
    }

    /// This rank's logits of some rows into the scratch.
    fn logits(&mut self, block: &[Wanted]) -> Result<(), KernelError> {
        let host = &mut self.host;
        host.row_indices.clear();
        host.row_indices.extend(block.iter().map(|w| w.row));
        let (scratch, model, ops) = (&self.scratch, &self.model, self.ops.as_mut());
        ops.gather_rows(self.residual, &host.row_indices, model.shape.config.hidden, scratch.gathered)?;
        let normed = model.output_norm.of(scratch.gathered);
        match model.output {
            Some(output) => ops.linear(normed, block.len(), &[(output, scratch.logits)]),
            None => Ok(()),
        }
    }

    /// The best token of this rank's slice for each greedy row.
    fn greedy_candidates(&mut self, block: &[Wanted]) -> Result<(), KernelError> {
        if block.iter().all(|w| w.purpose != Purpose::Greedy) {
            return Ok(());
        }
        let (host, logits) = (&mut self.host, self.scratch.logits);
        let slice = &self.model.shape.slice.vocab;
        let width = slice.len();
        host.argmax.clear();
        host.argmax.resize(block.len(), (f32::NEG_INFINITY, 0));
        if width > 0 {
            for (idx, w) in block.iter().enumerate() {
                let Some(sequence) = self.sequences.get(&w.sequence) else { continue };
                if w.purpose == Purpose::Greedy && sequence.counts.is_some() {
                    host.row.resize(width, 0.0);
                    self.ops.read(logits, idx * width, &mut host.row)?;
                    sampling::adjust(sequence, slice.start, &mut host.row);
                    self.ops.write(logits, idx * width, &host.row)?;
                }
            }
            self.ops.argmax(logits, block.len(), width, &mut host.argmax)?;
        }
        for (w, (logit, local_id)) in block.iter().zip(&host.argmax) {
            if w.purpose == Purpose::Greedy {
                host.candidates.push(Candidate::new(*logit, slice.start as u32 + local_id));
            }
        }
        Ok(())
    }

    /// Rows that rank 0 looks at as a whole: it scores prompt tokens and chooses.
    fn rank_zero_choices(
        &mut self,
        block: &[Wanted],
        collective: &mut dyn Collective,
        Choices { chosen, prompt_scores }: &mut Choices,
    ) -> Result<(), StepError> {
        let host = &mut self.host;
        let width = self.model.shape.vocab();
        let whole = |w: &&Wanted| w.purpose != Purpose::Greedy;
        let n_whole = block.iter().filter(whole).count();
        if n_whole == 0 {
            return Ok(());
        }
        host.mine.resize(n_whole * width, 0.0);
        if width > 0 {
            let indices = block.iter().enumerate().filter(|(_, w)| whole(w)).map(|(idx, _)| idx);
            for (slot, idx) in indices.enumerate() {
                let row = &mut host.mine[slot * width..(slot + 1) * width];
                self.ops.read(self.scratch.logits, idx * width, row)?;
            }
        }
        let vocab_of_ranks = &self.model.shape.vocab_of_ranks;
        let is_rank_zero = collective.rank() == 0;
        if collective.world_size() > 1 {
            host.lens.clear();
            host.lens.extend(vocab_of_ranks.iter().map(|v| v.len() * n_whole * size_of::<f32>()));
            let n_all = if is_rank_zero { self.model.shape.config.vocab * n_whole } else { 0 };
            host.all.resize(n_all, 0.0);
            collective.gather(bytemuck::cast_slice(&host.mine), &host.lens, bytemuck::cast_slice_mut(&mut host.all))?;
        }
        if !is_rank_zero {
            return Ok(());
        }
        for (slot, w) in block.iter().filter(whole).enumerate() {
            let Some(sequence) = self.sequences.get(&w.sequence) else { continue };
            host.row.clear();
            if collective.world_size() > 1 {
                // Rank r's part is [n_whole, its width], after the parts of the ranks before it.
                for vocab in vocab_of_ranks {
                    let at = vocab.start * n_whole + slot * vocab.len();
                    host.row.extend_from_slice(&host.all[at..at + vocab.len()]);
                }
            } else {
                host.row.extend_from_slice(&host.mine[slot * width..(slot + 1) * width]);
            }
            match w.purpose {
                Purpose::Score { position } => {
                    let n_top = sequence.prompt_logprobs.unwrap_or(0);
                    let score =
                        sampling::score(&host.row, sequence.tokens[position], n_top, &mut host.sampling.sampler)?;
                    match prompt_scores.last_mut().filter(|scores| scores.sequence == w.sequence) {
                        Some(scores) => scores.scores.push(score),
                        None => prompt_scores.push(PromptScores {
                            sequence: w.sequence,
                            start: position as u32,
                            scores: vec![score],
                        }),
                    }
                }
                Purpose::Sample => {
                    let allowed = self.followed.get(&w.sequence).and_then(|followed| followed.mask().transpose());
                    chosen.push(sampling::choose(sequence, allowed, &mut host.row, &mut host.sampling)?);
                }
                Purpose::Greedy => {}
            }
        }
        Ok(())
    }

    /// All ranks compare their slices' candidates: every rank knows the winners.
    fn agree_on_greedy(&mut self, collective: &mut dyn Collective) -> Result<Vec<u32>, StepError> {
        let mine = &self.host.candidates;
        if mine.is_empty() || collective.world_size() == 1 {
            return Ok(mine.iter().map(|candidate| candidate.token()).collect());
        }
        let mut all = vec![Candidate::NONE; mine.len() * collective.world_size()];
        let lens = vec![size_of_val(mine.as_slice()); collective.world_size()];
        collective.all_gather(bytemuck::cast_slice(mine), &lens, bytemuck::cast_slice_mut(&mut all))?;
        let best =
            |row: usize| all.chunks(mine.len()).map(|rank| rank[row]).fold(Candidate::NONE, Candidate::better).token();
        Ok((0..mine.len()).map(best).collect())
    }

    /// Tells all ranks what rank 0 chose.
    fn broadcast_chosen(
        &self,
        wanted: &[Wanted],
        chosen: &[Chosen],
        collective: &mut dyn Collective,
    ) -> Result<Vec<u32>, StepError> {
        let n_sampled = wanted.iter().filter(|w| w.purpose == Purpose::Sample).count();
        let mut tokens: Vec<u32> = chosen.iter().map(|choice| choice.token).collect();
        tokens.resize(n_sampled, 0);
        if n_sampled > 0 && collective.world_size() > 1 {
            collective.broadcast(bytemuck::cast_slice_mut(&mut tokens))?;
        }
        Ok(tokens)
    }
}
