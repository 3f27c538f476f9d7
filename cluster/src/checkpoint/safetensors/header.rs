//! The header of one safetensors file: a length in 8 bytes, then JSON.
//!
//! Specification: <https://github.com/huggingface/safetensors#format>.

use std::{fmt, ops::Range, path::Path};

use serde::de::{Deserialize, Deserializer, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor};

use crate::checkpoint::{CheckpointError, TensorInfo, TensorType};

/// The longest header that the specification allows.
const MAX_HEADER_BYTES: u64 = 100_000_000;
/// More dimensions than any weight has.
const MAX_DIMS: usize = 8;

const TENSOR_TYPES: &[(&str, TensorType)] =
    &[("F32", TensorType::F32), ("F16", TensorType::F16), ("BF16", TensorType::Bf16)];

/// One tensor as the file names it.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) name: String,
    /// Type and `[rows, cols]`, or why the tensor can't be read.
    pub(super) shape: Result<(TensorType, usize, usize), String>,
    /// Where its bytes are in the file; inside it, and no two overlap.
    pub(super) range: Range<usize>,
}

impl Entry {
    /// The tensor under its canonical name.
    pub(super) fn info(&self, name: String) -> Result<TensorInfo, String> {
        self.shape.clone().map(|(dtype, rows, cols)| TensorInfo { name, dtype, rows, cols })
    }
}

/// Bytes before the tensor data, and the tensors in the order of the header.
pub(super) fn read(path: &Path, bytes: &[u8]) -> Result<(usize, Vec<Entry>), CheckpointError> {
    let error = |field: &str, reason: String| CheckpointError::Invalid {
        file: path.to_owned(),
        field: field.to_owned(),
        reason,
    };
    let Some((len, rest)) = bytes.split_first_chunk() else {
        return Err(error("header length", format!("the file has only {} bytes", bytes.len())));
    };
    let len = u64::from_le_bytes(*len);
    if len > MAX_HEADER_BYTES || len > rest.len() as u64 {
        let most = MAX_HEADER_BYTES.min(rest.len() as u64);
        return Err(error("header length", format!("{len}; at most {most} is possible")));
    }
    let (json, data) = rest.split_at(len as usize);
    let raw: RawHeader = serde_json::from_slice(json).map_err(|e| error("header", e.to_string()))?;

    let data_start = 8 + json.len();
    let mut entries = Vec::with_capacity(raw.0.len());
    for (name, tensor) in raw.0 {
        let Offsets(start, end) = tensor.data_offsets;
        if start > end || end > data.len() as u64 {
            let reason = format!("data_offsets [{start}, {end}] of {} bytes of data", data.len());
            return Err(error(&format!("tensor {name}"), reason));
        }
        let (start, end) = (start as usize, end as usize);
        let shape = shape(&tensor, end - start).map_err(|reason| error(&format!("tensor {name}"), reason))?;
        entries.push(Entry { name, shape, range: data_start + start..data_start + end });
    }
    let mut order: Vec<&Entry> = entries.iter().collect();
    order.sort_by_key(|e| (e.range.start, e.range.end));
    for pair in order.windows(2) {
        if pair[0].range.end > pair[1].range.start {
            let reason = format!("overlaps tensor {}", pair[0].name);
            return Err(error(&format!("tensor {}", pair[1].name), reason));
        }
    }
    Ok((data_start, entries))
}

/// Outer error: the header contradicts itself. Inner error: a tensor of a kind that can't be read.
fn shape(tensor: &RawTensor, n_bytes: usize) -> Result<Result<(TensorType, usize, usize), String>, String> {
    let dims = &tensor.shape.0;
    let Some(&(_, dtype)) = TENSOR_TYPES.iter().find(|(name, _)| *name == tensor.dtype) else {
        return Ok(Err(format!("type {}; F32, F16 and BF16 can be read", tensor.dtype)));
    };
    let product = |dims: &[u64]| dims.iter().try_fold(1u64, |product, &dim| product.checked_mul(dim));
    let bytes = product(dims).and_then(|n| n.checked_mul(dtype.block_bytes() as u64));
    if bytes != Some(n_bytes as u64) {
        return Err(format!(
            "shape {dims:?} of {} does not take the {n_bytes} bytes of its data_offsets",
            tensor.dtype
        ));
    }
    if n_bytes == 0 {
        return Ok(Err(format!("no elements: shape {dims:?}")));
    }
    // The product fits the file and no dimension is 0, so neither factor can overflow.
    let (cols, rows) = dims.split_last().map_or((1, 1), |(&cols, rows)| (cols, rows.iter().product()));
    Ok(Ok((dtype, rows as usize, cols as usize)))
}

/// Tensors in the order of the file. Names must differ, which a plain map would not notice.
struct RawHeader(Vec<(String, RawTensor)>);

#[derive(serde::Deserialize)]
struct RawTensor {
    dtype: String,
    shape: Dims,
    data_offsets: Offsets,
}

#[derive(serde::Deserialize)]
struct Offsets(u64, u64);

/// A few numbers: a long list is refused while it is read.
struct Dims(Vec<u64>);

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Tensors;
        impl<'de> Visitor<'de> for Tensors {
            type Value = RawHeader;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawHeader, A::Error> {
                let mut tensors = Vec::new();
                let mut names = std::collections::HashSet::new();
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        map.next_value::<IgnoredAny>()?;
                        continue;
                    }
                    if !names.insert(name.clone()) {
                        return Err(A::Error::custom(format!("there are two tensors named {name}")));
                    }
                    tensors.push((name, map.next_value()?));
                }
                Ok(RawHeader(tensors))
            }
        }
        deserializer.deserialize_map(Tensors)
    }
}

impl<'de> Deserialize<'de> for Dims {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Few;
        impl<'de> Visitor<'de> for Few {
            type Value = Dims;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "at most {MAX_DIMS} dimensions")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Dims, A::Error> {
                let mut dims = Vec::new();
                while let Some(dim) = seq.next_element()? {
                    if dims.len() == MAX_DIMS {
                        return Err(A::Error::custom(format!("more than {MAX_DIMS} dimensions")));
                    }
                    dims.push(dim);
                }
                Ok(Dims(dims))
            }
        }
        deserializer.deserialize_seq(Few)
    }
}
