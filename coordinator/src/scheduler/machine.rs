//! The scheduler: events in, actions out. No clock, no socket, no randomness.
//!
//! What is known of a request lives here and in the journal; what is known of a group (blocks, slots, steps in flight) is
//! thrown away with the group. So a lost group costs time and nothing else: running sequences wait again, and the next
//! group gets them with all their tokens.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
    time::Instant,
};

use phalanx_cluster::id::TokenId;
use phalanx_proto::v1::{SamplingParams, TokenScore};

use super::{
    event::{Action, Event, Limits, Measure, Status},
    policy::{self, MAX_IN_FLIGHT},
};
use crate::{
    journal::{Entry, Journal},
    kv::blocks::Blocks,
    request::{Request, RequestError, RequestEvent, Usage},
    sequence::{RequestKey, Sequence, SequenceKey},
    text::decode::{Detokenizers, OutputText},
};

/// The scheduler of one served model.
pub struct Machine {
    pub(super) limits: Limits,
    pub(super) eos: Vec<TokenId>,
    detokenizers: Box<dyn Detokenizers>,
    pub(super) group: Option<Group>,
    /// Epoch of the latest group, lost or not.
    last_epoch: u64,
    pub(super) requests: BTreeMap<RequestKey, LiveRequest>,
    pub(super) sequences: BTreeMap<SequenceKey, Sequence>,
    /// Sequences without a seat that may get one, oldest first. Preempted ones are in front by their keys alone.
    pub(super) waiting: BTreeSet<SequenceKey>,
    /// Sequences with a seat.
    pub(super) running: BTreeSet<SequenceKey>,
    deadlines: BTreeSet<(Instant, RequestKey)>,
    pub(super) journal: Journal,
}

/// A request that is not finished.
pub(super) struct LiveRequest {
    pub(super) request: Arc<Request>,
    arrived_at: Instant,
    /// Whether it ever ran.
    pub(super) is_admitted: bool,
    pub(super) n_open: usize,
    /// Choices that wait until choice 0's prompt can be shared.
    pub(super) held: Vec<SequenceKey>,
    /// Scores of prompt positions 1, 2, ... so far; `None` if not asked for, or told already.
    pub(super) scores: Option<Vec<TokenScore>>,
    pub(super) usage: Usage,
}

/// What is known of the serving group.
pub(super) struct Group {
    pub(super) epoch: u64,
    pub(super) next_step: u64,
    pub(super) blocks: Blocks,
    pub(super) in_flight: VecDeque<StepInFlight>,
    pub(super) slots: Slots,
    /// The sequence that found too few blocks, and how many were available: it is not tried again before there are more.
    pub(super) refused: Option<(SequenceKey, usize)>,
    pub(super) hold: Hold,
}

/// Whether a group takes plans.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Hold {
    /// It does.
    Off,
    /// It must not get any; nobody has been told yet that no step is in flight.
    Draining,
    /// It has none, and the group knows.
    Idle,
}

/// A plan that was sent and whose result is awaited.
pub(super) struct StepInFlight {
    pub(super) step: u64,
    pub(super) chunks: Vec<PlannedChunk>,
}

/// Whose rows a planned chunk was. The slot may be another's when the result comes.
pub(super) struct PlannedChunk {
    pub(super) key: SequenceKey,
    pub(super) slot: u32,
    pub(super) end: usize,
    pub(super) sample: bool,
}

/// Slot numbers. One is given again only by a plan after the one that drops its last owner.
#[derive(Default)]
pub(super) struct Slots {
    n_ever: u32,
    free: Vec<u32>,
    pub(super) dropped: Vec<u32>,
}

impl Slots {
    pub(super) fn take(&mut self) -> u32 {
        self.free.pop().unwrap_or_else(|| {
            self.n_ever += 1;
            self.n_ever - 1
        })
    }

    /// Slots to name as dropped in a plan that is being sent.
    pub(super) fn flush_dropped(&mut self) -> Vec<u32> {
        self.free.extend(&self.dropped);
        std::mem::take(&mut self.dropped)
    }
}

impl LiveRequest {
    pub(super) fn waits_for_scores(&self) -> bool {
        self.scores.is_some()
    }
}

impl Machine {
    /// Without requests and without a group. `eos` ends sequences.
    pub fn new(limits: Limits, eos: Vec<TokenId>, detokenizers: Box<dyn Detokenizers>) -> Self {
        Self {
            limits,
            eos,
            detokenizers,
            group: None,
            last_epoch: 0,
            requests: BTreeMap::new(),
            sequences: BTreeMap::new(),
            waiting: BTreeSet::new(),
            running: BTreeSet::new(),
            deadlines: BTreeSet::new(),
            journal: Journal::default(),
        }
    }

    /// Takes an event. `now` never goes back.
    pub fn step(&mut self, now: Instant, event: Event) -> Vec<Action> {
        let mut out = Vec::new();
        match event {
            Event::Submit(key, request) => self.on_submit(now, key, request, &mut out),
            Event::Cancel(key) => self.forget(key),
            Event::GroupServing { epoch, n_blocks, kept: _ } => self.on_serving(epoch, n_blocks, &mut out),
            Event::GroupLost { epoch, is_planned: _ } => self.on_lost(epoch, &mut out),
            Event::Hold { epoch } => self.on_hold(epoch, Hold::Draining, &mut out),
            Event::Resume { epoch } => self.on_hold(epoch, Hold::Off, &mut out),
            Event::Stepped(result) => self.on_stepped(now, result, &mut out),
            Event::Tick => {}
        }
        self.expire(now, &mut out);
        while self.group.as_ref().is_some_and(|g| g.hold == Hold::Off && g.in_flight.len() < MAX_IN_FLIGHT) {
            match self.plan(&mut out) {
                Some(plan) => out.push(Action::SendPlan(plan)),
                None => break,
            }
        }
        if let Some(group) = self.group.as_mut().filter(|g| g.hold == Hold::Draining && g.in_flight.is_empty()) {
            group.hold = Hold::Idle;
            out.push(Action::Idle(group.epoch));
        }
        out
    }

    /// The earliest deadline of a live request.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.deadlines.first().map(|(at, _)| *at)
    }

    /// The present state in numbers.
    pub fn status(&self) -> Status {
        let group = self.group.as_ref();
        Status {
            n_waiting: self.sequences.len() - self.running.len(),
            n_running: self.running.len(),
            n_in_flight: group.map_or(0, |g| g.in_flight.len()),
            n_blocks_used: group.map_or(0, |g| g.blocks.n_used()),
            n_blocks: group.map_or(0, |g| g.blocks.n_blocks()),
            n_requests: self.requests.len(),
            epoch: group.map(|g| g.epoch),
        }
    }

    /// Ends all requests with an error.
    pub fn fail_all(&mut self, error: &RequestError) -> Vec<Action> {
        let mut out = Vec::new();
        for key in self.requests.keys().copied().collect::<Vec<_>>() {
            self.fail(key, error.clone(), &mut out);
        }
        out
    }

    fn on_submit(&mut self, now: Instant, key: RequestKey, request: Request, out: &mut Vec<Action>) {
        let prompt_len = request.prompt.len();
        if let Some(error) = self.refusal(key, &request) {
            out.push(Action::Emit(key, RequestEvent::Failed(error)));
            return;
        }
        out.push(Action::Measure(Measure::PromptTokens(prompt_len)));
        let request = Arc::new(request);
        self.journal.append(Entry::Began(key, Arc::clone(&request)));
        let max_tokens = policy::max_output(prompt_len, request.max_tokens, self.limits.max_model_len);
        // Without output all choices are the same: one has its prompt scored for all.
        let n_sequences = if max_tokens == 0 { 1 } else { request.n };
        for choice in 0..n_sequences {
            let key = SequenceKey { request: key, choice };
            let sequence = Sequence {
                key,
                prompt_len,
                max_tokens,
                n_output: 0,
                n_pending: 0,
                sampling: self.sampling_of(&request, choice),
                text: OutputText::new(&request.stop, self.detokenizers.as_ref()),
                last_token_at: None,
                seat: None,
            };
            self.sequences.insert(key, sequence);
            self.waiting.insert(key);
        }
        if let Some(deadline) = request.deadline {
            self.deadlines.insert((deadline, key));
        }
        let live = LiveRequest {
            arrived_at: now,
            is_admitted: false,
            n_open: n_sequences as usize,
            held: Vec::new(),
            scores: request.sampling.prompt_logprobs.map(|_| Vec::new()),
            usage: Usage { prompt_tokens: prompt_len as u32, ..Usage::default() },
            request,
        };
        self.requests.insert(key, live);
        self.tell_scores_if_complete(key, out);
    }

    /// Why a request can't be taken at all. Frontends have checked it; but shards refuse a bad plan by giving up the
    /// group, so what they would refuse must not get that far.
    fn refusal(&self, key: RequestKey, request: &Request) -> Option<RequestError> {
        let prompt_len = request.prompt.len();
        let broken = |what: String| Some(RequestError::Internal(format!("request {}: {what}", request.id)));
        if self.requests.contains_key(&key) {
            return broken(format!("key {} is taken", key.0));
        }
        if prompt_len == 0 || prompt_len > self.limits.max_model_len {
            return broken(format!("prompt of {prompt_len} tokens, want 1 to {}", self.limits.max_model_len));
        }
        if request.n == 0 {
            return broken("no choices are asked for".to_owned());
        }
        if let Some(token) = request.prompt.iter().find(|t| **t as usize >= self.limits.vocab) {
            return broken(format!("prompt has token {token}, want less than {}", self.limits.vocab));
        }
        let max_tokens = policy::max_output(prompt_len, request.max_tokens, self.limits.max_model_len);
        self.too_large(prompt_len, if request.is_open_ended { max_tokens.min(1) } else { max_tokens })
    }

    /// Whether the serving group could not hold a sequence even if it had all blocks.
    pub(super) fn too_large(&self, prompt_len: usize, max_tokens: usize) -> Option<RequestError> {
        let blocks = &self.group.as_ref()?.blocks;
        let need = blocks.needed(policy::worst_case_positions(prompt_len, max_tokens));
        let have = blocks.n_blocks();
        (need > have).then_some(RequestError::TooLarge { need, have })
    }

    /// Parameters of a choice as the shards get them.
    fn sampling_of(&self, request: &Request, choice: u32) -> SamplingParams {
        let mut sampling = request.sampling.clone();
        sampling.seed = request.seed_of(choice);
        if choice > 0 {
            sampling.prompt_logprobs = None;
        }
        sampling.suppressed_token_ids.clear();
        if sampling.min_tokens > 0 {
            let eos = if request.stop.ignore_eos { &[] } else { self.eos.as_slice() };
            let ids: BTreeSet<_> = eos.iter().chain(&request.stop.token_ids).copied().collect();
            // An id that the model does not have is never chosen anyway.
            sampling.suppressed_token_ids = ids.into_iter().filter(|t| (*t as usize) < self.limits.vocab).collect();
        }
        sampling
    }

    fn on_serving(&mut self, epoch: u64, n_blocks: usize, out: &mut Vec<Action>) {
        if epoch <= self.last_epoch {
            out.push(Action::Measure(Measure::Fenced));
            return;
        }
        self.leave_group();
        self.last_epoch = epoch;
        self.group = Some(Group {
            epoch,
            next_step: 1,
            blocks: Blocks::new(n_blocks, self.limits.block_size),
            in_flight: VecDeque::new(),
            slots: Slots::default(),
            refused: None,
            hold: Hold::Off,
        });
    }

    fn on_hold(&mut self, epoch: u64, hold: Hold, out: &mut Vec<Action>) {
        match self.group.as_mut().filter(|g| g.epoch == epoch) {
            Some(group) => group.hold = hold,
            None => out.push(Action::Measure(Measure::Fenced)),
        }
    }

    fn on_lost(&mut self, epoch: u64, out: &mut Vec<Action>) {
        if self.group.as_ref().is_some_and(|g| g.epoch == epoch) {
            self.leave_group();
        } else {
            out.push(Action::Measure(Measure::Fenced));
        }
    }

    /// Forgets the group and all that only it knew. Everything that the journal has open waits again.
    fn leave_group(&mut self) {
        self.group = None;
        self.running.clear();
        for sequence in self.sequences.values_mut() {
            sequence.seat = None;
            sequence.n_pending = 0;
        }
        for live in self.requests.values_mut() {
            live.held.clear();
        }
        self.waiting = self.journal.unfinished().filter(|key| self.sequences.contains_key(key)).collect();
    }

    fn expire(&mut self, now: Instant, out: &mut Vec<Action>) {
        while let Some((at, key)) = self.deadlines.first().copied() {
            if at > now {
                break;
            }
            self.fail(key, RequestError::DeadlineExceeded, out);
        }
    }

    /// Ends a request with an error.
    pub(super) fn fail(&mut self, key: RequestKey, error: RequestError, out: &mut Vec<Action>) {
        if self.requests.contains_key(&key) {
            self.forget(key);
            out.push(Action::Emit(key, RequestEvent::Failed(error)));
        }
    }

    /// Removes a request and all its choices; their blocks are free for the next plan.
    pub(super) fn forget(&mut self, key: RequestKey) {
        let Some(live) = self.requests.remove(&key) else { return };
        if let Some(deadline) = live.request.deadline {
            self.deadlines.remove(&(deadline, key));
        }
        for choice in 0..live.request.n {
            self.remove_sequence(SequenceKey { request: key, choice });
        }
        self.journal.append(Entry::Ended(key));
    }

    /// Removes a sequence, wherever it is.
    pub(super) fn remove_sequence(&mut self, key: SequenceKey) {
        self.unseat(key);
        self.waiting.remove(&key);
        self.sequences.remove(&key);
    }

    /// Takes a sequence's blocks and slot back, if it has any. Steps in flight may still write the blocks; those come
    /// before any plan that gives the blocks to others.
    pub(super) fn unseat(&mut self, key: SequenceKey) {
        self.running.remove(&key);
        let Some(seat) = self.sequences.get_mut(&key).and_then(|s| s.seat.take()) else { return };
        if let Some(group) = &mut self.group {
            group.slots.dropped.push(seat.slot);
            group.blocks.release(seat.table);
        }
    }

    /// Lets choices that wait for choice 0's prompt be admitted.
    pub(super) fn release_held(&mut self, key: RequestKey) {
        if let Some(live) = self.requests.get_mut(&key) {
            self.waiting.extend(live.held.drain(..));
        }
    }

    /// How long ago a request came.
    pub(super) fn since_arrival(&self, key: RequestKey, now: Instant) -> Option<std::time::Duration> {
        self.requests.get(&key).map(|live| now.saturating_duration_since(live.arrived_at))
    }

    /// Asserts the invariants of queues and blocks. O(everything).
    pub fn check(&self) {
        let n_held: usize = self.requests.values().map(|r| r.held.len()).sum();
        assert_eq!(self.waiting.len() + self.running.len() + n_held, self.sequences.len(), "queues and sequences");
        for (key, sequence) in &self.sequences {
            assert_eq!(sequence.seat.is_some(), self.running.contains(key), "{key:?} has a seat if it runs");
            let is_waiting = self.waiting.contains(key);
            let live = self.requests.get(&key.request).expect("a sequence belongs to a request");
            assert_eq!(sequence.seat.is_none(), is_waiting || live.held.contains(key), "{key:?} waits or is held");
            assert!(sequence.n_output + sequence.n_pending <= sequence.max_tokens, "{key:?} is planned beyond its end");
            let tokens = self.journal.tokens(*key).expect("the journal has every sequence");
            assert_eq!(tokens.len(), sequence.n_known(), "{key:?} in the journal");
            if let Some(seat) = &sequence.seat {
                assert_eq!(seat.tokens, tokens, "{key:?} in the journal");
                assert!(seat.computed <= sequence.n_planned(), "{key:?} is computed beyond what is known");
            }
        }
        for (key, live) in &self.requests {
            let range = SequenceKey { request: *key, choice: 0 }..=SequenceKey { request: *key, choice: u32::MAX };
            assert_eq!(self.sequences.range(range).count(), live.n_open, "{key:?} has open choices");
            assert!(live.n_open > 0, "{key:?} is finished");
            let is_armed = live.request.deadline.is_none_or(|at| self.deadlines.contains(&(at, *key)));
            assert!(is_armed, "{key:?} has its deadline");
        }
        assert_eq!(self.journal.len(), self.requests.len(), "requests in the journal");
        let n_deadlines = self.requests.values().filter(|r| r.request.deadline.is_some()).count();
        assert_eq!(self.deadlines.len(), n_deadlines, "deadlines");
        match &self.group {
            Some(group) => {
                group.blocks.check(self.sequences.values().filter_map(|s| s.seat.as_ref()).map(|s| &s.table));
                assert!(group.in_flight.len() <= MAX_IN_FLIGHT, "steps in flight");
                assert!(self.running.len() <= self.limits.max_running, "sequences that run");
            }
            None => assert!(self.running.is_empty(), "something runs without a group"),
        }
    }
}
