//! Cutting and widening of block formats. Layouts of the blocks: `ggml-common.h` of llama.cpp.

use half::f16;
use phalanx_cluster::checkpoint::TensorType;

use super::{Decoder, Numbers, Part};

/// The longest block.
const MAX_BLOCK: usize = 256;
/// The most groups in a block.
const MAX_GROUPS: usize = 16;

/// A block of `BYTES` bytes, widened: the first elements of each array are used.
pub(super) struct Widened<Q> {
    pub(super) quants: [Q; MAX_BLOCK],
    /// Per group.
    pub(super) scales: [f32; MAX_GROUPS],
    /// Per group, where the format has them.
    pub(super) mins: [f32; MAX_GROUPS],
}

/// A quantized tensor type: blocks of `BYTES` bytes.
pub(super) trait BlockFormat<const BYTES: usize> {
    const DTYPE: TensorType;
    /// Weights that share a scale.
    const GROUP: usize;
    /// Whether weights are `scale * quant + min`, not `scale * quant`.
    const MINS: bool;
    type Quant: Quant;

    fn widen(block: &[u8; BYTES], out: &mut Widened<Self::Quant>);
}

/// A widened quant's type, which decides the layout.
pub(super) trait Quant: Copy + Default {
    fn numbers(quants: Vec<Self>, group: usize, scales: Vec<f32>, mins: Option<Vec<f32>>) -> Numbers;
}

impl Quant for u8 {
    /// 4-bit layouts always have mins.
    fn numbers(quants: Vec<Self>, _group: usize, scales: Vec<f32>, mins: Option<Vec<f32>>) -> Numbers {
        Numbers::Q4 { quants, scales, mins: mins.unwrap_or_default() }
    }
}

impl Quant for i8 {
    fn numbers(quants: Vec<Self>, group: usize, scales: Vec<f32>, mins: Option<Vec<f32>>) -> Numbers {
        Numbers::Q8 { quants, group, scales, mins }
    }
}

/// The registry line of a block format.
pub(super) const fn decoder<F: BlockFormat<BYTES>, const BYTES: usize>() -> Decoder {
    Decoder { dtype: F::DTYPE, granularity: F::GROUP, decode: decode::<F, BYTES> }
}

fn decode<F: BlockFormat<BYTES>, const BYTES: usize>(part: &Part<'_>) -> Numbers {
    let block_len = F::DTYPE.block_len();
    let n_groups = part.len() / F::GROUP;
    let mut quants = Vec::with_capacity(part.len());
    let mut scales = Vec::with_capacity(n_groups);
    let mut mins = Vec::with_capacity(if F::MINS { n_groups } else { 0 });
    let mut widened =
        Widened { quants: [F::Quant::default(); MAX_BLOCK], scales: [0.0; MAX_GROUPS], mins: [0.0; MAX_GROUPS] };
    let blocks = part.cols.start / block_len..part.cols.end.div_ceil(block_len);
    for row in part.rows() {
        for (index, block) in blocks.clone().zip(&row.as_chunks().0[blocks.clone()]) {
            F::widen(block, &mut widened);
            // All of the block, but for the first and last of a row that is cut inside one.
            let start = part.cols.start.saturating_sub(index * block_len);
            let end = (part.cols.end - index * block_len).min(block_len);
            let groups = start / F::GROUP..end / F::GROUP;
            quants.extend_from_slice(&widened.quants[start..end]);
            scales.extend_from_slice(&widened.scales[groups.clone()]);
            if F::MINS {
                mins.extend_from_slice(&widened.mins[groups]);
            }
        }
    }
    Quant::numbers(quants, F::GROUP, scales, F::MINS.then_some(mins))
}

/// The half-precision number at `offset` of a block.
pub(super) fn half(block: &[u8], offset: usize) -> f32 {
    f16::from_le_bytes([block[offset], block[offset + 1]]).to_f32()
}
