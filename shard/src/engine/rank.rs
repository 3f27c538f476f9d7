//! Taking a rank: checkpoint, partition plan, collective, weights, pages.

use std::{net::TcpListener, ops::ControlFlow, path::PathBuf, sync::Arc, time::Duration};

use phalanx_cluster::{
    checkpoint::{Checkpoint, CheckpointError},
    model_config::ModelConfig,
    partition::PartitionPlan,
};
use phalanx_kernels::{
    collective::{self, AbortFlag, Collective, CollectiveConfig, CollectiveError, PeerAddress},
    error::KernelError,
    ops::KvShape,
};
use phalanx_proto::v1::{Form, HeldPages, Loaded, Ready, Serve, StepPlan, StepResult};

use super::{
    checkpoints::Checkpoints,
    kept::{KeptPages, KeptState},
    mirrored::{self, Mirroring},
    slice::{self, Key, Slices, Weights},
};
use crate::{
    device::DeviceConfig,
    memory::{self, KvDemand},
    mirror::Store,
    model::{LoadError, RankShape, loader::Progress},
    step::{Executor, Limits, StepError, grammar::Grammars, seals::Seals},
};

/// Longest wait for another rank, in connecting and in each operation. A rank that computes a large step on a slow
/// machine must not pass for dead; a dead one is noticed by the coordinator long before.
const COLLECTIVE_TIME_LIMIT: Duration = Duration::from_secs(120);

/// What a shard needs to take any rank.
pub struct RankConfig {
    /// The device.
    pub device: DeviceConfig,
    /// Collective to use; `None` for the fastest that fits.
    pub collective: Option<String>,
    /// Where ranks of other hosts connect.
    pub listener: TcpListener,
    /// This host, as [`Form`] names peers.
    pub host_id: String,
    /// Where copies of other ranks' KV rows are kept, if they are.
    pub mirror: Option<Store>,
}

/// Why the engine could not do what it was told.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The slice can't be loaded.
    #[error("loading: {0}")]
    Load(#[from] LoadError),
    /// The device.
    #[error(transparent)]
    Device(#[from] KernelError),
    /// The other ranks.
    #[error(transparent)]
    Collective(#[from] CollectiveError),
    /// A step.
    #[error(transparent)]
    Step(#[from] StepError),
    /// The model can't be found or fetched.
    #[error("model {model}: {reason}")]
    Model {
        /// As the coordinator named it.
        model: String,
        /// Why not.
        reason: String,
    },
    /// This shard's file is not the coordinator's.
    #[error("model {}: its header's SHA-256 is {got}, the coordinator's file has {want}: give all machines one file", file.display())]
    OtherModel {
        /// This shard's file.
        file: PathBuf,
        /// The coordinator's.
        want: String,
        /// This one's.
        got: String,
    },
    /// The coordinator's message makes no sense.
    #[error("form: {0}")]
    BadForm(String),
    /// The engine was told to do something out of order.
    #[error("{0}")]
    OutOfOrder(String),
}

impl From<CheckpointError> for EngineError {
    fn from(error: CheckpointError) -> Self {
        Self::Load(error.into())
    }
}

/// What a shard has, whatever rank it takes.
pub(super) struct Resources<'a> {
    pub config: &'a RankConfig,
    pub checkpoints: &'a mut Checkpoints,
    pub slices: &'a mut Slices,
}

/// A place in a group.
pub(super) struct Rank {
    term: u64,
    epoch: u64,
    rank: u32,
    world_size: u32,
    collective: Box<dyn Collective>,
    weights: WeightsOrExecutor,
    limits: Limits,
    /// What follows grammars: rank 0's.
    grammars: Option<Arc<Grammars>>,
    kv: KvShape,
    /// What the pages held when this group took them over; until its first step.
    before: Option<Vec<KeptState>>,
    /// The last step that ran completely.
    last_step: u64,
    /// Where its rows are copied to.
    mirrors: Mirroring,
}

enum WeightsOrExecutor {
    Weights(Box<Weights>),
    /// With what is needed to get the weights back.
    Executor(Box<Executor>, Key, u64),
}

impl Rank {
    /// Connects to the other ranks and loads the weights, or finds them among the slices. KV pages stay where the form
    /// wants them and these weights have them, or a mirror has a copy; all others are dropped.
    ///
    /// # Errors
    /// If `form` makes no sense, the model can't be loaded, or a rank does not come.
    pub(super) fn form(
        form: &Form,
        resources: Resources<'_>,
        abort: &AbortFlag,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<(Self, Loaded), EngineError> {
        let Resources { config, checkpoints, slices } = resources;
        let checkpoint = checkpoints.open(form, abort)?;
        let plan = partition(form, checkpoint.as_ref())?;
        let rank = form.rank as usize;
        let key = Key::new(form, checkpoint.as_ref(), &plan, rank)?;
        let grammars = (rank == 0).then(|| checkpoints.grammars(&checkpoint));
        if let Some(grammars) = &grammars {
            grammars.read_vocabulary();
        }
        let model = checkpoint.config();
        let kv = kv_shape(form, model, &plan, rank);
        let mut mirrored = mirrored::wanted(config.mirror.as_ref(), form, kv, &key);
        if let Some(weights) = slices.get_mut(&key) {
            // At once: if this form is interrupted, the next one finds them there.
            mirrored::adopt(weights, mirrored.take(), form, kv)?;
        }
        for other in slices.values_mut() {
            let stays = |kept: &KeptPages| other.key == key && kept.are_wanted(form, kv);
            if !other.kept.as_ref().is_some_and(stays) {
                other.drop_pages();
            }
        }
        let collective = collective::connect_abortable(
            &collective_config(form),
            Some(&config.listener),
            config.collective.as_deref(),
            abort.clone(),
        )?;
        let mut weights = match slices.take(&key) {
            Some(mut weights) => {
                weights.model.shape = RankShape::new(model, &plan, rank);
                tracing::info!(bytes = weights.weight_bytes, "this slice is loaded already");
                weights
            }
            None => {
                let need = slice::estimate(checkpoint.as_ref(), &plan, rank, key.precision())?;
                make_room(slices, &key, need.saturating_add(form.kv_cache_bytes));
                let ops = slice::open_device(&key, &config.device)?;
                let mut on_progress = |p| {
                    progress(p);
                    if abort.is_aborted() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
                };
                Weights::load(key, ops, checkpoint.as_ref(), &plan, rank, &mut on_progress)?
            }
        };
        let has_pages = weights.kept.as_ref().is_some_and(|kept| kept.are_wanted(form, kv));
        if !has_pages && mirrored.is_none() {
            mirrored = mirrored::fetched(form, kv, &weights.key, abort)?;
        }
        mirrored::adopt(&mut weights, mirrored, form, kv)?;
        let kv_kept_through_step = weights.kept.as_ref().and_then(|kept| kept.through_step(form, kv));
        let sealed = weights.kept.as_ref().and_then(|kept| kept.sealed(form, kv));
        let kv_bytes_per_block = if kv.n_kv_heads > 0 { weights.ops.kv_bytes_per_block(kv) } else { 0 };
        let kv_blocks = match &weights.kept {
            // They are there already.
            Some(kept) => kept.n_blocks,
            None => {
                make_room(slices, &weights.key, form.kv_cache_bytes);
                let sharers = form.peers.iter().filter(|peer| peer.host_id == config.host_id).count();
                kv_blocks(form, kv_bytes_per_block, sharers)
            }
        };
        let loaded = Loaded {
            epoch: form.epoch,
            weight_bytes: weights.weight_bytes,
            kv_blocks,
            kv_bytes_per_block,
            kv_kept_through_step,
            sealed,
        };
        let limits = Limits {
            block_size: kv.block_size,
            n_blocks: 0,
            max_step_rows: form.max_step_rows as usize,
            max_sequences: form.max_sequences as usize,
            max_model_len: form.max_model_len as usize,
            vocab: model.vocab,
        };
        let rank = Self {
            term: form.term,
            epoch: form.epoch,
            rank: form.rank,
            world_size: form.world_size,
            collective,
            weights: WeightsOrExecutor::Weights(Box::new(weights)),
            limits,
            grammars,
            kv,
            before: None,
            last_step: 0,
            mirrors: Mirroring::new(form),
        };
        Ok((rank, loaded))
    }

    /// Allocates the pages, unless they are there; plans can be run afterwards.
    ///
    /// # Errors
    /// If the device has no memory for them.
    pub(super) fn serve(self, serve: &Serve) -> Result<(Self, Ready), EngineError> {
        let WeightsOrExecutor::Weights(mut weights) = self.weights else {
            return Err(EngineError::OutOfOrder("the pages are allocated already".to_owned()));
        };
        let n_blocks = serve.kv_blocks as usize;
        let before = weights.kept.take().filter(|kept| n_blocks <= kept.shape.n_blocks);
        let (kv, seals, before) = match before {
            Some(kept) => (kept.shape, kept.seals, Some(kept.states)),
            None => (KvShape { n_blocks, ..self.kv }, Seals::new(n_blocks, self.kv.block_size), None),
        };
        let mut kv_bytes = 0;
        if kv.n_kv_heads > 0 {
            if before.is_none() {
                weights.ops.alloc_kv(kv)?;
            }
            kv_bytes = weights.ops.kv_bytes_per_block(kv) * kv.n_blocks as u64;
        }
        let limits = Limits { n_blocks, ..self.limits };
        let Weights { key, weight_bytes, ops, model, scratch, kept: _ } = *weights;
        let (precision, identity) = (key.precision(), key.rows_identity());
        let mut executor = Box::new(Executor::new(ops, model, scratch, seals, limits));
        if let Some(grammars) = &self.grammars {
            executor.follow_grammars(Arc::clone(grammars));
        }
        let ready = Ready { epoch: serve.epoch, kv_bytes, resident_bytes: memory::resident_bytes() };
        let weights = WeightsOrExecutor::Executor(executor, key, weight_bytes);
        let mut rank = Self { weights, limits, kv, before, ..self };
        rank.mirrors.begin(kv, precision, identity);
        Ok((rank, ready))
    }

    /// Runs a plan.
    ///
    /// # Errors
    /// As [`Executor::run`].
    pub(super) fn run(&mut self, plan: StepPlan) -> Result<StepResult, EngineError> {
        let WeightsOrExecutor::Executor(executor, ..) = &mut self.weights else {
            return Err(EngineError::OutOfOrder("there are no pages yet".to_owned()));
        };
        let step = plan.step;
        self.before = None;
        let result = executor.run(plan, self.collective.as_mut())?;
        self.last_step = step;
        Ok(result)
    }

    /// What is left to do after a step, when its result is on its way: notes what its blocks hold, copies its rows to
    /// mirrors, and touches pages that are needed soon. Never waits, and fails nothing: a mirror that lacks rows says so.
    pub(super) fn after_step(&mut self) {
        if let WeightsOrExecutor::Executor(executor, ..) = &mut self.weights {
            executor.seal_step();
            self.mirrors.step_done(self.last_step, executor.pages());
            executor.prefault(false);
        }
    }

    /// Touches some memory that steps will write; when there is no step to run. `false` if there is no more to do.
    pub(super) fn prefault(&mut self) -> bool {
        match &mut self.weights {
            WeightsOrExecutor::Executor(executor, ..) => executor.prefault(true),
            WeightsOrExecutor::Weights(_) => false,
        }
    }

    /// Copies some of the rows that mirrors lack; when there is no step to run.
    pub(super) fn mirror_catch_up(&mut self) {
        if let WeightsOrExecutor::Executor(executor, ..) = &mut self.weights {
            self.mirrors.catch_up(executor.pages());
        }
    }

    /// When to do that next; `None` without mirrors.
    pub(super) fn mirror_next_look(&self) -> Option<Duration> {
        self.mirrors.next_look()
    }

    /// Leaves the group. The pages stay with the weights: the next form says whether it wants them.
    pub(super) fn into_weights(self) -> Weights {
        match self.weights {
            WeightsOrExecutor::Weights(weights) => *weights,
            WeightsOrExecutor::Executor(executor, key, weight_bytes) => {
                let (ops, model, scratch, seals) = executor.into_parts();
                let last = KeptState { epoch: self.epoch, through_step: self.last_step };
                let n_blocks = u32::try_from(self.limits.n_blocks).unwrap_or(u32::MAX);
                let Self { term, rank, world_size, kv: shape, before, .. } = self;
                let kept = KeptPages { term, rank, world_size, shape, n_blocks, states: vec![last], seals };
                Weights { key, weight_bytes, ops, model, scratch, kept: Some(kept.named_before(before)) }
            }
        }
    }

    /// Its pages, once there are any.
    pub(super) fn held(&self) -> Option<HeldPages> {
        match &self.weights {
            WeightsOrExecutor::Weights(weights) => weights.kept.as_ref().map(KeptPages::held),
            WeightsOrExecutor::Executor(..) => {
                let kv_blocks = u32::try_from(self.limits.n_blocks).unwrap_or(u32::MAX);
                Some(HeldPages { rank: self.rank, world_size: self.world_size, kv_blocks })
            }
        }
    }

    /// What its weights depend on, and their bytes.
    pub(super) fn slice(&self) -> (&Key, u64) {
        match &self.weights {
            WeightsOrExecutor::Weights(weights) => (&weights.key, weights.weight_bytes),
            WeightsOrExecutor::Executor(_, key, weight_bytes) => (key, *weight_bytes),
        }
    }

    /// Name of the collective, for the log.
    pub(super) fn collective_name(&self) -> &'static str {
        self.collective.name()
    }
}

/// The KV pages of a rank, but for their number.
pub(super) fn kv_shape(form: &Form, model: &ModelConfig, plan: &PartitionPlan, rank: usize) -> KvShape {
    KvShape {
        n_layers: model.n_layers,
        n_blocks: 0,
        block_size: form.block_size as usize,
        n_kv_heads: plan.ranks[rank].kv_heads.len(),
        head_dim: model.head_dim,
    }
}

/// Blocks that a rank has memory for if so many ranks share it.
pub(super) fn kv_blocks(form: &Form, bytes_per_block: u64, sharers: usize) -> u32 {
    let blocks_per_sequence = u64::from(form.max_model_len.div_ceil(form.block_size.max(1)));
    let demand = KvDemand {
        asked_bytes: form.kv_cache_bytes,
        wanted_blocks: form.kv_blocks,
        bytes_per_block,
        free_bytes: memory::free_bytes(),
        sharers: sharers as u64,
        useful_blocks: u64::from(form.max_sequences).saturating_mul(blocks_per_sequence),
    };
    demand.n_blocks()
}

/// Drops slices until so many bytes are free: first those of other models, of which nothing is wanted any more.
fn make_room(slices: &mut Slices, key: &Key, need: u64) {
    slices.retain(|other| other.is_of_the_same_model(key));
    while memory::free_bytes().is_some_and(|free| free < need.saturating_add(memory::RESERVE_BYTES)) {
        if !slices.drop_oldest(|_| true) {
            return;
        }
        tracing::info!(need, "dropped a slice that was loaded ahead: its memory is needed");
    }
}

/// How the form deals the model to ranks.
///
/// # Errors
/// If the form makes no sense for this model.
pub(super) fn partition(form: &Form, checkpoint: &dyn Checkpoint) -> Result<PartitionPlan, EngineError> {
    let bad = |what: &str, got: u64| EngineError::BadForm(format!("{what} is {got}"));
    if form.world_size == 0 || form.peers.len() != form.world_size as usize {
        return Err(EngineError::BadForm(format!("{} peers for {} ranks", form.peers.len(), form.world_size)));
    }
    if form.rank >= form.world_size {
        return Err(bad("rank", u64::from(form.rank)));
    }
    if let Some((idx, peer)) = form.peers.iter().enumerate().find(|(idx, peer)| *idx != peer.rank as usize) {
        return Err(EngineError::BadForm(format!("peer {idx} has rank {}: want rank order", peer.rank)));
    }
    let config = checkpoint.config();
    if form.max_model_len == 0 || form.max_model_len as usize > config.context_length {
        return Err(EngineError::BadForm(format!(
            "max_model_len is {}, want 1 to {}",
            form.max_model_len, config.context_length
        )));
    }
    for (what, got) in
        [("block_size", form.block_size), ("max_step_rows", form.max_step_rows), ("max_sequences", form.max_sequences)]
    {
        if got == 0 {
            return Err(bad(what, 0));
        }
    }
    let speeds: Vec<f64> = form.peers.iter().map(|peer| peer.weight).collect();
    Ok(PartitionPlan::new(config, &speeds).map_err(LoadError::from)?)
}

fn collective_config(form: &Form) -> CollectiveConfig {
    let peer = |peer: &phalanx_proto::v1::Peer| PeerAddress {
        host_id: peer.host_id.clone(),
        address: peer.collective_address.clone(),
    };
    CollectiveConfig {
        epoch: form.epoch,
        rank: form.rank as usize,
        world_size: form.world_size as usize,
        secret: form.collective_secret.clone(),
        peers: form.peers.iter().map(peer).collect(),
        time_limit: COLLECTIVE_TIME_LIMIT,
    }
}
