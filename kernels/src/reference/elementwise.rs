//! Norm, exponential, SiLU, rotation, largest element.

use super::fold;
use crate::ops::{FIXED_ONE, RopeSpec, RopeStyle};

/// `x * (1 / sqrt(mean(x^2) + eps)) * weight`, left to right, for one row. Element k's square is added to lane k mod 16
/// with fused multiply-add; lanes are folded as a tree.
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
    let mut lanes = [0.0f32; 16];
    for (k, x) in x.iter().enumerate() {
        lanes[k % 16] = x.mul_add(*x, lanes[k % 16]);
    }
    let factor = 1.0 / (fold(lanes) / x.len() as f32 + eps).sqrt();
    x.iter().zip(weight).map(|(x, weight)| x * factor * weight).collect()
}

/// e^x, within 2 units in the last place: x = n ln 2 + r with whole n, Taylor's series of e^r to r^7, times 2^n in two
/// factors. x is clamped to -104 ..= 89 first, where the result is 0 or infinity; NaN stays NaN.
pub fn exp(x: f32) -> f32 {
    if x.is_nan() {
        return x;
    }
    let x = x.clamp(-104.0, 89.0);
    // Rounds to a whole number, half to even: the sum has no room for a fraction.
    let n = x.mul_add(std::f32::consts::LOG2_E, 12_582_912.0) - 12_582_912.0;
    let high = std::f32::consts::LN_2;
    let low = (std::f64::consts::LN_2 - f64::from(high)) as f32;
    let r = n.mul_add(-low, n.mul_add(-high, x));
    let mut p = 1.0f32 / 5040.0;
    for c in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        p = p.mul_add(r, c);
    }
    let n = n as i32;
    p * 2.0f32.powi(n >> 1) * 2.0f32.powi(n - (n >> 1))
}

/// `gate / (1 + exp(-gate)) * up` for one element.
pub fn silu_mul(gate: f32, up: f32) -> f32 {
    gate / (1.0 + exp(0.0 - gate)) * up
}

/// `x + delta * 2^-24`, delta rounded to f32 first.
pub fn add_fixed(x: f32, delta: i64) -> f32 {
    x + delta as f32 / FIXED_ONE
}

/// Rotates the heads of one row by its position: pair (a, b) becomes (a cos - b sin, b cos + a sin), every product and
/// sum rounded. The angle is position * frequency in f32; its f64 cosine and sine, as `libm` has them, are rounded, then
/// multiplied by the magnitude.
pub fn rope(x: &mut [f32], head_dim: usize, position: usize, spec: &RopeSpec) {
    let n_pairs = spec.inv_freq.len();
    for head in x.chunks_exact_mut(head_dim) {
        for (i, inv_freq) in spec.inv_freq.iter().enumerate() {
            let angle = f64::from(position as f32 * inv_freq);
            let (cos, sin) = (libm::cos(angle) as f32 * spec.magnitude, libm::sin(angle) as f32 * spec.magnitude);
            let (at_a, at_b) = match spec.style {
                RopeStyle::Interleaved => (2 * i, 2 * i + 1),
                RopeStyle::Half => (i, i + n_pairs),
            };
            let (a, b) = (head[at_a], head[at_b]);
            head[at_a] = a * cos - b * sin;
            head[at_b] = b * cos + a * sin;
        }
    }
}

/// The largest element and its lowest index; NaN counts as the smallest. `x` is not empty.
pub fn argmax(x: &[f32]) -> (f32, u32) {
    let mut best = 0;
    for (i, v) in x.iter().enumerate() {
        if *v > x[best] || (x[best].is_nan() && !v.is_nan()) {
            best = i;
        }
    }
    (x[best], best as u32)
}

/// How probable each element of a row of logits is beside the largest one, at an inverse temperature: e^((x - largest) *
/// factor); 0 for NaN.
pub fn odds(x: &[f32], largest: f32, factor: f32) -> Vec<f32> {
    let of = |x: f32| match (x - largest) * factor {
        distance if distance > -104.0 => exp(distance),
        _ => 0.0,
    };
    x.iter().map(|&x| if x == largest { 1.0 } else { of(x) }).collect()
}
