//! What holds for the rows of one step: chunks, positions, rotations.

use super::shape_error;
use crate::{
    error::KernelError,
    ops::{RopeSpec, RowChunk, StepRows},
};

/// The rows of the current step. Keeps its room from step to step.
#[derive(Debug, Default)]
pub(super) struct Step {
    chunks: Vec<RowChunk>,
    n_chunks: usize,
    pub n_rows: usize,
    /// Of each row.
    pub positions: Vec<usize>,
    /// Room to compare the slots that rows are written to.
    pub spans: Vec<(u32, usize, usize)>,
    /// Counts steps.
    number: u64,
}

impl Step {
    /// The chunks, in row order.
    pub fn chunks(&self) -> &[RowChunk] {
        &self.chunks[..self.n_chunks]
    }

    /// Takes over the rows of a new step.
    pub fn begin(&mut self, rows: &StepRows) -> Result<(), KernelError> {
        self.clear();
        for (i, chunk) in rows.chunks.iter().enumerate() {
            if chunk.first_row != self.n_rows {
                self.clear();
                return Err(shape_error(
                    "begin_step",
                    "chunks in row order without gaps",
                    format!("chunk {i} from row {}", chunk.first_row),
                ));
            }
            if chunk.start.checked_add(chunk.n_rows).is_none_or(|end| end > 1 << 31) {
                self.clear();
                return Err(shape_error("begin_step", "positions below 2^31", format!("{}", chunk.start)));
            }
            match self.chunks.get_mut(i) {
                None => self.chunks.push(chunk.clone()),
                Some(to) => {
                    (to.first_row, to.n_rows, to.start) = (chunk.first_row, chunk.n_rows, chunk.start);
                    to.blocks.clone_from(&chunk.blocks);
                }
            }
            self.positions.extend(chunk.start..chunk.start + chunk.n_rows);
            self.n_rows += chunk.n_rows;
        }
        self.n_chunks = rows.chunks.len();
        Ok(())
    }

    /// No rows.
    pub fn clear(&mut self) {
        self.n_chunks = 0;
        self.n_rows = 0;
        self.positions.clear();
        self.number += 1;
    }
}

/// A rotary embedding with the cosines and sines of the current step.
#[derive(Debug)]
pub(super) struct RopeTable {
    pub spec: RopeSpec,
    /// Of which step the values are.
    number: Option<u64>,
    /// For each row, for each pair.
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl RopeTable {
    pub fn new(spec: RopeSpec) -> Self {
        Self { spec, number: None, cos: Vec::new(), sin: Vec::new() }
    }

    /// Makes the values for the step's rows, unless they are there.
    pub fn prepare(&mut self, step: &Step) {
        if self.number == Some(step.number) {
            return;
        }
        self.cos.clear();
        self.sin.clear();
        for &position in &step.positions {
            for &inv_freq in &self.spec.inv_freq {
                let (sin, cos) = libm::sincos(f64::from(position as f32 * inv_freq));
                self.cos.push(cos as f32 * self.spec.magnitude);
                self.sin.push(sin as f32 * self.spec.magnitude);
            }
        }
        self.number = Some(step.number);
    }

    /// Cosines and sines of a row of the step last prepared.
    pub fn row(&self, row: usize) -> (&[f32], &[f32]) {
        let pairs = self.spec.inv_freq.len();
        (&self.cos[row * pairs..][..pairs], &self.sin[row * pairs..][..pairs])
    }
}
