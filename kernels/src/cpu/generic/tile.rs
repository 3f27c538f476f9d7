//! A tile of weights times a block of activation rows, for every layout of weights.
//!
//! Order of the sums, for every output: from 0, input after input.
//! - dense: `acc = fma(w, x, acc)` for each input;
//! - quantized: for each group of weights `acc = fma(d_w * d_x, isum as f32, acc)`, where isum is the exact sum of the
//!   products of quants; then, if there are mins, `acc = fma(m_w, s_x, acc)`.
#![allow(unsafe_code)]

use super::{
    super::simd::{LANES, Line, Simd},
    quantize::QUANT_ROW_BYTES,
};
use crate::layout::GROUP;

/// Sums of `T` tiles for `R` rows.
pub(crate) type Sums<const R: usize, const T: usize> = Line<[[[f32; LANES]; R]; T]>;

/// A layout of weights.
pub(crate) trait Tile {
    /// Bytes of the weights in a step.
    const STEP_BYTES: usize;
    /// Bytes of one row's activations in a step.
    const X_BYTES: usize;

    /// Sums over `n_steps` steps of `T` tiles, `tile_bytes` apart, for a block of `R` rows.
    ///
    /// # Safety
    /// The CPU has `S`; `w` is valid for `n_steps` steps of `T` tiles, `x` for `n_steps` steps of `R` rows.
    unsafe fn sums<S: Simd, const R: usize, const T: usize>(
        w: *const u8,
        tile_bytes: usize,
        x: *const u8,
        n_steps: usize,
        out: &mut Sums<R, T>,
    );
}

/// A dense type of weights.
pub(crate) trait Element {
    const BYTES: usize;

    /// 16 elements as f32.
    ///
    /// # Safety
    /// The CPU has `S`; `p` is valid for 16 elements.
    unsafe fn load<S: Simd>(p: *const u8) -> S::F;
}

pub(crate) struct F32;
pub(crate) struct F16;
pub(crate) struct Bf16;

impl Element for F32 {
    const BYTES: usize = 4;
    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const u8) -> S::F {
        // SAFETY: the trait's contract.
        unsafe { S::load(p.cast()) }
    }
}
impl Element for F16 {
    const BYTES: usize = 2;
    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const u8) -> S::F {
        // SAFETY: the trait's contract.
        unsafe { S::load_f16(p.cast()) }
    }
}
impl Element for Bf16 {
    const BYTES: usize = 2;
    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const u8) -> S::F {
        // SAFETY: the trait's contract.
        unsafe { S::load_bf16(p.cast()) }
    }
}

/// Dense weights.
pub(crate) struct Dense<E>(std::marker::PhantomData<E>);

impl<E: Element> Tile for Dense<E> {
    const STEP_BYTES: usize = E::BYTES * LANES;
    const X_BYTES: usize = 4;

    #[inline(always)]
    unsafe fn sums<S: Simd, const R: usize, const T: usize>(
        w: *const u8,
        tile_bytes: usize,
        x: *const u8,
        n_steps: usize,
        out: &mut Sums<R, T>,
    ) {
        // SAFETY: the trait's contract; steps lie one after another in both.
        unsafe {
            let mut acc = [[S::splat(0.0); R]; T];
            let x = x.cast::<f32>();
            for k in 0..n_steps {
                for t in 0..T {
                    let p = w.add(t * tile_bytes + k * Self::STEP_BYTES);
                    if R == 1 {
                        S::prefetch(p.wrapping_add(2048));
                    }
                    let w = E::load::<S>(p);
                    for r in 0..R {
                        acc[t][r] = S::fma(w, S::splat(*x.add(k * R + r)), acc[t][r]);
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

/// Scales number `index` (of 16 each) of the lanes of `part`.
///
/// # Safety
/// The CPU has `S`; they lie at `p`.
#[inline(always)]
unsafe fn scales<S: Simd, const H: bool>(p: *const u8, index: usize, part: usize) -> S::H {
    let at = index * LANES + part * (LANES / S::PARTS);
    // SAFETY: the contract above.
    unsafe { if H { S::h_load_f16(p.cast::<u16>().add(at)) } else { S::h_load(p.cast::<f32>().add(at)) } }
}

const fn scale_bytes(f16: bool) -> usize {
    if f16 { 2 * LANES } else { 4 * LANES }
}

/// 4-bit weights with mins. `H`: scales and mins are f16.
pub(crate) struct Q4<const H: bool>;

impl<const H: bool> Tile for Q4<H> {
    const STEP_BYTES: usize = 16 * LANES + 2 * scale_bytes(H);
    const X_BYTES: usize = QUANT_ROW_BYTES;

    #[inline(always)]
    unsafe fn sums<S: Simd, const R: usize, const T: usize>(
        w: *const u8,
        tile_bytes: usize,
        x: *const u8,
        n_steps: usize,
        out: &mut Sums<R, T>,
    ) {
        // SAFETY: the trait's contract; the layouts are those of `layout.rs` and `quantize.rs`.
        unsafe {
            for part in 0..S::PARTS {
                let mut acc = [[S::h_zero(); R]; T];
                for step in 0..n_steps {
                    let x = Step::<R>(x.add(step * R * QUANT_ROW_BYTES));
                    for t in 0..T {
                        let w = w.add(t * tile_bytes + step * Self::STEP_BYTES);
                        let mut sums = [S::i4_zero(); R];
                        for chunk in 0..4 {
                            let p = w.add(64 * chunk + 64 / S::PARTS * part);
                            let (low, high) = S::w4_load(p);
                            for r in 0..R {
                                let x = x.quants(r).add(8 * chunk);
                                sums[r] = S::i4_dot(sums[r], low, x);
                                sums[r] = S::i4_dot(sums[r], high, x.add(4));
                            }
                        }
                        let d = scales::<S, H>(w.add(16 * LANES), 0, part);
                        let m = scales::<S, H>(w.add(16 * LANES), 1, part);
                        for r in 0..R {
                            let scale = S::h_mul(d, S::h_splat(x.scale(r)));
                            acc[t][r] = S::h_fma(scale, S::i4_finish(sums[r]), acc[t][r]);
                            acc[t][r] = S::h_fma(m, S::h_splat(x.scaled_sum(r)), acc[t][r]);
                        }
                    }
                }
                store_part::<S, R, T>(part, &acc, out);
            }
        }
    }
}

/// 8-bit weights in groups of 32. `H`: scales and mins are f16.
pub(crate) struct Q8<const H: bool, const MINS: bool>;

impl<const H: bool, const MINS: bool> Tile for Q8<H, MINS> {
    const STEP_BYTES: usize = 32 * LANES + if MINS { 2 } else { 1 } * scale_bytes(H);
    const X_BYTES: usize = QUANT_ROW_BYTES;

    #[inline(always)]
    unsafe fn sums<S: Simd, const R: usize, const T: usize>(
        w: *const u8,
        tile_bytes: usize,
        x: *const u8,
        n_steps: usize,
        out: &mut Sums<R, T>,
    ) {
        // SAFETY: the trait's contract; the layouts are those of `layout.rs` and `quantize.rs`.
        unsafe {
            for part in 0..S::PARTS {
                let mut acc = [[S::h_zero(); R]; T];
                for step in 0..n_steps {
                    let x = Step::<R>(x.add(step * R * QUANT_ROW_BYTES));
                    for t in 0..T {
                        let w = w.add(t * tile_bytes + step * Self::STEP_BYTES);
                        let sums = q8_sums::<S, R>(w, x, part, 0, 0..8);
                        let d = scales::<S, H>(w.add(32 * LANES), 0, part);
                        for r in 0..R {
                            let scale = S::h_mul(d, S::h_splat(x.scale(r)));
                            acc[t][r] = S::h_fma(scale, S::i8_finish(sums[r]), acc[t][r]);
                        }
                        if MINS {
                            let m = scales::<S, H>(w.add(32 * LANES), 1, part);
                            for r in 0..R {
                                acc[t][r] = S::h_fma(m, S::h_splat(x.scaled_sum(r)), acc[t][r]);
                            }
                        }
                    }
                }
                store_part::<S, R, T>(part, &acc, out);
            }
        }
    }
}

/// 8-bit weights in groups of 16. `H`: scales are f16.
pub(crate) struct Q8Half<const H: bool>;

impl<const H: bool> Tile for Q8Half<H> {
    const STEP_BYTES: usize = 32 * LANES + 2 * scale_bytes(H);
    const X_BYTES: usize = QUANT_ROW_BYTES;

    #[inline(always)]
    unsafe fn sums<S: Simd, const R: usize, const T: usize>(
        w: *const u8,
        tile_bytes: usize,
        x: *const u8,
        n_steps: usize,
        out: &mut Sums<R, T>,
    ) {
        // SAFETY: the trait's contract; the layouts are those of `layout.rs` and `quantize.rs`.
        unsafe {
            for part in 0..S::PARTS {
                let mut acc = [[S::h_zero(); R]; T];
                for step in 0..n_steps {
                    let x = Step::<R>(x.add(step * R * QUANT_ROW_BYTES));
                    for t in 0..T {
                        let w = w.add(t * tile_bytes + step * Self::STEP_BYTES);
                        for half in 0..2 {
                            let sums = q8_sums::<S, R>(w, x, part, 1 + half, 4 * half..4 * half + 4);
                            let d = scales::<S, H>(w.add(32 * LANES), half, part);
                            for r in 0..R {
                                let scale = S::h_mul(d, S::h_splat(x.scale(r)));
                                acc[t][r] = S::h_fma(scale, S::i8_finish(sums[r]), acc[t][r]);
                            }
                        }
                    }
                }
                store_part::<S, R, T>(part, &acc, out);
            }
        }
    }
}

/// Exact sums of the products of quants over `chunks` of 4 inputs, whose biases are number `bias`.
///
/// # Safety
/// The CPU has `S`; `w` is valid for a step.
#[inline(always)]
unsafe fn q8_sums<S: Simd, const R: usize>(
    w: *const u8,
    x: Step<R>,
    part: usize,
    bias: usize,
    chunks: std::ops::Range<usize>,
) -> [S::I8; R] {
    // SAFETY: the contract above.
    unsafe {
        let mut sums = [S::i8_start(0); R];
        for r in 0..R {
            sums[r] = S::i8_start(x.bias(bias, r));
        }
        for chunk in chunks {
            let w = S::w8_load(w.add(64 * chunk + 64 / S::PARTS * part));
            for r in 0..R {
                sums[r] = S::i8_dot(sums[r], w, x.quants(r).add(4 * chunk));
            }
        }
        sums
    }
}

/// # Safety
/// The CPU has `S`.
#[inline(always)]
unsafe fn store_part<S: Simd, const R: usize, const T: usize>(part: usize, acc: &[[S::H; R]; T], out: &mut Sums<R, T>) {
    for t in 0..T {
        for r in 0..R {
            // SAFETY: `part < PARTS`, so the part lies within the 16 lanes.
            unsafe { S::h_store(out.0[t][r].as_mut_ptr().add(part * (LANES / S::PARTS)), acc[t][r]) };
        }
    }
}
