//! Which full block holds the keys and values of which token prefix.
//!
//! A block's content depends on all tokens up to its end, so blocks form chains. Each cached prefix has a number of its
//! own that is never given twice; a block is found by the hash of its parent's number and its own tokens, and a hit
//! compares both. By induction a hit is the same prefix token by token: a collision of hashes can lose a hit but never
//! give wrong keys and values.
//!
//! Of blocks that were computed under an earlier leader only the seal is known: the name of the tokens, not the tokens. Such a
//! block is found by whoever knows the tokens, and is one of the others from then on.

use std::{
    collections::HashMap,
    hash::{DefaultHasher, Hash, Hasher},
};

use phalanx_cluster::{id::TokenId, seal::Seal};

use super::block_pool::BlockId;

/// One exact run of tokens from position 0 on, a whole number of blocks long, of requests that may share.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PrefixId {
    /// No tokens. What begins with different seals shares nothing: a request's salt decides
    /// ([`Seal::root`](phalanx_cluster::seal::Seal::root)).
    Root(Seal),
    /// Some, by the number that they were given.
    Tokens(u64),
}

impl PrefixId {
    /// No tokens, without a salt.
    pub const EMPTY: Self = Self::Root(Seal::EMPTY);
}

#[derive(Debug, Clone)]
struct Entry {
    hash: u64,
    parent: PrefixId,
    prefix: PrefixId,
    tokens: Box<[TokenId]>,
    /// The latest step that may have computed the block.
    step: u64,
}

/// Hash of a parent and the tokens that follow it.
pub type BlockHash = fn(PrefixId, &[TokenId]) -> u64;

fn sip_hash(parent: PrefixId, tokens: &[TokenId]) -> u64 {
    let mut hasher = DefaultHasher::new();
    parent.hash(&mut hasher);
    tokens.hash(&mut hasher);
    hasher.finish()
}

/// What became of a block that was offered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Inserted {
    /// Others find it from now on.
    New(PrefixId),
    /// Another block with the same prefix is there already; that one stays.
    Known(PrefixId),
    /// Another prefix has the same hash: this one can't be found.
    Collision,
}

/// Finds blocks by tokens. Says nothing of whether anybody references them.
#[derive(Debug, Clone)]
pub struct PrefixCache {
    by_hash: HashMap<u64, BlockId>,
    by_block: Vec<Option<Entry>>,
    by_seal: HashMap<Seal, BlockId>,
    /// The same the other way round.
    sealed: HashMap<BlockId, Seal>,
    last: u64,
    hash: BlockHash,
}

impl PrefixCache {
    /// Empty, for blocks below `n_blocks`.
    pub fn new(n_blocks: usize) -> Self {
        Self::with_hash(n_blocks, sip_hash)
    }

    /// With another hash function.
    pub fn with_hash(n_blocks: usize, hash: BlockHash) -> Self {
        Self { by_block: vec![None; n_blocks], ..Self::nothing(hash) }
    }

    fn nothing(hash: BlockHash) -> Self {
        let (by_hash, by_seal, sealed) = (HashMap::new(), HashMap::new(), HashMap::new());
        Self { by_hash, by_block: Vec::new(), by_seal, sealed, last: 0, hash }
    }

    /// A block that nothing is known of has this seal. Says whether it is the first one.
    pub fn seal(&mut self, block: BlockId, seal: Seal) -> bool {
        if self.by_seal.contains_key(&seal) || self.sealed.contains_key(&block) || self.by_block[block.idx()].is_some()
        {
            return false;
        }
        self.by_seal.insert(seal, block);
        self.sealed.insert(block, seal);
        true
    }

    /// Whether there are blocks of which only the seal is known.
    pub fn has_sealed(&self) -> bool {
        !self.by_seal.is_empty()
    }

    /// The block with the seal of the prefix that continues `parent` with these tokens, none of which [`PrefixCache::find`]
    /// finds. Its tokens are known from now on.
    pub fn recognize(&mut self, seal: Seal, parent: PrefixId, tokens: &[TokenId]) -> Option<(BlockId, PrefixId)> {
        let block = *self.by_seal.get(&seal)?;
        match self.insert(block, parent, tokens, 0) {
            Inserted::New(prefix) => Some((block, prefix)),
            Inserted::Known(_) | Inserted::Collision => None,
        }
    }

    /// The block that continues `parent` with exactly these tokens. O(tokens).
    pub fn find(&self, parent: PrefixId, tokens: &[TokenId]) -> Option<(BlockId, PrefixId)> {
        let block = *self.by_hash.get(&(self.hash)(parent, tokens))?;
        let entry = self.by_block[block.idx()].as_ref()?;
        (entry.parent == parent && *entry.tokens == *tokens).then_some((block, entry.prefix))
    }

    /// Makes a block findable: it continues `parent` with these tokens and is computed when `step` is done. O(tokens).
    pub fn insert(&mut self, block: BlockId, parent: PrefixId, tokens: &[TokenId], step: u64) -> Inserted {
        if let Some((_, prefix)) = self.find(parent, tokens) {
            return Inserted::Known(prefix);
        }
        let hash = (self.hash)(parent, tokens);
        if self.by_hash.contains_key(&hash) {
            return Inserted::Collision;
        }
        // If it was offered before, its predecessor has been forgotten since: nothing leads to the older entry.
        self.remove(block);
        self.last += 1;
        let prefix = PrefixId::Tokens(self.last);
        self.by_hash.insert(hash, block);
        self.by_block[block.idx()] = Some(Entry { hash, parent, prefix, tokens: tokens.into(), step });
        Inserted::New(prefix)
    }

    /// Blocks that later steps than this one were to compute. The others count as computed before step 1 from now on:
    /// steps are counted anew. O(blocks).
    pub fn after(&mut self, step: u64) -> Vec<BlockId> {
        let is_late = |b: &BlockId| self.by_block[b.idx()].as_ref().is_some_and(|e| e.step > step);
        let mut late: Vec<_> = self.by_hash.values().copied().filter(is_late).collect();
        // The order of a hash map is not the same twice.
        late.sort_unstable();
        self.by_block.iter_mut().flatten().for_each(|entry| entry.step = 0);
        late
    }

    /// Forgets a block's content. O(1).
    pub fn remove(&mut self, block: BlockId) {
        if let Some(seal) = self.sealed.remove(&block) {
            self.by_seal.remove(&seal);
        }
        if let Some(entry) = self.by_block[block.idx()].take() {
            self.by_hash.remove(&entry.hash);
        }
    }

    /// Blocks that can be found.
    pub fn len(&self) -> usize {
        self.by_hash.len()
    }

    /// Whether none can.
    pub fn is_empty(&self) -> bool {
        self.by_hash.is_empty()
    }

    /// Asserts that both directions agree. O(blocks).
    pub fn check(&self) {
        let n_entries = self.by_block.iter().flatten().count();
        assert_eq!(n_entries, self.by_hash.len(), "entries by block and by hash");
        for (hash, block) in &self.by_hash {
            let entry = self.by_block[block.idx()].as_ref();
            assert_eq!(entry.map(|e| e.hash), Some(*hash), "block {} is found under another hash", block.raw());
        }
        assert_eq!(self.sealed.len(), self.by_seal.len(), "sealed blocks and seals");
        for (block, seal) in &self.sealed {
            assert_eq!(self.by_seal.get(seal), Some(block), "block {} is found by another seal", block.raw());
            assert!(
                self.by_block[block.idx()].is_none(),
                "block {} has a seal though its tokens are known",
                block.raw()
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kv::block_pool::BlockPool;

    fn blocks(n: usize) -> Vec<BlockId> {
        let mut pool = BlockPool::new(n);
        (0..n).map(|_| pool.allocate().expect("there are n").block).collect()
    }

    fn new_prefix(inserted: Inserted) -> PrefixId {
        let Inserted::New(prefix) = inserted else { panic!("{inserted:?} is not new") };
        prefix
    }

    #[test]
    fn a_block_is_found_behind_its_own_prefix_only() {
        let b = blocks(4);
        let mut cache = PrefixCache::new(4);
        let first = new_prefix(cache.insert(b[0], PrefixId::EMPTY, &[1, 2], 1));
        let other = new_prefix(cache.insert(b[1], PrefixId::EMPTY, &[3, 4], 1));
        let second = new_prefix(cache.insert(b[2], first, &[5, 6], 1));
        assert_eq!(cache.find(first, &[5, 6]), Some((b[2], second)));
        assert_eq!(cache.find(other, &[5, 6]), None);
        assert_eq!(cache.find(PrefixId::EMPTY, &[5, 6]), None);
        assert_eq!(cache.insert(b[3], first, &[5, 6], 1), Inserted::Known(second));
        cache.check();
    }

    #[test]
    fn a_prefix_that_comes_back_does_not_revive_old_children() {
        let b = blocks(3);
        let mut cache = PrefixCache::new(3);
        let first = new_prefix(cache.insert(b[0], PrefixId::EMPTY, &[1], 1));
        new_prefix(cache.insert(b[1], first, &[2], 1));
        cache.remove(b[0]);
        let again = new_prefix(cache.insert(b[2], PrefixId::EMPTY, &[1], 1));
        assert_ne!(again, first);
        assert_eq!(cache.find(again, &[2]), None);
        cache.check();
    }

    #[test]
    fn a_block_has_one_entry() {
        let b = blocks(2);
        let mut cache = PrefixCache::new(2);
        let first = new_prefix(cache.insert(b[0], PrefixId::EMPTY, &[1], 1));
        new_prefix(cache.insert(b[1], first, &[2], 1));
        cache.remove(b[0]);
        let again = new_prefix(cache.insert(b[0], PrefixId::EMPTY, &[1], 2));
        let second = new_prefix(cache.insert(b[1], again, &[2], 2));
        assert_eq!((cache.find(first, &[2]), cache.find(again, &[2])), (None, Some((b[1], second))));
        cache.check();
    }

    #[test]
    fn equal_hashes_lose_hits_but_never_lie() {
        let b = blocks(2);
        let mut cache = PrefixCache::with_hash(2, |_, _| 7);
        let prefix = new_prefix(cache.insert(b[0], PrefixId::EMPTY, &[1, 2], 1));
        assert_eq!(cache.find(PrefixId::EMPTY, &[1, 3]), None);
        assert_eq!(cache.find(prefix, &[1, 2]), None);
        assert_eq!(cache.insert(b[1], PrefixId::EMPTY, &[1, 3], 1), Inserted::Collision);
        assert_eq!(cache.find(PrefixId::EMPTY, &[1, 2]), Some((b[0], prefix)));
        cache.remove(b[1]);
        cache.check();
        assert_eq!(cache.len(), 1);
    }
    #[test]
    fn a_sealed_block_is_found_by_who_knows_its_tokens() {
        let b = blocks(4);
        let mut cache = PrefixCache::new(4);
        let seal = |tokens: &[TokenId]| Seal::of(tokens, 2);
        assert!(cache.seal(b[0], seal(&[1, 2])) && cache.seal(b[1], seal(&[1, 2, 3, 4])));
        assert!(!cache.seal(b[2], seal(&[1, 2])), "one is enough");
        assert_eq!(cache.find(PrefixId::EMPTY, &[1, 2]), None);
        assert_eq!(cache.recognize(seal(&[1, 9]), PrefixId::EMPTY, &[1, 9]), None);
        let (block, first) = cache.recognize(seal(&[1, 2]), PrefixId::EMPTY, &[1, 2]).expect("it is sealed");
        assert_eq!((block, cache.find(PrefixId::EMPTY, &[1, 2])), (b[0], Some((b[0], first))));
        assert_eq!(cache.recognize(seal(&[1, 2]), PrefixId::EMPTY, &[1, 2]), None, "it has no seal any more");
        cache.check();
        // Its page is given to somebody else.
        cache.remove(b[1]);
        assert_eq!(cache.recognize(seal(&[1, 2, 3, 4]), first, &[3, 4]), None);
        assert!(!cache.has_sealed());
        cache.check();
    }
}
