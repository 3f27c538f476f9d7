//! Copies rows out of pages and into them. The format of rows: [`crate::pages`]; the layout of pages:
//! `generic/attention.rs`.

use super::{
    kv::{KvCache, element_bytes},
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
    /// Where they are, in the format of [`crate::pages`]: rows of one range,
    pub rows: &'a [u8],
    /// of so many,
    pub n_rows: usize,
    /// from this one on.
    pub first_row: usize,
}

impl KvCache {
    /// Appends the rows of `ranges`, in the format of [`crate::pages`].
    pub fn read_rows(&self, ranges: &[KvRange], rows: &mut Vec<u8>) -> Result<(), KernelError> {
        let len = self.check_ranges("read_kv", ranges)?;
        let begun = rows.len();
        rows.resize(begun + len, 0);
        match self.precision {
            Precision::Auto => self.read::<2>(ranges, &mut rows[begun..]),
            Precision::Float32 => self.read::<4>(ranges, &mut rows[begun..]),
        }
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

    /// Copies pages to rows, whose elements have `N` bytes.
    fn read<const N: usize>(&self, ranges: &[KvRange], rows: &mut [u8]) {
        let (head_dim, width) = (self.shape.head_dim, self.shape.head_dim.next_multiple_of(TILE));
        let (mut rows, _) = rows.as_chunks_mut::<N>();
        for range in ranges {
            let (first, n) = (range.first as usize, range.n_rows as usize);
            for layer in 0..self.shape.n_layers {
                for head in 0..self.shape.n_kv_heads {
                    let Some([keys, values]) = self.head::<N>(layer, range.block, head) else { return };
                    let (to, rest) = rows.split_at_mut(2 * n * head_dim);
                    rows = rest;
                    let (to_keys, to_values) = to.split_at_mut(n * head_dim);
                    for (slot, row) in (first..).zip(to_keys.chunks_exact_mut(head_dim)) {
                        let (tile, _) = keys[slot / TILE * head_dim * TILE..].as_chunks::<TILE>();
                        for (to, of_element) in row.iter_mut().zip(tile) {
                            *to = of_element[slot % TILE];
                        }
                    }
                    let values = values[first * width..].chunks_exact(width);
                    for (row, value) in to_values.chunks_exact_mut(head_dim).zip(values) {
                        row.copy_from_slice(&value[..head_dim]);
                    }
                }
            }
        }
    }

    /// Copies rows, whose elements have `N` bytes, to pages.
    fn write<const N: usize>(&mut self, part: Part<'_>) {
        let (head_dim, width) = (self.shape.head_dim, self.shape.head_dim.next_multiple_of(TILE));
        let (block, first, n) = (part.slots.block, part.slots.first as usize, part.slots.n_rows as usize);
        let (rows, _) = part.rows.as_chunks::<N>();
        let mut parts = rows.chunks_exact(part.n_rows * head_dim);
        for layer in 0..self.shape.n_layers {
            for head in 0..self.shape.n_kv_heads {
                let Some([keys, values]) = self.head_mut::<N>(layer, block, head) else { return };
                let (Some(from_keys), Some(from_values)) = (parts.next(), parts.next()) else { return };
                let wanted = part.first_row * head_dim..(part.first_row + n) * head_dim;
                let (tile, _) = keys[first / TILE * head_dim * TILE..].as_chunks_mut::<TILE>();
                for (slot, row) in (first % TILE..).zip(from_keys[wanted.clone()].chunks_exact(head_dim)) {
                    for (from, of_element) in row.iter().zip(&mut *tile) {
                        of_element[slot] = *from;
                    }
                }
                let values = values[first * width..].chunks_exact_mut(width);
                for (row, value) in from_values[wanted].chunks_exact(head_dim).zip(values) {
                    value[..head_dim].copy_from_slice(row);
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
