//! KV pages that outlive their group.
//!
//! A group that ends leaves its pages with the weights until the next [`Form`] says whether it wants them. They are known
//! by the epoch that wrote them last and the last step of it that ran completely. A group that formed but ran no step
//! gives the same pages a second name: whoever forms next may have heard of the one or of the other.
//!
//! A new leader knows no such names. It asks for what the blocks hold, which their seals say.

use phalanx_cluster::seal::SEAL_BYTES;
use phalanx_kernels::ops::KvShape;
use phalanx_proto::v1::{Form, HeldPages, SealedBlocks};

use crate::step::seals::Seals;

/// What is in pages that no group uses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct KeptPages {
    /// Leadership under which they were written. Epochs count within the store that the leader uses: a form of an earlier
    /// leadership means other pages.
    pub term: u64,
    /// The rank whose rows they hold, of so many.
    pub rank: u32,
    pub world_size: u32,
    /// Their shape and number.
    pub shape: KvShape,
    /// Blocks that the group used: all, unless another rank had fewer.
    pub n_blocks: u32,
    /// Every state that they hold.
    pub states: Vec<KeptState>,
    /// What blocks hold, as far as it is known.
    pub seals: Seals,
}

/// All rows that steps of an epoch wrote, up to one of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct KeptState {
    /// Which epoch.
    pub epoch: u64,
    /// Its last step that ran completely; 0 for the state in which the epoch began.
    pub through_step: u64,
}

impl KeptPages {
    /// Through which step of the epoch that the form wants these pages go; `None` if they are other pages.
    ///
    /// The number of blocks in `shape` does not matter.
    pub fn through_step(&self, form: &Form, shape: KvShape) -> Option<u64> {
        if form.keep_kv_of_epoch == 0 || form.term < self.term || !self.has_shape(shape) {
            return None;
        }
        self.states.iter().find(|state| state.epoch == form.keep_kv_of_epoch).map(|state| state.through_step)
    }

    /// Blocks of these pages whose content is known, if the form wants pages for that; `None` if it does not, or they have
    /// another shape. `shape` as above.
    pub fn sealed(&self, form: &Form, shape: KvShape) -> Option<SealedBlocks> {
        if !form.keep_sealed_kv || !self.has_shape(shape) {
            return None;
        }
        let in_use = self.seals.iter().filter(|(block, _)| *block < self.n_blocks);
        let (blocks, seals): (Vec<u32>, Vec<[u8; SEAL_BYTES]>) = in_use.map(|(b, seal)| (b, seal.bytes())).unzip();
        Some(SealedBlocks { blocks, seals: seals.concat() })
    }

    /// Whether the form wants these pages.
    pub fn are_wanted(&self, form: &Form, shape: KvShape) -> bool {
        self.through_step(form, shape).is_some() || (form.keep_sealed_kv && self.has_shape(shape))
    }

    fn has_shape(&self, shape: KvShape) -> bool {
        KvShape { n_blocks: self.shape.n_blocks, ..shape } == self.shape
    }

    /// As the shard introduces itself with them.
    pub fn held(&self) -> HeldPages {
        HeldPages { rank: self.rank, world_size: self.world_size, kv_blocks: self.n_blocks }
    }

    /// With what they held when the group took them over, if it ran no step since.
    pub fn named_before(mut self, before: Option<Vec<KeptState>>) -> Self {
        self.states.extend(before.into_iter().flatten());
        self
    }
}

#[cfg(test)]
mod tests {
    use phalanx_cluster::seal::Seal;

    use super::*;
    use crate::step::seals::SealedPrefix;

    const SHAPE: KvShape = KvShape { n_layers: 2, n_blocks: 8, block_size: 16, n_kv_heads: 3, head_dim: 16 };

    fn wants(epoch: u64, term: u64) -> Form {
        Form { keep_kv_of_epoch: epoch, term, ..Form::default() }
    }

    fn of(epoch: u64, through_step: u64) -> KeptPages {
        let mut seals = Seals::new(8, 16);
        seals.seal(&mut SealedPrefix::default(), &[7; 40], &[5, 2, 6], 40);
        let states = vec![KeptState { epoch, through_step }];
        KeptPages { term: 4, rank: 1, world_size: 2, shape: SHAPE, n_blocks: 8, states, seals }
    }

    fn kept() -> KeptPages {
        of(7, 30)
    }

    #[test]
    fn the_same_epoch_and_shape_are_kept() {
        let unsized_shape = KvShape { n_blocks: 0, ..SHAPE };
        assert_eq!(kept().through_step(&wants(7, 4), unsized_shape), Some(30));
        assert_eq!(kept().through_step(&wants(7, 5), unsized_shape), Some(30));
    }

    #[test]
    fn other_pages_are_not_what_was_wanted() {
        assert_eq!(kept().through_step(&wants(0, 4), SHAPE), None);
        assert_eq!(kept().through_step(&wants(6, 4), SHAPE), None);
        assert_eq!(kept().through_step(&wants(7, 3), SHAPE), None);
        assert_eq!(kept().through_step(&wants(7, 4), KvShape { n_kv_heads: 6, ..SHAPE }), None);
        assert_eq!(kept().through_step(&wants(7, 4), KvShape { block_size: 32, ..SHAPE }), None);
    }

    #[test]
    fn a_group_that_ran_nothing_gives_the_pages_a_second_name() {
        let twice = of(9, 0).named_before(Some(kept().states));
        assert_eq!(twice.through_step(&wants(9, 4), SHAPE), Some(0));
        assert_eq!(twice.through_step(&wants(7, 4), SHAPE), Some(30));
    }
    #[test]
    fn a_leader_that_knows_no_epoch_is_told_what_blocks_hold() {
        let wanted = Form { keep_sealed_kv: true, ..wants(0, 9) };
        let sealed = kept().sealed(&wanted, SHAPE).expect("it is wanted");
        let seal = |n_blocks: usize| Seal::of(&[7; 32][..n_blocks * 16], 16).bytes();
        assert_eq!((sealed.blocks, sealed.seals), (vec![2, 5], [seal(2), seal(1)].concat()));
        let fewer = KeptPages { n_blocks: 5, ..kept() };
        assert_eq!(fewer.sealed(&wanted, SHAPE).map(|s| s.blocks), Some(vec![2]));
        assert_eq!(kept().sealed(&wants(7, 4), SHAPE), None);
        assert_eq!(kept().sealed(&wanted, KvShape { n_kv_heads: 6, ..SHAPE }), None);
        assert!(kept().are_wanted(&wanted, SHAPE) && kept().are_wanted(&wants(7, 4), SHAPE));
        assert!(!kept().are_wanted(&wants(6, 4), SHAPE));
    }
}
