//! Norm, SiLU, rotation, exponential: operations of one element, or of one row.
#![allow(unsafe_code)]

use super::super::simd::{LANES, Line, Simd};
use crate::ops::RopeStyle;

/// Added to the lower half of a product with 2^23 in it, rounds to a whole number: 1.5 * 2^23.
const ROUND: f32 = 12_582_912.0;
/// ln 2 rounded to f32, and the rest of it.
pub(crate) const LN2: [f32; 2] = {
    let high = std::f32::consts::LN_2;
    [high, (std::f64::consts::LN_2 - high as f64) as f32]
};
/// 1/7!, 1/6!, ... 1/2!, 1, 1: Taylor's series, highest power first.
pub(crate) const EXP: [f32; 8] = [1.0 / 5040.0, 1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0];
/// Below, e^x rounds to 0; above, to infinity.
pub(crate) const EXP_RANGE: [f32; 2] = [-104.0, 89.0];

/// e^x, within 2 units in the last place. n = x / ln 2 to the next whole number, r = x - n ln 2 in two steps, then the
/// series of e^r to r^7 and times 2^n. NaN stays NaN.
///
/// # Safety
/// The CPU has `S`.
#[inline(always)]
pub(crate) unsafe fn exp<S: Simd>(x: S::F) -> S::F {
    // SAFETY: the contract above.
    unsafe {
        let x = S::max(S::splat(EXP_RANGE[0]), S::min(S::splat(EXP_RANGE[1]), x));
        let n = S::sub(S::fma(x, S::splat(std::f32::consts::LOG2_E), S::splat(ROUND)), S::splat(ROUND));
        let r = S::fma(n, S::splat(-LN2[0]), x);
        let r = S::fma(n, S::splat(-LN2[1]), r);
        let mut p = S::splat(EXP[0]);
        for c in &EXP[1..] {
            p = S::fma(p, r, S::splat(*c));
        }
        S::scale2(p, n)
    }
}

/// Adds 16 lanes as a tree: lane i and i + 8, then i + 4, i + 2, i + 1.
#[inline(always)]
pub(crate) fn fold_sum(mut lanes: [f32; LANES]) -> f32 {
    let mut n = LANES / 2;
    while n > 0 {
        for i in 0..n {
            lanes[i] += lanes[i + n];
        }
        n /= 2;
    }
    lanes[0]
}

/// A vector of the first `n` (up to 16) elements at `p`, zeros behind.
///
/// # Safety
/// The CPU has `S`; `p` is valid for `n` elements.
#[inline(always)]
pub(crate) unsafe fn load_part<S: Simd>(p: *const f32, n: usize) -> S::F {
    if n == LANES {
        // SAFETY: the contract above.
        return unsafe { S::load(p) };
    }
    let mut lanes = Line([0.0f32; LANES]);
    // SAFETY: the contract above.
    unsafe {
        lanes.0.as_mut_ptr().copy_from_nonoverlapping(p, n);
        S::load(lanes.0.as_ptr())
    }
}

/// Writes the first `n < 16` lanes.
///
/// # Safety
/// The CPU has `S`; `p` is valid for `n` elements.
#[inline(always)]
pub(crate) unsafe fn store_part<S: Simd>(p: *mut f32, v: S::F, n: usize) {
    let mut lanes = Line([0.0f32; LANES]);
    // SAFETY: the contract above.
    unsafe {
        S::store(lanes.0.as_mut_ptr(), v);
        p.copy_from_nonoverlapping(lanes.0.as_ptr(), n);
    }
}

/// One row of a root mean square norm: `out = x * (1 / sqrt(mean(x^2) + eps)) * weight`, left to right. The squares are
/// summed in 16 lanes, element k in lane k mod 16, each with fused multiply-add, and folded as a tree.
///
/// # Safety
/// The CPU has `S`; pointers are valid for `width` elements.
#[inline(always)]
pub(crate) unsafe fn rms_norm<S: Simd>(x: *const f32, weight: *const f32, eps: f32, out: *mut f32, width: usize) {
    // SAFETY: the contract above.
    unsafe {
        let (whole, rest) = (width / LANES * LANES, width % LANES);
        let mut sums = S::splat(0.0);
        for k in (0..whole).step_by(LANES) {
            let v = S::load(x.add(k));
            sums = S::fma(v, v, sums);
        }
        if rest > 0 {
            let v = load_part::<S>(x.add(whole), rest);
            sums = S::fma(v, v, sums);
        }
        let mut lanes = Line([0.0; LANES]);
        S::store(lanes.0.as_mut_ptr(), sums);
        let factor = S::splat(1.0 / (fold_sum(lanes.0) / width as f32 + eps).sqrt());
        for k in (0..whole).step_by(LANES) {
            S::store(out.add(k), S::mul(S::mul(S::load(x.add(k)), factor), S::load(weight.add(k))));
        }
        if rest > 0 {
            let v = S::mul(load_part::<S>(x.add(whole), rest), factor);
            store_part::<S>(out.add(whole), S::mul(v, load_part::<S>(weight.add(whole), rest)), rest);
        }
    }
}

/// `out = gate / (1 + exp(-gate)) * up`. `out` may be `gate`.
///
/// # Safety
/// The CPU has `S`; pointers are valid for `len` elements.
#[inline(always)]
pub(crate) unsafe fn silu_mul<S: Simd>(gate: *const f32, up: *const f32, out: *mut f32, len: usize) {
    // SAFETY: the contract above.
    unsafe {
        let (whole, rest) = (len / LANES * LANES, len % LANES);
        for k in (0..whole).step_by(LANES) {
            S::store(out.add(k), silu_times::<S>(S::load(gate.add(k)), S::load(up.add(k))));
        }
        if rest > 0 {
            let v = silu_times::<S>(load_part::<S>(gate.add(whole), rest), load_part::<S>(up.add(whole), rest));
            store_part::<S>(out.add(whole), v, rest);
        }
    }
}

/// # Safety
/// The CPU has `S`.
#[inline(always)]
unsafe fn silu_times<S: Simd>(gate: S::F, up: S::F) -> S::F {
    // SAFETY: the contract above.
    unsafe {
        let e = exp::<S>(S::sub(S::splat(0.0), gate));
        S::mul(S::div(gate, S::add(S::splat(1.0), e)), up)
    }
}

/// `x += delta * 2^-24`: the number rounded to f32, scaled, added.
///
/// # Safety
/// Pointers are valid for `len` elements.
#[inline(always)]
pub(crate) unsafe fn add_fixed(x: *mut f32, delta: *const i64, len: usize) {
    // SAFETY: the contract above; the buffers are different ones.
    let (x, delta) = unsafe { (std::slice::from_raw_parts_mut(x, len), std::slice::from_raw_parts(delta, len)) };
    for (x, delta) in x.iter_mut().zip(delta) {
        *x += *delta as f32 * (1.0 / crate::ops::FIXED_ONE);
    }
}

/// Rotates the heads of one row. `cos`, `sin`: one for each pair. For a pair (a, b): a cos - b sin, b cos + a sin, each
/// product rounded.
///
/// # Safety
/// `x` is valid for `n_heads * head_dim` elements.
#[inline(always)]
pub(crate) unsafe fn rope(x: *mut f32, n_heads: usize, head_dim: usize, style: RopeStyle, cos: &[f32], sin: &[f32]) {
    // SAFETY: the contract above.
    let x = unsafe { std::slice::from_raw_parts_mut(x, n_heads * head_dim) };
    let n_pairs = cos.len();
    let sin = &sin[..n_pairs];
    for head in x.chunks_exact_mut(head_dim) {
        let head = &mut head[..2 * n_pairs];
        match style {
            RopeStyle::Half => {
                let (first, second) = head.split_at_mut(n_pairs);
                for i in 0..n_pairs {
                    let (a, b) = (first[i], second[i]);
                    first[i] = a * cos[i] - b * sin[i];
                    second[i] = b * cos[i] + a * sin[i];
                }
            }
            RopeStyle::Interleaved => {
                for (i, pair) in head.chunks_exact_mut(2).enumerate() {
                    let (a, b) = (pair[0], pair[1]);
                    pair[0] = a * cos[i] - b * sin[i];
                    pair[1] = b * cos[i] + a * sin[i];
                }
            }
        }
    }
}

/// The largest element and its lowest index; NaN counts as the smallest.
///
/// # Safety
/// The CPU has `S`; `x` is valid for `width > 0` elements.
#[inline(always)]
pub(crate) unsafe fn argmax<S: Simd>(x: *const f32, width: usize) -> (f32, u32) {
    // SAFETY: the contract above.
    unsafe {
        let whole = width / LANES * LANES;
        let mut largest = S::splat(f32::NEG_INFINITY);
        for k in (0..whole).step_by(LANES) {
            largest = S::max(S::load(x.add(k)), largest);
        }
        let mut lanes = Line([0.0; LANES]);
        S::store(lanes.0.as_mut_ptr(), largest);
        let x = std::slice::from_raw_parts(x, width);
        let mut value = f32::NEG_INFINITY;
        for &v in lanes.0.iter().chain(&x[whole..]) {
            if v > value {
                value = v;
            }
        }
        // Nothing equals it if all are NaN.
        let at = x.iter().position(|&v| v == value).unwrap_or(0);
        (x[at], at as u32)
    }
}

/// `out = exp(max((x - largest) * factor, -104))`: 0 for NaN and for what is far below the largest.
///
/// # Safety
/// The CPU has `S`; pointers are valid for `len` elements.
#[inline(always)]
pub(crate) unsafe fn odds<S: Simd>(x: *const f32, largest: f32, factor: f32, out: *mut f32, len: usize) {
    // SAFETY: the contract above.
    unsafe {
        let (whole, rest) = (len / LANES * LANES, len % LANES);
        for k in (0..whole).step_by(LANES) {
            S::store(out.add(k), odds_of::<S>(S::load(x.add(k)), largest, factor));
        }
        if rest > 0 {
            store_part::<S>(out.add(whole), odds_of::<S>(load_part::<S>(x.add(whole), rest), largest, factor), rest);
        }
    }
}

/// Of one vector. (Not a closure: that would not have the caller's instruction set.)
///
/// # Safety
/// The CPU has `S`.
#[inline(always)]
unsafe fn odds_of<S: Simd>(x: S::F, largest: f32, factor: f32) -> S::F {
    // SAFETY: the contract above.
    unsafe {
        let distance = S::mul(S::sub(x, S::splat(largest)), S::splat(factor));
        exp::<S>(S::max(distance, S::splat(EXP_RANGE[0])))
    }
}
