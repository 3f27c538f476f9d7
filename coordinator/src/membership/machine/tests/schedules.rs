//! Random schedules: shards come and go, groups are drained, restarted and slow to answer.

use std::collections::VecDeque;

use super::*;

const SEEDS: u64 = 3000;
const EVENTS: usize = 60;

/// SplitMix64 (Steele et al., 2014).
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        usize::try_from((z ^ (z >> 31)) % bound as u64).expect("small")
    }
}

enum ToGroup {
    Join(ShardId, u64),
    Leave(ShardId, u64),
    Release(u64, Given),
    Drain(ShardId),
    Undrain(ShardId),
}

/// A group as membership sees it.
struct FakeGroup {
    world_size: usize,
    shards: BTreeMap<ShardId, u64>,
    drained: BTreeSet<ShardId>,
    ranks: Vec<ShardId>,
    inbox: VecDeque<ToGroup>,
    said: VecDeque<Event>,
    told: Option<Standing>,
}

impl FakeGroup {
    fn new(world_size: usize) -> Self {
        let (shards, drained) = (BTreeMap::new(), BTreeSet::new());
        let (inbox, said) = (VecDeque::new(), VecDeque::new());
        Self { world_size, shards, drained, ranks: Vec::new(), inbox, said, told: None }
    }

    fn usable(&self) -> Vec<ShardId> {
        self.shards.keys().filter(|s| !self.drained.contains(s)).cloned().collect()
    }

    fn handle(&mut self, index: usize) {
        let Some(message) = self.inbox.pop_front() else { return };
        match message {
            ToGroup::Join(shard, stream) => drop(self.shards.insert(shard, stream)),
            ToGroup::Leave(shard, stream) => {
                if self.shards.get(&shard) == Some(&stream) {
                    self.shards.remove(&shard);
                }
            }
            ToGroup::Drain(shard) => drop(self.drained.insert(shard)),
            ToGroup::Undrain(shard) => drop(self.drained.remove(&shard)),
            ToGroup::Release(ticket, given) => {
                let usable = self.usable();
                let is_given = match given {
                    Given::Spare => usable.len() > self.world_size,
                    Given::Idle => usable.len() < self.world_size,
                };
                let free = usable.into_iter().filter(|s| given == Given::Idle || !self.ranks.contains(s));
                let shard = free.max().filter(|_| is_given);
                let given = shard.and_then(|shard| self.shards.remove_entry(&shard));
                self.said.push_back(Event::Released { group: index, ticket, given });
            }
        }
        let usable = self.usable();
        if self.ranks.is_empty() || self.ranks.iter().any(|s| !usable.contains(s)) {
            let mut next: Vec<ShardId> = self.ranks.iter().filter(|s| usable.contains(s)).cloned().collect();
            next.extend(usable.iter().filter(|s| !self.ranks.contains(s)).cloned());
            next.truncate(self.world_size);
            self.ranks = if next.len() == self.world_size { next } else { Vec::new() };
        }
        let (ranks, drained) = (self.ranks.clone(), self.drained.clone());
        let standing = Standing { is_formed: !ranks.is_empty(), ranks, drained, ..Standing::default() };
        if self.told.as_ref() != Some(&standing) {
            self.told = Some(standing.clone());
            self.said.push_back(Event::Stands { group: index, standing });
        }
    }
}

struct Schedule {
    numbers: Numbers,
    world_size: usize,
    machine: MembershipMachine,
    groups: Vec<FakeGroup>,
    attached: BTreeMap<ShardId, u64>,
    now: Instant,
    stream: u64,
    /// Shards that went from one group to another since somebody came or went.
    n_moves: usize,
}

impl Schedule {
    fn new(seed: u64) -> Self {
        let mut numbers = Numbers(seed);
        let (world_size, n_groups) = (1 + numbers.below(3), 1 + numbers.below(4));
        Self {
            world_size,
            machine: MembershipMachine::new(world_size, vec![Former::default(); n_groups]),
            groups: (0..n_groups).map(|_| FakeGroup::new(world_size)).collect(),
            numbers,
            attached: BTreeMap::new(),
            now: Instant::now(),
            stream: 0,
            n_moves: 0,
        }
    }

    fn step(&mut self, event: Event) {
        let former: BTreeMap<ShardId, u64> = self.attached.clone();
        let is_answer = matches!(event, Event::Released { .. });
        match &event {
            Event::Arrived { shard, stream, .. } => drop(self.attached.insert(shard.clone(), *stream)),
            Event::Left(shard) => drop(self.attached.remove(shard)),
            _ => {}
        }
        for action in self.machine.step(self.now, event) {
            match action {
                Action::Join { shard, group, .. } => {
                    self.n_moves += usize::from(is_answer);
                    let stream = self.attached[&shard];
                    self.groups[group].inbox.push_back(ToGroup::Join(shard, stream));
                }
                Action::Leave { shard, group } => {
                    let stream = former[&shard];
                    self.groups[group].inbox.push_back(ToGroup::Leave(shard, stream));
                }
                Action::Release { group, ticket, given } => {
                    self.groups[group].inbox.push_back(ToGroup::Release(ticket, given));
                }
                Action::SetAside(shard) => panic!("{shard} has the same numerics as all others"),
            }
        }
        self.check();
    }

    /// No stay of a shard is in two groups, at any time.
    fn check(&self) {
        let mut seen = BTreeSet::new();
        for group in &self.groups {
            for (shard, stream) in &group.shards {
                assert!(seen.insert((shard, stream)), "{shard} is in two groups");
            }
        }
        for (shard, place) in &self.machine.places {
            assert!(place.group.is_some(), "{shard} is in no group");
        }
    }

    /// Somebody comes or goes, is drained or undrained, or a group's actor crashes.
    fn disturb(&mut self) {
        self.n_moves = 0;
        let shard = id(&format!("s{}", self.numbers.below(8)));
        let group = self.numbers.below(self.groups.len());
        match self.numbers.below(12) {
            0..6 if !self.attached.contains_key(&shard) => {
                self.stream += 1;
                self.step(Event::Arrived { shard, stream: self.stream, kind: "cpu".to_owned() });
            }
            0..9 if self.attached.contains_key(&shard) => self.step(Event::Left(shard)),
            9 | 10 => {
                let Some(group) = self.machine.places().get(&shard).copied() else { return };
                let is_drained = self.groups[group].drained.contains(&shard);
                let message = if is_drained { ToGroup::Undrain(shard) } else { ToGroup::Drain(shard) };
                self.groups[group].inbox.push_back(message);
            }
            11 => {
                let mut fresh = FakeGroup::new(self.world_size);
                // What the dead one said is on its way all the same.
                fresh.said = std::mem::take(&mut self.groups[group].said);
                // The store knows that.
                fresh.drained = std::mem::take(&mut self.groups[group].drained);
                for shard in self.machine.members(group) {
                    fresh.inbox.push_back(ToGroup::Join(shard.clone(), self.attached[shard]));
                }
                self.groups[group] = fresh;
                self.step(Event::Restarted(group));
            }
            _ => {}
        }
    }

    /// Some message arrives. Says whether there was one.
    fn deliver(&mut self) -> bool {
        let is_busy = |g: &usize| !self.groups[*g].inbox.is_empty() || !self.groups[*g].said.is_empty();
        let busy: Vec<usize> = (0..self.groups.len()).filter(is_busy).collect();
        if busy.is_empty() {
            return false;
        }
        let group = busy[self.numbers.below(busy.len())];
        let said = if self.numbers.below(2) == 0 { self.groups[group].said.pop_front() } else { None };
        match said {
            Some(event) => self.step(event),
            None => self.groups[group].handle(group),
        }
        self.check();
        true
    }

    fn settle(&mut self) {
        loop {
            while self.deliver() {}
            let Some(at) = self.machine.wakes_at(self.now) else { return };
            self.now = at;
            self.step(Event::Tick);
        }
    }

    /// What holds once everybody has heard everything.
    fn check_settled(&self) {
        let mut all = BTreeMap::new();
        for (index, group) in self.groups.iter().enumerate() {
            for (shard, stream) in &group.shards {
                assert_eq!(self.machine.places().get(shard), Some(&index), "{shard} is where it is said to be");
                all.insert(shard.clone(), *stream);
            }
        }
        assert_eq!(all, self.attached, "every shard is somewhere");
        let usable = |g: &FakeGroup| g.usable().len();
        let is_lacking = self.groups.iter().any(|g| usable(g) < self.world_size);
        let has_spare = self.groups.iter().any(|g| usable(g) > self.world_size);
        assert!(!(is_lacking && has_spare), "a group lacks a shard while another has a spare");
        let short: Vec<usize> = self.groups.iter().map(usable).filter(|n| *n < self.world_size).collect();
        assert!(short.iter().sum::<usize>() < self.world_size, "together they could serve: {short:?}");
        assert!(self.machine.requests.is_empty(), "every request was answered");
    }
}

#[test]
fn no_schedule_puts_a_shard_in_two_groups_or_leaves_a_rank_empty_beside_a_spare() {
    for seed in 0..SEEDS {
        let mut schedule = Schedule::new(seed);
        println!("seed {seed}");
        for _ in 0..EVENTS {
            match schedule.numbers.below(4) {
                0 => schedule.disturb(),
                1 if schedule.numbers.below(8) == 0 => {
                    schedule.now += IDLE_AFTER;
                    schedule.step(Event::Tick);
                }
                2 if schedule.numbers.below(10) == 0 => {
                    schedule.settle();
                    schedule.check_settled();
                }
                _ => drop(schedule.deliver()),
            }
        }
        schedule.settle();
        schedule.check_settled();
        assert!(schedule.n_moves <= schedule.attached.len(), "shards go to and fro: {} moves", schedule.n_moves);
    }
}
