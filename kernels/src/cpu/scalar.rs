//! Vectors as arrays: runs everywhere, and is what the compiler can vectorize by itself on other architectures.
#![allow(unsafe_code)]

use std::marker::PhantomData;

use super::{
    matrix::MatrixUnit,
    simd::{Dots, FIXED_LIMIT, LANES, NARROW_LIMIT, Simd},
};
use crate::ops::FIXED_ONE;

/// Rows of a block. Where there are faster kernels, these serve as a check only: few, to compile quickly.
pub(crate) const ROWS: usize = if cfg!(target_arch = "x86_64") { 1 } else { 4 };

/// No instruction set beyond the target's own, and a matrix unit.
pub(crate) struct Scalar<U>(PhantomData<U>);

type V = [f32; LANES];

macro_rules! lanes {
    ($($i:ident)? => $e:expr) => {{
        let mut out = [0.0f32; LANES];
        for ($($i,)? o) in out.iter_mut().enumerate() {
            *o = $e;
        }
        out
    }};
}

// SAFETY (all methods): plain loads and stores of what the trait's contract says is valid; no instruction set is needed.
impl<U> Simd for Scalar<U> {
    type F = V;
    const QUERIES: usize = ROWS;
    const ATTENTION_SUMS: usize = 1;
    const FIXED_EXCESS: i64 = 0;

    #[inline(always)]
    unsafe fn splat(v: f32) -> V {
        [v; LANES]
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> V {
        // SAFETY: as above.
        lanes!(i => unsafe { p.add(i).read_unaligned() })
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> V {
        // SAFETY: as above.
        lanes!(i => half::f16::from_bits(unsafe { p.add(i).read_unaligned() }).to_f32_const())
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> V {
        // SAFETY: as above.
        lanes!(i => f32::from_bits(u32::from(unsafe { p.add(i).read_unaligned() }) << 16))
    }
    #[inline(always)]
    unsafe fn load_i8(p: *const i8) -> V {
        // SAFETY: as above.
        lanes!(i => f32::from(unsafe { *p.add(i) }))
    }
    #[inline(always)]
    unsafe fn load_i32(p: *const i32, plus: i32) -> V {
        // SAFETY: as above.
        lanes!(i => (unsafe { p.add(i).read_unaligned() } + plus) as f32)
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: V) {
        // SAFETY: as above.
        unsafe { p.cast::<V>().write_unaligned(v) }
    }
    #[inline(always)]
    unsafe fn store_f16(p: *mut u16, v: V) {
        for (i, v) in v.into_iter().enumerate() {
            // SAFETY: as above.
            unsafe { p.add(i).write_unaligned(half::f16::from_f32_const(v).to_bits()) };
        }
    }
    #[inline(always)]
    unsafe fn add(a: V, b: V) -> V {
        lanes!(i => a[i] + b[i])
    }
    #[inline(always)]
    unsafe fn sub(a: V, b: V) -> V {
        lanes!(i => a[i] - b[i])
    }
    #[inline(always)]
    unsafe fn mul(a: V, b: V) -> V {
        lanes!(i => a[i] * b[i])
    }
    #[inline(always)]
    unsafe fn div(a: V, b: V) -> V {
        lanes!(i => a[i] / b[i])
    }
    #[inline(always)]
    unsafe fn fma(a: V, b: V, c: V) -> V {
        lanes!(i => a[i].mul_add(b[i], c[i]))
    }
    #[inline(always)]
    unsafe fn max(a: V, b: V) -> V {
        lanes!(i => if a[i] > b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    unsafe fn min(a: V, b: V) -> V {
        lanes!(i => if a[i] < b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    unsafe fn scale2(p: V, n: V) -> V {
        lanes!(i => {
            let n = n[i] as i32;
            let (n1, n2) = (n >> 1, n - (n >> 1));
            p[i] * power_of_two(n1) * power_of_two(n2)
        })
    }
    #[inline(always)]
    unsafe fn add_fixed(sums: *mut i64, v: V) {
        for (i, v) in v.into_iter().enumerate() {
            // SAFETY: as above.
            unsafe { *sums.add(i) = (*sums.add(i)).wrapping_add(to_fixed(v)) };
        }
    }
    #[inline(always)]
    unsafe fn add_narrow(sums: *mut i32, v: V, largest: V) -> V {
        for (i, v) in v.into_iter().enumerate() {
            // SAFETY: as above.
            unsafe { *sums.add(i) = (*sums.add(i)).wrapping_add(to_fixed(v) as i32) };
        }
        lanes!(i => f32::from_bits(largest[i].to_bits().max(v[i].abs().to_bits())))
    }
    #[inline(always)]
    unsafe fn is_narrow(largest: V) -> bool {
        largest.into_iter().all(|v| v < NARROW_LIMIT)
    }
    #[inline(always)]
    unsafe fn add_widened(sums: *mut i64, narrow: *const i32, plus: i64) {
        for i in 0..LANES {
            // SAFETY: as above.
            unsafe { *sums.add(i) = (*sums.add(i)).wrapping_add(i64::from(*narrow.add(i)).wrapping_add(plus)) };
        }
    }
    #[inline(always)]
    unsafe fn prefetch(_: *const u8) {}
}

// SAFETY (all methods): as above.
impl<U: MatrixUnit> Dots for Scalar<U> {
    const ROWS: usize = U::ROWS;
    const UNPACK_BLOCKS: usize = if U::EXISTS { 1 } else { 2 };

    type Matrix = U;
    type I4 = [i32; LANES];
    type I8 = [i32; LANES];
    type W4 = [u8; 64];
    type W8 = [u8; 64];

    #[inline(always)]
    unsafe fn i4_start(w: [u8; 64], x: *const i8) -> [i32; LANES] {
        // SAFETY: as above.
        unsafe { Self::i4_dot([0; LANES], w, x) }
    }
    #[inline(always)]
    unsafe fn w4_load(p: *const u8) -> ([u8; 64], [u8; 64]) {
        // SAFETY: as above.
        let bytes = unsafe { p.cast::<[u8; 64]>().read_unaligned() };
        (bytes.map(|b| b & 15), bytes.map(|b| b >> 4))
    }
    #[inline(always)]
    unsafe fn w4_store(p: *mut u8, w: [u8; 64]) {
        // SAFETY: as above.
        unsafe { p.cast::<[u8; 64]>().write_unaligned(w) }
    }
    #[inline(always)]
    unsafe fn i4_dot(mut sum: [i32; LANES], w: [u8; 64], x: *const i8) -> [i32; LANES] {
        for (lane, sum) in sum.iter_mut().enumerate() {
            for j in 0..4 {
                // SAFETY: as above.
                *sum += i32::from(w[4 * lane + j]) * i32::from(unsafe { *x.add(j) });
            }
        }
        sum
    }
    #[inline(always)]
    unsafe fn i4_finish(sum: [i32; LANES]) -> V {
        sum.map(|s| s as f32)
    }
    #[inline(always)]
    unsafe fn i8_start(_: i32) -> [i32; LANES] {
        [0; LANES]
    }
    #[inline(always)]
    unsafe fn w8_load(p: *const u8) -> [u8; 64] {
        // SAFETY: as above.
        unsafe { p.cast::<[u8; 64]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn i8_dot(mut sum: [i32; LANES], w: [u8; 64], x: *const i8) -> [i32; LANES] {
        for (lane, sum) in sum.iter_mut().enumerate() {
            for j in 0..4 {
                // SAFETY: as above.
                *sum += (i32::from(w[4 * lane + j]) - 128) * i32::from(unsafe { *x.add(j) });
            }
        }
        sum
    }
    #[inline(always)]
    unsafe fn i8_finish(sum: [i32; LANES]) -> V {
        sum.map(|s| s as f32)
    }
    #[inline(always)]
    unsafe fn w2_load(p: *const u8) -> [u8; 64] {
        // SAFETY: as above.
        unsafe { p.cast::<[u8; 64]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn w6(mut low: [u8; 64], high: [u8; 64], i: usize) -> [u8; 64] {
        for (low, high) in low.iter_mut().zip(high) {
            *low |= (high >> (2 * i) & 3) << 4;
        }
        low
    }
    #[inline(always)]
    unsafe fn i6_start(bias: i32) -> [i32; LANES] {
        [bias; LANES]
    }
    #[inline(always)]
    unsafe fn i6_dot(sum: [i32; LANES], w: ([u8; 64], [u8; 64]), x: *const i8) -> [i32; LANES] {
        // SAFETY: as above.
        unsafe { Self::i4_dot(Self::i4_dot(sum, w.0, x), w.1, x.add(4)) }
    }
}

/// 2^n for n in -126..=127.
#[inline(always)]
fn power_of_two(n: i32) -> f32 {
    f32::from_bits(((n + 127) as u32) << 23)
}

/// A float as a count of 2^-24: rounded half to even, clamped to 2^51 units either way; NaN is the lower bound.
#[inline(always)]
pub(crate) fn to_fixed(v: f32) -> i64 {
    let v = v * FIXED_ONE;
    let v = if v > -FIXED_LIMIT { v } else { -FIXED_LIMIT };
    let v = if v < FIXED_LIMIT { v } else { FIXED_LIMIT };
    v.round_ties_even() as i64
}
