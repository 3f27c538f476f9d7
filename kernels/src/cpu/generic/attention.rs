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
/// meanwhile. So far ahead keys and values are fetched, for pieces of pages are too short for the hardware to do it: behind the last
/// keys the first values, and behind the last values the first keys of another task.
const STRETCH: usize = 64;
const CACHE_LINE: usize = 64;

/// Vectors that are summed at once for each of `n_queries` queries: 1, 2 or 4, so that there are enough sums to hide the latency of an
/// addition, and no more than registers.
const fn vectors_at_once(n_sums: usize, n_queries: usize) -> usize {
    match n_sums / n_queries {
        0 | 1 => 1,
        2 | 3 => 2,
        _ => 4,
    }
}

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
    /// Keys that will be read when this task is done, as far as anybody knows.
    pub then: NextPages,
}

/// Keys or values of a sequence that are fetched before they are read.
#[derive(Clone, Copy)]
pub(crate) struct NextPages {
    /// Those of the KV head in page 0.
    pub base: *const u8,
    /// Pages of the sequence.
    pub blocks: *const u32,
    /// How many, at least one.
    pub n_pages: usize,
}

impl AttentionTask {
    /// Positions that query `v` sees.
    fn len(&self, v: usize) -> usize {
        self.start + v / self.group + 1
    }

    /// [`STRETCH`] in pages.
    fn stretch_pages(&self) -> usize {
        (STRETCH / self.block_size).max(1)
    }

    /// Where query `v`'s vector begins in `q` and `out`.
    fn at(&self, v: usize) -> usize {
        ((self.first_row + v / self.group) * self.n_heads + self.first_head + v % self.group) * self.head_dim
    }
}

/// Elements from query to query in scratch, with which compilers put all of them in one register: a little more than the largest head, so
/// that neighbours are not in the same set of the cache.
const QUERY_STRIDE: usize = MAX_HEAD_DIM + LANES;
/// The largest head.
pub(crate) const MAX_HEAD_DIM: usize = 1024;

/// Elements of scratch that a task needs whose queries see up to `max_len` positions.
pub(crate) fn scratch_len<S: Simd>(max_len: usize) -> usize {
    S::QUERIES * (QUERY_STRIDE + max_len.next_multiple_of(LANES))
}

/// Does a task.
///
/// # Safety
/// The CPU has `S`; pointers are valid for what the task's shapes say, `scratch` for [`scratch_len`]; the blocks lie in the
/// cache and hold the positions; `then` lists as many blocks as it says; nobody else touches the task's outputs.
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
    let (q, scores) = unsafe { (scratch, scratch.add(R * QUERY_STRIDE)) };
    // SAFETY: the contract above.
    unsafe {
        for r in 0..R {
            q.add(r * QUERY_STRIDE).copy_from_nonoverlapping(task.q.add(task.at(first + r)), task.head_dim);
        }
        score::<S, E, R>(task, q, scores, stride);
        let mut sums = [0.0; R];
        for r in 0..R {
            sums[r] = softmax::<S>(scores.add(r * stride), task.len(first + r));
        }
        // The queries are not needed any more: their place is the sums'.
        let totals = q;
        let (stretch, width) = (task.stretch_pages() * task.block_size, task.head_dim.next_multiple_of(LANES));
        let mut from = 0;
        let mut pages = Pages::new(task, task.values, max_len, task.then);
        while from < max_len {
            let to = max_len.min(from + stretch);
            let mut d = 0;
            while d < width {
                let most = vectors_at_once(S::ATTENTION_SUMS, R).min((width - d) / LANES);
                if most >= 4 {
                    weigh::<S, E, R, 4>(task, first, d, from..to, pages, scores, stride, totals);
                    d += 4 * LANES;
                } else if most >= 2 {
                    weigh::<S, E, R, 2>(task, first, d, from..to, pages, scores, stride, totals);
                    d += 2 * LANES;
                } else {
                    weigh::<S, E, R, 1>(task, first, d, from..to, pages, scores, stride, totals);
                    d += LANES;
                }
            }
            pages.next += task.stretch_pages();
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

/// Keys or values in the pages of a sequence, one page after another.
#[derive(Clone, Copy)]
struct Pages {
    /// Those of the KV head in page 0.
    base: *const u8,
    blocks: *const u32,
    page_bytes: usize,
    next: usize,
    n_pages: usize,
    /// How far ahead pages are fetched.
    ahead: usize,
    /// What is fetched behind the last page.
    then: NextPages,
}

impl Pages {
    /// Of a sequence of `n_positions`, at least one.
    #[inline(always)]
    fn new(task: &AttentionTask, base: *const u8, n_positions: usize, then: NextPages) -> Self {
        let n_pages = n_positions.div_ceil(task.block_size);
        let ahead = task.stretch_pages().min(n_pages);
        Self { base, blocks: task.blocks, page_bytes: task.page_bytes, next: 0, n_pages, ahead, then }
    }

    /// Where the next page lies, and one to be fetched; goes on by one.
    ///
    /// # Safety
    /// As [`attention`]; there is a next page.
    #[inline(always)]
    unsafe fn take(&mut self) -> (*const u8, *const u8) {
        let (page, ahead) = (self.next, self.next + self.ahead);
        self.next += 1;
        // SAFETY: the contract above; blocks below either number of pages are listed, and what lies ahead is only named.
        unsafe {
            let at = self.base.add(*self.blocks.add(page) as usize * self.page_bytes);
            let (base, block) = match ahead.checked_sub(self.n_pages) {
                None => (self.base, *self.blocks.add(ahead)),
                Some(behind) => (self.then.base, *self.then.blocks.add(behind.min(self.then.n_pages - 1))),
            };
            (at, base.wrapping_add(block as usize * self.page_bytes))
        }
    }
}

/// The keys of a sequence, 16 positions after another.
struct Keys {
    pages: Pages,
    /// Bytes of 16 positions.
    vector_bytes: usize,
    page_vectors: usize,
    /// Left in this page.
    left: usize,
    at: *const u8,
    ahead: *const u8,
}

impl Keys {
    /// The next ones, and some to be fetched.
    ///
    /// # Safety
    /// As [`attention`]; there are more.
    #[inline(always)]
    unsafe fn take(&mut self) -> (*const u8, *const u8) {
        if self.left == 0 {
            // SAFETY: the contract above.
            (self.at, self.ahead) = unsafe { self.pages.take() };
            self.left = self.page_vectors;
        }
        let taken = (self.at, self.ahead);
        self.left -= 1;
        self.at = self.at.wrapping_add(self.vector_bytes);
        self.ahead = self.ahead.wrapping_add(self.vector_bytes);
        taken
    }
}

/// Scores of all positions below `stride`; those that a query does not see are overwritten by [`softmax`].
///
/// # Safety
/// As [`attention`].
#[inline(always)]
unsafe fn score<S: Simd, E: Element, const R: usize>(
    task: &AttentionTask,
    q: *const f32,
    scores: *mut f32,
    stride: usize,
) {
    let values = NextPages { base: task.values, blocks: task.blocks, n_pages: stride.div_ceil(task.block_size) };
    let mut keys = Keys {
        pages: Pages::new(task, task.keys, stride, values),
        vector_bytes: task.head_dim * E::BYTES * LANES,
        page_vectors: task.block_size / LANES,
        left: 0,
        at: task.keys,
        ahead: task.keys,
    };
    let mut position = 0;
    while position < stride {
        let to = scores.wrapping_add(position);
        let most = vectors_at_once(S::ATTENTION_SUMS, R).min((stride - position) / LANES);
        // SAFETY: the contract above; positions below `stride` are in pages that hold a visible position.
        unsafe {
            if most >= 4 {
                score_vectors::<S, E, R, 4>(task, q, &mut keys, to, stride);
                position += 4 * LANES;
            } else if most >= 2 {
                score_vectors::<S, E, R, 2>(task, q, &mut keys, to, stride);
                position += 2 * LANES;
            } else {
                score_vectors::<S, E, R, 1>(task, q, &mut keys, to, stride);
                position += LANES;
            }
        }
    }
}

/// Scores of the next `V` times 16 positions.
///
/// # Safety
/// As [`attention`]; there are as many.
#[inline(always)]
unsafe fn score_vectors<S: Simd, E: Element, const R: usize, const V: usize>(
    task: &AttentionTask,
    q: *const f32,
    keys: &mut Keys,
    scores: *mut f32,
    stride: usize,
) {
    // SAFETY: the contract above.
    unsafe {
        let mut from = [(task.keys, task.keys); V];
        for from in &mut from {
            *from = keys.take();
        }
        let mut acc = [[S::splat(0.0); V]; R];
        for d in 0..task.head_dim {
            let at = d * E::BYTES * LANES;
            let mut k = [S::splat(0.0); V];
            for j in 0..V {
                if at.is_multiple_of(CACHE_LINE) {
                    S::prefetch(from[j].1.wrapping_add(at));
                }
                k[j] = E::load::<S>(from[j].0.add(at));
            }
            for r in 0..R {
                let x = S::splat(*q.add(r * QUERY_STRIDE + d));
                for j in 0..V {
                    acc[r][j] = S::fma(x, k[j], acc[r][j]);
                }
            }
        }
        for r in 0..R {
            for j in 0..V {
                S::store(scores.add(r * stride + j * LANES), S::mul(acc[r][j], S::splat(task.scale)));
            }
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
        // Weights of 0 are not computed: a product that is too small for a number takes as long as a hundred others.
        for p in len..end {
            *scores.add(p) = largest;
        }
        let mut sums = S::splat(0.0);
        for p in (0..end).step_by(LANES) {
            let weight = exp::<S>(S::sub(S::load(scores.add(p)), S::splat(largest)));
            S::store(scores.add(p), weight);
            if p + LANES <= len {
                sums = S::add(sums, weight);
            }
        }
        if len < end {
            for p in len..end {
                *scores.add(p) = 0.0;
            }
            sums = S::add(sums, S::load(scores.add(end - LANES)));
        }
        S::store(lanes.0.as_mut_ptr(), sums);
        fold_sum(lanes.0)
    }
}

/// Adds the weighted values of some positions to the totals, `[head_dim / 16][R][16]`: elements `d .. d + 16 V` of the head.
/// From position 0 on, they are set.
///
/// # Safety
/// As [`attention`]; `d + 16 (V - 1) < head_dim`; the positions begin with the next of `pages` and end with a page or at the last
/// query's.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
unsafe fn weigh<S: Simd, E: Element, const R: usize, const V: usize>(
    task: &AttentionTask,
    first: usize,
    d: usize,
    positions: Range<usize>,
    mut pages: Pages,
    weights: *const f32,
    stride: usize,
    totals: *mut f32,
) {
    let row_bytes = task.head_dim.next_multiple_of(LANES) * E::BYTES;
    let min_len = task.len(first);
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
            let (values, ahead) = pages.take();
            let (values, ahead) = (values.add(d * E::BYTES), ahead.wrapping_add(d * E::BYTES));
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
