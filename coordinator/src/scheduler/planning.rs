//! Builds the next step plan.

use phalanx_cluster::seal::Seal;
use phalanx_proto::v1::{BlockAppend, Chunk, SamplingParams, SequenceStart, StepPlan};

use super::{
    event::{Action, Measure},
    machine::{Group, LiveRequest, Machine, PlannedChunk, StepInFlight},
    policy,
    quarantine::Allowed,
};
use crate::{
    coverage::Coverage,
    sequence::{Seat, Sequence, SequenceKey},
};

/// A plan being built.
struct Draft {
    plan: StepPlan,
    planned: Vec<PlannedChunk>,
    rows_left: usize,
}

/// Running sequences with rows to compute, by what they are.
#[derive(Default)]
struct Missing {
    /// They lack one row: a client waits for that token. First in turn first.
    decodes: Vec<SequenceKey>,
    /// They lost rows with a group. In the order of places in the queue.
    replays: Vec<SequenceKey>,
    /// The others. First in turn first.
    prefills: Vec<SequenceKey>,
}

/// Whether a sequence has the blocks for its next row.
enum Room {
    Ready,
    /// It gave its own blocks up.
    Preempted,
}

/// Waiting sequences that may be admitted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Waiting {
    /// Those that have nothing to compute again.
    New,
    /// Those that lost positions with a group.
    Replayed,
}

/// What must be left for others when a sequence is admitted.
#[derive(Debug, Clone, Copy, Default)]
struct Reserved {
    seats: usize,
    blocks: usize,
}

impl Machine {
    /// The next plan, or `None` if there are no rows to compute now; then nothing needs to be sent: what is dropped is
    /// named by the next plan that is.
    pub(super) fn plan(&mut self, out: &mut Vec<Action>) -> Option<StepPlan> {
        loop {
            let allowed = self.allowed();
            let plan = self.plan_of(allowed, out);
            let has_steps = self.group.as_ref().is_none_or(|g| !g.in_flight.is_empty());
            if plan.is_some() || has_steps || !self.give_way(allowed) {
                self.end_turn_of_others(allowed, plan.is_some());
                return plan;
            }
        }
    }

    fn plan_of(&mut self, allowed: Allowed, out: &mut Vec<Action>) -> Option<StepPlan> {
        let group = self.group.as_ref().filter(|_| allowed != Allowed::Nobody)?;
        let plan = StepPlan { epoch: group.epoch, step: group.next_step, ..StepPlan::default() };
        let mut draft = Draft { plan, planned: Vec::new(), rows_left: self.limits.max_step_rows };

        let Missing { decodes, replays, mut prefills } = self.missing_rows(allowed);
        let n_running = self.running.len();
        for key in decodes {
            if draft.rows_left == 0 {
                break;
            }
            if matches!(self.make_room(key, allowed, &mut draft, out), Some(Room::Ready)) {
                self.add_chunk(key, &mut draft, out);
            }
        }
        // Who has just been preempted must not take blocks from those who run.
        let may_admit = self.running.len() == n_running;
        let has_replays = !replays.is_empty() || (may_admit && self.next_waiting(allowed, Waiting::Replayed).is_some());
        let n_decodes = draft.planned.len();
        let n_stalled = if has_replays && n_decodes == 0 { self.stalled_rows(allowed) } else { 0 };
        if n_decodes + n_stalled > 0 {
            let n_rows = self.row_time.rows_beside_tokens(self.limits.max_step_rows);
            let n_rows = n_rows.max(policy::rows_around_replays(n_stalled));
            draft.rows_left = draft.rows_left.min(n_rows.saturating_sub(n_decodes));
        }
        let for_replays = if has_replays { policy::replay_rows(draft.rows_left) } else { 0 };
        draft.rows_left -= for_replays;
        prefills.retain(|key| !self.add_chunk(*key, &mut draft, out));
        if may_admit {
            self.admit(Waiting::New, allowed, &mut draft, out);
        }
        if has_replays {
            // With whatever the others have left.
            draft.rows_left += for_replays;
            for key in replays {
                self.add_chunk(key, &mut draft, out);
            }
            if may_admit {
                self.admit(Waiting::Replayed, allowed, &mut draft, out);
            }
            // Replays may wait for the seats and blocks of these.
            prefills.retain(|key| !self.add_chunk(*key, &mut draft, out));
            if may_admit {
                self.admit(Waiting::New, allowed, &mut draft, out);
            }
        }
        if draft.planned.is_empty() {
            return None;
        }
        let group = self.group.as_mut()?;
        draft.plan.dropped = group.slots.flush_dropped();
        let chunks = draft.planned;
        group.next_step += 1;
        let leaders: Vec<_> = chunks.iter().filter(|c| c.key.choice == 0).map(|c| c.key.request).collect();
        let n_rows = draft.plan.chunks.iter().map(|c| c.len as usize).sum();
        group.in_flight.push_back(StepInFlight { step: draft.plan.step, n_rows, chunks });
        for request in leaders {
            if self.requests.get(&request).is_some_and(|r| !r.held.is_empty())
                && !self.waits_for_leader(SequenceKey { request, choice: 1 })
            {
                self.release_held(request);
            }
        }
        Some(draft.plan)
    }

    /// Running sequences with rows to compute.
    fn missing_rows(&self, allowed: Allowed) -> Missing {
        let mut missing = Missing::default();
        let running = self.running.iter().filter(|turn| self.allows(allowed, turn.key));
        for sequence in running.filter_map(|turn| self.sequences.get(&turn.key)) {
            match n_missing(sequence) {
                0 => {}
                n if policy::is_decode(n) => missing.decodes.push(sequence.key),
                _ if sequence.replay_until > 0 => missing.replays.push(sequence.key),
                _ => missing.prefills.push(sequence.key),
            }
        }
        missing.replays.sort_by_key(|key| self.sequences.get(key).map(Sequence::place));
        missing
    }

    /// Rows without which answers that were being read when a group was lost don't go on.
    fn stalled_rows(&self, allowed: Allowed) -> usize {
        let running = self.running.iter().map(|turn| turn.key);
        let waiting = self.waiting.iter().take_while(|place| !place.is_new).map(|place| place.key);
        let stalled = running.chain(waiting).filter(|key| self.allows(allowed, *key));
        let stalled = stalled.filter_map(|key| self.sequences.get(&key)).filter(|s| s.stalled_since.is_some());
        stalled.map(|s| if s.seat.is_some() { n_missing(s) } else { s.n_known() }).sum()
    }

    /// Gives a sequence the block for its next row; the last in turn give theirs up if need be. Rows of this plan are all
    /// of sequences before it, so nothing that is planned is taken back.
    fn make_room(
        &mut self,
        key: SequenceKey,
        allowed: Allowed,
        draft: &mut Draft,
        out: &mut Vec<Action>,
    ) -> Option<Room> {
        loop {
            let group = self.group.as_mut()?;
            let Some(seat) = self.sequences.get_mut(&key)?.seat.as_mut() else { return Some(Room::Preempted) };
            if group.blocks.covers(&seat.table, seat.computed + 1) {
                return Some(Room::Ready);
            }
            if let Some(block) = group.blocks.grow(&mut seat.table) {
                let append = |slot| BlockAppend { sequence: slot, blocks: vec![block.raw()] };
                draft.plan.appended.extend(seat.slot.map(append));
                return Some(Room::Ready);
            }
            // Who is not on trial has no rows, and gives blocks back only here.
            let last = self.last_not_on_trial(allowed).or(self.running.last().map(|turn| turn.key))?;
            self.preempt(last, out);
        }
    }

    /// Puts a sequence back to waiting. A token that a step in flight samples for it is still taken when it comes.
    fn preempt(&mut self, key: SequenceKey, out: &mut Vec<Action>) {
        self.unseat(key);
        self.wait(key);
        if key.choice == 0 {
            self.release_held(key.request);
        }
        if let Some(live) = self.requests.get_mut(&key.request) {
            live.n_preempted += 1;
        }
        out.push(Action::Measure(Measure::Preempted));
    }

    /// Adds as many of a sequence's missing rows as fit, and says whether these are any. The first ones of an epoch tell the
    /// shards who it is.
    fn add_chunk(&mut self, key: SequenceKey, draft: &mut Draft, out: &mut Vec<Action>) -> bool {
        let Some(sequence) = self.sequences.get_mut(&key) else { return false };
        let (Some(live), Some(group)) = (self.requests.get(&key.request), &mut self.group) else { return false };
        let n_missing = n_missing(sequence).min(draft.rows_left);
        let n_planned = sequence.n_planned();
        let is_score_only = sequence.is_score_only();
        let Some(seat) = sequence.seat.as_mut() else { return false };
        let start = seat.computed;
        // A seat that was kept may lack the block of its last known token: that row is for the next plan then.
        let len = n_missing.min(group.blocks.n_positions(&seat.table).saturating_sub(start));
        if len == 0 {
            return false;
        }
        let end = start + len;
        let sample = end == n_planned && !is_score_only;
        let slot = match seat.slot {
            Some(slot) => slot,
            None => {
                let start = start_of(seat, live, sequence.prompt_len, &sequence.sampling, group);
                let slot = start.sequence;
                draft.plan.started.push(start);
                seat.slot = Some(slot);
                slot
            }
        };
        seat.computed = end;
        seat.coverage.extend(draft.plan.step, end);
        if self.limits.prefix_caching {
            // Shards write the rows of a layer before they read any: later chunks of this very plan may share them.
            group.blocks.publish(&mut seat.table, &seat.tokens, end, draft.plan.step);
        }
        if start < sequence.replay_until {
            out.push(Action::Measure(Measure::Replayed(end.min(sequence.replay_until) - start)));
            if end >= sequence.replay_until {
                sequence.replay_until = 0;
            }
        }
        // Positions are below `max_model_len`, which is a u32 on the wire.
        let chunk = Chunk { sequence: slot, start: start as u32, len: len as u32, sample };
        draft.planned.push(PlannedChunk { key, slot, end, sample });
        draft.plan.chunks.push(chunk);
        draft.rows_left -= len;
        sequence.n_pending += usize::from(sample);
        true
    }

    /// The first that waits.
    fn next_waiting(&self, allowed: Allowed, who: Waiting) -> Option<SequenceKey> {
        let mut waiting = self.waiting.iter().filter(|place| place.is_new == (who == Waiting::New));
        waiting.find(|place| self.allows(allowed, place.key)).map(|place| place.key)
    }

    /// Seats and blocks that those who must be computed again will need: nobody who is new may take them.
    fn reserved(&self, allowed: Allowed, who: Waiting) -> Reserved {
        let (Some(group), Waiting::New) = (&self.group, who) else { return Reserved::default() };
        let replayed = self.waiting.iter().take_while(|place| !place.is_new);
        let replayed = replayed.filter(|place| self.allows(allowed, place.key));
        let mut reserved = Reserved::default();
        for sequence in replayed.filter_map(|place| self.sequences.get(&place.key)) {
            reserved.seats += 1;
            reserved.blocks += group.blocks.needed(sequence.n_known());
        }
        if reserved.seats > 0 {
            reserved.blocks += policy::spare_blocks(group.blocks.n_blocks(), reserved.seats);
        }
        reserved
    }

    /// Gives seats to waiting sequences in order, until one finds no room.
    fn admit(&mut self, who: Waiting, allowed: Allowed, draft: &mut Draft, out: &mut Vec<Action>) {
        let reserved = self.reserved(allowed, who);
        while draft.rows_left > 0 {
            let Some(key) = self.next_waiting(allowed, who) else { return };
            let Some(sequence) = self.sequences.get(&key) else { return };
            if sequence.n_pending > 0 {
                // Preempted with a token on the way, which it must know before it goes on.
                return;
            }
            if self.waits_for_leader(key) {
                self.unwait(key);
                if let Some(live) = self.requests.get_mut(&key.request) {
                    live.held.push(key);
                }
                continue;
            }
            let Some((prompt_len, max_tokens)) = self.bound_output(key) else { return };
            if let Some(error) = self.too_large(prompt_len, max_tokens) {
                self.fail(key.request, error, out);
                continue;
            }
            let has_seat = self.running.len() + reserved.seats < self.limits.max_running;
            if has_seat && self.seat(key, reserved.blocks, out).is_some() {
                self.add_chunk(key, draft, out);
            } else if let Some(last) = self.last_not_on_trial(allowed) {
                self.preempt(last, out);
            } else {
                return;
            }
        }
    }

    /// While a request is tried alone: the last in turn of the others. They have no rows in its steps, so they would never
    /// give their blocks and seats back.
    fn last_not_on_trial(&self, allowed: Allowed) -> Option<SequenceKey> {
        let Allowed::Only(suspect) = allowed else { return None };
        self.running.iter().rfind(|turn| turn.key.request != suspect).map(|turn| turn.key)
    }

    /// Prompt and most output of a sequence; an open-ended one is content with what the blocks can hold.
    fn bound_output(&mut self, key: SequenceKey) -> Option<(usize, usize)> {
        let is_open_ended = self.requests.get(&key.request)?.request.is_open_ended;
        let sequence = self.sequences.get_mut(&key)?;
        if is_open_ended && let Some(group) = &self.group {
            let n_positions = group.blocks.n_blocks() * group.blocks.block_size();
            let most = policy::most_output(sequence.prompt_len, n_positions);
            sequence.max_tokens = sequence.max_tokens.min(most.max(sequence.n_output + 1));
        }
        Some((sequence.prompt_len, sequence.max_tokens))
    }

    /// Gives a sequence blocks, or `None` if there are too few: `reserved` ones must be left.
    fn seat(&mut self, key: SequenceKey, reserved: usize, out: &mut Vec<Action>) -> Option<()> {
        let n_running = self.running.len();
        let group = self.group.as_mut()?;
        let n_available = group.blocks.n_available();
        let is_same =
            |(refused, available)| refused == key && n_available <= available && n_running > 0 && reserved == 0;
        if group.refused.is_some_and(is_same) {
            return None;
        }
        let sequence = self.sequences.get_mut(&key)?;
        let live = self.requests.get_mut(&key.request)?;
        let tokens = self.journal.tokens(key)?;
        // Cached positions are not computed, so they would not be scored.
        let is_scored = live.waits_for_scores() && sequence.sampling.prompt_logprobs.is_some();
        // What was computed for it under an earlier leader is its own, whoever else may share it or not.
        let is_replayed = sequence.replay_until > 0;
        let lookup = (self.limits.prefix_caching || is_replayed) && !is_scored;
        let spare = policy::spare_blocks(group.blocks.n_blocks(), n_running) + reserved;
        let Some(admitted) = group.blocks.admit(live.request.cache_root, &tokens, lookup, spare) else {
            group.refused = (reserved == 0).then_some((key, n_available));
            return None;
        };
        group.refused = None;
        if lookup {
            out.push(Action::Measure(Measure::PrefixLookup { n_queried: tokens.len(), n_hit: admitted.n_cached }));
        }
        if live.times.admitted.is_none() {
            live.times.admitted = self.now;
            // What it found under an earlier leader is not known; what it computed there itself was not cached for it.
            let n_cached = if is_replayed { 0 } else { admitted.n_cached };
            live.usage.cached_tokens = n_cached as u32;
            let n_prompt = sequence.prompt_len;
            out.push(Action::Measure(Measure::Prefilling { n_prompt, n_cached: n_cached.min(n_prompt) }));
            out.push(Action::Admitted(key.request));
        }
        let computed = admitted.n_cached;
        if computed >= sequence.replay_until {
            sequence.replay_until = 0;
        }
        let coverage = Coverage::default();
        sequence.seat = Some(Seat { slot: None, tokens, computed, coverage, table: admitted.table });
        let turn = sequence.turn();
        self.unwait(key);
        self.running.insert(turn);
        Some(())
    }

    /// Whether a choice should wait because choice 0 is computing blocks that it could share, or scores that clients see
    /// before any output.
    fn waits_for_leader(&self, key: SequenceKey) -> bool {
        if key.choice == 0 {
            return false;
        }
        // Only choice 0 has its prompt scored, wherever in the queue it is.
        if self.requests.get(&key.request).is_some_and(|r| r.waits_for_scores()) {
            return true;
        }
        let leader = self.sequences.get(&SequenceKey { choice: 0, ..key });
        let Some((leader, seat)) = leader.and_then(|l| Some((l, l.seat.as_ref()?))) else { return false };
        let n_shareable = (leader.prompt_len - 1) / self.limits.block_size;
        self.limits.prefix_caching && seat.table.n_published() < n_shareable
    }
}

/// What the shards must know of a sequence before its first rows. Takes a slot for it.
fn start_of(
    seat: &Seat,
    live: &LiveRequest,
    prompt_len: usize,
    sampling: &SamplingParams,
    group: &mut Group,
) -> SequenceStart {
    let mut sampling = sampling.clone();
    if !live.waits_for_scores() {
        sampling.prompt_logprobs = None;
    }
    SequenceStart {
        sequence: group.slots.take(),
        token_ids: seat.tokens.clone(),
        prompt_len: prompt_len as u32,
        sampling: Some(sampling),
        blocks: seat.table.raw(),
        cache_root: wire_root(live.request.cache_root),
    }
}

/// Of what begins without a salt nothing is said.
fn wire_root(root: Seal) -> Vec<u8> {
    if root == Seal::EMPTY { Vec::new() } else { root.bytes().to_vec() }
}

/// Positions of a running sequence that could be computed now.
fn n_missing(sequence: &Sequence) -> usize {
    let Some(seat) = &sequence.seat else { return 0 };
    if sequence.is_score_only() {
        sequence.prompt_len - seat.computed
    } else if sequence.is_planned_to_its_end() {
        0
    } else {
        sequence.n_planned() - seat.computed
    }
}
