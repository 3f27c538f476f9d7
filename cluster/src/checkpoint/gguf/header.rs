//! The header of a GGUF file: metadata and where each tensor is.
//!
//! Specification: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>.

use std::{
    collections::{BTreeMap, HashMap},
    ops::Range,
    path::Path,
};

use super::{reader::Reader, value::Value};
use crate::checkpoint::{CheckpointError, TensorInfo, TensorType};

/// First bytes of a file.
pub(super) const MAGIC: &[u8; 4] = b"GGUF";

/// Alignment of tensor data where the file doesn't say.
const DEFAULT_ALIGNMENT: u64 = 32;

/// GGUF's number of each tensor type that can be read.
const TENSOR_TYPES: &[(u32, TensorType)] = &[
    (0, TensorType::F32),
    (1, TensorType::F16),
    (2, TensorType::Q4_0),
    (3, TensorType::Q4_1),
    (6, TensorType::Q5_0),
    (7, TensorType::Q5_1),
    (8, TensorType::Q8_0),
    (12, TensorType::Q4K),
    (13, TensorType::Q5K),
    (14, TensorType::Q6K),
    (30, TensorType::Bf16),
];

/// Names of tensor types that are known but can't be read, for the error.
const OTHER_TYPES: &[(u32, &str)] = &[
    (9, "Q8_1"),
    (10, "Q2_K"),
    (11, "Q3_K"),
    (15, "Q8_K"),
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (20, "IQ4_NL"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (23, "IQ4_XS"),
    (24, "I8"),
    (25, "I16"),
    (26, "I32"),
    (27, "I64"),
    (28, "F64"),
    (29, "IQ1_M"),
    (34, "TQ1_0"),
    (35, "TQ2_0"),
    (39, "MXFP4"),
];

/// A header whose parts agree with each other and with the file's length.
#[derive(Debug)]
pub(super) struct Header {
    pub(super) metadata: BTreeMap<String, Value>,
    /// In file order.
    pub(super) tensors: Vec<TensorInfo>,
    /// Where each tensor's bytes are in the file; inside it, and no two overlap.
    pub(super) ranges: Vec<Range<usize>>,
    /// Index in `tensors`.
    pub(super) by_name: HashMap<String, usize>,
    /// Bytes before the tensor data.
    pub(super) data_start: usize,
}

impl Header {
    /// Reads the header of a file that is mapped as `bytes`.
    pub(super) fn read(path: &Path, bytes: &[u8]) -> Result<Self, CheckpointError> {
        let mut reader = Reader::new(path, bytes);
        if reader.take(4, "magic")? != MAGIC {
            return Err(reader.error("magic", "not a GGUF file"));
        }
        let version = reader.u32("version")?;
        if !(2..=3).contains(&version) {
            let reason = if (2..=3).contains(&version.swap_bytes()) {
                "a big-endian file: convert it to little-endian".to_owned()
            } else {
                format!("version {version}; versions 2 and 3 can be read")
            };
            return Err(reader.error("version", reason));
        }
        // The least that a tensor takes: name length, dimension count, one dimension, type, offset.
        let n_tensors = reader.count(8 + 4 + 8 + 4 + 8, "tensor count")?;
        // The least that a value takes: key length, type, one byte.
        let n_values = reader.count(8 + 4 + 1, "metadata count")?;
        let metadata = read_metadata(&mut reader, n_values)?;
        let alignment = alignment(&reader, &metadata)?;

        let mut tensors = Vec::new();
        let mut offsets = Vec::new();
        let mut by_name = HashMap::new();
        for index in 0..n_tensors {
            let (tensor, offset) = read_tensor(&mut reader, index)?;
            if offset % alignment != 0 {
                return Err(reader.error(
                    &format!("tensor {}: offset", tensor.name),
                    format!("{offset} is not a multiple of the alignment {alignment}"),
                ));
            }
            if by_name.insert(tensor.name.clone(), index).is_some() {
                return Err(reader.error(&format!("tensor {}", tensor.name), "there are two of that name"));
            }
            tensors.push(tensor);
            offsets.push(offset);
        }
        let data_start = (reader.offset() as u64).next_multiple_of(alignment);
        let ranges = place(&reader, &tensors, &offsets, data_start, bytes.len())?;
        // An empty file section is fine: a vocabulary-only file ends with its header, unpadded.
        let data_start = (data_start as usize).min(bytes.len());
        Ok(Self { metadata, tensors, ranges, by_name, data_start })
    }
}

fn read_metadata(reader: &mut Reader<'_>, count: usize) -> Result<BTreeMap<String, Value>, CheckpointError> {
    let mut metadata = BTreeMap::new();
    for index in 0..count {
        let key = reader.string(&format!("metadata key {index}"))?;
        let field = format!("metadata {key}");
        let kind = reader.u32(&field)?;
        let value = Value::read(reader, kind, &field)?;
        if metadata.insert(key.to_owned(), value).is_some() {
            return Err(reader.error(&field, "the key is there twice"));
        }
    }
    Ok(metadata)
}

fn alignment(reader: &Reader<'_>, metadata: &BTreeMap<String, Value>) -> Result<u64, CheckpointError> {
    match metadata.get("general.alignment") {
        None => Ok(DEFAULT_ALIGNMENT),
        Some(value) => match value.as_u64() {
            Some(v) if v.is_power_of_two() && (8..=1 << 20).contains(&v) => Ok(v),
            _ => {
                Err(reader.error("metadata general.alignment", format!("want a power of two from 8 on, got {value:?}")))
            }
        },
    }
}

/// One entry of the tensor index, and the tensor's offset in the data.
fn read_tensor(reader: &mut Reader<'_>, index: usize) -> Result<(TensorInfo, u64), CheckpointError> {
    let name = reader.string(&format!("name of tensor {index}"))?;
    let field = format!("tensor {name}");
    let n_dims = reader.u32(&field)?;
    if !(1..=4).contains(&n_dims) {
        return Err(reader.error(&field, format!("{n_dims} dimensions; want 1 to 4")));
    }
    // The first dimension is the contiguous one; the others count rows.
    let cols = reader.u64(&field)?;
    let mut rows = 1u64;
    for _ in 1..n_dims {
        let dim = reader.u64(&field)?;
        rows = rows.checked_mul(dim).ok_or_else(|| reader.error(&field, "the dimensions overflow"))?;
    }
    let number = reader.u32(&field)?;
    let offset = reader.u64(&field)?;
    let Some(&(_, dtype)) = TENSOR_TYPES.iter().find(|(n, _)| *n == number) else {
        let name = OTHER_TYPES.iter().find(|(n, _)| *n == number).map_or("unknown", |(_, name)| name);
        let known = TENSOR_TYPES.iter().map(|(_, t)| format!("{t:?}")).collect::<Vec<_>>().join(", ");
        return Err(reader.error(&field, format!("type {number} ({name}) can't be read; these can: {known}")));
    };
    let shape = (usize::try_from(rows), usize::try_from(cols));
    let (Ok(rows @ 1..), Ok(cols @ 1..)) = shape else {
        return Err(reader.error(&field, format!("a shape of [{rows}, {cols}]")));
    };
    if !cols.is_multiple_of(dtype.block_len()) {
        let reason = format!("rows of {cols} elements, but {dtype:?} stores blocks of {}", dtype.block_len());
        return Err(reader.error(&field, reason));
    }
    Ok((TensorInfo { name: name.to_owned(), dtype, rows, cols }, offset))
}

/// Byte ranges of the tensors in the file.
fn place(
    reader: &Reader<'_>,
    tensors: &[TensorInfo],
    offsets: &[u64],
    data_start: u64,
    file_len: usize,
) -> Result<Vec<Range<usize>>, CheckpointError> {
    let mut ranges = Vec::with_capacity(tensors.len());
    for (tensor, &offset) in tensors.iter().zip(offsets) {
        let range = data_start.checked_add(offset).and_then(|start| {
            let blocks = (tensor.cols / tensor.dtype.block_len()) as u64;
            let bytes = blocks.checked_mul(tensor.dtype.block_bytes() as u64)?.checked_mul(tensor.rows as u64)?;
            let end = start.checked_add(bytes)?;
            (end <= file_len as u64).then_some(start as usize..end as usize)
        });
        let range = range.ok_or_else(|| {
            reader.error(
                &format!("tensor {}", tensor.name),
                format!(
                    "{:?} [{}, {}] at offset {offset} of the data reaches beyond the file's {file_len} bytes: \
                     the file is truncated or corrupt",
                    tensor.dtype, tensor.rows, tensor.cols
                ),
            )
        })?;
        ranges.push(range);
    }
    let mut order: Vec<usize> = (0..ranges.len()).collect();
    order.sort_by_key(|&i| ranges[i].start);
    for pair in order.windows(2) {
        let [first, second] = [pair[0], pair[1]];
        if ranges[first].end > ranges[second].start {
            return Err(reader.error(
                &format!("tensor {}", tensors[second].name),
                format!("overlaps tensor {}", tensors[first].name),
            ));
        }
    }
    Ok(ranges)
}
