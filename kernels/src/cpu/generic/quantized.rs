//! Tiles of quantized weights. Layouts: `layout.rs` and `quantize.rs`; order of the sums: `tile.rs`.
#![allow(unsafe_code)]

use std::ops::Range;

use super::{
    super::simd::{LANES, Simd},
    quantize::QUANT_ROW_BYTES,
    tile::{Inputs, STEPS_PER_HEAD, Sums, Tile, Weights},
};
use crate::layout::GROUP;

/// How scales and mins are kept. A *set* is one number for each row of the tile.
pub(crate) trait Scales {
    /// Bytes of a set in a step.
    const STEP_BYTES: usize;
    /// Bytes for a set in each head.
    const HEAD_BYTES: usize;

    /// Set number `set` of `n_sets` of step `step`. `tail`: behind the step's quants.
    ///
    /// # Safety
    /// The CPU has `S`; they lie there.
    unsafe fn load<S: Simd>(head: *const u8, tail: *const u8, step: usize, set: usize, n_sets: usize) -> S::F;
}

/// f32, behind the quants.
pub(crate) struct ScaleF32;
/// f16, behind the quants.
pub(crate) struct ScaleF16;
/// Whole numbers of 8 bits times a factor (f32) for each 8 steps, all in the head.
pub(crate) struct Factored;

impl Scales for ScaleF32 {
    const STEP_BYTES: usize = 4 * LANES;
    const HEAD_BYTES: usize = 0;
    #[inline(always)]
    unsafe fn load<S: Simd>(_: *const u8, tail: *const u8, _: usize, set: usize, _: usize) -> S::F {
        // SAFETY: the trait's contract.
        unsafe { S::load(tail.cast::<f32>().add(set * LANES)) }
    }
}

impl Scales for ScaleF16 {
    const STEP_BYTES: usize = 2 * LANES;
    const HEAD_BYTES: usize = 0;
    #[inline(always)]
    unsafe fn load<S: Simd>(_: *const u8, tail: *const u8, _: usize, set: usize, _: usize) -> S::F {
        // SAFETY: the trait's contract.
        unsafe { S::load_f16(tail.cast::<u16>().add(set * LANES)) }
    }
}

impl Scales for Factored {
    const STEP_BYTES: usize = 0;
    const HEAD_BYTES: usize = (4 + STEPS_PER_HEAD) * LANES;
    #[inline(always)]
    unsafe fn load<S: Simd>(head: *const u8, _: *const u8, step: usize, set: usize, n_sets: usize) -> S::F {
        // SAFETY: the trait's contract.
        unsafe {
            let head = head.add(step / STEPS_PER_HEAD * n_sets * Self::HEAD_BYTES);
            let factor = S::load(head.cast::<f32>().add(set * LANES));
            let numbers = head.add(4 * n_sets * LANES).cast::<i8>();
            let number = S::load_i8(numbers.add((step % STEPS_PER_HEAD * n_sets + set) * LANES));
            // Exact: the loader has compared the products.
            S::mul(factor, number)
        }
    }
}

/// The activations of one step of a block of `R` rows: see `quantize.rs`.
#[derive(Clone, Copy)]
struct Step<const R: usize>(*const u8);

impl<const R: usize> Step<R> {
    /// # Safety (all)
    /// The step lies there; `r < R`.
    #[inline(always)]
    unsafe fn quants(self, r: usize) -> *const i8 {
        // SAFETY: the contract above.
        unsafe { self.0.add(r * GROUP).cast() }
    }
    #[inline(always)]
    unsafe fn scale(self, r: usize) -> f32 {
        // SAFETY: the contract above.
        unsafe { *self.0.add(R * GROUP).cast::<f32>().add(r) }
    }
    #[inline(always)]
    unsafe fn scaled_sum(self, r: usize) -> f32 {
        // SAFETY: the contract above.
        unsafe { *self.0.add(R * GROUP).cast::<f32>().add(R + r) }
    }
    /// -128 times the sum of all 32 (`part` 0), the first 16 (1) or the last 16 (2) quants.
    #[inline(always)]
    unsafe fn bias(self, part: usize, r: usize) -> i32 {
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

    /// Adds the products of a step. `w`: the step's quants; `set(i)`: set number `i`.
    ///
    /// # Safety
    /// The CPU has `S`; weights and activations lie there.
    unsafe fn step<S: Simd, const R: usize>(at: StepAt, x: *const u8, acc: &mut [S::F; R]);
}

/// Where a step of weights lies.
#[derive(Clone, Copy)]
pub(crate) struct StepAt {
    head: *const u8,
    quants: *const u8,
    step: usize,
}

impl StepAt {
    /// # Safety
    /// The CPU has `S`; the step is of layout `Q`.
    #[inline(always)]
    unsafe fn set<S: Simd, Q: Quantized>(self, set: usize) -> S::F {
        // SAFETY: the contract above.
        unsafe {
            let tail = self.quants.add(Q::QUANT_BYTES);
            Q::Scales::load::<S>(self.head, tail, self.step, set, Q::N_SETS)
        }
    }
}

impl<Q: Quantized> Tile for Q {
    const STEP_BYTES: usize = Q::QUANT_BYTES + Q::N_SETS * Q::Scales::STEP_BYTES;
    const HEAD_BYTES: usize = Q::N_SETS * Q::Scales::HEAD_BYTES;
    const X_BYTES: usize = QUANT_ROW_BYTES;

    #[inline(always)]
    unsafe fn sums<S: Simd, const R: usize, const T: usize>(
        w: Weights,
        x: Inputs,
        steps: Range<usize>,
        out: &mut Sums<R, T>,
    ) {
        // SAFETY: the trait's contract.
        unsafe {
            let mut acc = [[S::splat(0.0); R]; T];
            for step in steps {
                for level in step * x.n_levels..(step + 1) * x.n_levels {
                    let x = x.at.add(level * R * QUANT_ROW_BYTES);
                    for t in 0..T {
                        let (head, first) = w.parts::<Q>(t);
                        let quants = first.add(step * Self::STEP_BYTES);
                        Q::step::<S, R>(StepAt { head, quants, step }, x, &mut acc[t]);
                    }
                }
            }
            for t in 0..T {
                for r in 0..R {
                    S::store(out.0[t][r].as_mut_ptr(), acc[t][r]);
                }
            }
        }
    }
}

/// 4-bit weights with mins.
pub(crate) struct Q4<C>(std::marker::PhantomData<C>);

impl<C: Scales> Quantized for Q4<C> {
    const QUANT_BYTES: usize = 16 * LANES;
    const N_SETS: usize = 2;
    type Scales = C;

    #[inline(always)]
    unsafe fn step<S: Simd, const R: usize>(at: StepAt, x: *const u8, acc: &mut [S::F; R]) {
        let x = Step::<R>(x);
        // SAFETY: the trait's contract.
        unsafe {
            let mut sums = [S::i4_zero(); R];
            for chunk in 0..4 {
                let (low, high) = S::w4_load(at.quants.add(64 * chunk));
                for r in 0..R {
                    let x = x.quants(r).add(8 * chunk);
                    sums[r] = S::i4_dot(sums[r], low, x);
                    sums[r] = S::i4_dot(sums[r], high, x.add(4));
                }
            }
            let (d, m) = (at.set::<S, Self>(0), at.set::<S, Self>(1));
            for r in 0..R {
                let scale = S::mul(d, S::splat(x.scale(r)));
                acc[r] = S::fma(scale, S::i4_finish(sums[r]), acc[r]);
                acc[r] = S::fma(m, S::splat(x.scaled_sum(r)), acc[r]);
            }
        }
    }
}

/// 8-bit weights in groups of 32.
pub(crate) struct Q8<C, const MINS: bool>(std::marker::PhantomData<C>);

impl<C: Scales, const MINS: bool> Quantized for Q8<C, MINS> {
    const QUANT_BYTES: usize = 32 * LANES;
    const N_SETS: usize = if MINS { 2 } else { 1 };
    type Scales = C;

    #[inline(always)]
    unsafe fn step<S: Simd, const R: usize>(at: StepAt, x: *const u8, acc: &mut [S::F; R]) {
        let x = Step::<R>(x);
        // SAFETY: the trait's contract.
        unsafe {
            let sums = q8_sums::<S, R>(at, x, 0, 0..8);
            let d = at.set::<S, Self>(0);
            for r in 0..R {
                let scale = S::mul(d, S::splat(x.scale(r)));
                acc[r] = S::fma(scale, S::i8_finish(sums[r]), acc[r]);
            }
            if MINS {
                let m = at.set::<S, Self>(1);
                for r in 0..R {
                    acc[r] = S::fma(m, S::splat(x.scaled_sum(r)), acc[r]);
                }
            }
        }
    }
}

/// 8-bit weights in groups of 16.
pub(crate) struct Q8Half<C>(std::marker::PhantomData<C>);

impl<C: Scales> Quantized for Q8Half<C> {
    const QUANT_BYTES: usize = 32 * LANES;
    const N_SETS: usize = 2;
    type Scales = C;

    #[inline(always)]
    unsafe fn step<S: Simd, const R: usize>(at: StepAt, x: *const u8, acc: &mut [S::F; R]) {
        let x = Step::<R>(x);
        // SAFETY: the trait's contract.
        unsafe {
            for half in 0..2 {
                let sums = q8_sums::<S, R>(at, x, 1 + half, 4 * half..4 * half + 4);
                let d = at.set::<S, Self>(half);
                for r in 0..R {
                    let scale = S::mul(d, S::splat(x.scale(r)));
                    acc[r] = S::fma(scale, S::i8_finish(sums[r]), acc[r]);
                }
            }
        }
    }
}

/// 6-bit weights in groups of 16.
pub(crate) struct Q6Half<C>(std::marker::PhantomData<C>);

impl<C: Scales> Quantized for Q6Half<C> {
    const QUANT_BYTES: usize = 24 * LANES;
    const N_SETS: usize = 2;
    type Scales = C;

    #[inline(always)]
    unsafe fn step<S: Simd, const R: usize>(at: StepAt, x: *const u8, acc: &mut [S::F; R]) {
        let x = Step::<R>(x);
        // SAFETY: the trait's contract.
        unsafe {
            for half in 0..2 {
                let mut sums = [S::i6_start(0); R];
                for r in 0..R {
                    // Weights are stored + 32, not + 128; the bias is a multiple of 128.
                    sums[r] = S::i6_start(x.bias(1 + half, r) >> 2);
                }
                let high = S::w2_load(at.quants.add(16 * LANES + 64 * half));
                for pair in 0..2 {
                    let chunk = 2 * half + pair;
                    let (even, odd) = S::w4_load(at.quants.add(64 * chunk));
                    let (even, odd) = (S::w6(even, high, 2 * pair), S::w6(odd, high, 2 * pair + 1));
                    for r in 0..R {
                        let x = x.quants(r).add(8 * chunk);
                        sums[r] = S::i6_dot(sums[r], even, x);
                        sums[r] = S::i6_dot(sums[r], odd, x.add(4));
                    }
                }
                let d = at.set::<S, Self>(half);
                for r in 0..R {
                    let scale = S::mul(d, S::splat(x.scale(r)));
                    acc[r] = S::fma(scale, S::i8_finish(sums[r]), acc[r]);
                }
            }
        }
    }
}

/// Exact sums of the products of 8-bit quants over `chunks` of 4 inputs, whose biases are number `bias`.
///
/// # Safety
/// The CPU has `S`; weights and activations lie there.
#[inline(always)]
unsafe fn q8_sums<S: Simd, const R: usize>(at: StepAt, x: Step<R>, bias: usize, chunks: Range<usize>) -> [S::I8; R] {
    // SAFETY: the contract above.
    unsafe {
        let mut sums = [S::i8_start(0); R];
        for r in 0..R {
            sums[r] = S::i8_start(x.bias(bias, r));
        }
        for chunk in chunks {
            let w = S::w8_load(at.quants.add(64 * chunk));
            for r in 0..R {
                sums[r] = S::i8_dot(sums[r], w, x.quants(r).add(4 * chunk));
            }
        }
        sums
    }
}
