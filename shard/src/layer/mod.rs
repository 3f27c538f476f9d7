//! What decoder layers are made of: blocks that run the step's rows over [`Ops`].

pub mod attention;
pub mod mlp;
pub mod norm;
pub mod pre_norm;
pub mod rope;
pub mod rows;
pub mod scratch;
pub mod tensors;

use phalanx_kernels::{
    collective::Collective,
    error::KernelError,
    ops::{Buf, Input, Linear, Ops},
};

use self::{rows::RowSelection, scratch::Scratch};

/// One pass of a step's rows through the layers.
pub struct Pass<'a> {
    /// The device.
    pub ops: &'a mut dyn Ops,
    /// The other ranks.
    pub collective: &'a mut dyn Collective,
    /// Buffers.
    pub scratch: &'a Scratch,
    /// Rows of the step that are still looked at.
    pub n_rows: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Residual stream, `[n_rows, hidden]`.
    pub residual: Buf,
    /// Room for some rows of it, `[n_rows, hidden]`.
    pub spare: Buf,
    /// In the last layer, if some rows' logits are not wanted: those whose are.
    pub wanted: Option<&'a RowSelection>,
}

impl<'a> Pass<'a> {
    /// Goes on with the wanted rows alone, if there are others: returns which ones those are. What else is kept by row has to be
    /// gathered.
    ///
    /// # Errors
    /// If the device fails.
    pub fn drop_unwanted(&mut self) -> Result<Option<&'a [u32]>, KernelError> {
        let Some(wanted) = self.wanted.take() else { return Ok(None) };
        self.n_rows = wanted.indices().len();
        if self.n_rows > 0 {
            self.ops.begin_step(wanted.rows())?;
            self.ops.gather_rows(self.residual, wanted.indices(), self.hidden, self.spare)?;
            std::mem::swap(&mut self.residual, &mut self.spare);
        }
        Ok(Some(wanted.indices()))
    }

    /// This rank's share of a row-parallel product into [`Scratch::delta`]. A rank that holds no column (`None`) adds nothing.
    pub fn share(&mut self, x: Input, weight: Option<Linear>) -> Result<(), KernelError> {
        let Some(weight) = weight else {
            // Rows of "another rank" are zeros.
            let ids = self.scratch.elsewhere.get(..self.n_rows).ok_or_else(|| KernelError::Shape {
                op: "share",
                want: format!("at most {} rows", self.scratch.elsewhere.len()),
                got: self.n_rows.to_string(),
            })?;
            return self.ops.embed(self.scratch.nothing, ids, self.scratch.delta);
        };
        self.ops.linear_exact(x, self.n_rows, weight, self.scratch.delta)
    }

    /// Adds all ranks' shares to the residual stream.
    pub fn add_shares(&mut self) -> Result<(), KernelError> {
        self.ops.add_reduced(self.residual, self.scratch.delta, self.n_rows * self.hidden, self.collective)
    }
}
