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

/// Sums of quants of a block in a step: of each group of inputs (there are 1 or 2), for each row, for each lane. They are written by the
/// unit alone: to set them to zero first would take a tenth of the time.
type Room<const R: usize> = MaybeUninit<Line<[[[i32; LANES]; R]; 2]>>;

/// Where such sums lie.
#[derive(Clone, Copy)]
pub(crate) struct QuantSums<const R: usize>(*const [[i32; LANES]; R]);

impl<const R: usize> QuantSums<R> {
    /// Those of a group for a row.
    ///
    /// # Safety
    /// There are such.
    #[inline(always)]
    pub unsafe fn of(self, group: usize, r: usize) -> *const i32 {
        // SAFETY: the contract above.
        unsafe { self.0.add(group).cast::<i32>().add(r * LANES) }
    }
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
    let mut ring = [const { Room::<R>::uninit() }; RING];
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
            let (at, x) = places::<Q, R>(w, x, level);
            Q::close::<S, R>(at, x, QuantSums(ring[level % RING].as_ptr().cast()), &mut acc);
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
unsafe fn begin<S: Dots, Q: Quantized, const R: usize>(w: Weights, x: Inputs, level: usize, out: &mut Room<R>) {
    // SAFETY: the contract above.
    unsafe {
        let (at, x) = places::<Q, R>(w, x, level);
        for group in 0..GROUP / Q::GROUP_INPUTS {
            let first = group * Q::GROUP_INPUTS;
            let (x, w) = (x.quants(0).add(first), at.quants().add(LANES * first));
            let out = out.as_mut_ptr().cast::<i32>().add(group * R * LANES);
            match (Q::GROUP_INPUTS, level % 2) {
                (GROUP, 0) => S::Matrix::multiply::<GROUP, 0>(x, w, out),
                (GROUP, _) => S::Matrix::multiply::<GROUP, 1>(x, w, out),
                (_, 0) => S::Matrix::multiply::<{ GROUP / 2 }, 0>(x, w, out),
                (..) => S::Matrix::multiply::<{ GROUP / 2 }, 1>(x, w, out),
            }
        }
    }
}
