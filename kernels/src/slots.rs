//! Which slots of the KV pages: ranges, and sets of them.

use std::ops::Range;

/// Consecutive slots of one block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct KvRange {
    /// The block.
    pub block: u32,
    /// First slot in it.
    pub first: u32,
    /// Number of slots.
    pub n_rows: u32,
}

impl KvRange {
    /// The ranges, one a block, of consecutive positions of a sequence whose position p is in `blocks[p / block_size]`.
    /// Positions without a block are left out.
    pub fn of_positions(blocks: &[u32], positions: Range<usize>, block_size: usize) -> impl Iterator<Item = Self> {
        let last = positions.end.div_ceil(block_size.max(1)).min(blocks.len());
        let first = (positions.start / block_size.max(1)).min(last);
        (first..last).filter_map(move |idx| {
            let from = positions.start.max(idx * block_size) - idx * block_size;
            let to = positions.end.min((idx + 1) * block_size) - idx * block_size;
            (from < to).then(|| Self { block: blocks[idx], first: from as u32, n_rows: (to - from) as u32 })
        })
    }

    /// The slots in the block.
    fn slots(self) -> Range<usize> {
        self.first as usize..self.first as usize + self.n_rows as usize
    }
}

/// Rows of all ranges together.
pub fn n_rows(ranges: &[KvRange]) -> usize {
    ranges.iter().map(|range| range.n_rows as usize).sum()
}

/// A set of slots of pages with a known number of blocks.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SlotSet {
    block_size: usize,
    n_blocks: usize,
    /// A bit a slot.
    words: Vec<u64>,
    len: usize,
    /// No slot below this word is in the set.
    first_word: usize,
}

impl SlotSet {
    /// An empty set.
    pub fn new(n_blocks: usize, block_size: usize) -> Self {
        let words = vec![0; n_blocks.saturating_mul(block_size).div_ceil(64)];
        Self { block_size, n_blocks, words, len: 0, first_word: 0 }
    }

    /// Number of slots in the set.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Adds the slots of a range; what lies outside of the pages is ignored.
    pub fn insert(&mut self, range: KvRange) {
        let Some(bits) = self.bits(range) else { return };
        self.first_word = self.first_word.min(bits.start / 64);
        for (idx, mask) in masks(bits) {
            self.len += (mask & !self.words[idx]).count_ones() as usize;
            self.words[idx] |= mask;
        }
    }

    /// Takes the slots of a range out.
    pub fn remove(&mut self, range: KvRange) {
        let Some(bits) = self.bits(range) else { return };
        for (idx, mask) in masks(bits) {
            self.len -= (mask & self.words[idx]).count_ones() as usize;
            self.words[idx] &= !mask;
        }
    }

    /// Whether any slot of a block is in the set.
    pub fn has_block(&self, block: u32) -> bool {
        let whole = KvRange { block, first: 0, n_rows: u32::try_from(self.block_size).unwrap_or(u32::MAX) };
        self.bits(whole).is_some_and(|bits| masks(bits).any(|(idx, mask)| self.words[idx] & mask != 0))
    }

    /// Takes up to `most` slots out, the first ones, and appends them to `ranges`.
    pub fn take(&mut self, most: usize, ranges: &mut Vec<KvRange>) {
        let mut left = most;
        while left > 0 && self.len > 0 {
            while self.words[self.first_word] == 0 {
                self.first_word += 1;
            }
            let from = self.first_word * 64 + self.words[self.first_word].trailing_zeros() as usize;
            let (block, first) = (from / self.block_size, from % self.block_size);
            let end = ((block + 1) * self.block_size).min(from + left);
            let is_in = |bit: &usize| self.words[bit / 64] & (1 << (bit % 64)) != 0;
            let n_rows = (from..end).take_while(is_in).count();
            let range = KvRange { block: block as u32, first: first as u32, n_rows: n_rows as u32 };
            self.remove(range);
            ranges.push(range);
            left -= n_rows;
        }
    }

    /// The bits of a range, cut to the block; none of a block that there is not.
    fn bits(&self, range: KvRange) -> Option<Range<usize>> {
        let slots = range.slots();
        let (block, end) = (range.block as usize, slots.end.min(self.block_size));
        (block < self.n_blocks && slots.start < end)
            .then(|| block * self.block_size + slots.start..block * self.block_size + end)
    }
}

/// The words that hold a run of bits, with the bits in them.
fn masks(bits: Range<usize>) -> impl Iterator<Item = (usize, u64)> {
    (bits.start / 64..bits.end.div_ceil(64)).map(move |idx| {
        let (from, to) = (bits.start.max(idx * 64) - idx * 64, bits.end.min((idx + 1) * 64) - idx * 64);
        (idx, (u64::MAX >> (64 - (to - from))) << from)
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn range(block: u32, first: u32, n_rows: u32) -> KvRange {
        KvRange { block, first, n_rows }
    }

    #[test]
    fn positions_are_cut_at_blocks() {
        let ranges = |positions| KvRange::of_positions(&[7, 3, 9], positions, 16).collect::<Vec<_>>();
        assert_eq!(ranges(5..6), [range(7, 5, 1)]);
        assert_eq!(ranges(14..40), [range(7, 14, 2), range(3, 0, 16), range(9, 0, 8)]);
        assert_eq!(ranges(16..32), [range(3, 0, 16)]);
        assert_eq!(ranges(47..60), [range(9, 15, 1)]);
        assert_eq!(ranges(48..60), []);
        assert_eq!(ranges(8..8), []);
        assert_eq!(n_rows(&ranges(14..40)), 26);
    }

    #[test]
    fn what_is_not_there_is_ignored() {
        let mut set = SlotSet::new(2, 16);
        set.insert(range(2, 0, 1));
        set.insert(range(u32::MAX, u32::MAX, u32::MAX));
        set.insert(range(1, 14, 100));
        assert_eq!(set.len(), 2);
        assert!(!set.has_block(0) && set.has_block(1) && !set.has_block(2));
        SlotSet::default().take(5, &mut Vec::new());
    }

    proptest! {
        #[test]
        fn a_set_is_like_a_list_of_slots(
            block_size in prop::sample::select(vec![16usize, 48, 80]),
            changes in prop::collection::vec((any::<bool>(), 0..9u32, 0..80u32, 0..80u32), 0..30),
            most in 1..100usize,
        ) {
            let mut set = SlotSet::new(9, block_size);
            let mut want = BTreeSet::new();
            for (inserts, block, first, n_rows) in changes {
                let slots = (first..first + n_rows).filter(|slot| (*slot as usize) < block_size).map(|slot| (block, slot));
                if inserts {
                    set.insert(range(block, first, n_rows));
                    want.extend(slots);
                } else {
                    set.remove(range(block, first, n_rows));
                    slots.for_each(|slot| { want.remove(&slot); });
                }
                prop_assert_eq!(set.len(), want.len());
            }
            for block in 0..9 {
                prop_assert_eq!(set.has_block(block), want.iter().any(|slot| slot.0 == block));
            }
            let mut taken = Vec::new();
            while !set.is_empty() {
                let mut ranges = Vec::new();
                set.take(most, &mut ranges);
                prop_assert!(n_rows(&ranges) <= most && n_rows(&ranges) > 0);
                taken.extend(ranges.iter().flat_map(|r| (r.first..r.first + r.n_rows).map(|slot| (r.block, slot))));
            }
            prop_assert_eq!(taken, want.into_iter().collect::<Vec<_>>());
        }
    }
}
