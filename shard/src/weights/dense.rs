//! Dense tensors: copied as they are.

use half::{bf16, f16};
use phalanx_cluster::checkpoint::TensorType;

use super::{Decoder, Numbers, Part};

pub(super) const F32: Decoder = Decoder {
    dtype: TensorType::F32,
    granularity: 1,
    decode: |part, _| Numbers::F32(decode(part, f32::from_le_bytes)),
};

pub(super) const F16: Decoder = Decoder {
    dtype: TensorType::F16,
    granularity: 1,
    decode: |part, _| Numbers::F16(decode(part, f16::from_le_bytes)),
};

pub(super) const BF16: Decoder = Decoder {
    dtype: TensorType::Bf16,
    granularity: 1,
    decode: |part, _| Numbers::Bf16(decode(part, bf16::from_le_bytes)),
};

fn decode<T, const N: usize>(part: &Part<'_>, from_le_bytes: fn([u8; N]) -> T) -> Vec<T> {
    let mut numbers = Vec::with_capacity(part.len());
    for row in part.rows() {
        numbers.extend(row.as_chunks().0[part.cols.clone()].iter().map(|&bytes| from_le_bytes(bytes)));
    }
    numbers
}
