//! AVX2, FMA and F16C. Sixteen f32 are two registers, and so are sixteen sums of quantized products.
#![allow(unsafe_code)]

use std::{
    arch::{asm, x86_64::*},
    marker::PhantomData,
};

use super::{
    matrix::NoMatrix,
    simd::{Dots, FIXED_LIMIT, NARROW_LIMIT, Simd},
};
use crate::ops::FIXED_ONE;

/// AVX2, FMA, F16C, and the instructions that products of quants are made of.
pub(crate) struct Avx2<D>(PhantomData<D>);

/// Products of AVX2 itself: of bytes to 16 bits.
pub(crate) struct Words;

/// 1.5 * 2^28.
const ROUNDING: f64 = 402_653_184.0;

pub(super) type V = (__m256, __m256);
pub(super) type I = (__m256i, __m256i);

/// Applies a two-operand intrinsic to both registers.
macro_rules! both {
    ($f:ident, $a:expr, $b:expr) => {{
        let (a, b) = ($a, $b);
        // SAFETY: the trait's contract: the CPU has the instruction set.
        #[allow(unused_unsafe)]
        let both = unsafe { ($f(a.0, b.0), $f(a.1, b.1)) };
        both
    }};
}

// SAFETY (all methods): the trait's contract gives the instruction set and the pointers' validity; unaligned loads and
// stores are used throughout.
#[allow(clippy::undocumented_unsafe_blocks)]
impl<D> Simd for Avx2<D> {
    type F = V;
    const QUERIES: usize = 6;
    const ATTENTION_SUMS: usize = 6;
    const FIXED_EXCESS: i64 = ROUNDING.to_bits() as i64;

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
        unsafe {
            let half = |p: *const u16| _mm256_cvtph_ps(_mm_loadu_si128(p.cast()));
            (half(p), half(p.add(8)))
        }
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
    unsafe fn load_i8(p: *const i8) -> V {
        unsafe {
            let half = |p: *const i8| _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(p.cast())));
            (half(p), half(p.add(8)))
        }
    }
    #[inline(always)]
    unsafe fn load_i32(p: *const i32, plus: i32) -> V {
        unsafe {
            let sums = (_mm256_loadu_si256(p.cast()), _mm256_loadu_si256(p.add(8).cast()));
            to_floats(both!(_mm256_add_epi32, sums, splat_i32(plus)))
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
            let limit = _mm256_set1_ps(FIXED_LIMIT / FIXED_ONE);
            let below = _mm256_set1_ps(-FIXED_LIMIT / FIXED_ONE);
            for (i, v) in [v.0, v.1].into_iter().enumerate() {
                let v = _mm256_min_ps(_mm256_max_ps(v, below), limit);
                add_rounded(sums.add(8 * i), _mm256_castps256_ps128(v));
                add_rounded(sums.add(8 * i + 4), _mm256_extractf128_ps::<1>(v));
            }
        }
    }
    #[inline(always)]
    unsafe fn add_narrow(sums: *mut i32, v: V, largest: V) -> V {
        unsafe {
            let add = |p: *mut __m256i, v: __m256, largest: __m256| {
                let rounded = _mm256_cvtps_epi32(_mm256_mul_ps(v, _mm256_set1_ps(FIXED_ONE)));
                _mm256_storeu_si256(p, _mm256_add_epi32(_mm256_loadu_si256(p), rounded));
                // Of numbers without a sign, floats and their bits have one order.
                let magnitude = _mm256_and_si256(_mm256_castps_si256(v), _mm256_set1_epi32(0x7fff_ffff));
                _mm256_castsi256_ps(_mm256_max_epu32(_mm256_castps_si256(largest), magnitude))
            };
            (add(sums.cast(), v.0, largest.0), add(sums.add(8).cast(), v.1, largest.1))
        }
    }
    #[inline(always)]
    unsafe fn is_narrow(largest: V) -> bool {
        unsafe {
            let largest = _mm256_max_epu32(_mm256_castps_si256(largest.0), _mm256_castps_si256(largest.1));
            let limit = _mm256_set1_epi32(NARROW_LIMIT.to_bits() as i32);
            _mm256_movemask_epi8(_mm256_cmpgt_epi32(limit, largest)) == -1
        }
    }
    #[inline(always)]
    unsafe fn add_widened(sums: *mut i64, narrow: *const i32, plus: i64) {
        unsafe {
            for i in [0, 4, 8, 12] {
                let wide = _mm256_cvtepi32_epi64(_mm_loadu_si128(narrow.add(i).cast()));
                let wide = _mm256_add_epi64(wide, _mm256_set1_epi64x(plus));
                let p = sums.add(i).cast::<__m256i>();
                _mm256_storeu_si256(p, _mm256_add_epi64(_mm256_loadu_si256(p), wide));
            }
        }
    }
    #[inline(always)]
    unsafe fn prefetch(p: *const u8) {
        unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
    }
}

// SAFETY (all methods): as above.
#[allow(clippy::undocumented_unsafe_blocks)]
impl Dots for Avx2<Words> {
    const ROWS: usize = 4;
    const UNPACK_BLOCKS: usize = 4;

    type Matrix = NoMatrix<4>;
    /// Sums of 16 bits, two a lane: 8 rounds of 2 products of at most 15 * 127 are 30480.
    type I4 = I;
    type I8 = I;
    type W4 = I;
    /// The weights' absolute values (0..=128, unsigned) and the weights.
    type W8 = (I, I);

    #[inline(always)]
    unsafe fn i4_start(w: I, x: *const i8) -> I {
        unsafe {
            let sum = both!(_mm256_maddubs_epi16, w, splat_4(x));
            (keep(sum.0), keep(sum.1))
        }
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
        unsafe {
            let sum = both!(_mm256_add_epi16, sum, both!(_mm256_maddubs_epi16, w, splat_4(x)));
            (keep(sum.0), keep(sum.1))
        }
    }
    #[inline(always)]
    unsafe fn i4_finish(sum: I) -> V {
        unsafe { to_floats(sum_pairs(sum)) }
    }
    #[inline(always)]
    unsafe fn i8_start(_: i32) -> I {
        unsafe { splat_i32(0) }
    }
    #[inline(always)]
    unsafe fn w8_load(p: *const u8) -> (I, I) {
        unsafe {
            let w = both!(_mm256_xor_si256, load_bytes(p), splat_i8(-128));
            ((_mm256_abs_epi8(w.0), _mm256_abs_epi8(w.1)), w)
        }
    }
    #[inline(always)]
    unsafe fn i8_dot(sum: I, (magnitude, w): (I, I), x: *const i8) -> I {
        // The sign goes to the activation, which is never -128; two products of at most 128 * 127 fit 16 bits.
        unsafe {
            let x = both!(_mm256_sign_epi8, splat_4(x), w);
            let pairs = sum_pairs(both!(_mm256_maddubs_epi16, magnitude, x));
            let sum = both!(_mm256_add_epi32, sum, pairs);
            (keep(sum.0), keep(sum.1))
        }
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
        // Four products of at most 63 * 127 fit 16 bits.
        unsafe {
            let first = both!(_mm256_maddubs_epi16, w.0, splat_4(x));
            let second = both!(_mm256_maddubs_epi16, w.1, splat_4(x.add(4)));
            let sum = both!(_mm256_add_epi32, sum, sum_pairs(both!(_mm256_add_epi16, first, second)));
            (keep(sum.0), keep(sum.1))
        }
    }
}

/// # Safety (all)
/// The CPU has AVX2.
#[inline(always)]
unsafe fn splat_i8(v: i8) -> I {
    // SAFETY: this function's contract.
    let v = unsafe { _mm256_set1_epi8(v) };
    (v, v)
}

/// A number in every lane.
#[inline(always)]
pub(super) unsafe fn splat_i32(v: i32) -> I {
    // SAFETY: this function's contract.
    let v = unsafe { _mm256_set1_epi32(v) };
    (v, v)
}

/// 64 bytes.
#[inline(always)]
pub(super) unsafe fn load_bytes(p: *const u8) -> I {
    // SAFETY: this function's contract; `p` is valid for 64 bytes.
    unsafe { (_mm256_loadu_si256(p.cast()), _mm256_loadu_si256(p.add(32).cast())) }
}

/// 64 bytes.
#[inline(always)]
pub(super) unsafe fn store_bytes(p: *mut u8, bytes: I) {
    // SAFETY: this function's contract; `p` is valid for 64 bytes.
    unsafe {
        _mm256_storeu_si256(p.cast(), bytes.0);
        _mm256_storeu_si256(p.add(32).cast(), bytes.1);
    }
}

/// The low and high nibbles of 64 bytes.
#[inline(always)]
pub(super) unsafe fn nibbles(p: *const u8) -> (I, I) {
    // SAFETY: this function's contract; `p` is valid for 64 bytes.
    unsafe {
        let (bytes, low) = (load_bytes(p), splat_i8(15));
        let high = (_mm256_srli_epi16::<4>(bytes.0), _mm256_srli_epi16::<4>(bytes.1));
        (both!(_mm256_and_si256, bytes, low), both!(_mm256_and_si256, high, low))
    }
}

/// As [`Dots::w6`].
#[inline(always)]
pub(super) unsafe fn with_high_bits(low: I, high: I, i: usize) -> I {
    // SAFETY: this function's contract.
    unsafe {
        let high = match i {
            0 => (_mm256_slli_epi16::<4>(high.0), _mm256_slli_epi16::<4>(high.1)),
            1 => (_mm256_slli_epi16::<2>(high.0), _mm256_slli_epi16::<2>(high.1)),
            2 => high,
            _ => (_mm256_srli_epi16::<2>(high.0), _mm256_srli_epi16::<2>(high.1)),
        };
        both!(_mm256_or_si256, low, both!(_mm256_and_si256, high, splat_i8(0x30)))
    }
}

/// Each number as f32.
#[inline(always)]
pub(super) unsafe fn to_floats(v: I) -> V {
    // SAFETY: this function's contract.
    unsafe { (_mm256_cvtepi32_ps(v.0), _mm256_cvtepi32_ps(v.1)) }
}

/// The 4 activations at `x`, for every lane.
#[inline(always)]
pub(super) unsafe fn splat_4(x: *const i8) -> I {
    // SAFETY: this function's contract; `x` is valid for 4 elements.
    let x = unsafe { _mm256_set1_epi32(x.cast::<i32>().read_unaligned()) };
    (x, x)
}

/// Sums of the two halves of each lane.
#[inline(always)]
unsafe fn sum_pairs(pairs: I) -> I {
    // SAFETY: this function's contract.
    let one = unsafe { (_mm256_set1_epi16(1), _mm256_set1_epi16(1)) };
    both!(_mm256_madd_epi16, pairs, one)
}

/// The value itself, about which the compiler learns nothing, computed in the order of the source: else it adds sums in another
/// order, keeps all their products until then, and runs out of registers.
///
/// # Safety
/// The CPU has AVX2.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) unsafe fn keep(mut v: __m256i) -> __m256i {
    // SAFETY: there is no instruction in it. (Not `pure`: such may change places.)
    unsafe { asm!("/* {0} */", inout(ymm_reg) v, options(nomem, nostack, preserves_flags)) };
    v
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

/// Adds the bits of the sum of `v` and [`ROUNDING`]. `|v| <= 2^27`, so that sum lies in 2^28..=2^29, where doubles are multiples
/// of 2^-24 and count up by one in their bits; it is rounded half to even.
///
/// # Safety
/// The CPU has AVX2; `sums` is valid for 4 elements.
#[inline(always)]
unsafe fn add_rounded(sums: *mut i64, v: __m128) {
    // SAFETY: this function's contract.
    unsafe {
        let rounded = _mm256_castpd_si256(_mm256_add_pd(_mm256_cvtps_pd(v), _mm256_set1_pd(ROUNDING)));
        let sums = sums.cast::<__m256i>();
        _mm256_storeu_si256(sums, _mm256_add_epi64(_mm256_loadu_si256(sums), rounded));
    }
}
