//! How quants, scales and mins lie in a tile of quantized weights: see `layout.rs`.
#![allow(unsafe_code)]

use super::{
    super::simd::{Dots, LANES},
    tile::STEPS_PER_HEAD,
};

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
    unsafe fn load<S: Dots>(head: *const u8, tail: *const u8, step: usize, set: usize, n_sets: usize) -> S::F;
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
    unsafe fn load<S: Dots>(_: *const u8, tail: *const u8, _: usize, set: usize, _: usize) -> S::F {
        // SAFETY: the trait's contract.
        unsafe { S::load(tail.cast::<f32>().add(set * LANES)) }
    }
}

impl Scales for ScaleF16 {
    const STEP_BYTES: usize = 2 * LANES;
    const HEAD_BYTES: usize = 0;
    #[inline(always)]
    unsafe fn load<S: Dots>(_: *const u8, tail: *const u8, _: usize, set: usize, _: usize) -> S::F {
        // SAFETY: the trait's contract.
        unsafe { S::load_f16(tail.cast::<u16>().add(set * LANES)) }
    }
}

impl Scales for Factored {
    const STEP_BYTES: usize = 0;
    const HEAD_BYTES: usize = (4 + STEPS_PER_HEAD) * LANES;
    #[inline(always)]
    unsafe fn load<S: Dots>(head: *const u8, _: *const u8, step: usize, set: usize, n_sets: usize) -> S::F {
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

/// How quants of up to 6 bits are kept. A *chunk* is 8 inputs of each row of the tile.
pub(crate) trait Quants {
    /// Bytes of the quants of a step.
    const BYTES: usize;
    /// Whether each quant is a byte.
    const IS_BYTES: bool = false;

    /// The first 4 inputs of chunk number `chunk` (0..4) of the quants at `quants`, and the other 4.
    ///
    /// # Safety
    /// The CPU has `S`; they lie there.
    unsafe fn load<S: Dots>(quants: *const u8, chunk: usize) -> (S::W4, S::W4);
}

/// 4 bits: see `layout.rs`.
pub(crate) struct Bits4;
/// 6 bits: see `layout.rs`.
pub(crate) struct Bits6;
/// A byte for each: unpacked.
pub(crate) struct Bytes;

impl Quants for Bits4 {
    const BYTES: usize = 16 * LANES;
    #[inline(always)]
    unsafe fn load<S: Dots>(quants: *const u8, chunk: usize) -> (S::W4, S::W4) {
        // SAFETY: the trait's contract.
        unsafe { S::w4_load(quants.add(64 * chunk)) }
    }
}

impl Quants for Bits6 {
    const BYTES: usize = 24 * LANES;
    #[inline(always)]
    unsafe fn load<S: Dots>(quants: *const u8, chunk: usize) -> (S::W4, S::W4) {
        // SAFETY: the trait's contract.
        unsafe {
            let (even, odd) = S::w4_load(quants.add(64 * chunk));
            let high = S::w2_load(quants.add(16 * LANES + chunk / 2 * 64));
            (S::w6(even, high, chunk % 2 * 2), S::w6(odd, high, chunk % 2 * 2 + 1))
        }
    }
}

impl Quants for Bytes {
    const BYTES: usize = 32 * LANES;
    const IS_BYTES: bool = true;
    #[inline(always)]
    unsafe fn load<S: Dots>(quants: *const u8, chunk: usize) -> (S::W4, S::W4) {
        // SAFETY: the trait's contract.
        unsafe { (S::w2_load(quants.add(128 * chunk)), S::w2_load(quants.add(128 * chunk + 64))) }
    }
}
