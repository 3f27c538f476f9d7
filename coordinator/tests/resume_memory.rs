//! What is kept of answers that can be asked for again takes little memory, and about as much as is counted.

use std::{
    fs,
    time::{Duration, Instant},
};

use phalanx_coordinator::{
    frontend::streams::registry::{Asked, Registry, Retention},
    leadership::journal_feed::{self, JournalSink, ReplicatedJournal},
    request::{Finish, Output, RequestEvent, Usage},
};
use phalanx_proto::v1::{TokenScore, TopToken};

/// Enough that what the process takes besides does not count.
const RUNS: usize = 2000;
const TOKENS: usize = 200;
const ASKED: Asked = Asked { hash: [0; 32], seed: 0, n_prompts: 1, n: 1 };

fn resident_bytes() -> usize {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<usize>().unwrap() << 10
}

/// As the scheduler makes them: a token each.
fn events(is_scored: bool) -> impl Iterator<Item = RequestEvent> {
    let output = move |at: usize| {
        let top = vec![TopToken { token_id: 7, logprob: -0.5 }];
        let score = TokenScore { token_id: 7, logprob: -0.5, rank: 1, top };
        RequestEvent::Output(Output {
            index: 0,
            text: " word".to_owned(),
            token_ids: vec![7],
            scores: is_scored.then_some(score).into_iter().collect(),
            finish: (at + 1 == TOKENS).then_some(Finish::Length),
        })
    };
    (0..TOKENS).map(output).chain([RequestEvent::Finished(Usage::default())])
}

/// Runs all requests; whoever follows the journal hears of them.
fn run_all(registry: &mut Registry, is_scored: bool, follower: Option<&ReplicatedJournal>) {
    for index in 0..RUNS {
        let key = format!("key-{index}");
        let (run, began) = registry.begin(&key, ASKED, None);
        let mut told = vec![began];
        for event in events(is_scored) {
            told.extend(registry.push(Instant::now(), &key, &run, 0, event).1);
            if let Some(journal) = follower {
                told.drain(..).for_each(|entry| journal.apply(entry));
            }
            told.clear();
        }
    }
}

fn assert_about(taken: usize, counted: usize, most_per_token: usize) {
    assert!(counted <= most_per_token * RUNS * TOKENS, "{counted} bytes are counted");
    assert!(2 * taken <= 3 * counted, "{taken} bytes are taken, {counted} counted");
    assert!(3 * taken >= counted, "{taken} bytes are taken, {counted} counted");
}

#[test]
fn what_is_counted_is_what_is_taken() {
    let mut kept = Vec::new();
    for (is_scored, most, most_of_copy) in [(false, 48, 8), (true, 72, 32)] {
        let mut registry = Registry::new(Retention { bytes: 1 << 30, after_end: Duration::from_secs(600) });
        let before = resident_bytes();
        run_all(&mut registry, is_scored, None);
        assert_about(resident_bytes() - before, registry.bytes(), most);

        let retention = journal_feed::Retention { bytes: 1 << 30, ..journal_feed::Retention::default() };
        let journal = ReplicatedJournal::new(retention);
        // Room is made in it for each request.
        let mut leader = Registry::new(Retention { bytes: 1, after_end: Duration::ZERO });
        let before = resident_bytes();
        run_all(&mut leader, is_scored, Some(&journal));
        assert_about(resident_bytes() - before, journal.bytes(), most_of_copy);
        // Memory that is given back would be taken again.
        kept.push((registry, journal));
    }
}
