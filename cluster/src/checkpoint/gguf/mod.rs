//! GGUF, the single-file format of llama.cpp: versions 2 and 3, little-endian.

mod config;
mod header;
mod reader;
mod sampling;
mod tokenizer;
mod value;

use std::{
    borrow::Cow,
    io::Read as _,
    ops::Range,
    path::{Path, PathBuf},
};

use sha2::{Digest, Sha256};

use self::header::Header;
pub use self::value::{Array, Value};
use super::{
    Checkpoint, CheckpointError, Format, TensorInfo, generation::GenerationDefaults, map::MappedFile,
    update_with_samples,
};
use crate::{hex::hex, model_config::ModelConfig, tokenizer::GgufTokenizer};

/// Files that begin with `GGUF`.
pub struct GgufFormat;

impl Format for GgufFormat {
    fn name(&self) -> &'static str {
        "a .gguf file"
    }

    fn recognizes(&self, path: &Path) -> bool {
        let mut magic = [0; 4];
        path.is_file()
            && std::fs::File::open(path).and_then(|mut f| f.read_exact(&mut magic)).is_ok()
            && &magic == header::MAGIC
    }

    fn open(&self, path: &Path) -> Result<Box<dyn Checkpoint>, CheckpointError> {
        Ok(Box::new(Gguf::open(path)?))
    }
}

/// An opened GGUF file.
#[derive(Debug)]
pub struct Gguf {
    file: MappedFile,
    header: Header,
    config: ModelConfig,
    identity: String,
}

impl Gguf {
    /// Maps the file, and reads and checks its header.
    pub fn open(path: &Path) -> Result<Self, CheckpointError> {
        let file = MappedFile::open(path)?;
        let header = Header::read(path, file.bytes())?;
        let fields = config::Fields { path, header: &header, bytes: file.bytes() };
        let config = fields.model_config()?;
        let mut sha = Sha256::new();
        sha.update(&file.bytes()[..header.data_start]);
        sha.update((file.bytes().len() as u64).to_le_bytes());
        header.ranges.iter().for_each(|range| update_with_samples(&mut sha, &file.bytes()[range.clone()]));
        let identity = hex(&sha.finalize());
        Ok(Self { file, header, config, identity })
    }

    fn fields(&self) -> config::Fields<'_> {
        config::Fields { path: self.file.path(), header: &self.header, bytes: self.file.bytes() }
    }

    /// A metadata value.
    pub fn metadata(&self, key: &str) -> Option<&Value> {
        self.header.metadata.get(key)
    }
}

impl Checkpoint for Gguf {
    fn path(&self) -> &PathBuf {
        self.file.path()
    }

    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn tensors(&self) -> &[TensorInfo] {
        &self.header.tensors
    }

    fn find(&self, name: &str) -> Option<&TensorInfo> {
        self.header.by_name.get(name).map(|&i| &self.header.tensors[i])
    }

    fn tokenizer(&self) -> Result<Option<GgufTokenizer>, CheckpointError> {
        self.fields().tokenizer().map(Some)
    }

    fn generation_defaults(&self) -> Result<GenerationDefaults, CheckpointError> {
        self.fields().generation_defaults()
    }

    fn rows(&self, name: &str, rows: Range<usize>) -> Result<Cow<'_, [u8]>, CheckpointError> {
        let error = |reason| CheckpointError::Tensor { file: self.path().clone(), tensor: name.to_owned(), reason };
        let &index = self.header.by_name.get(name).ok_or_else(|| error("missing".to_owned()))?;
        let tensor = &self.header.tensors[index];
        if rows.start > rows.end || rows.end > tensor.rows {
            return Err(error(format!("want rows {rows:?}, the file has {}", tensor.rows)));
        }
        let whole = &self.file.bytes()[self.header.ranges[index].clone()];
        Ok(Cow::Borrowed(&whole[rows.start * tensor.row_bytes()..rows.end * tensor.row_bytes()]))
    }

    fn identity(&self) -> &str {
        &self.identity
    }
}
