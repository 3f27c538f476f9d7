//! What is changed on purpose.

use super::*;
use crate::group::change::ChangeError;

fn switched(cause: Cause, in_epoch: u64) -> Action {
    lost(in_epoch, cause, "a planned change", true)
}

fn drain(group: &mut Group, name: &str) -> Vec<Action> {
    group.on(Event::Drain { ticket: 9, shard: shard(name), is_helped: false })
}

#[test]
fn a_drained_rank_goes_to_the_spare_between_two_steps() {
    let mut group = pair_and_spare();
    assert_eq!(drain(&mut group, "a"), [Action::Hold(epoch(1))]);
    assert_eq!(group.machine.phase(), "switching");
    assert_eq!(group.machine.role_of(&shard("a"), group.now), "draining");
    assert_eq!(group.stepped("a", 1), [Action::Deliver], "what is in flight counts");
    let form = group.form(2, "cb", Some(1));
    assert_eq!(group.idle(), [switched(Cause::Drain, 1), retire(1, "a", true), retire(1, "b", true), form]);
    group.wait(Duration::from_millis(40));
    let changed = Changed { successor: Some(shard("c")), stall: Duration::from_millis(40) };
    let actions = group.serve(70, None);
    assert_eq!(actions, [serving(2, 70, None), Action::Answer(9, Ok(changed))]);
    assert_eq!(group.machine.role_of(&shard("a"), group.now), "drained");
    // It is not seated again until it is undrained, even if it is needed.
    group.answer();
    group.lose("b", 1);
    assert_eq!(group.machine.phase(), "waiting");
    let actions = group.on(Event::Undrain { ticket: 10, shard: shard("a") });
    assert_eq!(actions[0], Action::Answer(10, Ok(Changed::default())));
    assert_eq!(group.machine.ranks().len(), 2);
}

#[test]
fn a_drain_that_nobody_can_answer_for_is_refused() {
    let mut group = pair();
    let refused = |actions: Vec<Action>| match &actions[..] {
        [Action::Answer(9, Err(error))] => error.to_string(),
        _ => panic!("{actions:?}"),
    };
    assert!(refused(drain(&mut group, "a")).contains("attach a spare first"));
    assert!(refused(drain(&mut group, "x")).contains("no shard named x"));
    assert_eq!(group.machine.phase(), "serving");
    assert_eq!(group.machine.role_of(&shard("a"), group.now), "rank");
}

#[test]
fn a_drained_spare_has_nothing_to_give() {
    let mut group = pair_and_spare();
    assert_eq!(drain(&mut group, "c"), [Action::Answer(9, Ok(Changed::default()))]);
    group.lose("a", 1);
    assert_eq!(group.machine.phase(), "waiting", "a drained spare is none");
}

#[test]
fn a_change_waits_for_its_successor_to_load_and_for_an_epoch() {
    let mut group = pair();
    group.machine.reserved = None;
    group.arrive("c", 1);
    let actions = drain(&mut group, "b");
    let prepare = Action::Prepare { shard: shard("c"), world_size: 2, ranks: vec![1, 0] };
    assert_eq!(actions, [prepare], "what it is needed for comes first");
    assert_eq!(group.prepared("c", 2, 1), [], "no epoch yet");
    assert!(group.is_asked);
    group.store = 4;
    assert_eq!(group.answer(), [Action::Hold(epoch(1))]);
}

#[test]
fn spares_load_when_all_that_stood_still_goes_on() {
    let mut group = pair_and_spare();
    group.lose("a", 1);
    for name in ["c", "b"] {
        group.loaded(name, 70, None);
    }
    for name in ["c", "b"] {
        group.ready(name);
    }
    assert_eq!(group.machine.phase(), "serving");
    assert_eq!(group.arrive("a", 2), [], "who was killed is back while others' answers are computed again");
    let prepare = Action::Prepare { shard: shard("a"), world_size: 2, ranks: vec![0, 1] };
    assert!(group.recovered(Duration::from_secs(1)).contains(&prepare));
}

#[test]
fn a_loss_in_the_middle_of_a_change_is_recovered_and_the_change_made() {
    let mut group = pair_and_spare();
    group.arrive("d", 1);
    drain(&mut group, "a");
    group.lose("b", 1);
    let ranks = group.machine.ranks().to_vec();
    assert!(!ranks.contains(&shard("a")), "{ranks:?}");
    let actions = group.serve(70, None);
    assert!(matches!(actions.last(), Some(Action::Answer(9, Ok(_)))), "{actions:?}");
    assert_eq!(group.idle(), [Action::CountFenced], "nothing is held any more");
}

#[test]
fn who_was_asked_to_end_gives_its_rank_away_first() {
    let mut group = pair_and_spare();
    assert_eq!(group.on(Event::Leaving(origin("b", 1))), [Action::Hold(epoch(1))]);
    let actions = group.idle();
    let dismissed = |a: &Action| matches!(a, Action::Shutdown { shard: s, .. } if *s == shard("b"));
    assert!(actions.iter().any(dismissed), "{actions:?}");
    assert_eq!(group.machine.ranks(), shards("ac"));
    let spare = group.on(Event::Leaving(origin("b", 1)));
    assert_eq!(spare, [], "told once");
}

#[test]
fn who_was_asked_to_end_goes_between_two_steps_even_without_a_successor() {
    let mut group = pair();
    assert_eq!(group.on(Event::Leaving(origin("b", 1))), [Action::Hold(epoch(1))]);
    let actions = group.idle();
    assert_eq!(actions[..3], [switched(Cause::Drain, 1), retire(1, "a", true), retire(1, "b", true)]);
    assert!(matches!(&actions[3], Action::Shutdown { shard: s, .. } if *s == shard("b")), "{actions:?}");
    group.lose("b", 1);
    let form = group.form(2, "ab", Some(1));
    assert_eq!(group.arrive("b", 2), [form], "it takes its own rank back");
}

#[test]
fn a_rolling_restart_takes_spares_first_and_ranks_after_them() {
    let mut group = pair_and_spare();
    let mut told = Vec::new();
    let mut queue = group.on(Event::Rollout { but: Vec::new(), return_limit: None });
    assert!(group.machine.is_rolling());
    let mut lives = BTreeMap::from([("a".to_owned(), 1u64), ("b".to_owned(), 1), ("c".to_owned(), 1)]);
    for _ in 0..200 {
        if queue.is_empty() {
            break;
        }
        let mut next = Vec::new();
        for action in std::mem::take(&mut queue) {
            match action {
                Action::Turned(Ok(turned)) => {
                    let name = turned.shard.map_or("-".to_owned(), |s| s.0);
                    told.push(format!("{name} {} {}/{}", turned.phase, turned.done, turned.total));
                }
                Action::Shutdown { shard: s, .. } => {
                    let life = lives.get_mut(&s.0).unwrap();
                    next.extend(group.lose(&s.0, *life));
                    *life += 1;
                    next.extend(group.arrive(&s.0, *life));
                }
                Action::Prepare { shard: s, world_size, ranks } => {
                    for rank in ranks {
                        next.extend(group.prepared(&s.0, world_size, rank));
                    }
                }
                Action::Hold(_) => next.extend(group.idle()),
                Action::Form { .. } => {
                    next.extend(group.serve(70, Some(3)));
                    next.extend(group.answer());
                }
                Action::Serving { .. } | Action::Lost { is_planned: true, .. } | Action::Retire { .. } => {}
                action => panic!("{action:?}"),
            }
        }
        next.extend(group.answer());
        queue = next;
    }
    let turns: Vec<&str> = told.iter().map(String::as_str).collect();
    assert_eq!(
        turns,
        [
            "c draining 0/3",
            "c restarting 0/3",
            "c returned 1/3",
            "b draining 1/3",
            "b restarting 1/3",
            "b returned 2/3",
            "a draining 2/3",
            "a restarting 2/3",
            "a returned 3/3",
            "- done 3/3",
        ]
    );
    assert!(!group.machine.is_rolling());
    assert_eq!(group.machine.phase(), "serving");
    assert!(lives.values().all(|life| *life == 2));
}

#[test]
fn a_rolling_restart_ends_if_a_shard_does_not_come_back() {
    let mut group = pair_and_spare();
    group.on(Event::Rollout { but: shards("ab"), return_limit: None });
    let again = group.on(Event::Rollout { but: Vec::new(), return_limit: None });
    assert!(matches!(&again[..], [Action::Turned(Err(ChangeError::Impossible(_)))]), "{again:?}");
    group.lose("c", 1);
    group.now = group.machine.wakes_at().unwrap();
    let actions = group.tick();
    let failed = |a: &Action| matches!(a, Action::Turned(Err(e)) if e.to_string().contains("c did not come back"));
    assert!(actions.iter().any(failed), "{actions:?}");
    assert!(!group.machine.is_rolling());
    assert_eq!(group.machine.phase(), "serving");
}

#[test]
fn fewer_ranks_serve_after_a_while_and_all_again_when_they_are_back() {
    let mut group = pair_of(Settings { regroup_after: Some(Duration::from_secs(30)), ..settings(2) });
    group.lose("b", 1);
    assert_eq!(group.machine.wakes_at(), Some(group.now + Duration::from_secs(30)));
    group.wait(Duration::from_secs(29));
    assert_eq!(group.tick(), []);
    group.wait(Duration::from_secs(1));
    let form = group.form(2, "a", None);
    assert_eq!(group.tick(), [form], "other pages belong to another number of ranks");
    group.serve(70, None);
    group.answer();
    assert_eq!(group.machine.world_size(), 1);
    let prepare = Action::Prepare { shard: shard("b"), world_size: 2, ranks: vec![1, 0] };
    assert_eq!(group.arrive("b", 2), [prepare]);
    assert_eq!(group.prepared("b", 2, 1), [Action::Hold(epoch(2))]);
    let form = group.form(3, "ab", None);
    assert_eq!(group.idle().last(), Some(&form));
    assert_eq!(group.serve(70, None), [serving(3, 70, None)]);
}

#[test]
fn fewer_ranks_need_enough_memory() {
    let mut group = Group::new(Settings { regroup_after: Some(Duration::from_secs(1)), ..settings(2) });
    for (name, memory_bytes) in [("a", 150), ("b", 250)] {
        group.on(Event::Arrived(Candidate { memory_bytes, ..candidate(name, 1) }));
    }
    group.answer();
    // 100 bytes of weights on each of two ranks.
    group.serve(70, None);
    group.answer();
    group.lose("b", 1);
    group.wait(Duration::from_secs(2));
    assert_eq!(group.tick(), []);
    assert_eq!(group.machine.phase(), "waiting");
    group.on(Event::Arrived(Candidate { memory_bytes: 250, ..candidate("b", 2) }));
    group.serve(70, None);
    group.answer();
    group.lose("a", 1);
    group.wait(Duration::from_secs(2));
    group.tick();
    assert_eq!(group.machine.ranks(), shards("b"));
}

#[test]
fn a_spare_that_takes_mirrors_gets_them_once_it_is_ready() {
    let mut group = pair_of(Settings { mirror_to: MirrorTo::Spare, ..settings(2) });
    group.on(Event::Arrived(Candidate { takes_mirror: true, ..candidate("c", 1) }));
    assert_eq!(group.prepared("c", 2, 0), [Action::Hold(epoch(1))]);
    let mirrored = |in_epoch: u64, of: u64| Action::Form {
        epoch: epoch(in_epoch),
        ranks: shards("ab"),
        keep_kv_of: Some(epoch(of)),
        keep_sealed: false,
        mirrors: Mirrors::Spare(shard("c")),
        copies: Vec::new(),
    };
    assert_eq!(group.idle().last(), Some(&mirrored(2, 1)));
    assert_eq!(group.serve(70, Some(4)), [serving(2, 70, Some((1, 4)))]);
    group.answer();
    assert_eq!(group.prepared("c", 2, 1), [], "it has them");
    // Its next life is a new one.
    group.lose("c", 1);
    group.on(Event::Arrived(Candidate { takes_mirror: true, ..candidate("c", 2) }));
    assert_eq!(group.prepared("c", 2, 0), [Action::Hold(epoch(2))]);
    assert_eq!(group.idle().last(), Some(&mirrored(3, 2)));
    // It takes over, and has the other rank's pages too.
    group.serve(70, Some(4));
    group.answer();
    let taken = Action::Form {
        epoch: epoch(4),
        ranks: shards("ac"),
        keep_kv_of: Some(epoch(3)),
        keep_sealed: false,
        mirrors: Mirrors::Nowhere,
        copies: vec![(0, shard("c")), (1, shard("c"))],
    };
    assert_eq!(group.lose("b", 1).last(), Some(&taken));
}

#[test]
fn a_spare_gets_copies_when_it_is_trusted_again() {
    let mut group = pair_of(Settings { mirror_to: MirrorTo::Spare, ..settings(2) });
    group.on(Event::Arrived(Candidate { takes_mirror: true, ..candidate("c", 1) }));
    group.machine.doubt(&shard("c"), group.now);
    assert_eq!(group.prepared("c", 2, 0), []);
    // Nothing else happens meanwhile.
    group.now = group.machine.wakes_at().unwrap();
    assert_eq!(group.tick(), [Action::Hold(epoch(1))]);
    assert!(group.machine.wakes_at().unwrap() > group.now);
}

/// A group whose spare has been restarted in its turn, and is about to get copies again.
fn mirror_restarted() -> Group {
    let mut group = pair_of(Settings { mirror_to: MirrorTo::Spare, ..settings(2) });
    let spare = |incarnation| Event::Arrived(Candidate { takes_mirror: true, ..candidate("c", incarnation) });
    let take_copies = |group: &mut Group, of| {
        assert_eq!(group.prepared("c", 2, 0), [Action::Hold(epoch(of))]);
        group.idle();
        group.serve(70, Some(4));
        group.answer();
    };
    group.on(spare(1));
    take_copies(&mut group, 1);
    let told = group.on(Event::Rollout { but: Vec::new(), return_limit: None });
    assert!(told.iter().any(|a| matches!(a, Action::Shutdown { shard: s, .. } if *s == shard("c"))), "{told:?}");
    group.lose("c", 1);
    group.on(spare(2));
    take_copies(&mut group, 2);
    group
}

/// Ranks a and b in epoch 2, with copies at spare c, which is to take b's rank.
fn mirrored() -> Group {
    let mut group = pair_of(Settings { mirror_to: MirrorTo::Spare, ..settings(2) });
    group.on(Event::Arrived(Candidate { takes_mirror: true, ..candidate("c", 1) }));
    group.prepared("c", 2, 0);
    group.idle();
    group.serve(70, Some(4));
    group.answer();
    group.prepared("c", 2, 1);
    group
}

impl Group {
    fn step_each(&mut self, time: Duration, steps: std::ops::RangeInclusive<u64>) {
        for step in steps {
            self.wait(time);
            self.stepped("a", step);
        }
    }

    fn mirrored(&mut self, in_epoch: u64, step: u64) -> Vec<Action> {
        let beat = Beat { mirrored: Some((epoch(in_epoch), step)), ..Beat::default() };
        self.on(Event::Beat { from: self.life_of("c"), beat })
    }
}

#[test]
fn a_change_waits_for_copies_that_are_far_behind() {
    let mut group = mirrored();
    group.step_each(Duration::from_millis(20), 1..=40);
    assert_eq!(group.mirrored(2, 4), []);
    assert_eq!(group.machine.mirror_lag(), Some(36));
    assert_eq!(drain(&mut group, "b"), [], "36 steps would be computed again");
    group.step_each(Duration::from_millis(20), 41..=45);
    assert_eq!(group.mirrored(1, 45), [], "of another epoch");
    assert_eq!(group.mirrored(2, 38), [], "140 ms behind");
    assert_eq!(group.mirrored(2, 40), [Action::Hold(epoch(2))]);
    assert!(matches!(group.idle().last(), Some(Action::Form { .. })));
}

#[test]
fn a_change_waits_for_copies_no_longer_than_it_makes_sense() {
    let mut group = mirrored();
    group.step_each(Duration::from_millis(20), 1..=40);
    assert_eq!(drain(&mut group, "b"), [], "nothing is known of the copies");
    let limit = group.machine.wakes_at().unwrap();
    assert_eq!(limit, group.now + Duration::from_secs(5));
    group.now = limit;
    assert_eq!(group.tick(), [Action::Hold(epoch(2))]);
}

#[test]
fn a_change_that_is_not_wanted_any_more_waits_for_nothing() {
    let mut group = mirrored();
    group.step_each(Duration::from_millis(20), 1..=40);
    drain(&mut group, "b");
    group.on(Event::Undrain { ticket: 10, shard: shard("b") });
    assert_eq!(group.mirrored(2, 40), []);
    let doubts_end = group.machine.wakes_at();
    assert!(doubts_end.is_none_or(|at| at > group.now + Duration::from_secs(5)), "{doubts_end:?}");
}

#[test]
fn a_loss_while_copies_are_awaited_is_answered_at_once() {
    let mut group = mirrored();
    group.step_each(Duration::from_millis(20), 1..=40);
    drain(&mut group, "b");
    let actions = group.lose("b", 1);
    assert!(matches!(actions.last(), Some(Action::Form { keep_kv_of: Some(_), .. })), "{actions:?}");
    assert_eq!(group.machine.ranks(), shards("ac"));
}

fn ends_a_turn(actions: &[Action]) -> bool {
    actions.iter().any(|a| matches!(a, Action::Turned(Ok(turned)) if turned.phase == "returned"))
}

#[test]
fn a_rolling_restart_waits_for_whole_copies() {
    let mut group = mirror_restarted();
    let mut beat = |mirrored| {
        let beat = Beat { mirrored, ..Beat::default() };
        group.on(Event::Beat { from: group.life_of("c"), beat })
    };
    assert!(!ends_a_turn(&beat(None)));
    assert!(!ends_a_turn(&beat(Some((epoch(2), 4)))), "copies of the epoch before");
    assert!(ends_a_turn(&beat(Some((epoch(3), 0)))));
}

#[test]
fn a_rolling_restart_goes_on_if_a_mirror_has_no_memory() {
    let mut group = mirror_restarted();
    group.wait(Duration::from_secs(19));
    assert!(!ends_a_turn(&group.tick()));
    group.wait(Duration::from_secs(1));
    assert!(ends_a_turn(&group.tick()));
}

#[test]
fn a_buddy_has_what_a_shard_needs_that_returns() {
    let settings = Settings { mirror_to: MirrorTo::Buddy, ..settings(2) };
    let candidate = |name, incarnation| Candidate { takes_mirror: true, ..candidate(name, incarnation) };
    let form = |in_epoch, ranks, keep_kv_of: Option<u64>, copies: &[(usize, &str)]| Action::Form {
        epoch: epoch(in_epoch),
        ranks: shards(ranks),
        keep_kv_of: keep_kv_of.map(epoch),
        keep_sealed: false,
        mirrors: Mirrors::Buddies,
        copies: copies.iter().map(|(rank, name)| (*rank, shard(name))).collect(),
    };
    let mut group = Group::new(settings);
    group.on(Event::Arrived(candidate("a", 1)));
    group.on(Event::Arrived(candidate("b", 1)));
    assert_eq!(group.answer(), [form(1, "ab", None, &[])]);
    group.serve(70, None);
    group.answer();
    assert_eq!(group.machine.mirrors().len(), 2);
    group.lose("b", 1);
    // Rank 0 has rank 1's rows; what rank 1 had is gone.
    assert_eq!(group.on(Event::Arrived(candidate("b", 2))), [form(2, "ab", Some(1), &[(1, "a")])]);
    // The copy stays through a formation that fails, and goes with its holder.
    group.lose("b", 2);
    group.on(Event::Arrived(candidate("b", 3)));
    assert_eq!(group.answer(), [form(3, "ab", Some(1), &[(1, "a")])]);
    group.lose("a", 1);
    group.on(Event::Arrived(candidate("a", 2)));
    assert_eq!(group.answer(), [form(4, "ab", Some(1), &[])]);
}

#[test]
fn a_slow_rank_is_replaced_only_by_a_spare_that_is_ready() {
    let run = |mut group: Group| {
        let mut step = 0;
        let mut held = false;
        for took in [[20; 60], [400; 60]].concat() {
            step += 1;
            group.planned(step);
            for _ in 0..took / 20 {
                group.wait(Duration::from_millis(20));
                group.beat("a", Some(1));
                group.beat("b", None);
                held |= group.tick().iter().any(|a| matches!(a, Action::Hold(_)));
            }
            group.stepped("a", step);
            group.stepped("b", step);
        }
        held.then(|| {
            group.idle();
            group.machine.ranks().to_vec()
        })
    };
    assert_eq!(run(pair()), None);
    assert_eq!(run(pair_and_spare()), Some(shards("ac")));
}
