//! Thousands of random schedules against a fake shard. Whatever chunking, preemption, sharing, loss and cancellation do,
//! every request gets exactly what a model that runs it alone and undisturbed would give. A failing seed replays.

mod fake;

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use fake::{
    FakeShard, Letters,
    oracle::{Choice, EOS, Luck, MAX_MODEL_LEN, VOCAB, expected, request, tokens},
    prefix_hash, score,
};
use phalanx_coordinator::{
    request::{Finish, Request, RequestError, RequestEvent, Usage},
    scheduler::{
        event::{Action, Event, Limits, Recovery},
        machine::Machine,
    },
    sequence::RequestKey,
};
use phalanx_proto::v1::{StepResult, TokenScore};

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
                Action::Admitted(_) | Action::Idle(_) | Action::Recovered { .. } => {}
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
        self.event(Event::Submit(key, Box::new(request)));
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
    for seed in 0..30 {
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
