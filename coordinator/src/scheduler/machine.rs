//! The scheduler: events in, actions out. No clock, no socket, no randomness.
//!
//! What is known of a request lives here and in the journal; slots and steps in flight are thrown away with their group.
//! So a lost group costs time and nothing else: running sequences wait again, and the next group gets them with all their
//! tokens, and with their pages if it has kept them (`replay`).

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
    time::{Duration, Instant},
};

use phalanx_cluster::id::TokenId;
use phalanx_proto::v1::{SamplingParams, TokenScore};

use super::{
    ending::{Ending, Times},
    event::{Action, Event, Limits, Measure, Recovery, Status},
    policy::{self, MAX_IN_FLIGHT, RowTime},
    quarantine::Quarantine,
    replay::Former,
};
use crate::{
    journal::{Entry, Journal},
    kv::blocks::Blocks,
    request::{Request, RequestError, RequestEvent, Usage},
    sequence::{Place, RequestKey, Sequence, SequenceKey, Turn},
    text::decode::{Detokenizers, OutputText},
};

/// The scheduler of one served model.
pub struct Machine {
    pub(super) limits: Limits,
    pub(super) recovery: Recovery,
    pub(super) eos: Vec<TokenId>,
    detokenizers: Box<dyn Detokenizers>,
    pub(super) group: Option<Group>,
    /// What the last group's pages hold, until the next one serves.
    pub(super) former: Option<Former>,
    /// When the event came that is being handled, or else the last one.
    pub(super) now: Option<Instant>,
    /// Epoch of the latest group, lost or not.
    pub(super) last_epoch: u64,
    /// When the last group was lost; `None` while one serves, and before the first.
    pub(super) without_group_since: Option<Instant>,
    pub(super) quarantine: Quarantine,
    /// As the shards of the last groups were.
    pub(super) row_time: RowTime,
    pub(super) requests: BTreeMap<RequestKey, LiveRequest>,
    pub(super) sequences: BTreeMap<SequenceKey, Sequence>,
    /// Sequences without a seat that may get one. Preempted ones are in front of their likes by their keys alone.
    pub(super) waiting: BTreeSet<Place>,
    /// Sequences with a seat.
    pub(super) running: BTreeSet<Turn>,
    pub(super) deadlines: BTreeSet<(Instant, RequestKey)>,
    pub(super) journal: Journal,
}

/// A request that is not finished.
pub(super) struct LiveRequest {
    pub(super) request: Arc<Request>,
    pub(super) times: Times,
    pub(super) n_open: usize,
    /// Choices that wait until choice 0's prompt can be shared.
    pub(super) held: Vec<SequenceKey>,
    /// Scores of prompt positions 1, 2, ... so far; `None` if not asked for, or told already.
    pub(super) scores: Option<Vec<TokenScore>>,
    pub(super) usage: Usage,
    /// Tokens of its longest choice that is complete.
    pub(super) longest: usize,
    /// How often its sequences were put back because blocks ran out.
    pub(super) n_preempted: u32,
    /// Unplanned losses with rows of it in flight since it last made progress.
    pub(super) losses: u32,
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
    /// The longest that a stream stood still until this group gave it a token; `None` once all have one.
    pub(super) recovering: Option<Duration>,
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
    pub(super) n_rows: usize,
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
    pub fn new(limits: Limits, recovery: Recovery, eos: Vec<TokenId>, detokenizers: Box<dyn Detokenizers>) -> Self {
        Self {
            limits,
            recovery: Recovery { max_replays: recovery.max_replays.max(1), ..recovery },
            eos,
            detokenizers,
            group: None,
            former: None,
            now: None,
            last_epoch: 0,
            without_group_since: None,
            quarantine: Quarantine::default(),
            row_time: RowTime::default(),
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
        self.now = Some(now);
        match event {
            Event::Submit(key, request) => self.on_submit(now, key, *request, &mut out),
            Event::Cancel(key) => self.forget(key, Ending::Abort, &mut out),
            Event::GroupServing { epoch, n_blocks, kept } => self.on_serving(now, epoch, n_blocks, kept, &mut out),
            Event::GroupLost { epoch, is_planned } => self.on_lost(now, epoch, is_planned, &mut out),
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
        self.tell_recovery(&mut out);
        out
    }

    fn tell_recovery(&mut self, out: &mut Vec<Action>) {
        let Some(group) = self.group.as_mut().filter(|g| g.recovering.is_some()) else { return };
        if self.sequences.values().all(|s| s.stalled_since.is_none())
            && let Some(stall) = group.recovering.take()
        {
            out.push(Action::Recovered { epoch: group.epoch, stall });
        }
    }

    /// How much trouble requests may meet.
    pub fn recovery(&self) -> Recovery {
        self.recovery
    }

    /// When a live request may have to be given up.
    pub fn next_deadline(&self) -> Option<Instant> {
        let deadline = self.deadlines.first().map(|(at, _)| *at);
        deadline.into_iter().chain(self.oldest_without_group().map(|(at, _)| at)).min()
    }

    /// The present state in numbers.
    pub fn status(&self) -> Status {
        let group = self.group.as_ref();
        Status {
            n_waiting: self.sequences.len() - self.running.len(),
            n_held: self.sequences.len() - self.running.len() - self.waiting.len(),
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
                priority: request.priority,
                prompt_len,
                max_tokens,
                n_output: 0,
                n_pending: 0,
                sampling: self.sampling_of(&request, choice),
                text: OutputText::new(&request.stop, self.detokenizers.as_ref()),
                last_token_at: None,
                replay_until: 0,
                stalled_since: None,
                waits_at: None,
                seat: None,
            };
            self.sequences.insert(key, sequence);
        }
        if let Some(deadline) = request.deadline {
            self.deadlines.insert((deadline, key));
        }
        let live = LiveRequest {
            times: Times::new(now),
            n_open: n_sequences as usize,
            held: Vec::new(),
            scores: request.sampling.prompt_logprobs.map(|_| Vec::new()),
            usage: Usage { prompt_tokens: prompt_len as u32, ..Usage::default() },
            longest: 0,
            n_preempted: 0,
            losses: 0,
            request,
        };
        self.requests.insert(key, live);
        self.tell_scores_if_complete(key, out);
        self.tell_earlier_life(key, out);
        for choice in 0..n_sequences {
            self.wait(SequenceKey { request: key, choice });
        }
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
        if let Some(token) = request.resume.iter().flat_map(|c| &c.tokens).find(|t| **t as usize >= self.limits.vocab) {
            return broken(format!("earlier output has token {token}, want less than {}", self.limits.vocab));
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

    fn on_hold(&mut self, epoch: u64, hold: Hold, out: &mut Vec<Action>) {
        match self.group.as_mut().filter(|g| g.epoch == epoch) {
            Some(group) => group.hold = hold,
            None => out.push(Action::Measure(Measure::Fenced)),
        }
    }

    fn expire(&mut self, now: Instant, out: &mut Vec<Action>) {
        while let Some((at, key)) = self.deadlines.first().copied() {
            if at > now {
                break;
            }
            self.fail(key, RequestError::DeadlineExceeded, out);
        }
        while let Some((at, key)) = self.oldest_without_group() {
            if at > now {
                break;
            }
            let waited = self.recovery.no_group_timeout.as_secs();
            self.fail(key, RequestError::Unavailable(format!("no group was formed within {waited} s")), out);
        }
    }

    /// While no group serves: the request that has waited longest for one, and when it is given up. Keys are in order of
    /// arrival.
    fn oldest_without_group(&self) -> Option<(Instant, RequestKey)> {
        let (key, live) = self.requests.first_key_value().filter(|_| self.group.is_none())?;
        let since = self.without_group_since.map_or(live.times.arrived, |lost_at| lost_at.max(live.times.arrived));
        Some((since.checked_add(self.recovery.no_group_timeout)?, *key))
    }

    /// Puts a sequence without a seat into the queue, if it lives.
    pub(super) fn wait(&mut self, key: SequenceKey) {
        if let Some(sequence) = self.sequences.get_mut(&key) {
            let place = sequence.place();
            sequence.waits_at = Some(place);
            self.waiting.insert(place);
        }
    }

    /// Takes a sequence out of the queue, if it is there.
    pub(super) fn unwait(&mut self, key: SequenceKey) {
        if let Some(place) = self.sequences.get_mut(&key).and_then(|s| s.waits_at.take()) {
            self.waiting.remove(&place);
        }
    }

    /// Ends a request with an error.
    pub(super) fn fail(&mut self, key: RequestKey, error: RequestError, out: &mut Vec<Action>) {
        if self.requests.contains_key(&key) {
            self.forget(key, Ending::of_error(&error), out);
            out.push(Action::Emit(key, RequestEvent::Failed(error)));
        }
    }

    /// Removes a sequence, wherever it is.
    pub(super) fn remove_sequence(&mut self, key: SequenceKey) {
        self.unseat(key);
        self.unwait(key);
        self.sequences.remove(&key);
    }

    /// Takes a sequence's blocks and slot back, if it has any. Steps in flight may still write the blocks; those come
    /// before any plan that gives the blocks to others.
    pub(super) fn unseat(&mut self, key: SequenceKey) {
        if let Some(former) = &mut self.former
            && let Some(seat) = former.seats.remove(&key)
        {
            former.blocks.release(seat.table);
        }
        let Some(sequence) = self.sequences.get_mut(&key) else { return };
        self.running.remove(&sequence.turn());
        if let (Some(seat), Some(group)) = (sequence.seat.take(), &mut self.group) {
            group.slots.dropped.extend(seat.slot);
            group.blocks.release(seat.table);
        }
    }

    /// Lets choices that wait for choice 0's prompt be admitted.
    pub(super) fn release_held(&mut self, key: RequestKey) {
        let held = self.requests.get_mut(&key).map(|live| std::mem::take(&mut live.held));
        for key in held.into_iter().flatten() {
            self.wait(key);
        }
    }

    /// How long ago a request came.
    pub(super) fn since_arrival(&self, key: RequestKey, now: Instant) -> Option<Duration> {
        self.requests.get(&key).map(|live| now.saturating_duration_since(live.times.arrived))
    }
}
