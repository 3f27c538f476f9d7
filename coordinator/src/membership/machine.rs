//! Which shard belongs to which group. Pure: events and the time in, actions out.
//!
//! A shard that attaches goes, in this order, to the group that drained or restarts it; to the group where it last had a
//! rank, if that lacks one or is not formed yet; to the group that lacks fewest, so that one more serves soon; else, as a
//! spare, to the group with the fewest. A shard moves only if its new group lacks one: a spare at once, and a shard of a
//! group that can't be formed if that lets another one be formed (after `IDLE_AFTER`).
//!
//! **Invariants.** No shard is in two groups: it joins one after the other has given it away. Every attached shard is in a
//! group, but for those whose numerics differ from the others': one answer must not depend on the group that gives it. A
//! group that lacks a shard gets a spare if there is one. Each move lets a group lack less and no other one more, or forms
//! one that nobody else could: shards do not go to and fro.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use phalanx_cluster::id::{Epoch, ShardId};

use crate::group::machine::{Given, Standing};

/// How long a group lacks shards before those it has may go to another one. Shards that are started again are back before.
const IDLE_AFTER: Duration = Duration::from_secs(3);

/// What happens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A shard is attached, that was not.
    Arrived {
        /// Which.
        shard: ShardId,
        /// Names this stay of it.
        stream: u64,
        /// Version and numerics.
        kind: String,
    },
    /// A shard is gone.
    Left(ShardId),
    /// A group says where it stands.
    Stands {
        /// Which.
        group: usize,
        /// Where.
        standing: Standing,
    },
    /// A group answers [`Action::Release`].
    Released {
        /// Which group.
        group: usize,
        /// Which request.
        ticket: u64,
        /// The shard that it gave away, and its stream.
        given: Option<(ShardId, u64)>,
    },
    /// A group's actor was started again, and is told of its shards again: what it was asked is forgotten.
    Restarted(usize),
    /// Time has passed.
    Tick,
}

/// What is to be done, in this order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// A shard belongs to a group from now on: tell it so.
    Join {
        /// Which shard.
        shard: ShardId,
        /// Which group.
        group: usize,
        /// The greatest epoch of another group that the shard may know.
        knows: Epoch,
    },
    /// Tell a group that its shard is gone.
    Leave {
        /// Which shard.
        shard: ShardId,
        /// Which group.
        group: usize,
    },
    /// Ask a group for a shard.
    Release {
        /// Which group.
        group: usize,
        /// For the answer.
        ticket: u64,
        /// What kind of shard.
        given: Given,
    },
    /// A shard belongs to no group, because its numerics differ from the others'.
    SetAside(ShardId),
}

/// An attached shard.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Place {
    stream: u64,
    kind: String,
    group: Option<usize>,
}

#[derive(Debug, Clone)]
struct GroupState {
    standing: Standing,
    /// Counts what has changed in it.
    n_changes: u64,
    /// It gave nothing when it was asked after so many changes: not asked again before the next one.
    refused_at: Option<u64>,
    /// Since when it has too few shards to be formed.
    idle_since: Option<Instant>,
}

/// A request for a shard that was not answered yet.
#[derive(Debug, Clone, Copy)]
struct Request {
    from: usize,
    to: usize,
    /// Changes of the group before it was asked: what it answers knows no later ones.
    n_changes: u64,
}

/// What the store knows of a group.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Former {
    /// Who last had its ranks.
    pub ranks: Vec<ShardId>,
    /// Who may have none there.
    pub drained: BTreeSet<ShardId>,
}

/// Who is where.
#[derive(Debug, Clone)]
pub struct MembershipMachine {
    /// Ranks of each group.
    world_size: usize,
    groups: Vec<GroupState>,
    places: BTreeMap<ShardId, Place>,
    /// Where shards last had a rank.
    homes: BTreeMap<ShardId, usize>,
    requests: BTreeMap<u64, Request>,
    next_ticket: u64,
    actions: Vec<Action>,
}

impl MembershipMachine {
    /// Groups of `world_size` ranks each, as the store knows them.
    pub fn new(world_size: usize, former: Vec<Former>) -> Self {
        let mut homes = BTreeMap::new();
        let mut groups = Vec::new();
        for (group, Former { ranks, drained }) in former.into_iter().enumerate() {
            homes.extend(ranks.into_iter().map(|shard| (shard, group)));
            let standing = Standing { drained, ..Standing::default() };
            groups.push(GroupState { standing, n_changes: 0, refused_at: None, idle_since: None });
        }
        Self {
            world_size: world_size.max(1),
            groups,
            places: BTreeMap::new(),
            homes,
            requests: BTreeMap::new(),
            next_ticket: 1,
            actions: Vec::new(),
        }
    }

    /// Handles one event.
    pub fn step(&mut self, now: Instant, event: Event) -> Vec<Action> {
        match event {
            Event::Arrived { shard, stream, kind } => {
                self.forget(&shard);
                self.arrive(shard, stream, kind);
            }
            Event::Left(shard) => self.forget(&shard),
            Event::Stands { group, standing } => self.on_standing(group, standing),
            Event::Released { group, ticket, given } => self.on_released(group, ticket, given),
            Event::Restarted(group) => {
                self.requests.retain(|_, request| request.from != group);
                if let Some(group) = self.groups.get_mut(group) {
                    // It looks up in the store who is drained.
                    let drained = std::mem::take(&mut group.standing.drained);
                    group.standing = Standing { epoch: group.standing.epoch, drained, ..Standing::default() };
                    group.n_changes += 1;
                }
            }
            Event::Tick => {}
        }
        self.take_in_set_aside();
        self.ask_for_spares();
        self.ask_for_idle(now);
        std::mem::take(&mut self.actions)
    }

    /// When `Tick` is due, if nothing happens before.
    pub fn wakes_at(&self, now: Instant) -> Option<Instant> {
        let idle_from = self.groups.iter().filter_map(|g| g.idle_since).map(|since| since + IDLE_AFTER);
        idle_from.filter(|at| *at > now).min()
    }

    /// The group of each shard: the one that it is in, else the one that remembers it as drained.
    pub fn places(&self) -> BTreeMap<ShardId, usize> {
        let drained = |(group, state): (usize, &GroupState)| {
            state.standing.drained.iter().map(move |shard| (shard.clone(), group)).collect::<Vec<_>>()
        };
        let mut places: BTreeMap<ShardId, usize> = self.groups.iter().enumerate().flat_map(drained).collect();
        for (shard, place) in &self.places {
            match place.group {
                Some(group) => places.insert(shard.clone(), group),
                None => places.remove(shard),
            };
        }
        places
    }

    /// Shards of a group.
    pub fn members(&self, group: usize) -> impl Iterator<Item = &ShardId> {
        self.places.iter().filter(move |(_, place)| place.group == Some(group)).map(|(shard, _)| shard)
    }

    fn push(&mut self, action: Action) {
        self.actions.push(action);
    }

    fn forget(&mut self, shard: &ShardId) {
        let Some(place) = self.places.remove(shard) else { return };
        if let Some(group) = place.group {
            // Its next life does not leave.
            self.groups[group].standing.leaving.remove(shard);
            self.groups[group].n_changes += 1;
            self.push(Action::Leave { shard: shard.clone(), group });
        }
    }

    fn arrive(&mut self, shard: ShardId, stream: u64, kind: String) {
        let fits = self.groups.len() == 1 || self.kind().is_none_or(|k| k == kind);
        self.places.insert(shard.clone(), Place { stream, kind, group: None });
        if fits {
            let group = self.best_group(&shard);
            self.join(shard, group, Epoch::default());
        } else {
            self.push(Action::SetAside(shard));
        }
    }

    fn join(&mut self, shard: ShardId, group: usize, knows: Epoch) {
        if let Some(place) = self.places.get_mut(&shard) {
            place.group = Some(group);
            self.groups[group].n_changes += 1;
            self.push(Action::Join { shard, group, knows });
        }
    }

    /// Version and numerics that shards in groups have in common.
    fn kind(&self) -> Option<&str> {
        self.places.values().find(|place| place.group.is_some()).map(|place| place.kind.as_str())
    }

    /// Where a shard goes that is in no group.
    fn best_group(&self, shard: &ShardId) -> usize {
        let keeps = |g: &GroupState| g.standing.awaited.as_ref() == Some(shard) || g.standing.drained.contains(shard);
        if let Some(group) = self.groups.iter().position(keeps) {
            return group;
        }
        let home = self.homes.get(shard).copied().filter(|home| *home < self.groups.len());
        let order = |group: &usize| {
            let (lacks, spares) = (self.lacks(*group), self.n_spares(*group));
            let is_home = home == Some(*group);
            // A group that is not formed yet rather has its former ranks: what it need not keep goes on to others.
            let is_awaited = is_home && !self.groups[*group].standing.is_formed;
            (!is_awaited, lacks == 0, lacks > 0 && !is_home, lacks, spares, !is_home, *group)
        };
        (0..self.groups.len()).min_by_key(order).unwrap_or(0)
    }

    /// Shards of a group that may have a rank, with those that are on their way.
    fn n_usable(&self, group: usize) -> usize {
        let standing = &self.groups[group].standing;
        let may = |shard: &&ShardId| !standing.drained.contains(*shard) && !standing.leaving.contains(*shard);
        let on_their_way = self.requests.values().filter(|r| r.to == group).count();
        let asked_for = self.requests.values().filter(|r| r.from == group).count();
        (self.members(group).filter(may).count() + on_their_way).saturating_sub(asked_for)
    }

    fn lacks(&self, group: usize) -> usize {
        self.world_size.saturating_sub(self.n_usable(group))
    }

    /// Spares that each group would give to another one now.
    pub fn spares(&self) -> Vec<usize> {
        let given = |group: usize| if self.groups[group].standing.is_rolling { 0 } else { self.n_spares(group) };
        (0..self.groups.len()).map(given).collect()
    }

    fn n_spares(&self, group: usize) -> usize {
        self.n_usable(group).saturating_sub(self.world_size)
    }

    fn on_standing(&mut self, group: usize, standing: Standing) {
        let Some(state) = self.groups.get_mut(group) else { return };
        state.standing = standing;
        state.n_changes += 1;
        for shard in &state.standing.ranks {
            self.homes.insert(shard.clone(), group);
        }
        let ranks = &self.groups[group].standing.ranks;
        if ranks.len() >= self.world_size {
            // Whoever had a rank before and is gone has none to come back to.
            self.homes.retain(|shard, home| *home != group || ranks.contains(shard) || self.places.contains_key(shard));
        }
    }

    fn on_released(&mut self, group: usize, ticket: u64, given: Option<(ShardId, u64)>) {
        let Some(request) = self.requests.get(&ticket).copied().filter(|r| r.from == group) else { return };
        self.requests.remove(&ticket);
        let Some((shard, stream)) = given else {
            self.groups[group].refused_at = Some(request.n_changes);
            return;
        };
        let is_here = |place: &Place| place.stream == stream && place.group == Some(group);
        if !self.places.get(&shard).is_some_and(is_here) {
            // It left meanwhile.
            return;
        }
        if let Some(place) = self.places.get_mut(&shard) {
            place.group = None;
        }
        // Somebody else may have come to the group that it was meant for.
        let to = if self.lacks(request.to) > 0 { request.to } else { self.best_group(&shard) };
        let knows = self.groups.iter().map(|g| g.standing.epoch).max().unwrap_or_default();
        self.join(shard, to, knows);
    }

    /// Numerics that differed from everybody's do no more when nobody is left: the most frequent ones are the next.
    fn take_in_set_aside(&mut self) {
        if self.kind().is_some() {
            return;
        }
        let mut kinds: BTreeMap<&str, usize> = BTreeMap::new();
        for place in self.places.values() {
            *kinds.entry(&place.kind).or_default() += 1;
        }
        let most = kinds.into_iter().max_by_key(|(kind, n)| (*n, std::cmp::Reverse(*kind)));
        let Some(kind) = most.map(|(kind, _)| kind.to_owned()) else { return };
        let shards = self.places.iter().filter(|(_, place)| place.kind == kind).map(|(shard, _)| shard.clone());
        for shard in shards.collect::<Vec<_>>() {
            let group = self.best_group(&shard);
            self.join(shard, group, Epoch::default());
        }
    }

    fn ask(&mut self, from: usize, to: usize, given: Given) {
        let ticket = self.next_ticket;
        self.next_ticket += 1;
        self.requests.insert(ticket, Request { from, to, n_changes: self.groups[from].n_changes });
        self.push(Action::Release { group: from, ticket, given });
    }

    /// Whether a group can be asked for a shard.
    fn may_be_asked(&self, group: usize) -> bool {
        let state = &self.groups[group];
        state.refused_at != Some(state.n_changes)
            && !state.standing.is_rolling
            && !self.requests.values().any(|r| r.from == group)
    }

    /// Spares go where a rank is lacking, first to the group that lacks fewest.
    fn ask_for_spares(&mut self) {
        loop {
            let groups = 0..self.groups.len();
            let to = groups.clone().filter(|g| self.lacks(*g) > 0).min_by_key(|g| self.lacks(*g));
            let has_spare = |g: &usize| self.n_spares(*g) > 0 && self.may_be_asked(*g);
            let from = groups.filter(has_spare).max_by_key(|g| (self.n_spares(*g), std::cmp::Reverse(*g)));
            let (Some(to), Some(from)) = (to, from) else { return };
            self.ask(from, to, Given::Spare);
        }
    }

    /// Groups that can't be formed give their shards to one of them that can be formed with those.
    fn ask_for_idle(&mut self, now: Instant) {
        for group in 0..self.groups.len() {
            let is_idle = self.lacks(group) > 0 && !self.groups[group].standing.is_formed;
            let since = &mut self.groups[group].idle_since;
            *since = if is_idle { since.or(Some(now)) } else { None };
        }
        let is_idle = |g: &GroupState| g.idle_since.is_some_and(|since| now >= since + IDLE_AFTER);
        let mut idle: Vec<usize> = (0..self.groups.len()).filter(|g| is_idle(&self.groups[*g])).collect();
        idle.sort_by_key(|g| (self.lacks(*g), *g));
        let Some((to, from)) = idle.split_first() else { return };
        let from: Vec<usize> = from.iter().rev().copied().filter(|g| self.may_be_asked(*g)).collect();
        let n_there: usize = from.iter().map(|g| self.n_usable(*g)).sum();
        if n_there < self.lacks(*to) {
            return;
        }
        // One at a time of each: the next follows the answer.
        for from in from {
            if self.lacks(*to) > 0 && self.n_usable(from) > 0 {
                self.ask(from, *to, Given::Idle);
            }
        }
    }
}

#[cfg(test)]
mod tests;
