//! Builds the next step plan.

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
    /// Part of them that may compute positions again.
    replay_rows_left: usize,
}

/// Whether a sequence has the blocks for its next row.
enum Room {
    Ready,
    /// It gave its own blocks up.
    Preempted,
}

impl Machine {
    /// The next plan, or `None` if there are no rows to compute now; then nothing needs to be sent: what is dropped is
    /// named by the next plan that is.
    pub(super) fn plan(&mut self, out: &mut Vec<Action>) -> Option<StepPlan> {
        let allowed = self.allowed();
        let plan = self.plan_of(allowed, out);
        if allowed == Allowed::Unsuspected {
            self.end_others_turn();
            // Those that are to be computed again first may wait for what a suspect holds.
            if plan.is_none() && self.group.as_ref().is_some_and(|g| g.in_flight.is_empty()) {
                let allowed = self.go_on_with_trial();
                return self.plan_of(allowed, out);
            }
        }
        plan
    }

    fn plan_of(&mut self, allowed: Allowed, out: &mut Vec<Action>) -> Option<StepPlan> {
        let group = self.group.as_ref().filter(|_| allowed != Allowed::Nobody)?;
        let plan = StepPlan { epoch: group.epoch, step: group.next_step, ..StepPlan::default() };
        let mut n_rows = self.limits.max_step_rows;
        let mut draft = Draft { plan, planned: Vec::new(), rows_left: n_rows, replay_rows_left: n_rows };

        let (decodes, prefills): (Vec<_>, Vec<_>) = self.with_missing_rows(allowed);
        let n_running = self.running.len();
        for key in decodes {
            if draft.rows_left == 0 {
                break;
            }
            if matches!(self.make_room(key, &mut draft, out), Some(Room::Ready)) {
                self.add_chunk(key, &mut draft, out);
            }
        }
        let has_decodes = !draft.planned.is_empty();
        if has_decodes {
            n_rows = self.row_time.rows_beside_decodes(n_rows);
            draft.rows_left = n_rows.saturating_sub(draft.planned.len());
        }
        draft.replay_rows_left = policy::replay_rows(n_rows, has_decodes);
        for key in prefills {
            self.add_chunk(key, &mut draft, out);
        }
        // Who has just been preempted must not take blocks from those who run.
        if self.running.len() == n_running {
            self.admit(allowed, &mut draft, out);
        }
        if draft.planned.is_empty() {
            return None;
        }
        let group = self.group.as_mut()?;
        draft.plan.dropped = group.slots.flush_dropped();
        let chunks = draft.planned;
        group.next_step += 1;
        // From the next plan on, what this one computes can be shared.
        for PlannedChunk { key, .. } in chunks.iter().filter(|_| self.limits.prefix_caching) {
            let Some(seat) = self.sequences.get_mut(key).and_then(|s| s.seat.as_mut()) else { continue };
            group.blocks.publish(&mut seat.table, &seat.tokens, seat.computed, draft.plan.step);
        }
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

    /// Running sequences with rows to compute, first in turn first: those that lack one, and the others.
    fn with_missing_rows(&self, allowed: Allowed) -> (Vec<SequenceKey>, Vec<SequenceKey>) {
        let running = self.running.iter().filter(|turn| self.allows(allowed, turn.key));
        let running = running.filter_map(|turn| self.sequences.get(&turn.key));
        let missing = running.map(|s| (s.key, n_missing(s))).filter(|(_, n)| *n > 0);
        let (decodes, prefills): (Vec<_>, Vec<_>) = missing.partition(|(_, n)| policy::is_decode(*n));
        let keys = |list: Vec<(SequenceKey, usize)>| list.into_iter().map(|(key, _)| key).collect();
        (keys(decodes), keys(prefills))
    }

    /// Gives a sequence the block for its next row; the last in turn give theirs up if need be. Rows of this plan are all
    /// of sequences before it, so nothing that is planned is taken back.
    fn make_room(&mut self, key: SequenceKey, draft: &mut Draft, out: &mut Vec<Action>) -> Option<Room> {
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
            let last = self.running.last()?.key;
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
        out.push(Action::Measure(Measure::Preempted));
    }

    /// Adds as many of a sequence's missing rows as fit. The first ones of an epoch tell the shards who it is.
    fn add_chunk(&mut self, key: SequenceKey, draft: &mut Draft, out: &mut Vec<Action>) {
        let Some(sequence) = self.sequences.get_mut(&key) else { return };
        let (Some(live), Some(group)) = (self.requests.get(&key.request), &mut self.group) else { return };
        let n_missing = n_missing(sequence).min(draft.rows_left);
        let n_planned = sequence.n_planned();
        let is_score_only = sequence.is_score_only();
        let Some(seat) = sequence.seat.as_mut() else { return };
        let start = seat.computed;
        // A seat that was kept may lack the block of its last known token: that row is for the next plan then.
        let len = n_missing.min(group.blocks.n_positions(&seat.table).saturating_sub(start));
        let is_replay = start < sequence.replay_until;
        let len = if is_replay { len.min(draft.replay_rows_left) } else { len };
        if len == 0 {
            return;
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
        if is_replay {
            out.push(Action::Measure(Measure::Replayed(end.min(sequence.replay_until) - start)));
            draft.replay_rows_left -= len;
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
    }

    /// Gives seats to waiting sequences in order, until one finds no room.
    fn admit(&mut self, allowed: Allowed, draft: &mut Draft, out: &mut Vec<Action>) {
        while draft.rows_left > 0 && self.running.len() < self.limits.max_running {
            let mut waiting = self.waiting.iter();
            let Some(place) = waiting.find(|place| self.allows(allowed, place.key)).copied() else { return };
            let key = place.key;
            let Some(sequence) = self.sequences.get(&key) else { return };
            if sequence.n_pending > 0 {
                // Preempted with a token on the way, which it must know before it goes on.
                return;
            }
            if sequence.replay_until > 0 && draft.replay_rows_left == 0 {
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
            if self.seat(key, out).is_none() {
                if !self.give_up_for_trial(allowed, out) {
                    return;
                }
                continue;
            }
            self.add_chunk(key, draft, out);
        }
    }

    /// Takes the blocks of the last in turn that is not on trial, if there is a trial: the others have no rows in its steps,
    /// so they would never give them back.
    fn give_up_for_trial(&mut self, allowed: Allowed, out: &mut Vec<Action>) -> bool {
        let Allowed::Only(suspect) = allowed else { return false };
        let Some(turn) = self.running.iter().rfind(|turn| turn.key.request != suspect).copied() else { return false };
        self.preempt(turn.key, out);
        true
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

    /// Gives a sequence blocks, or `None` if there are too few.
    fn seat(&mut self, key: SequenceKey, out: &mut Vec<Action>) -> Option<()> {
        let n_running = self.running.len();
        let group = self.group.as_mut()?;
        let n_available = group.blocks.n_available();
        let is_same = |(refused, available)| refused == key && n_available <= available && n_running > 0;
        if group.refused.is_some_and(is_same) {
            return None;
        }
        let sequence = self.sequences.get_mut(&key)?;
        let live = self.requests.get_mut(&key.request)?;
        let tokens = self.journal.tokens(key)?;
        // Cached positions are not computed, so they would not be scored.
        let is_scored = live.waits_for_scores() && sequence.sampling.prompt_logprobs.is_some();
        let lookup = self.limits.prefix_caching && !is_scored;
        let spare = policy::spare_blocks(group.blocks.n_blocks(), n_running);
        let Some(admitted) = group.blocks.admit(&tokens, lookup, spare) else {
            group.refused = Some((key, n_available));
            return None;
        };
        group.refused = None;
        if lookup {
            out.push(Action::Measure(Measure::PrefixLookup { n_queried: tokens.len(), n_hit: admitted.n_cached }));
        }
        if !live.is_admitted {
            live.is_admitted = true;
            live.usage.cached_tokens = admitted.n_cached as u32;
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
        let leader = self.sequences.get(&SequenceKey { choice: 0, ..key });
        let Some((leader, seat)) = leader.and_then(|l| Some((l, l.seat.as_ref()?))) else { return false };
        let n_shareable = (leader.prompt_len - 1) / self.limits.block_size;
        let will_share = self.limits.prefix_caching && seat.table.n_published() < n_shareable;
        will_share || self.requests.get(&key.request).is_some_and(|r| r.waits_for_scores())
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
    }
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
