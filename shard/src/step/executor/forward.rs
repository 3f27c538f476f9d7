//! Takes the rows of a step through the layers: all at once, or in passes of as many as there is scratch memory for.

use std::ops::Range;

use phalanx_kernels::{collective::Collective, error::KernelError, ops::RowChunk};

use super::{Executor, Purpose, Wanted};
use crate::{failpoint, layer::Pass, step::plan::CheckedPlan};

/// Cuts `n_rows` rows into as few passes of at most `most` rows as there can be, of about as many rows each.
pub(super) fn passes(n_rows: usize, most: usize) -> impl Iterator<Item = Range<usize>> {
    let n_passes = n_rows.div_ceil(most.max(1));
    (0..n_passes).map(move |idx| n_rows * idx / n_passes..n_rows * (idx + 1) / n_passes)
}

impl Executor {
    /// Notes the rows of the step, and which rows' logits are wanted.
    pub(super) fn note_rows(&mut self, plan: &CheckedPlan) {
        let host = &mut self.host;
        host.ids.clear();
        host.wanted.clear();
        host.candidates.clear();
        self.rows.chunks.resize_with(plan.chunks.len(), || RowChunk {
            first_row: 0,
            n_rows: 0,
            start: 0,
            blocks: Vec::new(),
        });
        for (chunk, rows) in plan.chunks.iter().zip(&mut self.rows.chunks) {
            let Some(sequence) = self.sequences.get_mut(&chunk.sequence) else { continue };
            let first_row = host.ids.len();
            let end = chunk.start + chunk.len;
            host.ids.extend_from_slice(&sequence.tokens[chunk.start..end]);
            rows.first_row = first_row;
            rows.n_rows = chunk.len;
            rows.start = chunk.start;
            rows.blocks.clear();
            rows.blocks.extend_from_slice(&sequence.blocks[..end.div_ceil(self.limits.block_size)]);
            sequence.computed = Some(end);
            let wanted = |position: usize, purpose| Wanted {
                row: (first_row + position - chunk.start) as u32,
                sequence: chunk.sequence,
                purpose,
            };
            if sequence.prompt_logprobs.is_some() {
                let scored = chunk.start..end.min(sequence.prompt_len - 1);
                host.wanted.extend(scored.map(|p| wanted(p, Purpose::Score { position: p + 1 })));
            }
            if chunk.sample {
                let purpose = if sequence.is_plain_greedy() { Purpose::Greedy } else { Purpose::Sample };
                host.wanted.push(wanted(end - 1, purpose));
            }
        }
        failpoint::rows(&host.ids, plan.chunks.iter().map(|chunk| chunk.start + chunk.len));
        let vocab = self.model.shape.slice.vocab.clone();
        let local = |id: &u32| if vocab.contains(&(*id as usize)) { *id - vocab.start as u32 } else { u32::MAX };
        host.local_ids.clear();
        host.local_ids.extend(host.ids.iter().map(local));
    }

    /// Runs the rows of a pass through all layers; so many of the wanted ones were in earlier passes. Returns which are in this one:
    /// they are counted as the residual stream has them now.
    pub(super) fn forward(
        &mut self,
        of_step: Range<usize>,
        n_wanted_before: usize,
        collective: &mut dyn Collective,
    ) -> Result<Range<usize>, KernelError> {
        let (hidden, n_rows, block_size) = (self.model.shape.config.hidden, of_step.len(), self.limits.block_size);
        let host = &mut self.host;
        // They ascend.
        let later = &mut host.wanted[n_wanted_before..];
        let n_wanted = later.iter().take_while(|wanted| (wanted.row as usize) < of_step.end).count();
        let wanted = &mut later[..n_wanted];
        wanted.iter_mut().for_each(|wanted| wanted.row -= of_step.start as u32);

        let rows = if n_rows == host.ids.len() {
            &self.rows
        } else {
            let indices = of_step.clone().map(|row| row as u32);
            self.pass_rows.set(&self.rows, indices, block_size);
            self.pass_rows.rows()
        };
        self.wanted_rows.set(rows, wanted.iter().map(|w| w.row), block_size);
        let ops = self.ops.as_mut();
        ops.begin_step(rows)?;
        let table = self.model.embedding.unwrap_or(self.scratch.nothing);
        ops.embed(table, &host.local_ids[of_step], self.scratch.delta)?;
        let scratch = &self.scratch;
        let (residual, spare) = (scratch.residual, scratch.spare);
        let mut pass = Pass { ops, collective, scratch, n_rows, hidden, residual, spare, wanted: None };
        if pass.collective.world_size() > 1 {
            pass.ops.all_reduce(scratch.delta, n_rows * hidden, pass.collective)?;
        }
        pass.ops.bits_to_f32(scratch.delta, scratch.residual, n_rows * hidden)?;
        let n_layers = self.model.layers.len();
        for (idx, layer) in self.model.layers.iter().enumerate() {
            failpoint::layer(idx, n_layers);
            pass.wanted = (idx + 1 == n_layers && n_wanted < n_rows).then_some(&self.wanted_rows);
            layer.run(&mut pass)?;
        }
        self.residual = pass.residual;
        if n_wanted < n_rows {
            (0..).zip(wanted).for_each(|(row, wanted)| wanted.row = row);
        }
        Ok(n_wanted_before..n_wanted_before + n_wanted)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passes_are_even_and_cover_all_rows() {
        assert_eq!([1, 512, 513, 1024, 1025].map(|n_rows| passes(n_rows, 512).count()), [1, 1, 2, 2, 3]);
        assert_eq!(passes(1300, 512).collect::<Vec<_>>(), [0..433, 433..866, 866..1300]);
        for (n_rows, most) in [(513, 512), (7, 3), (2048, 512), (100, 1), (3, 0)] {
            let mut end = 0;
            for pass in passes(n_rows, most) {
                assert_eq!(pass.start, end);
                assert!((1..=most.max(1)).contains(&pass.len()));
                end = pass.end;
            }
            assert_eq!(end, n_rows);
        }
    }
}
