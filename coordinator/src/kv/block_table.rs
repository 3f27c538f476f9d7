//! The blocks of one sequence.

use phalanx_cluster::seal::Seal;

use super::{block_pool::BlockId, prefix_cache::PrefixId};

/// A sequence's blocks: position p is in block `p / block_size` of the list. Only [`super::blocks::Blocks`] changes it,
/// so that references are counted; a table that is dropped without `Blocks::release` leaks its blocks.
#[derive(Debug)]
pub struct BlockTable {
    pub(super) blocks: Vec<BlockId>,
    /// With what its tokens begin: it shares with those that begin with the same.
    pub(super) root: Seal,
    /// Leading full blocks that were offered to the prefix cache, or came from it.
    pub(super) n_published: usize,
    /// What those hold. `None` after a collision: nothing behind it can be found, so nothing more is offered.
    pub(super) published: Option<PrefixId>,
}

impl BlockTable {
    /// Of no blocks.
    pub(super) fn new(root: Seal) -> Self {
        Self { blocks: Vec::new(), root, n_published: 0, published: Some(PrefixId::Root(root)) }
    }

    /// In the order of positions.
    pub fn blocks(&self) -> &[BlockId] {
        &self.blocks
    }

    /// Block numbers for the wire.
    pub fn raw(&self) -> Vec<u32> {
        self.blocks.iter().map(|b| b.raw()).collect()
    }

    /// Leading full blocks that others may share already.
    pub fn n_published(&self) -> usize {
        self.n_published
    }
}
