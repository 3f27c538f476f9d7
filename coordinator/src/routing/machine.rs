//! Which group a request goes to, and when it goes to another. Pure: what happens and the time in, choices out.
//!
//! A group costs as many rows as it has still to compute before and for the request: those of the requests that it has,
//! and what it has not computed of this prompt. So a long beginning that only one group has computed draws requests there
//! until that group is behind by as much as the beginning would cost elsewhere.

use std::time::{Duration, Instant};

use super::prefixes::{Prefixes, hashes};
use crate::request::Request;

/// Tokens of an answer that are counted ahead: many end long before what they may have.
const EXPECTED_TOKENS: u64 = 256;
/// Most blocks that are remembered of a group, however many it has.
const MOST_BLOCKS: usize = 1 << 16;

/// What the policy goes by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settings {
    /// Groups, at least one.
    pub groups: usize,
    /// Positions of a KV block.
    pub block_size: usize,
    /// Whether groups keep beginnings of prompts at all.
    pub prefix_caching: bool,
    /// How long a group may be away before its requests go to another one.
    pub leave_after: Duration,
}

/// What a request costs, and where less.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Demand {
    hashes: Vec<u64>,
    prompt_rows: u64,
    output_rows: u64,
}

/// A request's part in a group's load, until it ends there.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "the group counts it until it is given back"]
pub struct Share {
    group: usize,
    rows: u64,
}

impl Share {
    /// In which group.
    pub fn group(&self) -> usize {
        self.group
    }
}

#[derive(Debug, Clone)]
struct GroupState {
    /// Since when it does not serve.
    away_since: Option<Instant>,
    prefixes: Prefixes,
    n_requests: usize,
    rows: u64,
}

/// What is known of the groups.
#[derive(Debug, Clone)]
pub struct RoutingMachine {
    settings: Settings,
    groups: Vec<GroupState>,
}

impl RoutingMachine {
    /// Groups that don't serve yet.
    pub fn new(settings: Settings, now: Instant) -> Self {
        let group = GroupState { away_since: Some(now), prefixes: Prefixes::default(), n_requests: 0, rows: 0 };
        Self { groups: vec![group; settings.groups.max(1)], settings }
    }

    /// A group serves from now on, with so many KV blocks; `has_pages` says whether they hold what they held.
    pub fn on_serving(&mut self, group: usize, n_blocks: usize, has_pages: bool) {
        let Some(state) = self.groups.get_mut(group) else { return };
        state.away_since = None;
        if !has_pages {
            state.prefixes.clear();
        }
        state.prefixes.limit(if self.settings.prefix_caching { n_blocks.min(MOST_BLOCKS) } else { 0 });
    }

    /// A group no longer serves.
    pub fn on_lost(&mut self, group: usize, now: Instant) {
        if let Some(state) = self.groups.get_mut(group) {
            state.away_since.get_or_insert(now);
        }
    }

    /// Whether any group serves.
    pub fn serves(&self) -> bool {
        self.groups.iter().any(|g| g.away_since.is_none())
    }

    /// What a request asks of any group.
    pub fn demand(&self, request: &Request) -> Demand {
        let tokens = u64::from(request.max_tokens).min(EXPECTED_TOKENS);
        Demand {
            hashes: hashes(request.cache_root, &request.prompt, self.settings.block_size),
            prompt_rows: request.prompt.len() as u64,
            output_rows: tokens.saturating_mul(u64::from(request.n)),
        }
    }

    /// Groups that a request may go to, the best one first: those that serve; if none does, all.
    pub fn choose(&self, demand: &Demand) -> Vec<usize> {
        let mut groups: Vec<usize> = (0..self.groups.len()).collect();
        if self.serves() {
            groups.retain(|g| self.groups[*g].away_since.is_none());
        }
        groups.sort_by_key(|g| {
            let state = &self.groups[*g];
            (state.rows.saturating_add(self.rows_to_compute(*g, demand)), state.n_requests, *g)
        });
        groups
    }

    fn rows_to_compute(&self, group: usize, demand: &Demand) -> u64 {
        let n_known = self.groups[group].prefixes.n_known(&demand.hashes) * self.settings.block_size;
        demand.prompt_rows.saturating_sub(n_known as u64)
    }

    /// A request went to a group.
    pub fn begin(&mut self, group: usize, demand: &Demand) -> Share {
        let rows = self.rows_to_compute(group, demand).saturating_add(demand.output_rows);
        let state = &mut self.groups[group];
        state.n_requests += 1;
        state.rows = state.rows.saturating_add(rows);
        state.prefixes.record(&demand.hashes);
        Share { group, rows }
    }

    /// A request has ended, or has gone to another group.
    pub fn end(&mut self, share: Share) {
        let state = &mut self.groups[share.group];
        state.n_requests = state.n_requests.saturating_sub(1);
        state.rows = state.rows.saturating_sub(share.rows);
    }

    /// When requests of a group go to another one, if nothing happens before: it is away, and another one serves.
    pub fn leaves_at(&self, group: usize) -> Option<Instant> {
        let since = self.groups.get(group)?.away_since?;
        self.serves().then(|| since + self.settings.leave_after)
    }
}

#[cfg(test)]
mod tests;
