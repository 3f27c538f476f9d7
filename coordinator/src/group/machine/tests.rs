//! The group's state machine: its story step by step. Random schedules are in `simulation`.

mod changes;
mod giving;
mod simulation;
mod story;

use super::*;

fn shard(name: &str) -> ShardId {
    ShardId(name.to_owned())
}

fn shards(names: &str) -> Vec<ShardId> {
    names.chars().map(|c| shard(&c.to_string())).collect()
}

fn candidate(name: &str, incarnation: u64) -> Candidate {
    Candidate {
        shard: shard(name),
        incarnation,
        kind: "cpu".to_owned(),
        memory_bytes: 0,
        takes_mirror: false,
        holds: None,
        copies: BTreeSet::new(),
    }
}

fn origin(name: &str, incarnation: u64) -> Origin {
    Origin { shard: shard(name), incarnation }
}

fn epoch(n: u64) -> Epoch {
    Epoch::from_raw(n)
}

fn settings(world_size: usize) -> Settings {
    Settings {
        world_size,
        give_up_after: None,
        regroup_after: None,
        mirror_to: MirrorTo::Nowhere,
        silent_after: Duration::from_millis(400),
    }
}

/// A machine with a clock and a store that answers when it is asked to.
struct Group {
    machine: GroupMachine,
    now: Instant,
    store: u64,
    is_asked: bool,
}

impl Group {
    fn new(settings: Settings) -> Self {
        let now = Instant::now();
        Self { machine: GroupMachine::new(settings, epoch(0), Vec::new(), now), now, store: 0, is_asked: false }
    }

    fn wait(&mut self, time: Duration) {
        self.now += time;
    }

    /// Handles an event. Questions to the store are not among what is returned.
    fn on(&mut self, event: Event) -> Vec<Action> {
        let actions = self.machine.step(self.now, event);
        let (asked, others): (Vec<_>, Vec<_>) = actions.into_iter().partition(|a| matches!(a, Action::TakeEpoch(_)));
        assert!(asked.len() + usize::from(self.is_asked) <= 1, "one question at a time");
        self.is_asked |= !asked.is_empty();
        others
    }

    /// The store answers, if it was asked.
    fn answer(&mut self) -> Vec<Action> {
        if !std::mem::take(&mut self.is_asked) {
            return Vec::new();
        }
        self.store += 1;
        self.on(Event::EpochTaken(epoch(self.store)))
    }

    fn arrive(&mut self, name: &str, incarnation: u64) -> Vec<Action> {
        self.on(Event::Arrived(candidate(name, incarnation)))
    }

    fn lose(&mut self, name: &str, incarnation: u64) -> Vec<Action> {
        let from = origin(name, incarnation);
        self.on(Event::Left { from, cause: Cause::Lost, reason: "killed".to_owned() })
    }

    fn loaded(&mut self, name: &str, kv_blocks: u32, kept_through: Option<u64>) -> Vec<Action> {
        let slice = Slice { kv_blocks, weight_bytes: 100, kept_through, sealed: None };
        self.on(Event::Loaded { from: self.life_of(name), epoch: self.machine.epoch(), slice })
    }

    fn ready(&mut self, name: &str) -> Vec<Action> {
        self.on(Event::Ready { from: self.life_of(name), epoch: self.machine.epoch() })
    }

    fn stepped(&mut self, name: &str, step: u64) -> Vec<Action> {
        self.on(Event::Stepped { from: self.life_of(name), epoch: self.machine.epoch(), step })
    }

    fn failed(&mut self, name: &str) -> Vec<Action> {
        let error = "no such file".to_owned();
        self.on(Event::Failed { from: self.life_of(name), epoch: self.machine.epoch(), error })
    }

    fn prepared(&mut self, name: &str, world_size: usize, rank: usize) -> Vec<Action> {
        self.on(Event::Prepared { from: self.life_of(name), world_size, rank })
    }

    fn planned(&mut self, step: u64) {
        assert_eq!(self.on(Event::Planned { epoch: self.machine.epoch(), step, rows: 8 }), []);
    }

    fn beat(&mut self, name: &str, waits_for: Option<usize>) {
        let beat = Beat { busy: Some((self.machine.epoch(), 1)), waits_for, mirrored: None };
        assert_eq!(self.on(Event::Beat { from: self.life_of(name), beat }), []);
    }

    fn tick(&mut self) -> Vec<Action> {
        self.on(Event::Tick)
    }

    fn idle(&mut self) -> Vec<Action> {
        self.on(Event::Idle(self.machine.epoch()))
    }

    /// All streams have gone on.
    fn recovered(&mut self, stall: Duration) -> Vec<Action> {
        self.on(Event::Recovered { epoch: self.machine.epoch(), stall })
    }

    fn life_of(&self, name: &str) -> Origin {
        let incarnation = self.machine.attached.get(&shard(name)).map_or(0, |a| a.candidate.incarnation);
        origin(name, incarnation)
    }

    /// All ranks of the present formation load with these KV blocks, and get ready. Returns the last actions.
    fn serve(&mut self, kv_blocks: u32, kept_through: Option<u64>) -> Vec<Action> {
        let ranks = self.machine.ranks().to_vec();
        assert!(!ranks.is_empty(), "nothing was formed: {}", self.machine.phase());
        for s in &ranks {
            self.loaded(&s.0, kv_blocks, kept_through);
        }
        let mut actions: Vec<Action> = ranks.iter().flat_map(|s| self.ready(&s.0)).collect();
        assert_eq!(self.machine.phase(), "serving");
        actions.extend(self.recovered(Duration::ZERO));
        actions
    }

    fn form(&self, in_epoch: u64, ranks: &str, keep_kv_of: Option<u64>) -> Action {
        Action::Form {
            epoch: epoch(in_epoch),
            ranks: shards(ranks),
            keep_kv_of: keep_kv_of.map(epoch),
            keep_sealed: false,
            mirrors: Mirrors::Nowhere,
            copies: Vec::new(),
        }
    }
}

fn serving(in_epoch: u64, kv_blocks: u32, kept: Option<(u64, u64)>) -> Action {
    let kept = kept.map(|(of, through)| Kept::Through(epoch(of), through));
    Action::Serving { epoch: epoch(in_epoch), kv_blocks, kept }
}

fn retire(in_epoch: u64, name: &str, keep_kv: bool) -> Action {
    Action::Retire { epoch: epoch(in_epoch), shard: shard(name), keep_kv }
}

fn lost(in_epoch: u64, cause: Cause, reason: &str, is_planned: bool) -> Action {
    Action::Lost { epoch: epoch(in_epoch), cause, reason: reason.to_owned(), is_planned }
}

/// Shards a and b, which serve in epoch 1.
fn pair_of(settings: Settings) -> Group {
    let mut group = Group::new(settings);
    group.arrive("b", 1);
    group.arrive("a", 1);
    let form = group.form(1, "ab", None);
    assert_eq!(group.answer(), [form]);
    group.serve(70, None);
    group.answer();
    group
}

fn pair() -> Group {
    pair_of(settings(2))
}

/// With a spare c that has loaded both slices.
fn pair_and_spare() -> Group {
    let mut group = pair();
    let prepare = Action::Prepare { shard: shard("c"), world_size: 2, ranks: vec![0, 1] };
    assert_eq!(group.arrive("c", 1), [prepare]);
    group.prepared("c", 2, 0);
    group.prepared("c", 2, 1);
    group
}
