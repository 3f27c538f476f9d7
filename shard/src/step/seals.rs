//! What full blocks of the pages hold, by name: a new leader finds by it what need not be computed again.
//!
//! **Invariant.** A sealed block's page holds the rows of the tokens that its seal names, all of them. So a seal is broken
//! before a step writes to its block, which may fail half way, and put again only when a step has run completely.

use std::ops::Range;

use phalanx_cluster::seal::Seal;

/// Seals of all blocks of a rank's pages.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Seals {
    block_size: usize,
    by_block: Vec<Option<Seal>>,
    /// Blocks that the last step sealed.
    new: Vec<u32>,
}

/// The leading blocks of a sequence that were sealed for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SealedPrefix {
    n_blocks: usize,
    seal: Seal,
}

impl Default for SealedPrefix {
    fn default() -> Self {
        Self::new(Seal::EMPTY)
    }
}

impl SealedPrefix {
    /// No blocks, of a sequence whose seals begin with this one.
    pub fn new(root: Seal) -> Self {
        Self { n_blocks: 0, seal: root }
    }
}

impl Seals {
    /// Of blocks that hold nothing.
    pub fn new(n_blocks: usize, block_size: usize) -> Self {
        Self { block_size: block_size.max(1), by_block: vec![None; n_blocks], new: Vec::new() }
    }

    /// Of blocks that hold what somebody else has sealed.
    pub fn of_copies(n_blocks: usize, block_size: usize, seals: impl IntoIterator<Item = (u32, Seal)>) -> Self {
        let mut copied = Self::new(n_blocks, block_size);
        for (block, seal) in seals {
            if let Some(sealed) = copied.by_block.get_mut(block as usize) {
                *sealed = Some(seal);
            }
        }
        copied
    }

    /// A step is about to write these positions of a sequence with these blocks.
    pub fn unseal(&mut self, blocks: &[u32], positions: Range<usize>) {
        let idxs = positions.start / self.block_size..positions.end.div_ceil(self.block_size).min(blocks.len());
        for block in blocks.get(idxs).unwrap_or_default() {
            if let Some(seal) = self.by_block.get_mut(*block as usize) {
                *seal = None;
            }
        }
    }

    /// Steps that have run completely, or those of an earlier group, computed the first `n_computed` positions of a
    /// sequence. O(tokens of blocks that have become full).
    pub fn seal(&mut self, prefix: &mut SealedPrefix, tokens: &[u32], blocks: &[u32], n_computed: usize) {
        let full = tokens[..n_computed.min(tokens.len())].chunks_exact(self.block_size);
        for (tokens, block) in full.zip(blocks).skip(prefix.n_blocks) {
            let seal = prefix.seal.then(tokens);
            *prefix = SealedPrefix { n_blocks: prefix.n_blocks + 1, seal };
            if let Some(sealed) = self.by_block.get_mut(*block as usize)
                && *sealed != Some(seal)
            {
                *sealed = Some(seal);
                self.new.push(*block);
            }
        }
    }

    /// From now on blocks are sealed that count as new.
    pub fn begin_step(&mut self) {
        self.new.clear();
    }

    /// Blocks that have been sealed since [`Seals::begin_step`].
    pub fn newly_sealed(&self) -> &[u32] {
        &self.new
    }

    /// What a block holds, if it is known.
    pub fn of(&self, block: u32) -> Option<Seal> {
        self.by_block.get(block as usize).copied().flatten()
    }

    /// Blocks that are sealed, in order.
    pub fn iter(&self) -> impl Iterator<Item = (u32, Seal)> {
        (0..).zip(&self.by_block).filter_map(|(block, seal)| Some((block, (*seal)?)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOKENS: [u32; 7] = [1, 2, 3, 4, 5, 6, 7];

    fn of(seals: &Seals) -> Vec<(u32, Seal)> {
        seals.iter().collect()
    }

    #[test]
    fn full_blocks_are_sealed_once_they_are_computed() {
        let (mut seals, mut prefix) = (Seals::new(8, 2), SealedPrefix::default());
        let blocks = [5, 3, 7, 0];
        seals.unseal(&blocks, 0..3);
        assert_eq!(of(&seals), []);
        seals.seal(&mut prefix, &TOKENS, &blocks, 3);
        assert_eq!(of(&seals), [(5, Seal::of(&TOKENS[..2], 2))]);
        seals.unseal(&blocks, 3..7);
        seals.seal(&mut prefix, &TOKENS, &blocks, 7);
        let of_tokens = |n| Seal::of(&TOKENS[..n], 2);
        assert_eq!(of(&seals), [(3, of_tokens(4)), (5, of_tokens(2)), (7, of_tokens(6))]);
    }

    #[test]
    fn what_is_about_to_be_written_has_no_seal() {
        let (mut seals, mut prefix) = (Seals::new(4, 2), SealedPrefix::default());
        seals.seal(&mut prefix, &TOKENS, &[0, 1, 2], 6);
        seals.unseal(&[3, 1], 2..3);
        assert_eq!(seals.iter().map(|(block, _)| block).collect::<Vec<_>>(), [0, 2]);
        // Out of range, and nothing at all.
        seals.unseal(&[9], 0..2);
        seals.unseal(&[], 4..9);
        assert_eq!(of(&seals).len(), 2);
    }

    #[test]
    fn equal_tokens_have_other_seals_where_their_root_is_another() {
        let mut seals = Seals::new(2, 2);
        let root = Seal::root("salt");
        seals.seal(&mut SealedPrefix::new(root), &TOKENS, &[0], 2);
        seals.seal(&mut SealedPrefix::default(), &TOKENS, &[1], 2);
        assert_eq!(of(&seals), [(0, root.then(&TOKENS[..2])), (1, Seal::of(&TOKENS[..2], 2))]);
    }

    #[test]
    fn a_shared_beginning_is_sealed_for_each_who_has_it() {
        let mut seals = Seals::new(4, 2);
        seals.seal(&mut SealedPrefix::default(), &TOKENS, &[0, 1], 4);
        let before = seals.clone();
        seals.seal(&mut SealedPrefix::default(), &TOKENS[..5], &[0, 1, 2], 5);
        assert_eq!(seals, before);
    }
}
