//! KV pages apart from a device: rows come in as bytes, and a device takes the pages over as they are.
//!
//! **Format of rows.** For each range, for each layer, for each KV head: the keys `[n_rows, head_dim]`, then the values
//! `[n_rows, head_dim]`, in the element of the cache (f16, or f32 in [`Precision::Float32`]) and the byte order of the
//! machine. It depends on neither instruction set nor layout of pages, and rows mean the same in whatever block they are.

use crate::{
    cpu::{
        kv::{KvCache, element_bytes},
        open_tiles::OpenTiles,
        pool::Pool,
    },
    error::KernelError,
    ops::{KvShape, Precision},
    slots::{KvRange, SlotSet},
};

/// Most bytes of rows that wait for others.
const WAITING_BYTES: usize = 32 << 20;

/// Pages of all layers, in the layout of the CPU device. Memory is taken as blocks are written. Rows that come one at a time wait until
/// those beside them are there, up to 32 MiB of them.
#[derive(Debug)]
pub struct KvPages {
    pub(crate) cache: KvCache,
    open: OpenTiles,
}

impl KvPages {
    /// Zeroed pages.
    ///
    /// # Errors
    /// If the shape is none that a device takes, or there is no memory.
    pub fn new(shape: KvShape, precision: Precision) -> Result<Self, KernelError> {
        Ok(Self { cache: KvCache::new(shape, precision)?, open: OpenTiles::new(WAITING_BYTES) })
    }

    /// Their shape.
    pub fn shape(&self) -> KvShape {
        self.cache.shape
    }

    /// Bytes of one block in all layers.
    pub fn block_bytes(&self) -> usize {
        self.cache.page_bytes().saturating_mul(self.cache.shape.n_layers)
    }

    /// Slots that have been written.
    pub fn written(&self) -> &SlotSet {
        &self.cache.written
    }

    /// Writes rows to the slots of `ranges`.
    ///
    /// # Errors
    /// If a range lies outside of the pages or `rows` has not the length of all ranges; nothing is written then.
    pub fn write(&mut self, ranges: &[KvRange], rows: &[u8]) -> Result<(), KernelError> {
        self.cache.check_rows(ranges, rows)?;
        self.open.write(&mut self.cache, ranges, rows);
        Ok(())
    }

    /// Touches pages that are likely to be written soon, about 2 MiB; `false` if there is no more to do.
    pub fn prefault(&mut self) -> bool {
        self.cache.prefault(false)
    }

    /// Appends the rows of `ranges` to `rows`.
    ///
    /// # Errors
    /// If a range lies outside of the pages.
    pub fn read(&mut self, ranges: &[KvRange], rows: &mut Vec<u8>) -> Result<(), KernelError> {
        self.open.close_all(&mut self.cache);
        self.cache.read_rows(ranges, rows, &mut Pool::new(1, &[])?)
    }

    /// For a device, with all rows where they belong.
    pub(crate) fn into_cache(mut self) -> KvCache {
        self.open.close_all(&mut self.cache);
        self.cache
    }
}

/// Bytes of one row in all layers.
pub fn row_bytes(shape: KvShape, precision: Precision) -> usize {
    [2, shape.n_layers, shape.n_kv_heads, shape.head_dim]
        .into_iter()
        .fold(element_bytes(precision), usize::saturating_mul)
}
