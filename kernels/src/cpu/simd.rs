//! The few vector instructions that the kernels are written in, once for every instruction set.
//!
//! A kernel is a generic function over [`Simd`]; a wrapper with `#[target_feature]` makes it machine code of one
//! instruction set (see `table.rs`). Every method here is exact or rounded once as IEEE 754 says, so that all instruction
//! sets compute the same bits. (A NaN stays a NaN, but which NaN is not promised.)
#![allow(unsafe_code)]

use super::{
    generic::quantize::{QuantGroup, quantize_group},
    matrix::MatrixUnit,
};
use crate::layout::GROUP;

/// Lanes of a vector, which is also the number of output rows in a tile of weights.
pub(crate) const LANES: usize = 16;

/// Fixed-point sums are clamped to this many units of 2^-24 either way before they are added: 2^51.
pub(crate) const FIXED_LIMIT: f32 = 2_251_799_813_685_248.0;

/// Numbers of less than [`NARROW_LIMIT`] that [`Simd::add_narrow`] may add: their sum is below 2^31 units of 2^-24.
pub(crate) const NARROW_TERMS: usize = 4;
/// See there.
pub(crate) const NARROW_LIMIT: f32 = 32.0;

/// An array on a cache-line boundary.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Line<T>(pub T);

/// Instructions of one instruction set.
///
/// # Safety
/// All methods: the CPU has the instruction set, and pointers are valid for what the method reads or writes. No alignment
/// is needed. `load*` read and `store*` write [`LANES`] elements.
pub(crate) trait Simd {
    /// 16 f32.
    type F: Copy;
    /// Queries for which attention reads a key or value once: 1 to 8.
    const QUERIES: usize;
    /// Sums that attention makes at once, for all its queries together.
    const ATTENTION_SUMS: usize;
    /// What [`Simd::add_fixed`] adds beside the number: sums begin with as many times less.
    const FIXED_EXCESS: i64;

    unsafe fn splat(v: f32) -> Self::F;
    unsafe fn load(p: *const f32) -> Self::F;
    unsafe fn load_f16(p: *const u16) -> Self::F;
    unsafe fn load_bf16(p: *const u16) -> Self::F;
    unsafe fn load_i8(p: *const i8) -> Self::F;
    /// `(p[i] + plus) as f32`; sums are below 2^22 either way.
    unsafe fn load_i32(p: *const i32, plus: i32) -> Self::F;
    unsafe fn store(p: *mut f32, v: Self::F);
    /// Rounded half to even.
    unsafe fn store_f16(p: *mut u16, v: Self::F);
    unsafe fn add(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn sub(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn div(a: Self::F, b: Self::F) -> Self::F;
    /// `a * b + c`, rounded once.
    unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// `*sum = fma(a, b, *sum)`, in the register where the sum is: of many sums in a loop compilers move some about otherwise.
    #[inline(always)]
    unsafe fn add_product(sum: &mut Self::F, a: Self::F, b: Self::F) {
        // SAFETY: the trait's contract.
        *sum = unsafe { Self::fma(a, b, *sum) };
    }
    /// `if a > b { a } else { b }`: `b` where either is NaN.
    unsafe fn max(a: Self::F, b: Self::F) -> Self::F;
    /// `if a < b { a } else { b }`: `b` where either is NaN.
    unsafe fn min(a: Self::F, b: Self::F) -> Self::F;
    /// `p * 2^n` for whole `n` in -150..=128, as `(p * 2^(n >> 1)) * 2^(n - (n >> 1))`.
    unsafe fn scale2(p: Self::F, n: Self::F) -> Self::F;
    /// `sums[i] += round_half_even(clamp(v[i] * 2^24, -2^51, 2^51)) + FIXED_EXCESS`, wrapping; NaN counts as -2^51.
    unsafe fn add_fixed(sums: *mut i64, v: Self::F);
    /// `sums[i] += round_half_even(v[i] * 2^24)`, where that is less than [`NARROW_LIMIT`], else anything. Returns `largest` or
    /// the magnitudes of `v`, whichever are larger; NaN is the largest.
    unsafe fn add_narrow(sums: *mut i32, v: Self::F, largest: Self::F) -> Self::F;
    /// Whether all of what [`Simd::add_narrow`] returned, having begun with zeros, is below [`NARROW_LIMIT`].
    unsafe fn is_narrow(largest: Self::F) -> bool;
    /// `sums[i] += narrow[i] + plus`, wrapping.
    unsafe fn add_widened(sums: *mut i64, narrow: *const i32, plus: i64);
    /// As [`quantize_group`], which it is where nothing better is known.
    #[inline(always)]
    unsafe fn quantize(x: &[f32; GROUP]) -> QuantGroup {
        quantize_group(x)
    }
    /// Hints that the cache line at `p` (any address) will be read.
    unsafe fn prefetch(p: *const u8);
}

/// Products of quants.
///
/// # Safety
/// As [`Simd`].
pub(crate) trait Dots: Simd {
    /// Activation rows in a block, the most for which a weight vector is unpacked once: 1, 2, 4, 8 or 16.
    const ROWS: usize;
    /// Blocks of rows from which on a task unpacks each tile once for all of them.
    const UNPACK_BLOCKS: usize;

    /// Multiplies blocks of `ROWS` rows, where there is such a unit.
    type Matrix: MatrixUnit;
    /// Sums of products with 4-bit weights.
    type I4: Copy;
    /// Sums of products with 8-bit weights.
    type I8: Copy;
    /// 4-bit weights, one per byte, 4 per lane.
    type W4: Copy;
    /// 8-bit weights, 4 per lane, prepared for products.
    type W8: Copy;

    /// Each lane's products of its 4 weights and the 4 activations (-127..=127) at `x`: a sum to start with.
    unsafe fn i4_start(w: Self::W4, x: *const i8) -> Self::I4;
    /// Splits 64 bytes into low and high nibbles.
    unsafe fn w4_load(p: *const u8) -> (Self::W4, Self::W4);
    /// Writes 64 bytes, which [`Dots::w2_load`] reads again.
    unsafe fn w4_store(p: *mut u8, w: Self::W4);
    /// Adds to each lane the products of its 4 weights and the 4 activations (-127..=127) at `x`; up to 7 times after the start.
    unsafe fn i4_dot(sum: Self::I4, w: Self::W4, x: *const i8) -> Self::I4;
    unsafe fn i4_finish(sum: Self::I4) -> Self::F;

    /// A sum to start with; `bias` is -128 times the sum of the activations to come.
    unsafe fn i8_start(bias: i32) -> Self::I8;
    /// Reads 64 weights, each stored as an unsigned byte: weight + 128.
    unsafe fn w8_load(p: *const u8) -> Self::W8;
    /// Adds to each lane the products of its 4 weights and the 4 activations (-127..=127) at `x`.
    unsafe fn i8_dot(sum: Self::I8, w: Self::W8, x: *const i8) -> Self::I8;
    unsafe fn i8_finish(sum: Self::I8) -> Self::F;

    /// Reads 64 bytes as they are: of 2-bit weights 4 per byte.
    unsafe fn w2_load(p: *const u8) -> Self::W4;
    /// 6-bit weights: 4 low bits, and as high bits number `i` (0..4) of each byte of `high`.
    unsafe fn w6(low: Self::W4, high: Self::W4, i: usize) -> Self::W4;
    /// A sum to start with: `bias`.
    unsafe fn i6_start(bias: i32) -> Self::I8;
    /// Adds to each lane the products of its 4 + 4 weights (0..=63) and the 8 activations (-127..=127) at `x`.
    unsafe fn i6_dot(sum: Self::I8, w: (Self::W4, Self::W4), x: *const i8) -> Self::I8;
}
