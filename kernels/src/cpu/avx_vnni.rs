//! AVX2 with AVX-VNNI: four products a lane in one instruction, in registers of 256 bits.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use super::{
    avx2::{Avx2, I, V, keep, load_bytes, nibbles, splat_4, splat_i32, store_bytes, to_floats, with_high_bits},
    matrix::NoMatrix,
    simd::Dots,
};

/// Products of AVX-VNNI.
pub(crate) struct Vnni;

// SAFETY (all methods): the trait's contract gives the instruction set and the pointers' validity; unaligned loads and
// stores are used throughout.
#[allow(clippy::undocumented_unsafe_blocks)]
impl Dots for Avx2<Vnni> {
    const ROWS: usize = 4;
    const UNPACK_BLOCKS: usize = 4;

    type Matrix = NoMatrix<4>;
    type I4 = I;
    type I8 = I;
    type W4 = I;
    type W8 = I;

    #[inline(always)]
    unsafe fn i4_start(w: I, x: *const i8) -> I {
        unsafe { dot(splat_i32(0), w, x) }
    }
    #[inline(always)]
    unsafe fn w4_load(p: *const u8) -> (I, I) {
        unsafe { nibbles(p) }
    }
    #[inline(always)]
    unsafe fn w4_store(p: *mut u8, w: I) {
        unsafe { store_bytes(p, w) }
    }
    #[inline(always)]
    unsafe fn i4_dot(sum: I, w: I, x: *const i8) -> I {
        unsafe { dot(sum, w, x) }
    }
    #[inline(always)]
    unsafe fn i4_finish(sum: I) -> V {
        unsafe { to_floats(sum) }
    }
    #[inline(always)]
    unsafe fn i8_start(bias: i32) -> I {
        unsafe { splat_i32(bias) }
    }
    #[inline(always)]
    unsafe fn w8_load(p: *const u8) -> I {
        unsafe { load_bytes(p) }
    }
    #[inline(always)]
    unsafe fn i8_dot(sum: I, w: I, x: *const i8) -> I {
        unsafe { dot(sum, w, x) }
    }
    #[inline(always)]
    unsafe fn i8_finish(sum: I) -> V {
        unsafe { to_floats(sum) }
    }
    #[inline(always)]
    unsafe fn w2_load(p: *const u8) -> I {
        unsafe { load_bytes(p) }
    }
    #[inline(always)]
    unsafe fn w6(low: I, high: I, i: usize) -> I {
        unsafe { with_high_bits(low, high, i) }
    }
    #[inline(always)]
    unsafe fn i6_start(bias: i32) -> I {
        unsafe { splat_i32(bias) }
    }
    #[inline(always)]
    unsafe fn i6_dot(sum: I, w: (I, I), x: *const i8) -> I {
        unsafe { dot(dot(sum, w.0, x), w.1, x.add(4)) }
    }
}

/// Adds to each lane the products of its 4 unsigned weights and the 4 activations at `x`.
///
/// # Safety
/// The CPU has AVX-VNNI; `x` is valid for 4 elements.
#[inline(always)]
unsafe fn dot(sum: I, w: I, x: *const i8) -> I {
    // SAFETY: this function's contract.
    unsafe {
        let x = splat_4(x);
        let sum = (_mm256_dpbusd_avx_epi32(sum.0, w.0, x.0), _mm256_dpbusd_avx_epi32(sum.1, w.1, x.1));
        (keep(sum.0), keep(sum.1))
    }
}
