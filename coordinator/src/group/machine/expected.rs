//! Shards that were there before: who is awaited, and where it was seen last.
//!
//! A new leader finds the shards of its predecessor again, one after the other. Whoever had a rank has its slice and its
//! KV pages; so the first formation waits a moment for owners that are known to have been alive just now, before it seats
//! others in their place.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use phalanx_cluster::id::ShardId;

use super::{Attached, Candidate, GroupMachine, Phase, formation::LONGEST_PAUSE};

/// Longest wait for former owners of ranks.
pub const OWNERS_LIMIT: Duration = Duration::from_secs(2);
/// The same where others have copies of their KV pages, and for those others: shards that live come within some tens of
/// milliseconds.
pub const COPIED_OWNERS_LIMIT: Duration = Duration::from_millis(500);
/// Most shards that are named one by one.
const MOST_NAMED: usize = 8;

/// What is known of shards that were there before.
#[derive(Debug, Clone, Default)]
pub(super) struct Expected {
    /// Where each was seen last, in words.
    seen: BTreeMap<ShardId, String>,
    /// Until when the first formation waits for owners among them.
    until: Option<Instant>,
    /// When somebody came with pages first, so that others may.
    heirs_since: Option<Instant>,
}

impl GroupMachine {
    /// These shards were attached just before this group began; the first formation waits until then for those that had a
    /// rank.
    pub fn expect(&mut self, seen: BTreeMap<ShardId, String>, until: Instant) {
        self.expected = Expected { seen, until: Some(until), heirs_since: None };
    }

    /// A shard came with pages of an earlier leadership: those that served with it were there just now, whatever records say,
    /// and what it has is worth something only together with theirs.
    pub(super) fn expect_heirs(&mut self, candidate: &Candidate, now: Instant) {
        let wanted = self.settings.world_size;
        let is_first = self.expected.heirs_since.is_none() && !self.has_served && !self.is_formed();
        if is_first && candidate.holds.is_some_and(|(world_size, _)| world_size == wanted) {
            self.expected.heirs_since = Some(now);
            self.expected.until = Some(now + OWNERS_LIMIT);
            for owner in self.owners.of(wanted) {
                self.expected.seen.entry(owner.clone()).or_default();
            }
        }
    }

    /// A shard is seen at this place.
    pub fn saw(&mut self, shard: &ShardId, place: &str) {
        self.expected.seen.insert(shard.clone(), place.to_owned());
    }

    /// When the first formation no longer waits for others, if it waits: for owners of ranks, or for who may have copies of
    /// pages without which those of others are worth nothing.
    pub(super) fn awaits_others_until(&self) -> Option<Instant> {
        let is_absent = |shard: &ShardId| !self.attached.contains_key(shard);
        if self.absent_owners().any(|shard| self.expected.seen.contains_key(shard)) {
            return self.owners_limit();
        }
        let may_come = self.expected.seen.keys().any(is_absent) && !self.all_pages_are_here();
        self.expected.until.and(self.copies_limit()).filter(|_| may_come)
    }

    /// Whether the first formation has just stopped waiting.
    pub(super) fn has_waited_for_others(&mut self, now: Instant) -> bool {
        let is_over = self.awaits_others_until().or(self.expected.until).is_some_and(|limit| now >= limit);
        if is_over {
            self.expected.until = None;
        }
        is_over
    }

    /// Until when owners are waited for, as long as that is not over.
    fn owners_limit(&self) -> Option<Instant> {
        let until = self.expected.until?;
        Some(self.copies_limit().filter(|_| self.absent_owners_are_copied()).map_or(until, |soon| soon.min(until)))
    }

    /// Until when copies of pages are waited for, if anybody came with pages.
    fn copies_limit(&self) -> Option<Instant> {
        self.expected.heirs_since.map(|since| since + COPIED_OWNERS_LIMIT)
    }

    /// Whether spares have copies of the absent owners' pages.
    fn absent_owners_are_copied(&self) -> bool {
        let wanted = self.settings.world_size;
        let owners = self.owners.of(wanted);
        let may_stand_in = |a: &&Attached| self.may_sit(a) && !owners.contains(&a.candidate.shard);
        let is_copied =
            |slice| self.attached.values().filter(may_stand_in).any(|a| a.candidate.copies.contains(&slice));
        let mut ranks = owners.iter().enumerate();
        ranks.all(|(rank, owner)| self.attached.contains_key(owner) || is_copied((wanted, rank)))
    }

    /// Whether pages of all ranks were brought along, by owners or as copies.
    fn all_pages_are_here(&self) -> bool {
        let wanted = self.settings.world_size;
        let has_pages = |rank| self.attached.values().any(|a| a.candidate.has_pages_of((wanted, rank)));
        (0..wanted).all(has_pages)
    }

    /// The first formation is there: nobody is awaited any more.
    pub(super) fn stop_expecting(&mut self) {
        self.expected.until = None;
        // Names that never come back would pile up.
        let (attached, ranks) = (&self.attached, &self.ranks);
        self.expected.seen.retain(|shard, _| attached.contains_key(shard) || ranks.contains(shard));
    }

    /// Those that last had a rank of the wanted group and are not attached.
    fn absent_owners(&self) -> impl Iterator<Item = &ShardId> {
        let owners = self.owners.of(self.settings.world_size).iter();
        owners.filter(|shard| !self.attached.contains_key(shard))
    }

    /// What is missing while the group waits, or why it tries again.
    pub fn waits_for(&self) -> Option<String> {
        if let (Phase::Pausing(_), Some(cause)) = (&self.phase, &self.last_failure) {
            return Some(format!("another attempt, in at most {} s: {cause}", LONGEST_PAUSE.as_secs()));
        }
        if self.phase != Phase::Waiting {
            return None;
        }
        let (have, want) = (self.attached.values().filter(|a| self.may_sit(a)).count(), self.settings.world_size);
        Some(if have < want {
            let attached = format!("{have} of {want} shards are attached");
            self.awaited().map_or(attached.clone(), |awaited| format!("{attached}; waiting for {awaited}"))
        } else if let (Some(_), Some(awaited)) = (self.awaits_others_until(), self.awaited()) {
            format!("{have} shards are attached; waiting a moment for {awaited}, which had a rank before")
        } else if self.awaits_others_until().is_some() {
            format!("{have} shards are attached; waiting a moment for those that may have copies of KV pages")
        } else {
            format!("{have} shards are attached, but no {want} of them have version and numerics in common")
        })
    }

    /// The absent owners in words.
    fn awaited(&self) -> Option<String> {
        let absent: Vec<&ShardId> = self.absent_owners().collect();
        let named = absent.iter().take(MOST_NAMED).map(|shard| match self.expected.seen.get(shard) {
            Some(place) if !place.is_empty() => format!("shard {shard}, last seen at {place}"),
            _ => format!("shard {shard}"),
        });
        let mut named: Vec<String> = named.collect();
        if absent.len() > named.len() {
            named.push(format!("{} more", absent.len() - named.len()));
        }
        if named.is_empty() { None } else { Some(named.join("; ")) }
    }
}
