//! Thousands of random schedules against a fake shard. Whatever chunking, preemption, sharing, loss and cancellation do,
//! every request gets exactly what a model that runs it alone and undisturbed would give. A failing seed replays.

mod fake;

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use fake::{FakeShard, Letters, letter, mix, next_token, prefix_hash, score};
use phalanx_coordinator::{
    request::{Finish, Request, RequestError, RequestEvent, StopConditions, Usage},
    scheduler::{
        event::{Action, Event, Limits, Recovery},
        machine::Machine,
    },
    sequence::RequestKey,
};
use phalanx_proto::v1::{SamplingParams, StepResult, TokenScore};

const VOCAB: usize = 11;
const EOS: u32 = 10;
const MAX_MODEL_LEN: usize = 64;

struct Luck(u64);

impl Luck {
    fn below(&mut self, n: usize) -> usize {
        self.0 = mix(self.0, 1);
        (self.0 % n as u64) as usize
    }

    fn within(&mut self, low: usize, high: usize) -> usize {
        low + self.below(high - low + 1)
    }

    fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }
}

#[derive(Debug, Default, Clone, PartialEq)]
struct Choice {
    tokens: Vec<u32>,
    text: String,
    scores: Vec<TokenScore>,
    finish: Option<Finish>,
}

/// What a request must get, straight from the definitions.
fn expected(request: &Request, index: u32) -> Choice {
    let stop = &request.stop;
    let mut sampling = SamplingParams { seed: request.seed_of(index), ..request.sampling.clone() };
    sampling.suppressed_token_ids = stop.token_ids.clone();
    if !stop.ignore_eos {
        sampling.suppressed_token_ids.push(EOS);
    }
    let mut known = request.prompt.clone();
    let mut choice = Choice::default();
    // Text before this is not searched: the detokenizer gave it out before min_tokens was reached.
    let (mut searched_from, mut pending) = (0, 0);
    let max_tokens = (request.max_tokens as usize).min(MAX_MODEL_LEN - request.prompt.len());
    while choice.tokens.len() < max_tokens {
        let hash = prefix_hash(&known);
        let token = next_token(hash, choice.tokens.len(), &sampling, VOCAB);
        known.push(token);
        choice.tokens.push(token);
        if request.sampling.logprobs.is_some() {
            choice.scores.push(score(hash, token));
        }
        if token == EOS && !stop.ignore_eos {
            choice.finish = Some(Finish::EndOfSequence);
        } else if stop.token_ids.contains(&token) {
            choice.finish = Some(Finish::StopToken(token));
        }
        if choice.finish.is_some() {
            if stop.include_in_output {
                choice.text.push(letter(token));
            }
            cut(&mut choice.text, stop, searched_from);
            return choice;
        }
        choice.text.push(letter(token));
        pending = if token % 3 == 2 { pending + 1 } else { 0 };
        if choice.tokens.len() < request.sampling.min_tokens as usize {
            searched_from = choice.text.len() - pending;
            continue;
        }
        // Letters that the detokenizer holds are seen later, but are cut at the same place.
        let visible = if choice.tokens.len() == max_tokens { 0 } else { pending };
        let mut seen = choice.text[..choice.text.len() - visible].to_owned();
        if let Some(matched) = cut(&mut seen, stop, searched_from) {
            choice.text = seen;
            choice.finish = Some(Finish::StopString(matched));
            return choice;
        }
    }
    choice.finish = Some(Finish::Length);
    choice
}

/// Cuts text at the stop string that ends first.
fn cut(text: &mut String, stop: &StopConditions, from: usize) -> Option<String> {
    for end in from + 1..=text.len() {
        let ending = stop.strings.iter().filter(|s| text[from..end].ends_with(s.as_str()));
        if let Some(longest) = ending.max_by_key(|s| s.len()).cloned() {
            text.truncate(if stop.include_in_output { end } else { end - longest.len() });
            return Some(longest);
        }
    }
    None
}

#[derive(Default)]
struct Client {
    choices: BTreeMap<u32, Choice>,
    prompt_scores: Option<Vec<TokenScore>>,
    usage: Option<Usage>,
    error: Option<RequestError>,
    was_cancelled: bool,
}

#[derive(Debug, Default)]
struct Totals {
    n_finished: usize,
    n_preempted: usize,
    n_hit_tokens: usize,
    n_lost: usize,
    n_overlapped: usize,
    n_too_large: usize,
    n_cancelled: usize,
    n_expired: usize,
    n_stopped: usize,
}

struct World {
    machine: Machine,
    limits: Limits,
    n_blocks: usize,
    epoch: u64,
    shard: Option<FakeShard>,
    stale: Vec<StepResult>,
    requests: Vec<Request>,
    clients: Vec<Client>,
    n_submitted: usize,
    now: Instant,
    totals: Totals,
}

impl World {
    fn new(luck: &mut Luck, n_requests: usize) -> Self {
        let limits = Limits {
            block_size: luck.within(1, 5),
            max_step_rows: luck.within(1, 24),
            max_running: luck.within(1, 8),
            max_model_len: MAX_MODEL_LEN,
            vocab: VOCAB,
            prefix_caching: !luck.one_in(4),
        };
        let now = Instant::now();
        let heads: Vec<Vec<u32>> = (0..3).map(|_| tokens(luck, 20)).collect();
        Self {
            machine: Machine::new(limits, Recovery::default(), vec![EOS], Box::new(Letters)),
            limits,
            n_blocks: luck.within(4, 40),
            epoch: 0,
            shard: None,
            stale: Vec::new(),
            requests: (0..n_requests).map(|idx| request(luck, idx, &heads, now)).collect(),
            clients: (0..n_requests).map(|_| Client::default()).collect(),
            n_submitted: 0,
            now,
            totals: Totals::default(),
        }
    }

    fn event(&mut self, event: Event) {
        let actions = self.machine.step(self.now, event);
        self.machine.check();
        for action in actions {
            match action {
                Action::SendPlan(plan) => {
                    let shard = self.shard.as_mut().expect("plans need a group");
                    shard.queue.push_back(plan);
                    assert!(shard.queue.len() <= 2, "steps in flight");
                    self.totals.n_overlapped += usize::from(shard.queue.len() == 2);
                }
                Action::Emit(key, event) => self.deliver(key, event),
                Action::Warn(reason) => panic!("{reason}"),
                Action::Measure(measure) => self.count(&measure),
                Action::Admitted(_) | Action::Idle(_) => {}
            }
        }
    }

    fn count(&mut self, measure: &phalanx_coordinator::scheduler::event::Measure) {
        use phalanx_coordinator::scheduler::event::Measure;
        match measure {
            Measure::Preempted => self.totals.n_preempted += 1,
            Measure::PrefixLookup { n_hit, .. } => self.totals.n_hit_tokens += n_hit,
            _ => {}
        }
    }

    fn deliver(&mut self, key: RequestKey, event: RequestEvent) {
        let client = &mut self.clients[key.0 as usize];
        assert!(client.usage.is_none() && client.error.is_none(), "nothing comes after the end");
        assert!(!client.was_cancelled, "nothing comes after a cancellation");
        match event {
            RequestEvent::PromptScored(scores) => {
                assert!(client.choices.is_empty(), "prompt scores come first");
                assert!(client.prompt_scores.replace(scores).is_none(), "prompt scores come once");
            }
            RequestEvent::Output(output) => {
                let choice = client.choices.entry(output.index).or_default();
                assert_eq!(choice.finish, None, "nothing comes after a choice's end");
                choice.tokens.extend(output.token_ids);
                choice.text.push_str(&output.text);
                choice.scores.extend(output.scores);
                choice.finish = output.finish;
            }
            RequestEvent::Finished(usage) => client.usage = Some(usage),
            RequestEvent::Failed(error) => client.error = Some(error),
        }
    }

    fn submit(&mut self) {
        let key = RequestKey(self.n_submitted as u64);
        let request = self.requests[self.n_submitted].clone();
        self.n_submitted += 1;
        self.event(Event::Submit(key, request));
    }

    fn serve(&mut self) {
        self.epoch += 1;
        self.shard = Some(FakeShard::new(self.epoch, self.n_blocks, self.limits));
        self.event(Event::GroupServing { epoch: self.epoch, n_blocks: self.n_blocks, kept: None });
    }

    fn lose(&mut self) {
        if let Some(mut shard) = self.shard.take() {
            self.stale.extend(shard.run_next());
            self.totals.n_lost += 1;
            self.event(Event::GroupLost { epoch: self.epoch, is_planned: true });
        }
    }

    fn finish_step(&mut self) -> bool {
        let result = self.shard.as_mut().and_then(FakeShard::run_next);
        let Some(result) = result else { return false };
        self.event(Event::Stepped(result));
        true
    }

    fn cancel(&mut self, luck: &mut Luck) {
        if self.n_submitted > 0 {
            let idx = luck.below(self.n_submitted);
            let client = &mut self.clients[idx];
            if client.usage.is_none() && client.error.is_none() {
                client.was_cancelled = true;
            }
            self.event(Event::Cancel(RequestKey(idx as u64)));
        }
    }

    fn random_event(&mut self, luck: &mut Luck, trouble: usize) {
        self.now += Duration::from_millis(1);
        match luck.below(10) {
            0..=3 if self.n_submitted < self.requests.len() => self.submit(),
            _ if luck.one_in(trouble) => match luck.below(4) {
                0 => self.lose(),
                1 => self.cancel(luck),
                2 => {
                    if let Some(result) = self.stale.pop() {
                        self.event(Event::Stepped(result));
                    }
                }
                _ => self.event(Event::Tick),
            },
            _ if self.shard.is_none() => {
                if luck.one_in(3) {
                    self.serve();
                }
            }
            _ => {
                self.finish_step();
            }
        }
    }

    fn drain(&mut self) {
        if self.shard.is_none() {
            self.serve();
        }
        let mut n_steps = 0;
        while self.finish_step() {
            n_steps += 1;
            assert!(n_steps < 100_000, "the schedule does not end");
        }
        let status = self.machine.status();
        assert_eq!((status.n_requests, status.n_blocks_used, status.n_in_flight), (0, 0, 0), "idle: {status:?}");
    }

    fn verify(&mut self) {
        for (request, client) in self.requests.iter().zip(&self.clients) {
            for (index, got) in &client.choices {
                let want = expected(request, *index);
                assert!(want.tokens.starts_with(&got.tokens), "{}[{index}]: {got:?}, want {want:?}", request.id);
                assert!(want.text.starts_with(&got.text), "{}[{index}]: {got:?}, want {want:?}", request.id);
                if got.finish.is_some() {
                    assert_eq!(*got, want, "{}[{index}] {:?}", request.id, request.stop);
                }
            }
            if client.was_cancelled {
                self.totals.n_cancelled += 1;
            } else if let Some(error) = &client.error {
                let max_tokens = (request.max_tokens as usize).min(MAX_MODEL_LEN - request.prompt.len());
                let n_positions = request.prompt.len() + max_tokens.saturating_sub(1);
                let is_too_large = n_positions.div_ceil(self.limits.block_size) > self.n_blocks;
                match error {
                    RequestError::TooLarge { .. } => assert!(is_too_large, "{error}"),
                    RequestError::DeadlineExceeded => assert!(request.deadline.is_some_and(|at| at <= self.now)),
                    other => panic!("{other}"),
                }
                self.totals.n_too_large += usize::from(is_too_large);
                self.totals.n_expired += usize::from(*error == RequestError::DeadlineExceeded);
            } else {
                verify_usage(request, client);
                self.totals.n_finished += 1;
                let is_string = |c: &Choice| matches!(c.finish, Some(Finish::StopString(_)));
                self.totals.n_stopped += client.choices.values().filter(|c| is_string(c)).count();
            }
        }
    }
}

fn verify_usage(request: &Request, client: &Client) {
    let usage = client.usage.expect("a request ends");
    assert_eq!(client.choices.len(), request.n as usize, "{}: choices", request.id);
    assert!(client.choices.values().all(|c| c.finish.is_some()), "{}: every choice ends", request.id);
    let n_output: usize = client.choices.values().map(|c| c.tokens.len()).sum();
    assert_eq!(usage.completion_tokens as usize, n_output);
    assert_eq!(usage.prompt_tokens as usize, request.prompt.len());
    assert!(usage.cached_tokens < usage.prompt_tokens);
    let want = request.sampling.prompt_logprobs.map(|_| {
        let scored = 1..request.prompt.len();
        scored.map(|p| score(prefix_hash(&request.prompt[..p]), request.prompt[p])).collect::<Vec<_>>()
    });
    assert_eq!(client.prompt_scores, want, "{}: prompt scores", request.id);
}

fn tokens(luck: &mut Luck, n: usize) -> Vec<u32> {
    (0..n).map(|_| luck.below(VOCAB) as u32).collect()
}

fn request(luck: &mut Luck, idx: usize, heads: &[Vec<u32>], now: Instant) -> Request {
    let head = &heads[luck.below(heads.len())];
    let mut prompt = head[..luck.within(0, head.len())].to_vec();
    let tail = luck.within(1, 8);
    prompt.extend(tokens(luck, tail));
    let prompt_logprobs = luck.one_in(5).then_some(0);
    let max_tokens = if prompt_logprobs.is_some() && luck.one_in(2) { 0 } else { luck.within(1, 14) };
    let n_stops = luck.below(3);
    let strings = (0..n_stops).map(|_| {
        let len = luck.within(1, 3);
        tokens(luck, len).into_iter().map(letter).collect()
    });
    let strings: Vec<String> = strings.collect();
    let sampling = SamplingParams {
        seed: luck.below(4) as u64,
        min_tokens: if luck.one_in(3) { luck.within(0, max_tokens) as u32 } else { 0 },
        logprobs: luck.one_in(3).then_some(0),
        prompt_logprobs,
        ..SamplingParams::default()
    };
    Request {
        id: format!("request-{idx}"),
        prompt,
        n: if luck.one_in(4) { luck.within(2, 3) as u32 } else { 1 },
        sampling,
        max_tokens: max_tokens as u32,
        is_open_ended: false,
        stop: StopConditions {
            strings,
            token_ids: if luck.one_in(4) { tokens(luck, 1) } else { Vec::new() },
            ignore_eos: luck.one_in(3),
            include_in_output: luck.one_in(3),
            skip_special_tokens: true,
        },
        deadline: luck.one_in(10).then(|| now + Duration::from_millis(luck.below(80) as u64)),
        priority: 0,
        resume: Vec::new(),
    }
}

fn simulate(seeds: std::ops::Range<u64>, trouble: usize) -> Totals {
    let mut totals = Totals::default();
    for seed in seeds {
        let replay = std::panic::catch_unwind(|| {
            let mut luck = Luck(seed);
            let n_requests = luck.within(1, 12);
            let mut world = World::new(&mut luck, n_requests);
            let n_events = luck.within(20, 150);
            for _ in 0..n_events {
                world.random_event(&mut luck, trouble);
            }
            while world.n_submitted < world.requests.len() {
                world.submit();
            }
            world.drain();
            world.verify();
            world.totals
        });
        let Ok(one) = replay else { panic!("seed {seed} with trouble {trouble} fails, see above") };
        totals.n_finished += one.n_finished;
        totals.n_preempted += one.n_preempted;
        totals.n_hit_tokens += one.n_hit_tokens;
        totals.n_lost += one.n_lost;
        totals.n_overlapped += one.n_overlapped;
        totals.n_too_large += one.n_too_large;
        totals.n_cancelled += one.n_cancelled;
        totals.n_expired += one.n_expired;
        totals.n_stopped += one.n_stopped;
    }
    totals
}

#[test]
fn undisturbed_requests_get_what_they_would_get_alone() {
    let totals = simulate(0..1500, usize::MAX);
    assert!(totals.n_finished > 5000 && totals.n_lost == 0, "{totals:?}");
    // The schedules would prove little if nothing of this happened.
    assert!(totals.n_preempted > 300 && totals.n_hit_tokens > 5000 && totals.n_overlapped > 5000, "{totals:?}");
    assert!(totals.n_stopped > 300 && totals.n_too_large > 10, "{totals:?}");
}

#[test]
fn losses_and_cancellations_are_invisible_to_others() {
    let totals = simulate(10_000..12_000, 6);
    assert!(totals.n_finished > 5000 && totals.n_lost > 1000 && totals.n_preempted > 300, "{totals:?}");
    assert!(totals.n_cancelled > 500 && totals.n_expired > 100 && totals.n_hit_tokens > 5000, "{totals:?}");
}

#[test]
fn many_sequences_share_few_blocks() {
    let mut n_preempted = 0;
    for seed in 0..20 {
        let mut luck = Luck(seed);
        let mut world = World::new(&mut luck, 32);
        world.n_blocks = 16;
        world.limits = Limits { block_size: 4, max_step_rows: 16, max_running: 32, ..world.limits };
        world.machine = Machine::new(world.limits, Recovery::default(), vec![EOS], Box::new(Letters));
        world.serve();
        (0..32).for_each(|_| world.submit());
        world.drain();
        world.verify();
        n_preempted += world.totals.n_preempted;
    }
    assert!(n_preempted > 100, "{n_preempted} preemptions");
}
