//! How weight matrices lie in memory.
//!
//! Output rows are packed in tiles of [`TILE`] rows (the last one padded with zeros), so that a vector lane is an output
//! row and every output is summed strictly in the order of its inputs. A tile is a run of *steps*:
//!
//! | layout | a step is | its bytes |
//! |---|---|---|
//! | dense | one input | 16 weights of 4 or 2 bytes |
//! | q4 | 32 inputs | 256 B of nibbles; sets of scales, of mins |
//! | q8 | 32 inputs | 512 B of weights + 128; sets of scales, of mins if there are any |
//! | q8, groups of 16 | 32 inputs | 512 B of weights + 128; sets of scales of the first, of the last 16 inputs |
//! | q6 | 32 inputs | 256 B of nibbles of weights + 32, 128 B of high bits; a set of scales |
//! | q6, groups of 16 | 32 inputs | 256 B of nibbles of weights + 32, 128 B of high bits; the same sets |
//!
//! Quants lie as `vpdpbusd` wants them: 4 consecutive inputs of a row in 4 consecutive bytes, then the next row. A byte
//! of nibbles holds input `8c + j` low and `8c + 4 + j` high; a byte of high bits holds those of inputs `16h + j`,
//! `16h + 4 + j` and so on, lowest first.
//!
//! A set is one number for each row of the tile, in the smallest type that is exact for the whole matrix:
//! - f16 (GGUF's Q4_0, Q4_1, Q5_0, Q8_0), behind the step's quants;
//! - factored (Q4_K, Q5_K, Q6_K): 8-bit whole numbers times an f32 factor for [`STEPS_PER_HEAD`] steps. They lie in heads
//!   before the tile's steps, a head for each [`STEPS_PER_HEAD`] steps begun: the factors of each set, then for each step
//!   the numbers of each set;
//! - f32, behind the step's quants.

mod factor;
mod pack;

use std::sync::atomic::{AtomicBool, Ordering};

use half::{bf16, f16};

use self::pack::{pack_sets, pack_step};
use crate::{
    cpu::arena::{Arena, Region},
    error::KernelError,
    ops::{LinearSource, Precision, WeightData},
    parallel,
    tensor::Aligned,
};

/// Output rows of a tile.
pub(crate) const TILE: usize = 16;

/// Inputs that share an activation scale, and inputs of a step of quantized weights.
pub(crate) const GROUP: usize = 32;

/// Steps that share the factors of factored scales.
pub(crate) const STEPS_PER_HEAD: usize = 8;

/// Type of packed scales and mins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scale {
    F32,
    F16,
    Factored,
}

/// What a step of a tile holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    F32,
    F16,
    Bf16,
    Q4(Scale),
    Q8(Scale),
    /// With mins.
    Q8Min(Scale),
    /// Groups of 16.
    Q8Half(Scale),
    /// Weights of 6 bits or less.
    Q6(Scale),
    /// Groups of 16, weights of 6 bits or less.
    Q6Half(Scale),
}

impl Kind {
    /// Inputs of a step.
    pub fn step_width(self) -> usize {
        if self.is_quantized() { GROUP } else { 1 }
    }

    /// Type and number of sets of scales and mins.
    fn sets(self) -> Option<(Scale, usize)> {
        match self {
            Self::F32 | Self::F16 | Self::Bf16 => None,
            Self::Q8(scale) | Self::Q6(scale) => Some((scale, 1)),
            Self::Q4(scale) | Self::Q8Min(scale) | Self::Q8Half(scale) | Self::Q6Half(scale) => Some((scale, 2)),
        }
    }

    /// Bytes of quants or dense weights of a step.
    fn weight_bytes(self) -> usize {
        TILE * match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::Q4(_) => 16,
            Self::Q6(_) | Self::Q6Half(_) => 24,
            Self::Q8(_) | Self::Q8Min(_) | Self::Q8Half(_) => 32,
        }
    }

    /// Bytes of a step.
    pub fn step_bytes(self) -> usize {
        self.weight_bytes()
            + match self.sets() {
                Some((Scale::F32, n)) => n * TILE * 4,
                Some((Scale::F16, n)) => n * TILE * 2,
                Some((Scale::Factored, _)) | None => 0,
            }
    }

    /// Bytes of a head.
    pub fn head_bytes(self) -> usize {
        match self.sets() {
            Some((Scale::Factored, n)) => n * TILE * (4 + STEPS_PER_HEAD),
            Some((Scale::F32 | Scale::F16, _)) | None => 0,
        }
    }

    /// Whether many rows meet it faster when each tile is unpacked once for them.
    pub fn is_unpacked_for_many_rows(self) -> bool {
        matches!(self, Self::Q4(_) | Self::Q6(_) | Self::Q6Half(_))
    }

    /// Whether activations are quantized for it.
    pub fn is_quantized(self) -> bool {
        self.sets().is_some()
    }
}

/// A packed weight matrix.
#[derive(Debug)]
pub(crate) struct Packed {
    pub kind: Kind,
    pub n_out: usize,
    pub n_in: usize,
    /// Tiles of steps.
    pub data: Region,
    /// Padded to whole tiles.
    pub bias: Option<Aligned<f32>>,
    pub slice_width: Option<usize>,
    /// Levels of the activations that it meets; 1 for dense weights.
    pub n_levels: usize,
}

fn shape(want: String, got: String) -> KernelError {
    KernelError::Shape { op: "load_linear", want, got }
}

fn check_len(what: &str, got: usize, want: usize) -> Result<(), KernelError> {
    if got == want { Ok(()) } else { Err(shape(format!("{want} {what}"), got.to_string())) }
}

/// Checks lengths and widths; afterwards packing can't go out of bounds.
fn check(source: &LinearSource<'_>) -> Result<(), KernelError> {
    let (n_out, n_in) = (source.n_out, source.n_in);
    if n_out == 0 || n_in == 0 {
        return Err(shape("at least one row and one column".into(), format!("[{n_out}, {n_in}]")));
    }
    let n = n_out
        .checked_mul(n_in)
        .filter(|&n| n < usize::MAX / 64)
        .ok_or_else(|| shape("a matrix that fits in memory".into(), format!("[{n_out}, {n_in}]")))?;
    let width = match source.data {
        WeightData::F32(w) => check_len("weights", w.len(), n).map(|()| 1)?,
        WeightData::F16(w) => check_len("weights", w.len(), n).map(|()| 1)?,
        WeightData::Bf16(w) => check_len("weights", w.len(), n).map(|()| 1)?,
        WeightData::Q4 { quants, scales, mins } => {
            check_len("quants", quants.len(), n)?;
            check_len("scales", scales.len(), n / GROUP)?;
            check_len("mins", mins.len(), n / GROUP)?;
            let bits = quants.iter().fold(0, |bits, q| bits | q);
            if bits > 15 {
                return Err(shape("4-bit quants of 0..=15".into(), "larger ones".into()));
            }
            GROUP
        }
        WeightData::Q8 { quants, group, scales, mins } => {
            if group != 32 && (group != 16 || mins.is_some()) {
                return Err(shape(
                    "8-bit groups of 32, or of 16 without mins".into(),
                    format!("groups of {group}{}", if mins.is_some() { " with mins" } else { "" }),
                ));
            }
            check_len("quants", quants.len(), n)?;
            check_len("scales", scales.len(), n / group)?;
            if let Some(mins) = mins {
                check_len("mins", mins.len(), n / group)?;
            }
            GROUP
        }
    };
    if !n_in.is_multiple_of(width) {
        return Err(shape(format!("quantized rows of a multiple of {width} inputs"), n_in.to_string()));
    }
    if let Some(slice) = source.slice_width
        && (slice == 0 || !n_in.is_multiple_of(slice) || !slice.is_multiple_of(width))
    {
        let quantized = if width > 1 { format!(" and is a multiple of {width}") } else { String::new() };
        return Err(shape(format!("a slice width that divides {n_in}{quantized}"), slice.to_string()));
    }
    if let Some(bias) = source.bias {
        check_len("biases", bias.len(), n_out)?;
    }
    Ok(())
}

/// Where in a tile's bytes number `set` of step `step` lies: type, and offsets of the number and of its factor.
fn set_at(kind: Kind, n_steps: usize, step: usize, set: usize, lane: usize) -> (Scale, usize, usize) {
    let heads = n_steps.div_ceil(STEPS_PER_HEAD) * kind.head_bytes();
    let tail = heads + step * kind.step_bytes() + kind.weight_bytes();
    let index = set * TILE + lane;
    match kind.sets() {
        Some((Scale::Factored, n)) => {
            let head = step / STEPS_PER_HEAD * kind.head_bytes();
            let number = head + 4 * n * TILE + step % STEPS_PER_HEAD * n * TILE + index;
            (Scale::Factored, number, head + 4 * index)
        }
        Some((Scale::F16, _)) => (Scale::F16, tail + 2 * index, 0),
        Some((Scale::F32, _)) | None => (Scale::F32, tail + 4 * index, 0),
    }
}

fn get_f32(bytes: &[u8], at: usize) -> f32 {
    f32::from_ne_bytes([0, 1, 2, 3].map(|i| bytes[at + i]))
}

fn get_set(tile: &[u8], kind: Kind, n_steps: usize, step: usize, set: usize, lane: usize) -> f32 {
    match set_at(kind, n_steps, step, set, lane) {
        (Scale::F32, at, _) => get_f32(tile, at),
        (Scale::F16, at, _) => f16::from_ne_bytes([tile[at], tile[at + 1]]).to_f32(),
        (Scale::Factored, at, factor) => get_f32(tile, factor) * f32::from(tile[at] as i8),
    }
}

/// The scales and mins of a matrix: number `set` of step `step` of row `row`.
#[derive(Clone, Copy)]
struct SetValues<'a> {
    /// For each set: values, how many of them a row has for a step, which of them it is.
    sets: [(&'a [f32], usize, usize); 2],
    n_sets: usize,
    n_steps: usize,
    n_out: usize,
}

/// Factors and numbers of all sets, `[row, head, set]` and `[row, head, set]` of 8.
type Factors = Vec<(f32, [i8; STEPS_PER_HEAD])>;

impl SetValues<'_> {
    fn get(&self, row: usize, step: usize, set: usize) -> f32 {
        let (values, per_step, index) = self.sets[set];
        values[(row * self.n_steps + step) * per_step + index]
    }

    /// The smallest of these types and f32 that is exact. (Not all types for all layouts: each is a kernel to compile.)
    fn scale_type(&self, types: &[Scale], n_threads: usize) -> (Scale, Factors) {
        let exact = |&v: &f32| f16::from_f32(v).to_f32().to_bits() == v.to_bits();
        if types.contains(&Scale::F16) && self.sets[..self.n_sets].iter().all(|(values, ..)| values.iter().all(exact)) {
            return (Scale::F16, Vec::new());
        }
        if types.contains(&Scale::Factored)
            && let Some(factors) = self.factors(n_threads)
        {
            return (Scale::Factored, factors);
        }
        (Scale::F32, Vec::new())
    }

    fn factors(&self, n_threads: usize) -> Option<Factors> {
        let per_row = self.n_steps.div_ceil(STEPS_PER_HEAD) * self.n_sets;
        let mut factors = vec![Default::default(); self.n_out * per_row];
        let is_exact = AtomicBool::new(true);
        let n_rows = parallel::part_size(self.n_out, n_threads, 64);
        let parts = factors.chunks_mut(n_rows * per_row.max(1)).enumerate();
        parallel::for_each(n_threads, parts, |(part, factors)| {
            for (row, factors) in (part * n_rows..).zip(factors.chunks_mut(per_row)) {
                if !is_exact.load(Ordering::Relaxed) || self.factors_of(row, factors).is_none() {
                    is_exact.store(false, Ordering::Relaxed);
                    return;
                }
            }
        });
        is_exact.into_inner().then_some(factors)
    }

    fn factors_of(&self, row: usize, factors: &mut [(f32, [i8; STEPS_PER_HEAD])]) -> Option<()> {
        for (head, factors) in factors.chunks_exact_mut(self.n_sets).enumerate() {
            let first = head * STEPS_PER_HEAD;
            let n = STEPS_PER_HEAD.min(self.n_steps - first);
            for (set, factor) in factors.iter_mut().enumerate() {
                let mut values = [0.0; STEPS_PER_HEAD];
                for (i, value) in values[..n].iter_mut().enumerate() {
                    *value = self.get(row, first + i, set);
                }
                *factor = factor::factor(&values[..n])?;
            }
        }
        Some(())
    }
}

/// Whether all quants are in -32..=31. (GGUF's Q5_0 and Q6_K.)
fn fit_6_bits(quants: &[i8]) -> bool {
    // Bit 5 and those above are the same in what fits.
    quants.iter().fold(0, |bits, &q| bits | (q ^ (q >> 7)) as u8) < 32
}

/// The value a quant stands for, rounded as a loader's dequantization rounds: after the product and after the sum.
fn dequantize(scale: f32, quant: f32, min: Option<f32>) -> f32 {
    let product = scale * quant;
    min.map_or(product, |min| product + min)
}

impl Packed {
    /// Packs a matrix into memory of `arena`, on so many threads. In [`Precision::Float32`] quantized weights become the f32 values that
    /// they stand for.
    pub fn new(
        source: &LinearSource<'_>,
        precision: Precision,
        n_threads: usize,
        arena: &mut Arena,
    ) -> Result<Self, KernelError> {
        check(source)?;
        let (n_out, n_in) = (source.n_out, source.n_in);
        let n_steps = n_in / GROUP;
        let sets = |sets, n_sets| SetValues { sets, n_sets, n_steps, n_out };
        let none: (&[f32], usize, usize) = (&[], 1, 0);
        let (kind, values, factors) = match (source.data, precision) {
            (WeightData::F16(_), _) => (Kind::F16, sets([none; 2], 0), Vec::new()),
            (WeightData::Bf16(_), _) => (Kind::Bf16, sets([none; 2], 0), Vec::new()),
            (WeightData::F32(_), _) | (_, Precision::Float32) => (Kind::F32, sets([none; 2], 0), Vec::new()),
            (WeightData::Q4 { scales, mins, .. }, _) => {
                let values = sets([(scales, 1, 0), (mins, 1, 0)], 2);
                let (scale, factors) = values.scale_type(&[Scale::F16, Scale::Factored], n_threads);
                (Kind::Q4(scale), values, factors)
            }
            (WeightData::Q8 { quants, group: 16, scales, .. }, _) => {
                let values = sets([(scales, 2, 0), (scales, 2, 1)], 2);
                let is_6_bits = fit_6_bits(quants);
                let (scale, factors) = values.scale_type(if is_6_bits { &[Scale::Factored] } else { &[] }, n_threads);
                (if is_6_bits { Kind::Q6Half(scale) } else { Kind::Q8Half(scale) }, values, factors)
            }
            (WeightData::Q8 { quants, scales, mins: None, .. }, _) => {
                let values = sets([(scales, 1, 0), none], 1);
                let (scale, factors) = values.scale_type(&[Scale::F16], n_threads);
                (if fit_6_bits(quants) { Kind::Q6(scale) } else { Kind::Q8(scale) }, values, factors)
            }
            (WeightData::Q8 { scales, mins: Some(mins), .. }, _) => {
                let values = sets([(scales, 1, 0), (mins, 1, 0)], 2);
                let (scale, factors) = values.scale_type(&[Scale::F16, Scale::Factored], n_threads);
                (Kind::Q8Min(scale), values, factors)
            }
        };
        let mut packed = Self {
            kind,
            n_out,
            n_in,
            data: Region::default(),
            bias: None,
            slice_width: source.slice_width,
            n_levels: if kind.is_quantized() { source.activations.count() } else { 1 },
        };
        let tile_bytes = packed.tile_bytes();
        packed.data = arena.zeroed("weights", n_out.div_ceil(TILE) * tile_bytes)?;
        let heads = packed.heads_bytes();
        let n_tiles = parallel::part_size(n_out.div_ceil(TILE), n_threads, 4);
        let pack = |(tile, bytes): (usize, &mut [u8])| {
            let rows = tile * TILE..n_out.min((tile + 1) * TILE);
            for (step, bytes) in bytes[heads..].chunks_exact_mut(kind.step_bytes()).enumerate() {
                pack_step(kind, &source.data, n_in, rows.clone(), step, &mut bytes[..kind.weight_bytes()]);
            }
            if values.n_sets > 0 {
                pack_sets(kind, &values, &factors, rows, bytes);
            }
        };
        let parts = packed.data.as_mut_slice().chunks_mut(n_tiles * tile_bytes).enumerate();
        parallel::for_each(n_threads, parts, |(part, bytes)| {
            (part * n_tiles..).zip(bytes.chunks_exact_mut(tile_bytes)).for_each(pack);
        });
        if let Some(values) = source.bias {
            let mut bias = Aligned::zeroed("biases", n_out.next_multiple_of(TILE))?;
            bias.as_mut_slice()[..n_out].copy_from_slice(values);
            packed.bias = Some(bias);
        }
        Ok(packed)
    }

    /// Bytes taken.
    pub fn bytes(&self) -> u64 {
        self.data.bytes() + self.bias.as_ref().map_or(0, Aligned::bytes)
    }

    /// Steps of a tile.
    pub fn n_steps(&self) -> usize {
        self.n_in / self.kind.step_width()
    }

    /// Bytes of the heads of a tile.
    fn heads_bytes(&self) -> usize {
        self.n_steps().div_ceil(STEPS_PER_HEAD) * self.kind.head_bytes()
    }

    /// Bytes of a tile.
    pub fn tile_bytes(&self) -> usize {
        self.heads_bytes() + self.n_steps() * self.kind.step_bytes()
    }

    /// The values of row `row` (below `n_out`), `n_in` of them, to `out`.
    pub fn unpack_row(&self, row: usize, mut out: impl FnMut(usize, f32)) {
        let lane = row % TILE;
        let tile = &self.data.as_slice()[row / TILE * self.tile_bytes()..][..self.tile_bytes()];
        for (step, weights) in tile[self.heads_bytes()..].chunks_exact(self.kind.step_bytes()).enumerate() {
            let set = |set: usize| get_set(tile, self.kind, self.n_steps(), step, set, lane);
            let base = step * self.kind.step_width();
            let mut quants = |scales: [f32; 2], min: Option<f32>, quant: &dyn Fn(usize) -> f32| {
                (0..GROUP).for_each(|i| out(base + i, dequantize(scales[i / 16], quant(i), min)));
            };
            let nibble = |i: usize| {
                let byte = weights[i / 8 * 4 * TILE + 4 * lane + i % 4];
                if i % 8 < 4 { byte & 15 } else { byte >> 4 }
            };
            let byte = |i: usize| f32::from((weights[i / 4 * 4 * TILE + 4 * lane + i % 4] ^ 0x80) as i8);
            let six = |i: usize| {
                let high = weights[16 * TILE + i / 16 * 4 * TILE + 4 * lane + i % 4] >> (2 * (i / 4 % 4)) & 3;
                f32::from(nibble(i) | high << 4) - 32.0
            };
            match self.kind {
                Kind::F32 => out(base, get_f32(weights, 4 * lane)),
                Kind::F16 => out(base, f16::from_ne_bytes([weights[2 * lane], weights[2 * lane + 1]]).to_f32()),
                Kind::Bf16 => out(base, bf16::from_ne_bytes([weights[2 * lane], weights[2 * lane + 1]]).to_f32()),
                Kind::Q4(_) => quants([set(0); 2], Some(set(1)), &|i| f32::from(nibble(i))),
                Kind::Q8(_) => quants([set(0); 2], None, &byte),
                Kind::Q8Min(_) => quants([set(0); 2], Some(set(1)), &byte),
                Kind::Q8Half(_) => quants([set(0), set(1)], None, &byte),
                Kind::Q6(_) => quants([set(0); 2], None, &six),
                Kind::Q6Half(_) => quants([set(0), set(1)], None, &six),
            }
        }
    }
}

/// The f32 that element `index` stands for.
pub(crate) fn value(data: &WeightData<'_>, index: usize) -> f32 {
    match *data {
        WeightData::F32(w) => w[index],
        WeightData::F16(w) => w[index].to_f32(),
        WeightData::Bf16(w) => w[index].to_f32(),
        WeightData::Q4 { quants, scales, mins } => {
            let group = index / GROUP;
            dequantize(scales[group], f32::from(quants[index]), Some(mins[group]))
        }
        WeightData::Q8 { quants, group, scales, mins } => {
            let at = index / group;
            dequantize(scales[at], f32::from(quants[index]), mins.map(|mins| mins[at]))
        }
    }
}
