//! Products, exact sums, embedding.

use super::*;
use crate::{
    cpu::{arena::Arena, simd::NARROW_LIMIT},
    layout::Packed,
    reference,
};

pub(super) fn linear(ops: &mut CpuOps, x: &[f32], n_rows: usize, matrix: &Matrix) -> Vec<f32> {
    let weight = ops.load_linear(matrix.source()).expect("valid");
    let (x, out) = (buffer(ops, x), ops.alloc(n_rows * matrix.n_out).expect("memory"));
    ops.linear(x.into(), n_rows, &[(weight, out)]).expect("valid");
    floats(ops, out, n_rows * matrix.n_out)
}

pub(super) fn linear_exact(ops: &mut CpuOps, x: &[f32], n_rows: usize, matrix: &Matrix) -> Vec<i64> {
    let weight = ops.load_linear(matrix.source()).expect("valid");
    let (x, out) = (buffer(ops, x), ops.alloc_fixed(n_rows * matrix.n_out).expect("memory"));
    ops.linear_exact(x.into(), n_rows, weight, out).expect("valid");
    fixed(ops, out, n_rows * matrix.n_out)
}

/// Shapes with and without padding; row counts around every register block.
const SHAPES: [(usize, usize, usize); 10] = [
    (1, 16, 32),
    (2, 33, 64),
    (5, 7, 96),
    (9, 48, 160),
    (16, 1, 32),
    (19, 100, 288),
    (3, 40, 640),
    (37, 20, 128),
    // Unpacked part by part.
    (34, 24, 928),
    (35, 18, 960),
];

#[test]
fn every_kernel_computes_the_bits_of_the_reference() {
    let mut random = Random(1);
    for precision in [Precision::Auto, Precision::Float32] {
        for kind in 0..N_KINDS {
            for (n_rows, n_out, n_in) in SHAPES {
                let mut matrix = Matrix::random(&mut random, kind, n_out, n_in);
                matrix.bias = (n_rows % 2 == 1).then(|| random.floats(n_out));
                matrix.activations = if n_out % 3 == 0 { ActivationLevels::Two } else { ActivationLevels::One };
                let x = random.wild(n_rows * n_in);
                let want = reference::linear(&x, n_rows, &matrix.source(), precision);
                let width = [n_in, 32, 32 * (n_in / 64).max(1)][n_rows % 3];
                let width = if n_in.is_multiple_of(width) { width } else { 32 };
                let slices = Matrix { slice_width: Some(width), ..matrix };
                let want_exact = reference::linear_exact(&x, n_rows, &slices.source(), precision);
                let whole = Matrix { slice_width: None, ..slices.clone() };
                for threads in 1..=3 {
                    for ops in &mut devices(precision, threads) {
                        let what = format!("{} {precision:?} kind {kind} {n_rows}x{n_out}x{n_in}", ops.name());
                        assert_same(&linear(ops, &x, n_rows, &whole), &want, &what);
                        assert_eq!(linear_exact(ops, &x, n_rows, &slices), want_exact, "{what}, exact");
                    }
                }
            }
        }
    }
}

#[test]
fn more_tiles_than_are_done_together_meet_each_part() {
    let mut random = Random(31);
    for (kind, slice_width) in [(4, 32), (11, 320), (14, 64)] {
        let slices = Matrix { slice_width: Some(slice_width), ..Matrix::random(&mut random, kind, 16 * 17 + 3, 960) };
        let x = random.wild(34 * 960);
        let want_exact = reference::linear_exact(&x, 34, &slices.source(), Precision::Auto);
        let whole = Matrix { slice_width: None, ..slices.clone() };
        let want = reference::linear(&x, 34, &whole.source(), Precision::Auto);
        for ops in &mut devices(Precision::Auto, 1) {
            let what = format!("{} kind {kind}", ops.name());
            assert_same(&linear(ops, &x, 34, &whole), &want, &what);
            assert_eq!(linear_exact(ops, &x, 34, &slices), want_exact, "{what}, exact");
        }
    }
}

#[test]
fn dense_weights_take_any_width() {
    let mut random = Random(2);
    for (kind, n_in, slice_width) in [(0, 1, 1), (0, 30, 10), (1, 17, 17), (2, 48, 16), (0, 36, 3)] {
        let mut matrix = Matrix::random(&mut random, kind, 21, n_in);
        let x = random.floats(3 * n_in);
        let want = reference::linear(&x, 3, &matrix.source(), Precision::Auto);
        for ops in &mut devices(Precision::Auto, 1) {
            assert_same(&linear(ops, &x, 3, &matrix), &want, &ops.name());
        }
        matrix.slice_width = Some(slice_width);
        matrix.bias = slice_width.is_multiple_of(2).then(|| random.floats(matrix.n_out));
        let want = reference::linear_exact(&x, 3, &matrix.source(), Precision::Auto);
        for ops in &mut devices(Precision::Auto, 1) {
            assert_eq!(linear_exact(ops, &x, 3, &matrix), want, "{}", ops.name());
        }
    }
}

#[test]
fn extreme_quants_do_not_overflow() {
    let n_in = 64;
    for (weight, activation) in [(-128, -1.0), (-128, 1.0), (127, -1.0), (127, 1.0)] {
        let matrix = Matrix {
            n_out: 16,
            n_in,
            data: Data::Q8 {
                quants: vec![weight; 16 * n_in],
                group: 32,
                scales: vec![1.0; 16 * n_in / 32],
                mins: None,
            },
            bias: None,
            slice_width: None,
            activations: ActivationLevels::One,
        };
        let want = f64::from(weight) * activation * n_in as f64;
        for ops in &mut devices(Precision::Auto, 1) {
            for got in linear(ops, &vec![activation as f32; n_in], 1, &matrix) {
                assert!((f64::from(got) - want).abs() < want.abs() * 1e-6, "{}: got {got}, want {want}", ops.name());
            }
        }
    }
    let matrix = Matrix {
        n_out: 16,
        n_in,
        data: Data::Q4 {
            quants: vec![15; 16 * n_in],
            scales: vec![1.0; 16 * n_in / 32],
            mins: vec![0.0; 16 * n_in / 32],
        },
        bias: None,
        slice_width: None,
        activations: ActivationLevels::One,
    };
    for activation in [-1.0, 1.0] {
        for ops in &mut devices(Precision::Auto, 1) {
            for got in linear(ops, &vec![activation; n_in], 1, &matrix) {
                assert!((got - activation * 15.0 * n_in as f32).abs() < 1e-3, "{}: got {got}", ops.name());
            }
        }
    }
}

#[test]
fn activations_that_are_not_finite_poison_only_their_own_row() {
    let mut random = Random(3);
    for kind in 0..N_KINDS {
        let mut matrix = Matrix::random(&mut random, kind, 20, 64);
        let mut x = random.floats(4 * 64);
        (x[70], x[150], x[151]) = (f32::NAN, f32::INFINITY, f32::MAX);
        matrix.activations = if kind % 2 == 0 { ActivationLevels::Two } else { ActivationLevels::One };
        x[192..224].fill(1e-40);
        let want = reference::linear(&x, 4, &matrix.source(), Precision::Auto);
        assert!(want[20..40].iter().all(|v| v.is_nan()));
        assert!(want[60..].iter().all(|v| v.is_finite()));
        matrix.slice_width = Some(32);
        let want_exact = reference::linear_exact(&x, 4, &matrix.source(), Precision::Auto);
        for ops in &mut devices(Precision::Auto, 1) {
            let what = format!("{} kind {kind}", ops.name());
            assert_same(&linear(ops, &x, 4, &Matrix { slice_width: None, ..matrix.clone() }), &want, &what);
            assert_eq!(linear_exact(ops, &x, 4, &matrix), want_exact, "{what}");
        }
    }
}

#[test]
fn a_row_is_the_same_alone_and_among_others() {
    let mut random = Random(4);
    for kind in 0..N_KINDS {
        let (n_rows, n_out, n_in) = (13, 40, 128);
        let mut matrix = Matrix::random(&mut random, kind, n_out, n_in);
        let x = random.wild(n_rows * n_in);
        for ops in &mut devices(Precision::Auto, 2) {
            matrix.slice_width = None;
            let all = linear(ops, &x, n_rows, &matrix);
            matrix.slice_width = Some(64);
            let all_exact = linear_exact(ops, &x, n_rows, &matrix);
            for r in 0..n_rows {
                let alone = linear(ops, &x[r * n_in..][..n_in], 1, &Matrix { slice_width: None, ..matrix.clone() });
                assert_same(&alone, &all[r * n_out..][..n_out], &ops.name());
                let alone = linear_exact(ops, &x[r * n_in..][..n_in], 1, &matrix);
                assert_eq!(alone, all_exact[r * n_out..][..n_out], "{}", ops.name());
            }
        }
    }
}

#[test]
fn exact_sums_of_parts_add_up_to_the_whole() {
    let mut random = Random(5);
    for kind in 0..N_KINDS {
        let (n_rows, n_in, width) = (3, 192, 32);
        let matrix = Matrix { slice_width: Some(width), ..Matrix::random(&mut random, kind, 24, n_in) };
        let x = random.floats(n_rows * n_in);
        for ops in &mut devices(Precision::Auto, 1) {
            let whole = linear_exact(ops, &x, n_rows, &matrix);
            for cut in [32, 64, 160] {
                let mut part = |from: usize, to: usize| {
                    let x: Vec<f32> = x.chunks_exact(n_in).flat_map(|row| &row[from..to]).copied().collect();
                    linear_exact(ops, &x, n_rows, &matrix.columns(from, to))
                };
                let (left, right) = (part(0, cut), part(cut, n_in));
                let sum: Vec<i64> = left.iter().zip(&right).map(|(a, b)| a + b).collect();
                assert_eq!(sum, whole, "kind {kind} cut at {cut}");
            }
        }
    }
}

#[test]
fn sums_are_near_those_of_doubles() {
    let mut random = Random(6);
    for kind in 0..N_KINDS {
        let (n_out, n_in) = (32, 512);
        let matrix = Matrix { slice_width: Some(64), ..Matrix::random(&mut random, kind, n_out, n_in) };
        let x = random.floats(n_in);
        let ids: Vec<u32> = (0..n_out as u32).collect();
        let weights: Vec<f64> = reference::embed(&matrix.source(), &ids)
            .into_iter()
            .map(|bits| f64::from(f32::from_bits(bits as u32)))
            .collect();
        for precision in [Precision::Auto, Precision::Float32] {
            let ops = &mut CpuOps::new(CpuConfig::new(precision)).expect("cpu");
            let sums = linear(ops, &x, 1, &Matrix { slice_width: None, ..matrix.clone() });
            let exact = linear_exact(ops, &x, 1, &matrix);
            for row in 0..n_out {
                let products = || weights[row * n_in..][..n_in].iter().zip(&x).map(|(w, x)| w * f64::from(*x));
                let want: f64 = products().sum();
                let size: f64 = products().map(f64::abs).sum();
                // Rounding of f32 sums; in the packed case also that of activations to 1/254 of the largest.
                let quantized = precision == Precision::Auto && matrix.is_quantized();
                let near = size * if quantized { 5e-3 } else { 1e-5 };
                assert!((f64::from(sums[row]) - want).abs() < near, "kind {kind}: got {}, want {want}", sums[row]);
                let exact = exact[row] as f64 / f64::from(crate::ops::FIXED_ONE);
                assert!((exact - want).abs() < near + 1e-6, "kind {kind}: got {exact}, want {want}");
            }
        }
    }
}

#[test]
fn several_outputs_equal_single_ones() {
    let mut random = Random(7);
    let n_in = 64;
    let matrices =
        [(3, 20), (0, 48), (6, 5), (1, 16)].map(|(kind, n_out)| Matrix::random(&mut random, kind, n_out, n_in));
    for n_rows in [1, 6, 40] {
        let x = random.floats(n_rows * n_in);
        for threads in 1..=3 {
            for ops in &mut devices(Precision::Auto, threads) {
                let x_buf = buffer(ops, &x);
                let outputs = matrices.each_ref().map(|m| {
                    (ops.load_linear(m.source()).expect("valid"), ops.alloc(n_rows * m.n_out).expect("memory"))
                });
                ops.linear(x_buf.into(), n_rows, &outputs).expect("valid");
                for (matrix, (_, out)) in matrices.iter().zip(outputs) {
                    let got = floats(ops, out, n_rows * matrix.n_out);
                    assert_same(&got, &linear(ops, &x, n_rows, matrix), &ops.name());
                }
            }
        }
    }
}

#[test]
fn rows_are_normed_or_gated_on_their_way() {
    let mut random = Random(8);
    for precision in [Precision::Auto, Precision::Float32] {
        for kind in 0..N_KINDS {
            for (n_rows, n_out, n_in) in SHAPES {
                let matrix = Matrix::random(&mut random, kind, n_out, n_in);
                let (x, y, weight) = (random.floats(n_rows * n_in), random.floats(n_rows * n_in), random.floats(n_in));
                let normed: Vec<f32> =
                    x.chunks_exact(n_in).flat_map(|x| reference::rms_norm(x, &weight, 1e-5)).collect();
                let gated: Vec<f32> = x.iter().zip(&y).map(|(&x, &y)| reference::silu_mul(x, y)).collect();
                let want = [&normed, &gated].map(|x| reference::linear(x, n_rows, &matrix.source(), precision));
                let slices = Matrix { slice_width: Some(n_in), ..matrix.clone() };
                let want_exact =
                    [&normed, &gated].map(|x| reference::linear_exact(x, n_rows, &slices.source(), precision));
                for threads in 1..=3 {
                    for ops in &mut devices(precision, threads) {
                        let what = format!("{} {precision:?} kind {kind} {n_rows}x{n_out}x{n_in}", ops.name());
                        let load = |ops: &mut CpuOps, matrix: &Matrix| ops.load_linear(matrix.source()).expect("valid");
                        let (plain, sliced) = (load(ops, &matrix), load(ops, &slices));
                        let (x, y, weight) = (buffer(ops, &x), buffer(ops, &y), buffer(ops, &weight));
                        let len = n_rows * n_out;
                        let (out, exact) = (ops.alloc(len).expect("memory"), ops.alloc_fixed(len).expect("memory"));
                        let inputs = [Input::Normed { x, weight, eps: 1e-5 }, Input::Gated { gate: x, up: y }];
                        for (input, (want, want_exact)) in inputs.into_iter().zip(want.iter().zip(&want_exact)) {
                            ops.linear(input, n_rows, &[(plain, out)]).expect("valid");
                            assert_same(&floats(ops, out, len), want, &format!("{what} {input:?}"));
                            ops.linear_exact(input, n_rows, sliced, exact).expect("valid");
                            assert_eq!(&fixed(ops, exact, len), want_exact, "{what} {input:?}, exact");
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn fixed_point_conversion_is_the_same_everywhere() {
    let mut values = vec![0.0, -0.0, f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, f32::MIN, 1e-45];
    for exponent in -30..35 {
        for mantissa in [1.0, 1.5, 1.0 + f32::EPSILON, 1.999_999_9, 1.25] {
            values.extend([mantissa * 2.0f32.powi(exponent), -mantissa * 2.0f32.powi(exponent)]);
        }
    }
    // Halves of a unit: to the even side.
    values.extend((-9..9).map(|i| i as f32 * 2.0f32.powi(-25)));
    assert_eq!(reference::to_fixed(3.0 * 2.0f32.powi(-25)), 2);
    assert_eq!(reference::to_fixed(f32::NAN), -(1 << 51));
    assert_eq!(reference::to_fixed(f32::INFINITY), 1 << 51);
    // A column of ones passes the value through: n_in = 1.
    let identity = Matrix {
        n_out: 1,
        n_in: 1,
        data: Data::F32(vec![1.0]),
        bias: None,
        slice_width: Some(1),
        activations: ActivationLevels::One,
    };
    let want: Vec<i64> = values.iter().map(|&v| reference::to_fixed(v)).collect();
    for ops in &mut devices(Precision::Auto, 1) {
        let got = linear_exact(ops, &values, values.len(), &identity);
        assert_eq!(got, want, "{}", ops.name());
    }
}

#[test]
fn slices_whose_sums_are_large_are_added_like_others() {
    // Several times as many slices as are added at once in 32 bits; columns of ones add their numbers.
    let n_in = 40;
    let ones = Matrix {
        n_out: 18,
        n_in,
        data: Data::F32(vec![1.0; 18 * n_in]),
        bias: None,
        slice_width: Some(1),
        activations: ActivationLevels::One,
    };
    let mut random = Random(21);
    let below = NARROW_LIMIT.next_down();
    let large = [NARROW_LIMIT, -NARROW_LIMIT, below, -below, 1e9, -3e20, f32::NAN, f32::INFINITY, 0.0];
    for n_rows in [1, 2, 5, 16, 19] {
        for (at, value) in (0..n_in).flat_map(|at| large.map(|value| (at, value))) {
            let mut x: Vec<f32> = random.floats(n_rows * n_in).iter().map(|v| v * below).collect();
            x[at] = value;
            x[(n_rows - 1) * n_in + (at * 7 + 3) % n_in] = -value;
            let want: Vec<i64> = x
                .chunks_exact(n_in)
                .flat_map(|row| {
                    let sum = row.iter().fold(0i64, |sum, &v| sum.wrapping_add(reference::to_fixed(v)));
                    vec![sum; 18]
                })
                .collect();
            for ops in &mut devices(Precision::Float32, 1) {
                let got = linear_exact(ops, &x, n_rows, &ones);
                assert_eq!(got, want, "{}: {value} at {at} of {n_rows} rows", ops.name());
            }
        }
    }
}

#[test]
fn embedding_is_exact_dequantization() {
    let mut random = Random(8);
    for precision in [Precision::Auto, Precision::Float32] {
        for kind in 0..N_KINDS {
            let matrix = Matrix::random(&mut random, kind, 37, 64);
            let ids = [0, 36, u32::MAX, 17, 17, 15, 16];
            let want = reference::embed(&matrix.source(), &ids);
            for ops in &mut devices(precision, 2) {
                let table = ops.load_linear(matrix.source()).expect("valid");
                let out = ops.alloc_fixed(ids.len() * 64).expect("memory");
                let values = ops.alloc(ids.len() * 64).expect("memory");
                ops.embed(table, &ids, out).expect("valid");
                assert_eq!(fixed(ops, out, ids.len() * 64), want, "{} kind {kind}", ops.name());
                ops.bits_to_f32(out, values, ids.len() * 64).expect("valid");
                let want: Vec<f32> = want.iter().map(|&bits| f32::from_bits(bits as u32)).collect();
                assert_same(&floats(ops, values, ids.len() * 64), &want, &ops.name());
            }
        }
    }
}

#[test]
fn a_second_level_of_activations_is_far_closer_to_the_exact_product() {
    let mut random = Random(9);
    for kind in 0..N_KINDS {
        let (n_rows, n_out, n_in) = (3, 32, 320);
        let mut matrix = Matrix::random(&mut random, kind, n_out, n_in);
        let x = random.floats(n_rows * n_in);
        let exact = reference::linear(&x, n_rows, &matrix.source(), Precision::Float32);
        for ops in &mut devices(Precision::Auto, 1) {
            let mut error = |activations| {
                matrix.activations = activations;
                let got = linear(ops, &x, n_rows, &matrix);
                got.iter().zip(&exact).map(|(got, want)| f64::from(got - want).abs()).sum::<f64>()
            };
            let (one, two) = (error(ActivationLevels::One), error(ActivationLevels::Two));
            assert!(two <= one * 0.1 + 1e-3, "kind {kind}: one level is off by {one}, two by {two}");
        }
    }
}

#[test]
fn threads_pack_what_one_packs() {
    let mut random = Random(12);
    for kind in 0..N_KINDS {
        let matrix = Matrix::random(&mut random, kind, 333, 64);
        for precision in [Precision::Auto, Precision::Float32] {
            let pack =
                |n_threads| Packed::new(&matrix.source(), precision, n_threads, &mut Arena::default()).expect("valid");
            let (one, four) = (pack(1), pack(4));
            assert_eq!((one.kind, one.data.as_slice()), (four.kind, four.data.as_slice()), "kind {kind}");
        }
    }
}
