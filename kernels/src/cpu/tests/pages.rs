//! Rows copied out of pages and into others.

use proptest::prelude::*;

use super::{
    super::{kv::KvCache, open_tiles::OpenTiles, pool::Pool},
    attention::Case,
    *,
};
use crate::{
    layout::TILE,
    ops::KvShape,
    pages::{KvPages, row_bytes},
    slots::{KvRange, n_rows},
};

const PRECISIONS: [Precision; 2] = [Precision::Auto, Precision::Float32];

fn range(block: u32, first: u32, n_rows: u32) -> KvRange {
    KvRange { block, first, n_rows }
}

fn read(pages: &mut KvPages, ranges: &[KvRange]) -> Vec<u8> {
    let mut rows = Vec::new();
    pages.read(ranges, &mut rows).expect("in the pages");
    rows
}

#[test]
fn attention_over_copied_pages_has_equal_bits() {
    let mut random = Random(11);
    for (kv_head_of, n_kv_heads, head_dim) in [(vec![0, 0, 1], 2, 8), (vec![0, 1, 2], 3, 40), (vec![0], 1, 64)] {
        let n = 45;
        let case = Case::random(&mut random, n, &kv_head_of, n_kv_heads, head_dim);
        for precision in PRECISIONS {
            for ops in &mut devices(precision, 2) {
                // The last row's attention, with all rows computed here.
                ops.alloc_kv(case.shape()).expect("memory");
                let want = case.step(ops, 0, n, &[5, 3, 8], None).split_off((n - 1) * kv_head_of.len() * head_dim);

                // The same with the rows before it copied to other blocks of other pages, in two goes.
                ops.alloc_kv(case.shape()).expect("memory");
                case.step(ops, 0, n - 1, &[5, 3, 8], None);
                assert_eq!(ops.written_kv().map(crate::slots::SlotSet::len), Some(n - 1));
                let mut pages = KvPages::new(case.shape(), precision).expect("memory");
                for positions in [0..20, 20..n - 1] {
                    let mut rows = Vec::new();
                    let from: Vec<_> = KvRange::of_positions(&[5, 3, 8], positions.clone(), 16).collect();
                    let to: Vec<_> = KvRange::of_positions(&[1, 39, 0], positions, 16).collect();
                    ops.read_kv(&from, &mut rows).expect("in the pages");
                    pages.write(&to, &rows).expect("in the pages");
                }
                assert_eq!(pages.written().len(), n - 1);
                ops.adopt_kv(pages).expect("the device's");
                let got = case.step(ops, n - 1, n, &[1, 39, 0], None);
                assert_same(&got, &want, &format!("{} {precision:?} {kv_head_of:?}x{head_dim}", ops.name()));
            }
        }
    }
}

#[test]
fn what_does_not_fit_is_refused_and_changes_nothing() {
    let shape = KvShape { n_layers: 1, n_blocks: 3, block_size: 16, n_kv_heads: 1, head_dim: 4 };
    for precision in PRECISIONS {
        let mut pages = KvPages::new(shape, precision).expect("memory");
        let row = row_bytes(shape, precision);
        for bad in [range(3, 0, 1), range(0, 16, 1), range(2, 10, 7), range(0, u32::MAX, u32::MAX)] {
            let rows = vec![1; row * bad.n_rows.min(100) as usize];
            assert!(pages.write(&[bad], &rows).is_err(), "{bad:?}");
            assert!(pages.read(&[range(0, 0, 1), bad], &mut Vec::new()).is_err(), "{bad:?}");
        }
        for len in [0, row - 1, row + 1, 2 * row] {
            assert!(pages.write(&[range(0, 0, 1)], &vec![1; len]).is_err());
        }
        assert!(pages.written().is_empty());
        assert!(read(&mut pages, &[range(0, 0, 16), range(1, 0, 16), range(2, 0, 16)]).iter().all(|&byte| byte == 0));
    }
    let other = KvPages::new(shape, Precision::Float32).expect("memory");
    let mut ops = CpuOps::new(CpuConfig::new(Precision::Auto)).expect("cpu");
    assert!(ops.adopt_kv(other).is_err());
    assert!(ops.read_kv(&[range(0, 0, 1)], &mut Vec::new()).is_err());
}

/// Turns until there is nothing to touch.
fn turns(mut prefault: impl FnMut() -> bool) -> usize {
    (0..100).take_while(|_| prefault()).count()
}

#[test]
fn pages_are_touched_ahead_of_what_is_written() {
    let shape = KvShape { n_layers: 3, n_blocks: 40, block_size: 64, n_kv_heads: 2, head_dim: 256 };
    let mut pages = KvPages::new(shape, Precision::Auto).expect("memory");
    assert_eq!(pages.cache.page_bytes(), 128 << 10, "16 of them are a stretch");
    let rows = vec![7; row_bytes(shape, Precision::Auto)];
    assert_eq!(turns(|| pages.cache.prefault(false)), 3, "a stretch of each layer");
    assert_eq!(turns(|| pages.cache.prefault(true)), 0, "and no more before anything is written");

    pages.write(&[range(0, 5, 1)], &rows).expect("in the pages");
    assert_eq!(turns(|| pages.cache.prefault(false)), 0, "half a stretch is left");
    assert_eq!(turns(|| pages.cache.prefault(true)), 3);
    pages.write(&[range(23, 0, 1)], &rows).expect("in the pages");
    assert_eq!(turns(|| pages.cache.prefault(false)), 0, "half a stretch is left of the second");
    pages.write(&[range(24, 0, 1)], &rows).expect("in the pages");
    assert_eq!(turns(|| pages.cache.prefault(false)), 3);
    assert_eq!(turns(|| pages.cache.prefault(true)), 0, "these are all");

    let written = [range(0, 5, 1), range(23, 0, 1), range(24, 0, 1)];
    assert!(read(&mut pages, &written).iter().all(|&byte| byte == 7));
    assert_eq!(pages.written().len(), 3);

    // Pages that were written from elsewhere are as good as touched.
    let mut pages = KvPages::new(shape, Precision::Auto).expect("memory");
    pages.write(&[range(25, 0, 1)], &rows).expect("in the pages");
    assert_eq!(turns(|| pages.cache.prefault(true)), 6, "from the second stretch on");
}

#[test]
fn buffers_are_touched_once() {
    let mut ops = CpuOps::new(CpuConfig::new(Precision::Auto)).expect("cpu");
    let (small, large) = (ops.alloc(1 << 18).expect("memory"), ops.alloc(3 << 18).expect("memory"));
    let fixed = ops.alloc_fixed(5 << 16).expect("memory");
    ops.write(large, 0, &[1.5; 3000]).expect("in the buffer");
    assert_eq!(turns(|| ops.prefault(false)), 0, "steps come first");
    assert_eq!(turns(|| ops.prefault(true)), 4, "6.5 MiB in stretches of 2");
    let mut values = [0.0; 3000];
    ops.read(large, 0, &mut values).expect("in the buffer");
    assert_eq!(values, [1.5; 3000]);
    ops.read(small, 0, &mut values).expect("in the buffer");
    assert_eq!(values, [0.0; 3000]);
    assert!(ops.buffers.fixed("test", fixed, 5 << 16).expect("in the buffer").iter().all(|&sum| sum == 0));
}

#[test]
fn pages_that_nobody_wrote_are_as_good_as_new() {
    let mut ops = CpuOps::new(CpuConfig::new(Precision::Auto)).expect("cpu");
    let shape = KvShape { n_layers: 2, n_blocks: 8, block_size: 16, n_kv_heads: 1, head_dim: 16 };
    ops.alloc_kv(shape).expect("memory");
    assert_eq!(turns(|| ops.prefault(true)), 2);
    let fewer = KvShape { n_blocks: 5, ..shape };
    ops.alloc_kv(fewer).expect("memory");
    assert_eq!(ops.kv_shape(), Some(fewer));
    assert_eq!(turns(|| ops.prefault(true)), 0, "they were touched");

    let is_new = |ops: &mut CpuOps, shape| {
        ops.alloc_kv(shape).expect("memory");
        turns(|| ops.prefault(true)) == 2
    };
    assert!(is_new(&mut ops, KvShape { n_blocks: 9, ..shape }), "more blocks");
    assert!(is_new(&mut ops, KvShape { block_size: 32, n_blocks: 4, ..shape }), "other blocks");
    let mut pages = KvPages::new(shape, Precision::Auto).expect("memory");
    pages.write(&[range(0, 0, 1)], &vec![1; row_bytes(shape, Precision::Auto)]).expect("in the pages");
    ops.adopt_kv(pages).expect("the device's");
    assert!(is_new(&mut ops, shape), "written ones are not new");
    assert!(ops.written_kv().is_some_and(crate::slots::SlotSet::is_empty));
}

proptest! {
    #[test]
    fn rows_read_are_the_rows_written(
        seed in any::<u64>(),
        block_size in prop::sample::select(vec![16usize, 32, 48]),
        (n_layers, n_kv_heads, head_dim) in (1..4usize, 1..4usize, 1..40usize),
        ranges in prop::collection::vec((0..6u32, 0..48u32, 0..48u32), 1..8),
        precision in prop::sample::select(PRECISIONS.to_vec()),
    ) {
        let shape = KvShape { n_layers, n_blocks: 6, block_size, n_kv_heads, head_dim };
        let mut pages = KvPages::new(shape, precision).expect("memory");
        // Ranges of different blocks, cut to the block.
        let mut blocks = std::collections::BTreeSet::new();
        let ranges: Vec<KvRange> = ranges
            .into_iter()
            .filter(|(block, ..)| blocks.insert(*block))
            .map(|(block, first, n)| {
                let first = first % block_size as u32;
                range(block, first, n.min(block_size as u32 - first))
            })
            .collect();
        let mut random = Random(seed);
        let rows: Vec<u8> =
            (0..n_rows(&ranges) * row_bytes(shape, precision)).map(|_| random.below(255) as u8 + 1).collect();
        pages.write(&ranges, &rows).expect("in the pages");
        prop_assert_eq!(&read(&mut pages, &ranges), &rows);
        // Nothing else was written.
        let all: Vec<KvRange> = (0..6).map(|block| range(block, 0, block_size as u32)).collect();
        let n_bytes = read(&mut pages, &all).into_iter().filter(|&byte| byte != 0).count();
        prop_assert_eq!(n_bytes, rows.len());
        prop_assert_eq!(pages.written().len(), n_rows(&ranges));
        // Row by row it is the same as in one go.
        let single: Vec<KvRange> =
            ranges.iter().flat_map(|r| (r.first..r.first + r.n_rows).map(|slot| range(r.block, slot, 1))).collect();
        let mut copy = KvPages::new(shape, precision).expect("memory");
        copy.write(&single, &read(&mut pages, &single)).expect("in the pages");
        prop_assert_eq!(&read(&mut copy, &ranges), &rows);
    }

    #[test]
    fn pages_hold_what_was_written_last_however_few_tiles_may_wait(
        seed in any::<u64>(),
        n_waiting in 0..4usize,
        precision in prop::sample::select(PRECISIONS.to_vec()),
        (n_layers, n_kv_heads, head_dim) in (1..3usize, 1..3usize, 1..20usize),
        // Mostly single rows, one behind the other in a few blocks, as sequences write them.
        writes in prop::collection::vec((0..4u32, 0..32u32, prop::sample::select(vec![1u32, 1, 1, 2, 15, 16, 17, 32])), 1..120),
    ) {
        let shape = KvShape { n_layers, n_blocks: 4, block_size: 32, n_kv_heads, head_dim };
        let row_bytes = row_bytes(shape, precision);
        let mut pages = KvCache::new(shape, precision).expect("memory");
        let mut open = OpenTiles::new(n_waiting * TILE * row_bytes);
        let mut random = Random(seed);
        let mut want = vec![vec![0; row_bytes]; 4 * 32];
        for (block, first, n) in writes {
            let range = range(block, first, n.min(32 - first));
            let rows: Vec<u8> = (0..range.n_rows as usize * row_bytes).map(|_| random.below(256) as u8).collect();
            pages.check_rows(&[range], &rows).expect("in the pages");
            open.write(&mut pages, &[range], &rows);
            // A range of rows holds each head's rows one behind the other, a row all of its heads'.
            let part = row_bytes / (2 * n_layers * n_kv_heads);
            for row in 0..range.n_rows as usize {
                let parts = rows.chunks_exact(part * range.n_rows as usize).map(|rows| &rows[row * part..(row + 1) * part]);
                want[block as usize * 32 + first as usize + row] = parts.flatten().copied().collect();
            }
        }
        open.close_all(&mut pages);
        let single: Vec<KvRange> = (0..4).flat_map(|block| (0..32).map(move |slot| range(block, slot, 1))).collect();
        let mut rows = Vec::new();
        pages.read_rows(&single, &mut rows, &mut Pool::new(1, &[]).expect("no thread")).expect("in the pages");
        prop_assert_eq!(rows, want.concat());
    }
}
