//! Attention and the paged cache.

use super::*;
use crate::{
    ops::{Attention, KvShape, RowChunk, StepRows},
    reference::{self, Sequence},
};

/// A sequence with its tensors, `[n, heads, head_dim]`.
pub(super) struct Case {
    n_heads: usize,
    kv_head_of: Vec<u32>,
    n_kv_heads: usize,
    head_dim: usize,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
}

const SCALE: f32 = 0.3;
const BLOCK: usize = 16;
const N_BLOCKS: usize = 40;

impl Case {
    pub(super) fn random(
        random: &mut Random,
        n: usize,
        kv_head_of: &[u32],
        n_kv_heads: usize,
        head_dim: usize,
    ) -> Self {
        let n_heads = kv_head_of.len();
        Self {
            n_heads,
            kv_head_of: kv_head_of.to_vec(),
            n_kv_heads,
            head_dim,
            q: random.floats(n * n_heads * head_dim),
            k: random.floats(n * n_kv_heads * head_dim),
            v: random.floats(n * n_kv_heads * head_dim),
        }
    }

    pub(super) fn shape(&self) -> KvShape {
        KvShape {
            n_layers: 2,
            n_blocks: N_BLOCKS,
            block_size: BLOCK,
            n_kv_heads: self.n_kv_heads,
            head_dim: self.head_dim,
        }
    }

    fn reference(&self, precision: Precision) -> Vec<f32> {
        let head = |values: &[f32], n_heads: usize, head: usize| -> Vec<f32> {
            let row = n_heads * self.head_dim;
            values.chunks_exact(row).flat_map(|r| &r[head * self.head_dim..][..self.head_dim]).copied().collect()
        };
        let mut out = Vec::new();
        for (row, q) in self.q.chunks_exact(self.n_heads * self.head_dim).enumerate() {
            for (q, &kv) in q.chunks_exact(self.head_dim).zip(&self.kv_head_of) {
                let keys = head(&self.k, self.n_kv_heads, kv as usize);
                let values = head(&self.v, self.n_kv_heads, kv as usize);
                let sequence = Sequence { keys: &keys, values: &values, precision };
                out.extend(reference::attention(q, sequence, row + 1, SCALE));
            }
        }
        out
    }

    /// Runs rows `from .. to` in one step, other sequences' rows beside them; returns their outputs.
    pub(super) fn step(
        &self,
        ops: &mut CpuOps,
        from: usize,
        to: usize,
        blocks: &[u32],
        beside: Option<(usize, &[u32])>,
    ) -> Vec<f32> {
        let (kv_width, width) = (self.n_kv_heads * self.head_dim, self.n_heads * self.head_dim);
        let mut chunks = vec![RowChunk { first_row: 0, n_rows: to - from, start: from, blocks: blocks.to_vec() }];
        let mut rows: Vec<usize> = (from..to).collect();
        if let Some((n_rows, blocks)) = beside {
            chunks.insert(0, RowChunk { first_row: 0, n_rows, start: 0, blocks: blocks.to_vec() });
            chunks[1].first_row = n_rows;
            rows.splice(0..0, (0..n_rows).rev());
        }
        let take = |values: &[f32], width: usize| -> Vec<f32> {
            rows.iter().flat_map(|r| &values[r * width..][..width]).copied().collect()
        };
        ops.begin_step(&StepRows { chunks }).expect("valid");
        let q = buffer(ops, &take(&self.q, width));
        let k = buffer(ops, &take(&self.k, kv_width));
        let v = buffer(ops, &take(&self.v, kv_width));
        let out = ops.alloc(rows.len() * width).expect("memory");
        ops.store_kv(1, k, v).expect("valid");
        let attention = Attention { layer: 1, n_heads: self.n_heads, kv_head_of: &self.kv_head_of, scale: SCALE };
        ops.attention(attention, q, out).expect("valid");
        floats(ops, out, rows.len() * width).split_off((rows.len() - (to - from)) * width)
    }
}

/// Fills a layer with NaN: whatever an operation reads without having been written shows.
fn poison(ops: &mut CpuOps) {
    let layer = ops.kv.as_mut().expect("allocated").layer_mut(1).expect("two layers");
    layer.fill(0xff);
}

#[test]
fn attention_equals_the_reference_however_rows_are_cut() {
    let mut random = Random(1);
    let cases = [
        (1, vec![0], 1, 16),
        (5, vec![0, 0, 1], 2, 8),
        (37, vec![0, 0, 0, 1, 1, 1], 2, 64),
        (50, vec![0, 1, 1, 1, 1, 1, 1, 1, 1, 1], 2, 40),
        (33, vec![0, 1, 2], 3, 48),
    ];
    for (n, kv_head_of, n_kv_heads, head_dim) in cases {
        let case = Case::random(&mut random, n, &kv_head_of, n_kv_heads, head_dim);
        for precision in [Precision::Auto, Precision::Float32] {
            let want = case.reference(precision);
            for threads in 1..=3 {
                for ops in &mut devices(precision, threads) {
                    let what = format!("{} {precision:?} {n}x{kv_head_of:?}x{head_dim}", ops.name());
                    for (chunk, blocks, beside) in [
                        (n, [0, 1, 2, 3], None),
                        (1, [7, 3, 39, 0], None),
                        (7, [20, 2, 1, 5], Some((n.min(20), [30, 31]))),
                        (16, [3, 2, 1, 0], Some((1, [30, 31]))),
                    ] {
                        ops.alloc_kv(case.shape()).expect("memory");
                        poison(ops);
                        let mut got = Vec::new();
                        for from in (0..n).step_by(chunk) {
                            let to = n.min(from + chunk);
                            let beside = beside.as_ref().map(|(n, blocks)| (*n, blocks.as_slice()));
                            got.extend(case.step(ops, from, to, &blocks, beside));
                        }
                        assert_same(&got, &want, &format!("{what}, chunks of {chunk}"));
                    }
                }
            }
        }
    }
}

#[test]
fn attention_is_near_that_of_doubles() {
    let mut random = Random(2);
    let case = Case::random(&mut random, 60, &[0, 0], 1, 32);
    let ops = &mut CpuOps::new(CpuConfig::new(Precision::Float32)).expect("cpu");
    ops.alloc_kv(case.shape()).expect("memory");
    let got = case.step(ops, 0, 60, &[4, 3, 2, 1], None);
    let row = |values: &[f32], i: usize| values[i * 32..][..32].iter().map(|v| f64::from(*v)).collect::<Vec<f64>>();
    for query in 0..120 {
        let q = row(&case.q, query);
        let weights: Vec<f64> = (0..=query / 2)
            .map(|p| row(&case.k, p).iter().zip(&q).map(|(k, q)| k * q).sum::<f64>() * f64::from(SCALE))
            .map(f64::exp)
            .collect();
        let sum: f64 = weights.iter().sum();
        for (d, got) in row(&got, query).into_iter().enumerate() {
            let want: f64 = weights.iter().enumerate().map(|(p, w)| w * row(&case.v, p)[d]).sum::<f64>() / sum;
            assert!((got - want).abs() < 2e-6, "query {query} element {d}: got {got}, want {want}");
        }
    }
}

/// Stretches of positions are whole pages, whatever a page holds.
#[test]
fn pages_of_any_size_hold_the_same() {
    let mut random = Random(4);
    let n = 300;
    let case = Case::random(&mut random, n, &[0, 0, 0], 1, 32);
    let want = case.reference(Precision::Auto);
    for block_size in [16, 48, 80, 256] {
        let n_blocks = n.div_ceil(block_size);
        let blocks: Vec<u32> = (0..n_blocks as u32).rev().collect();
        for ops in &mut devices(Precision::Auto, 1) {
            ops.alloc_kv(KvShape { n_blocks, block_size, ..case.shape() }).expect("memory");
            poison(ops);
            let mut got = case.step(ops, 0, n - 1, &blocks, None);
            got.extend(case.step(ops, n - 1, n, &blocks, None));
            assert_same(&got, &want, &format!("{} pages of {block_size}", ops.name()));
        }
    }
}

#[test]
fn long_sequences_use_every_page() {
    let mut random = Random(3);
    let n = N_BLOCKS * BLOCK;
    let case = Case::random(&mut random, n, &[0], 1, 16);
    let want = case.reference(Precision::Auto);
    let blocks: Vec<u32> = (0..N_BLOCKS as u32).map(|b| b * 7 % N_BLOCKS as u32).collect();
    for ops in &mut devices(Precision::Auto, 2) {
        ops.alloc_kv(case.shape()).expect("memory");
        assert_same(&case.step(ops, 0, n, &blocks, None), &want, &ops.name());
    }
}
