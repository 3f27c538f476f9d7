//! Buffers of a step, sized once.

use phalanx_kernels::{
    error::KernelError,
    ops::{ActivationLevels, Buf, FixedBuf, Linear, LinearSource, Ops, WeightData},
};

use crate::model::RankShape;

/// Rows whose logits are computed together: bounds the memory of logits (32 rows of 150,000 f32 are 19 MB).
pub const LOGIT_ROWS: usize = 32;

/// Rows that go through the layers together, at most: with more, their activations leave the second-level cache, and each takes
/// a tenth longer.
pub const PASS_ROWS: usize = 512;

/// Buffers for up to `max_rows` rows.
pub struct Scratch {
    /// Most rows of a pass.
    pub max_rows: usize,
    /// Residual stream, `[max_rows, hidden]`.
    pub residual: Buf,
    /// Room for some rows of it, `[max_rows, hidden]`.
    pub spare: Buf,
    /// `[max_rows, q_width]`.
    pub q: Buf,
    /// `[max_rows, kv_width]`.
    pub k: Buf,
    /// `[max_rows, kv_width]`.
    pub v: Buf,
    /// Attention's output, `[max_rows, q_width]`.
    pub attended: Buf,
    /// `[max_rows, ffn]`.
    pub gate: Buf,
    /// `[max_rows, ffn]`.
    pub up: Buf,
    /// What a block adds to the residual stream, `[max_rows, hidden]`.
    pub delta: FixedBuf,
    /// Rows whose logits are wanted, `[LOGIT_ROWS, hidden]`.
    pub gathered: Buf,
    /// This rank's part of their logits, `[LOGIT_ROWS, vocab]`.
    pub logits: Buf,
    /// A table `[1, hidden]` that stands for tables this rank has no row of.
    pub nothing: Linear,
    /// `[max_rows]` times "a row of another rank", see [`Ops::embed`].
    pub elsewhere: Vec<u32>,
}

impl Scratch {
    /// Allocates the buffers.
    ///
    /// # Errors
    /// If the device has no memory for them.
    pub fn new(ops: &mut dyn Ops, shape: &RankShape, max_rows: usize) -> Result<Self, KernelError> {
        let hidden = shape.config.hidden;
        let logit_rows = LOGIT_ROWS.min(max_rows);
        let zeros = vec![0.0; hidden];
        let nothing = LinearSource {
            n_out: 1,
            n_in: hidden,
            data: WeightData::F32(&zeros),
            bias: None,
            slice_width: None,
            activations: ActivationLevels::One,
        };
        Ok(Self {
            max_rows,
            residual: ops.alloc(max_rows * hidden)?,
            spare: ops.alloc(max_rows * hidden)?,
            q: ops.alloc(max_rows * shape.q_width())?,
            k: ops.alloc(max_rows * shape.kv_width())?,
            v: ops.alloc(max_rows * shape.kv_width())?,
            attended: ops.alloc(max_rows * shape.q_width())?,
            gate: ops.alloc(max_rows * shape.ffn())?,
            up: ops.alloc(max_rows * shape.ffn())?,
            delta: ops.alloc_fixed(max_rows * hidden)?,
            gathered: ops.alloc(logit_rows * hidden)?,
            logits: ops.alloc(logit_rows * shape.vocab())?,
            nothing: ops.load_linear(nothing)?,
            elsewhere: vec![u32::MAX; max_rows],
        })
    }
}
