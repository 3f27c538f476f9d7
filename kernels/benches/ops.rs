//! Speed of the CPU's operations: `cargo bench -p phalanx-kernels --bench ops [-- FILTER [THREADS [ISA [ROWS]]]]`.
//!
//! Prints billions of products a second, and how many bytes of packed weights pass by in that time.

use std::time::{Duration, Instant};

use half::f16;
use phalanx_kernels::{
    CpuConfig, CpuOps, Isa,
    collective::{CollectiveConfig, PeerAddress, connect},
    ops::{
        ActivationLevels, Attention, Buf, Input, KvShape, LinearSource, Ops, Precision, RowChunk, StepRows, WeightData,
    },
};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Seconds of the fastest call: one that no other process interrupted.
fn time(mut call: impl FnMut() -> Result<()>) -> Result<f64> {
    let mut best = f64::INFINITY;
    let (begin, mut calls) = (Instant::now(), 0);
    while calls < 5 || (begin.elapsed().as_secs_f64() < 0.1 && calls < 1000) {
        let begin = Instant::now();
        call()?;
        best = best.min(begin.elapsed().as_secs_f64());
        calls += 1;
    }
    Ok(best)
}

/// Numbers without meaning, about evenly in -1 ..= 1.
fn numbers(n: usize) -> Vec<f32> {
    (0..n as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 8) as f32 / (1 << 23) as f32 - 1.0).collect()
}

fn vector(ops: &mut CpuOps, n: usize) -> Result<Buf> {
    Ok(ops.load_vector(&numbers(n))?)
}

fn bench_linear(ops: &mut CpuOps, name: &str, rows: &[usize], [n_out, n_in]: [usize; 2]) -> Result<()> {
    let n = n_out * n_in;
    let values = numbers(n);
    let quants4: Vec<u8> = (0..n).map(|i| (i * 7 % 16) as u8).collect();
    let quants8: Vec<i8> = (0..n).map(|i| (i * 37 % 256) as u8 as i8).collect();
    // Of weights as models have them, so that sums of slices are small; an f16.
    let (scales, short) = (numbers(n / 16), vec![1.0 / 128.0; n / 32]);
    let quants6: Vec<i8> = (0..n).map(|i| (i * 37 % 64) as i8 - 32).collect();
    // Not an f16, but a small number times the same factor.
    let factored: Vec<f32> = (0..n / 16).map(|i| (1 + i % 60) as f32 * (1.0 + f32::EPSILON * 1024.0)).collect();
    let half: Vec<f16> = values.iter().map(|v| f16::from_f32(*v)).collect();
    let data = match name {
        "q4" => WeightData::Q4 { quants: &quants4, scales: &short, mins: &short },
        "q4-f32-scales" => WeightData::Q4 { quants: &quants4, scales: &scales[..n / 32], mins: &short },
        "q8" => WeightData::Q8 { quants: &quants8, group: 32, scales: &short, mins: None },
        "q4-factored" => WeightData::Q4 { quants: &quants4, scales: &factored[..n / 32], mins: &factored[..n / 32] },
        "q6" => WeightData::Q8 { quants: &quants6, group: 32, scales: &short, mins: None },
        "q6-factored" => WeightData::Q8 { quants: &quants6, group: 16, scales: &factored, mins: None },
        "f16" => WeightData::F16(&half),
        _ => WeightData::F32(&values),
    };
    let before = ops.resident_bytes();
    let weight = ops.load_linear(LinearSource {
        n_out,
        n_in,
        data,
        bias: None,
        slice_width: None,
        activations: ActivationLevels::One,
    })?;
    let bytes = (ops.resident_bytes() - before) as f64;
    let exact = ops.load_linear(LinearSource {
        n_out,
        n_in,
        data,
        bias: None,
        // As narrow as models have them.
        slice_width: Some(64),
        activations: ActivationLevels::One,
    })?;
    let most = rows.iter().copied().max().unwrap_or(0);
    let (x, out, fixed) = (vector(ops, most * n_in)?, ops.alloc(most * n_out)?, ops.alloc_fixed(most * n_out)?);
    for &n_rows in rows {
        let products = (n_rows * n) as f64;
        let plain = time(|| Ok(ops.linear(x.into(), n_rows, &[(weight, out)])?))?;
        let sliced = time(|| Ok(ops.linear_exact(x.into(), n_rows, exact, fixed)?))?;
        println!(
            "{name:>16} {n_out:>5} x {n_in:<5} {n_rows:>4} rows: {:8.1} GMAC/s {:7.1} GB/s {:9.1} us; exact {:8.1} GMAC/s",
            products / plain / 1e9,
            bytes / plain / 1e9,
            plain * 1e6,
            products / sliced / 1e9
        );
    }
    Ok(())
}

/// One row through more weights than caches hold, as decoding does.
fn bench_decode(ops: &mut CpuOps) -> Result<()> {
    let (n_out, n_in, n_matrices) = (1536, 8960, 40);
    let quants: Vec<u8> = (0..n_out * n_in).map(|i| (i * 7 % 16) as u8).collect();
    let scales = vec![0.5; n_out * n_in / 32];
    let data = WeightData::Q4 { quants: &quants, scales: &scales, mins: &scales };
    let source = LinearSource { n_out, n_in, data, bias: None, slice_width: None, activations: ActivationLevels::One };
    let begin = Instant::now();
    let weights = (0..n_matrices)
        .map(|_| ops.load_linear(LinearSource { ..source }))
        .collect::<std::result::Result<Vec<_>, _>>()?;
    let load = begin.elapsed().as_secs_f64();
    let bytes = ops.resident_bytes() as f64;
    let (x, out) = (vector(ops, n_in)?, ops.alloc(n_out)?);
    let seconds = time(|| weights.iter().try_for_each(|weight| Ok(ops.linear(x.into(), 1, &[(*weight, out)])?)))?;
    let n = (n_matrices * n_out * n_in) as f64;
    println!(
        "  q4 from memory: {:.1} GB/s, {:.1} GMAC/s; packed at {:.2} G weights/s",
        bytes / seconds / 1e9,
        n / seconds / 1e9,
        n / load / 1e9
    );
    Ok(())
}

/// Some rows through more weights than caches hold, in matrices of a small model's size.
fn bench_batches(ops: &mut CpuOps, name: &str) -> Result<()> {
    let (n_out, n_in, n_matrices) = (1536, 576, if name == "q8" { 80 } else { 160 });
    let quants4: Vec<u8> = (0..n_out * n_in).map(|i| (i * 7 % 16) as u8).collect();
    let quants8: Vec<i8> = (0..n_out * n_in).map(|i| (i * 37 % 256) as u8 as i8).collect();
    let scales = vec![0.5; n_out * n_in / 32];
    let data = match name {
        "q8" => WeightData::Q8 { quants: &quants8, group: 32, scales: &scales, mins: None },
        _ => WeightData::Q4 { quants: &quants4, scales: &scales, mins: &scales },
    };
    let source = LinearSource { n_out, n_in, data, bias: None, slice_width: None, activations: ActivationLevels::One };
    let load = |ops: &mut CpuOps| ops.load_linear(LinearSource { ..source });
    let weights = (0..n_matrices).map(|_| load(ops)).collect::<std::result::Result<Vec<_>, _>>()?;
    let (x, out) = (vector(ops, 128 * n_in)?, ops.alloc(128 * n_out)?);
    for n_rows in [1, 4, 8, 16, 32, 64, 128] {
        let cold =
            time(|| weights.iter().try_for_each(|weight| Ok(ops.linear(x.into(), n_rows, &[(*weight, out)])?)))?;
        let warm = time(|| weights.iter().try_for_each(|_| Ok(ops.linear(x.into(), n_rows, &[(weights[0], out)])?)))?;
        let speed = |seconds: f64| (n_matrices * n_out * n_in * n_rows) as f64 / seconds / 1e9;
        println!(
            "  {name} {n_out} x {n_in} {n_rows:>4} rows: {:.1} GMAC/s from memory, {:.1} from the cache",
            speed(cold),
            speed(warm)
        );
    }
    Ok(())
}

/// The products of a small model's layers one after another, which streams all weights: how fast each kind is among the others.
fn bench_layers(ops: &mut CpuOps) -> Result<()> {
    let shapes = [
        ("qkv", 960, 576, None),
        ("o", 576, 576, Some(64)),
        ("gate, up", 3072, 576, None),
        ("down", 576, 1536, Some(128)),
    ];
    let n_layers = 30;
    let quants: Vec<u8> = (0..3072 * 576).map(|i| (i * 7 % 16) as u8).collect();
    let scales = vec![1.0 / 128.0; 3072 * 576 / 32];
    let mut layers = Vec::new();
    for _ in 0..n_layers {
        for (_, n_out, n_in, slice_width) in shapes {
            let n = n_out * n_in;
            let data = WeightData::Q4 { quants: &quants[..n], scales: &scales[..n / 32], mins: &scales[..n / 32] };
            layers.push(ops.load_linear(LinearSource {
                n_out,
                n_in,
                data,
                bias: None,
                slice_width,
                activations: ActivationLevels::One,
            })?);
        }
    }
    let x = vector(ops, 128 * 1536)?;
    let (out, fixed) = (ops.alloc(128 * 3072)?, ops.alloc_fixed(128 * 576)?);
    for n_rows in [1, 8, 16, 32, 128] {
        let mut seconds = [f64::INFINITY; 4];
        for _ in 0..20 {
            let mut sums = [0.0; 4];
            for (i, &weight) in layers.iter().enumerate() {
                let begin = Instant::now();
                match shapes[i % 4].3 {
                    None => ops.linear(x.into(), n_rows, &[(weight, out)])?,
                    Some(_) => ops.linear_exact(x.into(), n_rows, weight, fixed)?,
                }
                sums[i % 4] += begin.elapsed().as_secs_f64();
            }
            for (best, sum) in seconds.iter_mut().zip(sums) {
                *best = best.min(sum);
            }
        }
        print!("  layers {n_rows:>4} rows:");
        for ((name, n_out, n_in, _), seconds) in shapes.iter().zip(seconds) {
            print!("  {name} {:.1} GMAC/s", (n_layers * n_rows * n_out * n_in) as f64 / seconds / 1e9);
        }
        println!();
    }
    Ok(())
}

fn bench_attention(ops: &mut CpuOps, n_heads: usize, n_kv_heads: usize, head_dim: usize) -> Result<()> {
    let (block_size, max, n_sequences) = (16, 2048, 64);
    let n_blocks = n_sequences * max / block_size;
    ops.alloc_kv(KvShape { n_layers: 1, n_blocks, block_size, n_kv_heads, head_dim })?;
    let kv_head_of: Vec<u32> = (0..n_heads).map(|h| (h * n_kv_heads / n_heads) as u32).collect();
    let (q, out) = (vector(ops, max * n_heads * head_dim)?, ops.alloc(max * n_heads * head_dim)?);
    let (k, v) = (vector(ops, max * n_kv_heads * head_dim)?, vector(ops, max * n_kv_heads * head_dim)?);
    let blocks: Vec<u32> = (0..(max / block_size) as u32).collect();
    let step =
        |start, n_rows| StepRows { chunks: vec![RowChunk { first_row: 0, n_rows, start, blocks: blocks.clone() }] };
    ops.begin_step(&step(0, max))?;
    let store = time(|| Ok(ops.store_kv(0, k, v)?))?;
    println!("       store_kv {n_kv_heads} heads of {head_dim}, {max} rows: {:.1} us", store * 1e6);
    let attention = Attention { layer: 0, n_heads, kv_head_of: &kv_head_of, scale: 0.125 };
    // A row of each of many sequences, which the near caches do not hold.
    for len in [144, max] {
        let chunk = |i: usize| RowChunk {
            first_row: i,
            n_rows: 1,
            start: len - 1,
            blocks: (0..max / block_size).map(|b| (i * max / block_size + b) as u32).collect(),
        };
        ops.begin_step(&StepRows { chunks: (0..n_sequences).map(chunk).collect() })?;
        let seconds = time(|| Ok(ops.attention(attention, q, out)?))?;
        println!(
            "      attention {n_heads:>2} of {n_kv_heads} heads of {head_dim:<3} {n_sequences:>4} sequences of {len}: {:6.1} GMAC/s {:9.1} us, {:.1} GB/s",
            (2 * n_sequences * len * n_heads * head_dim) as f64 / seconds / 1e9,
            seconds * 1e6,
            (4 * n_sequences * len * n_kv_heads * head_dim) as f64 / seconds / 1e9,
        );
    }
    for (start, n_rows) in [(511, 1), (2047, 1), (0, 128), (0, 512), (1536, 512)] {
        ops.begin_step(&step(start, n_rows))?;
        let seconds = time(|| Ok(ops.attention(attention, q, out)?))?;
        let pairs: usize = (start..start + n_rows).map(|p| p + 1).sum();
        println!(
            "      attention {n_heads:>2} of {n_kv_heads} heads of {head_dim:<3} {n_rows:>4} rows from {start:>4}: {:8.1} GMAC/s {:9.1} us",
            (2 * pairs * n_heads * head_dim) as f64 / seconds / 1e9,
            seconds * 1e6
        );
    }
    Ok(())
}

fn bench_elementwise(ops: &mut CpuOps) -> Result<()> {
    let config = CollectiveConfig {
        epoch: 1,
        rank: 0,
        world_size: 1,
        secret: Vec::new(),
        peers: vec![PeerAddress { host_id: String::new(), address: String::new() }],
        time_limit: Duration::from_secs(1),
    };
    let mut alone = connect(&config, None, None)?;
    for (n_rows, width) in [(1, 1536), (512, 1536)] {
        let n = n_rows * width;
        let (x, w, out, fixed) = (vector(ops, n)?, vector(ops, width)?, ops.alloc(n)?, ops.alloc_fixed(n)?);
        // What a product takes in quantized, beside a matrix that is next to nothing.
        let data = WeightData::Q4 {
            quants: &vec![7; 16 * width],
            scales: &vec![0.01; width / 2],
            mins: &vec![0.0; width / 2],
        };
        let (bias, slice_width, activations) = (None, None, ActivationLevels::One);
        let small = ops.load_linear(LinearSource { n_out: 16, n_in: width, data, bias, slice_width, activations })?;
        let few = ops.alloc(n_rows * 16)?;
        let mut with = |input: Input| time(|| Ok(ops.linear(input, n_rows, &[(small, few)])?));
        let rows = with(x.into())?;
        let norm = with(Input::Normed { x, weight: w, eps: 1e-5 })? - rows;
        let silu = with(Input::Gated { gate: x, up: out })? - rows;
        let add = time(|| Ok(ops.add_reduced(x, fixed, n, &mut *alone)?))?;
        let mut best = vec![(0.0, 0); n_rows];
        let argmax = time(|| Ok(ops.argmax(x, n_rows, width, &mut best)?))?;
        let [rows, norm, silu, add, argmax] = [rows, norm, silu, add, argmax].map(|s| s * 1e6);
        println!(
            "  {n_rows} x {width}: quantization and 16 outputs {rows:.1} us, norm {norm:.1} us more, SiLU {silu:.1} us more, add_reduced {add:.1} us, argmax {argmax:.1} us"
        );
    }
    Ok(())
}

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).filter(|arg| !arg.starts_with("--")).collect();
    let filter = args.first().map_or("", String::as_str);
    let threads = args.get(1).map_or(Ok(1), |arg| arg.parse())?;
    let isa = args.get(2).map(|arg| arg.parse::<Isa>()).transpose()?;
    let rows =
        args.get(3).map(|arg| arg.parse()).transpose()?.map_or(vec![1, 4, 8, 32, 128, 512], |rows: usize| vec![rows]);
    let device = || CpuOps::new(CpuConfig { threads, isa, ..CpuConfig::new(Precision::Auto) });
    println!("{}", device()?.name());
    for name in ["q4", "q4-f32-scales", "q8", "q4-factored", "q6", "q6-factored", "f16", "f32"] {
        for shape in [[1536, 8960], [8960, 1536], [576, 1536], [1536, 576]] {
            if name.starts_with(filter) {
                bench_linear(&mut device()?, name, &rows, shape)?;
            }
        }
    }
    if "decode".starts_with(filter) {
        bench_decode(&mut device()?)?;
    }
    if "batches".starts_with(filter) {
        bench_batches(&mut device()?, "q4")?;
        bench_batches(&mut device()?, "q8")?;
    }
    if "layers".starts_with(filter) {
        bench_layers(&mut device()?)?;
    }
    if "attention".starts_with(filter) {
        bench_attention(&mut device()?, 9, 3, 64)?;
        bench_attention(&mut device()?, 12, 2, 128)?;
    }
    if "elementwise".starts_with(filter) {
        bench_elementwise(&mut device()?)?;
    }
    Ok(())
}
