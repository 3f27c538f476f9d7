//! Who belongs where: the rules one by one, then random schedules with groups that answer late.

mod schedules;

use super::*;

fn id(name: &str) -> ShardId {
    ShardId(name.to_owned())
}

fn ids(names: &str) -> Vec<ShardId> {
    names.chars().map(|c| id(&c.to_string())).collect()
}

/// A machine whose groups do at once what they are told.
struct World {
    machine: MembershipMachine,
    now: Instant,
    stream: u64,
    standings: Vec<Standing>,
}

impl World {
    fn new(world_size: usize, ranks: &[&str]) -> Self {
        let machine = MembershipMachine::new(
            world_size,
            ranks.iter().map(|r| Former { ranks: ids(r), ..Former::default() }).collect(),
        );
        Self { machine, now: Instant::now(), stream: 0, standings: vec![Standing::default(); ranks.len()] }
    }

    fn on(&mut self, event: Event) -> Vec<Action> {
        self.machine.step(self.now, event)
    }

    fn arrive_as(&mut self, name: &str, kind: &str) -> Vec<Action> {
        self.stream += 1;
        self.on(Event::Arrived { shard: id(name), stream: self.stream, kind: kind.to_owned() })
    }

    /// Where a shard goes that arrives.
    fn arrive(&mut self, name: &str) -> usize {
        match self.arrive_as(name, "cpu").first() {
            Some(Action::Join { shard, group, .. }) if shard.0 == name => *group,
            other => panic!("{other:?}"),
        }
    }

    fn fill(&mut self, names: &str) {
        for name in names.chars() {
            self.arrive(&name.to_string());
        }
    }

    fn stands(&mut self, group: usize, change: impl FnOnce(&mut Standing)) -> Vec<Action> {
        change(&mut self.standings[group]);
        let standing = self.standings[group].clone();
        self.on(Event::Stands { group, standing })
    }

    fn serves(&mut self, group: usize, ranks: &str) -> Vec<Action> {
        self.stands(group, |s| {
            s.ranks = ids(ranks);
            s.is_formed = true;
        })
    }

    fn is_lost(&mut self, group: usize) -> Vec<Action> {
        self.stands(group, |s| {
            s.ranks.clear();
            s.is_formed = false;
        })
    }

    fn leave(&mut self, name: &str) -> Vec<Action> {
        self.on(Event::Left(id(name)))
    }

    /// Answers a request with a shard, or with none.
    fn give(&mut self, action: &Action, name: Option<&str>) -> Vec<Action> {
        let Action::Release { group, ticket, .. } = action else { panic!("{action:?}") };
        let given = name.map(|name| (id(name), self.machine.places[&id(name)].stream));
        self.on(Event::Released { group: *group, ticket: *ticket, given })
    }

    fn members(&self, group: usize) -> String {
        self.machine.members(group).map(|s| s.0.as_str()).collect()
    }
}

fn asks(actions: &[Action]) -> Option<(usize, Given)> {
    match actions.last()? {
        Action::Release { group, given, .. } => Some((*group, *given)),
        _ => None,
    }
}

#[test]
fn groups_fill_one_after_the_other_then_spares_are_shared_out() {
    let mut world = World::new(2, &["", ""]);
    let groups: Vec<usize> = ["a", "b", "c", "d", "e", "f", "g"].iter().map(|name| world.arrive(name)).collect();
    assert_eq!(groups, [0, 0, 1, 1, 0, 1, 0]);
}

#[test]
fn shards_come_back_to_where_they_had_a_rank() {
    let mut world = World::new(1, &["a", "b"]);
    assert_eq!((world.arrive("b"), world.arrive("c"), world.arrive("a")), (1, 0, 0));
    world.serves(0, "a");
    world.leave("a");
    world.serves(0, "c");
    assert_eq!(world.arrive("a"), 0);
    world.serves(1, "b");
    // Its rank is taken: it is a spare like any other. At home, where nothing speaks against it.
    world.leave("a");
    world.leave("b");
    assert_eq!((world.arrive("b"), world.arrive("a")), (1, 0));
}

#[test]
fn a_spare_that_came_before_a_former_rank_goes_on_to_where_it_is_needed() {
    let mut world = World::new(1, &["a", "b"]);
    assert_eq!(world.arrive("c"), 0);
    let actions = world.arrive_as("a", "cpu");
    assert_eq!(actions[0], Action::Join { shard: id("a"), group: 0, knows: Epoch::default() });
    assert_eq!(asks(&actions), Some((0, Given::Spare)), "it leaves if that group does not take it");
    world.give(&actions[1], Some("c"));
    assert_eq!((world.members(0).as_str(), world.members(1).as_str()), ("a", "c"));
    // And there it is a spare when the owner comes.
    assert_eq!(world.arrive("b"), 1);
}

#[test]
fn a_lost_rank_draws_a_spare_from_another_group() {
    let mut world = World::new(2, &["", ""]);
    world.fill("abcde");
    world.serves(0, "ab");
    world.serves(1, "cd");
    world.standings[0].epoch = Epoch::from_raw(7);
    world.stands(0, |_| ());
    let actions = world.leave("c");
    assert_eq!(actions[0], Action::Leave { shard: id("c"), group: 1 });
    assert_eq!(asks(&actions), Some((0, Given::Spare)));
    let joined = Action::Join { shard: id("e"), group: 1, knows: Epoch::from_raw(7) };
    assert_eq!(world.give(&actions[1], Some("e")), [joined]);
    assert_eq!((world.members(0).as_str(), world.members(1).as_str()), ("ab", "de"));
    // Who was lost is a spare when it is back, wherever; nobody moves again.
    assert_eq!(world.arrive("c"), 1);
    assert_eq!(world.serves(1, "ed"), []);
}

#[test]
fn a_group_that_needs_its_spare_after_all_keeps_it() {
    let mut world = World::new(1, &["", "", ""]);
    world.fill("abcde");
    assert_eq!((world.members(0), world.members(1), world.members(2)), ("ad".into(), "be".into(), "c".into()));
    let asked = world.leave("c");
    assert_eq!(asks(&asked), Some((0, Given::Spare)));
    let asked = world.give(&asked[1], None);
    assert_eq!(asks(&asked), Some((1, Given::Spare)), "the next one is asked");
    assert_eq!(world.give(&asked[0], None), [], "and nobody is asked again until something has changed");
    assert_eq!(asks(&world.stands(0, |s| s.is_formed = true)), Some((0, Given::Spare)));
}

#[test]
fn what_was_given_and_is_gone_goes_nowhere() {
    let mut world = World::new(1, &["", ""]);
    world.fill("abc");
    let asked = world.leave("b");
    let stream = world.machine.places[&id("c")].stream;
    world.leave("c");
    // It is back before the group's answer comes: there it looks as if the first group had given its own away.
    assert_eq!(world.arrive("c"), 0);
    let Action::Release { group, ticket, .. } = asked[1] else { panic!("{asked:?}") };
    let again = world.on(Event::Released { group, ticket, given: Some((id("c"), stream)) });
    assert_eq!(world.members(0), "ac");
    assert_eq!(asks(&again), Some((0, Given::Spare)), "for this life of it");
}

#[test]
fn a_group_that_was_started_again_is_asked_again_and_its_old_answer_is_none() {
    let mut world = World::new(1, &["", ""]);
    world.fill("abc");
    let asked = world.leave("b");
    let again = world.on(Event::Restarted(0));
    assert_eq!(asks(&again), Some((0, Given::Spare)));
    assert_eq!(world.give(&asked[1], Some("c")), []);
    assert_eq!(world.members(0), "ac");
    world.give(&again[0], Some("c"));
    assert_eq!((world.members(0).as_str(), world.members(1).as_str()), ("a", "c"));
}

#[test]
fn drained_shards_stay_where_they_are_known_as_such() {
    let mut world = World::new(1, &["", ""]);
    world.fill("abc");
    world.stands(0, |s| s.drained.extend(ids("c")));
    assert_eq!(asks(&world.leave("b")), None, "a drained spare is none");
    world.leave("c");
    assert_eq!(world.machine.places().get(&id("c")), Some(&0), "for whoever undrains it");
    assert_eq!(world.arrive("c"), 0, "though the other group lacks one");
    // And who is restarted on purpose is awaited by its group.
    world.stands(0, |s| (s.awaited, s.is_rolling) = (Some(id("a")), true));
    world.leave("a");
    assert_eq!(world.arrive("a"), 0);
}

#[test]
fn a_drained_rank_is_replaced_by_another_groups_spare() {
    let mut world = World::new(1, &["", ""]);
    world.fill("abc");
    assert_eq!(world.machine.spares(), [1, 0]);
    world.serves(1, "b");
    let actions = world.stands(1, |s| s.drained.extend(ids("b")));
    assert_eq!(asks(&actions), Some((0, Given::Spare)));
    world.give(&actions[0], None);
    world.stands(0, |s| s.is_rolling = true);
    assert_eq!(world.machine.spares(), [0, 0], "nobody goes before a rolling restart is over");
}

#[test]
fn a_shard_that_is_about_to_leave_is_replaced_by_a_spare() {
    let mut world = World::new(1, &["", ""]);
    world.fill("abc");
    let asked = world.stands(1, |s| s.leaving.extend(ids("b")));
    assert_eq!(asks(&asked), Some((0, Given::Spare)));
    world.give(&asked[0], Some("c"));
    assert_eq!(world.members(1), "bc");
    world.leave("b");
    assert_eq!(world.arrive("b"), 0, "its next life does not leave, and is a spare");
}

#[test]
fn groups_that_have_too_few_make_one_whole_after_a_while() {
    let mut world = World::new(2, &["ab", "cd"]);
    world.fill("abcd");
    world.serves(0, "ab");
    world.serves(1, "cd");
    world.leave("a");
    world.is_lost(0);
    world.leave("c");
    assert_eq!(world.is_lost(1), [], "they may be back in a moment");
    let due = world.machine.wakes_at(world.now).expect("somebody waits");
    assert_eq!(due, world.now + IDLE_AFTER);
    world.now = due;
    let asked = world.on(Event::Tick);
    assert_eq!(asks(&asked), Some((1, Given::Idle)));
    world.give(&asked[0], Some("d"));
    assert_eq!(world.members(0), "bd");
    world.serves(0, "bd");
    assert_eq!((world.arrive("c"), world.arrive("a")), (1, 1));
    assert_eq!(world.machine.wakes_at(world.now + IDLE_AFTER), None);
}

#[test]
fn too_few_for_any_group_stay_where_they_are() {
    let mut world = World::new(3, &["", ""]);
    world.arrive("a");
    world.serves(0, "");
    world.is_lost(0);
    world.is_lost(1);
    world.now += IDLE_AFTER;
    assert_eq!(world.on(Event::Tick), []);
}

#[test]
fn who_computes_other_bits_is_set_aside_until_nobody_else_is_there() {
    let mut world = World::new(1, &["", ""]);
    world.arrive("a");
    assert_eq!(world.arrive_as("x", "other"), [Action::SetAside(id("x"))]);
    assert_eq!(world.arrive_as("y", "other"), [Action::SetAside(id("y"))]);
    assert_eq!(world.arrive_as("z", "third"), [Action::SetAside(id("z"))]);
    assert_eq!(world.machine.places().get(&id("x")), None);
    let actions = world.leave("a");
    let join = |name, group| Action::Join { shard: id(name), group, knows: Epoch::default() };
    assert_eq!(actions[1..], [join("x", 0), join("y", 1)]);
    assert_eq!(world.arrive_as("a", "cpu"), [Action::SetAside(id("a"))]);

    // One group has to get along with what it gets.
    let mut world = World::new(1, &[""]);
    world.arrive("a");
    assert!(matches!(world.arrive_as("x", "other")[..], [Action::Join { group: 0, .. }]));
}
