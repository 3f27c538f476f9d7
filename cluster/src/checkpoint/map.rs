//! Files mapped into memory, read-only.
#![allow(unsafe_code)]

use std::{
    fs::File,
    path::{Path, PathBuf},
};

use memmap2::Mmap;

use super::CheckpointError;

/// A regular file's bytes.
#[derive(Debug)]
pub(super) struct MappedFile {
    path: PathBuf,
    bytes: Mmap,
}

impl MappedFile {
    /// Maps a regular file; pipes, devices and folders are errors.
    pub(super) fn open(path: &Path) -> Result<Self, CheckpointError> {
        let io = |source| CheckpointError::Io { file: path.to_owned(), source };
        // Asked before opening: to open a pipe would wait for a writer.
        if !std::fs::metadata(path).map_err(io)?.is_file() {
            return Err(CheckpointError::UnknownFormat {
                file: path.to_owned(),
                reason: "not a regular file".to_owned(),
            });
        }
        let file = File::open(path).map_err(io)?;
        // SAFETY: the map is read-only and private to this process. Checkpoint files are published whole (downloads are
        // renamed into place); a process that truncates one while it is being served breaks the same assumption that
        // every user of mapped model files makes, and gets SIGBUS, not undefined reads past the map.
        let bytes = unsafe { Mmap::map(&file) }.map_err(io)?;
        Ok(Self { path: path.to_owned(), bytes })
    }

    /// Where it is.
    pub(super) fn path(&self) -> &PathBuf {
        &self.path
    }

    /// All of it.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}
