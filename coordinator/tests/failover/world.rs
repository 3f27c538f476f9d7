//! What happens: events in the order of a simulated clock, every one of them from one seed.
//!
//! Links deliver in order, each with delays of its own; a cut link delivers nothing more, and both ends notice at their own
//! time. A step is computed when all ranks have its plan; each rank ends it at its own time, or leaves it half done. A
//! paused process misses everything and then gets it at once. Invariants are asserted where things happen: in the shards
//! (rows are what their sequence needs, steps follow each other), in the scheduler (`check`), in the clients, and here:
//! one coordinator plans in an epoch.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    time::{Duration, Instant},
};

use phalanx_cluster::id::Epoch;
use phalanx_coordinator::{
    group::machine::{Action as GroupAction, Event as GroupEvent},
    request::{RequestError, RequestEvent},
    scheduler::event::{Action, Event, Limits, Recovery},
    sequence::RequestKey,
};
use phalanx_proto::v1::StepResult;

use super::{
    clients::Client,
    coordinator::{Coordinator, Served, number},
    shard::{Health, Kept, Shard, ToShard},
};
use crate::fake::{
    Pages,
    oracle::{Luck, MAX_MODEL_LEN, VOCAB},
};

/// Seed of the request that kills whoever computes it.
const POISON: u64 = 0xdead;
/// Nothing takes longer once faults have stopped.
const PATIENCE_MS: u64 = 60_000;
/// Silence after which the other end is lost.
const SILENCE_MS: u64 = 30;
/// Steps that a mirror may lag.
const MIRRORED_STEPS: usize = 4;

/// What kind of life a cluster has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trouble {
    None,
    Shards,
    Coordinators,
    Poison,
}

/// What happened in all lives.
#[derive(Debug, Default)]
pub struct Totals {
    pub n_answered: usize,
    pub n_cancelled: usize,
    pub n_poisoned: usize,
    pub n_lost_groups: usize,
    pub n_kept: usize,
    pub n_mirrored: usize,
    pub n_held: usize,
    pub n_refused_epochs: usize,
    pub n_cut: usize,
    pub n_paused: usize,
    pub n_leaders: usize,
    pub n_resumed: usize,
}

impl Totals {
    /// Adds another life's.
    pub fn add(&mut self, other: &Self) {
        self.n_answered += other.n_answered;
        self.n_cancelled += other.n_cancelled;
        self.n_poisoned += other.n_poisoned;
        self.n_lost_groups += other.n_lost_groups;
        self.n_kept += other.n_kept;
        self.n_mirrored += other.n_mirrored;
        self.n_held += other.n_held;
        self.n_refused_epochs += other.n_refused_epochs;
        self.n_cut += other.n_cut;
        self.n_paused += other.n_paused;
        self.n_leaders += other.n_leaders;
        self.n_resumed += other.n_resumed;
    }
}

/// What a shard tells a coordinator.
#[derive(Debug, Clone)]
enum FromShard {
    Hello,
    Loaded { epoch: u64, kept: Option<u64>, n_blocks: usize },
    Ready { epoch: u64 },
    Result(StepResult),
}

/// Something that happens at its time.
#[derive(Debug, Clone)]
enum Happening {
    ToShard { shard: usize, link: u64, message: ToShard },
    ToCoordinator { coordinator: usize, shard: usize, link: u64, incarnation: u64, message: FromShard },
    DownAtCoordinator { coordinator: usize, shard: usize, link: u64 },
    DownAtShard { shard: usize, link: u64 },
    Attach { shard: usize },
    Restart { shard: usize },
    Unpause { shard: usize },
    Learn { shard: usize },
    Execute { shard: usize, epoch: u64, step: u64 },
    EpochAnswer { coordinator: usize, epoch: Option<u64> },
    PauseOver { coordinator: usize },
    Submit { client: usize },
    Cancel { client: usize },
    Release { coordinator: usize, epoch: u64 },
    Fault,
}

/// A cluster, its clients and its time.
pub struct World {
    luck: Luck,
    trouble: Trouble,
    is_verbose: bool,
    begun: Instant,
    now_ms: u64,
    queue: BTreeMap<(u64, u64), Happening>,
    n_posted: u64,
    limits: Limits,
    world_size: usize,
    shards: Vec<Shard>,
    coordinators: Vec<Coordinator>,
    leader: usize,
    clients: Vec<Client>,
    /// Which coordinator each client's request lives at.
    lives_at: Vec<usize>,
    stored_epoch: u64,
    store_away_until_ms: u64,
    n_links: u64,
    cut: BTreeSet<u64>,
    /// When the last message of a link and direction arrives.
    last_arrival_ms: BTreeMap<(u64, bool), u64>,
    planner_of: BTreeMap<u64, usize>,
    mirror: BTreeMap<(u64, usize), VecDeque<(u64, Pages)>>,
    faults_until_ms: u64,
    totals: Totals,
}

impl World {
    /// A cluster that is about to start.
    pub fn new(seed: u64, trouble: Trouble, is_verbose: bool) -> Self {
        let mut luck = Luck(seed);
        let limits = Limits {
            block_size: luck.within(1, 4),
            max_step_rows: luck.within(2, 16),
            max_running: luck.within(1, 4),
            max_model_len: MAX_MODEL_LEN,
            vocab: VOCAB,
            prefix_caching: !luck.one_in(4),
        };
        let world_size = luck.within(1, 2);
        let n_shards = world_size + luck.below(3);
        // The longest request fits alone: 18 + 13 positions.
        let n_blocks = luck.within(31, 60).div_ceil(limits.block_size);
        let recovery = Recovery {
            max_replays: if trouble == Trouble::Poison { 3 } else { 1000 },
            no_group_timeout: Duration::from_secs(3600),
        };
        let begun = Instant::now();
        let heads = Client::heads(&mut luck);
        let n_clients = luck.within(2, 4);
        let mut clients: Vec<_> = (0..n_clients).map(|idx| Client::new(&mut luck, idx, &heads, begun)).collect();
        if trouble == Trouble::Poison {
            let mut request = clients[0].request.clone();
            request.n = 1;
            request.sampling.seed = POISON;
            clients[0].request = request;
        }
        Self {
            luck,
            trouble,
            is_verbose,
            begun,
            now_ms: 0,
            queue: BTreeMap::new(),
            n_posted: 0,
            limits,
            world_size,
            shards: (0..n_shards).map(|_| Shard::new(1, n_blocks)).collect(),
            coordinators: vec![Coordinator::new(1, 0, world_size, limits, recovery)],
            leader: 0,
            lives_at: vec![0; n_clients],
            clients,
            stored_epoch: 0,
            store_away_until_ms: 0,
            n_links: 0,
            cut: BTreeSet::new(),
            last_arrival_ms: BTreeMap::new(),
            planner_of: BTreeMap::new(),
            mirror: BTreeMap::new(),
            faults_until_ms: 0,
            totals: Totals::default(),
        }
    }

    /// Lives until every request has ended.
    pub fn run(mut self) -> Totals {
        for shard in 0..self.shards.len() {
            let after = self.luck.below(10) as u64;
            self.after(after, Happening::Attach { shard });
        }
        for client in 0..self.clients.len() {
            let after = self.luck.below(60) as u64;
            self.after(after, Happening::Submit { client });
        }
        if matches!(self.trouble, Trouble::Shards | Trouble::Coordinators) {
            self.faults_until_ms = self.luck.within(50, 200) as u64;
            self.after(5, Happening::Fault);
        }
        while self.clients.iter().any(|c| !c.has_asked || c.is_open()) {
            let Some(((at, _), happening)) = self.queue.pop_first() else { panic!("nothing happens any more") };
            self.now_ms = at;
            assert!(at < PATIENCE_MS, "requests don't end: {}", self.describe());
            if self.is_verbose {
                println!("{at} ms: {happening:?}");
            }
            self.handle(happening);
        }
        self.finish()
    }

    fn finish(mut self) -> Totals {
        let status = self.coordinators[self.leader].scheduler.status();
        assert_eq!((status.n_requests, status.n_blocks_used), (0, 0), "idle: {status:?}");
        for client in &self.clients {
            self.totals.n_cancelled += usize::from(client.was_cancelled);
            self.totals.n_answered += usize::from(client.was_answered);
            if let Some(error) = &client.error {
                assert_eq!(*error, RequestError::Poison { losses: 3 }, "{}", client.request.id);
                assert_eq!(client.request.sampling.seed, POISON, "{} is innocent", client.request.id);
                self.totals.n_poisoned += 1;
            }
        }
        self.totals
    }

    fn describe(&self) -> String {
        let leader = &self.coordinators[self.leader];
        let health: Vec<_> = self.shards.iter().map(|s| (s.health, s.link, s.engine.as_ref().map(|e| e.epoch))).collect();
        format!("{} in epoch {}, {:?}, shards {health:?}", leader.group.phase(), leader.group.epoch(), leader.scheduler.status())
    }

    fn now(&self) -> Instant {
        self.begun + Duration::from_millis(self.now_ms)
    }

    fn after(&mut self, ms: u64, happening: Happening) {
        self.n_posted += 1;
        self.queue.insert((self.now_ms + ms, self.n_posted), happening);
    }

    /// Sends on a link: in order, after some time.
    fn post(&mut self, link: u64, to_shard: bool, happening: Happening) {
        let delay = if self.luck.one_in(20) { self.luck.within(10, 40) } else { self.luck.below(3) };
        let last = self.last_arrival_ms.entry((link, to_shard)).or_default();
        *last = (*last).max(self.now_ms + delay as u64);
        let after = *last - self.now_ms;
        self.after(after, happening);
    }

    fn handle(&mut self, happening: Happening) {
        match happening {
            Happening::ToShard { shard, link, message } => {
                if self.cut.contains(&link) || self.shards[shard].link.is_none_or(|(l, _)| l != link) {
                    return;
                }
                match self.shards[shard].health {
                    Health::Alive => self.at_shard(shard, link, message),
                    Health::Paused => self.shards[shard].inbox.push_back((link, message)),
                    Health::Dead => {}
                }
            }
            Happening::ToCoordinator { coordinator, shard, link, incarnation, message } => {
                if !self.cut.contains(&link) && self.coordinators[coordinator].is_alive {
                    self.at_coordinator(coordinator, shard, link, incarnation, message);
                }
            }
            Happening::DownAtCoordinator { coordinator, shard, link } => self.down(coordinator, shard, link),
            Happening::DownAtShard { shard, link } => self.lose_link(shard, link),
            Happening::Attach { shard } => self.attach(shard),
            Happening::Restart { shard } => {
                if self.shards[shard].health == Health::Dead {
                    let former = &self.shards[shard];
                    self.shards[shard] = Shard::new(former.incarnation + 1, former.n_blocks);
                    self.attach(shard);
                }
            }
            Happening::Unpause { shard } => {
                if self.shards[shard].health == Health::Paused {
                    self.shards[shard].health = Health::Alive;
                    for (link, message) in std::mem::take(&mut self.shards[shard].inbox) {
                        self.at_shard(shard, link, message);
                    }
                    self.attach(shard);
                }
            }
            Happening::Learn { shard } => {
                // A greater term: whatever the old leader still says is not heard any more.
                if let Some((link, coordinator)) = self.shards[shard].link
                    && coordinator != self.leader
                {
                    self.after(1, Happening::DownAtCoordinator { coordinator, shard, link });
                    self.lose_link(shard, link);
                }
            }
            Happening::Execute { shard, epoch, step } => self.execute(shard, epoch, step),
            Happening::EpochAnswer { coordinator, epoch } => {
                let event = match epoch {
                    Some(epoch) => GroupEvent::EpochTaken(Epoch::from_raw(epoch)),
                    None => GroupEvent::EpochRefused,
                };
                self.group_event(coordinator, event, None);
            }
            Happening::PauseOver { coordinator } => self.group_event(coordinator, GroupEvent::PauseOver, None),
            Happening::Submit { client } => {
                self.clients[client].has_asked = true;
                let request = self.clients[client].request.clone();
                self.lives_at[client] = self.leader;
                self.scheduler_event(self.leader, Event::Submit(RequestKey(client as u64), request));
                if self.luck.one_in(8) && self.trouble != Trouble::Poison {
                    let after = self.luck.below(60) as u64;
                    self.after(after, Happening::Cancel { client });
                }
            }
            Happening::Cancel { client } => {
                if self.clients[client].is_open() {
                    self.clients[client].was_cancelled = true;
                    self.scheduler_event(self.lives_at[client], Event::Cancel(RequestKey(client as u64)));
                }
            }
            Happening::Release { coordinator, epoch } => {
                self.scheduler_event(coordinator, Event::Resume { epoch });
            }
            Happening::Fault => self.fault(),
        }
    }

    // Shards.

    fn attach(&mut self, shard: usize) {
        let state = &mut self.shards[shard];
        if state.health != Health::Alive || state.link.is_some() {
            return;
        }
        self.n_links += 1;
        let (link, coordinator, incarnation) = (self.n_links, self.leader, state.incarnation);
        state.link = Some((link, coordinator));
        state.known_term = self.coordinators[coordinator].term;
        self.post(link, false, Happening::ToCoordinator {
            coordinator,
            shard,
            link,
            incarnation,
            message: FromShard::Hello,
        });
    }

    fn lose_link(&mut self, shard: usize, link: u64) {
        if self.shards[shard].link.is_none_or(|(l, _)| l != link) {
            return;
        }
        self.shards[shard].link = None;
        self.shards[shard].leave(&mut self.luck);
        let after = self.luck.within(1, 10) as u64;
        self.after(after, Happening::Attach { shard });
    }

    fn reply(&mut self, shard: usize, message: FromShard) {
        let state = &self.shards[shard];
        let Some((link, coordinator)) = state.link else { return };
        let incarnation = state.incarnation;
        self.post(link, false, Happening::ToCoordinator { coordinator, shard, link, incarnation, message });
    }

    fn at_shard(&mut self, shard: usize, link: u64, message: ToShard) {
        if self.shards[shard].link.is_none_or(|(l, _)| l != link) {
            return;
        }
        match message {
            ToShard::Form { epoch, rank, ranks, keep_kv_of } => {
                self.shards[shard].leave(&mut self.luck);
                self.maybe_mirror(shard, rank, ranks.len(), keep_kv_of);
                let kept = self.shards[shard].form(epoch, rank, ranks, keep_kv_of);
                let n_blocks = self.shards[shard].n_blocks;
                self.reply(shard, FromShard::Loaded { epoch, kept, n_blocks });
            }
            ToShard::Serve { epoch, n_blocks } => {
                let limits = self.limits;
                if self.shards[shard].engine.as_ref().is_some_and(|e| e.epoch == epoch) {
                    self.shards[shard].serve(n_blocks, limits);
                    self.reply(shard, FromShard::Ready { epoch });
                }
            }
            ToShard::Plan(plan) => {
                let epoch = plan.epoch;
                let engine = self.shards[shard].engine.as_mut().filter(|e| e.epoch == epoch);
                if let Some(fake) = engine.and_then(|e| e.serving.as_mut()) {
                    fake.queue.push_back(plan);
                    self.try_to_begin(epoch);
                }
            }
            ToShard::Retire { epoch } => {
                if self.shards[shard].engine.as_ref().is_some_and(|e| e.epoch == epoch) {
                    self.shards[shard].leave(&mut self.luck);
                }
            }
        }
    }

    /// A spare may have had the rows of the rank that it takes streamed to it, up to some step.
    fn maybe_mirror(&mut self, shard: usize, rank: usize, world_size: usize, keep_kv_of: Option<u64>) {
        let Some(epoch) = keep_kv_of else { return };
        let has_own = self.shards[shard].kept.as_ref().is_some_and(|k| k.epoch == epoch && k.rank == rank);
        let Some(steps) = self.mirror.get(&(epoch, rank)).filter(|s| !has_own && !s.is_empty()) else { return };
        if self.luck.one_in(3) {
            return;
        }
        let (through_step, pages) = steps[self.luck.below(steps.len())].clone();
        self.shards[shard].kept = Some(Kept { epoch, rank, world_size, through_step, pages });
        self.totals.n_mirrored += 1;
    }

    /// Begins the next step if all ranks can.
    fn try_to_begin(&mut self, epoch: u64) {
        let of_epoch = |s: &&Shard| s.engine.as_ref().is_some_and(|e| e.epoch == epoch);
        let Some(engine) = self.shards.iter().find(of_epoch).and_then(|s| s.engine.as_ref()) else { return };
        let ranks = engine.ranks.clone();
        let mut step = None;
        for shard in &ranks {
            let state = &self.shards[*shard];
            let Some(engine) = state.engine.as_ref().filter(|e| e.epoch == epoch) else { return };
            let Some(plan) = engine.serving.as_ref().and_then(|fake| fake.queue.front()) else { return };
            if state.health != Health::Alive || engine.begun.is_some() || step.is_some_and(|s| s != plan.step) {
                return;
            }
            step = Some(plan.step);
        }
        let Some(step) = step else { return };
        for shard in ranks {
            if let Some(engine) = &mut self.shards[shard].engine {
                engine.begun = Some(step);
            }
            let after = self.luck.within(1, 4) as u64;
            self.after(after, Happening::Execute { shard, epoch, step });
        }
    }

    fn execute(&mut self, shard: usize, epoch: u64, step: u64) {
        let state = &mut self.shards[shard];
        let is_mine = state.engine.as_ref().is_some_and(|e| e.epoch == epoch && e.begun == Some(step));
        if !is_mine || state.health == Health::Dead {
            return;
        }
        if state.health == Health::Paused {
            return self.after(3, Happening::Execute { shard, epoch, step });
        }
        let Some(engine) = &mut state.engine else { return };
        let Some(fake) = &mut engine.serving else { return };
        let rank = engine.rank;
        engine.begun = None;
        if fake.next_computes(POISON) {
            return self.kill(shard);
        }
        let Some(result) = fake.run_next() else { return };
        let steps = self.mirror.entry((epoch, rank)).or_default();
        steps.push_back((step, fake.pages().clone()));
        if steps.len() > MIRRORED_STEPS {
            steps.pop_front();
        }
        if rank == 0 {
            self.reply(shard, FromShard::Result(result));
        }
        self.try_to_begin(epoch);
    }

    fn kill(&mut self, shard: usize) {
        let state = &mut self.shards[shard];
        state.health = Health::Dead;
        state.engine = None;
        state.kept = None;
        state.inbox.clear();
        if let Some((link, coordinator)) = state.link.take() {
            self.cut.insert(link);
            // The stream breaks, or the host is gone and only silence tells.
            let after = if self.luck.one_in(4) { SILENCE_MS } else { self.luck.below(3) as u64 };
            self.after(after, Happening::DownAtCoordinator { coordinator, shard, link });
        }
        let after = self.luck.within(1, 120) as u64;
        self.after(after, Happening::Restart { shard });
    }

    // Coordinators.

    fn tell(&mut self, coordinator: usize, shard: usize, message: ToShard) {
        if let Some((link, _)) = self.coordinators[coordinator].links.get(&shard).copied() {
            self.post(link, true, Happening::ToShard { shard, link, message });
        }
    }

    fn at_coordinator(&mut self, at: usize, shard: usize, link: u64, incarnation: u64, message: FromShard) {
        if let FromShard::Hello = message {
            self.coordinators[at].links.insert(shard, (link, incarnation));
            return self.group_event(at, GroupEvent::Arrived(Coordinator::candidate(shard, incarnation)), None);
        }
        if self.coordinators[at].links.get(&shard).is_none_or(|(l, _)| *l != link) {
            return;
        }
        let Some(from) = self.coordinators[at].origin(shard) else { return };
        match message {
            FromShard::Hello => {}
            FromShard::Loaded { epoch, kept, n_blocks } => {
                if self.coordinators[at].group.epoch().raw() == epoch {
                    for rank in self.coordinators[at].ranks.iter_mut().filter(|(s, _)| *s == shard) {
                        rank.1 = kept;
                    }
                }
                let kv_blocks = n_blocks as u32;
                self.group_event(at, GroupEvent::Loaded { from, epoch: Epoch::from_raw(epoch), kv_blocks }, None);
            }
            FromShard::Ready { epoch } => {
                self.group_event(at, GroupEvent::Ready { from, epoch: Epoch::from_raw(epoch) }, None);
            }
            FromShard::Result(result) => {
                let epoch = Epoch::from_raw(result.epoch);
                self.group_event(at, GroupEvent::Stepped { from, epoch }, Some(result));
            }
        }
    }

    fn down(&mut self, at: usize, shard: usize, link: u64) {
        if self.coordinators[at].links.get(&shard).is_none_or(|(l, _)| *l != link) {
            return;
        }
        let Some(from) = self.coordinators[at].origin(shard) else { return };
        self.coordinators[at].links.remove(&shard);
        self.cut.insert(link);
        self.after(1, Happening::DownAtShard { shard, link });
        self.group_event(at, GroupEvent::Left { from, cause: "the link is down".to_owned() }, None);
    }

    fn group_event(&mut self, at: usize, event: GroupEvent, result: Option<StepResult>) {
        if !self.coordinators[at].is_alive {
            return;
        }
        let mut result = result;
        for action in self.coordinators[at].group.step(event) {
            if self.is_verbose {
                println!("    coordinator {at}: {action:?}");
            }
            match action {
                GroupAction::TakeEpoch(after) => self.take_epoch(at, after.raw()),
                GroupAction::Form { epoch, ranks } => {
                    let ranks: Vec<usize> = ranks.iter().map(number).collect();
                    let distinct: BTreeSet<_> = ranks.iter().collect();
                    assert_eq!(distinct.len(), self.world_size, "no shard has two ranks");
                    self.coordinators[at].ranks = ranks.iter().map(|shard| (*shard, None)).collect();
                    let keep_kv_of = self.coordinators[at].served.map(|s| s.epoch);
                    for (rank, shard) in ranks.iter().enumerate() {
                        let (epoch, ranks) = (epoch.raw(), ranks.clone());
                        self.tell(at, *shard, ToShard::Form { epoch, rank, ranks, keep_kv_of });
                    }
                }
                GroupAction::Serve { epoch, kv_blocks } => {
                    for (shard, _) in self.coordinators[at].ranks.clone() {
                        self.tell(at, shard, ToShard::Serve { epoch: epoch.raw(), n_blocks: kv_blocks as usize });
                    }
                }
                GroupAction::Serving { epoch, kv_blocks } => {
                    let (epoch, n_blocks) = (epoch.raw(), kv_blocks as usize);
                    let kept = self.coordinators[at].kept(n_blocks);
                    self.totals.n_kept += usize::from(kept.is_some());
                    self.coordinators[at].served = Some(Served { epoch, n_blocks });
                    assert!(self.planner_of.insert(epoch, at).is_none(), "epoch {epoch} is served twice");
                    self.scheduler_event(at, Event::GroupServing { epoch, n_blocks, kept });
                }
                GroupAction::Lost { epoch, .. } => {
                    self.totals.n_lost_groups += 1;
                    self.scheduler_event(at, Event::GroupLost { epoch: epoch.raw(), is_planned: false });
                }
                GroupAction::Retire { epoch, shard } => {
                    self.tell(at, number(&shard), ToShard::Retire { epoch: epoch.raw() });
                }
                GroupAction::Deliver => {
                    if let Some(result) = result.take() {
                        self.scheduler_event(at, Event::Stepped(result));
                    }
                }
                GroupAction::CountFenced => {}
                GroupAction::Pause(pause) => {
                    let ms = pause.as_millis() as u64;
                    self.after(ms, Happening::PauseOver { coordinator: at });
                }
                GroupAction::GiveUp(cause) => panic!("given up: {cause}"),
            }
        }
    }

    /// Compare-and-swap in the store, as the group's actor does it.
    fn take_epoch(&mut self, at: usize, after: u64) {
        let mut epoch = None;
        if self.now_ms >= self.store_away_until_ms {
            self.stored_epoch = self.stored_epoch.max(after) + 1;
            epoch = Some(self.stored_epoch);
        }
        // The swap may be done and the answer lost.
        if self.trouble != Trouble::None && self.luck.one_in(30) {
            epoch = None;
        }
        self.totals.n_refused_epochs += usize::from(epoch.is_none());
        let ms = self.luck.below(5) as u64;
        self.after(ms, Happening::EpochAnswer { coordinator: at, epoch });
    }

    fn scheduler_event(&mut self, at: usize, event: Event) {
        if !self.coordinators[at].is_alive {
            return;
        }
        let now = self.now();
        let actions = self.coordinators[at].scheduler.step(now, event);
        self.coordinators[at].scheduler.check();
        for action in actions {
            match action {
                Action::SendPlan(plan) => {
                    if self.is_verbose {
                        println!("    coordinator {at}: {plan:?}");
                    }
                    assert_eq!(self.planner_of.get(&plan.epoch), Some(&at), "one coordinator plans in an epoch");
                    for (shard, _) in self.coordinators[at].ranks.clone() {
                        self.tell(at, shard, ToShard::Plan(plan.clone()));
                    }
                }
                Action::Idle(epoch) => {
                    let ms = self.luck.below(10) as u64;
                    self.after(ms, Happening::Release { coordinator: at, epoch });
                }
                Action::Emit(key, event) => self.emit(at, key, event),
                Action::Warn(reason) => panic!("{reason}"),
                Action::Admitted(_) | Action::Measure(_) => {}
            }
        }
    }

    fn emit(&mut self, at: usize, key: RequestKey, event: RequestEvent) {
        let client = key.0 as usize;
        if self.is_verbose {
            println!("    coordinator {at} to client {client}: {event:?}");
        }
        // An old leader's clients have gone to the new one.
        if self.lives_at[client] == at {
            self.clients[client].take(event);
        }
    }

    // Faults.

    fn fault(&mut self) {
        if self.now_ms >= self.faults_until_ms {
            return;
        }
        let next = self.luck.within(2, 40) as u64;
        self.after(next, Happening::Fault);
        if self.trouble == Trouble::Coordinators && self.luck.one_in(3) && self.coordinators.len() < 4 {
            return self.change_leader();
        }
        let shard = self.luck.below(self.shards.len());
        match self.luck.below(7) {
            0 | 1 => {
                if self.shards[shard].health != Health::Dead {
                    self.kill(shard);
                }
            }
            2 => {
                if self.shards[shard].health == Health::Alive {
                    self.totals.n_paused += 1;
                    self.shards[shard].health = Health::Paused;
                    let ms = self.luck.within(1, 80) as u64;
                    self.after(ms, Happening::Unpause { shard });
                    if let Some((link, coordinator)) = self.shards[shard].link
                        && ms > SILENCE_MS
                    {
                        self.after(SILENCE_MS, Happening::DownAtCoordinator { coordinator, shard, link });
                    }
                }
            }
            3 => {
                if let Some((link, coordinator)) = self.shards[shard].link {
                    self.totals.n_cut += 1;
                    self.cut.insert(link);
                    let (there, here) = (self.luck.below(SILENCE_MS as usize), self.luck.below(SILENCE_MS as usize));
                    self.after(there as u64, Happening::DownAtCoordinator { coordinator, shard, link });
                    self.after(here as u64, Happening::DownAtShard { shard, link });
                }
            }
            4 => self.store_away_until_ms = self.now_ms + self.luck.within(1, 100) as u64,
            5 => {
                let epoch = self.coordinators[self.leader].group.epoch().raw();
                if self.coordinators[self.leader].scheduler.status().epoch == Some(epoch) {
                    self.totals.n_held += 1;
                    self.scheduler_event(self.leader, Event::Hold { epoch });
                }
            }
            _ => {
                // All of them at once.
                if self.luck.one_in(4) {
                    for shard in 0..self.shards.len() {
                        if self.shards[shard].health != Health::Dead {
                            self.kill(shard);
                        }
                    }
                }
            }
        }
    }

    /// The leader dies, or is cut off from the store and does not know that it leads no more.
    fn change_leader(&mut self) {
        self.totals.n_leaders += 1;
        let old = self.leader;
        let is_dead = self.luck.one_in(2);
        let (term, recovery) = (self.coordinators[old].term + 1, self.coordinators[old].scheduler.recovery());
        self.coordinators.push(Coordinator::new(term, self.stored_epoch, self.world_size, self.limits, recovery));
        self.leader = self.coordinators.len() - 1;
        self.coordinators[old].is_alive = !is_dead;
        for shard in 0..self.shards.len() {
            let Some((link, _)) = self.shards[shard].link.filter(|(_, c)| *c != self.leader) else { continue };
            let ms = self.luck.within(0, 25) as u64;
            let happening =
                if is_dead { Happening::DownAtShard { shard, link } } else { Happening::Learn { shard } };
            self.after(ms, happening);
        }
        for client in 0..self.clients.len() {
            if self.clients[client].is_open() {
                let request = self.clients[client].reborn(&mut self.luck);
                self.totals.n_resumed += usize::from(request.resume.iter().any(|c| !c.tokens.is_empty()));
                self.lives_at[client] = self.leader;
                self.scheduler_event(self.leader, Event::Submit(RequestKey(client as u64), request));
            }
        }
    }
}
