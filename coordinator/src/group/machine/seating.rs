//! Who takes which rank. Pure functions of who is there.
//!
//! A rank goes, in this order, to who brought its KV pages along from an earlier leader, to who brought copies of them, to its
//! last owner, to a shard that has loaded its slice, to any other; and in each case rather to a shard that is trusted than to
//! one that was lately found stuck, slow or failing. Among several that have loaded it, one with copies of the ranks' KV rows
//! comes first.

use std::collections::{BTreeMap, BTreeSet};

use phalanx_cluster::id::ShardId;

/// The slice of one rank: ranks of the group, and which of them.
pub type SliceOf = (usize, usize);

/// A shard that may be seated.
#[derive(Debug, Clone, Copy)]
pub struct Sitter<'a> {
    /// Its name.
    pub shard: &'a ShardId,
    /// Whether it was lately found stuck, slow or failing: it is seated only if nobody else is there.
    pub is_doubtful: bool,
    /// Slices that it has loaded.
    pub prepared: &'a BTreeSet<SliceOf>,
    /// Whether it has copies of the ranks' KV rows.
    pub has_copies: bool,
    /// The rank whose pages it brought along from an earlier leader, if they are of use.
    pub holds: Option<SliceOf>,
    /// Ranks of whose pages it brought copies, if they are of use.
    pub copies: Option<&'a BTreeSet<SliceOf>>,
}

/// Who may take a rank, in the order of the attempts.
#[derive(Clone, Copy)]
enum Rule {
    HasPages,
    HasCopy,
    Owner,
    Prepared,
    Anybody,
}

/// Last owners of the ranks of each world size.
#[derive(Debug, Clone, Default)]
pub struct Owners(BTreeMap<usize, Vec<ShardId>>);

impl Owners {
    /// As the store remembers them.
    pub fn new(ranks: Vec<ShardId>) -> Self {
        let mut owners = Self::default();
        owners.record(&ranks);
        owners
    }

    /// From now on these own the ranks of their world size.
    pub fn record(&mut self, ranks: &[ShardId]) {
        if !ranks.is_empty() {
            self.0.insert(ranks.len(), ranks.to_vec());
        }
    }

    /// In rank order; empty if there was no such group yet.
    pub fn of(&self, world_size: usize) -> &[ShardId] {
        self.0.get(&world_size).map_or(&[], Vec::as_slice)
    }

    /// Seats a group: shards in rank order, or none if they are too few. `sitters` in order of preference where nothing
    /// else decides.
    pub fn seat(&self, world_size: usize, sitters: &[Sitter<'_>]) -> Option<Vec<ShardId>> {
        if sitters.len() < world_size {
            return None;
        }
        let owners = self.of(world_size);
        let mut ranks: Vec<Option<&ShardId>> = vec![None; world_size];
        for doubtful in [false, true] {
            let eligible = || sitters.iter().filter(move |s| s.is_doubtful == doubtful);
            for rule in [Rule::HasPages, Rule::HasCopy, Rule::Owner, Rule::Prepared, Rule::Anybody] {
                let fits = |rank: usize, s: &Sitter<'_>| match rule {
                    Rule::HasPages => s.holds == Some((world_size, rank)),
                    Rule::HasCopy => s.copies.is_some_and(|copies| copies.contains(&(world_size, rank))),
                    Rule::Owner => owners.get(rank) == Some(s.shard),
                    Rule::Prepared => s.prepared.contains(&(world_size, rank)),
                    Rule::Anybody => true,
                };
                for rank in 0..world_size {
                    if ranks[rank].is_none() {
                        let free = eligible().filter(|s| fits(rank, s) && !ranks.contains(&Some(s.shard)));
                        // Who could take several ranks leaves this one to who can take only this.
                        ranks[rank] = free.min_by_key(|s| (!s.has_copies, s.prepared.len())).map(|s| s.shard);
                    }
                }
            }
        }
        ranks.into_iter().map(|r| r.cloned()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(name: &str) -> ShardId {
        ShardId(name.to_owned())
    }

    /// Seats shards that are written as their name, `?` if doubtful, `=` if they have copies, and the ranks of the world
    /// size they have loaded.
    fn seat(owners: &[&str], world_size: usize, sitters: &[&str]) -> String {
        let parsed: Vec<(ShardId, &str, BTreeSet<SliceOf>)> = sitters
            .iter()
            .map(|text| {
                let prepared = text.chars().filter_map(|c| c.to_digit(10)).map(|r| (world_size, r as usize)).collect();
                (id(&text[..1]), *text, prepared)
            })
            .collect();
        let sitters: Vec<Sitter<'_>> = parsed
            .iter()
            .map(|(shard, text, prepared)| Sitter {
                shard,
                is_doubtful: text.contains('?'),
                prepared,
                has_copies: text.contains('='),
                holds: None,
                copies: None,
            })
            .collect();
        let owners = Owners::new(owners.iter().map(|o| id(o)).collect());
        match owners.seat(world_size, &sitters) {
            Some(ranks) => ranks.into_iter().map(|s| s.0).collect(),
            None => "nobody".to_owned(),
        }
    }

    #[test]
    fn owners_come_first_then_who_is_prepared_then_anybody() {
        assert_eq!(seat(&[], 2, &["a"]), "nobody");
        assert_eq!(seat(&[], 2, &["a", "b", "c"]), "ab");
        assert_eq!(seat(&["b", "a"], 2, &["a", "b", "c"]), "ba");
        assert_eq!(seat(&["b", "x"], 2, &["a", "b", "c1"]), "bc");
        assert_eq!(seat(&["x", "b"], 2, &["a1", "b", "c"]), "cb", "who has loaded another rank is left for that");
        assert_eq!(seat(&["x", "y"], 2, &["a01", "b0"]), "ba", "nobody is left out");
    }

    #[test]
    fn of_several_spares_the_one_with_copies_sits_first() {
        assert_eq!(seat(&["a", "x"], 2, &["a", "b01", "c01="]), "ac");
        assert_eq!(seat(&["a", "x"], 2, &["a", "b1", "c0="]), "ab", "it has not loaded the slice");
        assert_eq!(seat(&["a", "x"], 2, &["a", "b01", "c01=?"]), "ab");
    }

    #[test]
    fn who_is_doubtful_sits_only_where_nobody_else_is() {
        assert_eq!(seat(&["a", "b"], 2, &["a?", "b", "c"]), "cb");
        assert_eq!(seat(&["a", "b"], 2, &["a?", "b"]), "ab");
        assert_eq!(seat(&["a", "b"], 2, &["a?", "b?", "c1"]), "ac");
    }

    #[test]
    fn pages_of_an_earlier_leader_come_before_owners() {
        let (copies, prepared) = (BTreeSet::from([(2, 0), (2, 1)]), BTreeSet::new());
        let [a, b, c, d] = ["a", "b", "c", "d"].map(id);
        let sitter = |shard| {
            let (holds, copies) = (None, None);
            Sitter { shard, is_doubtful: false, prepared: &prepared, has_copies: false, holds, copies }
        };
        let owners = Owners::new(vec![a.clone(), b.clone()]);
        // The owner of rank 1 was started anew; of two spares one has copies.
        let sitters = [
            Sitter { holds: Some((2, 0)), ..sitter(&a) },
            sitter(&b),
            sitter(&c),
            Sitter { copies: Some(&copies), ..sitter(&d) },
        ];
        assert_eq!(owners.seat(2, &sitters), Some(vec![a.clone(), d.clone()]));
        assert_eq!(owners.seat(1, &sitters), Some(vec![a.clone()]), "pages of another world size");
        let doubtful = Sitter { is_doubtful: true, ..sitters[3] };
        assert_eq!(owners.seat(2, &[sitters[0], sitters[1], doubtful]), Some(vec![a, b]));
    }

    #[test]
    fn owners_are_known_for_each_world_size() {
        let mut owners = Owners::new(vec![id("a"), id("b")]);
        owners.record(&[id("b")]);
        assert_eq!((owners.of(2), owners.of(1)), (&[id("a"), id("b")][..], &[id("b")][..]));
        owners.record(&[]);
        assert!(owners.of(3).is_empty());
    }
}
