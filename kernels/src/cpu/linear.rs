//! Dealing a product of activations and weights to threads.
#![allow(unsafe_code)]

use super::{
    CpuOps, Shared,
    generic::{
        layouts::UNPACKED_STEP_BYTES,
        linear::{LinearTask, Out, steps_per_part},
        quantize::{Block, QUANT_ROW_BYTES, QuantPlace},
    },
    input::InputRows,
    pool::share_of,
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

/// Rows that each thread must have for a product to be cut by rows: with fewer, weights that each of them unpacks cost more
/// than rows that lie in another core's caches.
const SHARE_ROWS: usize = 64;

/// One matrix of a product, and how it is cut.
pub(super) struct Product {
    /// With all tiles and rows.
    task: LinearTask,
    run: LinearFn,
    tiles_per_task: usize,
    /// Bytes of what is unpacked at a time; 0 if nothing is.
    unpacked_bytes: usize,
    cut: Cut,
    /// Tasks over tiles, and over rows.
    n_tasks: [usize; 2],
}

/// What a thread's share of a product is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Cut {
    /// Some tiles, for all rows: each weight is read by one thread.
    Tiles,
    /// Some rows, for all tiles: the same rows in every operation.
    Rows,
}

impl Product {
    fn n_tasks(&self) -> usize {
        self.n_tasks[0] * self.n_tasks[1]
    }

    /// A task of it.
    fn task(&self, index: usize) -> LinearTask {
        let [tile_tasks, row_tasks] = self.n_tasks;
        let (tile, rows) = match self.cut {
            Cut::Tiles => (index / row_tasks, index % row_tasks),
            Cut::Rows => (index % tile_tasks, index / tile_tasks),
        };
        let (first_tile, all) = (tile * self.tiles_per_task, &self.task);
        let tiles = first_tile..all.tiles.end.min(first_tile + self.tiles_per_task);
        LinearTask { tiles, row_blocks: share_of(all.row_blocks.end, row_tasks, rows), ..all.clone() }
    }
}

impl CpuOps {
    /// Computes the products of the rows `x` with some weights (index, where to). Weights share `n_in`.
    ///
    /// # Safety
    /// `x` has `n_rows` rows of `n_in` elements, each output has room for `n_rows * n_out`; outputs are disjoint from all else.
    pub(super) unsafe fn products(
        &mut self,
        x: InputRows,
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
        // One row that is there needs no packing for dense weights.
        let in_place = match x {
            InputRows::Plain(x) if n_rows == 1 => Some(x),
            _ => None,
        };
        // SAFETY: the contract above.
        unsafe {
            if quantized {
                self.quantize(x, n_rows, n_in, n_levels)?;
            }
            if dense && in_place.is_none() {
                self.interleave(x, n_rows, n_in)?;
            }
        }
        let n_blocks = Block::count(n_rows, self.table.products.rows);
        let n_threads = self.pool.n_threads();
        let cut = if n_rows >= SHARE_ROWS * n_threads { Cut::Rows } else { Cut::Tiles };
        let mut products = std::mem::take(&mut self.products);
        products.clear();
        for (index, out) in outputs {
            let weight = &self.weights[index];
            let n_tiles = weight.n_out.div_ceil(TILE);
            let steps_per_slice = match out {
                Out::Floats(_) => weight.n_steps(),
                Out::Fixed(_) => weight.slice_width.unwrap_or(n_in) / weight.kind.step_width(),
            };
            let fair = match cut {
                Cut::Tiles => n_tiles.div_ceil(TASKS_PER_THREAD * n_threads),
                Cut::Rows => n_tiles.div_ceil(TASKS_PER_THREAD),
            };
            // One row alone takes two tiles at once.
            let fair = if n_rows == 1 { fair.next_multiple_of(2) } else { fair };
            // Tiles that are unpacked are read once for many blocks.
            let unpacks = weight.kind.is_unpacked_for_many_rows() && n_blocks >= self.table.products.unpack_blocks;
            let cached = if n_blocks == 1 || unpacks { n_tiles } else { (TASK_BYTES / weight.tile_bytes()).max(1) };
            let tiles_per_task = fair.min(cached);
            let tile_tasks = n_tiles.div_ceil(tiles_per_task);
            let row_tasks = match cut {
                _ if n_threads == 1 => 1,
                Cut::Tiles => (TASKS_PER_THREAD * n_threads).div_ceil(tile_tasks).min(n_blocks),
                Cut::Rows => n_threads,
            };
            let unpacks = unpacks && n_blocks / row_tasks >= self.table.products.unpack_blocks;
            let unpacked_bytes = steps_per_part(weight.n_steps(), out.unit(steps_per_slice)) * UNPACKED_STEP_BYTES;
            let packed = match (weight.kind.is_quantized(), in_place) {
                (true, _) => self.quantized.as_slice().as_ptr(),
                (false, Some(x)) => x.cast(),
                (false, None) => self.interleaved.as_slice().as_ptr().cast(),
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
                cut,
                n_tasks: [tile_tasks, row_tasks],
            });
        }
        let room = products.iter().map(|p| p.unpacked_bytes).max().unwrap_or(0).next_multiple_of(64);
        self.unpacked.reserve("unpacked weights", n_threads * room)?;
        let unpacked = Shared(self.unpacked.as_mut_slice().as_mut_ptr());
        let n_tasks = products.iter().map(Product::n_tasks).sum();
        // A share of each product: a thread's part of the last one's output is a part of this one's input.
        let first_of = |thread| products.iter().map(|p| share_of(p.n_tasks(), n_threads, thread).start).sum();
        let shared = Shared(products.as_slice());
        self.pool.run_shares(n_tasks, &first_of, &|index, thread| {
            let products = shared.get();
            let first_of =
                |share| products.iter().map(|p| share_of(p.n_tasks(), n_threads, share).start).sum::<usize>();
            let Some(share) = (0..n_threads).rfind(|&share| first_of(share) <= index) else { return };
            let mut index = index - first_of(share);
            for product in products {
                let of_share = share_of(product.n_tasks(), n_threads, share);
                if index >= of_share.len() {
                    index -= of_share.len();
                    continue;
                }
                let mut task = product.task(of_share.start + index);
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
    /// `x` has `n_rows` rows of `n_in` elements; `n_in` is a multiple of 32.
    unsafe fn quantize(
        &mut self,
        x: InputRows,
        n_rows: usize,
        n_in: usize,
        n_levels: usize,
    ) -> Result<(), KernelError> {
        let (n_groups, n_threads) = (n_in / GROUP, self.pool.n_threads());
        self.quantized.reserve("quantized activations", n_rows * n_groups * n_levels * QUANT_ROW_BYTES)?;
        self.computed.reserve("activations", n_threads * n_in)?;
        let (table, out, x) = (self.table, Shared(self.quantized.as_mut_slice().as_mut_ptr()), Shared(x));
        let room = Shared(self.computed.as_mut_slice().as_mut_ptr());
        // Whole blocks, whose rows share cache lines.
        let rows_per_task = rows_per_task(n_rows, n_in, n_threads).next_multiple_of(self.table.products.rows);
        self.pool.run(n_rows.div_ceil(rows_per_task), &|index, thread| {
            for row in index * rows_per_task..n_rows.min((index + 1) * rows_per_task) {
                let block = Block::of_row(n_rows, table.products.rows, row);
                // SAFETY: the contract above; the buffer has room for all rows, each row writes its own part; each thread has its own
                // room for a row.
                unsafe {
                    let out = out.get().add(block.first_row * n_groups * n_levels * QUANT_ROW_BYTES);
                    let x = x.get().row(&table, row, n_in, room.get().add(thread * n_in));
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
    /// `x` has `n_rows` rows of `n_in` elements.
    unsafe fn interleave(&mut self, x: InputRows, n_rows: usize, n_in: usize) -> Result<(), KernelError> {
        self.interleaved.reserve("activations", n_rows * n_in)?;
        let block_rows = self.table.products.rows;
        self.computed.reserve("activations", self.pool.n_threads() * block_rows * n_in)?;
        let (table, out, x) = (self.table, Shared(self.interleaved.as_mut_slice().as_mut_ptr()), Shared(x));
        let room = Shared(self.computed.as_mut_slice().as_mut_ptr());
        self.pool.run(Block::count(n_rows, block_rows), &|index, thread| {
            let block = Block::new(n_rows, block_rows, index);
            // SAFETY: the contract above; the buffer has room for all rows, each block writes its own part; each thread has its own
            // room for a block.
            unsafe {
                let room = room.get().add(thread * block_rows * n_in);
                let first = x.get().row(&table, block.first_row, n_in, room);
                // Rows that are there follow each other as those in the room do.
                for i in 1..block.n_rows {
                    x.get().row(&table, block.first_row + i, n_in, room.add(i * n_in));
                }
                (table.pack_rows)(first, n_in, block.n_rows, out.get().add(block.first_row * n_in));
            }
        });
        Ok(())
    }
}

/// Fewest elements of a task of simple work: starting one takes about as long as a thousand.
const LEAST_ELEMENTS: usize = 4096;

/// Rows of a task of simple work: as many tasks for each thread, none of them small.
pub(super) fn rows_per_task(n_rows: usize, width: usize, n_threads: usize) -> usize {
    let n_tasks = (n_rows * width / LEAST_ELEMENTS).clamp(1, TASKS_PER_THREAD * n_threads);
    let n_tasks = if n_tasks > n_threads { n_tasks / n_threads * n_threads } else { n_tasks };
    n_rows.div_ceil(n_tasks).max(1)
}
