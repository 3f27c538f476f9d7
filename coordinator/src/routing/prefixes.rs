//! Beginnings of prompts that a group has computed lately, and so probably still has in its prefix cache.
//!
//! A record of what was sent there, not of what is there: a miss costs a prefill, a hash that collides a worse choice.

use std::collections::BTreeMap;

use phalanx_cluster::{id::TokenId, seal::Seal};

/// Hashes of a prompt's beginnings, one for each whole block, from the shortest on. The last token is always computed, so
/// a block that ends with it is left out. Only prompts of the same root have the same.
pub fn hashes(root: Seal, prompt: &[TokenId], block_size: usize) -> Vec<u64> {
    let cacheable = prompt.split_last().map_or(&[][..], |(_, before)| before);
    let mut hash = root.bytes().as_chunks::<8>().0.iter().fold(0, |hash, half| hash ^ u64::from_le_bytes(*half));
    let blocks = cacheable.chunks_exact(block_size.max(1)).map(|block| {
        for token in block {
            // Odd multiplier of SplitMix64 (Steele et al., 2014); the shift brings its high bits down.
            hash = (hash ^ u64::from(*token)).wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            hash ^= hash >> 32;
        }
        hash
    });
    blocks.collect()
}

/// The blocks that were used last, at most as many as a group has.
#[derive(Debug, Clone, Default)]
pub struct Prefixes {
    used_at: BTreeMap<u64, u64>,
    by_use: BTreeMap<u64, u64>,
    clock: u64,
    limit: usize,
}

impl Prefixes {
    /// At most so many blocks from now on.
    pub fn limit(&mut self, limit: usize) {
        self.limit = limit;
        self.trim();
    }

    /// Nothing is there any more.
    pub fn clear(&mut self) {
        self.used_at.clear();
        self.by_use.clear();
    }

    /// How many blocks of a prompt are there.
    pub fn n_known(&self, hashes: &[u64]) -> usize {
        hashes.iter().take_while(|hash| self.used_at.contains_key(hash)).count()
    }

    /// A prompt is computed.
    pub fn record(&mut self, hashes: &[u64]) {
        // From its end on: of one prompt the beginning is forgotten last.
        for hash in hashes.iter().take(self.limit).rev() {
            self.clock += 1;
            if let Some(before) = self.used_at.insert(*hash, self.clock) {
                self.by_use.remove(&before);
            }
            self.by_use.insert(self.clock, *hash);
        }
        self.trim();
    }

    /// Blocks that are recorded.
    pub fn len(&self) -> usize {
        self.used_at.len()
    }

    /// Whether nothing is recorded.
    pub fn is_empty(&self) -> bool {
        self.used_at.is_empty()
    }

    fn trim(&mut self) {
        while self.used_at.len() > self.limit {
            let Some((_, hash)) = self.by_use.pop_first() else { return };
            self.used_at.remove(&hash);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hashes(prompt: &[TokenId], block_size: usize) -> Vec<u64> {
        super::hashes(Seal::EMPTY, prompt, block_size)
    }

    fn prefixes(limit: usize) -> Prefixes {
        let mut prefixes = Prefixes::default();
        prefixes.limit(limit);
        prefixes
    }

    #[test]
    fn whole_blocks_before_the_last_token_count() {
        assert_eq!(hashes(&[], 4).len(), 0);
        assert_eq!(hashes(&[1, 2, 3, 4], 4).len(), 0);
        assert_eq!(hashes(&[1, 2, 3, 4, 5], 4).len(), 1);
        let (a, b) = (hashes(&[1, 2, 3, 4, 5, 6, 7, 8, 9], 4), hashes(&[1, 2, 3, 4, 5, 6, 7, 9, 9], 4));
        assert_eq!((a.len(), a[0] == b[0], a[1] == b[1]), (2, true, false));
        let salted = super::hashes(Seal::root("salt"), &[1, 2, 3, 4, 5, 6, 7, 8, 9], 4);
        assert!(salted.iter().all(|hash| !a.contains(hash)), "nothing is known of it elsewhere");
        assert_ne!(hashes(&[0, 0, 0], 1), hashes(&[0, 0, 1], 1)[..1].repeat(2), "zeros have hashes of their own");
    }

    #[test]
    fn the_longest_known_beginning_is_found() {
        let mut prefixes = prefixes(100);
        let prompt: Vec<u32> = (0..33).collect();
        prefixes.record(&hashes(&prompt, 8));
        assert_eq!(prefixes.n_known(&hashes(&prompt, 8)), 4);
        let other: Vec<u32> = (0..20).chain(50..70).collect();
        assert_eq!(prefixes.n_known(&hashes(&other, 8)), 2);
        prefixes.clear();
        assert_eq!((prefixes.n_known(&hashes(&prompt, 8)), prefixes.len()), (0, 0));
    }

    #[test]
    fn what_was_not_used_for_longest_is_forgotten_from_its_end_on() {
        let mut prefixes = prefixes(6);
        let prompt = |first: u32| hashes(&(first..first + 17).collect::<Vec<u32>>(), 4);
        prefixes.record(&prompt(0));
        prefixes.record(&prompt(100));
        assert_eq!((prefixes.len(), prefixes.n_known(&prompt(0)), prefixes.n_known(&prompt(100))), (6, 2, 4));
        prefixes.record(&prompt(0)[..1]);
        prefixes.record(&prompt(200));
        assert_eq!((prefixes.len(), prefixes.n_known(&prompt(0)), prefixes.n_known(&prompt(200))), (6, 1, 4));
        prefixes.limit(0);
        assert!(prefixes.is_empty());
    }
}
