//! Fills a tile: the quants or weights of its steps, and its scales and mins. What lies where: [`super`].

use std::ops::Range;

use half::f16;

use super::{Factors, GROUP, Kind, STEPS_PER_HEAD, Scale, SetValues, TILE, set_at, value};
use crate::ops::WeightData;

/// Fills the weights of one step of a tile whose rows are `rows` of the matrix; `weights` is zeroed.
pub(super) fn pack_step(
    kind: Kind,
    data: &WeightData<'_>,
    n_in: usize,
    rows: Range<usize>,
    step: usize,
    weights: &mut [u8],
) {
    let n_rows = rows.len();
    let first = rows.start * n_in + step * kind.step_width();
    let at = |lane: usize| first + lane * n_in;
    match (kind, *data) {
        (Kind::F32, source) => {
            for (lane, to) in weights.chunks_exact_mut(4).take(n_rows).enumerate() {
                to.copy_from_slice(&value(&source, at(lane)).to_ne_bytes());
            }
        }
        (Kind::F16, WeightData::F16(w)) => {
            for (lane, to) in weights.chunks_exact_mut(2).take(n_rows).enumerate() {
                to.copy_from_slice(&w[at(lane)].to_ne_bytes());
            }
        }
        (Kind::Bf16, WeightData::Bf16(w)) => {
            for (lane, to) in weights.chunks_exact_mut(2).take(n_rows).enumerate() {
                to.copy_from_slice(&w[at(lane)].to_ne_bytes());
            }
        }
        (Kind::Q4(_), WeightData::Q4 { quants, .. }) => {
            for lane in 0..n_rows {
                for (chunk, q) in words(&quants[at(lane)..][..GROUP]).chunks_exact(2).enumerate() {
                    put_word(weights, chunk * TILE + lane, q[0] | q[1] << 4);
                }
            }
        }
        (Kind::Q8(_) | Kind::Q8Min(_) | Kind::Q8Half(_), WeightData::Q8 { quants, .. }) => {
            weights.fill(0x80);
            for lane in 0..n_rows {
                for (chunk, q) in words(bytemuck::cast_slice(&quants[at(lane)..][..GROUP])).iter().enumerate() {
                    put_word(weights, chunk * TILE + lane, q ^ 0x8080_8080);
                }
            }
        }
        (Kind::Q6(_) | Kind::Q6Half(_), WeightData::Q8 { quants, .. }) => {
            for lane in 0..n_rows {
                let mut q = words(bytemuck::cast_slice(&quants[at(lane)..][..GROUP]));
                for q in &mut q {
                    // + 32 in 6 bits flips the sign bit of 6.
                    *q = (*q ^ 0x2020_2020) & 0x3f3f_3f3f;
                }
                for (chunk, q) in q.chunks_exact(2).enumerate() {
                    put_word(weights, chunk * TILE + lane, (q[0] & 0x0f0f_0f0f) | (q[1] & 0x0f0f_0f0f) << 4);
                }
                for (half, q) in q.chunks_exact(4).enumerate() {
                    let high = (0..4).fold(0, |bits, i| bits | (q[i] >> 4 & 0x0303_0303) << (2 * i));
                    put_word(weights, (4 + half) * TILE + lane, high);
                }
            }
        }
        // `Packed::new` derives the kind from the data.
        (
            Kind::F16
            | Kind::Bf16
            | Kind::Q4(_)
            | Kind::Q8(_)
            | Kind::Q8Min(_)
            | Kind::Q8Half(_)
            | Kind::Q6(_)
            | Kind::Q6Half(_),
            _,
        ) => unreachable!("kind {kind:?} is made from other data"),
    }
}

/// A group's quants as words of 4.
fn words(quants: &[u8]) -> [u32; GROUP / 4] {
    bytemuck::pod_read_unaligned(quants)
}

fn put_word(bytes: &mut [u8], index: usize, word: u32) {
    bytes[4 * index..4 * index + 4].copy_from_slice(&word.to_ne_bytes());
}

/// Fills the scales and mins of a tile; those of padding rows stay 0.
pub(super) fn pack_sets(kind: Kind, values: &SetValues<'_>, factors: &Factors, rows: Range<usize>, tile: &mut [u8]) {
    let n_heads = values.n_steps.div_ceil(STEPS_PER_HEAD);
    for step in 0..values.n_steps {
        for set in 0..values.n_sets {
            for (lane, row) in rows.clone().enumerate() {
                match set_at(kind, values.n_steps, step, set, lane) {
                    (Scale::F32, at, _) => {
                        tile[at..at + 4].copy_from_slice(&values.get(row, step, set).to_ne_bytes());
                    }
                    (Scale::F16, at, _) => {
                        let value = f16::from_f32(values.get(row, step, set));
                        tile[at..at + 2].copy_from_slice(&value.to_ne_bytes());
                    }
                    (Scale::Factored, at, factor_at) => {
                        let index = (row * n_heads + step / STEPS_PER_HEAD) * values.n_sets + set;
                        let (factor, numbers) = &factors[index];
                        tile[at] = numbers[step % STEPS_PER_HEAD] as u8;
                        tile[factor_at..factor_at + 4].copy_from_slice(&factor.to_ne_bytes());
                    }
                }
            }
        }
    }
}
