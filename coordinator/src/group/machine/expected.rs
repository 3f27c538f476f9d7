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

use super::{GroupMachine, Phase, formation::LONGEST_PAUSE};

/// Longest wait for former owners of ranks.
pub const OWNERS_LIMIT: Duration = Duration::from_secs(2);
/// Most shards that are named one by one.
const MOST_NAMED: usize = 8;

/// What is known of shards that were there before.
#[derive(Debug, Clone, Default)]
pub(super) struct Expected {
    /// Where each was seen last, in words.
    seen: BTreeMap<ShardId, String>,
    /// Until when the first formation waits for owners among them.
    until: Option<Instant>,
    /// Somebody came with pages, so that others may.
    has_heirs: bool,
}

impl GroupMachine {
    /// These shards were attached just before this group began; the first formation waits until then for those that had a
    /// rank.
    pub fn expect(&mut self, seen: BTreeMap<ShardId, String>, until: Instant) {
        self.expected = Expected { seen, until: Some(until), has_heirs: false };
    }

    /// A shard came with pages of an earlier leadership: those that served with it were there just now, whatever records say,
    /// and what it has is worth something only together with theirs.
    pub(super) fn expect_heirs(&mut self, holds: Option<(usize, usize)>, now: Instant) {
        let wanted = self.settings.world_size;
        let is_first = !self.expected.has_heirs && !self.has_served && !self.is_formed();
        if is_first && holds.is_some_and(|(world_size, _)| world_size == wanted) {
            self.expected.has_heirs = true;
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

    /// When the first formation no longer waits for owners, if it waits.
    pub(super) fn awaits_owners_until(&self) -> Option<Instant> {
        self.expected.until.filter(|_| self.absent_owners().any(|shard| self.expected.seen.contains_key(shard)))
    }

    /// Whether the first formation has just stopped waiting for owners.
    pub(super) fn has_waited_for_owners(&mut self, now: Instant) -> bool {
        self.expected.until.take_if(|until| now >= *until).is_some()
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
        } else if let (Some(_), Some(awaited)) = (self.awaits_owners_until(), self.awaited()) {
            format!("{have} shards are attached; waiting a moment for {awaited}, which had a rank before")
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
