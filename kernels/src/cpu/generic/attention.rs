//! Causal attention over the pages of one sequence.
//!
//! For a query and the positions up to its own: scores are dot products summed over the elements of the head in order
//! (fused multiply-add), times the scale; weights are exp(score - largest score); their sum is made in 16 lanes, position
//! p in lane p mod 16, folded as a tree; the weighted values are summed over positions in order (fused multiply-add)
//! and divided by the sum. None of it depends on pages, chunks or other queries.
//!
//! A page holds, for each KV head, the keys as `[position / 16][element][position % 16]` and the values as
//! `[position][element]`, elements padded to a multiple of 16.
#![allow(unsafe_code)]

use std::ops::Range;

use super::{
    super::simd::{LANES, Line, Simd},
    elementwise::{exp, fold_sum, store_part},
    tile::Element,
};

/// Positions whose values are added to all elements before the next ones, up to whole pages: they stay in the first-level cache
/// meanwhile. So far ahead keys and values are fetched, for pieces of pages are too short for the hardware to do it.
const STRETCH: usize = 64;
const CACHE_LINE: usize = 64;

/// Queries of one KV head, and where everything lies. Query v is of row `first_row + v / group`, query head
/// `first_head + v % group`, and sees `start + v / group + 1` positions.
#[derive(Clone)]
pub(crate) struct AttentionTask {
    /// Keys of this KV head in page 0.
    pub keys: *const u8,
    /// Values of this KV head in page 0.
    pub values: *const u8,
    /// Bytes from page to page.
    pub page_bytes: usize,
    /// Pages of the sequence.
    pub blocks: *const u32,
    /// Positions in a page, a multiple of 16.
    pub block_size: usize,
    pub head_dim: usize,
    /// `[n_rows, n_heads, head_dim]`.
    pub q: *const f32,
    /// `[n_rows, n_heads, head_dim]`.
    pub out: *mut f32,
    pub n_heads: usize,
    pub first_row: usize,
    pub first_head: usize,
    pub group: usize,
    pub start: usize,
    pub scale: f32,
    /// Queries of this task.
    pub queries: Range<usize>,
}

impl AttentionTask {
    /// Positions that query `v` sees.
    fn len(&self, v: usize) -> usize {
        self.start + v / self.group + 1
    }

    /// [`STRETCH`] in whole pages.
    fn stretch(&self) -> usize {
        (STRETCH / self.block_size).max(1) * self.block_size
    }

    /// Where query `v`'s vector begins in `q` and `out`.
    fn at(&self, v: usize) -> usize {
        ((self.first_row + v / self.group) * self.n_heads + self.first_head + v % self.group) * self.head_dim
    }
}

/// Elements of scratch that a task needs whose queries see up to `max_len` positions.
pub(crate) fn scratch_len<S: Simd>(head_dim: usize, max_len: usize) -> usize {
    S::QUERIES * (head_dim.next_multiple_of(LANES) + max_len.next_multiple_of(LANES))
}

/// Does a task.
///
/// # Safety
/// The CPU has `S`; pointers are valid for what the task's shapes say, `scratch` for [`scratch_len`]; the blocks lie in the
/// cache and hold the positions; nobody else touches the task's outputs.
#[inline(always)]
pub(crate) unsafe fn attention<S: Simd, E: Element>(task: &AttentionTask, scratch: *mut f32) {
    let mut v = task.queries.start;
    while v < task.queries.end {
        // Shared out evenly: 7 are 4 and 3, not 6 and 1.
        let left = task.queries.end - v;
        let n = left.div_ceil(left.div_ceil(S::QUERIES));
        // SAFETY: the contract above. Arms above `QUERIES` are never taken.
        unsafe {
            match n {
                1 => queries::<S, E, 1>(task, v, scratch),
                2 if S::QUERIES >= 2 => queries::<S, E, 2>(task, v, scratch),
                3 if S::QUERIES >= 3 => queries::<S, E, 3>(task, v, scratch),
                4 if S::QUERIES >= 4 => queries::<S, E, 4>(task, v, scratch),
                5 if S::QUERIES >= 5 => queries::<S, E, 5>(task, v, scratch),
                6 if S::QUERIES >= 6 => queries::<S, E, 6>(task, v, scratch),
                7 if S::QUERIES >= 7 => queries::<S, E, 7>(task, v, scratch),
                8 if S::QUERIES >= 8 => queries::<S, E, 8>(task, v, scratch),
                _ => unreachable!("1 to {} queries at once", S::QUERIES),
            }
        }
        v += n;
    }
}

/// # Safety
/// As [`attention`], for the `R` queries from `first` on.
#[inline(always)]
unsafe fn queries<S: Simd, E: Element, const R: usize>(task: &AttentionTask, first: usize, scratch: *mut f32) {
    let max_len = task.len(first + R - 1);
    let stride = max_len.next_multiple_of(LANES);
    // SAFETY: scratch has room for both.
    let (packed, scores) = unsafe { (scratch, scratch.add(R * task.head_dim.next_multiple_of(LANES))) };
    // SAFETY: the contract above.
    unsafe {
        for r in 0..R {
            let q = task.q.add(task.at(first + r));
            for d in 0..task.head_dim {
                *packed.add(d * R + r) = *q.add(d);
            }
        }
        score::<S, E, R>(task, packed, scores, stride);
        let mut sums = [0.0; R];
        for r in 0..R {
            sums[r] = softmax::<S>(scores.add(r * stride), task.len(first + r));
        }
        // The queries are not needed any more: their place is the sums'.
        let totals = packed;
        let mut from = 0;
        while from < max_len {
            let to = max_len.min(from + task.stretch());
            let mut d = 0;
            while d + S::HEAD_VECTORS * LANES <= task.head_dim.next_multiple_of(LANES) {
                if S::HEAD_VECTORS == 2 {
                    weigh::<S, E, R, 2>(task, first, d, from..to, scores, stride, totals);
                } else {
                    weigh::<S, E, R, 1>(task, first, d, from..to, scores, stride, totals);
                }
                d += S::HEAD_VECTORS * LANES;
            }
            if d < task.head_dim {
                weigh::<S, E, R, 1>(task, first, d, from..to, scores, stride, totals);
            }
            from = to;
        }
        for r in 0..R {
            for d in (0..task.head_dim).step_by(LANES) {
                let out = task.out.add(task.at(first + r) + d);
                let v = S::div(S::load(totals.add(d * R + r * LANES)), S::splat(sums[r]));
                match task.head_dim - d {
                    n if n >= LANES => S::store(out, v),
                    n => store_part::<S>(out, v, n),
                }
            }
        }
    }
}

/// Where the page lies that holds position `at`, or the last page before `end`.
///
/// # Safety
/// As [`attention`]; the sequence has `end` positions, at least one.
#[inline(always)]
unsafe fn page_at(task: &AttentionTask, at: usize, end: usize) -> usize {
    // SAFETY: the contract above.
    unsafe { *task.blocks.add(at.min(end - 1) / task.block_size) as usize * task.page_bytes }
}

/// Scores of all positions below `stride`; those that a query does not see are overwritten by [`softmax`].
///
/// # Safety
/// As [`attention`].
#[inline(always)]
unsafe fn score<S: Simd, E: Element, const R: usize>(
    task: &AttentionTask,
    packed: *const f32,
    scores: *mut f32,
    stride: usize,
) {
    let vector = E::BYTES * LANES;
    let mut position = 0;
    while position < stride {
        // SAFETY: the contract above; positions below `stride` are in pages that hold a visible position.
        unsafe {
            let keys = task.keys.add(page_at(task, position, stride));
            let ahead = task.keys.wrapping_add(page_at(task, position + task.stretch(), stride));
            let n = task.block_size.min(stride - position) / LANES;
            for i in 0..n {
                let (from, mut acc) = (i * task.head_dim * vector, [S::splat(0.0); R]);
                for d in 0..task.head_dim {
                    let at = from + d * vector;
                    if at.is_multiple_of(CACHE_LINE) {
                        S::prefetch(ahead.wrapping_add(at));
                    }
                    let k = E::load::<S>(keys.add(at));
                    for r in 0..R {
                        acc[r] = S::fma(S::splat(*packed.add(d * R + r)), k, acc[r]);
                    }
                }
                for r in 0..R {
                    let to = scores.add(r * stride + position + i * LANES);
                    S::store(to, S::mul(acc[r], S::splat(task.scale)));
                }
            }
            position += n * LANES;
        }
    }
}

/// Makes weights of the first `len` scores; returns their sum. Scores up to the next multiple of 16 become 0.
///
/// # Safety
/// The CPU has `S`; `scores` is valid for `len` elements, rounded up to a multiple of 16.
#[inline(always)]
unsafe fn softmax<S: Simd>(scores: *mut f32, len: usize) -> f32 {
    let end = len.next_multiple_of(LANES);
    // SAFETY: the contract above.
    unsafe {
        for p in len..end {
            *scores.add(p) = f32::NEG_INFINITY;
        }
        let mut largest = S::splat(f32::NEG_INFINITY);
        for p in (0..end).step_by(LANES) {
            largest = S::max(S::load(scores.add(p)), largest);
        }
        let mut lanes = Line([0.0f32; LANES]);
        S::store(lanes.0.as_mut_ptr(), largest);
        let largest = lanes.0.iter().fold(f32::NEG_INFINITY, |a, &b| if b > a { b } else { a });
        let mut sums = S::splat(0.0);
        for p in (0..end).step_by(LANES) {
            let weight = exp::<S>(S::sub(S::load(scores.add(p)), S::splat(largest)));
            S::store(scores.add(p), weight);
            sums = S::add(sums, weight);
        }
        S::store(lanes.0.as_mut_ptr(), sums);
        fold_sum(lanes.0)
    }
}

/// Adds the weighted values of some positions to the totals, `[head_dim / 16][R][16]`: elements `d .. d + 16 V` of the head.
/// From position 0 on, they are set.
///
/// # Safety
/// As [`attention`]; `d + 16 (V - 1) < head_dim`; the positions begin with a page and end with one or at the last query's.
#[inline(always)]
unsafe fn weigh<S: Simd, E: Element, const R: usize, const V: usize>(
    task: &AttentionTask,
    first: usize,
    d: usize,
    positions: Range<usize>,
    weights: *const f32,
    stride: usize,
    totals: *mut f32,
) {
    let row_bytes = task.head_dim.next_multiple_of(LANES) * E::BYTES;
    let (min_len, max_len) = (task.len(first), task.len(first + R - 1));
    // SAFETY: the contract above. Queries ascend by row, so each sees at least the positions that the first one sees.
    unsafe {
        let totals = totals.add(d * R);
        let mut acc = [[S::splat(0.0); V]; R];
        if positions.start > 0 {
            for r in 0..R {
                for j in 0..V {
                    acc[r][j] = S::load(totals.add((j * R + r) * LANES));
                }
            }
        }
        let mut position = positions.start;
        while position < positions.end {
            let values = task.values.add(page_at(task, position, max_len) + d * E::BYTES);
            let ahead = task.values.wrapping_add(page_at(task, position + task.stretch(), max_len) + d * E::BYTES);
            let n = task.block_size.min(positions.end - position);
            let n_shared = n.min(min_len.saturating_sub(position));
            for i in 0..n_shared {
                let mut v = [S::splat(0.0); V];
                for (j, v) in v.iter_mut().enumerate() {
                    let at = i * row_bytes + j * LANES * E::BYTES;
                    if (d * E::BYTES + at).is_multiple_of(CACHE_LINE) {
                        S::prefetch(ahead.wrapping_add(at));
                    }
                    *v = E::load::<S>(values.add(at));
                }
                for r in 0..R {
                    let w = S::splat(*weights.add(r * stride + position + i));
                    for j in 0..V {
                        acc[r][j] = S::fma(w, v[j], acc[r][j]);
                    }
                }
            }
            // What a query does not see may hold anything, so it is not even multiplied by 0.
            for i in n_shared..n {
                for r in 0..R {
                    if position + i < task.len(first + r) {
                        let w = S::splat(*weights.add(r * stride + position + i));
                        for j in 0..V {
                            let v = E::load::<S>(values.add(i * row_bytes + j * LANES * E::BYTES));
                            acc[r][j] = S::fma(w, v, acc[r][j]);
                        }
                    }
                }
            }
            position += n;
        }
        for r in 0..R {
            for j in 0..V {
                S::store(totals.add((j * R + r) * LANES), acc[r][j]);
            }
        }
    }
}
