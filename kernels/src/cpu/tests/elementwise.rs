//! Norm, exponential, SiLU, rotation, and the small operations.

use super::*;
use crate::{
    ops::{RopeSpec, RopeStyle, RowChunk, StepRows},
    reference,
};

#[test]
fn exp_is_within_two_units_and_the_same_everywhere() {
    let mut random = Random(1);
    let mut inputs = vec![0.0, -0.0, 88.722_83, 88.722_84, 89.0, 200.0, -87.336_54, -103.97, -104.0, -1e9, 1e-30];
    inputs.extend([f32::INFINITY, f32::NEG_INFINITY, f32::NAN, -103.278_93]);
    inputs.extend((0..40_000).map(|_| random.float() * 104.0));
    inputs.extend((0..40_000).map(|_| random.float()));
    inputs.resize(inputs.len().next_multiple_of(16), 1.0);
    for isa in Isa::available() {
        let exp = super::super::table::table(isa).exp;
        for x in inputs.chunks_exact(16) {
            let x: &[f32; 16] = x.try_into().expect("16");
            // SAFETY: the instruction set is available.
            #[allow(unsafe_code)]
            let got = unsafe { exp(x) };
            assert_same(&got, &x.map(reference::exp), isa.name());
        }
    }
    for &x in &inputs {
        let (got, want) = (reference::exp(x), f64::from(x).exp());
        let rounded = want as f32;
        if rounded.is_finite() {
            let unit = f64::from(rounded.max(f32::MIN_POSITIVE)) * f64::from(f32::EPSILON);
            assert!((f64::from(got) - want).abs() <= 2.0 * unit, "exp({x}): got {got:e}, want {want:e}");
        } else {
            assert_eq!(bits(&[got]), bits(&[rounded]), "exp({x})");
        }
    }
    assert_eq!(reference::exp(f32::NEG_INFINITY), 0.0);
    assert_eq!(reference::exp(0.0), 1.0);
}

#[test]
fn rms_norm_equals_the_reference_and_is_near_doubles() {
    let mut random = Random(2);
    for (n_rows, width) in [(1, 1), (3, 15), (2, 16), (5, 100), (40, 576), (2, 1537)] {
        let (x, weight) = (random.floats(n_rows * width), random.floats(width));
        let want: Vec<f32> = x.chunks_exact(width).flat_map(|x| reference::rms_norm(x, &weight, 1e-5)).collect();
        for isa in Isa::available() {
            let rms_norm = super::super::table::table(isa).rms_norm;
            let mut got = vec![0.0; n_rows * width];
            for (x, got) in x.chunks_exact(width).zip(got.chunks_exact_mut(width)) {
                // SAFETY: the instruction set is available; all have `width` elements.
                #[allow(unsafe_code)]
                unsafe {
                    rms_norm(x.as_ptr(), weight.as_ptr(), 1e-5, got.as_mut_ptr(), width);
                }
            }
            assert_same(&got, &want, isa.name());
        }
        for (row, want) in x.chunks_exact(width).zip(want.chunks_exact(width)) {
            let mean = row.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / width as f64;
            for ((x, w), want) in row.iter().zip(&weight).zip(want) {
                let oracle = f64::from(*x) / (mean + 1e-5).sqrt() * f64::from(*w);
                assert!((f64::from(*want) - oracle).abs() <= 1e-6 * oracle.abs() + 1e-12);
            }
        }
    }
}

#[test]
fn silu_mul_equals_the_reference() {
    let mut random = Random(3);
    for len in [1, 16, 31, 1000, 40_000] {
        let (mut gate, up) = (random.wild(len), random.floats(len));
        gate[0] = [f32::NEG_INFINITY, f32::INFINITY, f32::NAN, -100.0, 1e30][len % 5];
        let want: Vec<f32> = gate.iter().zip(&up).map(|(&g, &u)| reference::silu_mul(g, u)).collect();
        for isa in Isa::available() {
            let silu_mul = super::super::table::table(isa).silu_mul;
            let mut got = vec![0.0; len];
            // SAFETY: the instruction set is available; all have `len` elements.
            #[allow(unsafe_code)]
            unsafe {
                silu_mul(gate.as_ptr(), up.as_ptr(), got.as_mut_ptr(), len);
            }
            assert_same(&got, &want, isa.name());
        }
    }
}

#[test]
fn rope_equals_the_reference() {
    let mut random = Random(4);
    let chunks = [(0, 3, 0), (3, 1, 4097), (4, 5, 30)].map(|(first_row, n_rows, start)| RowChunk {
        first_row,
        n_rows,
        start,
        blocks: Vec::new(),
    });
    let positions: Vec<usize> = chunks.iter().flat_map(|c| c.start..c.start + c.n_rows).collect();
    let step = StepRows { chunks: chunks.to_vec() };
    for style in [RopeStyle::Half, RopeStyle::Interleaved] {
        for (n_heads, head_dim, rotary, magnitude) in [(1, 2, 2, 1.0), (3, 16, 16, 1.0), (2, 80, 20, 1.25)] {
            let inv_freq = (0..rotary / 2).map(|i| 10_000f32.powf(-2.0 * i as f32 / rotary as f32)).collect();
            let spec = RopeSpec { style, inv_freq, magnitude };
            let width = n_heads * head_dim;
            let x = random.floats(positions.len() * width);
            let mut want = x.clone();
            let few = random.floats(positions.len() * head_dim);
            let mut want_few = few.clone();
            let rows = want.chunks_exact_mut(width).zip(want_few.chunks_exact_mut(head_dim));
            for ((row, few), &position) in rows.zip(&positions) {
                reference::rope(row, head_dim, position, &spec);
                reference::rope(few, head_dim, position, &spec);
            }
            for ops in &mut devices(Precision::Auto, 2) {
                let rope = ops.load_rope(&spec).expect("valid");
                ops.begin_step(&step).expect("valid");
                for _ in 0..2 {
                    let x = buffer(ops, &x);
                    let fewer = buffer(ops, &few);
                    ops.rope(&[(x, n_heads), (fewer, 1)], head_dim, rope).expect("valid");
                    assert_same(&floats(ops, x, want.len()), &want, &ops.name());
                    assert_same(&floats(ops, fewer, want_few.len()), &want_few, &ops.name());
                }
                // Another step has other angles.
                ops.begin_step(&StepRows { chunks: vec![RowChunk { start: 1, n_rows: 1, ..chunks[0].clone() }] })
                    .expect("valid");
                let row = buffer(ops, &x[..width]);
                ops.rope(&[(row, n_heads)], head_dim, rope).expect("valid");
                let mut want = x[..width].to_vec();
                reference::rope(&mut want, head_dim, 1, &spec);
                assert_same(&floats(ops, row, width), &want, &ops.name());
            }
        }
    }
}

#[test]
fn argmax_takes_the_first_of_the_largest_and_ranks_nan_last() {
    let nan = f32::NAN;
    let mut random = Random(5);
    let mut rows = vec![
        vec![1.0],
        vec![nan; 40],
        [vec![nan; 20], vec![f32::NEG_INFINITY; 20]].concat(),
        [vec![nan, 2.0], vec![1.0; 30], vec![2.0, nan]].concat(),
        [vec![0.0; 17], vec![f32::INFINITY, nan, f32::INFINITY]].concat(),
    ];
    rows.extend((1..60).map(|n| (0..n).map(|_| random.below(9) as f32).collect()));
    for row in rows {
        let want = reference::argmax(&row);
        for ops in &mut devices(Precision::Auto, 2) {
            let x = buffer(ops, &[row.clone(), row.clone()].concat());
            let mut got = [(0.0, 0); 2];
            ops.argmax(x, 2, row.len(), &mut got).expect("valid");
            for (value, at) in got {
                assert_eq!((bits(&[value]), at), (bits(&[want.0]), want.1), "{} {row:?}", ops.name());
            }
        }
    }
}

#[test]
fn fixed_sums_are_added_rounded_once_to_f32() {
    let mut random = Random(6);
    let len = 20_001;
    let x = random.wild(len);
    let delta: Vec<i64> = (0..len).map(|_| random.next() as i64 >> random.below(60)).collect();
    let want: Vec<f32> = x.iter().zip(&delta).map(|(&x, &delta)| reference::add_fixed(x, delta)).collect();
    for ops in &mut devices(Precision::Auto, 2) {
        let (x, fixed) = (buffer(ops, &x), ops.alloc_fixed(len).expect("memory"));
        ops.buffers.fixed("test", fixed, len).expect("in bounds").copy_from_slice(&delta);
        ops.add_reduced(x, fixed, len, &mut *alone()).expect("valid");
        assert_same(&floats(ops, x, len), &want, &ops.name());
    }
}

#[test]
fn rows_are_gathered_and_buffers_read_and_written() {
    for ops in &mut devices(Precision::Auto, 1) {
        let src = buffer(ops, &(0..12).map(|i| i as f32).collect::<Vec<_>>());
        let dst = ops.alloc(9).expect("memory");
        ops.gather_rows(src, &[3, 0, 3], 3, dst).expect("valid");
        assert_eq!(floats(ops, dst, 9), [9.0, 10.0, 11.0, 0.0, 1.0, 2.0, 9.0, 10.0, 11.0]);
        ops.write(dst, 4, &[-1.0, -2.0]).expect("in bounds");
        assert_eq!(floats(ops, dst, 9), [9.0, 10.0, 11.0, 0.0, -1.0, -2.0, 9.0, 10.0, 11.0]);
        let mut two = [0.0; 2];
        ops.read(dst, 7, &mut two).expect("in bounds");
        assert_eq!(two, [10.0, 11.0]);
    }
}

#[test]
fn odds_equal_the_reference() {
    let (inf, nan) = (f32::INFINITY, f32::NAN);
    let mut random = Random(8);
    for len in [0, 1, 15, 16, 17, 1000] {
        for factor in [1.0, 0.3, 100.0, 1e5] {
            for largest in [7.5, inf] {
                let mut row = random.floats(len);
                row.iter_mut().for_each(|x| *x = *x * 60.0 - 52.5);
                for (x, odd) in row.iter_mut().zip([nan, largest, -inf, -3e38, -96.5, largest]) {
                    *x = odd;
                }
                let want = reference::odds(&row, largest, factor);
                for isa in Isa::available() {
                    let mut got = vec![7.0; 3];
                    RowMath::new(isa).odds(&row, largest, factor, &mut got);
                    assert_same(&got, &want, isa.name());
                }
            }
        }
    }
}

#[test]
fn a_row_without_anything_has_no_largest() {
    let (inf, nan) = (f32::INFINITY, f32::NAN);
    for isa in Isa::available() {
        let math = RowMath::new(isa);
        assert_eq!(math.largest(&[]), None);
        assert_eq!(math.largest(&[nan, -inf]), None);
        assert_eq!(math.largest(&[nan, -2.0, -1.0, -1.0]), Some((-1.0, 2)));
    }
}
