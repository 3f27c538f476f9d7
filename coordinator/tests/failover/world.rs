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

use phalanx_cluster::{id::Epoch, seal::Seal};
use phalanx_coordinator::{
    group::machine::{Event as GroupEvent, MirrorTo, Settings, SliceOf},
    request::RequestError,
    scheduler::event::{Event, Limits, Recovery},
    sequence::RequestKey,
};
use phalanx_proto::v1::StepResult;

use super::{
    clients::Client,
    coordinator::{Coordinator, name},
    faults::Trouble,
    shard::{Copied, Health, Shard, ToShard},
    totals::Totals,
};
use crate::fake::oracle::{Luck, MAX_MODEL_LEN, VOCAB};

/// Seed of the request that kills whoever computes it.
pub(super) const POISON: u64 = 0xdead;
/// Nothing takes longer once faults have stopped.
pub(super) const PATIENCE_MS: u64 = 60_000;
/// Time that is watched after every request has ended.
const AFTERMATH_MS: u64 = 60;
/// Silence after which the other end is lost.
pub(super) const SILENCE_MS: u64 = 30;

/// What a shard tells a coordinator.
#[derive(Debug, Clone)]
pub(super) enum FromShard {
    Hello {
        holds: Option<SliceOf>,
        copies: BTreeSet<SliceOf>,
    },
    Loaded {
        epoch: u64,
        kept: Option<u64>,
        sealed: Option<BTreeMap<u32, Seal>>,
        n_blocks: usize,
    },
    Prepared {
        world_size: usize,
        rank: usize,
    },
    Leaving,
    /// A sign of life: the last step that it has whole copies of, and of which epoch.
    Beat {
        mirrored: (u64, u64),
    },
    Ready {
        epoch: u64,
    },
    Result(StepResult),
}

/// Something that happens at its time.
#[derive(Debug, Clone)]
pub(super) enum Happening {
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
    Tick { coordinator: usize, at_ms: u64 },
    Submit { client: usize },
    Cancel { client: usize },
    Idle { coordinator: usize, epoch: u64 },
    Recovered { coordinator: usize, epoch: u64, stall: Duration },
    Undrain { shard: usize },
    Fault,
}

/// A cluster, its clients and its time.
pub struct World {
    pub(super) luck: Luck,
    pub(super) trouble: Trouble,
    pub(super) is_verbose: bool,
    pub(super) begun: Instant,
    pub(super) now_ms: u64,
    pub(super) queue: BTreeMap<(u64, u64), Happening>,
    pub(super) n_posted: u64,
    pub(super) limits: Limits,
    pub(super) world_size: usize,
    pub(super) shards: Vec<Shard>,
    pub(super) coordinators: Vec<Coordinator>,
    pub(super) leader: usize,
    pub(super) clients: Vec<Client>,
    /// Which coordinator each client's request lives at.
    pub(super) lives_at: Vec<usize>,
    pub(super) stored_epoch: u64,
    pub(super) store_away_until_ms: u64,
    pub(super) n_links: u64,
    pub(super) cut: BTreeSet<u64>,
    /// When the last message of a link and direction arrives.
    pub(super) last_arrival_ms: BTreeMap<(u64, bool), u64>,
    /// Who plans in an epoch, and its last step.
    pub(super) planner_of: BTreeMap<u64, (usize, Option<u64>)>,
    pub(super) settings: Settings,
    /// Which life of which shard gets copies of rows, by epoch and rank.
    pub(super) holders: BTreeMap<(u64, usize), (usize, u64)>,
    /// What they may have got, by epoch and rank: as it was after each of the last steps.
    pub(super) mirror: BTreeMap<(u64, usize), VecDeque<Copied>>,
    pub(super) faults_until_ms: u64,
    pub(super) totals: Totals,
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
        let settings = Settings {
            world_size,
            give_up_after: None,
            regroup_after: luck.one_in(3).then_some(Duration::from_millis(100)),
            mirror_to: [MirrorTo::Nowhere, MirrorTo::Spare, MirrorTo::Buddy][luck.below(3)],
            silent_after: Duration::from_millis(SILENCE_MS),
        };
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
            coordinators: vec![Coordinator::new(
                1,
                (0, Vec::new(), Vec::new()),
                settings.clone(),
                limits,
                recovery,
                begun,
            )],
            leader: 0,
            lives_at: vec![0; n_clients],
            clients,
            stored_epoch: 0,
            store_away_until_ms: 0,
            n_links: 0,
            cut: BTreeSet::new(),
            last_arrival_ms: BTreeMap::new(),
            planner_of: BTreeMap::new(),
            settings,
            holders: BTreeMap::new(),
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
        // What is still under way may not end anything a second time.
        let until = self.now_ms + AFTERMATH_MS;
        while let Some(entry) = self.queue.first_entry()
            && entry.key().0 <= until
        {
            let ((at, _), happening) = entry.remove_entry();
            self.now_ms = at;
            self.handle(happening);
        }
        self.finish()
    }

    pub(super) fn finish(mut self) -> Totals {
        let status = self.coordinators[self.leader].scheduler.status();
        assert_eq!((status.n_requests, status.n_blocks_used), (0, 0), "idle: {status:?}");
        for client in &self.clients {
            self.totals.n_cancelled += usize::from(client.was_cancelled);
            self.totals.n_answered += usize::from(client.was_answered);
            if let Some(error) = &client.error {
                assert_eq!(*error, RequestError::Poison { losses: 4 }, "{}", client.request.id);
                assert_eq!(client.request.sampling.seed, POISON, "{} is innocent", client.request.id);
                self.totals.n_poisoned += 1;
            }
        }
        self.totals
    }

    pub(super) fn describe(&self) -> String {
        let leader = &self.coordinators[self.leader];
        let health: Vec<_> =
            self.shards.iter().map(|s| (s.health, s.link, s.engine.as_ref().map(|e| e.epoch))).collect();
        format!(
            "{} in epoch {}, {:?}, shards {health:?}",
            leader.group.phase(),
            leader.group.epoch(),
            leader.scheduler.status()
        )
    }

    pub(super) fn now(&self) -> Instant {
        self.begun + Duration::from_millis(self.now_ms)
    }

    pub(super) fn after(&mut self, ms: u64, happening: Happening) {
        self.n_posted += 1;
        self.queue.insert((self.now_ms + ms, self.n_posted), happening);
    }

    /// Sends on a link: in order, after some time.
    pub(super) fn post(&mut self, link: u64, to_shard: bool, happening: Happening) {
        let delay = if self.luck.one_in(20) { self.luck.within(10, 40) } else { self.luck.below(3) };
        let last = self.last_arrival_ms.entry((link, to_shard)).or_default();
        *last = (*last).max(self.now_ms + delay as u64);
        let after = *last - self.now_ms;
        self.after(after, happening);
    }

    pub(super) fn handle(&mut self, happening: Happening) {
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
                    if let Some(epoch) = self.shards[shard].engine.as_ref().map(|e| e.epoch) {
                        self.try_to_begin(epoch);
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
            Happening::Tick { coordinator, at_ms } => self.tick(coordinator, at_ms),
            Happening::Submit { client } => {
                self.clients[client].has_asked = true;
                let request = self.clients[client].request.clone();
                self.lives_at[client] = self.leader;
                self.scheduler_event(self.leader, Event::Submit(RequestKey(client as u64), Box::new(request)));
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
            Happening::Idle { coordinator, epoch } => {
                self.group_event(coordinator, GroupEvent::Idle(Epoch::from_raw(epoch)), None);
            }
            Happening::Recovered { coordinator, epoch, stall } => {
                let event = GroupEvent::Recovered { epoch: Epoch::from_raw(epoch), stall };
                self.group_event(coordinator, event, None);
            }
            Happening::Undrain { shard } => {
                self.group_event(self.leader, GroupEvent::Undrain { ticket: 0, shard: name(shard) }, None);
            }
            Happening::Fault => self.fault(),
        }
    }
}
