//! The layer of Llama and its relatives: norm, attention, add; norm, feed-forward, add.

use phalanx_kernels::error::KernelError;

use super::{Pass, attention::AttentionBlock, mlp::GatedMlp, norm::RmsNorm, tensors::LayerTensors};
use crate::model::{DecoderLayer, LoadError, RankShape};

/// A layer that norms each block's input and adds each block's output as it is.
pub struct PreNormLayer {
    attention_norm: RmsNorm,
    attention: AttentionBlock,
    ffn_norm: RmsNorm,
    ffn: GatedMlp,
}

impl PreNormLayer {
    /// Of the tensors `attn_norm`, `ffn_norm` and those of [`AttentionBlock`] and [`GatedMlp`].
    ///
    /// # Errors
    /// If the family does not list them.
    pub fn new(tensors: &LayerTensors, shape: &RankShape) -> Result<Self, LoadError> {
        let norm = |name| Ok::<_, LoadError>(RmsNorm { weight: tensors.vector(name)?, eps: shape.config.norm_eps });
        Ok(Self {
            attention_norm: norm("attn_norm")?,
            attention: AttentionBlock::new(tensors, shape)?,
            ffn_norm: norm("ffn_norm")?,
            ffn: GatedMlp::new(tensors)?,
        })
    }
}

impl DecoderLayer for PreNormLayer {
    fn run(&self, pass: &mut Pass<'_>) -> Result<(), KernelError> {
        self.attention.run(pass, self.attention_norm.of(pass.residual))?;
        if pass.n_rows == 0 {
            return Ok(());
        }
        pass.add_shares()?;
        self.ffn.run(pass, self.ffn_norm.of(pass.residual))?;
        pass.add_shares()
    }
}
