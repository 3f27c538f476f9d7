//! KV pages that shards bring along from an earlier leader, of their own or copied from a rank that is lost.
//!
//! A new leader knows none of the formations that wrote them, nor which steps its predecessor heard of. But each rank knows
//! of its full blocks which tokens' rows they hold, by name (`phalanx_cluster::seal`), from steps that it ran completely. A
//! block of which all ranks say the same is good, whatever else happened: a rank that did not run the last step, or ran
//! one more, has no seal or another one there.

use phalanx_cluster::{id::ShardId, seal::Seal};

use super::{GroupMachine, Slice};

impl GroupMachine {
    /// Whether all these ranks have pages of an earlier leadership. If one has none, the pages of the others say nothing that
    /// holds for all: they are better given back before all measure what memory there is.
    pub(super) fn inherits(&self, ranks: &[ShardId]) -> bool {
        let holds = |(rank, shard): (usize, &ShardId)| {
            self.attached.get(shard).is_some_and(|a| a.candidate.has_pages_of((ranks.len(), rank)))
        };
        !self.has_served && self.pages.is_none() && ranks.iter().enumerate().all(holds)
    }
}

/// Blocks of which all ranks say the same; nothing if there are none.
pub(super) fn agreed(ranks: &[Slice]) -> Option<Vec<(u32, Seal)>> {
    let sealed = ranks.iter().map(|slice| slice.sealed.as_ref()).collect::<Option<Vec<_>>>()?;
    let (first, others) = sealed.split_first()?;
    let n_blocks = ranks.iter().map(|slice| slice.kv_blocks).min()?;
    let is_agreed = |(block, seal): &(&u32, &Seal)| {
        **block < n_blocks && others.iter().all(|other| other.get(*block) == Some(*seal))
    };
    let agreed: Vec<_> = first.iter().filter(is_agreed).map(|(block, seal)| (*block, *seal)).collect();
    if agreed.is_empty() { None } else { Some(agreed) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slice(kv_blocks: u32, sealed: &[(u32, u32)]) -> Slice {
        let sealed = sealed.iter().map(|(block, token)| (*block, Seal::of(&[*token], 1))).collect();
        Slice { kv_blocks, sealed: Some(sealed), ..Slice::default() }
    }

    #[test]
    fn only_what_all_ranks_say_counts() {
        let ranks = [slice(9, &[(0, 1), (1, 2), (2, 3), (8, 9)]), slice(8, &[(0, 1), (1, 7), (3, 3), (8, 9)])];
        assert_eq!(agreed(&ranks), Some(vec![(0, Seal::of(&[1], 1))]));
        assert_eq!(agreed(&ranks[..1]).map(|blocks| blocks.len()), Some(4));
        assert_eq!(agreed(&[slice(9, &[(0, 1)]), slice(9, &[(1, 1)])]), None);
        let silent = Slice { sealed: None, ..slice(9, &[]) };
        assert_eq!(agreed(&[slice(9, &[(0, 1)]), silent]), None);
        assert_eq!(agreed(&[]), None);
    }
}
