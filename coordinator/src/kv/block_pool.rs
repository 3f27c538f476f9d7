//! Which blocks are free, in use or cached. Every operation is O(1).
//!
//! A block is *used* while somebody references it, *cached* while nobody does but its content is worth keeping, else
//! *free*. Cached blocks form a doubly linked list through the block array, least recently released first, so that a hit
//! takes a block out of the middle at no cost.

/// A fixed run of positions in the KV cache; the page behind it has the same number on every shard.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockId(u32);

impl BlockId {
    /// For the wire.
    pub fn raw(self) -> u32 {
        self.0
    }

    /// Index into arrays that have an element per block.
    pub(super) fn idx(self) -> usize {
        self.0 as usize
    }
}

#[derive(Debug, Clone, Default)]
struct Block {
    n_refs: u32,
    /// Whether it is kept when nobody references it.
    keep: bool,
    in_list: bool,
    older: Option<BlockId>,
    newer: Option<BlockId>,
}

/// A block that somebody got.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Allocated {
    /// The block; it has one reference.
    pub block: BlockId,
    /// Whether it was cached until now: what is known of its content is void.
    pub evicted: bool,
}

/// All blocks of a group.
#[derive(Debug, Clone)]
pub struct BlockPool {
    blocks: Vec<Block>,
    free: Vec<BlockId>,
    oldest: Option<BlockId>,
    newest: Option<BlockId>,
    n_cached: usize,
}

impl BlockPool {
    /// `n_blocks` free blocks, at most `u32::MAX`. Low numbers are given first.
    pub fn new(n_blocks: usize) -> Self {
        let n = u32::try_from(n_blocks).unwrap_or(u32::MAX);
        Self {
            blocks: vec![Block::default(); n as usize],
            free: (0..n).rev().map(BlockId).collect(),
            oldest: None,
            newest: None,
            n_cached: 0,
        }
    }

    /// Makes a free block cached, more recently released than all that are: the page behind it holds something that is worth
    /// keeping. Panics if it is not free. O(blocks), for all that are given together.
    pub fn cache(&mut self, blocks: impl IntoIterator<Item = BlockId>) {
        let mut is_given = vec![false; self.blocks.len()];
        for block in blocks {
            let state = &mut self.blocks[block.idx()];
            assert!(state.n_refs == 0 && !state.in_list, "block {} is not free", block.0);
            state.keep = true;
            is_given[block.idx()] = true;
            self.link_newest(block);
        }
        self.free.retain(|block| !is_given[block.idx()]);
    }

    /// The block of this number, if there is one.
    pub fn block(&self, raw: u32) -> Option<BlockId> {
        ((raw as usize) < self.blocks.len()).then_some(BlockId(raw))
    }

    /// A free block, else the cached one that was released longest ago, else `None`.
    pub fn allocate(&mut self) -> Option<Allocated> {
        let (block, evicted) = match self.free.pop() {
            Some(block) => (block, false),
            None => {
                let block = self.oldest?;
                self.unlink(block);
                (block, true)
            }
        };
        self.blocks[block.idx()] = Block { n_refs: 1, ..Block::default() };
        Some(Allocated { block, evicted })
    }

    /// One more reference to a used or cached block. Panics on a free one: its content means nothing.
    pub fn share(&mut self, block: BlockId) {
        if self.is_cached(block) {
            self.unlink(block);
        }
        let state = &mut self.blocks[block.idx()];
        assert!(state.n_refs > 0 || state.keep, "block {} is free and cannot be shared", block.0);
        state.n_refs += 1;
    }

    /// From now on the block stays cached when its last reference goes.
    pub fn keep(&mut self, block: BlockId) {
        self.blocks[block.idx()].keep = true;
    }

    /// The block's content is worth nothing any more: it is free as soon as nobody references it.
    pub fn unkeep(&mut self, block: BlockId) {
        self.blocks[block.idx()].keep = false;
        if self.is_cached(block) {
            self.unlink(block);
            self.free.push(block);
        }
    }

    /// Gives one reference back.
    pub fn release(&mut self, block: BlockId) {
        let state = &mut self.blocks[block.idx()];
        assert!(state.n_refs > 0, "block {} is released more often than it was given", block.0);
        state.n_refs -= 1;
        if state.n_refs == 0 {
            if state.keep {
                self.link_newest(block);
            } else {
                self.free.push(block);
            }
        }
    }

    /// Whether nobody references the block but its content is kept.
    pub fn is_cached(&self, block: BlockId) -> bool {
        self.blocks[block.idx()].in_list
    }

    /// Blocks there are.
    pub fn n_blocks(&self) -> usize {
        self.blocks.len()
    }

    /// Blocks that [`BlockPool::allocate`] can give: free and cached ones.
    pub fn n_available(&self) -> usize {
        self.free.len() + self.n_cached
    }

    /// Blocks that nobody references but whose content is kept.
    pub fn n_cached(&self) -> usize {
        self.n_cached
    }

    /// Blocks that somebody references.
    pub fn n_used(&self) -> usize {
        self.n_blocks() - self.n_available()
    }

    /// References to a block.
    pub fn n_refs(&self, block: BlockId) -> u32 {
        self.blocks[block.idx()].n_refs
    }

    /// Asserts that each block is exactly one of free, used and cached, and that the list is sound. O(blocks).
    pub fn check(&self) {
        let mut is_free = vec![false; self.blocks.len()];
        for block in &self.free {
            assert!(!std::mem::replace(&mut is_free[block.idx()], true), "block {} is free twice", block.0);
        }
        let (mut n_listed, mut older, mut next) = (0, None, self.oldest);
        while let Some(block) = next {
            let state = &self.blocks[block.idx()];
            assert!(state.in_list && state.keep && state.n_refs == 0, "block {} is in the list: {state:?}", block.0);
            assert_eq!(state.older, older, "block {} has a wrong neighbour", block.0);
            (older, next) = (next, state.newer);
            n_listed += 1;
            assert!(n_listed <= self.blocks.len(), "the list of cached blocks is a circle");
        }
        assert_eq!(older, self.newest, "the list of cached blocks ends elsewhere");
        assert_eq!(n_listed, self.n_cached, "cached blocks");
        let mut n_used = 0;
        for (idx, state) in self.blocks.iter().enumerate() {
            let states = [is_free[idx], state.in_list, state.n_refs > 0];
            assert_eq!(states.iter().filter(|s| **s).count(), 1, "block {idx} is free, cached, used: {states:?}");
            n_used += usize::from(state.n_refs > 0);
        }
        assert_eq!(self.free.len() + n_used + self.n_cached, self.n_blocks(), "free + used + cached = all");
    }

    fn unlink(&mut self, block: BlockId) {
        let Block { older, newer, .. } = self.blocks[block.idx()];
        match older {
            Some(older) => self.blocks[older.idx()].newer = newer,
            None => self.oldest = newer,
        }
        match newer {
            Some(newer) => self.blocks[newer.idx()].older = older,
            None => self.newest = older,
        }
        let state = &mut self.blocks[block.idx()];
        (state.in_list, state.older, state.newer) = (false, None, None);
        self.n_cached -= 1;
    }

    fn link_newest(&mut self, block: BlockId) {
        let older = self.newest.replace(block);
        match older {
            Some(older) => self.blocks[older.idx()].newer = Some(block),
            None => self.oldest = Some(block),
        }
        let state = &mut self.blocks[block.idx()];
        (state.in_list, state.older, state.newer) = (true, older, None);
        self.n_cached += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn take(pool: &mut BlockPool) -> BlockId {
        pool.allocate().expect("blocks are left").block
    }

    #[test]
    fn kept_blocks_leave_in_the_order_they_were_released() {
        let mut pool = BlockPool::new(3);
        let blocks: Vec<_> = (0..3).map(|_| take(&mut pool)).collect();
        assert_eq!(pool.allocate(), None);
        blocks.iter().for_each(|b| pool.keep(*b));
        for idx in [2, 0, 1] {
            pool.release(blocks[idx]);
        }
        pool.share(blocks[0]);
        pool.check();
        assert_eq!((pool.n_used(), pool.n_cached()), (1, 2));
        let evicted = |block| Some(Allocated { block, evicted: true });
        assert_eq!(pool.allocate(), evicted(blocks[2]));
        assert_eq!(pool.allocate(), evicted(blocks[1]));
        assert_eq!(pool.allocate(), None);
    }

    #[test]
    fn free_blocks_may_turn_out_to_hold_something() {
        let mut pool = BlockPool::new(4);
        let (two, three) = (pool.block(2).expect("it is there"), pool.block(3).expect("it is there"));
        assert_eq!(pool.block(4), None);
        pool.cache([three, two]);
        pool.check();
        assert_eq!((pool.n_available(), pool.n_cached()), (4, 2));
        assert_eq!((take(&mut pool).raw(), take(&mut pool).raw()), (0, 1));
        assert_eq!(pool.allocate(), Some(Allocated { block: three, evicted: true }));
    }

    #[test]
    #[should_panic(expected = "released more often")]
    fn a_release_too_many_is_a_bug() {
        let mut pool = BlockPool::new(1);
        let block = take(&mut pool);
        pool.release(block);
        pool.release(block);
    }

    proptest! {
        #[test]
        fn blocks_are_never_lost(script in prop::collection::vec((0_u8..6, 0_usize..8), 0..200)) {
            let mut pool = BlockPool::new(6);
            let mut held: Vec<BlockId> = Vec::new();
            for (op, pick) in script {
                match op {
                    0 => held.extend(pool.allocate().map(|a| a.block)),
                    1 if !held.is_empty() => pool.release(held.swap_remove(pick % held.len())),
                    2 if !held.is_empty() => pool.keep(held[pick % held.len()]),
                    3 if !held.is_empty() => {
                        let block = held[pick % held.len()];
                        pool.share(block);
                        held.push(block);
                    }
                    4 if !held.is_empty() => pool.unkeep(held[pick % held.len()]),
                    5 => pool.oldest.into_iter().for_each(|block| pool.unkeep(block)),
                    _ => {}
                }
                pool.check();
                for block in &held {
                    let n = held.iter().filter(|b| *b == block).count();
                    prop_assert_eq!(pool.n_refs(*block) as usize, n);
                }
            }
        }
    }
}
