//! The group's state machine: its story step by step, then under random losses, returns and late messages.

use std::collections::{BTreeSet, VecDeque};

use proptest::prelude::*;

use super::*;

fn shard(name: &str) -> ShardId {
    ShardId(name.to_owned())
}

fn candidate(name: &str, incarnation: u64) -> Candidate {
    Candidate { shard: shard(name), incarnation, kind: "cpu".to_owned() }
}

fn origin(name: &str, incarnation: u64) -> Origin {
    Origin { shard: shard(name), incarnation }
}

fn epoch(n: u64) -> Epoch {
    Epoch::from_raw(n)
}

fn left(name: &str, incarnation: u64) -> Event {
    Event::Left { from: origin(name, incarnation), cause: "killed".to_owned() }
}

fn loaded(name: &str, in_epoch: u64, kv_blocks: u32) -> Event {
    Event::Loaded { from: origin(name, 1), epoch: epoch(in_epoch), kv_blocks }
}

fn ready(name: &str, in_epoch: u64) -> Event {
    Event::Ready { from: origin(name, 1), epoch: epoch(in_epoch) }
}

fn stepped(name: &str, in_epoch: u64) -> Event {
    Event::Stepped { from: origin(name, 1), epoch: epoch(in_epoch) }
}

fn failed(name: &str, in_epoch: u64) -> Event {
    Event::Failed { from: origin(name, 1), epoch: epoch(in_epoch), error: "no such file".to_owned() }
}

/// Two shards that serve in epoch 1.
fn serving() -> GroupMachine {
    let mut group = GroupMachine::new(2, epoch(0), Vec::new(), Some(3));
    assert_eq!(group.step(Event::Arrived(candidate("b", 1))), []);
    assert_eq!(group.waits_for().unwrap(), "1 of 2 shards are attached");
    assert_eq!(group.step(Event::Arrived(candidate("a", 1))), [Action::TakeEpoch(epoch(0))]);
    let form = Action::Form { epoch: epoch(1), ranks: vec![shard("a"), shard("b")] };
    assert_eq!(group.step(Event::EpochTaken(epoch(1))), [form]);
    assert_eq!(group.phase(), "loading");
    assert_eq!(group.step(loaded("b", 1, 70)), []);
    assert_eq!(group.step(loaded("a", 1, 90)), [Action::Serve { epoch: epoch(1), kv_blocks: 70 }]);
    assert_eq!(group.step(ready("a", 1)), []);
    assert_eq!(group.step(ready("b", 1)), [Action::Serving { epoch: epoch(1), kv_blocks: 70 }]);
    assert_eq!(group.phase(), "serving");
    group
}

#[test]
fn a_group_forms_and_serves() {
    let mut group = serving();
    assert_eq!(group.step(stepped("a", 1)), [Action::Deliver]);
    assert_eq!(group.step(stepped("b", 1)), [], "only rank 0 reports");
    assert_eq!(group.step(stepped("a", 0)), [Action::CountFenced]);
    assert_eq!((group.rank_of(&shard("a")), group.rank_of(&shard("b"))), (Some(0), Some(1)));
}

#[test]
fn a_lost_rank_comes_back_to_its_rank() {
    let mut group = serving();
    let lost = Action::Lost { epoch: epoch(1), cause: "rank 0 (a) is lost: killed".to_owned() };
    let retire = Action::Retire { epoch: epoch(1), shard: shard("b") };
    assert_eq!(group.step(left("a", 1)), [lost, retire]);
    assert_eq!(group.step(stepped("b", 1)), [Action::CountFenced], "late");
    assert_eq!(group.step(left("a", 1)), [], "told twice");
    assert_eq!(group.step(Event::Arrived(candidate("a", 2))), [Action::TakeEpoch(epoch(1))]);
    let form = Action::Form { epoch: epoch(2), ranks: vec![shard("a"), shard("b")] };
    assert_eq!(group.step(Event::EpochTaken(epoch(2))), [form]);
    assert_eq!(group.step(loaded("a", 2, 9)), [Action::CountFenced], "from its former life");
}

#[test]
fn a_spare_takes_the_free_rank() {
    let mut group = serving();
    assert_eq!(group.step(Event::Arrived(candidate("c", 1))), []);
    let actions = group.step(left("a", 1));
    assert_eq!(actions.last(), Some(&Action::TakeEpoch(epoch(1))));
    let form = Action::Form { epoch: epoch(5), ranks: vec![shard("c"), shard("b")] };
    assert_eq!(group.step(Event::EpochTaken(epoch(5))), [form], "b keeps rank 1");
}

#[test]
fn a_lost_spare_changes_nothing() {
    let mut group = serving();
    group.step(Event::Arrived(candidate("c", 1)));
    assert_eq!(group.step(left("c", 1)), []);
    assert_eq!(group.phase(), "serving");
}

#[test]
fn ranks_of_before_a_restart_are_kept() {
    let mut group = GroupMachine::new(2, epoch(7), vec![shard("b"), shard("a")], None);
    group.step(Event::Arrived(candidate("a", 1)));
    assert_eq!(group.step(Event::Arrived(candidate("b", 1))), [Action::TakeEpoch(epoch(7))]);
    let form = Action::Form { epoch: epoch(8), ranks: vec![shard("b"), shard("a")] };
    assert_eq!(group.step(Event::EpochTaken(epoch(8))), [form]);
}

#[test]
fn shards_that_differ_do_not_mix() {
    let mut group = GroupMachine::new(2, epoch(0), Vec::new(), None);
    group.step(Event::Arrived(candidate("a", 1)));
    let other = Candidate { kind: "cuda".to_owned(), ..candidate("b", 1) };
    assert_eq!(group.step(Event::Arrived(other)), []);
    assert!(group.waits_for().unwrap().contains("numerics"));
    assert_eq!(group.step(Event::Arrived(candidate("c", 1))), [Action::TakeEpoch(epoch(0))]);
    let form = Action::Form { epoch: epoch(1), ranks: vec![shard("a"), shard("c")] };
    assert_eq!(group.step(Event::EpochTaken(epoch(1))), [form]);
}

#[test]
fn failures_pause_and_then_give_up() {
    let mut group = GroupMachine::new(1, epoch(0), Vec::new(), Some(3));
    group.step(Event::Arrived(candidate("a", 1)));
    group.step(Event::EpochTaken(epoch(1)));
    assert_eq!(
        group.step(failed("a", 1)).last(),
        Some(&Action::TakeEpoch(epoch(1))),
        "the first is tried again at once"
    );
    group.step(Event::EpochTaken(epoch(2)));
    assert_eq!(group.step(failed("a", 2)).last(), Some(&Action::Pause(FIRST_PAUSE)));
    assert_eq!(group.step(Event::PauseOver), [Action::TakeEpoch(epoch(2))]);
    group.step(Event::EpochTaken(epoch(3)));
    let cause = "rank 0 (a) has failed: no such file".to_owned();
    assert_eq!(group.step(failed("a", 3)).last(), Some(&Action::GiveUp(cause)));
}

#[test]
fn a_group_that_served_is_never_given_up() {
    let mut group = serving();
    for round in 1..20 {
        let actions = group.step(failed("a", round));
        assert!(!actions.iter().any(|a| matches!(a, Action::GiveUp(_))), "{actions:?}");
        group.step(Event::PauseOver);
        group.step(Event::EpochTaken(epoch(round + 1)));
    }
}

#[test]
fn no_memory_for_a_block_is_a_failure() {
    let mut group = GroupMachine::new(1, epoch(0), Vec::new(), Some(1));
    group.step(Event::Arrived(candidate("a", 1)));
    group.step(Event::EpochTaken(epoch(1)));
    let actions = group.step(loaded("a", 1, 0));
    assert!(
        matches!(actions.last(), Some(Action::GiveUp(cause)) if cause.contains("--kv-cache-memory")),
        "{actions:?}"
    );
}

#[test]
fn a_store_that_is_away_is_asked_again() {
    let mut group = GroupMachine::new(1, epoch(0), Vec::new(), None);
    group.step(Event::Arrived(candidate("a", 1)));
    assert_eq!(group.step(Event::EpochRefused), [Action::Pause(FIRST_PAUSE)]);
    assert_eq!(group.step(Event::PauseOver), [Action::TakeEpoch(epoch(0))]);
}

/// Shards that answer as real ones do, with messages that may be late, and a store that counts.
struct World {
    group: GroupMachine,
    world_size: usize,
    store_epoch: u64,
    /// Life of each shard's process, if it is attached.
    lives: Vec<Option<u64>>,
    next_life: u64,
    /// In flight to the machine; any of them may be next.
    in_flight: VecDeque<Event>,
    serving: Option<Epoch>,
    formed: Option<(Epoch, Vec<ShardId>)>,
    delivered: u32,
}

impl World {
    fn new(n_shards: usize, world_size: usize) -> Self {
        Self {
            group: GroupMachine::new(world_size, epoch(0), Vec::new(), None),
            world_size,
            store_epoch: 0,
            lives: vec![None; n_shards],
            next_life: 1,
            in_flight: VecDeque::new(),
            serving: None,
            formed: None,
            delivered: 0,
        }
    }

    fn origin_of(&self, shard: &ShardId) -> Option<Origin> {
        let index: usize = shard.0.parse().unwrap();
        Some(Origin { shard: shard.clone(), incarnation: self.lives[index]? })
    }

    fn origins_of(&self, shards: &[ShardId]) -> Vec<Origin> {
        shards.iter().filter_map(|s| self.origin_of(s)).collect()
    }

    fn arrive(&mut self, index: usize) {
        if self.lives[index].is_none() {
            self.lives[index] = Some(self.next_life);
            self.next_life += 1;
            let incarnation = self.lives[index].unwrap();
            self.in_flight.push_back(Event::Arrived(candidate(&index.to_string(), incarnation)));
        }
    }

    fn kill(&mut self, index: usize) {
        if let Some(incarnation) = self.lives[index].take() {
            self.in_flight.push_back(left(&index.to_string(), incarnation));
        }
    }

    /// Hands the machine one of the messages in flight. Arrivals and departures of one shard stay in order, as the
    /// membership actor keeps them; everything else may be overtaken.
    fn deliver(&mut self, pick: usize, fails: bool) {
        if self.in_flight.is_empty() {
            return;
        }
        let mut index = pick % self.in_flight.len();
        let membership = |e: &Event| matches!(e, Event::Arrived(_) | Event::Left { .. });
        if membership(&self.in_flight[index]) {
            index = self.in_flight.iter().position(membership).unwrap();
        }
        let event = self.in_flight.remove(index).unwrap();
        let from_rank_0 = matches!(&event, Event::Stepped { from, .. } if self.group.rank_of(&from.shard) == Some(0));
        let event_epoch = match &event {
            Event::Stepped { epoch, .. } => Some(*epoch),
            _ => None,
        };
        for action in self.group.step(event) {
            match action {
                Action::TakeEpoch(after) => {
                    assert!(after.raw() <= self.store_epoch, "the machine invents no epoch");
                    self.store_epoch += 1;
                    self.in_flight.push_back(Event::EpochTaken(epoch(self.store_epoch)));
                }
                Action::Form { epoch, ranks } => {
                    let before = self.formed.as_ref().map_or(0, |(e, _)| e.raw());
                    assert!(epoch.raw() > before, "epochs grow");
                    assert_eq!(ranks.iter().collect::<BTreeSet<_>>().len(), self.world_size, "one rank per shard");
                    if let Some((_, last)) = &self.formed {
                        for (rank, shard) in ranks.iter().enumerate() {
                            let before = last.iter().position(|s| s == shard);
                            assert!(before.is_none_or(|b| b == rank), "a returning shard keeps its rank");
                        }
                    }
                    assert_eq!(self.serving, None, "the former group was declared lost");
                    for shard in &ranks {
                        if let Some(from) = self.origin_of(shard) {
                            self.in_flight.push_back(if fails {
                                Event::Failed { from, epoch, error: "x".to_owned() }
                            } else {
                                Event::Loaded { from, epoch, kv_blocks: 3 }
                            });
                        }
                    }
                    self.formed = Some((epoch, ranks));
                }
                Action::Serve { epoch, kv_blocks } => {
                    assert_eq!(kv_blocks, 3);
                    let (formed, ranks) = self.formed.clone().unwrap();
                    assert_eq!(formed, epoch);
                    for from in self.origins_of(&ranks) {
                        self.in_flight.push_back(Event::Ready { from, epoch });
                    }
                }
                Action::Serving { epoch, .. } => {
                    assert_eq!(self.serving.replace(epoch), None, "one group serves at a time");
                    let (_, ranks) = self.formed.clone().unwrap();
                    for from in self.origins_of(&ranks) {
                        self.in_flight.push_back(Event::Stepped { from: from.clone(), epoch });
                        self.in_flight.push_back(Event::Stepped { from, epoch });
                    }
                }
                Action::Lost { epoch, .. } => assert_eq!(self.serving.take(), Some(epoch), "told once"),
                Action::Deliver => {
                    assert!(from_rank_0);
                    assert_eq!(event_epoch, self.serving);
                    self.delivered += 1;
                }
                Action::Pause(_) => self.in_flight.push_back(Event::PauseOver),
                Action::Retire { epoch, .. } => assert_eq!(Some(epoch), self.formed.as_ref().map(|(e, _)| *e)),
                Action::CountFenced => {}
                Action::GiveUp(cause) => panic!("{cause}"),
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn invariants_hold_whatever_happens(
        world_size in 1usize..4,
        spares in 0usize..3,
        moves in prop::collection::vec((0u8..10, any::<u16>()), 0..300),
    ) {
        let n_shards = world_size + spares;
        let mut world = World::new(n_shards, world_size);
        for (kind, luck) in moves {
            let luck = usize::from(luck);
            match kind {
                0 => world.kill(luck % n_shards),
                1 | 2 => world.arrive(luck % n_shards),
                3 => world.deliver(luck, true),
                _ => world.deliver(luck, false),
            }
        }
        // When the storm is over, the group serves and results come through.
        for index in 0..n_shards {
            world.arrive(index);
        }
        world.delivered = 0;
        for _ in 0..10_000 {
            world.deliver(0, false);
        }
        prop_assert!(world.in_flight.is_empty());
        prop_assert_eq!(world.group.phase(), "serving");
        prop_assert_eq!(world.serving, Some(world.group.epoch()));
    }
}
