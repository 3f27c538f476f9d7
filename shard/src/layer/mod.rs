//! What decoder layers are made of: blocks that run the step's rows over [`Ops`].

pub mod attention;
pub mod mlp;
pub mod norm;
pub mod pre_norm;
pub mod rope;
pub mod scratch;
pub mod tensors;

use phalanx_kernels::{
    collective::Collective,
    error::KernelError,
    ops::{Buf, Linear, Ops},
};

use self::scratch::Scratch;

/// One pass of a step's rows through the layers.
pub struct Pass<'a> {
    /// The device.
    pub ops: &'a mut dyn Ops,
    /// The other ranks.
    pub collective: &'a mut dyn Collective,
    /// Buffers.
    pub scratch: &'a Scratch,
    /// Rows of the step.
    pub n_rows: usize,
    /// Width of the residual stream.
    pub hidden: usize,
}

impl Pass<'_> {
    /// This rank's share of a row-parallel product into [`Scratch::delta`], then summed over all ranks.
    /// A rank that holds no column (`None`) adds nothing.
    pub fn reduce(&mut self, x: Buf, weight: Option<Linear>) -> Result<(), KernelError> {
        match weight {
            Some(weight) => self.ops.linear_exact(x, self.n_rows, weight, self.scratch.delta)?,
            // Rows of "another rank" are zeros.
            None => {
                let ids = self.scratch.elsewhere.get(..self.n_rows).ok_or_else(|| KernelError::Shape {
                    op: "reduce",
                    want: format!("at most {} rows", self.scratch.elsewhere.len()),
                    got: self.n_rows.to_string(),
                })?;
                self.ops.embed(self.scratch.nothing, ids, self.scratch.delta)?;
            }
        }
        self.all_reduce_delta()
    }

    /// Sums [`Scratch::delta`] over the ranks.
    pub fn all_reduce_delta(&mut self) -> Result<(), KernelError> {
        if self.collective.world_size() > 1 {
            self.ops.all_reduce(self.scratch.delta, self.n_rows * self.hidden, self.collective)?;
        }
        Ok(())
    }

    /// Adds [`Scratch::delta`] to the residual stream.
    pub fn add_delta(&mut self) -> Result<(), KernelError> {
        self.ops.add_fixed(self.scratch.residual, self.scratch.delta, self.n_rows * self.hidden)
    }
}
