//! Attention of one query.

use half::f16;

use super::{exp, fold};
use crate::ops::Precision;

/// The keys and values of one KV head at positions 0, 1, 2 and so on, each `[n, head_dim]`, as they were stored.
#[derive(Debug, Clone, Copy)]
pub struct Sequence<'a> {
    /// Keys.
    pub keys: &'a [f32],
    /// Values.
    pub values: &'a [f32],
    /// What the cache rounds them to: f16 in [`Precision::Auto`].
    pub precision: Precision,
}

/// Attention of `q`, `[head_dim]`, to the first `len` positions.
///
/// Scores are summed over elements in order (fused multiply-add), then scaled. Weights are exp(score - largest); they
/// are summed in 16 lanes, position p in lane p mod 16, folded as a tree. Weighted values are summed over positions in
/// order (fused multiply-add), then divided by the sum of the weights.
pub fn attention(q: &[f32], sequence: Sequence<'_>, len: usize, scale: f32) -> Vec<f32> {
    let head_dim = q.len();
    let cached = |v: f32| match sequence.precision {
        Precision::Auto => f16::from_f32(v).to_f32(),
        Precision::Float32 => v,
    };
    let mut weights = Vec::new();
    for key in sequence.keys.chunks_exact(head_dim).take(len) {
        let score = q.iter().zip(key).fold(0.0f32, |acc, (q, k)| q.mul_add(cached(*k), acc));
        weights.push(score * scale);
    }
    let largest = weights.iter().fold(f32::NEG_INFINITY, |a, b| a.max(*b));
    let mut lanes = [0.0f32; 16];
    for (p, weight) in weights.iter_mut().enumerate() {
        *weight = exp(*weight - largest);
        lanes[p % 16] += *weight;
    }
    let sum = fold(lanes);
    let mut out = vec![0.0f32; head_dim];
    for (weight, value) in weights.iter().zip(sequence.values.chunks_exact(head_dim)) {
        for (out, v) in out.iter_mut().zip(value) {
            *out = weight.mul_add(cached(*v), *out);
        }
    }
    out.iter().map(|out| out / sum).collect()
}
