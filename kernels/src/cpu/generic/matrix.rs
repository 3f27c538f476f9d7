//! Tiles of quantized weights times blocks of rows on a matrix unit: it makes the sums of quants, vectors do what closes a group.
//!
//! The unit's results come through memory and take more than a hundred cycles, so the products of later steps are begun before
//! those of a step are closed.
#![allow(unsafe_code)]

use std::{mem::MaybeUninit, ops::Range};

use super::{
    super::{
        matrix::MatrixUnit,
        simd::{Dots, LANES, Line},
    },
    quantized::{Quantized, Step, StepAt},
    tile::{Inputs, Weights},
};
use crate::layout::GROUP;

/// Steps whose products are begun before those of a step are closed.
const AHEAD: usize = 2;
/// Room for the sums of as many steps: those begun and those being closed.
const RING: usize = 4;
const _: () = assert!(RING.is_power_of_two() && RING > AHEAD);

/// Sums of quants of a block in a step: of each group of inputs (there are 1 or 2), for each row, for each lane. The unit alone writes
/// them: clearing them first would be as many stores again.
type QuantSums<const R: usize> = MaybeUninit<Line<[[[i32; LANES]; R]; 2]>>;

/// Those of a group.
#[inline(always)]
fn of_group<const R: usize>(sums: &mut QuantSums<R>, group: usize) -> *mut i32 {
    debug_assert!(group < 2);
    sums.as_mut_ptr().cast::<i32>().wrapping_add(group * R * LANES)
}

/// What becomes of a slice's sums.
pub(crate) trait SliceSums<S: Dots, const R: usize> {
    /// # Safety
    /// The CPU has `S`.
    unsafe fn take(&mut self, sums: &[S::F; R]);
}

/// They are the result: there is but one slice.
pub(crate) struct Floats<'a, const R: usize>(pub &'a mut [[f32; LANES]; R]);

impl<S: Dots, const R: usize> SliceSums<S, R> for Floats<'_, R> {
    #[inline(always)]
    unsafe fn take(&mut self, sums: &[S::F; R]) {
        for r in 0..R {
            // SAFETY: the trait's contract.
            unsafe { S::store(self.0[r].as_mut_ptr(), sums[r]) };
        }
    }
}

/// They are added as fixed-point numbers.
pub(crate) struct Fixed<'a, const R: usize>(pub &'a mut [[i64; LANES]; R]);

impl<S: Dots, const R: usize> SliceSums<S, R> for Fixed<'_, R> {
    #[inline(always)]
    unsafe fn take(&mut self, sums: &[S::F; R]) {
        for r in 0..R {
            // SAFETY: the trait's contract.
            unsafe { S::add_fixed(self.0[r].as_mut_ptr(), sums[r]) };
        }
    }
}

/// Gives `out` the sums of each slice (`steps_per_slice` steps, at least one) of a tile for a block of `R` rows.
///
/// # Safety
/// The CPU has `S`, whose matrix unit is started and takes `R` rows; `w` and `x` hold the steps; `Q`'s quants are bytes.
#[inline(always)]
pub(crate) unsafe fn slices<S: Dots, Q: Quantized, const R: usize>(
    w: Weights,
    x: Inputs,
    steps: Range<usize>,
    steps_per_slice: usize,
    out: &mut impl SliceSums<S, R>,
) {
    let mut ring = [const { QuantSums::<R>::uninit() }; RING];
    // SAFETY: the contract above; levels lie one after another.
    unsafe {
        let levels = steps.start * x.n_levels..steps.end * x.n_levels;
        let levels_per_slice = steps_per_slice * x.n_levels;
        let mut slice_end = levels.start + levels_per_slice;
        let mut acc = [S::splat(0.0); R];
        for level in levels.start..levels.end.min(levels.start + AHEAD) {
            begin::<S, Q, R>(w, x, level, &mut ring[level % RING]);
        }
        for level in levels.clone() {
            if level + AHEAD < levels.end {
                begin::<S, Q, R>(w, x, level + AHEAD, &mut ring[(level + AHEAD) % RING]);
            }
            close::<S, Q, R>(w, x, level, &mut ring[level % RING], &mut acc);
            if level + 1 == slice_end || level + 1 == levels.end {
                out.take(&acc);
                acc = [S::splat(0.0); R];
                slice_end += levels_per_slice;
            }
        }
    }
}

/// Where the weights and activations of a level lie.
///
/// # Safety
/// There is such a level.
#[inline(always)]
unsafe fn places<Q: Quantized, const R: usize>(w: Weights, x: Inputs, level: usize) -> (StepAt, Step<R>) {
    // SAFETY: the contract above.
    unsafe { (StepAt::new::<Q>(w, level >> (x.n_levels - 1)), Step::new(x, level)) }
}

/// Begins the products of a level.
///
/// # Safety
/// As [`slices`]; there is such a level.
#[inline(always)]
unsafe fn begin<S: Dots, Q: Quantized, const R: usize>(w: Weights, x: Inputs, level: usize, out: &mut QuantSums<R>) {
    // SAFETY: the contract above.
    unsafe {
        let (at, x) = places::<Q, R>(w, x, level);
        for group in 0..GROUP / Q::GROUP_INPUTS {
            let first = group * Q::GROUP_INPUTS;
            let (x, w) = (x.quants(0).add(first), at.quants().add(LANES * first));
            let out = of_group(out, group);
            match (Q::GROUP_INPUTS, level % 2) {
                (GROUP, 0) => S::Matrix::multiply::<GROUP, 0>(x, w, out),
                (GROUP, _) => S::Matrix::multiply::<GROUP, 1>(x, w, out),
                (_, 0) => S::Matrix::multiply::<{ GROUP / 2 }, 0>(x, w, out),
                (..) => S::Matrix::multiply::<{ GROUP / 2 }, 1>(x, w, out),
            }
        }
    }
}

/// Adds the products of a level, whose sums of quants are there.
///
/// # Safety
/// As [`slices`]; there is such a level, and its products are begun.
#[inline(always)]
unsafe fn close<S: Dots, Q: Quantized, const R: usize>(
    w: Weights,
    x: Inputs,
    level: usize,
    sums: &mut QuantSums<R>,
    acc: &mut [S::F; R],
) {
    let n_groups = GROUP / Q::GROUP_INPUTS;
    // SAFETY: the contract above.
    unsafe {
        let (at, x) = places::<Q, R>(w, x, level);
        for group in 0..n_groups {
            let (d, sums) = (at.set::<S, Q>(group), of_group(sums, group));
            // Of all inputs, or of a half.
            let part = if n_groups == 1 { 0 } else { 1 + group };
            for r in 0..R {
                let bias = match Q::BIAS_SHIFT {
                    Some(shift) => x.bias(part, r) >> shift,
                    None => 0,
                };
                let scale = S::mul(d, S::splat(x.scale(r)));
                acc[r] = S::fma(scale, S::load_i32(sums.add(r * LANES), bias), acc[r]);
            }
        }
        // Sets that are not scales are mins.
        if Q::N_SETS > n_groups {
            let m = at.set::<S, Q>(n_groups);
            for r in 0..R {
                acc[r] = S::fma(m, S::splat(x.scaled_sum(r)), acc[r]);
            }
        }
    }
}
