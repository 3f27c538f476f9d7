//! Dealing a product of activations and weights to threads.
#![allow(unsafe_code)]

use super::{
    CpuOps, Shared,
    generic::{
        layouts::UNPACKED_STEP_BYTES,
        linear::{LinearTask, Out},
        quantize::{Block, QUANT_ROW_BYTES, QuantPlace},
    },
    table::LinearFn,
};
use crate::{
    error::KernelError,
    layout::{GROUP, TILE},
};

/// Weights of a task that is run for several blocks of rows: they stay in the second-level cache.
const TASK_BYTES: usize = 256 << 10;

/// Tasks for each thread, so that one that is late takes fewer.
const TASKS_PER_THREAD: usize = 4;

/// One matrix of a product, and how it is cut.
pub(super) struct Product {
    /// With all tiles and rows.
    task: LinearTask,
    run: LinearFn,
    tiles_per_task: usize,
    row_blocks_per_task: usize,
    /// Bytes of a tile when it is unpacked; 0 if it is not.
    unpacked_bytes: usize,
    /// Tasks over tiles, and over rows.
    n_tasks: [usize; 2],
}

impl CpuOps {
    /// Computes the products of the rows at `x` with some weights (index, bias wanted, where to). Weights share `n_in`.
    ///
    /// # Safety
    /// `x` is valid for `n_rows * n_in` elements, each output for `n_rows * n_out`; outputs are disjoint from all else.
    pub(super) unsafe fn products(
        &mut self,
        x: *const f32,
        n_rows: usize,
        outputs: impl Iterator<Item = (usize, Out)> + Clone,
    ) -> Result<(), KernelError> {
        let Some((first, _)) = outputs.clone().next() else { return Ok(()) };
        if n_rows == 0 {
            return Ok(());
        }
        let n_in = self.weights[first].n_in;
        // Dense weights count one level, and don't mind those of others.
        let n_levels = outputs.clone().map(|(index, _)| self.weights[index].n_levels).max().unwrap_or(1);
        let kinds = || outputs.clone().map(|(index, _)| self.weights[index].kind);
        let (quantized, dense) = (kinds().any(|k| k.is_quantized()), kinds().any(|k| !k.is_quantized()));
        // SAFETY: the contract above.
        unsafe {
            if quantized {
                self.quantize(x, n_rows, n_in, n_levels)?;
            }
            if dense && n_rows > 1 {
                self.interleave(x, n_rows, n_in)?;
            }
        }
        let n_blocks = Block::count(n_rows, self.table.products.rows);
        let n_threads = self.pool.n_threads();
        let mut products = std::mem::take(&mut self.products);
        products.clear();
        for (index, out) in outputs {
            let weight = &self.weights[index];
            let n_tiles = weight.n_out.div_ceil(TILE);
            let steps_per_slice = match out {
                Out::Floats(_) => weight.n_steps(),
                Out::Fixed(_) => weight.slice_width.unwrap_or(n_in) / weight.kind.step_width(),
            };
            let fair = n_tiles.div_ceil(TASKS_PER_THREAD * n_threads);
            // One row alone takes two tiles at once.
            let fair = if n_rows == 1 { fair.next_multiple_of(2) } else { fair };
            let cached = if n_blocks == 1 { n_tiles } else { (TASK_BYTES / weight.tile_bytes()).max(1) };
            let tiles_per_task = fair.min(cached);
            let tile_tasks = n_tiles.div_ceil(tiles_per_task);
            let row_tasks = (TASKS_PER_THREAD * n_threads).div_ceil(tile_tasks).min(n_blocks);
            let row_blocks_per_task = if n_threads == 1 { n_blocks } else { n_blocks.div_ceil(row_tasks) };
            let unpacked_bytes = weight.n_steps() * UNPACKED_STEP_BYTES;
            let unpacks = weight.kind.is_unpacked_for_many_rows()
                && row_blocks_per_task >= self.table.products.unpack_blocks
                && unpacked_bytes <= self.table.products.unpacked_bytes;
            let packed = match (weight.kind.is_quantized(), n_rows) {
                (true, _) => self.quantized.as_slice().as_ptr(),
                (false, 1) => x.cast(),
                (false, _) => self.interleaved.as_slice().as_ptr().cast(),
            };
            products.push(Product {
                task: LinearTask {
                    weights: weight.data.as_slice().as_ptr(),
                    tile_bytes: weight.tile_bytes(),
                    n_steps: weight.n_steps(),
                    steps_per_slice,
                    x: packed,
                    n_levels: weight.n_levels,
                    n_rows,
                    n_out: weight.n_out,
                    bias: weight.bias.as_ref().map_or(std::ptr::null(), |bias| bias.as_slice().as_ptr()),
                    out,
                    tiles: 0..n_tiles,
                    row_blocks: 0..n_blocks,
                    unpacked: std::ptr::null_mut(),
                },
                unpacked_bytes: if unpacks { unpacked_bytes } else { 0 },
                run: (self.table.products.linear)(weight.kind),
                tiles_per_task,
                row_blocks_per_task,
                n_tasks: [tile_tasks, n_blocks.div_ceil(row_blocks_per_task)],
            });
        }
        let room = products.iter().map(|p| p.unpacked_bytes).max().unwrap_or(0).next_multiple_of(64);
        self.unpacked.reserve("unpacked weights", n_threads * room)?;
        let unpacked = Shared(self.unpacked.as_mut_slice().as_mut_ptr());
        let n_tasks = products.iter().map(|p| p.n_tasks[0] * p.n_tasks[1]).sum();
        let shared = Shared(products.as_slice());
        self.pool.run(n_tasks, &|mut index, thread| {
            for product in shared.get() {
                let [tile_tasks, row_tasks] = product.n_tasks;
                if index >= tile_tasks * row_tasks {
                    index -= tile_tasks * row_tasks;
                    continue;
                }
                let tile = index / row_tasks * product.tiles_per_task;
                let block = index % row_tasks * product.row_blocks_per_task;
                let mut task = product.task.clone();
                task.tiles = tile..task.tiles.end.min(tile + product.tiles_per_task);
                task.row_blocks = block..task.row_blocks.end.min(block + product.row_blocks_per_task);
                // SAFETY: the contract above; tasks are disjoint in tiles or in rows, hence in outputs; each thread unpacks
                // to its own room.
                unsafe {
                    if product.unpacked_bytes > 0 {
                        task.unpacked = unpacked.get().add(thread * room);
                    }
                    (product.run)(&task);
                }
                return;
            }
        });
        products.clear();
        self.products = products;
        Ok(())
    }

    /// Fills `self.quantized`.
    ///
    /// # Safety
    /// `x` is valid for `n_rows * n_in` elements; `n_in` is a multiple of 32.
    unsafe fn quantize(
        &mut self,
        x: *const f32,
        n_rows: usize,
        n_in: usize,
        n_levels: usize,
    ) -> Result<(), KernelError> {
        let n_groups = n_in / GROUP;
        self.quantized.reserve("quantized activations", n_rows * n_groups * n_levels * QUANT_ROW_BYTES)?;
        let (table, out, x) = (self.table, Shared(self.quantized.as_mut_slice().as_mut_ptr()), Shared(x));
        let rows_per_task = rows_per_task(n_rows, n_in);
        self.pool.run(n_rows.div_ceil(rows_per_task), &|index, _| {
            for row in index * rows_per_task..n_rows.min((index + 1) * rows_per_task) {
                let block = Block::of_row(n_rows, table.products.rows, row);
                // SAFETY: the contract above; the buffer has room for all rows, each row writes its own part.
                unsafe {
                    let out = out.get().add(block.first_row * n_groups * n_levels * QUANT_ROW_BYTES);
                    let x = x.get().add(row * n_in);
                    let place = QuantPlace { row: row - block.first_row, block_rows: block.n_rows, n_levels };
                    (table.quantize_row)(x, n_groups, place, out);
                }
            }
        });
        Ok(())
    }

    /// Fills `self.interleaved`.
    ///
    /// # Safety
    /// `x` is valid for `n_rows * n_in` elements.
    unsafe fn interleave(&mut self, x: *const f32, n_rows: usize, n_in: usize) -> Result<(), KernelError> {
        self.interleaved.reserve("activations", n_rows * n_in)?;
        let (table, out, x) = (self.table, Shared(self.interleaved.as_mut_slice().as_mut_ptr()), Shared(x));
        self.pool.run(Block::count(n_rows, table.products.rows), &|index, _| {
            let block = Block::new(n_rows, table.products.rows, index);
            // SAFETY: the contract above; the buffer has room for all rows, each block writes its own part.
            unsafe {
                let from = block.first_row * n_in;
                (table.pack_rows)(x.get().add(from), n_in, block.n_rows, out.get().add(from));
            }
        });
        Ok(())
    }
}

/// Rows of a task of simple work: enough that starting it is worth while.
pub(super) fn rows_per_task(n_rows: usize, width: usize) -> usize {
    (16_384 / width.max(1)).clamp(1, n_rows.max(1))
}
