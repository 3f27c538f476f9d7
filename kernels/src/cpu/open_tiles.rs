//! Rows that come one at a time, kept until all of their tile are there.
//!
//! Keys lie in tiles, element after element, each for 16 positions: a row alone touches as many cache lines as the whole tile, and copies
//! lie in memory that nobody else reads, so that each of these lines comes from there and goes back.

use std::collections::BTreeMap;

use super::{
    kv::{KvCache, element_bytes},
    kv_rows::{Part, Rows},
};
use crate::{layout::TILE, pages::row_bytes, slots::KvRange};

/// Tiles of which some rows are not there yet.
#[derive(Debug)]
pub(crate) struct OpenTiles {
    /// By block and number in it.
    tiles: BTreeMap<(u32, u32), OpenTile>,
    /// Rooms of tiles that were closed.
    spare: Vec<Vec<u8>>,
    /// Most bytes of rooms, unless one tile has more.
    limit: usize,
    /// Tiles that were ever opened.
    n_opened: u64,
}

#[derive(Debug)]
struct OpenTile {
    /// One row after another, each as a range of its own in the format of [`crate::pages`].
    rows: Vec<u8>,
    /// Which of them are there, a bit each.
    there: u16,
    /// When it was opened.
    number: u64,
}

const ALL: u16 = u16::MAX;
const _: () = assert!(TILE == u16::BITS as usize, "a bit for each row of a tile");

impl OpenTiles {
    /// None yet; of no more than `limit` bytes.
    pub fn new(limit: usize) -> Self {
        Self { tiles: BTreeMap::new(), spare: Vec::new(), limit, n_opened: 0 }
    }

    /// Takes rows in that have been checked. Tiles that are whole go to the pages.
    pub fn write(&mut self, pages: &mut KvCache, ranges: &[KvRange], rows: &[u8]) {
        let row_bytes = row_bytes(pages.shape, pages.precision);
        let piece_bytes = pages.shape.head_dim * element_bytes(pages.precision);
        let mut rest = rows;
        for range in ranges {
            let n_rows = range.n_rows as usize;
            let (rows, others) = rest.split_at(n_rows * row_bytes);
            rest = others;
            let (mut first, end) = (range.first, range.first + range.n_rows);
            while first < end {
                let next = end.min((first / TILE as u32 + 1) * TILE as u32);
                let slots = KvRange { block: range.block, first, n_rows: next - first };
                let rows = Rows::of_range(rows, n_rows, (first - range.first) as usize, piece_bytes);
                self.write_part(pages, Part { slots, rows });
                first = next;
            }
            pages.note(*range);
        }
    }

    /// Brings all rows to the pages.
    pub fn close_all(&mut self, pages: &mut KvCache) {
        while let Some((place, tile)) = self.tiles.pop_first() {
            close(pages, place, &tile);
        }
        self.spare = Vec::new();
    }

    fn write_part(&mut self, pages: &mut KvCache, part: Part<'_>) {
        let place = (part.slots.block, part.slots.first / TILE as u32);
        if part.slots.n_rows as usize == TILE {
            if let Some(outdated) = self.tiles.remove(&place) {
                self.spare.push(outdated.rows);
            }
            return pages.write_part(part);
        }
        if !self.tiles.contains_key(&place) {
            let rows = self.room(pages);
            self.n_opened += 1;
            self.tiles.insert(place, OpenTile { rows, there: 0, number: self.n_opened });
        }
        let Some(tile) = self.tiles.get_mut(&place) else { return };
        tile.take(part, row_bytes(pages.shape, pages.precision), pages.shape.head_dim * element_bytes(pages.precision));
        if tile.there == ALL
            && let Some(tile) = self.tiles.remove(&place)
        {
            close(pages, place, &tile);
            self.spare.push(tile.rows);
        }
    }

    /// Room for one more tile. If there is none, the one that has been open longest goes to the pages as it is.
    fn room(&mut self, pages: &mut KvCache) -> Vec<u8> {
        if let Some(room) = self.spare.pop() {
            return room;
        }
        let bytes = TILE * row_bytes(pages.shape, pages.precision);
        let has_room = (self.tiles.len() + 1).saturating_mul(bytes) <= self.limit;
        let longest = self.tiles.iter().min_by_key(|(_, tile)| tile.number).map(|(place, _)| *place);
        match longest.filter(|_| !has_room).and_then(|place| Some((place, self.tiles.remove(&place)?))) {
            Some((place, tile)) => {
                close(pages, place, &tile);
                tile.rows
            }
            None => vec![0; bytes],
        }
    }
}

impl OpenTile {
    /// Copies rows of this tile.
    fn take(&mut self, part: Part<'_>, row_bytes: usize, piece_bytes: usize) {
        let (first, n) = (part.slots.first as usize % TILE, part.slots.n_rows as usize);
        for (row, room) in self.rows.chunks_exact_mut(row_bytes).skip(first).take(n).enumerate() {
            if part.rows.piece_stride == piece_bytes {
                // A row alone lies as it is to lie here.
                room.copy_from_slice(part.rows.part(row, 0, row_bytes));
                continue;
            }
            for (piece, room) in room.chunks_exact_mut(piece_bytes).enumerate() {
                room.copy_from_slice(part.rows.part(row, piece, piece_bytes));
            }
        }
        self.there |= ALL >> (TILE - n) << first;
    }
}

/// Brings the rows that are there to the pages.
fn close(pages: &mut KvCache, (block, number): (u32, u32), tile: &OpenTile) {
    let row_stride = row_bytes(pages.shape, pages.precision);
    let piece_stride = pages.shape.head_dim * element_bytes(pages.precision);
    let mut left = tile.there;
    while left != 0 {
        let first_row = left.trailing_zeros();
        let n_rows = (left >> first_row).trailing_ones();
        left &= !(ALL >> (TILE as u32 - n_rows) << first_row);
        let slots = KvRange { block, first: number * TILE as u32 + first_row, n_rows };
        let bytes = &tile.rows[first_row as usize * row_stride..];
        pages.write_part(Part { slots, rows: Rows { bytes, row_stride, piece_stride } });
    }
}
