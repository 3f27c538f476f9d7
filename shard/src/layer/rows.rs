//! Some rows of a step as a step of their own: those that go through the layers together, and those that anybody wants logits of (the last
//! layer computes nothing else for the others than what later steps read, their keys and values).

use phalanx_kernels::ops::{RowChunk, StepRows};

/// Some rows of a step.
#[derive(Debug, Default)]
pub struct RowSelection {
    indices: Vec<u32>,
    rows: StepRows,
}

impl RowSelection {
    /// Which rows of the step they are, ascending.
    pub fn indices(&self) -> &[u32] {
        &self.indices
    }

    /// The same as a step of their own: positions and pages.
    pub fn rows(&self) -> &StepRows {
        &self.rows
    }

    /// Takes rows of `step`: ascending ones, and of each chunk consecutive ones. Memory is kept from step to step.
    pub fn set(&mut self, step: &StepRows, indices: impl IntoIterator<Item = u32>, block_size: usize) {
        self.indices.clear();
        self.indices.extend(indices);
        let mut n_chunks = 0;
        let mut first_row = 0;
        for chunk in &step.chunks {
            let end = chunk.first_row + chunk.n_rows;
            let n_rows = self.indices[first_row..].iter().take_while(|&&row| (row as usize) < end).count();
            if n_rows == 0 {
                continue;
            }
            if n_chunks == self.rows.chunks.len() {
                self.rows.chunks.push(RowChunk { first_row: 0, n_rows: 0, start: 0, blocks: Vec::new() });
            }
            let wanted = &mut self.rows.chunks[n_chunks];
            wanted.first_row = first_row;
            wanted.n_rows = n_rows;
            wanted.start = chunk.start + (self.indices[first_row] as usize - chunk.first_row);
            let n_blocks = (wanted.start + n_rows).div_ceil(block_size).min(chunk.blocks.len());
            wanted.blocks.clear();
            wanted.blocks.extend_from_slice(&chunk.blocks[..n_blocks]);
            n_chunks += 1;
            first_row += n_rows;
        }
        self.rows.chunks.truncate(n_chunks);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chunk(first_row: usize, n_rows: usize, start: usize, blocks: &[u32]) -> RowChunk {
        RowChunk { first_row, n_rows, start, blocks: blocks.to_vec() }
    }

    #[test]
    fn selected_rows_keep_their_positions_and_pages() {
        let step =
            StepRows { chunks: vec![chunk(0, 5, 30, &[7, 8, 9]), chunk(5, 4, 0, &[3]), chunk(9, 1, 16, &[1, 2])] };
        let mut selection = RowSelection::default();
        // Twice: what was there before is gone.
        for _ in 0..2 {
            selection.set(&step, [1, 2, 9], 16);
            assert_eq!(selection.indices(), [1, 2, 9]);
            assert_eq!(selection.rows().chunks, [chunk(0, 2, 31, &[7, 8, 9]), chunk(2, 1, 16, &[1, 2])]);
        }
        selection.set(&step, [0, 5, 6, 7, 8], 16);
        assert_eq!(selection.rows().chunks, [chunk(0, 1, 30, &[7, 8]), chunk(1, 4, 0, &[3])]);
        selection.set(&step, [], 16);
        assert!(selection.indices().is_empty() && selection.rows().chunks.is_empty());
    }
}
