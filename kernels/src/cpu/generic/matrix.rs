//! Tiles of quantized weights times blocks of rows on a matrix unit: it makes the sums of quants, vectors do what closes a group.
//!
//! The unit's results come through memory and take more than a hundred cycles, so the products of later levels are begun before
//! those of a level are closed.
#![allow(unsafe_code)]

use std::{mem::MaybeUninit, ops::Range};

use super::{
    super::{
        matrix::MatrixUnit,
        simd::{Dots, LANES, Line},
    },
    quantized::{Quantized, Step, StepAt},
    tile::{FixedSums, Inputs, Sums, Weights, narrow_slices, start},
};
use crate::layout::GROUP;

/// Room for the sums of so many levels: those being closed, those stored, and those begun.
const RING: usize = 4;

/// Sums of quants of a block in a level: of each group of inputs (there are 1 or 2), for each row, for each lane. The unit alone
/// writes them: clearing them first would be as many stores again.
type QuantSums<const R: usize> = MaybeUninit<Line<[[[i32; LANES]; R]; 2]>>;

/// Those of a group.
#[inline(always)]
fn of_group<const R: usize>(sums: &mut QuantSums<R>, group: usize) -> *mut i32 {
    debug_assert!(group < 2);
    sums.as_mut_ptr().cast::<i32>().wrapping_add(group * R * LANES)
}

/// A tile and a block of `R` rows on their way through the unit.
struct Pipeline<const R: usize> {
    w: Weights,
    x: Inputs,
    /// Behind the last level.
    end: usize,
    ring: [QuantSums<R>; RING],
}

impl<const R: usize> Pipeline<R> {
    /// Begins with level `first`.
    ///
    /// # Safety
    /// As [`sums`]; `first` is below `end`.
    #[inline(always)]
    unsafe fn start<S: Dots, Q: Quantized>(&mut self, first: usize) {
        // SAFETY: the contract above.
        unsafe {
            begin::<S, Q, R>(self.w, self.x, first, &mut self.ring[first % RING]);
            finish::<S, Q, R>(first, &mut self.ring[first % RING]);
            if first + 1 < self.end {
                begin::<S, Q, R>(self.w, self.x, first + 1, &mut self.ring[(first + 1) % RING]);
            }
        }
    }

    /// Adds the products of some levels to `acc`, and begins those of the next two.
    ///
    /// # Safety
    /// As [`sums`]; there are such levels, and they follow those before or what was started.
    #[inline(always)]
    unsafe fn add<S: Dots, Q: Quantized>(&mut self, levels: Range<usize>, acc: &mut [S::F; R]) {
        let (w, x) = (self.w, self.x);
        for level in levels {
            // SAFETY: the contract above.
            unsafe {
                // What waits for products comes before what begins the next ones, with other work between that and its own wait.
                if level + 1 < self.end {
                    finish::<S, Q, R>(level + 1, &mut self.ring[(level + 1) % RING]);
                }
                if level + 2 < self.end {
                    begin::<S, Q, R>(w, x, level + 2, &mut self.ring[(level + 2) % RING]);
                }
                w.ahead.fetch::<S>(level, 0);
                close::<S, Q, R>(w, x, level, &mut self.ring[level % RING], acc);
            }
        }
    }
}

/// [`Tile::sums`](super::tile::Tile::sums) of one tile for a block of `R` rows.
///
/// # Safety
/// The CPU has `S`, whose matrix unit is started and takes `R` rows; `w` and `x` hold the steps; `Q`'s quants are bytes.
#[inline(always)]
pub(crate) unsafe fn sums<S: Dots, Q: Quantized, const R: usize, const T: usize>(
    w: Weights,
    x: Inputs,
    steps: Range<usize>,
    goes_on: bool,
    out: &mut Sums<R, T>,
) {
    let levels = steps.start * x.n_levels..steps.end * x.n_levels;
    let mut pipeline = Pipeline { w, x, end: levels.end, ring: [const { QuantSums::<R>::uninit() }; RING] };
    // SAFETY: the contract above; levels lie one after another.
    unsafe {
        let mut acc = start::<S, R, T>(goes_on, out)[0];
        if !levels.is_empty() {
            pipeline.start::<S, Q>(levels.start);
            pipeline.add::<S, Q>(levels, &mut acc);
        }
        for r in 0..R {
            S::store(out.0[0][r].as_mut_ptr(), acc[r]);
        }
    }
}

/// [`fixed_slices`](super::tile::fixed_slices) of one tile for a block of `R` rows.
///
/// # Safety
/// As [`sums`], for all steps; a slice has at least one.
#[inline(always)]
pub(crate) unsafe fn fixed<S: Dots, Q: Quantized, const R: usize, const T: usize>(
    w: Weights,
    x: Inputs,
    steps_per_slice: usize,
    out: &mut FixedSums<R, T>,
) {
    let end = w.n_steps * x.n_levels;
    let mut pipeline = Pipeline { w, x, end, ring: [const { QuantSums::<R>::uninit() }; RING] };
    let mut sum = |steps: Range<usize>, is_start: bool, slice: &mut Sums<R, T>| {
        let levels = steps.start * x.n_levels..steps.end * x.n_levels;
        // SAFETY: the contract above.
        unsafe {
            let mut acc = [S::splat(0.0); R];
            if is_start {
                pipeline.start::<S, Q>(levels.start);
            }
            pipeline.add::<S, Q>(levels, &mut acc);
            for r in 0..R {
                S::store(slice.0[0][r].as_mut_ptr(), acc[r]);
            }
        }
    };
    // SAFETY: the contract above.
    unsafe { narrow_slices::<S, R, T>(w.n_steps, steps_per_slice, &mut sum, out) }
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

/// Begins the products of a level. Those of two groups take both sets of the unit's sums, so that they are stored at once.
///
/// # Safety
/// As [`sums`]; there is such a level.
#[inline(always)]
unsafe fn begin<S: Dots, Q: Quantized, const R: usize>(w: Weights, x: Inputs, level: usize, out: &mut QuantSums<R>) {
    // SAFETY: the contract above.
    unsafe {
        let (at, x) = places::<Q, R>(w, x, level);
        let (x, w) = (x.quants(0), at.quants());
        if Q::GROUP_INPUTS == GROUP {
            match level % 2 {
                0 => S::Matrix::multiply::<GROUP, 0>(x, w),
                _ => S::Matrix::multiply::<GROUP, 1>(x, w),
            }
        } else {
            const HALF: usize = GROUP / 2;
            S::Matrix::multiply::<HALF, 0>(x, w);
            S::Matrix::multiply::<HALF, 1>(x.add(HALF), w.add(LANES * HALF));
            S::Matrix::store::<0>(of_group(out, 0));
            S::Matrix::store::<1>(of_group(out, 1));
        }
    }
}

/// Stores the sums of quants of a level, unless that is done.
///
/// # Safety
/// As [`sums`]; the products of this level are begun.
#[inline(always)]
unsafe fn finish<S: Dots, Q: Quantized, const R: usize>(level: usize, out: &mut QuantSums<R>) {
    if Q::GROUP_INPUTS == GROUP {
        // SAFETY: the contract above.
        unsafe {
            match level % 2 {
                0 => S::Matrix::store::<0>(of_group(out, 0)),
                _ => S::Matrix::store::<1>(of_group(out, 0)),
            }
        }
    }
}

/// Adds the products of a level, whose sums of quants are stored.
///
/// # Safety
/// As [`sums`].
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
                S::add_product(&mut acc[r], scale, S::load_i32(sums.add(r * LANES), bias));
            }
        }
        // Sets that are not scales are mins.
        if Q::N_SETS > n_groups {
            let m = at.set::<S, Q>(n_groups);
            for r in 0..R {
                S::add_product(&mut acc[r], m, S::splat(x.scaled_sum(r)));
            }
        }
    }
}
