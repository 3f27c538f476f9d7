//! A cursor over the bytes of a header that can't be made to run past their end.

use std::path::Path;

use crate::checkpoint::CheckpointError;

/// Headers of real files are a few MB (the vocabulary); beyond this a file is corrupt or made to hurt.
const MAX_HEADER_BYTES: usize = 256 << 20;

/// Little-endian cursor. Errors name the file, the field that is being read and the offset.
pub(super) struct Reader<'a> {
    path: &'a Path,
    bytes: &'a [u8],
    offset: usize,
}

impl<'a> Reader<'a> {
    pub(super) fn new(path: &'a Path, bytes: &'a [u8]) -> Self {
        Self { path, bytes: &bytes[..bytes.len().min(MAX_HEADER_BYTES)], offset: 0 }
    }

    /// Bytes read so far.
    pub(super) fn offset(&self) -> usize {
        self.offset
    }

    /// An error about a field at the present offset.
    pub(super) fn error(&self, field: &str, reason: impl std::fmt::Display) -> CheckpointError {
        CheckpointError::Invalid {
            file: self.path.to_owned(),
            field: field.to_owned(),
            reason: format!("{reason} (at byte {})", self.offset),
        }
    }

    /// The next `len` bytes.
    pub(super) fn take(&mut self, len: usize, field: &str) -> Result<&'a [u8], CheckpointError> {
        let rest = &self.bytes[self.offset..];
        if len > rest.len() {
            let reason = if self.bytes.len() == MAX_HEADER_BYTES {
                format!("the header is longer than {MAX_HEADER_BYTES} bytes")
            } else {
                format!("wants {len} bytes but the file ends after {}", rest.len())
            };
            return Err(self.error(field, reason));
        }
        self.offset += len;
        Ok(&rest[..len])
    }

    fn array<const N: usize>(&mut self, field: &str) -> Result<[u8; N], CheckpointError> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N, field)?);
        Ok(array)
    }

    pub(super) fn u8(&mut self, field: &str) -> Result<u8, CheckpointError> {
        self.array(field).map(u8::from_le_bytes)
    }

    pub(super) fn u16(&mut self, field: &str) -> Result<u16, CheckpointError> {
        self.array(field).map(u16::from_le_bytes)
    }

    pub(super) fn u32(&mut self, field: &str) -> Result<u32, CheckpointError> {
        self.array(field).map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self, field: &str) -> Result<u64, CheckpointError> {
        self.array(field).map(u64::from_le_bytes)
    }

    /// A 64-bit count of things that take at least `min_bytes` each: more than can follow in the file is an error, so
    /// that the count may be used to allocate.
    pub(super) fn count(&mut self, min_bytes: usize, field: &str) -> Result<usize, CheckpointError> {
        let count = self.u64(field)?;
        let most = (self.bytes.len() - self.offset) / min_bytes;
        match usize::try_from(count) {
            Ok(count) if count <= most => Ok(count),
            _ => Err(self.error(field, format!("a count of {count}, but the rest of the file has room for {most}"))),
        }
    }

    /// A string: its length in 64 bits, then UTF-8.
    pub(super) fn string(&mut self, field: &str) -> Result<&'a str, CheckpointError> {
        let len = self.count(1, field)?;
        let bytes = self.take(len, field)?;
        std::str::from_utf8(bytes).map_err(|e| self.error(field, format!("a string of {len} bytes: {e}")))
    }
}
