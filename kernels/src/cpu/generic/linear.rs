//! Products of activations and weights: blocks of rows times tiles, and what becomes of the sums.
#![allow(unsafe_code)]

use std::ops::Range;

use super::{
    super::simd::{LANES, Line, Simd},
    quantize::Block,
    tile::{Inputs, Sums, Tile, Weights},
};

/// Where sums go.
#[derive(Clone, Copy)]
pub(crate) enum Out {
    /// Plus the bias, `[n_rows, n_out]`.
    Floats(*mut f32),
    /// As fixed-point numbers, slice by slice and the bias as one more, `[n_rows, n_out]`.
    Fixed(*mut i64),
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
}

/// Does a task.
///
/// # Safety
/// The CPU has `S`; pointers are valid for what the task's shapes say; nobody else touches the task's outputs.
#[inline(always)]
pub(crate) unsafe fn linear<S: Simd, K: Tile>(task: &LinearTask) {
    for index in task.row_blocks.clone() {
        let block = Block::new(task.n_rows, S::ROWS, index);
        // SAFETY: the contract above. Arms above `ROWS` are never taken.
        unsafe {
            match block.n_rows {
                1 => row_block::<S, K, 1>(task, block.first_row),
                2 if S::ROWS >= 2 => row_block::<S, K, 2>(task, block.first_row),
                4 if S::ROWS >= 4 => row_block::<S, K, 4>(task, block.first_row),
                8 if S::ROWS >= 8 => row_block::<S, K, 8>(task, block.first_row),
                n => unreachable!("a block of {n} rows"),
            }
        }
    }
}

/// # Safety
/// As [`linear`]; a block of `R` rows begins with `first_row`.
#[inline(always)]
unsafe fn row_block<S: Simd, K: Tile, const R: usize>(task: &LinearTask, first_row: usize) {
    // SAFETY: blocks lie one after another.
    let at = unsafe { task.x.add(first_row * task.n_steps * task.n_levels * K::X_BYTES) };
    let x = Inputs { at, n_levels: task.n_levels };
    let mut tile = task.tiles.start;
    if R == 1 && S::ROWS > 1 {
        // One row alone keeps few sums in flight: two tiles at once hide the latency of the additions.
        while tile + 2 <= task.tiles.end {
            // SAFETY: the contract above.
            unsafe { tiles::<S, K, R, 2>(task, x, first_row, tile) };
            tile += 2;
        }
    }
    while tile < task.tiles.end {
        // SAFETY: the contract above.
        unsafe { tiles::<S, K, R, 1>(task, x, first_row, tile) };
        tile += 1;
    }
}

/// # Safety
/// As [`linear`]; `x` is the block that begins with `first_row` and has `R` rows; `T` tiles from `first_tile` on exist.
#[inline(always)]
unsafe fn tiles<S: Simd, K: Tile, const R: usize, const T: usize>(
    task: &LinearTask,
    x: Inputs,
    first_row: usize,
    first_tile: usize,
) {
    let mut sums: Sums<R, T> = Line([[[0.0; LANES]; R]; T]);
    let n_numbers = task.n_steps.div_ceil(task.steps_per_slice.max(1)) + usize::from(!task.bias.is_null());
    let start = S::FIXED_EXCESS.wrapping_mul(n_numbers as i64).wrapping_neg();
    let mut fixed = Line([[[start; LANES]; R]; T]);
    let mut step = 0;
    // SAFETY: the contract above: weights and activations have `n_steps` steps, outputs `n_rows` rows of `n_out`.
    unsafe {
        let tile = task.weights.add(first_tile * task.tile_bytes);
        let w = Weights { tile, tile_bytes: task.tile_bytes, n_steps: task.n_steps };
        while step < task.n_steps {
            let n_steps = task.steps_per_slice.min(task.n_steps - step);
            K::sums::<S, R, T>(w, x, step..step + n_steps, &mut sums);
            step += n_steps;
            if let Out::Fixed(_) = task.out {
                for t in 0..T {
                    for r in 0..R {
                        S::add_fixed(fixed.0[t][r].as_mut_ptr(), S::load(sums.0[t][r].as_ptr()));
                    }
                }
            }
        }
        for t in 0..T {
            let column = (first_tile + t) * LANES;
            let n = LANES.min(task.n_out - column);
            for r in 0..R {
                let at = (first_row + r) * task.n_out + column;
                match task.out {
                    Out::Fixed(out) => {
                        if !task.bias.is_null() {
                            S::add_fixed(fixed.0[t][r].as_mut_ptr(), S::load(task.bias.add(column)));
                        }
                        out.add(at).copy_from_nonoverlapping(fixed.0[t][r].as_ptr(), n);
                    }
                    Out::Floats(out) => {
                        let mut v = S::load(sums.0[t][r].as_ptr());
                        if !task.bias.is_null() {
                            v = S::add(v, S::load(task.bias.add(column)));
                        }
                        if n == LANES {
                            S::store(out.add(at), v);
                        } else {
                            S::store(sums.0[t][r].as_mut_ptr(), v);
                            out.add(at).copy_from_nonoverlapping(sums.0[t][r].as_ptr(), n);
                        }
                    }
                }
            }
        }
    }
}
