//! Root mean square norm.

use phalanx_kernels::{error::KernelError, ops::Buf};

use super::Pass;

/// A norm over the width of the residual stream.
#[derive(Debug, Clone, Copy)]
pub struct RmsNorm {
    /// `[hidden]`.
    pub weight: Buf,
    /// Added to the mean of squares.
    pub eps: f32,
}

impl RmsNorm {
    /// `out = norm(x)` for the step's rows.
    pub fn run(&self, pass: &mut Pass<'_>, x: Buf, out: Buf) -> Result<(), KernelError> {
        pass.ops.rms_norm(x, self.weight, self.eps, out, pass.n_rows)
    }
}
