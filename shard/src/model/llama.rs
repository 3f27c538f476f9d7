//! Llama (Touvron et al., 2023, arXiv:2302.13971) and everything that is shaped like it: SmolLM2, Mistral, Yi.

use super::{Architecture, Bias, DecoderLayer, LoadError, Part, RankShape, TensorSpec};
use crate::layer::{pre_norm::PreNormLayer, tensors::LayerTensors};

/// The family.
pub struct Llama;

/// Hugging Face's `attention_bias` and `mlp_bias` add biases to the projections; few checkpoints have them.
const TENSORS: &[TensorSpec] = &[
    TensorSpec::norm("attn_norm"),
    TensorSpec::matrix("attn_q", Part::QueryRows, Bias::IfPresent),
    TensorSpec::matrix("attn_k", Part::KvRows, Bias::IfPresent),
    TensorSpec::matrix("attn_v", Part::KvRows, Bias::IfPresent),
    TensorSpec::matrix("attn_output", Part::QueryColumns, Bias::IfPresent),
    TensorSpec::norm("ffn_norm"),
    TensorSpec::matrix("ffn_gate", Part::FfnRows, Bias::IfPresent),
    TensorSpec::matrix("ffn_up", Part::FfnRows, Bias::IfPresent),
    TensorSpec::matrix("ffn_down", Part::FfnColumns, Bias::IfPresent),
];

impl Architecture for Llama {
    fn name(&self) -> &'static str {
        "llama"
    }

    fn layer_tensors(&self) -> &'static [TensorSpec] {
        TENSORS
    }

    fn layer(&self, tensors: &LayerTensors, shape: &RankShape) -> Result<Box<dyn DecoderLayer>, LoadError> {
        Ok(Box::new(PreNormLayer::new(tensors, shape)?))
    }
}
