//! Gated feed-forward block (Shazeer, 2020, arXiv:2002.05202) over this rank's columns.

use phalanx_kernels::{
    error::KernelError,
    ops::{Input, Linear},
};

use super::{Pass, tensors::LayerTensors};
use crate::model::LoadError;

/// `down(silu(gate(x)) * up(x))`.
pub struct GatedMlp {
    /// `None` on a rank without feed-forward columns.
    weights: Option<Weights>,
}

struct Weights {
    gate: Linear,
    up: Linear,
    down: Linear,
}

impl GatedMlp {
    /// Of the tensors `ffn_{gate,up,down}`.
    ///
    /// # Errors
    /// If the family does not list them.
    pub fn new(tensors: &LayerTensors) -> Result<Self, LoadError> {
        let weights = match (tensors.matrix("ffn_gate")?, tensors.matrix("ffn_up")?, tensors.matrix("ffn_down")?) {
            (Some(gate), Some(up), Some(down)) => Some(Weights { gate, up, down }),
            _ => None,
        };
        Ok(Self { weights })
    }

    /// Leaves this rank's share of the block's output in the scratch's `delta`.
    pub fn run(&self, pass: &mut Pass<'_>, x: Input) -> Result<(), KernelError> {
        let scratch = pass.scratch;
        if let Some(weights) = &self.weights {
            pass.ops.linear(x, pass.n_rows, &[(weights.gate, scratch.gate), (weights.up, scratch.up)])?;
        }
        let gated = Input::Gated { gate: scratch.gate, up: scratch.up };
        pass.share(gated, self.weights.as_ref().map(|weights| weights.down))
    }
}
