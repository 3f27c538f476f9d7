//! Every operation on every instruction set this CPU has, compared with [`crate::reference`] bit for bit.

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod amx;
mod attention;
mod elementwise;
mod errors;
mod linear;
pub(crate) mod matrix;
mod pages;

use std::time::Duration;

use half::{bf16, f16};

use super::{CpuConfig, CpuOps, Isa, RowMath, table};
use crate::{
    collective::{Collective, CollectiveConfig, PeerAddress, connect},
    ops::{ActivationLevels, Buf, FixedBuf, Input, LinearSource, Ops, Precision, WeightData},
};

/// Seeded numbers (Steele, Lea and Flood, 2014: SplitMix64).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Below `n`.
    fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    /// About evenly in -1 ..= 1.
    fn float(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    fn floats(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.float()).collect()
    }

    /// Of many magnitudes, zeros among them.
    fn wild(&mut self, n: usize) -> Vec<f32> {
        let wild = |random: &mut Self| match random.below(16) {
            0 => 0.0,
            1 => -0.0,
            _ => random.float() * 10.0f32.powi(random.below(13) as i32 - 8),
        };
        (0..n).map(|_| wild(self)).collect()
    }
}

/// A device for each instruction set of this CPU, and one with a matrix unit that is loops.
fn devices(precision: Precision, threads: usize) -> Vec<CpuOps> {
    let device = |isa| CpuOps::new(CpuConfig { threads, precision, isa: Some(isa), pin: Vec::new() });
    let mut devices: Vec<_> = Isa::available().into_iter().map(|isa| device(isa).expect("available")).collect();
    let mut matrix = device(Isa::Scalar).expect("available");
    matrix.table = table::with_matrix_unit();
    devices.push(matrix);
    devices
}

/// A group of one rank.
fn alone() -> Box<dyn Collective> {
    let config = CollectiveConfig {
        epoch: 1,
        rank: 0,
        world_size: 1,
        secret: Vec::new(),
        peers: vec![PeerAddress { host_id: "here".into(), address: String::new() }],
        time_limit: Duration::from_secs(1),
    };
    connect(&config, None, None).expect("nobody else is waited for")
}

/// A buffer with these values.
fn buffer(ops: &mut CpuOps, values: &[f32]) -> Buf {
    ops.load_vector(values).expect("memory")
}

/// The first `len` values of a buffer.
fn floats(ops: &mut CpuOps, buf: Buf, len: usize) -> Vec<f32> {
    let mut values = vec![0.0; len];
    ops.read(buf, 0, &mut values).expect("in bounds");
    values
}

/// The first `len` values of a buffer.
fn fixed(ops: &mut CpuOps, buf: FixedBuf, len: usize) -> Vec<i64> {
    ops.buffers.fixed("test", buf, len).expect("in bounds").to_vec()
}

/// Bits, all NaNs alike.
fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| if v.is_nan() { f32::NAN.to_bits() } else { v.to_bits() }).collect()
}

#[track_caller]
fn assert_same(got: &[f32], want: &[f32], what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    if let Some(i) = (0..got.len()).find(|&i| bits(&got[i..=i]) != bits(&want[i..=i])) {
        panic!("{what}: element {i} of {}: got {:e}, want {:e}", got.len(), got[i], want[i]);
    }
}

/// A weight matrix that owns its numbers.
#[derive(Debug, Clone)]
struct Matrix {
    n_out: usize,
    n_in: usize,
    data: Data,
    bias: Option<Vec<f32>>,
    slice_width: Option<usize>,
    activations: ActivationLevels,
}

#[derive(Debug, Clone)]
enum Data {
    F32(Vec<f32>),
    F16(Vec<f16>),
    Bf16(Vec<bf16>),
    Q4 { quants: Vec<u8>, scales: Vec<f32>, mins: Vec<f32> },
    Q8 { quants: Vec<i8>, group: usize, scales: Vec<f32>, mins: Option<Vec<f32>> },
}

/// Number of kinds that [`Matrix::random`] makes: each layout, quantized ones with scales in f16 and in f32.
const N_KINDS: usize = 18;

/// Scales as GGUF's Q4_K and Q6_K make them, `[n_out, n_steps, per_step]`: an f16 for 8 steps times small numbers.
fn products(random: &mut Random, n_out: usize, n_steps: usize, per_step: usize) -> Vec<f32> {
    let mut scales = Vec::new();
    for _ in 0..n_out {
        let mut d = 0.0;
        for i in 0..n_steps * per_step {
            if i % (8 * per_step) == 0 {
                d = f16::from_f32(random.float() * 0.01).to_f32();
            }
            scales.push(d * (random.below(191) as f32 - 63.0));
        }
    }
    scales
}

impl Matrix {
    fn random(random: &mut Random, kind: usize, n_out: usize, n_in: usize) -> Self {
        let n = n_out * n_in;
        let mut scales = |n: usize, magnitude: f32, exact_f16: bool| {
            let scale = |v: f32| if exact_f16 { f16::from_f32(v).to_f32() } else { v };
            (0..n).map(|_| scale(random.float() * magnitude)).collect::<Vec<f32>>()
        };
        let data = match kind {
            0 => Data::F32(scales(n, 1.0, false)),
            1 => Data::F16(scales(n, 1.0, true).into_iter().map(f16::from_f32).collect()),
            2 => Data::Bf16(scales(n, 1.0, false).into_iter().map(bf16::from_f32).collect()),
            3 | 4 => {
                let (d, m) = (scales(n / 32, 0.1, kind == 3), scales(n / 32, 0.8, kind == 3));
                Data::Q4 { quants: (0..n).map(|_| random.below(16) as u8).collect(), scales: d, mins: m }
            }
            5..=10 => {
                let group = if kind >= 9 { 16 } else { 32 };
                let d = scales(n / group, 0.01, kind % 2 == 1);
                let mins = (kind == 7 || kind == 8).then(|| scales(n / group, 0.5, kind % 2 == 1));
                // Extreme quants are frequent, -128 too.
                let quant = |random: &mut Random| match random.below(8) {
                    0 => i8::MIN,
                    1 => i8::MAX,
                    _ => random.below(256) as u8 as i8,
                };
                Data::Q8 { quants: (0..n).map(|_| quant(random)).collect(), group, scales: d, mins }
            }
            // Scales and mins that are a factor of 8 steps times a whole number; 13: 8 bits; 14 to 17: 6 bits.
            11..=13 => {
                let (d, m) = (products(random, n_out, n_in / 32, 1), products(random, n_out, n_in / 32, 1));
                let below = if kind == 13 { 256 } else { 16 };
                let quants: Vec<u8> = (0..n).map(|_| random.below(below) as u8).collect();
                match kind {
                    13 => Data::Q8 { quants: bytemuck::cast_vec(quants), group: 32, scales: d, mins: Some(m) },
                    _ => Data::Q4 { quants, scales: d, mins: m },
                }
            }
            14 | 15 => {
                let scales = match kind {
                    14 => products(random, n_out, n_in / 32, 2),
                    _ => random.floats(n / 16),
                };
                let quants = (0..n).map(|_| random.below(64) as i8 - 32).collect();
                Data::Q8 { quants, group: 16, scales, mins: None }
            }
            16 | 17 => {
                let d = scales(n / 32, 0.01, kind == 16);
                let quant = |random: &mut Random| match random.below(8) {
                    0 => -32,
                    1 => 31,
                    _ => random.below(64) as i8 - 32,
                };
                Data::Q8 { quants: (0..n).map(|_| quant(random)).collect(), group: 32, scales: d, mins: None }
            }
            _ => panic!("no kind {kind}"),
        };
        Self { n_out, n_in, data, bias: None, slice_width: None, activations: ActivationLevels::One }
    }

    fn is_quantized(&self) -> bool {
        matches!(self.data, Data::Q4 { .. } | Data::Q8 { .. })
    }

    fn source(&self) -> LinearSource<'_> {
        let data = match &self.data {
            Data::F32(w) => WeightData::F32(w),
            Data::F16(w) => WeightData::F16(w),
            Data::Bf16(w) => WeightData::Bf16(w),
            Data::Q4 { quants, scales, mins } => WeightData::Q4 { quants, scales, mins },
            Data::Q8 { quants, group, scales, mins } => {
                WeightData::Q8 { quants, group: *group, scales, mins: mins.as_deref() }
            }
        };
        let (n_out, n_in) = (self.n_out, self.n_in);
        LinearSource {
            n_out,
            n_in,
            data,
            bias: self.bias.as_deref(),
            slice_width: self.slice_width,
            activations: self.activations,
        }
    }

    /// The inputs `from .. to` of all rows; bounds are multiples of 32 for quantized weights.
    fn columns(&self, from: usize, to: usize) -> Self {
        fn cut<T: Copy>(values: &[T], width: usize, from: usize, to: usize) -> Vec<T> {
            values.chunks_exact(width).flat_map(|row| &row[from..to]).copied().collect()
        }
        let n = self.n_in;
        let data = match &self.data {
            Data::F32(w) => Data::F32(cut(w, n, from, to)),
            Data::F16(w) => Data::F16(cut(w, n, from, to)),
            Data::Bf16(w) => Data::Bf16(cut(w, n, from, to)),
            Data::Q4 { quants, scales, mins } => Data::Q4 {
                quants: cut(quants, n, from, to),
                scales: cut(scales, n / 32, from / 32, to / 32),
                mins: cut(mins, n / 32, from / 32, to / 32),
            },
            Data::Q8 { quants, group: g, scales, mins } => Data::Q8 {
                quants: cut(quants, n, from, to),
                group: *g,
                scales: cut(scales, n / g, from / g, to / g),
                mins: mins.as_ref().map(|mins| cut(mins, n / g, from / g, to / g)),
            },
        };
        Self { n_in: to - from, data, ..self.clone() }
    }
}
