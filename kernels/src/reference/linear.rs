//! Products of activations and weights.

use crate::ops::{FIXED_ONE, LinearSource, Precision, WeightData};

/// 32 activations as (quants, scale d, scaled sum s): d = a / 127 where a is the largest magnitude, quants =
/// round_half_even(x * (127 / a)), s = d * sum of the quants. If a < 2^-100 all are 0; if any activation is not finite,
/// quants are 0 and d, s are NaN.
pub fn quantize(x: &[f32]) -> (Vec<i32>, f32, f32) {
    let zeros = vec![0; x.len()];
    if x.iter().any(|x| !x.is_finite()) {
        return (zeros, f32::NAN, f32::NAN);
    }
    let a = x.iter().fold(0.0f32, |a, x| a.max(x.abs()));
    if a < 2.0f32.powi(-100) {
        return (zeros, 0.0, 0.0);
    }
    let quants: Vec<i32> = x.iter().map(|x| (x * (127.0 / a)).round_ties_even() as i32).collect();
    let d = a / 127.0;
    let s = d * quants.iter().sum::<i32>() as f32;
    (quants, d, s)
}

/// What quantized activations miss, `x - d * quant` (product rounded, then difference): what a second level quantizes. 0
/// where they are not finite.
fn misses(x: &[f32], quants: &[i32], d: f32) -> Vec<f32> {
    x.iter().zip(quants).map(|(x, q)| if d.is_nan() { 0.0 } else { x - d * *q as f32 }).collect()
}

/// The f32 that a weight stands for: the product of scale and quant is rounded, then the sum with the min.
fn value(data: &WeightData<'_>, at: usize) -> f32 {
    match *data {
        WeightData::F32(w) => w[at],
        WeightData::F16(w) => f32::from(w[at]),
        WeightData::Bf16(w) => f32::from(w[at]),
        WeightData::Q4 { quants, scales, mins } => scales[at / 32] * f32::from(quants[at]) + mins[at / 32],
        WeightData::Q8 { quants, group, scales, mins } => {
            let product = scales[at / group] * f32::from(quants[at]);
            mins.map_or(product, |mins| product + mins[at / group])
        }
    }
}

/// Sum of the products of one row of activations and the inputs `from .. to` of one row of weights, from 0, input by
/// input or group by group.
fn sum(x: &[f32], source: &LinearSource<'_>, precision: Precision, row: usize, from: usize, to: usize) -> f32 {
    let at = |k: usize| row * source.n_in + k;
    let mut acc = 0.0f32;
    let (group, quant): (usize, &dyn Fn(usize) -> i32) = match (&source.data, precision) {
        (WeightData::Q4 { quants, .. }, Precision::Auto) => (32, &|k| i32::from(quants[at(k)])),
        (WeightData::Q8 { quants, group, .. }, Precision::Auto) => (*group, &|k| i32::from(quants[at(k)])),
        _ => {
            for (k, x) in (from..to).zip(&x[from..to]) {
                acc = value(&source.data, at(k)).mul_add(*x, acc);
            }
            return acc;
        }
    };
    for k32 in (from..to).step_by(32) {
        let mut rest = x[k32..k32 + 32].to_vec();
        for _level in 0..source.activations.count() {
            let (x_quants, d_x, s_x) = quantize(&rest);
            for k in (k32..k32 + 32).step_by(group) {
                let isum: i32 = (0..group).map(|i| quant(k + i) * x_quants[k + i - k32]).sum();
                let (d_w, m_w) = match source.data {
                    WeightData::Q4 { scales, mins, .. } => (scales[at(k) / 32], Some(mins[at(k) / 32])),
                    WeightData::Q8 { scales, mins, .. } => {
                        (scales[at(k) / group], mins.map(|mins| mins[at(k) / group]))
                    }
                    WeightData::F32(_) | WeightData::F16(_) | WeightData::Bf16(_) => (1.0, None),
                };
                acc = (d_w * d_x).mul_add(isum as f32, acc);
                if let Some(m_w) = m_w {
                    acc = m_w.mul_add(s_x, acc);
                }
            }
            rest = misses(&rest, &x_quants, d_x);
        }
    }
    acc
}

/// `[n_rows, n_out]`: sums over all inputs, plus the bias. `x`: `[n_rows, n_in]`.
pub fn linear(x: &[f32], n_rows: usize, source: &LinearSource<'_>, precision: Precision) -> Vec<f32> {
    let mut out = Vec::new();
    for r in 0..n_rows {
        let x = &x[r * source.n_in..][..source.n_in];
        for row in 0..source.n_out {
            let sum = sum(x, source, precision, row, 0, source.n_in);
            out.push(source.bias.map_or(sum, |bias| sum + bias[row]));
        }
    }
    out
}

/// A float as a count of 2^-24, rounded half to even; clamped to 2^51 counts either way, NaN being the lower bound.
pub fn to_fixed(v: f32) -> i64 {
    let limit = 2.0f32.powi(51);
    let v = v * FIXED_ONE;
    if v.is_nan() { -(1 << 51) } else { v.clamp(-limit, limit).round_ties_even() as i64 }
}

/// `[n_rows, n_out]`: sums over each slice of inputs, as fixed-point numbers, added (wrapping); the bias counts as
/// one more slice.
pub fn linear_exact(x: &[f32], n_rows: usize, source: &LinearSource<'_>, precision: Precision) -> Vec<i64> {
    let width = source.slice_width.unwrap_or(source.n_in);
    let mut out = Vec::new();
    for r in 0..n_rows {
        let x = &x[r * source.n_in..][..source.n_in];
        for row in 0..source.n_out {
            let slices = (0..source.n_in).step_by(width);
            let fixed = slices.map(|from| to_fixed(sum(x, source, precision, row, from, from + width)));
            let bias = source.bias.map_or(0, |bias| to_fixed(bias[row]));
            out.push(fixed.fold(bias, i64::wrapping_add));
        }
    }
    out
}

/// `[ids.len(), n_in]`: bits of the rows' values; zeros for `u32::MAX`.
pub fn embed(source: &LinearSource<'_>, ids: &[u32]) -> Vec<i64> {
    let row = |id: u32| {
        (0..source.n_in).map(move |k| match id {
            u32::MAX => 0,
            id => i64::from(value(&source.data, id as usize * source.n_in + k).to_bits()),
        })
    };
    ids.iter().flat_map(|&id| row(id)).collect()
}
