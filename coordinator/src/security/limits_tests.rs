//! What limits promise, with clocks of our own.

use proptest::prelude::*;

use super::*;

const KEY: &str = "team-a";

fn limits(requests: Option<u64>, tokens: Option<u64>, concurrency: Option<u32>) -> KeyLimits {
    KeyLimits { requests_per_minute: requests, tokens_per_minute: tokens, concurrency, ..KeyLimits::default() }
}

fn need(prompt: u64, output: u64) -> Need {
    Need { prompt, output, choices: 1, is_open_ended: false }
}

fn millis(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

#[test]
fn the_sixth_request_of_five_waits_for_the_first_to_age() {
    let begin = Instant::now();
    let mut limiter = Limiter::new(begin);
    let five = limits(Some(5), None, None);
    for i in 0..5 {
        limiter.request(begin + millis(2_500 * i), KEY, &five).unwrap();
    }
    let now = begin + millis(10_500);
    let Err(Refused::Later { counted, limit, used, retry_after, .. }) = limiter.request(now, KEY, &five) else {
        panic!("it is let in");
    };
    assert_eq!((counted, limit, used), (Counted::Requests, 5, 5));
    // The first came in second 0, which counts until second 61 begins.
    assert_eq!(retry_after, millis(61_000 - 10_500));
    let standing = limiter.standing(now, KEY, &five);
    // The last came in second 10.
    assert_eq!(standing.requests, Some(Quota { limit: 5, remaining: 0, reset: millis(71_000 - 10_500) }));
    assert_eq!(standing.tokens, None);
    assert!(limiter.request(now + retry_after - millis(1), KEY, &five).is_err());
    assert!(limiter.request(now + retry_after, KEY, &five).is_ok());
    assert!(limiter.request(now, "another", &five).is_ok(), "keys have nothing in common");
}

#[test]
fn what_was_reserved_in_vain_is_given_back() {
    let begin = Instant::now();
    let mut limiter = Limiter::new(begin);
    let hundred = limits(None, Some(100), None);
    let reservation = limiter.admit(begin, KEY, &hundred, need(10, 60)).unwrap();
    assert_eq!(limiter.standing(begin, KEY, &hundred).tokens.unwrap().remaining, 30);
    assert!(matches!(
        limiter.admit(begin, KEY, &hundred, need(1, 30)),
        Err(Refused::Later { counted: Counted::Tokens, used: 70, wanted: 31, .. })
    ));
    limiter.finish(begin + millis(1_500), &reservation, 15);
    assert_eq!(limiter.standing(begin + millis(1_500), KEY, &hundred).tokens.unwrap().remaining, 85);
    // Long after: its second counts no more, and nothing is given back twice.
    let late = limiter.admit(begin + millis(2_000), KEY, &hundred, need(10, 60)).unwrap();
    let next = limiter.admit(begin + millis(64_000), KEY, &hundred, need(10, 60)).unwrap();
    limiter.finish(begin + millis(64_500), &late, 10);
    assert_eq!(limiter.standing(begin + millis(64_500), KEY, &hundred).tokens.unwrap().remaining, 30);
    limiter.finish(begin + millis(64_600), &next, 0);
}

#[test]
fn requests_that_can_never_run_are_told_so() {
    let begin = Instant::now();
    let mut limiter = Limiter::new(begin);
    let hundred = limits(None, Some(100), None);
    let refused = limiter.admit(begin, KEY, &hundred, need(50, 51));
    assert_eq!(refused, Err(Refused::Never { limit: 100, wanted: 101 }));
    // Who names no length gets what is left.
    let open = Need { is_open_ended: true, ..need(50, 8000) };
    let reservation = limiter.admit(begin, KEY, &hundred, open).unwrap();
    assert!(limiter.admit(begin, KEY, &hundred, open).is_err());
    // It took more than was left: later requests wait for that.
    limiter.finish(begin, &reservation, 130);
    let standing = limiter.standing(begin, KEY, &hundred).tokens.unwrap();
    assert_eq!(standing.remaining, 0);
    assert!(limiter.admit(begin + millis(61_000), KEY, &hundred, open).is_ok());
}

#[test]
fn as_many_run_as_may() {
    let begin = Instant::now();
    let mut limiter = Limiter::new(begin);
    let two = limits(None, None, Some(2));
    let first = limiter.admit(begin, KEY, &two, need(1, 1)).unwrap();
    let _second = limiter.admit(begin, KEY, &two, need(1, 1)).unwrap();
    assert!(matches!(
        limiter.admit(begin, KEY, &two, need(1, 1)),
        Err(Refused::Later { counted: Counted::Concurrency, limit: 2, used: 2, .. })
    ));
    limiter.finish(begin, &first, 2);
    assert!(limiter.admit(begin, KEY, &two, need(1, 1)).is_ok());
}

#[test]
fn names_that_have_used_nothing_lately_are_forgotten() {
    let begin = Instant::now();
    let mut limiter = Limiter::new(begin);
    let five = limits(Some(5), None, None);
    for i in 0..FEWEST_PRUNED {
        limiter.request(begin, &format!("key {i}"), &five).unwrap();
    }
    limiter.request(begin + millis(60_000), "one more", &five).unwrap();
    assert_eq!(limiter.uses.len(), FEWEST_PRUNED + 1, "all of them count still");
    limiter.prune_at = FEWEST_PRUNED;
    limiter.request(begin + millis(61_000), "and one", &five).unwrap();
    assert_eq!(limiter.uses.len(), 2);
}

#[derive(Debug, Clone)]
enum Step {
    Wait(u64),
    Ask {
        prompt: u64,
        output: u64,
    },
    /// Which of those that run, and what share of its reservation it has used, in percent.
    End(usize, u64),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (0u64..20_000).prop_map(Step::Wait),
        (1u64..30, 0u64..40).prop_map(|(prompt, output)| Step::Ask { prompt, output }),
        (0usize..8, 0u64..=100).prop_map(|(which, share)| Step::End(which, share)),
    ]
}

proptest! {
    /// However requests come and end, no minute has more of them, or of their tokens, than the limit.
    #[test]
    fn no_minute_has_more_than_the_limit(steps in proptest::collection::vec(step(), 1..200)) {
        let begin = Instant::now();
        let mut limiter = Limiter::new(begin);
        let bounds = limits(Some(4), Some(100), Some(3));
        let mut now_ms = 0;
        // When, and what counts in the end.
        let mut admitted: Vec<(u64, u64)> = Vec::new();
        let mut running = Vec::new();
        for step in steps {
            let now = begin + millis(now_ms);
            match step {
                Step::Wait(ms) => now_ms += ms,
                Step::Ask { prompt, output } => {
                    if limiter.request(now, KEY, &bounds).is_err() {
                        continue;
                    }
                    match limiter.admit(now, KEY, &bounds, need(prompt, output)) {
                        Ok(reservation) => {
                            running.push((reservation, admitted.len()));
                            admitted.push((now_ms, prompt + output));
                        }
                        Err(Refused::Later { retry_after, .. }) => prop_assert!(retry_after <= millis(61_000)),
                        Err(refused) => prop_assert!(false, "{refused}"),
                    }
                    prop_assert!(running.len() <= 3);
                }
                Step::End(which, share) if !running.is_empty() => {
                    let (reservation, index) = running.swap_remove(which % running.len());
                    let used = reservation.tokens * share / 100;
                    limiter.finish(now, &reservation, used);
                    admitted[index].1 = used;
                }
                Step::End(..) => {}
            }
            for (from, _) in &admitted {
                let minute = admitted.iter().filter(|(at, _)| (*from..from + 60_000).contains(at));
                let (n, tokens) = minute.fold((0, 0), |(n, sum), (_, tokens)| (n + 1, sum + tokens));
                prop_assert!(n <= 4 && tokens <= 100, "{n} requests, {tokens} tokens in a minute");
            }
        }
    }

    /// What is refused is let in when it was told to come again, if nothing else happens.
    #[test]
    fn retry_after_is_true(times in proptest::collection::vec(0u64..5_000, 1..40), tokens in 1u64..60) {
        let begin = Instant::now();
        let mut limiter = Limiter::new(begin);
        let bounds = limits(None, Some(100), None);
        let mut now = begin;
        for ms in times {
            now += millis(ms);
            match limiter.admit(now, KEY, &bounds, need(tokens, 0)) {
                Ok(reservation) => limiter.finish(now, &reservation, tokens),
                Err(Refused::Later { retry_after, .. }) => {
                    let early = now + retry_after.saturating_sub(millis(1));
                    prop_assert!(limiter.admit(early, KEY, &bounds, need(tokens, 0)).is_err());
                    now += retry_after;
                    let admitted = limiter.admit(now, KEY, &bounds, need(tokens, 0));
                    prop_assert!(admitted.is_ok());
                }
                Err(refused) => prop_assert!(false, "{refused}"),
            }
        }
    }
}
