//! One rank's slice of a model: what it depends on, its weights on the device, its size before it is loaded.

use std::ops::ControlFlow;

use phalanx_cluster::{
    checkpoint::Checkpoint,
    partition::{PartitionPlan, RankSlice},
};
use phalanx_kernels::ops::{KvShape, Ops, Precision};
use phalanx_proto::v1::Form;

use sha2::{Digest, Sha256};

use super::{kept::KeptPages, rank::EngineError, shelf::Shelf};
use crate::{
    device::{self, DeviceConfig},
    layer::scratch::{PASS_ROWS, Scratch},
    mirror::RowsIdentity,
    model::{self, LoadError, LoadedModel, loader::Progress},
};

/// Slices that are loaded and that no group uses.
pub(super) type Slices = Shelf<Key, Weights>;

/// What loaded weights depend on: equal keys, equal weights and scratch memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Key {
    identity: String,
    precision: Precision,
    slice: RankSlice,
    ffn_slice_width: usize,
    max_step_rows: usize,
}

impl Key {
    /// Of a rank of a plan.
    ///
    /// # Errors
    /// If the form names a precision that there is not.
    pub fn new(
        form: &Form,
        checkpoint: &dyn Checkpoint,
        plan: &PartitionPlan,
        rank: usize,
    ) -> Result<Self, EngineError> {
        let precision = device::precision_of(&form.dtype)
            .ok_or_else(|| EngineError::BadForm(format!("dtype {:?}: want \"auto\" or \"float32\"", form.dtype)))?;
        Ok(Self {
            identity: checkpoint.identity().to_owned(),
            precision,
            slice: plan.ranks[rank].clone(),
            ffn_slice_width: plan.ffn_slice_width,
            max_step_rows: form.max_step_rows as usize,
        })
    }

    /// Whether both are slices of one model as one group would compute it.
    pub fn is_of_the_same_model(&self, other: &Self) -> bool {
        self.identity == other.identity
            && self.precision == other.precision
            && self.max_step_rows == other.max_step_rows
    }

    /// How numbers are kept.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// Names what its KV rows depend on beside tokens. Who computes is left out: a shard takes copies of its own kind only.
    pub fn rows_identity(&self) -> RowsIdentity {
        let Self { identity, precision, slice, ffn_slice_width, max_step_rows: _ } = self;
        let mut hasher = Sha256::new();
        hasher.update(identity);
        hasher.update([0, u8::from(*precision == Precision::Float32)]);
        for number in [slice.kv_heads.start, slice.kv_heads.end, *ffn_slice_width] {
            hasher.update((number as u64).to_le_bytes());
        }
        let mut rows = RowsIdentity::default();
        let n_bytes = rows.len();
        rows.copy_from_slice(&hasher.finalize()[..n_bytes]);
        rows
    }
}

/// Weights on the device, kept over re-forming.
pub(super) struct Weights {
    pub key: Key,
    pub weight_bytes: u64,
    pub ops: Box<dyn Ops>,
    pub model: LoadedModel,
    pub scratch: Scratch,
    /// The KV pages that the device has beside them, if they are worth keeping: of a group that ended, or filled from
    /// elsewhere.
    pub kept: Option<KeptPages>,
}

impl Weights {
    /// Loads a slice onto `ops`, a device of the key's precision that holds nothing yet.
    ///
    /// # Errors
    /// As [`model::load`].
    pub fn load(
        key: Key,
        mut ops: Box<dyn Ops>,
        checkpoint: &dyn Checkpoint,
        plan: &PartitionPlan,
        rank: usize,
        progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
    ) -> Result<Self, EngineError> {
        let model = model::load(checkpoint, plan, rank, ops.as_mut(), progress)?;
        let weight_bytes = ops.resident_bytes();
        let scratch = Scratch::new(ops.as_mut(), &model.shape, key.max_step_rows.min(PASS_ROWS))?;
        Ok(Self { key, weight_bytes, ops, model, scratch, kept: None })
    }

    /// Allocates pages that the next group can serve from if it wants as many, or fewer. `n_blocks` says how many from the bytes of
    /// a block.
    pub fn reserve_pages(&mut self, shape: KvShape, n_blocks: impl FnOnce(u64) -> u32) {
        if shape.n_kv_heads == 0 {
            return;
        }
        let n_blocks = n_blocks(self.ops.kv_bytes_per_block(shape)) as usize;
        if let Err(error) = self.ops.alloc_kv(KvShape { n_blocks, ..shape }) {
            // The group that wants some says what is wrong.
            tracing::debug!(%error, "no KV pages ahead");
        }
    }

    /// Gives the memory of kept pages back: the next group measures what is free before it allocates its own.
    pub fn drop_pages(&mut self) {
        let Some(shape) = self.kept.take().map(|kept| kept.shape) else { return };
        if shape.n_kv_heads > 0
            && let Err(error) = self.ops.alloc_kv(KvShape { n_blocks: 0, ..shape })
        {
            tracing::warn!(%error, "the KV pages of the last group are not freed");
        }
    }
}

/// A device for weights of this key.
///
/// # Errors
/// If the device does not open.
pub(super) fn open_device(key: &Key, device: &DeviceConfig) -> Result<Box<dyn Ops>, EngineError> {
    Ok(device.open(key.precision)?)
}

/// About how much memory a slice will take; rather too much than too little.
///
/// # Errors
/// If the checkpoint lacks a tensor.
pub(super) fn estimate(
    checkpoint: &dyn Checkpoint,
    plan: &PartitionPlan,
    rank: usize,
    precision: Precision,
) -> Result<u64, LoadError> {
    let size = model::loader::size(checkpoint, plan, rank)?;
    Ok(match precision {
        // Quantized weights are packed into tiles with scales of their own.
        Precision::Auto => size.stored_bytes + size.stored_bytes / 4,
        Precision::Float32 => size.elements * size_of::<f32>() as u64,
    })
}
