//! Root mean square norm.

use phalanx_kernels::ops::{Buf, Input};

/// A norm over the width of the residual stream.
#[derive(Debug, Clone, Copy)]
pub struct RmsNorm {
    /// `[hidden]`.
    pub weight: Buf,
    /// Added to the mean of squares.
    pub eps: f32,
}

impl RmsNorm {
    /// The norm of the rows of `x`, for a product to take.
    pub fn of(&self, x: Buf) -> Input {
        Input::Normed { x, weight: self.weight, eps: self.eps }
    }
}
