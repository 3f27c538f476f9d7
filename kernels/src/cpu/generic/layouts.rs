//! The layouts of quantized weights: see `layout.rs`.
#![allow(unsafe_code)]

use super::{
    super::simd::{Dots, LANES},
    packed::{Bits4, Bits6, Bytes, Quants, ScaleF32, Scales},
    quantized::{Quantized, Step, StepAt},
    tile::Tile,
};
use crate::layout::GROUP;

/// 4-bit weights with mins.
pub(crate) struct Q4<C, N = Bits4>(std::marker::PhantomData<(C, N)>);

impl<C: Scales, N: Quants> Quantized for Q4<C, N> {
    const QUANT_BYTES: usize = N::BYTES;
    const N_SETS: usize = 2;
    type Scales = C;
    const UNPACKS: bool = !N::IS_BYTES;
    type Unpacked = Q4<ScaleF32, Bytes>;
    const IS_BYTES: bool = N::IS_BYTES;

    #[inline(always)]
    unsafe fn unpack<S: Dots>(at: StepAt, out: *mut u8) {
        // SAFETY: the trait's contract.
        unsafe { unpack_step::<S, Self, N>(at, out) }
    }

    #[inline(always)]
    unsafe fn step<S: Dots, const R: usize>(at: StepAt, x: Step<R>, acc: &mut [S::F; R]) {
        // SAFETY: the trait's contract.
        unsafe {
            let mut sums = q4_start::<S, N, R>(at, x);
            q4_chunk::<S, N, R>(at, x, 1, &mut sums);
            q4_chunk::<S, N, R>(at, x, 2, &mut sums);
            q4_chunk::<S, N, R>(at, x, 3, &mut sums);
            let (d, m) = (at.set::<S, Self>(0), at.set::<S, Self>(1));
            for r in 0..R {
                let scale = S::mul(d, S::splat(x.scale(r)));
                acc[r] = S::fma(scale, S::i4_finish(sums[r]), acc[r]);
                acc[r] = S::fma(m, S::splat(x.scaled_sum(r)), acc[r]);
            }
        }
    }
}

/// The products of the first 8 inputs.
///
/// # Safety
/// The CPU has `S`; weights and activations lie there.
#[inline(always)]
unsafe fn q4_start<S: Dots, N: Quants, const R: usize>(at: StepAt, x: Step<R>) -> [S::I4; R] {
    // SAFETY: the contract above.
    unsafe {
        let (low, high) = N::load::<S>(at.quants(), 0);
        let mut sums = [S::i4_start(low, x.quants(0)); R];
        for r in 0..R {
            if r > 0 {
                sums[r] = S::i4_start(low, x.quants(r));
            }
            sums[r] = S::i4_dot(sums[r], high, x.quants(r).add(4));
        }
        sums
    }
}

/// Adds the products of 8 inputs. (Such functions are called once for each chunk, for the compiler does not unroll a loop.)
///
/// # Safety
/// The CPU has `S`; weights and activations lie there.
#[inline(always)]
unsafe fn q4_chunk<S: Dots, N: Quants, const R: usize>(at: StepAt, x: Step<R>, chunk: usize, sums: &mut [S::I4; R]) {
    // SAFETY: the contract above.
    unsafe {
        let (low, high) = N::load::<S>(at.quants(), chunk);
        for r in 0..R {
            let x = x.quants(r).add(8 * chunk);
            sums[r] = S::i4_dot(sums[r], low, x);
            sums[r] = S::i4_dot(sums[r], high, x.add(4));
        }
    }
}

/// 8-bit weights in groups of 32.
pub(crate) struct Q8<C, const MINS: bool>(std::marker::PhantomData<C>);

impl<C: Scales, const MINS: bool> Quantized for Q8<C, MINS> {
    const QUANT_BYTES: usize = 32 * LANES;
    const N_SETS: usize = if MINS { 2 } else { 1 };
    type Scales = C;
    type Unpacked = Self;
    const IS_BYTES: bool = true;
    const BIAS_SHIFT: Option<u32> = Q8_BIAS_SHIFT;

    #[inline(always)]
    unsafe fn step<S: Dots, const R: usize>(at: StepAt, x: Step<R>, acc: &mut [S::F; R]) {
        // SAFETY: the trait's contract.
        unsafe {
            let mut sums = q8_start::<S, R>(x, 0);
            q8_chunk::<S, R>(at, x, 0, &mut sums);
            q8_chunk::<S, R>(at, x, 1, &mut sums);
            q8_chunk::<S, R>(at, x, 2, &mut sums);
            q8_chunk::<S, R>(at, x, 3, &mut sums);
            add_scaled::<S, R>(at.set::<S, Self>(0), x, sums, acc);
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
    type Unpacked = Self;
    const IS_BYTES: bool = true;
    const BIAS_SHIFT: Option<u32> = Q8_BIAS_SHIFT;
    const GROUP_INPUTS: usize = GROUP / 2;

    #[inline(always)]
    unsafe fn step<S: Dots, const R: usize>(at: StepAt, x: Step<R>, acc: &mut [S::F; R]) {
        // SAFETY: the trait's contract.
        unsafe {
            q8_half::<S, Self, R>(at, x, 0, acc);
            q8_half::<S, Self, R>(at, x, 1, acc);
        }
    }
}

/// Adds the products of one group of 16 inputs.
///
/// # Safety
/// The CPU has `S`; weights and activations lie there.
#[inline(always)]
unsafe fn q8_half<S: Dots, Q: Quantized, const R: usize>(at: StepAt, x: Step<R>, half: usize, acc: &mut [S::F; R]) {
    // SAFETY: the contract above.
    unsafe {
        let mut sums = q8_start::<S, R>(x, 1 + half);
        q8_chunk::<S, R>(at, x, 2 * half, &mut sums);
        q8_chunk::<S, R>(at, x, 2 * half + 1, &mut sums);
        add_scaled::<S, R>(at.set::<S, Q>(half), x, sums, acc);
    }
}

/// 6-bit weights in groups of 32.
pub(crate) struct Q6<C, N = Bits6>(std::marker::PhantomData<(C, N)>);

impl<C: Scales, N: Quants> Quantized for Q6<C, N> {
    const QUANT_BYTES: usize = N::BYTES;
    const N_SETS: usize = 1;
    type Scales = C;
    const UNPACKS: bool = !N::IS_BYTES;
    type Unpacked = Q6<ScaleF32, Bytes>;
    const IS_BYTES: bool = N::IS_BYTES;
    const BIAS_SHIFT: Option<u32> = Q6_BIAS_SHIFT;

    #[inline(always)]
    unsafe fn unpack<S: Dots>(at: StepAt, out: *mut u8) {
        // SAFETY: the trait's contract.
        unsafe { unpack_step::<S, Self, N>(at, out) }
    }

    #[inline(always)]
    unsafe fn step<S: Dots, const R: usize>(at: StepAt, x: Step<R>, acc: &mut [S::F; R]) {
        // SAFETY: the trait's contract.
        unsafe {
            let mut sums = q6_start::<S, R>(x, 0);
            q6_chunk::<S, N, R>(at, x, 0, &mut sums);
            q6_chunk::<S, N, R>(at, x, 1, &mut sums);
            q6_chunk::<S, N, R>(at, x, 2, &mut sums);
            q6_chunk::<S, N, R>(at, x, 3, &mut sums);
            add_scaled::<S, R>(at.set::<S, Self>(0), x, sums, acc);
        }
    }
}

/// 6-bit weights in groups of 16.
pub(crate) struct Q6Half<C, N = Bits6>(std::marker::PhantomData<(C, N)>);

impl<C: Scales, N: Quants> Quantized for Q6Half<C, N> {
    const QUANT_BYTES: usize = N::BYTES;
    const N_SETS: usize = 2;
    type Scales = C;
    const UNPACKS: bool = !N::IS_BYTES;
    type Unpacked = Q6Half<ScaleF32, Bytes>;
    const IS_BYTES: bool = N::IS_BYTES;
    const BIAS_SHIFT: Option<u32> = Q6_BIAS_SHIFT;
    const GROUP_INPUTS: usize = GROUP / 2;

    #[inline(always)]
    unsafe fn unpack<S: Dots>(at: StepAt, out: *mut u8) {
        // SAFETY: the trait's contract.
        unsafe { unpack_step::<S, Self, N>(at, out) }
    }

    #[inline(always)]
    unsafe fn step<S: Dots, const R: usize>(at: StepAt, x: Step<R>, acc: &mut [S::F; R]) {
        // SAFETY: the trait's contract.
        unsafe {
            q6_half::<S, Self, N, R>(at, x, 0, acc);
            q6_half::<S, Self, N, R>(at, x, 1, acc);
        }
    }
}

/// Adds the products of one group of 16 inputs.
///
/// # Safety
/// The CPU has `S`; weights and activations lie there.
#[inline(always)]
unsafe fn q6_half<S: Dots, Q: Quantized, N: Quants, const R: usize>(
    at: StepAt,
    x: Step<R>,
    half: usize,
    acc: &mut [S::F; R],
) {
    // SAFETY: the contract above.
    unsafe {
        let mut sums = q6_start::<S, R>(x, 1 + half);
        q6_chunk::<S, N, R>(at, x, 2 * half, &mut sums);
        q6_chunk::<S, N, R>(at, x, 2 * half + 1, &mut sums);
        add_scaled::<S, R>(at.set::<S, Q>(half), x, sums, acc);
    }
}

/// Adds the products of 8 inputs.
///
/// # Safety
/// The CPU has `S`; weights and activations lie there.
#[inline(always)]
unsafe fn q6_chunk<S: Dots, N: Quants, const R: usize>(at: StepAt, x: Step<R>, chunk: usize, sums: &mut [S::I8; R]) {
    // SAFETY: the contract above.
    unsafe {
        let weights = N::load::<S>(at.quants(), chunk);
        for r in 0..R {
            sums[r] = S::i6_dot(sums[r], weights, x.quants(r).add(8 * chunk));
        }
    }
}

/// Bytes of an unpacked step: a byte for each quant, and two sets of f32.
pub(crate) const UNPACKED_STEP_BYTES: usize = Bytes::BYTES + 2 * 4 * LANES;
const _: () = assert!(<Q4<ScaleF32, Bytes> as Tile>::STEP_BYTES == UNPACKED_STEP_BYTES);
const _: () = assert!(<Q6Half<ScaleF32, Bytes> as Tile>::STEP_BYTES == UNPACKED_STEP_BYTES);

/// Unpacks a step: a byte for each quant, then the sets as f32.
///
/// # Safety
/// The CPU has `S`; the step lies there, and there is room for an unpacked one.
#[inline(always)]
unsafe fn unpack_step<S: Dots, Q: Quantized, N: Quants>(at: StepAt, out: *mut u8) {
    // SAFETY: the contract above.
    unsafe {
        for chunk in 0..4 {
            let (first, second) = N::load::<S>(at.quants(), chunk);
            S::w4_store(out.add(128 * chunk), first);
            S::w4_store(out.add(128 * chunk + 64), second);
        }
        for set in 0..Q::N_SETS {
            S::store(out.add(Bytes::BYTES).cast::<f32>().add(set * LANES), at.set::<S, Q>(set));
        }
    }
}

/// Biases are those of weights that are stored + 128.
const Q8_BIAS_SHIFT: Option<u32> = Some(0);
/// Weights of 6 bits are stored + 32; the biases are multiples of 128.
const SHIFT_OF_6_BITS: u32 = 2;
const Q6_BIAS_SHIFT: Option<u32> = Some(SHIFT_OF_6_BITS);

/// Adds the sums of a group whose weights have the scales `d`.
///
/// # Safety
/// The CPU has `S`; activations lie there.
#[inline(always)]
unsafe fn add_scaled<S: Dots, const R: usize>(d: S::F, x: Step<R>, sums: [S::I8; R], acc: &mut [S::F; R]) {
    // SAFETY: the contract above.
    unsafe {
        for r in 0..R {
            let scale = S::mul(d, S::splat(x.scale(r)));
            acc[r] = S::fma(scale, S::i8_finish(sums[r]), acc[r]);
        }
    }
}

/// Sums of 6-bit weights to start with, whose biases are number `bias`.
///
/// # Safety
/// The CPU has `S`; activations lie there.
#[inline(always)]
unsafe fn q6_start<S: Dots, const R: usize>(x: Step<R>, bias: usize) -> [S::I8; R] {
    // SAFETY: the contract above.
    unsafe {
        let mut sums = [S::i6_start(0); R];
        for r in 0..R {
            sums[r] = S::i6_start(x.bias(bias, r) >> SHIFT_OF_6_BITS);
        }
        sums
    }
}

/// Sums to start with, whose biases are number `bias`.
///
/// # Safety
/// The CPU has `S`; activations lie there.
#[inline(always)]
unsafe fn q8_start<S: Dots, const R: usize>(x: Step<R>, bias: usize) -> [S::I8; R] {
    // SAFETY: the contract above.
    unsafe {
        let mut sums = [S::i8_start(0); R];
        for r in 0..R {
            sums[r] = S::i8_start(x.bias(bias, r));
        }
        sums
    }
}

/// Adds the products of 8 inputs.
///
/// # Safety
/// The CPU has `S`; weights and activations lie there.
#[inline(always)]
unsafe fn q8_chunk<S: Dots, const R: usize>(at: StepAt, x: Step<R>, chunk: usize, sums: &mut [S::I8; R]) {
    // SAFETY: the contract above.
    unsafe {
        for part in 2 * chunk..2 * chunk + 2 {
            let w = S::w8_load(at.quants().add(64 * part));
            for r in 0..R {
                sums[r] = S::i8_dot(sums[r], w, x.quants(r).add(4 * part));
            }
        }
    }
}
