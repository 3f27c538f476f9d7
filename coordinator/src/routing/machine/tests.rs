use phalanx_cluster::id::TokenId;

use super::*;
use crate::request::StopConditions;

const LEAVE_AFTER: Duration = Duration::from_secs(1);

fn machine(groups: usize) -> (RoutingMachine, Instant) {
    let now = Instant::now();
    let settings = Settings { groups, block_size: 16, prefix_caching: true, leave_after: LEAVE_AFTER };
    let mut machine = RoutingMachine::new(settings, now);
    (0..groups).for_each(|group| machine.on_serving(group, 1000, false));
    (machine, now)
}

fn request(prompt: impl IntoIterator<Item = TokenId>, max_tokens: u32, n: u32) -> Request {
    Request {
        id: "r".to_owned(),
        prompt: prompt.into_iter().collect(),
        n,
        sampling: Default::default(),
        max_tokens,
        is_open_ended: false,
        stop: StopConditions::default(),
        deadline: None,
        priority: 0,
        cache_root: phalanx_cluster::seal::Seal::EMPTY,
        resume: Vec::new(),
    }
}

/// Sends a request where it belongs; says where.
fn send(machine: &mut RoutingMachine, request: &Request) -> Share {
    let demand = machine.demand(request);
    let best = machine.choose(&demand)[0];
    machine.begin(best, &demand)
}

#[test]
fn requests_go_to_the_least_loaded_group() {
    let (mut machine, _) = machine(3);
    let long = send(&mut machine, &request(0..500, 200, 1));
    assert_eq!(long.group(), 0);
    let groups: Vec<usize> =
        (1..7).map(|i| send(&mut machine, &request(1000 * i..1000 * i + 50, 100, 1)).group()).collect();
    assert_eq!(groups, [1, 2, 1, 2, 1, 2], "until they are as loaded as the first");
    machine.end(long);
    assert_eq!(send(&mut machine, &request(9000..9050, 100, 1)).group(), 0, "its request has ended");
}

#[test]
fn choices_count_and_endless_requests_do_not_count_endlessly() {
    let (mut machine, _) = machine(2);
    assert_eq!(send(&mut machine, &request(0..10, 100, 4)).group(), 0);
    assert_eq!(send(&mut machine, &request(100..110, u32::MAX, 1)).group(), 1);
    assert_eq!(send(&mut machine, &request(200..210, 100, 1)).group(), 1, "266 rows there, 410 here");
    assert_eq!(send(&mut machine, &request(300..310, 100, u32::MAX)).group(), 1);
}

#[test]
fn a_long_beginning_draws_requests_until_its_group_is_behind_by_as_much() {
    let (mut machine, _) = machine(2);
    let chat = |last: u32| request((0..640).chain([1000 + last]), 60, 1);
    assert_eq!(send(&mut machine, &chat(0)).group(), 0);
    let mut groups = Vec::new();
    for last in 1..12 {
        groups.push(send(&mut machine, &chat(last)).group());
    }
    // The first one costs 701 rows, the others 61 each where the beginning is known, 701 elsewhere.
    assert_eq!(groups[0], 1, "the other group is idle: computing the beginning again is quicker than waiting");
    assert!(groups[1..].contains(&0) && groups[1..].contains(&1), "then both know it, and load decides: {groups:?}");

    let (mut machine, _) = self::machine(2);
    let first = send(&mut machine, &chat(0));
    machine.end(first);
    let groups: Vec<usize> = (1..12).map(|last| send(&mut machine, &chat(last)).group()).collect();
    assert_eq!(groups, [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], "640 rows are worth ten waiting requests");
    assert_eq!(send(&mut machine, &chat(12)).group(), 1, "but not eleven");
}

#[test]
fn a_group_that_came_back_with_empty_pages_knows_no_beginnings() {
    let (mut machine, now) = machine(2);
    let chat = request(0..641, 60, 1);
    let share = send(&mut machine, &chat);
    machine.end(share);
    let other = send(&mut machine, &request(5000..5001, 60, 1));
    assert_eq!(other.group(), 0);
    assert_eq!(machine.choose(&machine.demand(&chat)), [0, 1]);
    machine.on_lost(0, now);
    assert_eq!(machine.choose(&machine.demand(&chat)), [1]);
    machine.on_serving(0, 1000, true);
    assert_eq!(machine.choose(&machine.demand(&chat)), [0, 1], "its pages were kept");
    machine.on_lost(0, now);
    machine.on_serving(0, 1000, false);
    assert_eq!(machine.choose(&machine.demand(&chat)), [1, 0]);
}

#[test]
fn requests_leave_a_group_that_stays_away_if_another_serves() {
    let (mut machine, now) = machine(2);
    assert_eq!((machine.leaves_at(0), machine.leaves_at(7)), (None, None));
    machine.on_lost(0, now);
    machine.on_lost(0, now + LEAVE_AFTER / 2);
    assert_eq!(machine.leaves_at(0), Some(now + LEAVE_AFTER), "since the first loss");
    machine.on_lost(1, now);
    assert_eq!(machine.leaves_at(0), None, "there is nowhere to go");
    assert_eq!(machine.choose(&machine.demand(&request(0..3, 3, 1))), [0, 1], "and all will do");
    machine.on_serving(0, 10, false);
    assert_eq!((machine.leaves_at(0), machine.leaves_at(1)), (None, Some(now + LEAVE_AFTER)));
}

#[test]
fn without_prefix_caching_load_alone_decides() {
    let now = Instant::now();
    let settings = Settings { groups: 2, block_size: 16, prefix_caching: false, leave_after: LEAVE_AFTER };
    let mut machine = RoutingMachine::new(settings, now);
    (0..2).for_each(|group| machine.on_serving(group, 1000, false));
    let share = send(&mut machine, &request(0..641, 60, 1));
    machine.end(share);
    let other = send(&mut machine, &request(5000..5001, 60, 1));
    assert_eq!(other.group(), 0);
    assert_eq!(machine.choose(&machine.demand(&request(0..641, 60, 1))), [1, 0]);
}
