//! Random schedules of crashes, hangs, returns, late messages, drains and rolling restarts, each from a seed.
//!
//! `PHALANX_SIM_SEED` runs one of them. Each shard's messages stay in order, as its stream keeps them; those of different
//! shards, of the store and of the scheduler overtake each other at will.

use std::collections::VecDeque;

use phalanx_cluster::seal::Seal;

use super::*;

/// Schedules that every test run goes through.
const SEEDS: u64 = 10_000;
const MOVES: u32 = 150;

/// SplitMix64 (Steele, Lea and Flood, 2014).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }
}

/// One shard's process, or its absence.
#[derive(Default)]
struct Process {
    life: Option<u64>,
    /// Answers nothing.
    is_stuck: bool,
    /// Was told to end, and will.
    ends: bool,
    /// Of which epoch its pages are, and through which step.
    pages: Option<(u64, u64)>,
    /// On their way to the machine.
    said: VecDeque<Event>,
}

struct World {
    seed: u64,
    machine: GroupMachine,
    now: Instant,
    processes: Vec<Process>,
    lives: u64,
    /// Answers of the store and of the scheduler.
    others: Vec<Event>,
    store_epoch: u64,
    world_size: usize,
    formed: Option<(Epoch, Vec<ShardId>)>,
    /// Ranks that said in this formation that they kept pages.
    kept: Vec<bool>,
    /// Ranks that said in this formation what their blocks hold.
    sealed: Vec<bool>,
    serving: Option<Epoch>,
    last_served: Option<u64>,
    held: bool,
    steps: u64,
    tickets: BTreeSet<Ticket>,
    next_ticket: Ticket,
    drained: BTreeSet<ShardId>,
    is_rolling: bool,
    delivered: u32,
    inherited: u32,
}

impl World {
    fn new(seed: u64, random: &mut Random) -> Self {
        let world_size = 1 + random.below(3);
        let n_shards = world_size + random.below(3);
        let settings = Settings {
            regroup_after: (random.below(2) == 0).then_some(Duration::from_secs(5)),
            mirror_to: [MirrorTo::Nowhere, MirrorTo::Spare, MirrorTo::Buddy][random.below(3)],
            ..settings(world_size)
        };
        let now = Instant::now();
        Self {
            seed,
            machine: GroupMachine::new(settings, epoch(0), Vec::new(), now),
            now,
            processes: (0..n_shards).map(|_| Process::default()).collect(),
            lives: 0,
            others: Vec::new(),
            store_epoch: 0,
            world_size,
            formed: None,
            kept: Vec::new(),
            sealed: Vec::new(),
            serving: None,
            last_served: None,
            held: false,
            steps: 0,
            tickets: BTreeSet::new(),
            next_ticket: 1,
            drained: BTreeSet::new(),
            is_rolling: false,
            delivered: 0,
            inherited: 0,
        }
    }

    fn name(index: usize) -> ShardId {
        shard(&index.to_string())
    }

    fn arrive(&mut self, index: usize) {
        let process = &mut self.processes[index];
        if process.life.is_none() {
            self.lives += 1;
            let said = std::mem::take(&mut process.said);
            *process = Process { life: Some(self.lives), said, ..Process::default() };
            let takes_mirror = index.is_multiple_of(2);
            // Pages from an earlier leader, as far as it says.
            let holds = (!self.lives.is_multiple_of(3)).then_some((self.world_size, index));
            let copies = (0..self.world_size).filter(|_| self.lives.is_multiple_of(5)).map(|r| (self.world_size, r));
            let copies = copies.collect();
            let arrived = Candidate { takes_mirror, holds, copies, ..candidate(&index.to_string(), self.lives) };
            process.said.push_back(Event::Arrived(arrived));
        }
    }

    fn kill(&mut self, index: usize, random: &mut Random) {
        let process = &mut self.processes[index];
        if let Some(life) = process.life.take() {
            // What it said last may not arrive; that it came does.
            let last = process.said.iter().rposition(|e| matches!(e, Event::Arrived(_) | Event::Left { .. }));
            let least = last.map_or(0, |at| at + 1);
            let n = least + random.below(process.said.len() + 1 - least);
            process.said.truncate(n);
            let from = origin(&index.to_string(), life);
            process.said.push_back(Event::Left { from, cause: Cause::Lost, reason: "killed".to_owned() });
        }
    }

    /// What a shard says, if it is alive and moves.
    fn say(&mut self, name: &ShardId, event: impl FnOnce(Origin, &mut Process) -> Option<Event>) {
        let index: usize = name.0.parse().unwrap();
        let process = &mut self.processes[index];
        if let (Some(life), false) = (process.life, process.is_stuck)
            && let Some(event) = event(origin(&name.0, life), process)
        {
            process.said.push_back(event);
        }
    }

    fn deliver(&mut self, random: &mut Random) {
        let mut sources: Vec<usize> =
            (0..self.processes.len()).filter(|i| !self.processes[*i].said.is_empty()).collect();
        if !self.others.is_empty() {
            sources.push(usize::MAX);
        }
        let Some(source) = sources.get(random.below(sources.len())).copied() else { return };
        let event = match source {
            usize::MAX => self.others.swap_remove(random.below(self.others.len())),
            index => self.processes[index].said.pop_front().unwrap(),
        };
        self.step(event, random);
    }

    fn plan(&mut self, random: &mut Random) {
        let Some(in_epoch) = self.serving.filter(|_| !self.held) else { return };
        self.steps += 1;
        let step = self.steps;
        self.step(Event::Planned { epoch: in_epoch, step, rows: 4 }, random);
        for name in self.formed.clone().unwrap().1 {
            self.say(&name, |from, process| {
                process.pages = Some((in_epoch.raw(), step));
                Some(Event::Stepped { from, epoch: in_epoch, step })
            });
        }
    }

    fn tick(&mut self, random: &mut Random) {
        if let Some(at) = self.machine.wakes_at() {
            self.now = self.now.max(at);
            self.step(Event::Tick, random);
        }
    }

    fn step(&mut self, event: Event, random: &mut Random) {
        let seed = self.seed;
        let from_rank_0 = matches!(&event, Event::Stepped { from, .. }
            if self.machine.rank_of(&from.shard) == Some(0));
        let event_epoch = match &event {
            Event::Stepped { epoch, .. } => Some(*epoch),
            _ => None,
        };
        if let Event::Loaded { from, epoch, slice } = &event
            && let Some((formed, ranks)) = &self.formed
            && formed == epoch
            && let Some(rank) = ranks.iter().position(|s| *s == from.shard)
        {
            self.kept[rank] = slice.kept_through.is_some();
            self.sealed[rank] = slice.sealed.is_some();
        }
        for action in self.machine.step(self.now, event) {
            match action {
                Action::TakeEpoch(after) => {
                    assert!(after.raw() <= self.store_epoch, "seed {seed}: the machine invents no epoch");
                    if random.below(8) == 0 {
                        self.others.push(Event::EpochRefused);
                    } else {
                        self.store_epoch += 1 + u64::from(random.below(8) == 0);
                        self.others.push(Event::EpochTaken(epoch(self.store_epoch)));
                    }
                }
                Action::Form { epoch, ranks, keep_kv_of, keep_sealed, mirrors, copies } => {
                    let is_first = self.last_served.is_none() && keep_kv_of.is_none();
                    assert!(is_first || !keep_sealed, "seed {seed}: what this leader had computed has a better name");
                    assert!(copies.iter().all(|(rank, _)| *rank < ranks.len()), "copies of ranks that there are");
                    self.on_form(epoch, ranks, (keep_kv_of, keep_sealed), &mirrors, random);
                }
                Action::Serve { epoch, kv_blocks } => {
                    assert_eq!(kv_blocks, 3);
                    let (formed, ranks) = self.formed.clone().unwrap();
                    assert_eq!(formed, epoch, "seed {seed}");
                    for name in ranks {
                        self.say(&name, |from, _| Some(Event::Ready { from, epoch }));
                    }
                }
                Action::Serving { epoch, kept, .. } => {
                    assert_eq!(self.serving.replace(epoch), None, "seed {seed}: one group serves at a time");
                    match kept {
                        Some(Kept::Through(of, _)) => {
                            assert!(self.kept.iter().all(|k| *k), "seed {seed}: every rank has kept them");
                            assert_eq!(Some(of.raw()), self.last_served, "seed {seed}: the scheduler knows these");
                        }
                        Some(Kept::Sealed(blocks)) => {
                            assert!(self.sealed.iter().all(|s| *s), "seed {seed}: every rank has said so");
                            assert_eq!((blocks.len(), self.last_served), (1, None), "seed {seed}");
                            self.inherited += 1;
                        }
                        None => {}
                    }
                    self.last_served = Some(epoch.raw());
                    (self.held, self.steps) = (false, 0);
                    self.others.push(Event::Recovered { epoch, stall: Duration::ZERO });
                }
                Action::Hold(epoch) => {
                    assert_eq!((self.serving, self.held), (Some(epoch), false), "seed {seed}");
                    self.held = true;
                    self.others.push(Event::Idle(epoch));
                }
                Action::Resume(epoch) => {
                    assert_eq!((self.serving, self.held), (Some(epoch), true), "seed {seed}");
                    self.held = false;
                }
                Action::Lost { epoch, .. } => {
                    assert_eq!(self.serving.take(), Some(epoch), "seed {seed}: told once");
                }
                Action::Deliver => {
                    assert!(from_rank_0, "seed {seed}");
                    assert_eq!(event_epoch, self.serving, "seed {seed}");
                    self.delivered += 1;
                }
                Action::Retire { epoch, .. } => {
                    assert_eq!(Some(epoch), self.formed.as_ref().map(|(e, _)| *e), "seed {seed}");
                }
                Action::Prepare { shard, world_size, ranks } => {
                    for rank in ranks {
                        self.say(&shard, |from, _| Some(Event::Prepared { from, world_size, rank }));
                    }
                }
                Action::Evict { shard, .. } => {
                    // Its stream is closed; the process is killed, or comes back on a new stream.
                    self.kill(shard.0.parse().unwrap(), random);
                }
                Action::Shutdown { shard, .. } => {
                    let index: usize = shard.0.parse().unwrap();
                    self.processes[index].ends = true;
                }
                Action::Answer(ticket, _) => assert!(self.tickets.remove(&ticket), "seed {seed}: answered once"),
                Action::Turned(Ok(turned)) => self.is_rolling = turned.shard.is_some(),
                Action::Turned(Err(_)) => self.is_rolling = false,
                Action::CountFenced | Action::WarnSlow(_) => {}
                Action::GiveUp(cause) => panic!("seed {seed}: {cause}"),
            }
        }
    }

    fn on_form(
        &mut self,
        epoch: Epoch,
        ranks: Vec<ShardId>,
        (keep_kv_of, keep_sealed): (Option<Epoch>, bool),
        mirrors: &Mirrors,
        random: &mut Random,
    ) {
        let seed = self.seed;
        let before = self.formed.as_ref().map_or(0, |(e, _)| e.raw());
        assert!(epoch.raw() > before, "seed {seed}: epochs grow");
        let distinct: BTreeSet<&ShardId> = ranks.iter().collect();
        assert!(distinct.len() == ranks.len() && ranks.len() <= self.world_size, "seed {seed}: {ranks:?}");
        assert_eq!(self.serving, None, "seed {seed}: the former group was declared lost");
        for shard in &ranks {
            assert!(!self.drained.contains(shard), "seed {seed}: {shard} is drained");
        }
        if let Mirrors::Spare(spare) = mirrors {
            assert!(!ranks.contains(spare), "seed {seed}: a rank is no spare");
        }
        (self.kept, self.sealed) = (vec![false; ranks.len()], vec![false; ranks.len()]);
        let n_silent = random.below(6);
        let fails = random.below(12) == 0;
        let by = random.below(ranks.len());
        for (rank, name) in ranks.iter().enumerate() {
            self.say(name, |from, process| {
                if fails && rank == by {
                    return Some(Event::Failed { from, epoch, error: "x".to_owned() });
                }
                let kept = process.pages.filter(|(of, _)| Some(*of) == keep_kv_of.map(Epoch::raw));
                process.pages = kept;
                let sealed = (keep_sealed && n_silent != rank).then(|| BTreeMap::from([(0, Seal::EMPTY)]));
                let kept_through = kept.map(|(_, through)| through);
                let slice = Slice { kv_blocks: 3, weight_bytes: 1, kept_through, sealed };
                Some(Event::Loaded { from, epoch, slice })
            });
        }
        self.formed = Some((epoch, ranks));
    }

    fn one_move(&mut self, random: &mut Random) {
        let index = random.below(self.processes.len());
        let name = Self::name(index);
        match random.below(40) {
            0 => self.kill(index, random),
            1..=3 => self.arrive(index),
            4 => self.processes[index].is_stuck = true,
            5..=6 => self.tick(random),
            7..=10 => self.plan(random),
            11 => {
                let ticket = self.ticket();
                self.step(Event::Drain { ticket, shard: name.clone(), is_helped: false }, random);
                if self.machine.drained.contains(&name) {
                    self.drained.insert(name);
                }
            }
            12 => self.undrain(&name, random),
            13 => self.say(&name, |from, _| Some(Event::Leaving(from))),
            14 => {
                if !self.machine.is_rolling() {
                    self.is_rolling = true;
                    self.step(Event::Rollout { but: Vec::new(), return_limit: None }, random);
                }
            }
            15..=17 if self.processes[index].ends => self.kill(index, random),
            _ => self.deliver(random),
        }
    }

    fn ticket(&mut self) -> Ticket {
        self.next_ticket += 1;
        self.tickets.insert(self.next_ticket);
        self.next_ticket
    }

    fn undrain(&mut self, name: &ShardId, random: &mut Random) {
        let ticket = self.ticket();
        self.drained.remove(name);
        self.step(Event::Undrain { ticket, shard: name.clone() }, random);
    }

    /// When the storm is over, everybody is there again, and everything comes to its end.
    fn settle(&mut self, random: &mut Random) {
        let seed = self.seed;
        for round in 0..4_000 {
            for index in 0..self.processes.len() {
                if self.processes[index].ends || self.processes[index].is_stuck {
                    self.kill(index, random);
                }
                self.arrive(index);
                if round == 0 {
                    self.undrain(&Self::name(index), random);
                }
            }
            self.deliver(random);
            let is_quiet = self.others.is_empty() && self.processes.iter().all(|p| p.said.is_empty());
            if is_quiet {
                let is_whole = self.machine.phase() == "serving" && self.machine.world_size() == self.world_size;
                if is_whole && !self.machine.is_rolling() && self.tickets.is_empty() {
                    break;
                }
                self.tick(random);
            }
        }
        assert_eq!(self.machine.phase(), "serving", "seed {seed}");
        assert_eq!(self.machine.world_size(), self.world_size, "seed {seed}");
        assert_eq!(self.serving, Some(self.machine.epoch()), "seed {seed}");
        assert!(self.tickets.is_empty(), "seed {seed}: everybody has an answer");
        assert!(!self.machine.is_rolling() && !self.is_rolling, "seed {seed}: a rolling restart ends");
        self.delivered = 0;
        self.plan(random);
        for _ in 0..50 {
            self.deliver(random);
        }
        assert_eq!(self.delivered, 1, "seed {seed}: results come through");
    }
}

/// Says how often pages of an earlier leader were taken over.
fn run(seed: u64) -> u32 {
    let mut random = Random(seed);
    let mut world = World::new(seed, &mut random);
    for _ in 0..MOVES {
        world.one_move(&mut random);
    }
    world.settle(&mut random);
    world.inherited
}

#[test]
fn invariants_hold_whatever_happens() {
    match std::env::var("PHALANX_SIM_SEED") {
        Ok(seed) => drop(run(seed.parse().expect("PHALANX_SIM_SEED is a number"))),
        Err(_) => {
            let inherited: u32 = (0..SEEDS).map(run).sum();
            assert!(inherited > 500, "the schedules prove little: {inherited}");
        }
    }
}
