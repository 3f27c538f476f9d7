//! AVX-512 F, BW, DQ, VL and VNNI. Sixteen f32 are one register; a tile of weights is done at once.
#![allow(unsafe_code)]

use std::{
    arch::{asm, x86_64::*},
    marker::PhantomData,
};

use super::{
    generic::quantize::{QuantGroup, ROUND, TINY},
    matrix::MatrixUnit,
    simd::{Dots, FIXED_LIMIT, NARROW_LIMIT, Simd},
};
use crate::{layout::GROUP, ops::FIXED_ONE};

/// Rows of a block: as many sums as fit the registers twice, beside weights.
pub(crate) const ROWS: usize = 8;

/// AVX-512 with VNNI, and a matrix unit.
pub(crate) struct Avx512<U>(PhantomData<U>);

/// [`Simd::add_product`].
#[inline]
#[target_feature(enable = "avx512f")]
fn add_product(sum: &mut __m512, a: __m512, b: __m512) {
    // SAFETY: the instruction is there; it reads and writes registers.
    unsafe {
        asm!("vfmadd231ps {0}, {1}, {2}", inout(zmm_reg) *sum, in(zmm_reg) a, in(zmm_reg) b,
            options(pure, nomem, nostack, preserves_flags))
    }
}

// SAFETY (all methods): the trait's contract gives the instruction set and the pointers' validity; unaligned loads and
// stores are used throughout.
#[allow(clippy::undocumented_unsafe_blocks)]
impl<U> Simd for Avx512<U> {
    type F = __m512;
    const QUERIES: usize = 8;
    const ATTENTION_SUMS: usize = 16;
    const FIXED_EXCESS: i64 = 0;

    #[inline(always)]
    unsafe fn splat(v: f32) -> __m512 {
        unsafe { _mm512_set1_ps(v) }
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> __m512 {
        unsafe { _mm512_loadu_ps(p) }
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> __m512 {
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())) }
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> __m512 {
        unsafe {
            let bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits))
        }
    }
    #[inline(always)]
    unsafe fn load_i8(p: *const i8) -> __m512 {
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(p.cast()))) }
    }
    #[inline(always)]
    unsafe fn load_i32(p: *const i32, plus: i32) -> __m512 {
        // In the low bits of a large number, from which that is taken away: additions, for while AMX works one port alone converts.
        unsafe {
            let bits = _mm512_add_epi32(_mm512_loadu_si512(p.cast()), _mm512_set1_epi32(ROUND.to_bits() as i32 + plus));
            _mm512_sub_ps(_mm512_castsi512_ps(bits), _mm512_set1_ps(ROUND))
        }
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: __m512) {
        unsafe { _mm512_storeu_ps(p, v) }
    }
    #[inline(always)]
    unsafe fn store_f16(p: *mut u16, v: __m512) {
        unsafe { _mm256_storeu_si256(p.cast(), _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v)) }
    }
    #[inline(always)]
    unsafe fn add(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_add_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn sub(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_sub_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn mul(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_mul_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn div(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_div_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    unsafe fn add_product(sum: &mut __m512, a: __m512, b: __m512) {
        unsafe { add_product(sum, a, b) }
    }
    #[inline(always)]
    unsafe fn max(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_max_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn min(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_min_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn scale2(p: __m512, n: __m512) -> __m512 {
        unsafe {
            // Rounds once, as the second of two products does: the first one is exact.
            _mm512_scalef_ps(p, n)
        }
    }
    #[inline(always)]
    unsafe fn add_fixed(sums: *mut i64, v: __m512) {
        unsafe {
            let v = _mm512_mul_ps(v, _mm512_set1_ps(FIXED_ONE));
            let v = _mm512_max_ps(v, _mm512_set1_ps(-FIXED_LIMIT));
            let v = _mm512_min_ps(v, _mm512_set1_ps(FIXED_LIMIT));
            for (i, half) in [_mm512_castps512_ps256(v), _mm512_extractf32x8_ps::<1>(v)].into_iter().enumerate() {
                let p = sums.add(8 * i);
                let sum = _mm512_add_epi64(_mm512_loadu_si512(p.cast()), _mm512_cvtps_epi64(half));
                _mm512_storeu_si512(p.cast(), sum);
            }
        }
    }
    #[inline(always)]
    unsafe fn add_narrow(sums: *mut i32, v: __m512, largest: __m512) -> __m512 {
        unsafe {
            let rounded = _mm512_cvtps_epi32(_mm512_mul_ps(v, _mm512_set1_ps(FIXED_ONE)));
            _mm512_storeu_si512(sums.cast(), _mm512_add_epi32(_mm512_loadu_si512(sums.cast()), rounded));
            // Of numbers without a sign, floats and their bits have one order.
            let magnitude = _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7fff_ffff));
            _mm512_castsi512_ps(_mm512_max_epu32(_mm512_castps_si512(largest), magnitude))
        }
    }
    #[inline(always)]
    unsafe fn is_narrow(largest: __m512) -> bool {
        let limit = NARROW_LIMIT.to_bits() as i32;
        unsafe { _mm512_cmplt_epu32_mask(_mm512_castps_si512(largest), _mm512_set1_epi32(limit)) == u16::MAX }
    }
    #[inline(always)]
    unsafe fn add_widened(sums: *mut i64, narrow: *const i32, plus: i64) {
        unsafe {
            for i in [0, 8] {
                let wide = _mm512_cvtepi32_epi64(_mm256_loadu_si256(narrow.add(i).cast()));
                let wide = _mm512_add_epi64(wide, _mm512_set1_epi64(plus));
                let p = sums.add(i);
                _mm512_storeu_si512(p.cast(), _mm512_add_epi64(_mm512_loadu_si512(p.cast()), wide));
            }
        }
    }
    #[inline(always)]
    unsafe fn quantize(x: &[f32; GROUP]) -> QuantGroup {
        unsafe {
            let x = [_mm512_loadu_ps(x.as_ptr()), _mm512_loadu_ps(x[GROUP / 2..].as_ptr())];
            let magnitude = _mm512_set1_epi32(0x7fff_ffff);
            let [first, last] = x.map(|x| _mm512_and_si512(_mm512_castps_si512(x), magnitude));
            let amax = f32::from_bits(_mm512_reduce_max_epu32(_mm512_max_epu32(first, last)));
            if !amax.is_finite() {
                return QuantGroup::NAN;
            }
            if amax < TINY {
                return QuantGroup::ZERO;
            }
            let inverse = _mm512_set1_ps(127.0 / amax);
            let mut group = QuantGroup { scale: amax / 127.0, ..QuantGroup::ZERO };
            for (half, x) in x.into_iter().enumerate() {
                let quants = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(x, inverse)));
                _mm_storeu_si128(group.quants[GROUP / 2 * half..].as_mut_ptr().cast(), quants);
                // Bytes are summed as unsigned ones, which are 128 more.
                let sums = _mm_sad_epu8(_mm_xor_si128(quants, _mm_set1_epi8(-128)), _mm_setzero_si128());
                let sum = _mm_cvtsi128_si32(sums) + _mm_extract_epi32::<2>(sums);
                group.sums[half] = sum - 128 * (GROUP / 2) as i32;
            }
            group
        }
    }
    #[inline(always)]
    unsafe fn prefetch(p: *const u8) {
        unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
    }
}

// SAFETY (all methods): as above.
#[allow(clippy::undocumented_unsafe_blocks)]
impl<U: MatrixUnit> Dots for Avx512<U> {
    const ROWS: usize = U::ROWS;
    const UNPACK_BLOCKS: usize = if U::EXISTS { 1 } else { 4 };

    type Matrix = U;
    type I4 = __m512i;
    type I8 = __m512i;
    type W4 = __m512i;
    type W8 = __m512i;

    #[inline(always)]
    unsafe fn i4_start(w: __m512i, x: *const i8) -> __m512i {
        unsafe { Self::i4_dot(_mm512_setzero_si512(), w, x) }
    }
    #[inline(always)]
    unsafe fn w4_load(p: *const u8) -> (__m512i, __m512i) {
        unsafe {
            let bytes = _mm512_loadu_si512(p.cast());
            let low = _mm512_set1_epi8(15);
            (_mm512_and_si512(bytes, low), _mm512_and_si512(_mm512_srli_epi16::<4>(bytes), low))
        }
    }
    #[inline(always)]
    unsafe fn w4_store(p: *mut u8, w: __m512i) {
        unsafe { _mm512_storeu_si512(p.cast(), w) }
    }
    #[inline(always)]
    unsafe fn i4_dot(sum: __m512i, w: __m512i, x: *const i8) -> __m512i {
        unsafe { _mm512_dpbusd_epi32(sum, w, _mm512_set1_epi32(x.cast::<i32>().read_unaligned())) }
    }
    #[inline(always)]
    unsafe fn i4_finish(sum: __m512i) -> __m512 {
        unsafe { _mm512_cvtepi32_ps(sum) }
    }
    #[inline(always)]
    unsafe fn i8_start(bias: i32) -> __m512i {
        unsafe { _mm512_set1_epi32(bias) }
    }
    #[inline(always)]
    unsafe fn w8_load(p: *const u8) -> __m512i {
        unsafe { _mm512_loadu_si512(p.cast()) }
    }
    #[inline(always)]
    unsafe fn i8_dot(sum: __m512i, w: __m512i, x: *const i8) -> __m512i {
        unsafe { _mm512_dpbusd_epi32(sum, w, _mm512_set1_epi32(x.cast::<i32>().read_unaligned())) }
    }
    #[inline(always)]
    unsafe fn i8_finish(sum: __m512i) -> __m512 {
        unsafe { _mm512_cvtepi32_ps(sum) }
    }
    #[inline(always)]
    unsafe fn w2_load(p: *const u8) -> __m512i {
        unsafe { _mm512_loadu_si512(p.cast()) }
    }
    #[inline(always)]
    unsafe fn w6(low: __m512i, high: __m512i, i: usize) -> __m512i {
        unsafe {
            let high = match i {
                0 => _mm512_slli_epi16::<4>(high),
                1 => _mm512_slli_epi16::<2>(high),
                2 => high,
                _ => _mm512_srli_epi16::<2>(high),
            };
            _mm512_or_si512(low, _mm512_and_si512(high, _mm512_set1_epi8(0x30)))
        }
    }
    #[inline(always)]
    unsafe fn i6_start(bias: i32) -> __m512i {
        unsafe { _mm512_set1_epi32(bias) }
    }
    #[inline(always)]
    unsafe fn i6_dot(sum: __m512i, w: (__m512i, __m512i), x: *const i8) -> __m512i {
        unsafe { Self::i4_dot(Self::i4_dot(sum, w.0, x), w.1, x.add(4)) }
    }
}
