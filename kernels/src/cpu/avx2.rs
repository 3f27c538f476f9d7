//! AVX2, FMA and F16C. Sixteen f32 are two registers; quantized dot products take the two halves of a tile in turn.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use super::simd::{FIXED_LIMIT, Simd};
use crate::ops::FIXED_ONE;

/// AVX2, FMA, F16C.
pub(crate) struct Avx2;

type V = (__m256, __m256);

/// Applies a two-operand intrinsic to both registers.
macro_rules! both {
    ($f:ident, $a:ident, $b:ident) => {
        // SAFETY: the trait's contract: the CPU has the instruction set.
        unsafe { ($f($a.0, $b.0), $f($a.1, $b.1)) }
    };
}

// SAFETY (all methods): the trait's contract gives the instruction set and the pointers' validity; unaligned loads and
// stores are used throughout.
#[allow(clippy::undocumented_unsafe_blocks)]
impl Simd for Avx2 {
    type F = V;
    const ROWS: usize = 4;
    const QUERIES: usize = 6;
    const HEAD_VECTORS: usize = 1;

    #[inline(always)]
    unsafe fn splat(v: f32) -> V {
        let v = unsafe { _mm256_set1_ps(v) };
        (v, v)
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> V {
        unsafe { (_mm256_loadu_ps(p), _mm256_loadu_ps(p.add(8))) }
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> V {
        unsafe { (Self::h_load_f16(p), Self::h_load_f16(p.add(8))) }
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> V {
        unsafe {
            let low = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()));
            let high = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.add(8).cast()));
            (_mm256_castsi256_ps(_mm256_slli_epi32::<16>(low)), _mm256_castsi256_ps(_mm256_slli_epi32::<16>(high)))
        }
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: V) {
        unsafe {
            _mm256_storeu_ps(p, v.0);
            _mm256_storeu_ps(p.add(8), v.1);
        }
    }
    #[inline(always)]
    unsafe fn store_f16(p: *mut u16, v: V) {
        unsafe {
            _mm_storeu_si128(p.cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v.0));
            _mm_storeu_si128(p.add(8).cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v.1));
        }
    }
    #[inline(always)]
    unsafe fn add(a: V, b: V) -> V {
        both!(_mm256_add_ps, a, b)
    }
    #[inline(always)]
    unsafe fn sub(a: V, b: V) -> V {
        both!(_mm256_sub_ps, a, b)
    }
    #[inline(always)]
    unsafe fn mul(a: V, b: V) -> V {
        both!(_mm256_mul_ps, a, b)
    }
    #[inline(always)]
    unsafe fn div(a: V, b: V) -> V {
        both!(_mm256_div_ps, a, b)
    }
    #[inline(always)]
    unsafe fn fma(a: V, b: V, c: V) -> V {
        unsafe { (_mm256_fmadd_ps(a.0, b.0, c.0), _mm256_fmadd_ps(a.1, b.1, c.1)) }
    }
    #[inline(always)]
    unsafe fn max(a: V, b: V) -> V {
        both!(_mm256_max_ps, a, b)
    }
    #[inline(always)]
    unsafe fn min(a: V, b: V) -> V {
        both!(_mm256_min_ps, a, b)
    }
    #[inline(always)]
    unsafe fn scale2(p: V, n: V) -> V {
        unsafe { (scale2(p.0, n.0), scale2(p.1, n.1)) }
    }
    #[inline(always)]
    unsafe fn add_fixed(sums: *mut i64, v: V) {
        unsafe {
            for (i, v) in [v.0, v.1].into_iter().enumerate() {
                let v = _mm256_mul_ps(v, _mm256_set1_ps(FIXED_ONE));
                let v = _mm256_max_ps(v, _mm256_set1_ps(-FIXED_LIMIT));
                let v = _mm256_min_ps(v, _mm256_set1_ps(FIXED_LIMIT));
                add_rounded(sums.add(8 * i), _mm256_castps256_ps128(v));
                add_rounded(sums.add(8 * i + 4), _mm256_extractf128_ps::<1>(v));
            }
        }
    }
    #[inline(always)]
    unsafe fn prefetch(p: *const u8) {
        unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
    }

    type H = __m256;
    /// 16 sums of 16 bits, two a lane: 8 rounds of 2 products of at most 15 * 127 are 30480.
    type I4 = __m256i;
    type I8 = __m256i;
    type W4 = __m256i;
    /// The weights' absolute values (0..=128, unsigned) and the weights.
    type W8 = (__m256i, __m256i);
    const PARTS: usize = 2;

    #[inline(always)]
    unsafe fn h_zero() -> __m256 {
        unsafe { _mm256_setzero_ps() }
    }
    #[inline(always)]
    unsafe fn h_splat(v: f32) -> __m256 {
        unsafe { _mm256_set1_ps(v) }
    }
    #[inline(always)]
    unsafe fn h_load(p: *const f32) -> __m256 {
        unsafe { _mm256_loadu_ps(p) }
    }
    #[inline(always)]
    unsafe fn h_load_f16(p: *const u16) -> __m256 {
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(p.cast())) }
    }
    #[inline(always)]
    unsafe fn h_load_i8(p: *const i8) -> __m256 {
        unsafe { _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(p.cast()))) }
    }
    #[inline(always)]
    unsafe fn h_store(p: *mut f32, v: __m256) {
        unsafe { _mm256_storeu_ps(p, v) }
    }
    #[inline(always)]
    unsafe fn h_mul(a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_mul_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn h_fma(a: __m256, b: __m256, c: __m256) -> __m256 {
        unsafe { _mm256_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    unsafe fn i4_zero() -> __m256i {
        unsafe { _mm256_setzero_si256() }
    }
    #[inline(always)]
    unsafe fn w4_load(p: *const u8) -> (__m256i, __m256i) {
        unsafe {
            let bytes = _mm256_loadu_si256(p.cast());
            let low = _mm256_set1_epi8(15);
            (_mm256_and_si256(bytes, low), _mm256_and_si256(_mm256_srli_epi16::<4>(bytes), low))
        }
    }
    #[inline(always)]
    unsafe fn i4_dot(sum: __m256i, w: __m256i, x: *const i8) -> __m256i {
        unsafe { _mm256_add_epi16(sum, _mm256_maddubs_epi16(w, _mm256_set1_epi32(x.cast::<i32>().read_unaligned()))) }
    }
    #[inline(always)]
    unsafe fn i4_finish(sum: __m256i) -> __m256 {
        unsafe { _mm256_cvtepi32_ps(_mm256_madd_epi16(sum, _mm256_set1_epi16(1))) }
    }
    #[inline(always)]
    unsafe fn i8_start(_: i32) -> __m256i {
        unsafe { _mm256_setzero_si256() }
    }
    #[inline(always)]
    unsafe fn w8_load(p: *const u8) -> (__m256i, __m256i) {
        unsafe {
            let w = _mm256_xor_si256(_mm256_loadu_si256(p.cast()), _mm256_set1_epi8(-128));
            (_mm256_abs_epi8(w), w)
        }
    }
    #[inline(always)]
    unsafe fn i8_dot(sum: __m256i, w: (__m256i, __m256i), x: *const i8) -> __m256i {
        // The sign goes to the activation, which is never -128; two products of at most 128 * 127 fit 16 bits.
        unsafe {
            let x = _mm256_set1_epi32(x.cast::<i32>().read_unaligned());
            let pairs = _mm256_maddubs_epi16(w.0, _mm256_sign_epi8(x, w.1));
            _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
        }
    }
    #[inline(always)]
    unsafe fn i8_finish(sum: __m256i) -> __m256 {
        unsafe { _mm256_cvtepi32_ps(sum) }
    }
    #[inline(always)]
    unsafe fn w2_load(p: *const u8) -> __m256i {
        unsafe { _mm256_loadu_si256(p.cast()) }
    }
    #[inline(always)]
    unsafe fn w6(low: __m256i, high: __m256i, i: usize) -> __m256i {
        unsafe {
            let high = match i {
                0 => _mm256_slli_epi16::<4>(high),
                1 => _mm256_slli_epi16::<2>(high),
                2 => high,
                _ => _mm256_srli_epi16::<2>(high),
            };
            _mm256_or_si256(low, _mm256_and_si256(high, _mm256_set1_epi8(0x30)))
        }
    }
    #[inline(always)]
    unsafe fn i6_start(bias: i32) -> __m256i {
        unsafe { _mm256_set1_epi32(bias) }
    }
    #[inline(always)]
    unsafe fn i6_dot(sum: __m256i, w: __m256i, x: *const i8) -> __m256i {
        unsafe {
            let pairs = _mm256_maddubs_epi16(w, _mm256_set1_epi32(x.cast::<i32>().read_unaligned()));
            _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
        }
    }
}

/// # Safety
/// The CPU has AVX2.
#[inline(always)]
unsafe fn scale2(p: __m256, n: __m256) -> __m256 {
    // SAFETY: this function's contract.
    unsafe {
        let n = _mm256_cvtps_epi32(n);
        let n1 = _mm256_srai_epi32::<1>(n);
        let n2 = _mm256_sub_epi32(n, n1);
        let bias = _mm256_set1_epi32(127);
        let s1 = _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_add_epi32(n1, bias)));
        let s2 = _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_add_epi32(n2, bias)));
        _mm256_mul_ps(_mm256_mul_ps(p, s1), s2)
    }
}

/// Rounds half to even and adds. `|v| <= 2^51`: 1.5 * 2^52 + v is then in 2^52..=2^53, where doubles are whole numbers
/// and count up by one in their bits.
///
/// # Safety
/// The CPU has AVX2; `sums` is valid for 4 elements.
#[inline(always)]
unsafe fn add_rounded(sums: *mut i64, v: __m128) {
    // SAFETY: this function's contract.
    unsafe {
        let magic = _mm256_set1_pd(6_755_399_441_055_744.0);
        let rounded = _mm256_castpd_si256(_mm256_add_pd(_mm256_cvtps_pd(v), magic));
        let whole = _mm256_sub_epi64(rounded, _mm256_castpd_si256(magic));
        let sums = sums.cast::<__m256i>();
        _mm256_storeu_si256(sums, _mm256_add_epi64(_mm256_loadu_si256(sums), whole));
    }
}
