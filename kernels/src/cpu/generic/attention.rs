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

use super::{
    super::simd::{LANES, Line, Simd},
    elementwise::{exp, fold_sum, store_part},
    tile::Element,
};

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
    pub queries: std::ops::Range<usize>,
}

impl AttentionTask {
    /// Positions that query `v` sees.
    fn len(&self, v: usize) -> usize {
        self.start + v / self.group + 1
    }

    /// Where query `v`'s vector begins in `q` and `out`.
    fn at(&self, v: usize) -> usize {
        ((self.first_row + v / self.group) * self.n_heads + self.first_head + v % self.group) * self.head_dim
    }
}

/// Elements of scratch that a task needs whose queries see up to `max_len` positions.
pub(crate) fn scratch_len<S: Simd>(head_dim: usize, max_len: usize) -> usize {
    S::ROWS * (head_dim + max_len.next_multiple_of(LANES))
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
        let n = (task.queries.end - v).min(S::ROWS);
        // SAFETY: the contract above. Arms above `ROWS` are never taken.
        unsafe {
            match n {
                1 => queries::<S, E, 1>(task, v, scratch),
                2 if S::ROWS >= 2 => queries::<S, E, 2>(task, v, scratch),
                3 if S::ROWS >= 3 => queries::<S, E, 3>(task, v, scratch),
                4 if S::ROWS >= 4 => queries::<S, E, 4>(task, v, scratch),
                5 if S::ROWS >= 5 => queries::<S, E, 5>(task, v, scratch),
                6 if S::ROWS >= 6 => queries::<S, E, 6>(task, v, scratch),
                7 if S::ROWS >= 7 => queries::<S, E, 7>(task, v, scratch),
                8 if S::ROWS >= 8 => queries::<S, E, 8>(task, v, scratch),
                _ => unreachable!("1 to {} queries at once", S::ROWS),
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
    let (packed, scores) = unsafe { (scratch, scratch.add(R * task.head_dim)) };
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
        let mut d = 0;
        while d + S::HEAD_VECTORS * LANES <= task.head_dim.next_multiple_of(LANES) {
            if S::HEAD_VECTORS == 2 {
                weigh::<S, E, R, 2>(task, first, d, scores, stride, &sums);
            } else {
                weigh::<S, E, R, 1>(task, first, d, scores, stride, &sums);
            }
            d += S::HEAD_VECTORS * LANES;
        }
        if d < task.head_dim {
            weigh::<S, E, R, 1>(task, first, d, scores, stride, &sums);
        }
    }
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
            let page = *task.blocks.add(position / task.block_size) as usize;
            let keys = task.keys.add(page * task.page_bytes);
            let n = task.block_size.min(stride - position) / LANES;
            for i in 0..n {
                let keys = keys.add(i * task.head_dim * vector);
                let mut acc = [S::splat(0.0); R];
                for d in 0..task.head_dim {
                    let k = E::load::<S>(keys.add(d * vector));
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

/// Weighted values of the elements `d .. d + 16 V` of the head.
///
/// # Safety
/// As [`attention`]; `d + 16 (V - 1) < head_dim`.
#[inline(always)]
unsafe fn weigh<S: Simd, E: Element, const R: usize, const V: usize>(
    task: &AttentionTask,
    first: usize,
    d: usize,
    weights: *const f32,
    stride: usize,
    sums: &[f32; R],
) {
    let row_bytes = task.head_dim.next_multiple_of(LANES) * E::BYTES;
    let (min_len, max_len) = (task.len(first), task.len(first + R - 1));
    // SAFETY: the contract above. Queries ascend by row, so each sees at least the positions that the first one sees.
    unsafe {
        let mut acc = [[S::splat(0.0); V]; R];
        let mut position = 0;
        while position < max_len {
            let page = *task.blocks.add(position / task.block_size) as usize;
            let values = task.values.add(page * task.page_bytes + d * E::BYTES);
            let n = task.block_size.min(max_len - position);
            let n_shared = n.min(min_len.saturating_sub(position));
            for i in 0..n_shared {
                let mut v = [S::splat(0.0); V];
                for (j, v) in v.iter_mut().enumerate() {
                    *v = E::load::<S>(values.add(i * row_bytes + j * LANES * E::BYTES));
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
                let at = d + j * LANES;
                let out = task.out.add(task.at(first + r) + at);
                let v = S::div(acc[r][j], S::splat(sums[r]));
                match task.head_dim - at {
                    n if n >= LANES => S::store(out, v),
                    n => store_part::<S>(out, v, n),
                }
            }
        }
    }
}
