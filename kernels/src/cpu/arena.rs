//! Memory for weights: matrices share large pages, for most of a small model's are smaller than one.
//!
//! Through small pages one row met weights from memory at 9 GB/s where it meets them at 15 through large ones (`docs/performance.md`).
#![allow(unsafe_code)]

use std::{ptr::NonNull, sync::Arc};

use super::pages::prefer_large;
use crate::{
    error::KernelError,
    tensor::{Aligned, CACHE_LINE},
};

/// Bytes of a chunk. What is not used of it is not touched, thus takes no memory.
const CHUNK: usize = 32 << 20;

/// Where regions are taken from: chunks, one after another. A chunk lives as long as one of its regions.
#[derive(Debug, Default)]
pub(crate) struct Arena {
    chunk: Option<Arc<Chunk>>,
    /// Bytes of it that are taken.
    used: usize,
}

/// Memory of the system, of which regions are disjoint parts.
#[derive(Debug)]
struct Chunk {
    first: NonNull<u8>,
    len: usize,
    /// Owns it; it is never looked at but through `first`.
    _memory: Aligned<u8>,
}

// SAFETY: a chunk is only a place; what lies there is reached through regions, which are disjoint and each have one owner.
unsafe impl Send for Chunk {}
// SAFETY: as above.
unsafe impl Sync for Chunk {}

/// Part of a chunk: zeros at first, from the start of a cache line on.
#[derive(Debug, Default)]
pub(crate) struct Region {
    /// None: no bytes.
    chunk: Option<Arc<Chunk>>,
    start: usize,
    len: usize,
}

impl Arena {
    /// `len` zeros. `what` names them in the error.
    pub fn zeroed(&mut self, what: &'static str, len: usize) -> Result<Region, KernelError> {
        if len == 0 {
            return Ok(Region::default());
        }
        let chunk = match &self.chunk {
            Some(chunk) if len <= chunk.len - self.used => chunk.clone(),
            _ => {
                let chunk = Arc::new(Chunk::new(what, len.max(CHUNK))?);
                self.used = 0;
                self.chunk.insert(chunk).clone()
            }
        };
        let start = self.used;
        self.used = chunk.len.min((start + len).next_multiple_of(CACHE_LINE));
        Ok(Region { chunk: Some(chunk), start, len })
    }
}

impl Chunk {
    fn new(what: &'static str, len: usize) -> Result<Self, KernelError> {
        let mut memory = Aligned::zeroed(what, len)?;
        prefer_large(memory.as_mut_slice());
        Ok(Self { first: NonNull::from(memory.as_mut_slice()).cast(), len, _memory: memory })
    }
}

impl Region {
    /// Where it begins.
    fn first(&self) -> NonNull<u8> {
        match &self.chunk {
            // SAFETY: `start` lies within the chunk.
            Some(chunk) => unsafe { chunk.first.add(self.start) },
            None => NonNull::dangling(),
        }
    }

    /// Bytes of memory taken.
    pub fn bytes(&self) -> u64 {
        self.len.next_multiple_of(CACHE_LINE) as u64
    }

    /// The bytes.
    pub fn as_slice(&self) -> &[u8] {
        // SAFETY: the chunk lives, `len` bytes from there are this region's alone, and initialized: zeros at first.
        unsafe { std::slice::from_raw_parts(self.first().as_ptr(), self.len) }
    }

    /// The bytes.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as above; the region is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.first().as_ptr(), self.len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn regions_are_zeros_disjoint_and_outlive_their_arena() {
        let mut arena = Arena::default();
        let lens = [1, 64, 0, CHUNK - 200, 100, CHUNK + 3, 5];
        let mut regions: Vec<_> = lens.iter().map(|&len| arena.zeroed("test", len).expect("memory")).collect();
        drop(arena);
        for (i, region) in regions.iter_mut().enumerate() {
            assert_eq!(region.as_slice().len(), lens[i]);
            assert!(region.as_slice().iter().all(|byte| *byte == 0), "region {i}");
            assert!(lens[i] == 0 || region.as_slice().as_ptr().addr().is_multiple_of(CACHE_LINE));
            region.as_mut_slice().fill(i as u8 + 1);
        }
        for (i, region) in regions.iter().enumerate() {
            assert!(region.as_slice().iter().all(|byte| *byte == i as u8 + 1), "region {i}");
        }
    }

    #[test]
    fn what_no_machine_has_is_an_error() {
        assert!(matches!(Arena::default().zeroed("test", usize::MAX / 2), Err(KernelError::OutOfMemory { .. })));
    }
}
