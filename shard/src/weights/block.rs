//! Cutting and widening of block formats. Layouts of the blocks: `ggml-common.h` of llama.cpp.

use half::f16;
use phalanx_cluster::checkpoint::TensorType;
use phalanx_kernels::parallel;

use super::{
    Decoder, Numbers, Part,
    workshop::{self, Workshop},
};

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
pub(super) trait Quant: Copy + Default + Send {
    /// Where the workshop has memory for them.
    fn memory(workshop: &mut Workshop) -> &mut Vec<Self>;
    fn numbers(quants: Vec<Self>, group: usize, scales: Vec<f32>, mins: Option<Vec<f32>>) -> Numbers;
}

impl Quant for u8 {
    fn memory(workshop: &mut Workshop) -> &mut Vec<Self> {
        &mut workshop.unsigned
    }

    /// 4-bit layouts always have mins.
    fn numbers(quants: Vec<Self>, _group: usize, scales: Vec<f32>, mins: Option<Vec<f32>>) -> Numbers {
        Numbers::Q4 { quants, scales, mins: mins.unwrap_or_default() }
    }
}

impl Quant for i8 {
    fn memory(workshop: &mut Workshop) -> &mut Vec<Self> {
        &mut workshop.signed
    }

    fn numbers(quants: Vec<Self>, group: usize, scales: Vec<f32>, mins: Option<Vec<f32>>) -> Numbers {
        Numbers::Q8 { quants, group, scales, mins }
    }
}

/// The registry line of a block format.
pub(super) const fn decoder<F: BlockFormat<BYTES>, const BYTES: usize>() -> Decoder {
    Decoder { dtype: F::DTYPE, granularity: F::GROUP, decode: decode::<F, BYTES> }
}

fn decode<F: BlockFormat<BYTES>, const BYTES: usize>(part: &Part<'_>, workshop: &mut Workshop) -> Numbers {
    let (per_row, n_threads) = (part.cols.len(), workshop.n_threads);
    let groups_per_row = per_row / F::GROUP;
    let n_groups = part.len() / F::GROUP;
    let mut quants = workshop::room(F::Quant::memory(workshop), part.len());
    let mut scales = workshop::room(&mut workshop.scales, n_groups);
    let mut mins = if F::MINS { workshop::room(&mut workshop.mins, n_groups) } else { Vec::new() };
    if let Some(n_rows) = part.len().checked_div(per_row) {
        let n_rows = parallel::part_size(n_rows, n_threads, 64);
        let bytes = part.bytes.chunks(n_rows * part.row_bytes);
        let quants = quants.chunks_mut(n_rows * per_row);
        let scales = scales.chunks_mut(n_rows * groups_per_row);
        let mut mins = mins.chunks_mut(n_rows * groups_per_row);
        let parts = bytes.zip(quants).zip(scales).map(|((bytes, quants), scales)| {
            (Part { bytes, row_bytes: part.row_bytes, cols: part.cols.clone() }, quants, scales, mins.next())
        });
        parallel::for_each(n_threads, parts, |(part, quants, scales, mins)| {
            decode_rows::<F, BYTES>(&part, quants, scales, mins.unwrap_or_default());
        });
    }
    Quant::numbers(quants, F::GROUP, scales, F::MINS.then_some(mins))
}

/// Decodes rows into memory of just their size; `mins` is empty where the format has none.
fn decode_rows<F: BlockFormat<BYTES>, const BYTES: usize>(
    part: &Part<'_>,
    quants: &mut [F::Quant],
    scales: &mut [f32],
    mins: &mut [f32],
) {
    let block_len = F::DTYPE.block_len();
    let mut widened =
        Widened { quants: [F::Quant::default(); MAX_BLOCK], scales: [0.0; MAX_GROUPS], mins: [0.0; MAX_GROUPS] };
    let blocks = part.cols.start / block_len..part.cols.end.div_ceil(block_len);
    // Index of the next weight, which groups divide.
    let mut at = 0;
    for row in part.rows() {
        for (index, block) in blocks.clone().zip(&row.as_chunks().0[blocks.clone()]) {
            F::widen(block, &mut widened);
            // All of the block, but for the first and last of a row that is cut inside one.
            let start = part.cols.start.saturating_sub(index * block_len);
            let end = (part.cols.end - index * block_len).min(block_len);
            let groups = start / F::GROUP..end / F::GROUP;
            let first = at / F::GROUP;
            quants[at..][..end - start].copy_from_slice(&widened.quants[start..end]);
            scales[first..][..groups.len()].copy_from_slice(&widened.scales[groups.clone()]);
            if F::MINS {
                mins[first..][..groups.len()].copy_from_slice(&widened.mins[groups]);
            }
            at += end - start;
        }
    }
}

/// The half-precision number at `offset` of a block.
pub(super) fn half(block: &[u8], offset: usize) -> f32 {
    f16::from_le_bytes([block[offset], block[offset + 1]]).to_f32()
}
