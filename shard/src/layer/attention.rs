//! Attention with grouped queries (Ainslie et al., 2023, arXiv:2305.13245) over this rank's heads.

use phalanx_kernels::{
    error::KernelError,
    ops::{Attention, Input, Linear, Rope},
};

use super::{Pass, tensors::LayerTensors};
use crate::model::{LoadError, RankShape};

/// Projections, rotation, KV pages, attention and output projection of one layer.
///
/// A family with norms on queries and keys adds them between projection and rotation, as optional fields here.
pub struct AttentionBlock {
    layer: usize,
    rope: Rope,
    head_dim: usize,
    scale: f32,
    kv_head_of: Vec<u32>,
    n_kv_heads: usize,
    /// `None` on a rank without heads.
    projections: Option<Projections>,
}

struct Projections {
    q: Linear,
    k: Linear,
    v: Linear,
    output: Linear,
}

impl AttentionBlock {
    /// Of the tensors `attn_{q,k,v,output}`.
    ///
    /// # Errors
    /// If the family does not list them.
    pub fn new(tensors: &LayerTensors, shape: &RankShape) -> Result<Self, LoadError> {
        let projections = match (
            tensors.matrix("attn_q")?,
            tensors.matrix("attn_k")?,
            tensors.matrix("attn_v")?,
            tensors.matrix("attn_output")?,
        ) {
            (Some(q), Some(k), Some(v), Some(output)) => Some(Projections { q, k, v, output }),
            _ => None,
        };
        Ok(Self {
            layer: tensors.place.idx,
            rope: tensors.place.rope,
            head_dim: shape.config.head_dim,
            scale: 1.0 / (shape.config.head_dim as f32).sqrt(),
            kv_head_of: shape.kv_head_of.clone(),
            n_kv_heads: shape.n_kv_heads(),
            projections,
        })
    }

    /// Leaves this rank's share of the block's output in the scratch's `delta`; in the last layer, that of wanted rows.
    pub fn run(&self, pass: &mut Pass<'_>, x: Input) -> Result<(), KernelError> {
        let scratch = pass.scratch;
        let n_heads = self.kv_head_of.len();
        let (mut queries, mut attended) = (scratch.q, scratch.attended);
        if let Some(weights) = &self.projections {
            let outputs = [(weights.q, scratch.q), (weights.k, scratch.k), (weights.v, scratch.v)];
            pass.ops.linear(x, pass.n_rows, &outputs)?;
            let rotated = [(scratch.q, n_heads), (scratch.k, self.n_kv_heads)];
            pass.ops.rope(&rotated, self.head_dim, self.rope)?;
            pass.ops.store_kv(self.layer, scratch.k, scratch.v)?;
        }
        if let Some(wanted) = pass.drop_unwanted()? {
            if wanted.is_empty() {
                return Ok(());
            }
            if self.projections.is_some() {
                pass.ops.gather_rows(queries, wanted, n_heads * self.head_dim, attended)?;
                std::mem::swap(&mut queries, &mut attended);
            }
        }
        if self.projections.is_some() {
            let attention = Attention { layer: self.layer, n_heads, kv_head_of: &self.kv_head_of, scale: self.scale };
            pass.ops.attention(attention, queries, attended)?;
        }
        pass.share(attended.into(), self.projections.as_ref().map(|weights| weights.output))
    }
}
