//! Activations as the linear kernels want them.
//!
//! Rows are taken in blocks (see [`Block`]). Within a block of R rows all that one step of the weights meets lies
//! together:
//!
//! - for dense weights (`pack_rows`), a step is one input: R f32. One row alone needs no packing;
//! - for quantized weights (`quantize_row`), a step is 32 inputs: R x 32 i8, R scales d (f32), R products s = d * sum
//!   (f32), and R each of -128 * sum of all 32, of the first 16, of the last 16 quants (i32). With two levels the same
//!   follows for what the first level misses, x - d * quant.
//!
//! **Quantization** of 32 activations: `a` = the largest magnitude. If `a` is below 2^-100, d = 0 and all quants are 0. If
//! any activation is not finite, d is NaN, which makes NaN of every output that meets it. Otherwise d = a / 127,
//! quants = x * (127 / a), rounded half to even, and s = d * (sum of the quants as f32); each step rounded to f32.
#![allow(unsafe_code)]

use super::super::simd::Simd;
use crate::layout::GROUP;

/// Rows that meet each weight together: as many blocks of `Dots::ROWS` as there are, then what is left in powers of two,
/// largest first, so that there are few kernels to compile.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Block {
    pub first_row: usize,
    pub n_rows: usize,
}

impl Block {
    /// Number of blocks of `n_rows` rows; `max` is the largest block.
    pub fn count(n_rows: usize, max: usize) -> usize {
        n_rows / max + (n_rows % max).count_ones() as usize
    }

    /// Block number `index` (below the count) of `n_rows` rows.
    pub fn new(n_rows: usize, max: usize, index: usize) -> Self {
        let (n_full, mut rest) = (n_rows / max, n_rows % max);
        if index < n_full {
            return Self { first_row: index * max, n_rows: max };
        }
        let mut first_row = n_full * max;
        for _ in n_full..index {
            let largest = 1 << rest.ilog2();
            first_row += largest;
            rest -= largest;
        }
        Self { first_row, n_rows: 1 << rest.ilog2() }
    }

    /// The block that row `row` of `n_rows` is in.
    pub fn of_row(n_rows: usize, max: usize, row: usize) -> Self {
        let mut index = (row / max).min(n_rows / max);
        loop {
            let block = Self::new(n_rows, max, index);
            if row < block.first_row + block.n_rows {
                return block;
            }
            index += 1;
        }
    }
}

/// Bytes of one row in one step of quantized activations.
pub(crate) const QUANT_ROW_BYTES: usize = GROUP + 5 * 4;

/// Activations below this magnitude are zero to quantization: 2^-100.
pub(crate) const TINY: f32 = f32::from_bits((127 - 100) << 23);

/// Adding and subtracting it rounds a small f32 to a whole number, which is then in its low bits: 1.5 * 2^23.
pub(crate) const ROUND: f32 = 12_582_912.0;

/// 32 quantized activations.
#[derive(Debug, Clone, Copy)]
pub(crate) struct QuantGroup {
    pub quants: [i8; GROUP],
    pub scale: f32,
    /// Sums of the first and last 16 quants.
    pub sums: [i32; 2],
}

impl QuantGroup {
    /// Where activations are all below [`TINY`].
    pub const ZERO: Self = Self { quants: [0; GROUP], scale: 0.0, sums: [0; 2] };
    /// Where one is not finite.
    pub const NAN: Self = Self { scale: f32::NAN, ..Self::ZERO };
}

/// Quantizes a group.
#[inline(always)]
pub(crate) fn quantize_group(x: &[f32; GROUP]) -> QuantGroup {
    // Magnitudes order as their bits do, infinity and NaN above all numbers.
    let mut largest = 0;
    for x in x {
        largest = largest.max(x.to_bits() & 0x7fff_ffff);
    }
    let amax = f32::from_bits(largest);
    if !amax.is_finite() {
        return QuantGroup::NAN;
    }
    if amax < TINY {
        return QuantGroup::ZERO;
    }
    let inverse = 127.0 / amax;
    let mut quants = [0; GROUP];
    let mut sums = [0; 2];
    for half in 0..2 {
        let mut sum = 0;
        for i in 0..GROUP / 2 {
            let quant = (x[16 * half + i] * inverse + ROUND).to_bits() as i32 - ROUND.to_bits() as i32;
            quants[16 * half + i] = quant as i8;
            sum += quant;
        }
        sums[half] = sum;
    }
    QuantGroup { quants, scale: amax / 127.0, sums }
}

/// What a quantized group misses of its activations; 0 where they are not finite.
#[inline(always)]
fn residual(x: &[f32; GROUP], group: &QuantGroup) -> [f32; GROUP] {
    if group.scale.is_nan() {
        return [0.0; GROUP];
    }
    let mut rest = [0.0; GROUP];
    for i in 0..GROUP {
        rest[i] = x[i] - group.scale * f32::from(group.quants[i]);
    }
    rest
}

/// Where [`quantize_row`] puts a row.
#[derive(Debug, Clone, Copy)]
pub(crate) struct QuantPlace {
    /// Row in its block.
    pub row: usize,
    /// Rows of the block.
    pub block_rows: usize,
    /// 1 or 2.
    pub n_levels: usize,
}

/// Quantizes a row of `n_groups` groups at `x` into the block at `out`.
///
/// # Safety
/// The CPU has `S`; `x` is valid for `n_groups * 32` f32, `out` for writing `n_groups * block_rows * n_levels * QUANT_ROW_BYTES` bytes and
/// aligned to 4; `row < block_rows`.
#[inline(always)]
pub(crate) unsafe fn quantize_row<S: Simd>(x: *const f32, n_groups: usize, place: QuantPlace, out: *mut u8) {
    for group in 0..n_groups {
        // SAFETY: the contract above: groups, and levels in them, lie one after another.
        unsafe {
            let x = &*x.add(group * GROUP).cast::<[f32; GROUP]>();
            let q = S::quantize(x);
            let first = group * place.n_levels;
            write_group(&q, first, place, out);
            if place.n_levels == 2 {
                write_group(&S::quantize(&residual(x, &q)), first + 1, place, out);
            }
        }
    }
}

/// Writes a group as level `level` of the block at `out`, counted over all its steps.
///
/// # Safety
/// As [`quantize_row`]; there is such a level.
#[inline(always)]
unsafe fn write_group(q: &QuantGroup, level: usize, QuantPlace { row, block_rows, .. }: QuantPlace, out: *mut u8) {
    // SAFETY: the contract above.
    unsafe {
        let step = out.add(level * block_rows * QUANT_ROW_BYTES);
        step.add(row * GROUP).cast::<[i8; GROUP]>().write_unaligned(q.quants);
        let floats = step.add(block_rows * GROUP).cast::<f32>().add(row);
        floats.write(q.scale);
        floats.add(block_rows).write(q.scale * (q.sums[0] + q.sums[1]) as f32);
        let biases = floats.add(2 * block_rows).cast::<i32>();
        biases.write(-128 * (q.sums[0] + q.sums[1]));
        biases.add(block_rows).write(-128 * q.sums[0]);
        biases.add(2 * block_rows).write(-128 * q.sums[1]);
    }
}

/// Interleaves `block_rows` rows of `n_in` f32 at `x`: `out[k * block_rows + row] = x[row * n_in + k]`.
///
/// # Safety
/// `x` is valid for reading and `out` for writing `block_rows * n_in` f32.
#[inline(always)]
pub(crate) unsafe fn pack_rows(x: *const f32, n_in: usize, block_rows: usize, out: *mut f32) {
    for k in 0..n_in {
        for row in 0..block_rows {
            // SAFETY: the contract above.
            unsafe { *out.add(k * block_rows + row) = *x.add(row * n_in + k) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_cover_all_rows_in_order() {
        for max in [1, 2, 4, 8] {
            for n_rows in 1..40 {
                let mut row = 0;
                for index in 0..Block::count(n_rows, max) {
                    let block = Block::new(n_rows, max, index);
                    assert_eq!(block.first_row, row);
                    assert!(block.n_rows <= max && block.n_rows.is_power_of_two());
                    for row in row..row + block.n_rows {
                        assert_eq!(Block::of_row(n_rows, max, row), block);
                    }
                    row += block.n_rows;
                }
                assert_eq!(row, n_rows);
            }
        }
    }
}
