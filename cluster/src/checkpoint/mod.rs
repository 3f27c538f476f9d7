//! Reading checkpoints: header, configuration, and the bytes of any rows of any tensor.
//!
//! Tensors go by one set of names whatever the format: GGUF's (`token_embd.weight`, `blk.3.attn_q.weight`,
//! `output_norm.weight`, ...). A format that has others translates.

//!
//! A format is one module and one line in [`FORMATS`]. Files are taken for hostile: every count, offset and size is
//! checked against the file's length before anything is allocated or sliced, and what is wrong is an error that names
//! file and field.

pub mod generation;
pub mod gguf;
mod map;
pub mod safetensors;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;

use std::{
    borrow::Cow,
    path::{Path, PathBuf},
};

use self::generation::GenerationDefaults;
use crate::{model_config::ModelConfig, tokenizer::GgufTokenizer};

/// A way in which checkpoints are published.
pub trait Format: Sync {
    /// What people call it.
    fn name(&self) -> &'static str;

    /// Whether the file or folder claims to be of this format. Looks at the first bytes or at file names only.
    fn recognizes(&self, path: &Path) -> bool;

    /// Reads and checks the header.
    fn open(&self, path: &Path) -> Result<Box<dyn Checkpoint>, CheckpointError>;
}

/// All formats that can be opened.
pub static FORMATS: &[&dyn Format] = &[&gguf::GgufFormat, &safetensors::SafetensorsFormat];

/// Opens a checkpoint of any known format: a `.gguf` file, or a Hugging Face folder.
pub fn open(path: &Path) -> Result<Box<dyn Checkpoint>, CheckpointError> {
    // A missing file should say so rather than be of unknown format.
    std::fs::metadata(path).map_err(|source| CheckpointError::Io { file: path.to_owned(), source })?;
    match FORMATS.iter().find(|f| f.recognizes(path)) {
        Some(format) => format.open(path),
        None => Err(CheckpointError::UnknownFormat {
            file: path.to_owned(),
            reason: format!(
                "not a checkpoint of a known format; give one of: {}",
                FORMATS.iter().map(|f| f.name()).collect::<Vec<_>>().join(", ")
            ),
        }),
    }
}

/// Takes a tensor's first, middle and last bytes into a checkpoint's identity: enough to tell a fine-tune of the same
/// shape, or a file with holes, at the cost of a few pages.
fn update_with_samples(sha: &mut sha2::Sha256, tensor: &[u8]) {
    use sha2::Digest as _;
    const SAMPLE: usize = 64;
    let (len, middle) = (tensor.len(), tensor.len() / 2);
    for range in [0..SAMPLE.min(len), middle..len.min(middle + SAMPLE), len.saturating_sub(SAMPLE)..len] {
        sha.update(&tensor[range]);
    }
}

/// How a tensor's numbers are stored. The quantized ones are GGUF's block formats.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "the names are the formats' own")]
pub enum TensorType {
    F32,
    F16,
    Bf16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q4K,
    Q5K,
    Q6K,
}

impl TensorType {
    /// Elements that are stored together.
    pub fn block_len(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::Bf16 => 1,
            Self::Q4_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 | Self::Q8_0 => 32,
            Self::Q4K | Self::Q5K | Self::Q6K => 256,
        }
    }

    /// Bytes of such a block.
    pub fn block_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::Q4_0 => 18,
            Self::Q4_1 => 20,
            Self::Q5_0 => 22,
            Self::Q5_1 => 24,
            Self::Q8_0 => 34,
            Self::Q4K => 144,
            Self::Q5K => 176,
            Self::Q6K => 210,
        }
    }
}

/// One tensor of the header: a matrix `[rows, cols]`, row-major; a vector has one row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Canonical name.
    pub name: String,
    /// How its numbers are stored.
    pub dtype: TensorType,
    /// Outputs.
    pub rows: usize,
    /// Inputs; a multiple of the type's block length.
    pub cols: usize,
}

impl TensorInfo {
    /// Bytes of one row.
    pub fn row_bytes(&self) -> usize {
        self.cols / self.dtype.block_len() * self.dtype.block_bytes()
    }
}

/// A checkpoint on disk. Nothing is read but the header until [`Checkpoint::rows`] is called.
pub trait Checkpoint: Send + Sync {
    /// Where it is.
    fn path(&self) -> &PathBuf;

    /// The model's shape.
    fn config(&self) -> &ModelConfig;

    /// All tensors, in file order.
    fn tensors(&self) -> &[TensorInfo];

    /// The tensor of that name.
    fn find(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors().iter().find(|t| t.name == name)
    }

    /// The tensor of that name, if it has that shape.
    fn require(&self, name: &str, rows: usize, cols: usize) -> Result<&TensorInfo, CheckpointError> {
        let error = |reason| CheckpointError::Tensor { file: self.path().clone(), tensor: name.to_owned(), reason };
        let tensor =
            self.find(name).ok_or_else(|| error(format!("missing; the model needs it as [{rows}, {cols}]")))?;
        if (tensor.rows, tensor.cols) == (rows, cols) {
            Ok(tensor)
        } else {
            Err(error(format!("want [{rows}, {cols}], the file has [{}, {}]", tensor.rows, tensor.cols)))
        }
    }

    /// The tokenizer that the header describes; `None` if it is in files of its own, beside the weights.
    fn tokenizer(&self) -> Result<Option<GgufTokenizer>, CheckpointError> {
        Ok(None)
    }

    /// How its makers want it sampled, as far as they say.
    fn generation_defaults(&self) -> Result<GenerationDefaults, CheckpointError> {
        Ok(GenerationDefaults::default())
    }

    /// Bytes of some rows of a tensor. Borrowed from the memory map where the format allows it.
    fn rows(&self, name: &str, rows: std::ops::Range<usize>) -> Result<Cow<'_, [u8]>, CheckpointError>;

    /// SHA-256 (hex) over header, file size and samples of each tensor: equal for equal checkpoints, cheap to compute.
    fn identity(&self) -> &str;
}

/// Why a checkpoint can't be used. Every variant names the file and the field.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// The file can't be read.
    #[error("{file}: {source}")]
    Io {
        /// Which file.
        file: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// No known format.
    #[error("{file}: {reason}")]
    UnknownFormat {
        /// Which file.
        file: PathBuf,
        /// What was seen, and what is supported.
        reason: String,
    },
    /// The file contradicts itself or its format.
    #[error("{file}: {field}: {reason}")]
    Invalid {
        /// Which file.
        file: PathBuf,
        /// Which field of the header or tensor.
        field: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A tensor that the model needs is not in the file, or has another shape.
    #[error("{file}: tensor {tensor}: {reason}")]
    Tensor {
        /// Which file.
        file: PathBuf,
        /// Which tensor.
        tensor: String,
        /// What was wanted and what is there.
        reason: String,
    },
}
