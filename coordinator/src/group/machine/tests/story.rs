//! Forming, losing, failing.

use phalanx_cluster::seal::Seal;

use super::*;
use crate::group::machine::formation::{FIRST_PAUSE, LOAD_LIMIT};

#[test]
fn a_group_forms_and_serves() {
    let mut group = Group::new(settings(2));
    assert_eq!(group.arrive("b", 1), []);
    assert_eq!(group.machine.waits_for().unwrap(), "1 of 2 shards are attached");
    assert_eq!(group.arrive("a", 1), []);
    let form = group.form(1, "ab", None);
    assert_eq!(group.answer(), [form]);
    assert_eq!(group.machine.phase(), "loading");
    assert_eq!(group.loaded("b", 70, None), []);
    assert_eq!(group.loaded("a", 90, None), [Action::Serve { epoch: epoch(1), kv_blocks: 70 }]);
    assert_eq!(group.ready("a"), []);
    assert_eq!(group.ready("b"), [serving(1, 70, None)]);
    assert!(group.is_asked, "an epoch in reserve");
    assert_eq!(group.stepped("a", 1), [Action::Deliver]);
    assert_eq!(group.stepped("b", 1), [], "only rank 0 reports");
    let late = Event::Stepped { from: origin("a", 1), epoch: epoch(0), step: 1 };
    assert_eq!(group.on(late), [Action::CountFenced]);
    assert_eq!((group.machine.rank_of(&shard("a")), group.machine.rank_of(&shard("b"))), (Some(0), Some(1)));
}

#[test]
fn a_lost_rank_comes_back_to_its_rank() {
    let mut group = pair();
    let gone = lost(1, Cause::Lost, "rank 0 (a) is lost: killed", false);
    assert_eq!(group.lose("a", 1), [gone, retire(1, "b", true)]);
    let late = Event::Stepped { from: origin("b", 1), epoch: epoch(1), step: 1 };
    assert_eq!(group.on(late), [Action::CountFenced]);
    assert_eq!(group.lose("a", 1), [], "told twice");
    let form = group.form(2, "ab", Some(1));
    assert_eq!(group.arrive("a", 2), [form], "the epoch was in reserve");
    let old = Event::Loaded { from: origin("a", 1), epoch: epoch(2), slice: Slice::default() };
    assert_eq!(group.on(old), [Action::CountFenced], "from its former life");
}

#[test]
fn a_spare_takes_the_free_rank_at_once() {
    let mut group = pair_and_spare();
    assert_eq!(group.machine.prepared_ranks(&shard("c")), [0, 1]);
    assert_eq!(group.machine.successor_of(1, group.now), Some(shard("c")));
    let form = group.form(2, "cb", Some(1));
    assert_eq!(group.lose("a", 1).last(), Some(&form), "b keeps rank 1");
    assert_eq!(group.machine.role_of(&shard("c"), group.now), "rank");
}

#[test]
fn a_lost_spare_changes_nothing() {
    let mut group = pair_and_spare();
    assert_eq!(group.lose("c", 1), []);
    assert_eq!(group.machine.phase(), "serving");
}

#[test]
fn the_rank_that_nobody_prepared_for_goes_to_whoever_is_there() {
    let mut group = pair();
    group.arrive("c", 1);
    group.arrive("d", 1);
    group.prepared("d", 2, 0);
    let form = group.form(2, "db", Some(1));
    assert_eq!(group.lose("a", 1).last(), Some(&form));
    group.serve(70, None);
    group.answer();
    let form = group.form(3, "dc", Some(2));
    assert_eq!(group.lose("b", 1).last(), Some(&form));
}

#[test]
fn ranks_of_before_a_restart_are_kept() {
    let now = Instant::now();
    let mut machine = GroupMachine::new(settings(2), epoch(7), shards("ba"), now);
    machine.step(now, Event::Arrived(candidate("a", 1)));
    assert_eq!(machine.step(now, Event::Arrived(candidate("b", 1))), [Action::TakeEpoch(epoch(7))]);
    let actions = machine.step(now, Event::EpochTaken(epoch(8)));
    assert!(matches!(&actions[..], [Action::Form { ranks, .. }] if *ranks == shards("ba")), "{actions:?}");
}

#[test]
fn shards_that_differ_do_not_mix() {
    let mut group = Group::new(settings(2));
    group.arrive("a", 1);
    let other = Candidate { kind: "cuda".to_owned(), ..candidate("b", 1) };
    assert_eq!(group.on(Event::Arrived(other)), []);
    assert!(group.machine.waits_for().unwrap().contains("numerics"));
    group.arrive("c", 1);
    let form = group.form(1, "ac", None);
    assert_eq!(group.answer(), [form]);
}

#[test]
fn pages_are_kept_if_every_rank_has_them_and_as_many() {
    let reform = |blocks: u32, kept: [Option<u64>; 2]| {
        let mut group = pair();
        group.lose("a", 1);
        group.arrive("a", 2);
        group.loaded("a", blocks, kept[0]);
        group.loaded("b", 70, kept[1]);
        group.ready("a");
        group.ready("b")
    };
    assert_eq!(reform(70, [Some(5), Some(7)]), [serving(2, 70, Some((1, 5)))]);
    assert_eq!(reform(90, [Some(5), Some(7)]), [serving(2, 70, Some((1, 5)))]);
    assert_eq!(reform(60, [Some(5), Some(7)]), [serving(2, 60, None)]);
    assert_eq!(reform(70, [None, Some(7)]), [serving(2, 70, None)]);
}

#[test]
fn a_formation_that_fails_leaves_the_pages_of_the_last_that_served() {
    let mut group = pair();
    group.lose("a", 1);
    group.arrive("a", 2);
    group.answer();
    group.loaded("b", 70, Some(7));
    assert_eq!(group.lose("a", 2), [retire(2, "b", true)], "it did not serve: nothing is lost");
    let form = group.form(3, "ab", Some(1));
    group.arrive("a", 3);
    assert_eq!(group.answer(), [form]);
    let actions = group.serve(70, Some(7));
    assert_eq!(actions, [serving(3, 70, Some((1, 7)))]);
}

#[test]
fn failures_pause_and_then_give_up() {
    let mut group = Group::new(Settings { give_up_after: Some(3), ..settings(1) });
    group.arrive("a", 1);
    group.answer();
    group.failed("a");
    assert!(group.machine.wakes_at().unwrap() < group.now + FIRST_PAUSE, "the first is tried again soon");
    group.wait(FIRST_PAUSE);
    group.tick();
    group.answer();
    group.failed("a");
    assert_eq!(group.machine.wakes_at(), Some(group.now + FIRST_PAUSE));
    assert_eq!(group.tick(), [], "not yet");
    group.wait(FIRST_PAUSE);
    group.tick();
    group.answer();
    let cause = "rank 0 (a) has failed: no such file".to_owned();
    assert_eq!(group.failed("a").last(), Some(&Action::GiveUp(cause)));
    // What becomes of it is for others to say; meanwhile it tries again.
    assert_eq!(group.machine.wakes_at(), Some(group.now + 2 * FIRST_PAUSE));
    let why = group.machine.waits_for().unwrap();
    assert_eq!(why, "another attempt, in at most 10 s: rank 0 (a) has failed: no such file");
    group.wait(2 * FIRST_PAUSE);
    group.tick();
    assert_eq!((group.answer().len(), group.machine.waits_for()), (1, None));
    group.serve(70, None);
    group.answer();
    assert!(!group.failed("a").iter().any(|a| matches!(a, Action::GiveUp(_))));
}

#[test]
fn a_group_that_served_is_never_given_up() {
    let mut group = pair_of(Settings { give_up_after: Some(3), ..settings(2) });
    for _ in 1..20 {
        let actions = group.failed("a");
        assert!(!actions.iter().any(|a| matches!(a, Action::GiveUp(_))), "{actions:?}");
        group.now = group.machine.wakes_at().unwrap();
        group.tick();
        group.answer();
        assert_eq!(group.machine.phase(), "loading");
    }
}

#[test]
fn who_always_fails_first_is_replaced() {
    let mut group = pair_and_spare();
    let mut seats = Vec::new();
    for _ in 0..2 {
        group.failed("a");
        group.now = group.machine.wakes_at().unwrap();
        group.tick();
        group.answer();
        seats.push(group.machine.ranks()[0].clone());
    }
    assert_eq!(seats, shards("ac"), "once more, then the spare");
    assert_eq!(group.machine.role_of(&shard("a"), group.now), "joining");
}

#[test]
fn no_memory_for_a_block_is_a_failure() {
    let mut group = Group::new(Settings { give_up_after: Some(1), ..settings(1) });
    group.arrive("a", 1);
    group.answer();
    let actions = group.loaded("a", 0, None);
    assert!(
        matches!(actions.last(), Some(Action::GiveUp(cause)) if cause.contains("--kv-cache-memory")),
        "{actions:?}"
    );
}

#[test]
fn a_store_that_is_away_is_asked_again() {
    let mut group = Group::new(settings(1));
    group.arrive("a", 1);
    group.is_asked = false;
    assert_eq!(group.on(Event::EpochRefused), []);
    group.now = group.machine.wakes_at().unwrap();
    group.tick();
    assert!(group.is_asked);
    group.answer();
    group.serve(9, None);
    // While it serves, the store's absence harms nobody, and the reserve is filled when it is back.
    group.is_asked = false;
    assert_eq!(group.on(Event::EpochRefused), []);
    assert_eq!(group.machine.phase(), "serving");
    group.now = group.machine.wakes_at().unwrap();
    group.tick();
    assert!(group.is_asked);
}

#[test]
fn who_does_not_load_is_evicted() {
    let mut group = Group::new(settings(2));
    for name in ["a", "b", "c"] {
        group.arrive(name, 1);
    }
    group.answer();
    group.loaded("a", 7, None);
    group.wait(LOAD_LIMIT - Duration::from_secs(1));
    group.on(Event::Progress { from: origin("b", 1), epoch: epoch(1) });
    group.wait(Duration::from_secs(2));
    assert_eq!(group.tick(), [], "it has moved");
    group.wait(LOAD_LIMIT);
    let actions = group.tick();
    assert!(actions.contains(&Action::Evict { shard: shard("b"), cause: Cause::Deadline }), "{actions:?}");
    group.answer();
    assert_eq!(group.machine.ranks(), shards("ac"));
}

#[test]
fn a_stuck_rank_is_evicted_and_its_spare_goes_on() {
    let mut group = pair_and_spare();
    group.planned(1);
    group.wait(Duration::from_millis(20));
    group.stepped("a", 1);
    group.stepped("b", 1);
    group.planned(2);
    for _ in 0..30 {
        group.wait(Duration::from_millis(50));
        group.beat("a", Some(1));
        group.beat("b", None);
        let actions = group.tick();
        if !actions.is_empty() {
            assert!(actions.contains(&Action::Evict { shard: shard("b"), cause: Cause::Deadline }), "{actions:?}");
            let form = group.form(2, "ac", Some(1));
            assert_eq!(actions.last(), Some(&form));
            // It attaches again at once, and has to wait for its trust.
            group.arrive("b", 1);
            assert_eq!(group.machine.role_of(&shard("b"), group.now), "joining");
            return;
        }
    }
    panic!("nobody noticed");
}

#[test]
fn if_nobody_is_to_blame_the_same_shards_try_again() {
    let mut group = pair_and_spare();
    group.planned(1);
    group.wait(Duration::from_secs(61));
    group.beat("a", Some(1));
    group.beat("b", Some(0));
    let actions = group.tick();
    assert!(!actions.iter().any(|a| matches!(a, Action::Evict { .. })), "{actions:?}");
    group.now = group.machine.wakes_at().unwrap();
    let form = group.form(2, "ab", Some(1));
    assert_eq!(group.tick(), [form]);
}

#[test]
fn a_silent_loss_is_a_loss_like_any() {
    let mut group = pair_and_spare();
    let from = origin("b", 1);
    let actions = group.on(Event::Left { from, cause: Cause::Silent, reason: "it was silent".to_owned() });
    assert_eq!(actions[0], lost(1, Cause::Silent, "rank 1 (b) is lost: it was silent", false));
    assert_eq!(group.machine.ranks(), shards("ac"));
}

#[test]
fn the_first_formation_waits_a_moment_for_owners() {
    let now = Instant::now();
    let until = now + OWNERS_LIMIT;
    let seen = |names: &str| names.chars().map(|c| (shard(&c.to_string()), format!("10.0.0.{c}"))).collect();
    let taken_over = |names: &str| {
        let mut machine = GroupMachine::new(settings(2), epoch(7), shards("ab"), now);
        machine.expect(seen(names), until);
        Group { machine, now, store: 7, is_asked: false }
    };

    // Others come first, and are not seated before the owners are here.
    let mut group = taken_over("abc");
    assert_eq!(
        group.machine.waits_for().unwrap(),
        "0 of 2 shards are attached; waiting for shard a, last seen at 10.0.0.a; shard b, last seen at 10.0.0.b"
    );
    group.arrive("c", 1);
    group.arrive("b", 1);
    assert!(!group.is_asked && group.machine.wakes_at() == Some(until));
    let waits_for = group.machine.waits_for().unwrap();
    assert_eq!(
        waits_for,
        "2 shards are attached; waiting a moment for shard a, last seen at 10.0.0.a, which had a rank before"
    );
    group.arrive("a", 1);
    let form = group.form(8, "ab", None);
    assert_eq!(group.answer(), [form]);

    // Not for longer than that, and once only.
    let mut group = taken_over("ab");
    group.arrive("c", 1);
    group.arrive("b", 1);
    group.wait(OWNERS_LIMIT);
    group.tick();
    let form = group.form(8, "cb", None);
    assert_eq!(group.answer(), [form]);
    group.serve(70, None);
    group.answer();
    group.arrive("d", 1);
    group.lose("c", 1);
    assert_eq!(group.machine.phase(), "loading", "a loss later on waits for nobody");

    // Not for those whose records are gone.
    let mut group = taken_over("b");
    group.arrive("c", 1);
    group.arrive("b", 1);
    let form = group.form(8, "cb", None);
    assert_eq!(group.answer(), [form]);
}

#[test]
fn fewer_ranks_are_not_formed_before_owners_were_waited_for() {
    let now = Instant::now();
    let until = now + OWNERS_LIMIT;
    let settings = Settings { regroup_after: Some(Duration::from_millis(300)), ..settings(2) };
    let mut machine = GroupMachine::new(settings, epoch(7), shards("ab"), now);
    machine.expect([(shard("a"), String::new())].into(), until);
    let mut group = Group { machine, now, store: 7, is_asked: false };
    group.arrive("b", 1);
    group.wait(Duration::from_millis(300));
    assert_eq!(group.tick(), []);
    // Not at once and again and again: nothing would come of it.
    assert!(!group.is_asked && group.machine.wakes_at() == Some(until));
    group.now = until;
    assert_eq!(group.tick(), []);
    let form = group.form(8, "b", None);
    assert_eq!(group.answer(), [form]);
}

#[test]
fn who_left_is_awaited_by_name() {
    let mut group = pair();
    group.machine.saw(&shard("b"), "10.0.0.2");
    group.lose("b", 1);
    let waits_for = group.machine.waits_for().unwrap();
    assert_eq!(waits_for, "1 of 2 shards are attached; waiting for shard b, last seen at 10.0.0.2");
}

/// A new leader, whose shards have pages of the ranks that they will take.
fn heirs(a: Option<(usize, usize)>, b: Option<(usize, usize)>) -> (Group, Vec<Action>) {
    let mut group = Group::new(settings(2));
    group.on(Event::Arrived(Candidate { holds: a, ..candidate("a", 1) }));
    group.on(Event::Arrived(Candidate { holds: b, ..candidate("b", 1) }));
    let formed = group.answer();
    (group, formed)
}

fn wants_sealed(actions: &[Action]) -> bool {
    matches!(actions, [Action::Form { keep_sealed: true, keep_kv_of: None, .. }])
}

#[test]
fn a_new_leader_takes_over_what_all_ranks_have() {
    let seal = |token| Seal::of(&[token], 1);
    let (mut group, formed) = heirs(Some((2, 0)), Some((2, 1)));
    assert!(wants_sealed(&formed), "{formed:?}");
    // A formation that comes to nothing changes nothing.
    assert_eq!(group.failed("a"), [retire(1, "a", true), retire(1, "b", true)]);
    group.now += Duration::from_secs(1);
    group.tick();
    let formed = group.answer();
    assert!(wants_sealed(&formed), "{formed:?}");
    for (name, blocks) in [("a", [(0, seal(1)), (3, seal(2))]), ("b", [(0, seal(1)), (3, seal(9))])] {
        let slice = Slice { kv_blocks: 70, sealed: Some(blocks.into()), ..Slice::default() };
        group.on(Event::Loaded { from: group.life_of(name), epoch: group.machine.epoch(), slice });
    }
    group.ready("a");
    let kept = Some(Kept::Sealed(vec![(0, seal(1))]));
    assert_eq!(group.ready("b")[0], Action::Serving { epoch: epoch(2), kv_blocks: 70, kept });
    // From now on epochs say more.
    group.answer();
    group.lose("b", 1);
    let returned = group.on(Event::Arrived(Candidate { holds: Some((2, 1)), ..candidate("b", 2) }));
    assert_eq!(returned, [group.form(3, "ab", Some(2))]);
}

#[test]
fn pages_of_some_ranks_only_are_given_back() {
    for (a, b) in [(Some((2, 0)), None), (Some((2, 0)), Some((2, 0))), (Some((3, 0)), Some((2, 1))), (None, None)] {
        let (group, formed) = heirs(a, b);
        assert_eq!(formed, [group.form(1, "ab", None)]);
    }
}

#[test]
fn a_copy_stands_in_for_a_rank_that_was_lost_with_the_leader() {
    let seal = |token| Seal::of(&[token], 1);
    let mut group = Group::new(settings(2));
    group.machine = GroupMachine::new(settings(2), epoch(0), shards("ab"), group.now);
    group.on(Event::Arrived(Candidate { holds: Some((2, 1)), ..candidate("b", 1) }));
    group.arrive("d", 1);
    let copies = [(2, 0), (2, 1)].into();
    group.on(Event::Arrived(Candidate { copies, ..candidate("e", 1) }));
    // Its owner would be better, if it lives.
    assert_eq!(group.machine.wakes_at(), Some(group.now + COPIED_OWNERS_LIMIT));
    group.wait(COPIED_OWNERS_LIMIT);
    group.tick();
    let formed = group.answer();
    assert!(wants_sealed(&formed), "{formed:?}");
    assert_eq!(group.machine.ranks(), shards("eb"), "of two spares the one with copies");
    for (name, blocks) in [("e", vec![(0, seal(1))]), ("b", vec![(0, seal(1)), (3, seal(9))])] {
        let sealed = Some(blocks.into_iter().collect());
        let slice = Slice { kv_blocks: 70, sealed, ..Slice::default() };
        group.on(Event::Loaded { from: group.life_of(name), epoch: group.machine.epoch(), slice });
    }
    group.ready("e");
    let kept = Some(Kept::Sealed(vec![(0, seal(1))]));
    assert_eq!(group.ready("b")[0], Action::Serving { epoch: epoch(1), kv_blocks: 70, kept });
}

#[test]
fn an_owner_that_was_started_anew_leaves_its_rank_to_who_has_a_copy() {
    let mut group = Group::new(settings(2));
    group.machine = GroupMachine::new(settings(2), epoch(0), shards("ab"), group.now);
    let seen = [(shard("c"), String::new())].into();
    group.machine.expect(seen, group.now + OWNERS_LIMIT);
    group.on(Event::Arrived(Candidate { holds: Some((2, 1)), ..candidate("b", 1) }));
    group.arrive("a", 2);
    assert_eq!(group.machine.wakes_at(), Some(group.now + COPIED_OWNERS_LIMIT), "the spare may come");
    assert!(group.machine.waits_for().unwrap().ends_with("copies of KV pages"));
    group.on(Event::Arrived(Candidate { copies: [(2, 0), (2, 1)].into(), ..candidate("c", 1) }));
    let formed = group.answer();
    assert!(wants_sealed(&formed), "{formed:?}");
    assert_eq!(group.machine.ranks(), shards("cb"));
    // Nobody comes.
    let mut group = Group::new(settings(2));
    group.machine = GroupMachine::new(settings(2), epoch(0), shards("ab"), group.now);
    group.machine.expect([(shard("c"), String::new())].into(), group.now + OWNERS_LIMIT);
    group.on(Event::Arrived(Candidate { holds: Some((2, 1)), ..candidate("b", 1) }));
    group.arrive("a", 2);
    group.wait(COPIED_OWNERS_LIMIT);
    group.tick();
    assert_eq!(group.answer(), [group.form(1, "ab", None)]);
}

#[test]
fn copies_of_another_rank_stand_in_for_nobody() {
    for copies in [vec![], vec![(2, 1)], vec![(3, 0)]] {
        let mut group = Group::new(settings(2));
        group.machine = GroupMachine::new(settings(2), epoch(0), shards("ab"), group.now);
        group.on(Event::Arrived(Candidate { holds: Some((2, 1)), ..candidate("b", 1) }));
        group.on(Event::Arrived(Candidate { copies: copies.into_iter().collect(), ..candidate("c", 1) }));
        assert_eq!(group.machine.wakes_at(), Some(group.now + OWNERS_LIMIT));
        group.wait(OWNERS_LIMIT);
        group.tick();
        assert_eq!(group.answer(), [group.form(1, "cb", None)]);
    }
}

#[test]
fn who_comes_with_pages_is_not_seated_beside_a_stranger_at_once() {
    let mut group = Group::new(settings(2));
    group.machine = GroupMachine::new(settings(2), epoch(0), shards("ab"), group.now);
    group.on(Event::Arrived(Candidate { holds: Some((2, 0)), ..candidate("a", 1) }));
    group.arrive("c", 1);
    assert_eq!((group.machine.phase(), group.machine.wakes_at()), ("waiting", Some(group.now + OWNERS_LIMIT)));
    group.on(Event::Arrived(Candidate { holds: Some((2, 1)), ..candidate("b", 1) }));
    let formed = group.answer();
    assert!(wants_sealed(&formed), "{formed:?}");
    // Nobody is awaited for ever.
    let mut group = Group::new(settings(2));
    group.machine = GroupMachine::new(settings(2), epoch(0), shards("ab"), group.now);
    group.on(Event::Arrived(Candidate { holds: Some((2, 0)), ..candidate("a", 1) }));
    group.arrive("c", 1);
    group.wait(OWNERS_LIMIT);
    group.tick();
    assert_eq!(group.answer(), [group.form(1, "ac", None)]);
}
