//! Products of activations and weights: blocks of rows times tiles, and what becomes of the sums.
#![allow(unsafe_code)]

use std::ops::Range;

use super::{
    super::{
        matrix::MatrixUnit,
        simd::{Dots, LANES, Line, Simd},
    },
    quantize::Block,
    tile::{FixedSums, Inputs, Sums, Tile, Weights},
};

/// Where sums go.
#[derive(Clone, Copy)]
pub(crate) enum Out {
    /// Plus the bias, `[n_rows, n_out]`.
    Floats(*mut f32),
    /// As fixed-point numbers, slice by slice and the bias as one more, `[n_rows, n_out]`.
    Fixed(*mut i64),
}

/// [`sums`] and [`fixed`] as functions of their own: their loops need every register there is, and what is around them would
/// take some.
pub(crate) trait Apart: Dots {
    /// # Safety
    /// As [`sums`].
    unsafe fn sums<K: Tile, const R: usize, const T: usize>(w: Weights, x: Inputs, out: &mut Sums<R, T>);

    /// # Safety
    /// As [`fixed`].
    unsafe fn fixed<K: Tile, const R: usize, const T: usize>(
        w: Weights,
        x: Inputs,
        steps_per_slice: usize,
        out: &mut FixedSums<R, T>,
    );
}

/// Sums of `T` tiles for a block of `R` rows.
///
/// # Safety
/// The CPU has `S`; `w` and `x` hold all steps.
#[inline(always)]
pub(crate) unsafe fn sums<S: Dots, K: Tile, const R: usize, const T: usize>(
    w: Weights,
    x: Inputs,
    out: &mut Sums<R, T>,
) {
    // SAFETY: the contract above.
    unsafe { K::sums::<S, R, T>(w, x, 0..w.n_steps, out) }
}

/// Adds to `out` the sums of each slice of `T` tiles for a block of `R` rows.
///
/// # Safety
/// As [`sums`]; a slice has at least one step.
#[inline(always)]
pub(crate) unsafe fn fixed<S: Dots, K: Tile, const R: usize, const T: usize>(
    w: Weights,
    x: Inputs,
    steps_per_slice: usize,
    out: &mut FixedSums<R, T>,
) {
    // SAFETY: the contract above.
    unsafe { K::fixed::<S, R, T>(w, x, steps_per_slice, out) }
}

/// Part of a product: some tiles of the weights times some blocks of rows.
#[derive(Clone)]
pub(crate) struct LinearTask {
    /// Packed weights, all tiles.
    pub weights: *const u8,
    pub tile_bytes: usize,
    pub n_steps: usize,
    /// Steps that are summed in f32: a slice for `Out::Fixed`, all for `Out::Floats`.
    pub steps_per_slice: usize,
    /// Packed activations, all blocks of rows.
    pub x: *const u8,
    /// Levels of quantized activations; 1 for dense weights.
    pub n_levels: usize,
    pub n_rows: usize,
    pub n_out: usize,
    /// Padded to whole tiles; null for none.
    pub bias: *const f32,
    pub out: Out,
    pub tiles: Range<usize>,
    pub row_blocks: Range<usize>,
    /// Room for one unpacked tile; null if tiles are to be used as they are.
    pub unpacked: *mut u8,
}

impl LinearTask {
    /// The weights from tile `tile` on.
    ///
    /// # Safety
    /// There is such a tile.
    #[inline(always)]
    unsafe fn weights(&self, tile: usize) -> Weights {
        // SAFETY: the contract above.
        let first = unsafe { self.weights.add(tile * self.tile_bytes) };
        Weights { tile: first, tile_bytes: self.tile_bytes, n_steps: self.n_steps }
    }

    /// The first column of a tile's outputs, and how many there are.
    #[inline(always)]
    fn columns(&self, tile: usize) -> (usize, usize) {
        let first = tile * LANES;
        (first, LANES.min(self.n_out - first))
    }

    /// The activations of the block that begins with row `first_row`.
    ///
    /// # Safety
    /// There is such a block; blocks lie one after another.
    #[inline(always)]
    unsafe fn inputs<K: Tile>(&self, first_row: usize) -> Inputs {
        // SAFETY: the contract above.
        let at = unsafe { self.x.add(first_row * self.n_steps * self.n_levels * K::X_BYTES) };
        Inputs { at, n_levels: self.n_levels }
    }
}

const CACHE_LINE: usize = 64;

/// Activations that blocks of rows which meet an unpacked tile one after another may have: they stay in the second-level cache.
const GROUP_BYTES: usize = 256 << 10;

/// Activations that blocks of rows may have which meet each tile one after another as it is: they stay in the first-level cache.
const NEAR_BYTES: usize = 32 << 10;
/// Blocks that are worth it: fewer would ask for too much of the next tile at once.
const MANY_BLOCKS: usize = 4;

/// Does a task.
///
/// # Safety
/// The CPU has `S`; pointers are valid for what the task's shapes say; nobody else touches the task's outputs.
#[inline(always)]
pub(crate) unsafe fn linear<S: Apart, K: Tile>(task: &LinearTask) {
    let n_full = (task.n_rows / S::ROWS).min(task.row_blocks.end);
    let uses_matrix = S::Matrix::EXISTS && task.row_blocks.start < n_full;
    // SAFETY: the contract above; what is started is stopped.
    unsafe {
        if uses_matrix {
            S::Matrix::start();
        }
        row_blocks::<S, K>(task, n_full);
        if uses_matrix {
            S::Matrix::stop();
        }
    }
}

/// Does a task, in which `n_full` is behind the last block of `ROWS` rows.
///
/// # Safety
/// As [`linear`]; if such blocks are there, the matrix unit is started.
#[inline(always)]
unsafe fn row_blocks<S: Apart, K: Tile>(task: &LinearTask, n_full: usize) {
    let mut blocks = task.row_blocks.clone();
    let block_bytes = (S::ROWS * task.n_steps * task.n_levels * K::X_BYTES).max(1);
    if K::UNPACKS && !task.unpacked.is_null() {
        let most = (GROUP_BYTES / block_bytes).max(S::UNPACK_BLOCKS);
        while blocks.start.saturating_add(S::UNPACK_BLOCKS) <= n_full {
            let group = blocks.start..n_full.min(blocks.start + most);
            blocks.start = group.end;
            // SAFETY: the contract above; these blocks have `ROWS` rows.
            unsafe { tile_by_tile::<S, K, true>(task, group) };
        }
    }
    let most = NEAR_BYTES / block_bytes;
    while most >= MANY_BLOCKS && blocks.start.saturating_add(MANY_BLOCKS) <= n_full {
        let group = blocks.start..n_full.min(blocks.start + most);
        blocks.start = group.end;
        // SAFETY: the contract above; these blocks have `ROWS` rows.
        unsafe { tile_by_tile::<S, K, false>(task, group) };
    }
    for index in blocks {
        let block = Block::new(task.n_rows, S::ROWS, index);
        // SAFETY: the contract above. Arms above `ROWS` are never taken.
        unsafe {
            match block.n_rows {
                1 => row_block::<S, K, 1>(task, block.first_row),
                2 if S::ROWS >= 2 => row_block::<S, K, 2>(task, block.first_row),
                4 if S::ROWS >= 4 => row_block::<S, K, 4>(task, block.first_row),
                8 if S::ROWS >= 8 => row_block::<S, K, 8>(task, block.first_row),
                16 if S::ROWS >= 16 && !only_unpacked::<S, K>() => row_block::<S, K, 16>(task, block.first_row),
                n => unreachable!("a block of {n} rows"),
            }
        }
    }
}

/// Whether blocks of `ROWS` rows always meet unpacked tiles: those of a matrix unit. (Others need not be compiled.)
const fn only_unpacked<S: Dots, K: Tile>() -> bool {
    S::Matrix::EXISTS && K::UNPACKS
}

/// A tile on its way from memory while another one is computed with: else each would be waited for.
struct NextTile {
    at: *const u8,
    end: *const u8,
    /// Bytes to ask for at a time.
    share: usize,
}

impl NextTile {
    /// The tile with this number, if there is one, in `n_shares` parts.
    fn new(task: &LinearTask, tile: usize, n_shares: usize) -> Self {
        let len = if tile < task.n_out.div_ceil(LANES) { task.tile_bytes } else { 0 };
        let at = task.weights.wrapping_add(tile * task.tile_bytes);
        Self { at, end: at.wrapping_add(len), share: len.div_ceil(n_shares.max(1)).next_multiple_of(CACHE_LINE) }
    }

    /// Asks for the next part.
    ///
    /// # Safety
    /// The CPU has `S`.
    #[inline(always)]
    unsafe fn fetch<S: Simd>(&mut self) {
        let end = self.end.min(self.at.wrapping_add(self.share));
        while self.at < end {
            // SAFETY: the contract above; nothing is read.
            unsafe { S::prefetch(self.at) };
            self.at = self.at.wrapping_add(CACHE_LINE);
        }
    }
}

/// Blocks of `ROWS` rows, each tile's products for all of them before the next tile's.
///
/// # Safety
/// As [`linear`]. If tiles are unpacked: `task.unpacked` has room for one, and nobody else touches it.
#[inline(always)]
unsafe fn tile_by_tile<S: Apart, K: Tile, const UNPACKS: bool>(task: &LinearTask, blocks: Range<usize>) {
    for tile in task.tiles.clone() {
        let mut ahead = NextTile::new(task, tile + 1, blocks.len());
        // SAFETY: the contract above.
        unsafe {
            let packed = task.weights(tile);
            let unpacked = Weights { tile: task.unpacked, tile_bytes: 0, n_steps: task.n_steps };
            if UNPACKS {
                K::unpack::<S>(packed, task.unpacked);
            }
            for index in blocks.clone() {
                ahead.fetch::<S>();
                let first_row = index * S::ROWS;
                let x = task.inputs::<K>(first_row);
                if UNPACKS {
                    full_block::<S, K::Unpacked>(task, unpacked, x, first_row, tile);
                } else {
                    full_block::<S, K>(task, packed, x, first_row, tile);
                }
            }
        }
    }
}

/// One tile for a block of `ROWS` rows.
///
/// # Safety
/// As [`tiles`].
#[inline(always)]
unsafe fn full_block<S: Apart, K: Tile>(task: &LinearTask, w: Weights, x: Inputs, first_row: usize, tile: usize) {
    // SAFETY: the contract above. Arms but that of `ROWS` are never taken.
    unsafe {
        match S::ROWS {
            1 => tiles::<S, K, 1, 1>(task, w, x, first_row, tile),
            2 => tiles::<S, K, 2, 1>(task, w, x, first_row, tile),
            4 => tiles::<S, K, 4, 1>(task, w, x, first_row, tile),
            8 => tiles::<S, K, 8, 1>(task, w, x, first_row, tile),
            16 if !only_unpacked::<S, K>() => tiles::<S, K, 16, 1>(task, w, x, first_row, tile),
            n => unreachable!("a block of {n} rows"),
        }
    }
}

/// # Safety
/// As [`linear`]; a block of `R` rows begins with `first_row`.
#[inline(always)]
unsafe fn row_block<S: Apart, K: Tile, const R: usize>(task: &LinearTask, first_row: usize) {
    // SAFETY: the contract above.
    let x = unsafe { task.inputs::<K>(first_row) };
    let mut tile = task.tiles.start;
    if R == 1 && S::ROWS > 1 {
        // One row alone keeps few sums in flight: two tiles at once hide the latency of the additions.
        while tile + 2 <= task.tiles.end {
            // SAFETY: the contract above.
            unsafe { tiles::<S, K, R, 2>(task, task.weights(tile), x, first_row, tile) };
            tile += 2;
        }
    }
    while tile < task.tiles.end {
        // SAFETY: the contract above.
        unsafe { tiles::<S, K, R, 1>(task, task.weights(tile), x, first_row, tile) };
        tile += 1;
    }
}

/// # Safety
/// As [`linear`]; `x` is the block that begins with `first_row` and has `R` rows; `w` are `T` tiles from `first_tile` on.
#[inline(always)]
unsafe fn tiles<S: Apart, K: Tile, const R: usize, const T: usize>(
    task: &LinearTask,
    w: Weights,
    x: Inputs,
    first_row: usize,
    first_tile: usize,
) {
    // SAFETY: the contract above: weights and activations have `n_steps` steps, outputs `n_rows` rows of `n_out`.
    unsafe {
        match task.out {
            Out::Floats(out) => {
                let mut sums: Sums<R, T> = Line([[[0.0; LANES]; R]; T]);
                S::sums::<K, R, T>(w, x, &mut sums);
                for t in 0..T {
                    let (column, n) = task.columns(first_tile + t);
                    for r in 0..R {
                        let at = out.add((first_row + r) * task.n_out + column);
                        let mut v = S::load(sums.0[t][r].as_ptr());
                        if !task.bias.is_null() {
                            v = S::add(v, S::load(task.bias.add(column)));
                        }
                        if n == LANES {
                            S::store(at, v);
                        } else {
                            S::store(sums.0[t][r].as_mut_ptr(), v);
                            at.copy_from_nonoverlapping(sums.0[t][r].as_ptr(), n);
                        }
                    }
                }
            }
            Out::Fixed(out) => {
                let n_numbers = task.n_steps.div_ceil(task.steps_per_slice.max(1)) + usize::from(!task.bias.is_null());
                let start = S::FIXED_EXCESS.wrapping_mul(n_numbers as i64).wrapping_neg();
                let mut fixed: FixedSums<R, T> = Line([[[start; LANES]; R]; T]);
                S::fixed::<K, R, T>(w, x, task.steps_per_slice, &mut fixed);
                for t in 0..T {
                    let (column, n) = task.columns(first_tile + t);
                    for r in 0..R {
                        let at = out.add((first_row + r) * task.n_out + column);
                        if !task.bias.is_null() {
                            S::add_fixed(fixed.0[t][r].as_mut_ptr(), S::load(task.bias.add(column)));
                        }
                        if n == LANES {
                            at.cast::<[i64; LANES]>().write_unaligned(fixed.0[t][r]);
                        } else {
                            at.copy_from_nonoverlapping(fixed.0[t][r].as_ptr(), n);
                        }
                    }
                }
            }
        }
    }
}
