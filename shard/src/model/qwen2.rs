//! Qwen2 and Qwen2.5 (Yang et al., 2024, arXiv:2407.10671): Llama's layer with a bias on queries, keys and values.

use super::{Architecture, Bias, DecoderLayer, LoadError, Part, RankShape, TensorSpec};
use crate::layer::{pre_norm::PreNormLayer, tensors::LayerTensors};

/// The family.
pub struct Qwen2;

const TENSORS: &[TensorSpec] = &[
    TensorSpec::norm("attn_norm"),
    TensorSpec::matrix("attn_q", Part::QueryRows, Bias::Required),
    TensorSpec::matrix("attn_k", Part::KvRows, Bias::Required),
    TensorSpec::matrix("attn_v", Part::KvRows, Bias::Required),
    TensorSpec::matrix("attn_output", Part::QueryColumns, Bias::None),
    TensorSpec::norm("ffn_norm"),
    TensorSpec::matrix("ffn_gate", Part::FfnRows, Bias::None),
    TensorSpec::matrix("ffn_up", Part::FfnRows, Bias::None),
    TensorSpec::matrix("ffn_down", Part::FfnColumns, Bias::None),
];

impl Architecture for Qwen2 {
    fn name(&self) -> &'static str {
        "qwen2"
    }

    fn layer_tensors(&self) -> &'static [TensorSpec] {
        TENSORS
    }

    fn layer(&self, tensors: &LayerTensors, shape: &RankShape) -> Result<Box<dyn DecoderLayer>, LoadError> {
        Ok(Box::new(PreNormLayer::new(tensors, shape)?))
    }
}
