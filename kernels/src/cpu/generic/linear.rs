//! Products of activations and weights: blocks of rows times tiles, and what becomes of the sums.
#![allow(unsafe_code)]

use std::ops::Range;

use super::{
    super::{
        matrix::MatrixUnit,
        simd::{Dots, LANES, Line},
    },
    quantize::Block,
    tile::{Ahead, FixedSums, Inputs, Sums, Tile, Weights},
};
use crate::tensor::CACHE_LINE;

/// Where sums go.
#[derive(Clone, Copy)]
pub(crate) enum Out {
    /// Plus the bias, `[n_rows, n_out]`.
    Floats(*mut f32),
    /// As fixed-point numbers, slice by slice and the bias as one more, `[n_rows, n_out]`.
    Fixed(*mut i64),
}

impl Out {
    /// Steps that are summed in one go: sums in f32 can go on from where they were.
    pub fn unit(self, steps_per_slice: usize) -> usize {
        match self {
            Self::Floats(_) => 1,
            Self::Fixed(_) => steps_per_slice,
        }
    }
}

/// [`sums`] and [`fixed`] as functions of their own: their loops need every register there is, and what is around them would
/// take some.
pub(crate) trait Apart: Dots {
    /// # Safety
    /// As [`sums`].
    unsafe fn sums<K: Tile, const R: usize, const T: usize>(w: Weights, x: Inputs, goes_on: bool, out: &mut Sums<R, T>);

    /// # Safety
    /// As [`fixed`].
    unsafe fn fixed<K: Tile, const R: usize, const T: usize>(
        w: Weights,
        x: Inputs,
        steps_per_slice: usize,
        out: &mut FixedSums<R, T>,
    );
}

/// Sums of `T` tiles for a block of `R` rows: [`Tile::sums`].
///
/// # Safety
/// The CPU has `S`; `w` and `x` hold all steps.
#[inline(always)]
pub(crate) unsafe fn sums<S: Dots, K: Tile, const R: usize, const T: usize>(
    w: Weights,
    x: Inputs,
    goes_on: bool,
    out: &mut Sums<R, T>,
) {
    // SAFETY: the contract above.
    unsafe { K::sums::<S, R, T>(w, x, 0..w.n_steps, goes_on, out) }
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
    /// Room for [`steps_per_part`] unpacked steps; null if tiles are to be used as they are.
    pub unpacked: *mut u8,
}

/// Most unpacked steps that stay in the first-level cache beside the activations that they meet, from block to block.
const PART_STEPS: usize = 28;

/// How many of `n_steps` steps are unpacked at a time: whole slices, `unit` steps, for those are summed in one go.
pub(crate) fn steps_per_part(n_steps: usize, unit: usize) -> usize {
    let even = n_steps.div_ceil(n_steps.div_ceil(PART_STEPS).max(1));
    even.next_multiple_of(unit.max(1)).min(n_steps)
}

impl LinearTask {
    /// The weights from tile `tile` on.
    ///
    /// # Safety
    /// There is such a tile.
    #[inline(always)]
    unsafe fn weights(&self, tile: usize, ahead: Ahead) -> Weights {
        // SAFETY: the contract above.
        let first = unsafe { self.weights.add(tile * self.tile_bytes) };
        Weights { tile: first, tile_bytes: self.tile_bytes, n_steps: self.n_steps, ahead }
    }

    /// The first column of a tile's outputs, and how many there are.
    #[inline(always)]
    fn columns(&self, tile: usize) -> (usize, usize) {
        let first = tile * LANES;
        (first, LANES.min(self.n_out - first))
    }

    /// The activations from step `step` on of the block of `n_rows` rows that begins with row `first_row`.
    ///
    /// # Safety
    /// There is such a block; blocks lie one after another.
    #[inline(always)]
    unsafe fn inputs<K: Tile>(&self, first_row: usize, n_rows: usize, step: usize) -> Inputs {
        let rows = first_row * self.n_steps + n_rows * step;
        // SAFETY: the contract above.
        let at = unsafe { self.x.add(rows * self.n_levels * K::X_BYTES) };
        Inputs { at, n_levels: self.n_levels }
    }
}

/// Activations that blocks of rows which meet an unpacked part one after another may have: they stay in the second-level cache.
const GROUP_BYTES: usize = 256 << 10;

/// Tiles of which one part is done before the next one: what their outputs are so far stays in the second-level cache.
const NEAR_TILES: usize = 16;

/// Activations that blocks of rows may have which meet each tile one after another as it is: they stay in the first-level cache.
const NEAR_BYTES: usize = 32 << 10;
/// Blocks from which on this is done: fewer take all tiles of a task one after another.
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
    let step_bytes = (S::ROWS * task.n_levels * K::X_BYTES).max(1);
    if K::UNPACKS && !task.unpacked.is_null() {
        let part_steps = steps_per_part(task.n_steps, task.out.unit(task.steps_per_slice));
        let most = (GROUP_BYTES / (part_steps * step_bytes).max(1)).max(S::UNPACK_BLOCKS);
        while blocks.start.saturating_add(S::UNPACK_BLOCKS) <= n_full {
            let group = blocks.start..n_full.min(blocks.start + most);
            blocks.start = group.end;
            let all = task.tiles.clone();
            for first in all.clone().step_by(NEAR_TILES) {
                let tiles = first..all.end.min(first + NEAR_TILES);
                for first in (0..task.n_steps).step_by(part_steps.max(1)) {
                    let part = first..task.n_steps.min(first + part_steps);
                    // SAFETY: the contract above; these blocks have `ROWS` rows.
                    unsafe { tile_by_tile::<S, K, true>(task, tiles.clone(), group.clone(), part) };
                }
            }
        }
    }
    let block_bytes = (task.n_steps * step_bytes).max(1);
    let most = NEAR_BYTES / block_bytes;
    while most >= MANY_BLOCKS && blocks.start.saturating_add(MANY_BLOCKS) <= n_full {
        let group = blocks.start..n_full.min(blocks.start + most);
        blocks.start = group.end;
        // SAFETY: the contract above; these blocks have `ROWS` rows.
        unsafe { tile_by_tile::<S, K, false>(task, task.tiles.clone(), group, 0..task.n_steps) };
    }
    for index in blocks {
        // What the first one asks for is near when the next ones come.
        let is_far = index == task.row_blocks.start;
        let block = Block::new(task.n_rows, S::ROWS, index);
        // SAFETY: the contract above. Arms above `ROWS` are never taken.
        unsafe {
            match block.n_rows {
                1 => row_block::<S, K, 1>(task, block.first_row, is_far),
                2 if S::ROWS >= 2 => row_block::<S, K, 2>(task, block.first_row, is_far),
                4 if S::ROWS >= 4 => row_block::<S, K, 4>(task, block.first_row, is_far),
                8 if S::ROWS >= 8 => row_block::<S, K, 8>(task, block.first_row, is_far),
                16 if S::ROWS >= 16 && !only_unpacked::<S, K>() => row_block::<S, K, 16>(task, block.first_row, is_far),
                n => unreachable!("a block of {n} rows"),
            }
        }
    }
}

/// Whether blocks of `ROWS` rows always meet unpacked tiles: those of a matrix unit. (Others need not be compiled.)
const fn only_unpacked<S: Dots, K: Tile>() -> bool {
    S::Matrix::EXISTS && K::UNPACKS
}

/// What follows the steps `part` of tile number `tile`, one of `tiles`: the same steps of the next tile, or further ones of the first.
/// Where it lies, and its bytes.
fn next_part<K: Tile>(task: &LinearTask, tile: usize, tiles: &Range<usize>, part: &Range<usize>) -> (*const u8, usize) {
    let (tile, steps) = match () {
        () if tile + 1 < tiles.end => (tile + 1, part.clone()),
        () if part.end < task.n_steps => (tiles.start, part.end..task.n_steps.min(part.end + part.len())),
        // It may be the next task's.
        () => (tile + 1, 0..part.len()),
    };
    let heads = task.tile_bytes - task.n_steps * K::STEP_BYTES;
    let from = if steps.start == 0 { 0 } else { heads + steps.start * K::STEP_BYTES };
    let to = if tile < task.n_out.div_ceil(LANES) { heads + steps.end * K::STEP_BYTES } else { from };
    (task.weights.wrapping_add(tile * task.tile_bytes + from), to - from)
}

/// The share of block number `block` of `n_blocks` in asking for `len` bytes at `at`, in `n_levels` levels.
fn share(at: *const u8, len: usize, block: usize, n_blocks: usize, n_levels: usize) -> Ahead {
    let n_lines = len.div_ceil(CACHE_LINE).div_ceil((n_blocks * n_levels).max(1));
    let (stride, first) = (n_lines * CACHE_LINE, block * n_levels * n_lines * CACHE_LINE);
    if first < len { Ahead { at: at.wrapping_add(first), stride, n_lines } } else { Ahead::NONE }
}

/// Blocks of `ROWS` rows and tiles, each tile's products of the steps `part` for all blocks before the next tile's.
///
/// # Safety
/// As [`linear`]; earlier parts are done. If steps are unpacked: `task.unpacked` has room for them, and nobody else touches it. Else
/// they are all.
#[inline(always)]
unsafe fn tile_by_tile<S: Apart, K: Tile, const UNPACKS: bool>(
    task: &LinearTask,
    tiles: Range<usize>,
    blocks: Range<usize>,
    part: Range<usize>,
) {
    for tile in tiles.clone() {
        let (next, next_bytes) = next_part::<K>(task, tile, &tiles, &part);
        let n_levels = part.len() * task.n_levels;
        // SAFETY: the contract above.
        unsafe {
            let packed = task.weights(tile, Ahead::NONE);
            let unpacked = Weights { tile: task.unpacked, tile_bytes: 0, n_steps: part.len(), ahead: Ahead::NONE };
            if UNPACKS {
                K::unpack::<S>(packed, part.clone(), task.unpacked);
            }
            for (i, index) in blocks.clone().enumerate() {
                let ahead = share(next, next_bytes, i, blocks.len(), n_levels);
                let (packed, unpacked) = (Weights { ahead, ..packed }, Weights { ahead, ..unpacked });
                let first_row = index * S::ROWS;
                let x = task.inputs::<K>(first_row, S::ROWS, part.start);
                if UNPACKS {
                    full_block::<S, K::Unpacked>(task, unpacked, x, &part, first_row, tile);
                } else {
                    full_block::<S, K>(task, packed, x, &part, first_row, tile);
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
unsafe fn full_block<S: Apart, K: Tile>(
    task: &LinearTask,
    w: Weights,
    x: Inputs,
    part: &Range<usize>,
    first_row: usize,
    tile: usize,
) {
    // SAFETY: the contract above. Arms but that of `ROWS` are never taken.
    unsafe {
        match S::ROWS {
            1 => tiles::<S, K, 1, 1>(task, w, x, part, first_row, tile),
            2 => tiles::<S, K, 2, 1>(task, w, x, part, first_row, tile),
            4 => tiles::<S, K, 4, 1>(task, w, x, part, first_row, tile),
            8 => tiles::<S, K, 8, 1>(task, w, x, part, first_row, tile),
            16 if !only_unpacked::<S, K>() => tiles::<S, K, 16, 1>(task, w, x, part, first_row, tile),
            n => unreachable!("a block of {n} rows"),
        }
    }
}

/// # Safety
/// As [`linear`]; a block of `R` rows begins with `first_row`.
#[inline(always)]
unsafe fn row_block<S: Apart, K: Tile, const R: usize>(task: &LinearTask, first_row: usize, is_far: bool) {
    // SAFETY: the contract above.
    let x = unsafe { task.inputs::<K>(first_row, R, 0) };
    let all = 0..task.n_steps;
    let ahead = |tile: usize| match is_far {
        true => Ahead::further(task.weights.wrapping_add(tile * task.tile_bytes), K::STEP_BYTES / task.n_levels),
        false => Ahead::NONE,
    };
    let mut tile = task.tiles.start;
    if R == 1 && S::ROWS > 1 {
        // One row alone keeps few sums in flight: two tiles at once hide the latency of the additions.
        while tile + 2 <= task.tiles.end {
            // SAFETY: the contract above.
            unsafe { tiles::<S, K, R, 2>(task, task.weights(tile, ahead(tile)), x, &all, first_row, tile) };
            tile += 2;
        }
    }
    while tile < task.tiles.end {
        // SAFETY: the contract above.
        unsafe { tiles::<S, K, R, 1>(task, task.weights(tile, ahead(tile)), x, &all, first_row, tile) };
        tile += 1;
    }
}

/// Reads the sums of earlier parts from the outputs `out`.
///
/// # Safety
/// As [`tiles`].
#[inline(always)]
unsafe fn earlier<N: Copy, const R: usize, const T: usize>(
    task: &LinearTask,
    out: *const N,
    first_row: usize,
    first_tile: usize,
    sums: &mut [[[N; LANES]; R]; T],
) {
    for t in 0..T {
        let (column, n) = task.columns(first_tile + t);
        for r in 0..R {
            // SAFETY: the contract above.
            unsafe {
                let at = out.add((first_row + r) * task.n_out + column);
                at.copy_to_nonoverlapping(sums[t][r].as_mut_ptr(), n);
            }
        }
    }
}

/// The products of the steps `part`.
///
/// # Safety
/// As [`linear`]; `x` is this part of the block that begins with `first_row` and has `R` rows; `w` is this part of `T` tiles from
/// `first_tile` on; earlier parts are done, and later ones will be.
#[inline(always)]
unsafe fn tiles<S: Apart, K: Tile, const R: usize, const T: usize>(
    task: &LinearTask,
    w: Weights,
    x: Inputs,
    part: &Range<usize>,
    first_row: usize,
    first_tile: usize,
) {
    let (is_first, is_last) = (part.start == 0, part.end == task.n_steps);
    let has_bias = is_last && !task.bias.is_null();
    // SAFETY: the contract above: weights and activations have these steps, outputs `n_rows` rows of `n_out`.
    unsafe {
        match task.out {
            Out::Floats(out) => {
                let mut sums: Sums<R, T> = Line([[[0.0; LANES]; R]; T]);
                if !is_first {
                    earlier(task, out, first_row, first_tile, &mut sums.0);
                }
                S::sums::<K, R, T>(w, x, !is_first, &mut sums);
                for t in 0..T {
                    let (column, n) = task.columns(first_tile + t);
                    for r in 0..R {
                        let at = out.add((first_row + r) * task.n_out + column);
                        let mut v = S::load(sums.0[t][r].as_ptr());
                        if has_bias {
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
                if !is_first {
                    earlier(task, out, first_row, first_tile, &mut fixed.0);
                }
                S::fixed::<K, R, T>(w, x, task.steps_per_slice, &mut fixed);
                for t in 0..T {
                    let (column, n) = task.columns(first_tile + t);
                    for r in 0..R {
                        let at = out.add((first_row + r) * task.n_out + column);
                        if has_bias {
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
