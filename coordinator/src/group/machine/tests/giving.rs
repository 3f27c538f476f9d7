//! What goes to other groups.

use super::*;

fn can_give(group: &Group, given: Given) -> Option<String> {
    group.machine.can_give(given, group.now).map(|shard| shard.0)
}

#[test]
fn only_what_is_not_needed_is_given_away() {
    let mut group = pair();
    assert_eq!((can_give(&group, Given::Spare), can_give(&group, Given::Idle)), (None, None));
    group.arrive("c", 1);
    assert_eq!((can_give(&group, Given::Spare).as_deref(), can_give(&group, Given::Idle)), (Some("c"), None));
    group.on(Event::Drain { ticket: 1, shard: shard("c"), is_helped: false });
    assert_eq!(can_give(&group, Given::Spare), None, "a drained spare is none");
    group.lose("a", 1);
    assert!(!group.machine.standing().is_formed);
    let given = (can_give(&group, Given::Spare), can_give(&group, Given::Idle));
    assert_eq!((given.0, given.1.as_deref()), (None, Some("b")), "alone it is of no use here");
}

#[test]
fn a_drained_rank_may_wait_for_a_spare_of_another_group() {
    let mut group = pair();
    let drain = |is_helped| Event::Drain { ticket: 1, shard: shard("a"), is_helped };
    assert!(matches!(&group.on(drain(false))[..], [Action::Answer(1, Err(_))]));
    assert_eq!(group.on(drain(true)), [], "it lacks one from now on");
    assert!(group.machine.standing().drained.contains(&shard("a")));
    let prepare = Action::Prepare { shard: shard("c"), world_size: 2, ranks: vec![0, 1] };
    assert_eq!(group.arrive("c", 1), [prepare]);
    assert_eq!(group.prepared("c", 2, 0), [Action::Hold(epoch(1))]);
    let form = group.form(2, "cb", Some(1));
    assert_eq!(group.idle().last(), Some(&form));
    let changed = Changed { successor: Some(shard("c")), stall: Duration::ZERO };
    assert_eq!(group.serve(70, None).last(), Some(&Action::Answer(1, Ok(changed))));
}

#[test]
fn a_spare_that_is_about_to_take_a_rank_stays() {
    let mut group = pair_and_spare();
    group.on(Event::Drain { ticket: 1, shard: shard("a"), is_helped: false });
    assert_eq!(group.machine.phase(), "switching");
    assert_eq!(can_give(&group, Given::Spare), None);
}

#[test]
fn whoever_keeps_copies_of_rows_stays_rather_than_another_spare() {
    let mut group = Group::new(Settings { mirror_to: MirrorTo::Spare, ..settings(1) });
    for name in ["a", "b", "c"] {
        group.on(Event::Arrived(Candidate { takes_mirror: true, ..candidate(name, 1) }));
    }
    let actions = group.answer();
    let [Action::Form { ranks, mirrors, .. }] = &actions[..] else { panic!("{actions:?}") };
    assert_eq!((ranks, mirrors), (&shards("a"), &Mirrors::Spare(shard("b"))));
    assert_eq!(can_give(&group, Given::Spare).as_deref(), Some("c"));
}

#[test]
fn an_epoch_in_reserve_is_not_used_if_a_newcomer_may_know_a_greater_one() {
    let mut group = pair();
    group.answer();
    let reserved = group.store;
    // Other groups take theirs.
    group.store += 5;
    assert_eq!(group.on(Event::Outrun(epoch(reserved + 3))), []);
    assert!(group.is_asked, "another one is taken at once");
    group.answer();
    group.arrive("c", 1);
    let actions = group.lose("a", 1);
    let formed = actions.iter().find_map(|a| match a {
        Action::Form { epoch, .. } => Some(epoch.raw()),
        _ => None,
    });
    assert_eq!(formed, Some(reserved + 6));
    // What is greater anyway stays.
    group.answer();
    assert_eq!(group.on(Event::Outrun(epoch(1))), []);
    assert!(!group.is_asked);
}

#[test]
fn an_answer_of_the_store_that_was_outrun_is_asked_for_again() {
    let mut group = Group::new(settings(1));
    group.arrive("a", 1);
    group.on(Event::Outrun(epoch(9)));
    group.answer();
    assert!(group.is_asked);
    group.store = 20;
    assert!(matches!(group.answer()[..], [Action::Form { epoch: formed, .. }] if formed == epoch(21)));
}

#[test]
fn it_says_who_has_ranks_and_who_may_have_none() {
    let mut group = pair_and_spare();
    assert_eq!(group.machine.standing().ranks, shards("ab"));
    group.on(Event::Drain { ticket: 1, shard: shard("c"), is_helped: false });
    group.on(Event::Leaving(origin("b", 1)));
    let standing = group.machine.standing();
    assert_eq!(standing.drained.into_iter().collect::<Vec<_>>(), shards("c"));
    assert_eq!(standing.leaving.into_iter().collect::<Vec<_>>(), shards("b"));
    assert_eq!((standing.awaited, standing.is_rolling), (None, false));
}
