//! What does not fit is an error, and changes nothing.

use super::*;
use crate::{
    error::KernelError,
    ops::{Attention, KvShape, Linear, RopeSpec, RopeStyle, RowChunk, StepRows},
};

fn device() -> CpuOps {
    CpuOps::new(CpuConfig::new(Precision::Auto)).expect("cpu")
}

#[track_caller]
fn refused<T: std::fmt::Debug>(result: Result<T, KernelError>) {
    assert!(matches!(result, Err(KernelError::Shape { .. })), "got {result:?}");
}

#[test]
fn weights_that_do_not_fit_are_refused() {
    let ops = &mut device();
    let mut random = Random(1);
    let mut load = |change: &dyn Fn(&mut Matrix)| {
        let mut matrix = Matrix::random(&mut random, 3, 4, 64);
        change(&mut matrix);
        ops.load_linear(matrix.source())
    };
    load(&|_| ()).expect("as made");
    load(&|m| m.slice_width = Some(32)).expect("whole groups");
    refused(load(&|m| m.slice_width = Some(16)));
    refused(load(&|m| m.slice_width = Some(0)));
    refused(load(&|m| m.slice_width = Some(128)));
    refused(load(&|m| m.bias = Some(vec![0.0; 3])));
    refused(load(&|m| m.n_in = 63));
    refused(load(&|m| (m.n_in, m.n_out) = (16, 16)));
    refused(load(&|m| m.n_out = 0));
    refused(load(&|m| m.n_out = usize::MAX));
    refused(load(&|m| m.data = Data::F32(vec![0.0; 255])));
    let q4 = |quant: u8, n: usize| Data::Q4 { quants: vec![quant; 256], scales: vec![0.0; n], mins: vec![0.0; 8] };
    refused(load(&|m| m.data = q4(16, 8)));
    refused(load(&|m| m.data = q4(15, 7)));
    let q8 = |group: usize, mins: Option<Vec<f32>>| Data::Q8 {
        quants: vec![0; 256],
        group,
        scales: vec![0.0; 256 / group],
        mins,
    };
    load(&|m| m.data = q8(16, None)).expect("groups of 16");
    refused(load(&|m| m.data = q8(16, Some(vec![0.0; 16]))));
    refused(load(&|m| m.data = q8(64, None)));
    refused(load(&|m| m.data = q8(32, Some(vec![0.0; 7]))));
}

#[test]
fn operands_that_do_not_fit_are_refused() {
    let ops = &mut device();
    let mut random = Random(2);
    let plain = ops.load_linear(Matrix::random(&mut random, 0, 8, 32).source()).expect("valid");
    let narrow = ops.load_linear(Matrix::random(&mut random, 0, 8, 16).source()).expect("valid");
    let sliced = Matrix { slice_width: Some(32), ..Matrix::random(&mut random, 0, 8, 32) };
    let sliced = ops.load_linear(sliced.source()).expect("valid");
    let (x, out, fixed) = (ops.alloc(64).expect("1"), ops.alloc(16).expect("2"), ops.alloc_fixed(16).expect("3"));
    ops.linear(x.into(), 2, &[(plain, out)]).expect("fits");
    ops.linear_exact(x.into(), 2, sliced, fixed).expect("fits");
    refused(ops.linear(x.into(), 3, &[(plain, out)]));
    refused(ops.linear(x.into(), usize::MAX / 2, &[(plain, out)]));
    refused(ops.linear(x.into(), 1, &[(plain, x)]));
    refused(ops.linear(x.into(), 1, &[(plain, out), (plain, out)]));
    refused(ops.linear(x.into(), 1, &[(plain, out), (narrow, x)]));
    refused(ops.linear(x.into(), 1, &[(sliced, out)]));
    refused(ops.linear(x.into(), 1, &[(Linear { id: 99, ..plain }, out)]));
    refused(ops.linear(x.into(), 1, &[(Linear { n_out: 4096, ..plain }, out)]));
    refused(ops.linear(Buf(99).into(), 1, &[(plain, out)]));
    refused(ops.linear_exact(x.into(), 3, sliced, fixed));
    refused(ops.linear_exact(x.into(), 1, plain, fixed));
    refused(ops.embed(plain, &[8], fixed));
    refused(ops.embed(plain, &[7; 2], fixed));
    refused(ops.bits_to_f32(fixed, out, 17));
    refused(ops.add_reduced(out, FixedBuf(9), 1, &mut *alone()));
    refused(ops.add_reduced(out, fixed, 17, &mut *alone()));
    let (norm, up) = (ops.alloc(32).expect("4"), ops.alloc(64).expect("5"));
    let normed = |x, weight| Input::Normed { x, weight, eps: 0.0 };
    let gated = |gate, up| Input::Gated { gate, up };
    ops.linear(normed(x, norm), 2, &[(plain, out)]).expect("fits");
    ops.linear(gated(x, up), 2, &[(plain, out)]).expect("fits");
    refused(ops.linear(normed(x, norm), 3, &[(plain, out)]));
    refused(ops.linear(normed(x, x), 1, &[(plain, out)]));
    refused(ops.linear(normed(x, norm), 1, &[(plain, norm)]));
    refused(ops.linear(gated(x, norm), 2, &[(plain, out)]));
    refused(ops.linear(gated(norm, x), 2, &[(plain, out)]));
    refused(ops.linear(gated(x, up), 1, &[(plain, up)]));
    refused(ops.linear(gated(x, Buf(99)), 1, &[(plain, out)]));
    refused(ops.linear_exact(normed(x, x), 1, sliced, fixed));
    refused(ops.gather_rows(x, &[4], 16, out));
    refused(ops.gather_rows(x, &[0, 1], 16, out));
    refused(ops.argmax(x, 1, 0, &mut [(0.0, 0)]));
    refused(ops.argmax(x, 2, 32, &mut [(0.0, 0)]));
    refused(ops.argmax(x, 1, 65, &mut [(0.0, 0)]));
    refused(ops.read(x, 60, &mut [0.0; 5]));
    refused(ops.read(x, usize::MAX, &mut [0.0; 5]));
    refused(ops.write(x, 60, &[0.0; 5]));
    refused(ops.load_rope(&RopeSpec { style: RopeStyle::Half, inv_freq: Vec::new(), magnitude: 1.0 }));
    let rope = RopeSpec { style: RopeStyle::Half, inv_freq: vec![1.0; 4], magnitude: 1.0 };
    let rope = ops.load_rope(&rope).expect("valid");
    refused(ops.rope(&[(x, 1)], 7, rope));
    assert!(matches!(ops.alloc(usize::MAX / 8), Err(KernelError::OutOfMemory { .. })));
}

#[test]
fn steps_and_pages_that_do_not_fit_are_refused() {
    let ops = &mut device();
    let shape = KvShape { n_layers: 1, n_blocks: 4, block_size: 16, n_kv_heads: 1, head_dim: 16 };
    let buf = ops.alloc(1024).expect("memory");
    let other = ops.alloc(1024).expect("memory");
    refused(ops.store_kv(0, buf, other));
    refused(ops.alloc_kv(KvShape { block_size: 8, ..shape }));
    refused(ops.alloc_kv(KvShape { block_size: 0, ..shape }));
    refused(ops.alloc_kv(KvShape { n_kv_heads: 0, ..shape }));
    let huge = KvShape { n_blocks: u32::MAX as usize, block_size: 1 << 40, ..shape };
    assert!(matches!(ops.alloc_kv(huge), Err(KernelError::OutOfMemory { .. })));
    ops.alloc_kv(shape).expect("small");
    assert_eq!(ops.kv_bytes_per_block(shape), 16 * 16 * 2 * 2);
    let mut begin = |chunk: RowChunk| ops.begin_step(&StepRows { chunks: vec![chunk] });
    let chunk = RowChunk { first_row: 0, n_rows: 17, start: 0, blocks: vec![3, 0] };
    refused(begin(RowChunk { blocks: vec![3], ..chunk.clone() }));
    refused(begin(RowChunk { blocks: vec![3, 4], ..chunk.clone() }));
    refused(begin(RowChunk { first_row: 1, ..chunk.clone() }));
    refused(begin(RowChunk { start: usize::MAX, ..chunk.clone() }));
    refused(begin(RowChunk { start: 32, ..chunk.clone() }));
    refused(begin(RowChunk { blocks: vec![3, 3], ..chunk.clone() }));
    begin(chunk.clone()).expect("fits");
    let beside = |start, blocks| RowChunk { first_row: 17, n_rows: 2, start, blocks };
    let mut begin_both = |other| ops.begin_step(&StepRows { chunks: vec![chunk.clone(), other] });
    refused(begin_both(beside(0, vec![3])));
    refused(begin_both(beside(16, vec![1, 0])));
    begin_both(beside(17, vec![1, 0])).expect("other slots of the same block");
    begin_both(beside(16, vec![3, 1])).expect("a shared block that is only read");
    ops.begin_step(&StepRows { chunks: vec![chunk] }).expect("fits");
    ops.store_kv(0, buf, other).expect("fits");
    refused(ops.store_kv(1, buf, other));
    let heads = |layer, kv_head_of| Attention { layer, n_heads: 2, kv_head_of, scale: 1.0 };
    ops.attention(heads(0, &[0, 0]), buf, other).expect("fits");
    refused(ops.attention(heads(1, &[0, 0]), buf, other));
    refused(ops.attention(heads(0, &[0, 1]), buf, other));
    refused(ops.attention(heads(0, &[0]), buf, other));
    refused(ops.attention(heads(0, &[0, 0]), buf, buf));
}

#[test]
fn the_device_says_what_it_is() {
    let ops = device();
    assert!(ops.name().starts_with("cpu (") && ops.name().ends_with(", 1 thread)"), "{}", ops.name());
    let fingerprints: Vec<String> = devices(Precision::Auto, 2).iter().map(|ops| ops.fingerprint()).collect();
    assert!(fingerprints.iter().all(|f| *f == ops.fingerprint()));
    let exact = CpuOps::new(CpuConfig::new(Precision::Float32)).expect("cpu");
    assert_ne!(exact.fingerprint(), ops.fingerprint());
}

#[test]
fn resident_bytes_count_packed_weights() {
    let mut random = Random(3);
    // 16 x 512 weights. Scales in f16: 256 + 64 bytes for each 32; in f32: 256 + 128; factored: 256, and 384 for 256.
    let factored = |step: usize| 16 * step + 2 * 384;
    for (kind, bytes) in [
        (3, 16 * 320),
        (4, 16 * 384),
        (5, 16 * 544),
        (6, 16 * 576),
        (9, 16 * 640),
        (11, factored(256)),
        (13, factored(512)),
        (14, factored(384)),
        (15, 16 * (384 + 128)),
        (1, 16 * 1024),
    ] {
        let ops = &mut device();
        ops.load_linear(Matrix::random(&mut random, kind, 16, 512).source()).expect("valid");
        assert_eq!(ops.resident_bytes(), bytes as u64, "kind {kind}");
    }
}
