//! Values of GGUF metadata.

use super::reader::Reader;
use crate::checkpoint::CheckpointError;

/// Arrays in arrays deeper than this are an error; real files have none.
const MAX_DEPTH: usize = 4;

/// A metadata value, typed as in the file.
#[derive(Debug, Clone, PartialEq)]
#[expect(missing_docs, reason = "the names are the types")]
pub enum Value {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(bool),
    String(String),
    Array(Array),
    U64(u64),
    I64(i64),
    F64(f64),
}

/// Elements of one type.
#[derive(Debug, Clone, PartialEq)]
#[expect(missing_docs, reason = "the names are the types")]
pub enum Array {
    U8(Vec<u8>),
    I8(Vec<i8>),
    U16(Vec<u16>),
    I16(Vec<i16>),
    U32(Vec<u32>),
    I32(Vec<i32>),
    F32(Vec<f32>),
    Bool(Vec<bool>),
    Strings(Vec<String>),
    Arrays(Vec<Array>),
    U64(Vec<u64>),
    I64(Vec<i64>),
    F64(Vec<f64>),
}

impl Value {
    /// What the format calls the type.
    pub fn type_name(&self) -> &'static str {
        match self {
            Self::U8(_) => "uint8",
            Self::I8(_) => "int8",
            Self::U16(_) => "uint16",
            Self::I16(_) => "int16",
            Self::U32(_) => "uint32",
            Self::I32(_) => "int32",
            Self::F32(_) => "float32",
            Self::Bool(_) => "bool",
            Self::String(_) => "string",
            Self::Array(_) => "array",
            Self::U64(_) => "uint64",
            Self::I64(_) => "int64",
            Self::F64(_) => "float64",
        }
    }

    /// Any integer that is not negative.
    pub fn as_u64(&self) -> Option<u64> {
        match *self {
            Self::U8(v) => Some(v.into()),
            Self::I8(v) => u64::try_from(v).ok(),
            Self::U16(v) => Some(v.into()),
            Self::I16(v) => u64::try_from(v).ok(),
            Self::U32(v) => Some(v.into()),
            Self::I32(v) => u64::try_from(v).ok(),
            Self::U64(v) => Some(v),
            Self::I64(v) => u64::try_from(v).ok(),
            _ => None,
        }
    }

    /// Any float.
    pub fn as_f64(&self) -> Option<f64> {
        match *self {
            Self::F32(v) => Some(v.into()),
            Self::F64(v) => Some(v),
            _ => None,
        }
    }

    /// A string.
    pub fn as_str(&self) -> Option<&str> {
        match self {
            Self::String(v) => Some(v),
            _ => None,
        }
    }

    /// A truth value.
    pub fn as_bool(&self) -> Option<bool> {
        match *self {
            Self::Bool(v) => Some(v),
            _ => None,
        }
    }

    /// An array of strings.
    pub fn as_strings(&self) -> Option<&[String]> {
        match self {
            Self::Array(Array::Strings(v)) => Some(v),
            _ => None,
        }
    }

    /// An array of 32-bit floats.
    pub fn as_f32s(&self) -> Option<&[f32]> {
        match self {
            Self::Array(Array::F32(v)) => Some(v),
            _ => None,
        }
    }

    /// An array of integers that are not negative.
    pub fn as_u64s(&self) -> Option<Vec<u64>> {
        fn all<T: Copy>(values: &[T]) -> Option<Vec<u64>>
        where
            u64: TryFrom<T>,
        {
            values.iter().map(|&v| u64::try_from(v).ok()).collect()
        }
        match self {
            Self::Array(Array::U8(v)) => all(v),
            Self::Array(Array::I8(v)) => all(v),
            Self::Array(Array::U16(v)) => all(v),
            Self::Array(Array::I16(v)) => all(v),
            Self::Array(Array::U32(v)) => all(v),
            Self::Array(Array::I32(v)) => all(v),
            Self::Array(Array::U64(v)) => Some(v.clone()),
            Self::Array(Array::I64(v)) => all(v),
            _ => None,
        }
    }

    /// Reads a value of the type with that number.
    pub(super) fn read(reader: &mut Reader<'_>, kind: u32, field: &str) -> Result<Self, CheckpointError> {
        Ok(match kind {
            0 => Self::U8(reader.u8(field)?),
            1 => Self::I8(reader.u8(field)? as i8),
            2 => Self::U16(reader.u16(field)?),
            3 => Self::I16(reader.u16(field)? as i16),
            4 => Self::U32(reader.u32(field)?),
            5 => Self::I32(reader.u32(field)? as i32),
            6 => Self::F32(f32::from_bits(reader.u32(field)?)),
            7 => {
                let byte = reader.u8(field)?;
                Self::Bool(truth(reader, byte, field)?)
            }
            8 => Self::String(reader.string(field)?.to_owned()),
            9 => Self::Array(Array::read(reader, field, 0)?),
            10 => Self::U64(reader.u64(field)?),
            11 => Self::I64(reader.u64(field)? as i64),
            12 => Self::F64(f64::from_bits(reader.u64(field)?)),
            other => return Err(reader.error(field, format!("value type {other} is not one of GGUF's (0 to 12)"))),
        })
    }
}

impl Array {
    /// Number of elements.
    pub fn len(&self) -> usize {
        match self {
            Self::U8(v) => v.len(),
            Self::I8(v) => v.len(),
            Self::U16(v) => v.len(),
            Self::I16(v) => v.len(),
            Self::U32(v) => v.len(),
            Self::I32(v) => v.len(),
            Self::F32(v) => v.len(),
            Self::Bool(v) => v.len(),
            Self::Strings(v) => v.len(),
            Self::Arrays(v) => v.len(),
            Self::U64(v) => v.len(),
            Self::I64(v) => v.len(),
            Self::F64(v) => v.len(),
        }
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn read(reader: &mut Reader<'_>, field: &str, depth: usize) -> Result<Self, CheckpointError> {
        if depth >= MAX_DEPTH {
            return Err(reader.error(field, format!("arrays nested more than {MAX_DEPTH} deep")));
        }
        let kind = reader.u32(field)?;
        /// Elements of `N` bytes each, decoded by `f`. The count is bounded by the bytes that follow.
        fn numbers<const N: usize, T>(
            reader: &mut Reader<'_>,
            field: &str,
            f: impl Fn([u8; N]) -> T,
        ) -> Result<Vec<T>, CheckpointError> {
            let count = reader.count(N, field)?;
            Ok(reader.take(count * N, field)?.as_chunks().0.iter().map(|&c| f(c)).collect())
        }
        Ok(match kind {
            0 => Self::U8(numbers(reader, field, u8::from_le_bytes)?),
            1 => Self::I8(numbers(reader, field, i8::from_le_bytes)?),
            2 => Self::U16(numbers(reader, field, u16::from_le_bytes)?),
            3 => Self::I16(numbers(reader, field, i16::from_le_bytes)?),
            4 => Self::U32(numbers(reader, field, u32::from_le_bytes)?),
            5 => Self::I32(numbers(reader, field, i32::from_le_bytes)?),
            6 => Self::F32(numbers(reader, field, f32::from_le_bytes)?),
            7 => {
                let count = reader.count(1, field)?;
                let bytes = reader.take(count, field)?;
                Self::Bool(bytes.iter().map(|&b| truth(reader, b, field)).collect::<Result<_, _>>()?)
            }
            8 => {
                let count = reader.count(8, field)?;
                // Grown as strings come: an empty string takes three times as much memory as file.
                let mut strings = Vec::with_capacity(count.min(1 << 16));
                for _ in 0..count {
                    strings.push(reader.string(field)?.to_owned());
                }
                Self::Strings(strings)
            }
            9 => {
                let count = reader.count(12, field)?;
                let mut arrays = Vec::new();
                for _ in 0..count {
                    arrays.push(Self::read(reader, field, depth + 1)?);
                }
                Self::Arrays(arrays)
            }
            10 => Self::U64(numbers(reader, field, u64::from_le_bytes)?),
            11 => Self::I64(numbers(reader, field, i64::from_le_bytes)?),
            12 => Self::F64(numbers(reader, field, f64::from_le_bytes)?),
            other => return Err(reader.error(field, format!("element type {other} is not one of GGUF's (0 to 12)"))),
        })
    }
}

fn truth(reader: &Reader<'_>, byte: u8, field: &str) -> Result<bool, CheckpointError> {
    match byte {
        0 => Ok(false),
        1 => Ok(true),
        other => Err(reader.error(field, format!("a bool is 0 or 1, not {other}"))),
    }
}
