//! KV pages that outlive their group.
//!
//! A group that ends leaves its pages with the weights until the next [`Form`] says whether it wants them. They are known
//! by the epoch that wrote them last and the last step of it that ran completely. A group that formed but ran no step
//! gives the same pages a second name: whoever forms next may have heard of the one or of the other.

use phalanx_kernels::ops::KvShape;
use phalanx_proto::v1::Form;

/// What is in pages that no group uses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct KeptPages {
    /// Leadership under which they were written. Epochs count within the store that the leader uses: a form of an earlier
    /// leadership means other pages.
    pub term: u64,
    /// Their shape and number.
    pub shape: KvShape,
    /// Blocks that the group used: all, unless another rank had fewer.
    pub n_blocks: u32,
    /// Every state that they hold.
    pub states: Vec<KeptState>,
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
        let same_shape = KvShape { n_blocks: self.shape.n_blocks, ..shape } == self.shape;
        if form.keep_kv_of_epoch == 0 || form.term < self.term || !same_shape {
            return None;
        }
        self.states.iter().find(|state| state.epoch == form.keep_kv_of_epoch).map(|state| state.through_step)
    }

    /// The pages of a group that ends. `before` is what they held when it took them over, if it ran no step since.
    pub fn of_group(term: u64, shape: KvShape, n_blocks: u32, last: KeptState, before: Option<Self>) -> Self {
        let mut states = vec![last];
        states.extend(before.into_iter().flat_map(|before| before.states));
        Self { term, shape, n_blocks, states }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: KvShape = KvShape { n_layers: 2, n_blocks: 8, block_size: 16, n_kv_heads: 3, head_dim: 16 };

    fn wants(epoch: u64, term: u64) -> Form {
        Form { keep_kv_of_epoch: epoch, term, ..Form::default() }
    }

    fn kept() -> KeptPages {
        KeptPages::of_group(4, SHAPE, 8, KeptState { epoch: 7, through_step: 30 }, None)
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
        let twice = KeptPages::of_group(4, SHAPE, 8, KeptState { epoch: 9, through_step: 0 }, Some(kept()));
        assert_eq!(twice.through_step(&wants(9, 4), SHAPE), Some(0));
        assert_eq!(twice.through_step(&wants(7, 4), SHAPE), Some(30));
    }
}
