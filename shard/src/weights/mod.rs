//! From a checkpoint's tensors to the few layouts that devices take: any rows and columns of any tensor type, exactly.
//!
//! A tensor type is one file and one line in `DECODERS`. Widening loses nothing: `scale * quant + min` in f32 gives
//! the very bits that ggml's own dequantization gives. Only the bytes of the wanted rows are touched.

mod block;
mod dense;
mod k_scales;
mod q4_0;
mod q4_1;
mod q4_k;
mod q5_0;
mod q5_1;
mod q5_k;
mod q6_k;
mod q8_0;
#[cfg(test)]
mod tests;
mod workshop;

use std::ops::Range;

use half::{bf16, f16};
use phalanx_cluster::checkpoint::{Checkpoint, CheckpointError, TensorInfo, TensorType};
use phalanx_kernels::ops::{ActivationLevels, LinearSource, WeightData};

pub use self::workshop::Workshop;

/// How one tensor type becomes a layout.
struct Decoder {
    dtype: TensorType,
    /// Columns may be cut at multiples of this: the quant group.
    granularity: usize,
    decode: fn(&Part<'_>, &mut Workshop) -> Numbers,
}

/// Every tensor type has one.
static DECODERS: &[Decoder] = &[
    dense::F32,
    dense::F16,
    dense::BF16,
    q4_0::DECODER,
    q4_1::DECODER,
    q5_0::DECODER,
    q5_1::DECODER,
    q8_0::DECODER,
    q4_k::DECODER,
    q5_k::DECODER,
    q6_k::DECODER,
];

/// What is cut out of a tensor.
struct Part<'a> {
    /// The wanted rows, whole.
    bytes: &'a [u8],
    row_bytes: usize,
    /// The wanted columns of each; starts and ends at multiples of the granularity.
    cols: Range<usize>,
}

impl Part<'_> {
    fn rows(&self) -> impl Iterator<Item = &[u8]> {
        self.bytes.chunks_exact(self.row_bytes)
    }

    /// Number of elements that come out.
    fn len(&self) -> usize {
        self.bytes.len() / self.row_bytes * self.cols.len()
    }
}

/// Decoded numbers, owned; see [`WeightData`].
#[derive(Debug, Clone, PartialEq)]
enum Numbers {
    F32(Vec<f32>),
    F16(Vec<f16>),
    Bf16(Vec<bf16>),
    Q4 { quants: Vec<u8>, scales: Vec<f32>, mins: Vec<f32> },
    Q8 { quants: Vec<i8>, group: usize, scales: Vec<f32>, mins: Option<Vec<f32>> },
}

/// Rows and columns of a weight matrix, decoded into memory.
#[derive(Debug, Clone, PartialEq)]
pub struct OwnedWeight {
    n_out: usize,
    n_in: usize,
    numbers: Numbers,
}

impl OwnedWeight {
    /// Decodes `rows` x `cols` of a tensor. Columns of quantized tensors may be cut at any multiple of the quant group:
    /// 32, or 16 for Q6_K; a K-quant's block of 256 may be cut inside. The memory is the workshop's: [`Workshop::take_back`].
    ///
    /// # Errors
    /// If there's no such tensor, or the ranges are not inside it or cut a quant group.
    pub fn load(
        checkpoint: &dyn Checkpoint,
        name: &str,
        rows: Range<usize>,
        cols: Range<usize>,
        workshop: &mut Workshop,
    ) -> Result<Self, CheckpointError> {
        let error = |reason| tensor_error(checkpoint, name, reason);
        let tensor = checkpoint.find(name).ok_or_else(|| error("missing".to_owned()))?;
        if cols.start > cols.end || cols.end > tensor.cols {
            return Err(error(format!("want columns {cols:?}, the file has {}", tensor.cols)));
        }
        let decoder = decoder(tensor).ok_or_else(|| error(format!("{:?} has no decoder", tensor.dtype)))?;
        let group = decoder.granularity;
        if !cols.start.is_multiple_of(group) || !cols.end.is_multiple_of(group) {
            return Err(error(format!("columns {cols:?} cut a quant group of {group} ({:?})", tensor.dtype)));
        }
        let bytes = checkpoint.rows(name, rows.clone())?;
        let part = Part { bytes: &bytes, row_bytes: tensor.row_bytes(), cols: cols.clone() };
        Ok(Self { n_out: rows.len(), n_in: cols.len(), numbers: (decoder.decode)(&part, workshop) })
    }

    /// Rows.
    pub fn n_out(&self) -> usize {
        self.n_out
    }

    /// Columns.
    pub fn n_in(&self) -> usize {
        self.n_in
    }

    /// The matrix as devices take it. `bias` and `slice_width` as in [`LinearSource`].
    pub fn as_source<'a>(
        &'a self,
        bias: Option<&'a [f32]>,
        slice_width: Option<usize>,
        activations: ActivationLevels,
    ) -> LinearSource<'a> {
        LinearSource { n_out: self.n_out, n_in: self.n_in, data: self.data(), bias, slice_width, activations }
    }

    /// The numbers.
    pub fn data(&self) -> WeightData<'_> {
        match &self.numbers {
            Numbers::F32(v) => WeightData::F32(v),
            Numbers::F16(v) => WeightData::F16(v),
            Numbers::Bf16(v) => WeightData::Bf16(v),
            Numbers::Q4 { quants, scales, mins } => WeightData::Q4 { quants, scales, mins },
            Numbers::Q8 { quants, group, scales, mins } => {
                WeightData::Q8 { quants, group: *group, scales, mins: mins.as_deref() }
            }
        }
    }
}

/// Part of a vector (a norm's weights, a bias) as f32.
///
/// # Errors
/// If there's no such tensor, it has more than one row, is quantized, or the range is not inside it.
pub fn load_vector(checkpoint: &dyn Checkpoint, name: &str, range: Range<usize>) -> Result<Vec<f32>, CheckpointError> {
    let error = |reason| tensor_error(checkpoint, name, reason);
    if let Some(tensor) = checkpoint.find(name)
        && tensor.rows != 1
    {
        return Err(error(format!("want a vector, the file has [{}, {}]", tensor.rows, tensor.cols)));
    }
    match OwnedWeight::load(checkpoint, name, 0..1, range, &mut Workshop::new(1))?.numbers {
        Numbers::F32(v) => Ok(v),
        Numbers::F16(v) => Ok(v.into_iter().map(f16::to_f32).collect()),
        Numbers::Bf16(v) => Ok(v.into_iter().map(bf16::to_f32).collect()),
        Numbers::Q4 { .. } | Numbers::Q8 { .. } => Err(error("a vector must not be quantized".to_owned())),
    }
}

fn decoder(tensor: &TensorInfo) -> Option<&'static Decoder> {
    DECODERS.iter().find(|d| d.dtype == tensor.dtype)
}

fn tensor_error(checkpoint: &dyn Checkpoint, name: &str, reason: String) -> CheckpointError {
    CheckpointError::Tensor { file: checkpoint.path().clone(), tensor: name.to_owned(), reason }
}
