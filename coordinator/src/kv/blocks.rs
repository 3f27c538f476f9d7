//! The KV cache as the scheduler sees it: blocks for sequences, shared where their tokens agree.
//!
//! Shards run steps in order, and write the rows of all chunks of a step before they read any. So a block that a chunk fills
//! may be read by any later chunk, of the same plan too: [`Blocks::publish`] takes effect at once. A block that is given
//! back may be written by any later plan: so does [`Blocks::release`].

use phalanx_cluster::{id::TokenId, seal::Seal};

use super::{
    block_pool::{BlockId, BlockPool},
    block_table::BlockTable,
    prefix_cache::{Inserted, PrefixCache, PrefixId},
};

/// Blocks of a group and what is cached in them.
#[derive(Debug, Clone)]
pub struct Blocks {
    pool: BlockPool,
    cache: PrefixCache,
    block_size: usize,
}

/// What a sequence got when it was admitted.
#[derive(Debug)]
pub struct Admitted {
    /// Blocks for all its tokens.
    pub table: BlockTable,
    /// Leading positions that are computed already: a whole number of blocks, fewer than the tokens.
    pub n_cached: usize,
}

impl Blocks {
    /// `n_blocks` free blocks of `block_size` positions (at least 1).
    pub fn new(n_blocks: usize, block_size: usize) -> Self {
        Self { pool: BlockPool::new(n_blocks), cache: PrefixCache::new(n_blocks), block_size: block_size.max(1) }
    }

    /// The same; `sealed` blocks hold what their seals name: whoever has those tokens finds them. The last ones given are kept
    /// longest.
    pub fn with_sealed(n_blocks: usize, block_size: usize, sealed: &[(u32, Seal)]) -> Self {
        let mut blocks = Self::new(n_blocks, block_size);
        let Self { pool, cache, .. } = &mut blocks;
        let known = sealed.iter().filter_map(|(raw, seal)| Some((pool.block(*raw)?, *seal)));
        let cached: Vec<BlockId> = known.filter(|(block, seal)| cache.seal(*block, *seal)).map(|(b, _)| b).collect();
        pool.cache(cached);
        blocks
    }

    /// Keeps what is cached of a prefix of `tokens` longer than all else that nobody uses. They begin with `root`.
    pub fn touch(&mut self, root: Seal, tokens: &[TokenId]) {
        let mut table = BlockTable::new(root);
        self.find_prefix(&mut table, tokens);
        table.blocks.iter().for_each(|b| self.pool.share(*b));
        self.release(table);
    }

    /// Blocks that `n_positions` take.
    pub fn needed(&self, n_positions: usize) -> usize {
        n_positions.div_ceil(self.block_size)
    }

    /// Blocks for a sequence of `tokens`, the longest cached prefix among them if `lookup` is set, but never its last
    /// token: somebody has to compute its logits. `None`, and nothing happens, unless `spare` blocks are left after it. It shares
    /// with those alone that begin with the same `root`.
    pub fn admit(&mut self, root: Seal, tokens: &[TokenId], lookup: bool, spare: usize) -> Option<Admitted> {
        let mut table = BlockTable::new(root);
        if lookup {
            self.find_prefix(&mut table, &tokens[..tokens.len().saturating_sub(1)]);
        }
        let n_shared = table.blocks.len();
        let n_new = self.needed(tokens.len()) - n_shared;
        // Shared blocks that nobody else uses count as available, but won't be.
        let n_revived = table.blocks.iter().filter(|b| self.pool.is_cached(**b)).count();
        if self.pool.n_available() < n_new + n_revived + spare {
            return None;
        }
        table.blocks.iter().for_each(|b| self.pool.share(*b));
        for _ in 0..n_new {
            let block = self.allocate().expect("availability was checked above");
            table.blocks.push(block);
        }
        Some(Admitted { table, n_cached: n_shared * self.block_size })
    }

    fn find_prefix(&mut self, table: &mut BlockTable, tokens: &[TokenId]) {
        let root = table.root;
        let (mut prefix, mut seal, has_sealed) = (PrefixId::Root(root), root, self.cache.has_sealed());
        for block_tokens in tokens.chunks_exact(self.block_size) {
            if has_sealed {
                seal = seal.then(block_tokens);
            }
            let known = self.cache.find(prefix, block_tokens);
            let Some((block, found)) = known.or_else(|| self.cache.recognize(seal, prefix, block_tokens)) else {
                break;
            };
            prefix = found;
            table.blocks.push(block);
            table.n_published += 1;
        }
        table.published = Some(prefix);
    }

    /// Whether a table has a block for each of `n_positions`.
    pub fn covers(&self, table: &BlockTable, n_positions: usize) -> bool {
        self.needed(n_positions) <= table.blocks.len()
    }

    /// One block more, if there is any.
    pub fn grow(&mut self, table: &mut BlockTable) -> Option<BlockId> {
        let block = self.allocate()?;
        table.blocks.push(block);
        Some(block)
    }

    /// Tells that the first `n_computed` positions are computed by plans sent so far, and that `tokens` are what they
    /// hold: full blocks become findable. `step` is the latest of those plans. Costs nothing unless a block has become full.
    pub fn publish(&mut self, table: &mut BlockTable, tokens: &[TokenId], n_computed: usize, step: u64) {
        let n_full = n_computed.min(tokens.len()) / self.block_size;
        while table.n_published < n_full {
            let Some(parent) = table.published else {
                table.n_published = n_full;
                return;
            };
            let idx = table.n_published;
            let block = table.blocks[idx];
            let range = idx * self.block_size..(idx + 1) * self.block_size;
            table.published = match self.cache.insert(block, parent, &tokens[range], step) {
                Inserted::New(prefix) => {
                    self.pool.keep(block);
                    Some(prefix)
                }
                Inserted::Known(prefix) => Some(prefix),
                Inserted::Collision => None,
            };
            table.n_published += 1;
        }
    }

    /// Forgets what steps after this one were to compute: they may never have run. Steps are counted anew from here.
    pub fn forget_after(&mut self, step: u64) {
        for block in self.cache.after(step) {
            self.forget(block);
        }
    }

    fn forget(&mut self, block: BlockId) {
        self.cache.remove(block);
        self.pool.unkeep(block);
    }

    /// Lets a sequence of `tokens` compute its positions from `n_computed` on once more: nobody else may read them
    /// meanwhile. Blocks that others share are replaced. Returns how many positions stay computed, or `None` if there
    /// are too few blocks; then the table is only good for [`Blocks::release`].
    pub fn reopen(&mut self, table: &mut BlockTable, tokens: &[TokenId], n_computed: usize) -> Option<usize> {
        let mut n_computed = n_computed;
        for idx in n_computed / self.block_size..table.blocks.len() {
            let block = table.blocks[idx];
            if self.pool.n_refs(block) == 1 {
                self.forget(block);
                continue;
            }
            table.blocks[idx] = self.allocate()?;
            self.pool.release(block);
            n_computed = n_computed.min(idx * self.block_size);
        }
        // What was published may have been forgotten since.
        let mut prefix = PrefixId::Root(table.root);
        table.n_published = 0;
        for block_tokens in tokens[..n_computed].chunks_exact(self.block_size) {
            let Some((_, found)) = self.cache.find(prefix, block_tokens) else { break };
            prefix = found;
            table.n_published += 1;
        }
        table.published = Some(prefix);
        Some(n_computed)
    }

    /// Positions for which a table has blocks.
    pub fn n_positions(&self, table: &BlockTable) -> usize {
        table.blocks.len() * self.block_size
    }

    /// Gives a sequence's blocks back: the last first, so that a prefix's tail is evicted before its head.
    pub fn release(&mut self, table: BlockTable) {
        for block in table.blocks.into_iter().rev() {
            self.pool.release(block);
        }
    }

    fn allocate(&mut self) -> Option<BlockId> {
        let allocated = self.pool.allocate()?;
        if allocated.evicted {
            self.cache.remove(allocated.block);
        }
        Some(allocated.block)
    }

    /// Positions of a block.
    pub fn block_size(&self) -> usize {
        self.block_size
    }

    /// Blocks there are.
    pub fn n_blocks(&self) -> usize {
        self.pool.n_blocks()
    }

    /// Blocks that sequences hold.
    pub fn n_used(&self) -> usize {
        self.pool.n_used()
    }

    /// Blocks that could be given to a sequence now.
    pub fn n_available(&self) -> usize {
        self.pool.n_available()
    }

    /// Blocks that nobody holds whose content can be found.
    pub fn n_cached(&self) -> usize {
        self.pool.n_cached()
    }

    /// Asserts that every reference is one of `tables`, and the parts' own invariants. O(blocks).
    pub fn check<'a>(&self, tables: impl Iterator<Item = &'a BlockTable>) {
        self.pool.check();
        self.cache.check();
        let mut n_refs = std::collections::BTreeMap::<BlockId, u32>::new();
        for block in tables.flat_map(|t| &t.blocks) {
            *n_refs.entry(*block).or_default() += 1;
        }
        assert_eq!(n_refs.len(), self.n_used(), "blocks in tables and blocks in use");
        for (block, n) in n_refs {
            assert_eq!(self.pool.n_refs(block), n, "references to block {}", block.raw());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn admit(blocks: &mut Blocks, tokens: &[TokenId]) -> Admitted {
        blocks.admit(Seal::EMPTY, tokens, true, 0).expect("there is room")
    }

    #[test]
    fn those_with_another_salt_share_nothing() {
        let tokens = [1, 2, 3, 4, 5];
        let roots = [Seal::EMPTY, Seal::root("a"), Seal::root("b")];
        let sealed: Vec<_> = (0..).zip(roots).map(|(block, root)| (block, root.then_all(&tokens[..2], 2))).collect();
        for mut blocks in [Blocks::new(30, 2), Blocks::with_sealed(30, 2, &sealed)] {
            let n_sealed = blocks.n_cached();
            let mut tables = Vec::new();
            for root in roots {
                let mut first = blocks.admit(root, &tokens, true, 0).expect("there is room");
                assert_eq!(first.n_cached, if n_sealed > 0 { 2 } else { 0 }, "what others have is not for it");
                blocks.publish(&mut first.table, &tokens, 5, 1);
                let second = blocks.admit(root, &tokens, true, 0).expect("there is room");
                assert_eq!((second.n_cached, &second.table.raw()[..2]), (4, &first.table.raw()[..2]));
                tables.extend([first.table, second.table]);
            }
            // Those that are computed once more are still found by their own.
            for (mut table, root) in tables.into_iter().step_by(2).zip(roots).collect::<Vec<_>>() {
                blocks.reopen(&mut table, &tokens, 4).expect("there is room");
                assert_eq!(table.n_published(), 2, "{root:?}");
                blocks.release(table);
            }
        }
    }

    #[test]
    fn equal_prefixes_share_full_blocks_but_not_the_last_token() {
        let mut blocks = Blocks::new(8, 2);
        let mut a = admit(&mut blocks, &[1, 2, 3, 4]);
        assert_eq!(a.n_cached, 0);
        let unplanned = admit(&mut blocks, &[1, 2, 3, 4]);
        assert_eq!(unplanned.n_cached, 0, "nothing is computed yet");
        blocks.publish(&mut a.table, &[1, 2, 3, 4], 4, 1);
        let b = admit(&mut blocks, &[1, 2, 3, 4]);
        assert_eq!((b.n_cached, b.table.raw()), (2, vec![0, 4]));
        let c = admit(&mut blocks, &[1, 2, 3, 4, 5]);
        assert_eq!((c.n_cached, c.table.raw()), (4, vec![0, 1, 5]));
        blocks.check([&a, &b, &c, &unplanned].into_iter().map(|s| &s.table));
        assert_eq!(blocks.admit(Seal::EMPTY, &[9, 9, 9, 9, 9, 9], false, 0).map(|_| ()), None);
    }

    #[test]
    fn what_a_lost_step_was_to_compute_is_not_shared() {
        let mut blocks = Blocks::new(6, 2);
        let mut a = admit(&mut blocks, &[1, 2, 3, 4, 5]);
        blocks.publish(&mut a.table, &[1, 2, 3, 4, 5], 2, 7);
        blocks.publish(&mut a.table, &[1, 2, 3, 4, 5], 4, 8);
        blocks.forget_after(7);
        assert_eq!(blocks.reopen(&mut a.table, &[1, 2, 3, 4, 5], 2), Some(2));
        assert_eq!(a.table.n_published(), 1);
        let b = admit(&mut blocks, &[1, 2, 3, 4, 5]);
        assert_eq!(b.n_cached, 2);
        blocks.publish(&mut a.table, &[1, 2, 3, 4, 5], 4, 1);
        assert_eq!(admit(&mut blocks, &[1, 2, 3, 4, 9]).n_cached, 4, "it is shared again once it is computed");
        assert_eq!(b.table.raw()[0], a.table.raw()[0]);
    }

    #[test]
    fn a_block_that_is_computed_again_is_nobody_elses() {
        let mut blocks = Blocks::new(5, 2);
        let mut a = admit(&mut blocks, &[1, 2, 3, 4]);
        blocks.publish(&mut a.table, &[1, 2, 3, 4], 4, 1);
        let b = admit(&mut blocks, &[1, 2, 3, 4, 5]);
        let before = a.table.raw();
        assert_eq!(
            blocks.reopen(&mut a.table, &[1, 2, 3, 4], 3),
            Some(2),
            "the shared block is computed from its start"
        );
        assert_eq!((a.table.raw()[0], b.table.raw()[..2] == before), (before[0], true));
        assert_ne!(a.table.raw()[1], before[1]);
        blocks.check([&a, &b].into_iter().map(|s| &s.table));
        let c = admit(&mut blocks, &[8, 9]);
        assert_eq!(blocks.reopen(&mut a.table, &[1, 2, 3, 4], 1), None, "no block is left");
        for admitted in [a, b, c] {
            blocks.release(admitted.table);
        }
        blocks.check([].into_iter());
    }

    #[test]
    fn tails_are_evicted_before_heads() {
        let mut blocks = Blocks::new(3, 1);
        let mut a = admit(&mut blocks, &[1, 2, 3]);
        blocks.publish(&mut a.table, &[1, 2, 3], 3, 1);
        blocks.release(a.table);
        assert_eq!(blocks.n_cached(), 3);
        let b = admit(&mut blocks, &[9]);
        let c = admit(&mut blocks, &[1, 2]);
        assert_eq!(c.n_cached, 1, "the head survived");
        blocks.release(b.table);
        blocks.release(c.table);
        blocks.check([].into_iter());
        assert_eq!(blocks.n_used(), 0);
    }

    #[test]
    fn a_refused_admission_changes_nothing() {
        let mut blocks = Blocks::new(3, 1);
        let mut a = admit(&mut blocks, &[1, 2]);
        blocks.publish(&mut a.table, &[1, 2], 2, 1);
        blocks.release(a.table);
        assert!(blocks.admit(Seal::EMPTY, &[1, 2, 3, 4], true, 0).is_none());
        assert!(blocks.admit(Seal::EMPTY, &[1, 2, 3], true, 1).is_none());
        blocks.check([].into_iter());
        assert_eq!(blocks.n_cached(), 2);
        assert_eq!(admit(&mut blocks, &[1, 2, 3]).n_cached, 2);
    }

    #[test]
    fn duplicates_continue_the_chain_that_is_there() {
        let mut blocks = Blocks::new(6, 1);
        let mut a = admit(&mut blocks, &[1, 2]);
        let mut b = admit(&mut blocks, &[1, 2]);
        blocks.publish(&mut a.table, &[1], 1, 1);
        blocks.publish(&mut b.table, &[1, 2], 2, 1);
        assert_eq!(b.table.n_published(), 2);
        let c = admit(&mut blocks, &[1, 2, 3]);
        assert_eq!(c.table.raw()[..2], [a.table.raw()[0], b.table.raw()[1]]);
        blocks.check([&a, &b, &c].into_iter().map(|s| &s.table));
    }
    fn sealed(tokens: &[TokenId], blocks: &[u32]) -> Vec<(u32, Seal)> {
        (1..).zip(blocks).map(|(n, block)| (*block, Seal::of(&tokens[..2 * n], 2))).collect()
    }

    #[test]
    fn sealed_blocks_are_shared_by_who_has_their_tokens() {
        let mut blocks = Blocks::with_sealed(6, 2, &sealed(&[1, 2, 3, 4, 5, 6], &[4, 1, 3]));
        assert_eq!((blocks.n_cached(), blocks.n_used()), (3, 0));
        let a = admit(&mut blocks, &[1, 2, 3, 4, 9, 9]);
        assert_eq!((a.n_cached, a.table.raw()), (4, vec![4, 1, 0]));
        let b = admit(&mut blocks, &[1, 2, 3, 4, 5, 6]);
        assert_eq!((b.n_cached, b.table.raw()[..2].to_vec()), (4, vec![4, 1]), "the last token has to be computed");
        assert!(blocks.admit(Seal::EMPTY, &[7, 8, 9, 9, 9], true, 0).is_none());
        // It takes the last sealed block, which nobody finds any more.
        let c = admit(&mut blocks, &[7, 8, 9]);
        assert_eq!(c.table.raw(), [5, 3]);
        blocks.check([&a, &b, &c].into_iter().map(|s| &s.table));
        [a, b, c].into_iter().for_each(|s| blocks.release(s.table));
        assert_eq!(admit(&mut blocks, &[1, 2, 3, 4, 5, 6, 7]).n_cached, 4);
    }

    #[test]
    fn what_somebody_waits_for_is_kept_longest() {
        let mut list = sealed(&[1, 2, 3, 4], &[0, 1]);
        list.extend(sealed(&[5, 6], &[2]));
        let mut blocks = Blocks::with_sealed(3, 2, &list);
        blocks.touch(Seal::EMPTY, &[1, 2, 3, 4]);
        blocks.check([].into_iter());
        assert_eq!(admit(&mut blocks, &[9]).table.raw(), [2]);
        assert_eq!(admit(&mut blocks, &[9]).table.raw(), [1], "the tail before the head");
    }

    #[test]
    fn seals_that_make_no_sense_do_no_harm() {
        let seal = Seal::of(&[1, 2], 2);
        let mut blocks = Blocks::with_sealed(2, 2, &[(7, seal), (1, seal), (0, seal), (1, Seal::of(&[3, 4], 2))]);
        blocks.check([].into_iter());
        assert_eq!((blocks.n_cached(), admit(&mut blocks, &[1, 2, 3]).table.raw()), (1, vec![1, 0]));
    }
}
