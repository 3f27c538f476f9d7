//! Tiles of quantized weights, whatever their layout (`layouts.rs`). Activations: `quantize.rs`; order of the sums: `tile.rs`.
#![allow(unsafe_code)]

use std::ops::Range;

use super::{
    super::{matrix::MatrixUnit, simd::Dots},
    matrix,
    packed::Scales,
    quantize::QUANT_ROW_BYTES,
    tile::{FixedSums, Inputs, Sums, Tile, Weights, fixed_slices, start},
};
use crate::layout::GROUP;

/// The activations of one step of a block of `R` rows: see `quantize.rs`.
#[derive(Clone, Copy)]
pub(crate) struct Step<const R: usize>(*const u8);

impl<const R: usize> Step<R> {
    /// Level number `level` of a block, counted over all its steps.
    ///
    /// # Safety (all)
    /// The step lies there; `r < R`.
    #[inline(always)]
    pub unsafe fn new(x: Inputs, level: usize) -> Self {
        // SAFETY: the contract above.
        Self(unsafe { x.at.add(level * R * QUANT_ROW_BYTES) })
    }
    #[inline(always)]
    pub unsafe fn quants(self, r: usize) -> *const i8 {
        // SAFETY: the contract above.
        unsafe { self.0.add(r * GROUP).cast() }
    }
    #[inline(always)]
    pub unsafe fn scale(self, r: usize) -> f32 {
        // SAFETY: the contract above.
        unsafe { *self.0.add(R * GROUP).cast::<f32>().add(r) }
    }
    #[inline(always)]
    pub unsafe fn scaled_sum(self, r: usize) -> f32 {
        // SAFETY: the contract above.
        unsafe { *self.0.add(R * GROUP).cast::<f32>().add(R + r) }
    }
    /// -128 times the sum of all 32 (`part` 0), the first 16 (1) or the last 16 (2) quants.
    #[inline(always)]
    pub unsafe fn bias(self, part: usize, r: usize) -> i32 {
        // SAFETY: the contract above.
        unsafe { *self.0.add(R * GROUP).cast::<i32>().add((2 + part) * R + r) }
    }
}

/// What differs between layouts of quantized weights: how a step adds to the sums.
pub(crate) trait Quantized {
    /// Bytes of the quants of a step.
    const QUANT_BYTES: usize;
    /// Sets of scales and mins.
    const N_SETS: usize;
    type Scales: Scales;
    /// See [`Tile::UNPACKS`].
    const UNPACKS: bool = false;
    /// See [`Tile::Unpacked`].
    type Unpacked: Tile;

    /// Adds the products of a step.
    ///
    /// # Safety
    /// The CPU has `S`; weights and activations lie there.
    unsafe fn step<S: Dots, const R: usize>(at: StepAt, x: Step<R>, acc: &mut [S::F; R]);

    /// Whether quants are bytes as a matrix unit wants them.
    const IS_BYTES: bool = false;
    /// Inputs that share a scale.
    const GROUP_INPUTS: usize = GROUP;
    /// By how much a bias is shifted to be that of quants as they are stored; `None` if they have none.
    const BIAS_SHIFT: Option<u32> = None;

    /// Unpacks a step to `out`, if [`Quantized::UNPACKS`].
    ///
    /// # Safety
    /// The CPU has `S`; the step lies there, and there is room for one that is unpacked.
    unsafe fn unpack<S: Dots>(_: StepAt, _: *mut u8) {}
}

/// Where a step of weights lies.
#[derive(Clone, Copy)]
pub(crate) struct StepAt {
    head: *const u8,
    quants: *const u8,
    step: usize,
}

impl StepAt {
    /// Step number `step` of the first tile.
    ///
    /// # Safety
    /// There is such a step, of layout `Q`.
    #[inline(always)]
    pub unsafe fn new<Q: Quantized>(w: Weights, step: usize) -> Self {
        // SAFETY: the contract above.
        unsafe {
            let (head, first) = w.parts::<Q>(0);
            Self { head, quants: first.add(step * Q::STEP_BYTES), step }
        }
    }

    /// Where its quants lie.
    #[inline(always)]
    pub fn quants(self) -> *const u8 {
        self.quants
    }

    /// # Safety
    /// The CPU has `S`; the step is of layout `Q`.
    #[inline(always)]
    pub unsafe fn set<S: Dots, Q: Quantized>(self, set: usize) -> S::F {
        // SAFETY: the contract above.
        unsafe {
            let tail = self.quants.add(Q::QUANT_BYTES);
            Q::Scales::load::<S>(self.head, tail, self.step, set, Q::N_SETS)
        }
    }
}

/// Whether a matrix unit multiplies `n_tiles` tiles by a block of `n_rows` rows.
const fn fits_matrix_unit<S: Dots, Q: Quantized>(n_rows: usize, n_tiles: usize) -> bool {
    S::Matrix::EXISTS && Q::IS_BYTES && n_rows == S::Matrix::ROWS && n_tiles == 1
}

impl<Q: Quantized> Tile for Q {
    const STEP_BYTES: usize = Q::QUANT_BYTES + Q::N_SETS * Q::Scales::STEP_BYTES;
    const HEAD_BYTES: usize = Q::N_SETS * Q::Scales::HEAD_BYTES;
    const X_BYTES: usize = QUANT_ROW_BYTES;
    const UNPACKS: bool = Q::UNPACKS;
    type Unpacked = Q::Unpacked;

    #[inline(always)]
    unsafe fn unpack<S: Dots>(w: Weights, steps: Range<usize>, out: *mut u8) {
        // SAFETY: the trait's contract.
        unsafe {
            let (head, first) = w.parts::<Q>(0);
            for (i, step) in steps.enumerate() {
                let quants = first.add(step * Self::STEP_BYTES);
                Q::unpack::<S>(StepAt { head, quants, step }, out.add(i * Self::Unpacked::STEP_BYTES));
            }
        }
    }

    #[inline(always)]
    unsafe fn sums<S: Dots, const R: usize, const T: usize>(
        w: Weights,
        x: Inputs,
        steps: Range<usize>,
        goes_on: bool,
        out: &mut Sums<R, T>,
    ) {
        if fits_matrix_unit::<S, Q>(R, T) {
            // SAFETY: the trait's contract.
            return unsafe { matrix::sums::<S, Q, R, T>(w, x, steps, goes_on, out) };
        }
        // SAFETY: the trait's contract.
        unsafe {
            let mut acc = start::<S, R, T>(goes_on, out);
            // One loop over levels, not two: of two the compiler keeps scales and sums from round to round in registers that
            // it does not have.
            for level in steps.start * x.n_levels..steps.end * x.n_levels {
                let step = level >> (x.n_levels - 1);
                let x = Step::new(x, level);
                for t in 0..T {
                    w.ahead.fetch::<S>(level, t * w.tile_bytes);
                    let (head, first) = w.parts::<Q>(t);
                    let quants = first.add(step * Self::STEP_BYTES);
                    Q::step::<S, R>(StepAt { head, quants, step }, x, &mut acc[t]);
                }
            }
            for t in 0..T {
                for r in 0..R {
                    S::store(out.0[t][r].as_mut_ptr(), acc[t][r]);
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn fixed<S: Dots, const R: usize, const T: usize>(
        w: Weights,
        x: Inputs,
        steps_per_slice: usize,
        out: &mut FixedSums<R, T>,
    ) {
        // SAFETY: the trait's contract.
        unsafe {
            if fits_matrix_unit::<S, Q>(R, T) {
                matrix::fixed::<S, Q, R, T>(w, x, steps_per_slice, out);
            } else {
                fixed_slices::<S, Self, R, T>(w, x, steps_per_slice, out);
            }
        }
    }
}
