//! Taking a rank: checkpoint, partition plan, collective, weights, pages.

use std::{
    net::TcpListener,
    ops::ControlFlow,
    path::{Path, PathBuf},
    time::Duration,
};

use phalanx_cluster::{
    checkpoint::{self, Checkpoint, CheckpointError},
    partition::{PartitionPlan, RankSlice},
    source,
};
use phalanx_kernels::{
    collective::{self, AbortFlag, Collective, CollectiveConfig, CollectiveError, PeerAddress},
    error::KernelError,
    ops::{KvShape, Ops, Precision},
};
use phalanx_proto::v1::{Form, Loaded, Ready, Serve};

use crate::{
    device::{self, DeviceConfig},
    layer::scratch::Scratch,
    memory::{self, KvDemand},
    model::{LoadError, LoadedModel, RankShape, loader::Progress},
    step::{Executor, Limits, StepError},
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

/// What loaded weights depend on: equal keys, equal weights and scratch memory.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Key {
    identity: String,
    precision: Precision,
    slice: RankSlice,
    ffn_slice_width: usize,
    max_step_rows: usize,
}

/// Weights on the device, kept over re-forming.
pub(super) struct Weights {
    key: Key,
    weight_bytes: u64,
    ops: Box<dyn Ops>,
    model: LoadedModel,
    scratch: Scratch,
}

/// A place in a group.
pub(super) struct Rank {
    collective: Box<dyn Collective>,
    weights: WeightsOrExecutor,
    limits: Limits,
    kv: KvShape,
}

enum WeightsOrExecutor {
    Weights(Box<Weights>),
    /// With what is needed to get the weights back.
    Executor(Box<Executor>, Key, u64),
}

impl Rank {
    /// Connects to the other ranks and loads, or keeps, the weights.
    ///
    /// # Errors
    /// If `form` makes no sense, the model can't be loaded, or a rank does not come. `kept` is lost then, unless it was
    /// the connection that failed.
    pub(super) fn form(
        form: &Form,
        config: &RankConfig,
        kept: &mut Option<Weights>,
        abort: &AbortFlag,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<(Self, Loaded), EngineError> {
        let precision = device::precision_of(&form.dtype)
            .ok_or_else(|| EngineError::BadForm(format!("dtype {:?}: want \"auto\" or \"float32\"", form.dtype)))?;
        let checkpoint = open(form)?;
        let plan = partition(form, checkpoint.as_ref())?;
        let collective = collective::connect_abortable(
            &collective_config(form),
            Some(&config.listener),
            config.collective.as_deref(),
            abort.clone(),
        )?;
        let rank = form.rank as usize;
        let key = Key {
            identity: checkpoint.identity().to_owned(),
            precision,
            slice: plan.ranks[rank].clone(),
            ffn_slice_width: plan.ffn_slice_width,
            max_step_rows: form.max_step_rows as usize,
        };
        let weights = match kept.take() {
            Some(mut weights) if weights.key == key => {
                weights.model.shape = RankShape::new(checkpoint.config(), &plan, rank);
                tracing::info!(bytes = weights.weight_bytes, "kept the weights of the group before");
                weights
            }
            other => {
                // Its memory is needed.
                drop(other);
                let mut on_progress = |p| {
                    progress(p);
                    if abort.is_aborted() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
                };
                Weights::load(key, &config.device, checkpoint.as_ref(), &plan, rank, &mut on_progress)?
            }
        };
        let model = checkpoint.config();
        let kv = KvShape {
            n_layers: model.n_layers,
            n_blocks: 0,
            block_size: form.block_size as usize,
            n_kv_heads: plan.ranks[rank].kv_heads.len(),
            head_dim: model.head_dim,
        };
        let kv_bytes_per_block = if kv.n_kv_heads > 0 { weights.ops.kv_bytes_per_block(kv) } else { 0 };
        let blocks_per_sequence = u64::from(form.max_model_len.div_ceil(form.block_size));
        let demand = KvDemand {
            asked_bytes: form.kv_cache_bytes,
            bytes_per_block: kv_bytes_per_block,
            free_bytes: memory::free_bytes(),
            sharers: form.peers.iter().filter(|peer| peer.host_id == config.host_id).count() as u64,
            useful_blocks: u64::from(form.max_sequences).saturating_mul(blocks_per_sequence),
        };
        let loaded = Loaded {
            epoch: form.epoch,
            weight_bytes: weights.weight_bytes,
            kv_blocks: demand.n_blocks(),
            kv_bytes_per_block,
            kv_kept_through_step: None,
        };
        let limits = Limits {
            block_size: kv.block_size,
            n_blocks: 0,
            max_step_rows: form.max_step_rows as usize,
            max_sequences: form.max_sequences as usize,
            max_model_len: form.max_model_len as usize,
            vocab: model.vocab,
        };
        Ok((Self { collective, weights: WeightsOrExecutor::Weights(Box::new(weights)), limits, kv }, loaded))
    }

    /// Allocates the pages; plans can be run afterwards.
    ///
    /// # Errors
    /// If the device has no memory for them.
    pub(super) fn serve(self, serve: &Serve) -> Result<(Self, Ready), EngineError> {
        let WeightsOrExecutor::Weights(mut weights) = self.weights else {
            return Err(EngineError::OutOfOrder("the pages are allocated already".to_owned()));
        };
        let kv = KvShape { n_blocks: serve.kv_blocks as usize, ..self.kv };
        let mut kv_bytes = 0;
        if kv.n_kv_heads > 0 {
            weights.ops.alloc_kv(kv)?;
            kv_bytes = weights.ops.kv_bytes_per_block(kv) * u64::from(serve.kv_blocks);
        }
        let limits = Limits { n_blocks: kv.n_blocks, ..self.limits };
        let Weights { key, weight_bytes, ops, model, scratch } = *weights;
        let executor = Box::new(Executor::new(ops, model, scratch, limits));
        let ready = Ready { epoch: serve.epoch, kv_bytes, resident_bytes: memory::resident_bytes() };
        Ok((Self { weights: WeightsOrExecutor::Executor(executor, key, weight_bytes), limits, kv, ..self }, ready))
    }

    /// Runs a plan.
    ///
    /// # Errors
    /// As [`Executor::run`].
    pub(super) fn run(
        &mut self,
        plan: phalanx_proto::v1::StepPlan,
    ) -> Result<phalanx_proto::v1::StepResult, EngineError> {
        match &mut self.weights {
            WeightsOrExecutor::Executor(executor, ..) => Ok(executor.run(plan, self.collective.as_mut())?),
            WeightsOrExecutor::Weights(_) => Err(EngineError::OutOfOrder("there are no pages yet".to_owned())),
        }
    }

    /// Leaves the group.
    pub(super) fn into_weights(self) -> Weights {
        match self.weights {
            WeightsOrExecutor::Weights(weights) => *weights,
            WeightsOrExecutor::Executor(executor, key, weight_bytes) => {
                let (mut ops, model, scratch) = executor.into_parts();
                // The next group measures free memory before it allocates its own pages.
                if self.kv.n_kv_heads > 0
                    && let Err(error) = ops.alloc_kv(KvShape { n_blocks: 0, ..self.kv })
                {
                    tracing::warn!(%error, "the KV pages of the last group are not freed");
                }
                Weights { key, weight_bytes, ops, model, scratch }
            }
        }
    }

    /// Name of the collective, for the log.
    pub(super) fn collective_name(&self) -> &'static str {
        self.collective.name()
    }
}

impl Weights {
    fn load(
        key: Key,
        device: &DeviceConfig,
        checkpoint: &dyn Checkpoint,
        plan: &PartitionPlan,
        rank: usize,
        progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
    ) -> Result<Self, EngineError> {
        let mut ops = device.open(key.precision)?;
        let model = crate::model::load(checkpoint, plan, rank, ops.as_mut(), progress)?;
        let weight_bytes = ops.resident_bytes();
        let scratch = Scratch::new(ops.as_mut(), &model.shape, key.max_step_rows)?;
        Ok(Self { key, weight_bytes, ops, model, scratch })
    }
}

/// Opens the model and checks that it is the coordinator's.
fn open(form: &Form) -> Result<Box<dyn Checkpoint>, EngineError> {
    let path = find(&form.model)?;
    let checkpoint = checkpoint::open(&path)?;
    if checkpoint.identity() == form.model_hash {
        Ok(checkpoint)
    } else {
        Err(EngineError::OtherModel {
            file: path,
            want: form.model_hash.clone(),
            got: checkpoint.identity().to_owned(),
        })
    }
}

/// The model's place on this machine; fetched, if it is not here yet.
fn find(model: &str) -> Result<PathBuf, EngineError> {
    let path = Path::new(model);
    if path.exists() {
        return Ok(path.to_owned());
    }
    source::resolve_quietly(model)
        .map_err(|error| EngineError::Model { model: model.to_owned(), reason: error.to_string() })
}

fn partition(form: &Form, checkpoint: &dyn Checkpoint) -> Result<PartitionPlan, EngineError> {
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
