//! How weight matrices lie in memory.
//!
//! Output rows are packed in tiles of [`TILE`] rows (the last one padded with zeros), so that a vector lane is an output
//! row and every output is summed strictly in the order of its inputs. A tile is a run of *steps*:
//!
//! | layout | a step is | its bytes |
//! |---|---|---|
//! | dense | one input | 16 weights of 4 or 2 bytes |
//! | q4 | 32 inputs | 256 B of nibbles, 16 scales, 16 mins |
//! | q8 | 32 inputs | 512 B of weights + 128, 16 scales, 16 mins if there are any |
//! | q8, groups of 16 | 32 inputs | 512 B of weights + 128, 16 scales of the first 16 inputs, 16 of the others |
//!
//! Quants lie as `vpdpbusd` wants them: 4 consecutive inputs of a row in 4 consecutive bytes, then the next row. A byte
//! of nibbles holds input `8c + j` low and `8c + 4 + j` high. Scales and mins are f32, or f16 where every one of the
//! matrix is exactly an f16 (GGUF's Q4_0, Q4_1, Q5_0, Q8_0): the same values in half the bytes.

use half::{bf16, f16};

use crate::{
    error::KernelError,
    ops::{LinearSource, Precision, WeightData},
    tensor::Aligned,
};

/// Output rows of a tile.
pub(crate) const TILE: usize = 16;

/// Inputs that share an activation scale, and inputs of a step of quantized weights.
pub(crate) const GROUP: usize = 32;

/// Type of packed scales and mins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scale {
    F32,
    F16,
}

impl Scale {
    fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 => 2,
        }
    }
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
}

impl Kind {
    /// Inputs of a step.
    pub fn step_width(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::Bf16 => 1,
            Self::Q4(_) | Self::Q8(_) | Self::Q8Min(_) | Self::Q8Half(_) => GROUP,
        }
    }

    /// Bytes of quants or dense weights of a step.
    fn weight_bytes(self) -> usize {
        match self {
            Self::F32 => 4 * TILE,
            Self::F16 | Self::Bf16 => 2 * TILE,
            Self::Q4(_) => GROUP / 2 * TILE,
            Self::Q8(_) | Self::Q8Min(_) | Self::Q8Half(_) => GROUP * TILE,
        }
    }

    /// Bytes of a step.
    pub fn step_bytes(self) -> usize {
        self.weight_bytes()
            + match self {
                Self::F32 | Self::F16 | Self::Bf16 => 0,
                Self::Q8(scale) => TILE * scale.bytes(),
                Self::Q4(scale) | Self::Q8Min(scale) | Self::Q8Half(scale) => 2 * TILE * scale.bytes(),
            }
    }

    /// Whether activations are quantized for it.
    pub fn is_quantized(self) -> bool {
        self.step_width() == GROUP
    }
}

/// A packed weight matrix.
#[derive(Debug)]
pub(crate) struct Packed {
    pub kind: Kind,
    pub n_out: usize,
    pub n_in: usize,
    /// Tiles of steps.
    pub data: Aligned<u8>,
    /// Padded to whole tiles.
    pub bias: Option<Aligned<f32>>,
    pub slice_width: Option<usize>,
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
            if let Some(at) = quants.iter().position(|&q| q > 15) {
                return Err(shape("4-bit quants of 0..=15".into(), format!("{} at {at}", quants[at])));
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

/// The type that all of these are exact in.
fn scale_type(values: &[&[f32]]) -> Scale {
    let exact = |&v: &f32| f16::from_f32(v).to_f32().to_bits() == v.to_bits();
    if values.iter().all(|values| values.iter().all(exact)) { Scale::F16 } else { Scale::F32 }
}

/// Writes `values(row)` for the rows of a tile; `bytes` is exactly their room.
fn put_scales(bytes: &mut [u8], scale: Scale, values: impl Fn(usize) -> f32) {
    for (lane, to) in bytes.chunks_exact_mut(scale.bytes()).enumerate() {
        match scale {
            Scale::F32 => to.copy_from_slice(&values(lane).to_ne_bytes()),
            Scale::F16 => to.copy_from_slice(&f16::from_f32(values(lane)).to_ne_bytes()),
        }
    }
}

fn get_scale(bytes: &[u8], scale: Scale, index: usize) -> f32 {
    match scale {
        Scale::F32 => f32::from_ne_bytes([0, 1, 2, 3].map(|i| bytes[4 * index + i])),
        Scale::F16 => f16::from_ne_bytes([0, 1].map(|i| bytes[2 * index + i])).to_f32(),
    }
}

/// The value a quant stands for, rounded as a loader's dequantization rounds: after the product and after the sum.
fn dequantize(scale: f32, quant: f32, min: Option<f32>) -> f32 {
    let product = scale * quant;
    min.map_or(product, |min| product + min)
}

impl Packed {
    /// Packs a matrix. In [`Precision::Float32`] quantized weights become the f32 values that they stand for.
    pub fn new(source: &LinearSource<'_>, precision: Precision) -> Result<Self, KernelError> {
        check(source)?;
        let (n_out, n_in) = (source.n_out, source.n_in);
        let kind = match (source.data, precision) {
            (WeightData::F16(_), _) => Kind::F16,
            (WeightData::Bf16(_), _) => Kind::Bf16,
            (WeightData::F32(_), _) | (_, Precision::Float32) => Kind::F32,
            (WeightData::Q4 { scales, mins, .. }, _) => Kind::Q4(scale_type(&[scales, mins])),
            (WeightData::Q8 { group: 16, scales, .. }, _) => Kind::Q8Half(scale_type(&[scales])),
            (WeightData::Q8 { scales, mins: None, .. }, _) => Kind::Q8(scale_type(&[scales])),
            (WeightData::Q8 { scales, mins: Some(mins), .. }, _) => Kind::Q8Min(scale_type(&[scales, mins])),
        };
        let tile_bytes = n_in / kind.step_width() * kind.step_bytes();
        let mut data = Aligned::zeroed("weights", n_out.div_ceil(TILE) * tile_bytes)?;
        for (tile, bytes) in data.as_mut_slice().chunks_exact_mut(tile_bytes).enumerate() {
            let rows = tile * TILE..n_out.min((tile + 1) * TILE);
            for (step, bytes) in bytes.chunks_exact_mut(kind.step_bytes()).enumerate() {
                pack_step(kind, &source.data, n_in, rows.clone(), step, bytes);
            }
        }
        let bias = match source.bias {
            None => None,
            Some(values) => {
                let mut bias = Aligned::zeroed("biases", n_out.next_multiple_of(TILE))?;
                bias.as_mut_slice()[..n_out].copy_from_slice(values);
                Some(bias)
            }
        };
        Ok(Self { kind, n_out, n_in, data, bias, slice_width: source.slice_width })
    }

    /// Bytes taken.
    pub fn bytes(&self) -> u64 {
        self.data.bytes() + self.bias.as_ref().map_or(0, Aligned::bytes)
    }

    /// Steps of a tile.
    pub fn n_steps(&self) -> usize {
        self.n_in / self.kind.step_width()
    }

    /// Bytes of a tile.
    pub fn tile_bytes(&self) -> usize {
        self.n_steps() * self.kind.step_bytes()
    }

    /// The values of row `row` (below `n_out`), `n_in` of them, to `out`.
    pub fn unpack_row(&self, row: usize, mut out: impl FnMut(usize, f32)) {
        let lane = row % TILE;
        let tile = &self.data.as_slice()[row / TILE * self.tile_bytes()..][..self.tile_bytes()];
        for (step, bytes) in tile.chunks_exact(self.kind.step_bytes()).enumerate() {
            let (weights, scales) = bytes.split_at(self.kind.weight_bytes());
            let base = step * self.kind.step_width();
            let mut quants = |scale: &dyn Fn(usize) -> f32, min: Option<f32>, quant: &dyn Fn(usize) -> f32| {
                (0..GROUP).for_each(|i| out(base + i, dequantize(scale(i), quant(i), min)));
            };
            let byte = |i: usize| f32::from((weights[i / 4 * 4 * TILE + 4 * lane + i % 4] ^ 0x80) as i8);
            match self.kind {
                Kind::F32 => out(base, get_scale(weights, Scale::F32, lane)),
                Kind::F16 => out(base, get_scale(weights, Scale::F16, lane)),
                Kind::Bf16 => out(base, bf16::from_ne_bytes([weights[2 * lane], weights[2 * lane + 1]]).to_f32()),
                Kind::Q4(s) => {
                    let nibble = |i: usize| {
                        let byte = weights[i / 8 * 4 * TILE + 4 * lane + i % 4];
                        f32::from(if i % 8 < 4 { byte & 15 } else { byte >> 4 })
                    };
                    let (scale, min) = (get_scale(scales, s, lane), get_scale(scales, s, TILE + lane));
                    quants(&|_| scale, Some(min), &nibble);
                }
                Kind::Q8(s) => {
                    let scale = get_scale(scales, s, lane);
                    quants(&|_| scale, None, &byte);
                }
                Kind::Q8Min(s) => {
                    let (scale, min) = (get_scale(scales, s, lane), get_scale(scales, s, TILE + lane));
                    quants(&|_| scale, Some(min), &byte);
                }
                Kind::Q8Half(s) => {
                    let halves = [get_scale(scales, s, lane), get_scale(scales, s, TILE + lane)];
                    quants(&|i| halves[i / 16], None, &byte);
                }
            }
        }
    }
}

/// Fills one step of a tile whose rows are `rows` of the matrix; `bytes` is zeroed.
fn pack_step(
    kind: Kind,
    data: &WeightData<'_>,
    n_in: usize,
    rows: std::ops::Range<usize>,
    step: usize,
    bytes: &mut [u8],
) {
    let n_rows = rows.len();
    let (weights, scales) = bytes.split_at_mut(kind.weight_bytes());
    let first = rows.start * n_in + step * kind.step_width();
    let at = |lane: usize, i: usize| first + lane * n_in + i;
    // Of groups of 32; padding rows have scale 0.
    let group = |values: &[f32], lane: usize| if lane < n_rows { values[at(lane, 0) / GROUP] } else { 0.0 };
    match (kind, *data) {
        (Kind::F32, source) => {
            for (lane, to) in weights.chunks_exact_mut(4).take(n_rows).enumerate() {
                to.copy_from_slice(&value(&source, at(lane, 0)).to_ne_bytes());
            }
        }
        (Kind::F16, WeightData::F16(w)) => {
            for (lane, to) in weights.chunks_exact_mut(2).take(n_rows).enumerate() {
                to.copy_from_slice(&w[at(lane, 0)].to_ne_bytes());
            }
        }
        (Kind::Bf16, WeightData::Bf16(w)) => {
            for (lane, to) in weights.chunks_exact_mut(2).take(n_rows).enumerate() {
                to.copy_from_slice(&w[at(lane, 0)].to_ne_bytes());
            }
        }
        (Kind::Q4(s), WeightData::Q4 { quants, scales: d, mins }) => {
            for lane in 0..n_rows {
                let q = &quants[at(lane, 0)..][..GROUP];
                for (chunk, q) in q.chunks_exact(8).enumerate() {
                    for j in 0..4 {
                        weights[chunk * 4 * TILE + 4 * lane + j] = q[j] | q[4 + j] << 4;
                    }
                }
            }
            let (first, second) = scales.split_at_mut(TILE * s.bytes());
            put_scales(first, s, |lane| group(d, lane));
            put_scales(second, s, |lane| group(mins, lane));
        }
        (Kind::Q8(s) | Kind::Q8Min(s) | Kind::Q8Half(s), WeightData::Q8 { quants, group: width, scales: d, mins }) => {
            weights.fill(0x80);
            for lane in 0..n_rows {
                let q = &quants[at(lane, 0)..][..GROUP];
                for (i, &q) in q.iter().enumerate() {
                    weights[i / 4 * 4 * TILE + 4 * lane + i % 4] = q as u8 ^ 0x80;
                }
            }
            let (first, second) = scales.split_at_mut(TILE * s.bytes());
            if width == 16 {
                let half = |lane: usize, i| if lane < n_rows { d[at(lane, i) / 16] } else { 0.0 };
                put_scales(first, s, |lane| half(lane, 0));
                put_scales(second, s, |lane| half(lane, 16));
            } else {
                put_scales(first, s, |lane| group(d, lane));
                if let Some(mins) = mins {
                    put_scales(second, s, |lane| group(mins, lane));
                }
            }
        }
        // `Packed::new` derives the kind from the data.
        (Kind::F16 | Kind::Bf16 | Kind::Q4(_) | Kind::Q8(_) | Kind::Q8Min(_) | Kind::Q8Half(_), _) => {
            unreachable!("kind {kind:?} is made from other data")
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
