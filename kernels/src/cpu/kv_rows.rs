//! Copies rows out of pages and into them. The format of rows: [`crate::pages`]; the layout of pages:
//! `generic/attention.rs`.
#![allow(unsafe_code)]

use std::mem::MaybeUninit;

use super::{
    Shared,
    kv::{KvCache, element_bytes},
    pool::Pool,
    shape_error,
};
use crate::{
    error::KernelError,
    layout::TILE,
    ops::Precision,
    pages::row_bytes,
    slots::{KvRange, n_rows},
};

/// Rows for a part of a tile, or for all of it.
#[derive(Clone, Copy)]
pub(super) struct Part<'a> {
    /// Where they belong.
    pub slots: KvRange,
    /// Where they are.
    pub rows: Rows<'a>,
}

/// Where some rows lie: one piece for each layer, head, and keys or values, and in each piece one row after another; or one row
/// after another, and in each all of its pieces.
#[derive(Clone, Copy)]
pub(super) struct Rows<'a> {
    /// From the first one's first piece on.
    pub bytes: &'a [u8],
    /// From row to row.
    pub row_stride: usize,
    /// From piece to piece.
    pub piece_stride: usize,
}

impl<'a> Rows<'a> {
    /// The rows from `first` on of a range of `n_rows`, in the format of [`crate::pages`].
    pub fn of_range(bytes: &'a [u8], n_rows: usize, first: usize, piece_bytes: usize) -> Self {
        let bytes = &bytes[first * piece_bytes..];
        Self { bytes, row_stride: piece_bytes, piece_stride: n_rows * piece_bytes }
    }

    /// A row's part of a piece.
    pub fn part(&self, row: usize, piece: usize, piece_bytes: usize) -> &'a [u8] {
        &self.bytes[row * self.row_stride + piece * self.piece_stride..][..piece_bytes]
    }
}

impl KvCache {
    /// Appends the rows of `ranges`, in the format of [`crate::pages`].
    pub fn read_rows(&self, ranges: &[KvRange], rows: &mut Vec<u8>, pool: &mut Pool) -> Result<(), KernelError> {
        let len = self.check_ranges("read_kv", ranges)?;
        rows.reserve(len);
        // Not cleared first: that takes a third as long as all the rest.
        let room = &mut rows.spare_capacity_mut()[..len];
        match self.precision {
            Precision::Auto => self.read::<2>(ranges, room, pool),
            Precision::Float32 => self.read::<4>(ranges, room, pool),
        }
        // SAFETY: the room has been reserved, and `read` has written every byte of it: `len` is that of all ranges.
        unsafe { rows.set_len(rows.len() + len) };
        Ok(())
    }

    /// Checks rows that are to be written to the slots of `ranges`.
    pub fn check_rows(&self, ranges: &[KvRange], rows: &[u8]) -> Result<(), KernelError> {
        let op = "write_kv";
        let len = self.check_ranges(op, ranges)?;
        if rows.len() != len {
            return Err(shape_error(op, format!("{len} bytes for {} rows", n_rows(ranges)), rows.len().to_string()));
        }
        Ok(())
    }

    /// Writes rows that have been checked, and are those of one tile.
    pub(super) fn write_part(&mut self, part: Part<'_>) {
        match self.precision {
            Precision::Auto => self.write::<2>(part),
            Precision::Float32 => self.write::<4>(part),
        }
    }

    /// Bytes of the rows of all ranges, if all lie in the pages.
    fn check_ranges(&self, op: &'static str, ranges: &[KvRange]) -> Result<usize, KernelError> {
        let (n_blocks, size) = (self.shape.n_blocks, self.shape.block_size);
        let is_good = |range: &&KvRange| {
            (range.block as usize) < n_blocks && range.first as usize + range.n_rows as usize <= size
        };
        if let Some(range) = ranges.iter().find(|range| !is_good(range)) {
            let want = format!("blocks below {n_blocks}, slots up to {size}");
            return Err(shape_error(op, want, format!("{range:?}")));
        }
        let bytes = n_rows(ranges).checked_mul(row_bytes(self.shape, self.precision));
        bytes.ok_or_else(|| shape_error(op, "rows whose bytes can be counted", n_rows(ranges).to_string()))
    }

    /// Copies pages to rows, whose elements have `N` bytes, a task for each layer. Writes all of `rows`.
    fn read<const N: usize>(&self, ranges: &[KvRange], rows: &mut [MaybeUninit<u8>], pool: &mut Pool) {
        let (head_dim, n_heads, n_layers) = (self.shape.head_dim, self.shape.n_kv_heads, self.shape.n_layers);
        let (rows, _) = rows.as_chunks_mut::<N>();
        let len = rows.len();
        let rows = Shared(rows.as_mut_ptr());
        pool.run(n_layers, &|layer, _| {
            let mut range_from = 0;
            for range in ranges {
                let of_layer = 2 * range.n_rows as usize * n_heads * head_dim;
                let from = range_from + layer * of_layer;
                range_from += n_layers * of_layer;
                assert!(from + of_layer <= len, "rows of all ranges and layers");
                // SAFETY: within `rows`, as has just been asserted; each task has the parts of its own layer.
                let to = unsafe { std::slice::from_raw_parts_mut(rows.get().add(from), of_layer) };
                self.read_layer(*range, layer, to);
            }
        });
    }

    /// Copies a range's keys and values in one layer, and writes all of `to`. Panics if pages have not what a checked range
    /// has: nothing is left out.
    fn read_layer<const N: usize>(&self, range: KvRange, layer: usize, to: &mut [[MaybeUninit<u8>; N]]) {
        let (head_dim, width) = (self.shape.head_dim, self.shape.head_dim.next_multiple_of(TILE));
        let (first, n) = (range.first as usize, range.n_rows as usize);
        for (head, to) in to.chunks_exact_mut((2 * n * head_dim).max(1)).enumerate() {
            let [keys, values] = self.head::<N>(layer, range.block, head).expect("ranges have been checked");
            let (to_keys, to_values) = to.split_at_mut(n * head_dim);
            for (slot, row) in (first..).zip(to_keys.chunks_exact_mut(head_dim)) {
                let (tile, _) = keys[slot / TILE * head_dim * TILE..].as_chunks::<TILE>();
                for (to, of_element) in row.iter_mut().zip(&tile[..head_dim]) {
                    *to = of_element[slot % TILE].map(MaybeUninit::new);
                }
            }
            for (slot, row) in (first..).zip(to_values.chunks_exact_mut(head_dim)) {
                for (to, from) in row.iter_mut().zip(&values[slot * width..][..head_dim]) {
                    *to = from.map(MaybeUninit::new);
                }
            }
        }
    }

    /// Copies rows, whose elements have `N` bytes, to pages.
    fn write<const N: usize>(&mut self, part: Part<'_>) {
        let (head_dim, width) = (self.shape.head_dim, self.shape.head_dim.next_multiple_of(TILE));
        let (block, first, n) = (part.slots.block, part.slots.first as usize, part.slots.n_rows as usize);
        for layer in 0..self.shape.n_layers {
            for head in 0..self.shape.n_kv_heads {
                let piece = 2 * (layer * self.shape.n_kv_heads + head);
                let Some([keys, values]) = self.head_mut::<N>(layer, block, head) else { return };
                let (tile, _) = keys[first / TILE * head_dim * TILE..].as_chunks_mut::<TILE>();
                for row in 0..n {
                    let (from, _) = part.rows.part(row, piece, head_dim * N).as_chunks::<N>();
                    for (from, of_element) in from.iter().zip(&mut *tile) {
                        of_element[first % TILE + row] = *from;
                    }
                }
                for (row, value) in values[first * width..].chunks_exact_mut(width).take(n).enumerate() {
                    let (from, _) = part.rows.part(row, piece + 1, head_dim * N).as_chunks::<N>();
                    value[..head_dim].copy_from_slice(from);
                }
            }
        }
    }

    /// Where a head's keys and values lie in its layer: elements from .. between .. to.
    fn head_span(&self, block: u32, head: usize) -> (usize, usize, usize) {
        let element = element_bytes(self.precision);
        let page = block as usize * self.page_bytes();
        let (keys, values) = self.head_offsets(head);
        let (next, _) = self.head_offsets(head + 1);
        ((page + keys) / element, (page + values) / element, (page + next) / element)
    }

    fn head<const N: usize>(&self, layer: usize, block: u32, head: usize) -> Option<[&[[u8; N]]; 2]> {
        let (from, between, to) = self.head_span(block, head);
        let (elements, _) = self.layer(layer)?.as_chunks::<N>();
        let (keys, values) = elements.get(from..to)?.split_at_checked(between - from)?;
        Some([keys, values])
    }

    fn head_mut<const N: usize>(&mut self, layer: usize, block: u32, head: usize) -> Option<[&mut [[u8; N]]; 2]> {
        let (from, between, to) = self.head_span(block, head);
        let (elements, _) = self.layer_mut(layer)?.as_chunks_mut::<N>();
        let (keys, values) = elements.get_mut(from..to)?.split_at_mut_checked(between - from)?;
        Some([keys, values])
    }
}
