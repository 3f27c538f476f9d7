//! Ranks that stop, leave or disagree: the others are told, and none waits for ever.

use super::*;

/// Returns when the flag's collective waits for that rank.
fn wait_until_waiting_for(flag: &AbortFlag, peer: u32) {
    let start = Instant::now();
    while flag.waits_for() != Some(peer) {
        assert!(start.elapsed() < AMPLE, "it does not wait for rank {peer}");
        thread::yield_now();
    }
}

#[test]
fn an_abort_ends_a_waiting_rank() {
    for kind in ["shm", "tcp"] {
        let begin = Barrier::new(2);
        let results = run_connected(kind, 2, AMPLE, |mut collective| {
            if collective.rank() == 0 {
                // Never takes part, but stays.
                begin.wait();
                begin.wait();
                return None;
            }
            let abort = collective.abort_flag();
            let start = Instant::now();
            let result = thread::scope(|scope| {
                scope.spawn(|| {
                    begin.wait();
                    wait_until_waiting_for(&abort, 0);
                    abort.abort();
                });
                collective.all_reduce(&mut [1, 2, 3])
            });
            begin.wait();
            assert_eq!(collective.abort_flag().waits_for(), None);
            assert!(start.elapsed() < SOON, "{kind}: {:?}", start.elapsed());
            assert!(matches!(collective.broadcast(&mut [0]), Err(CollectiveError::Aborted { .. })));
            Some(result)
        });
        assert!(matches!(results[1], Some(Err(CollectiveError::Aborted { .. }))), "{kind}: {:?}", results[1]);
    }
}

#[test]
fn an_abort_ends_connecting() {
    for kind in ["shm", "tcp"] {
        for rank in 0..2 {
            let members = members(2, AMPLE);
            let abort = AbortFlag::default();
            abort.abort();
            let connected = connect_abortable(&members[rank].config, Some(&members[rank].listener), Some(kind), abort);
            assert!(matches!(connected.err(), Some(CollectiveError::Aborted { .. })), "{kind}");
        }
    }
}

#[test]
fn an_abort_ends_connecting_that_waits() {
    for kind in ["shm", "tcp"] {
        for rank in 0..2 {
            let members = members(2, AMPLE);
            let abort = AbortFlag::default();
            let start = Instant::now();
            let connected = thread::scope(|scope| {
                scope.spawn(|| {
                    wait_until_waiting_for(&abort, 1 - rank as u32);
                    abort.abort();
                });
                let (config, listener) = (&members[rank].config, &members[rank].listener);
                connect_abortable(config, Some(listener), Some(kind), abort.clone())
            });
            assert!(start.elapsed() < SOON, "{kind}: {:?}", start.elapsed());
            assert!(matches!(connected.err(), Some(CollectiveError::Aborted { .. })), "{kind}");
        }
    }
}

#[test]
fn a_rank_that_does_not_come_is_named_after_the_time_limit() {
    let (limit, long) = (Duration::from_millis(300), Duration::from_secs(3));
    for kind in ["shm", "tcp"] {
        // It connects, and then does nothing until the others gave up.
        let gave_up = Barrier::new(3);
        let results = run_connected(kind, 3, long, |mut collective| {
            if collective.rank() == 1 {
                gave_up.wait();
                return None;
            }
            let start = Instant::now();
            let result = collective.all_reduce(&mut [1; 5000]);
            let waited = start.elapsed();
            gave_up.wait();
            Some((result, waited))
        });
        // Who gives up second may see the first one leave.
        let timed_out = results.iter().flatten().filter(
            |(result, _)| matches!(result, Err(CollectiveError::Timeout { rank: 1, after, .. }) if *after == long),
        );
        assert!(timed_out.count() >= 1, "{kind}: {results:?}");
        for (result, waited) in results.iter().flatten() {
            assert!(result.is_err() && *waited < long + SOON, "{kind}: {result:?} {waited:?}");
        }

        // It never connects.
        let all = members(2, limit);
        for member in &all {
            let start = Instant::now();
            let error = connect(&member.config, Some(&member.listener), Some(kind)).err();
            let missing = 1 - member.config.rank;
            // A caller hears nothing from a bound port that nobody serves, which is no time-out for it.
            let named = match &error {
                Some(CollectiveError::Timeout { rank, .. }) => *rank == missing,
                Some(error) => error.to_string().contains(&format!("rank {missing}")),
                None => false,
            };
            assert!(named, "{kind}: {error:?}");
            assert!(start.elapsed() >= limit && start.elapsed() < limit + SOON);
        }
    }
}

#[test]
fn a_rank_that_leaves_is_lost() {
    for kind in ["shm", "tcp"] {
        for world_size in 2..=4 {
            let results = run_connected(kind, world_size, AMPLE, |mut collective| {
                check_sum(&mut *collective, 576, 1);
                if collective.rank() == world_size - 1 {
                    return None;
                }
                let start = Instant::now();
                let result = collective.all_reduce(&mut vec![1; 100_003]);
                assert!(start.elapsed() < SOON, "{kind}: {:?}", start.elapsed());
                let after = collective.all_reduce(&mut [1]);
                assert!(matches!(after, Err(CollectiveError::Setup { .. })), "{kind}: {after:?}");
                Some(result)
            });
            for result in results.iter().flatten() {
                assert!(matches!(result, Err(CollectiveError::PeerLost { .. })), "{kind}: {result:?}");
            }
        }
    }
}

// What a rank published before it left is still good.

#[test]
fn ranks_that_disagree_are_told() {
    type Body = fn(&mut dyn Collective) -> Result<(), CollectiveError>;
    let pairs: [(Body, Body); 4] = [
        (|c| c.all_reduce(&mut [0; 8]), |c| c.all_reduce(&mut [0; 9])),
        (|c| c.all_reduce(&mut [0; 8]), |c| c.all_gather(&[0; 32], &[32, 32], &mut [0; 64])),
        (|c| c.all_reduce(&mut [0; 8]), |c| c.all_reduce_into(&mut [0; 8], &mut [0.0; 8], &mut |_, _| ())),
        (|c| c.broadcast(&mut [0; 8]), |c| c.broadcast(&mut [0; 9])),
    ];
    for kind in ["shm", "tcp"] {
        for (first, second) in pairs {
            let results = run_connected(kind, 2, AMPLE, |mut collective| {
                let body = if collective.rank() == 0 { first } else { second };
                // Keeps the collective until both have looked.
                (body(&mut *collective), collective)
            });
            let told = results.iter().any(|(result, _)| matches!(result, Err(CollectiveError::Mismatch { .. })));
            assert!(told, "{kind}: {:?}", results.iter().map(|(result, _)| result).collect::<Vec<_>>());
        }
    }
}

#[test]
fn wrong_lengths_of_the_caller_are_errors() {
    for (kind, world_size) in [("single", 1), ("shm", 1), ("tcp", 1)] {
        run_connected(kind, world_size, AMPLE, |mut collective| {
            for (lens, room) in [(&[3_usize][..], 3), (&[2], 3), (&[2, 2], 4), (&[], 0)] {
                let result = collective.all_gather(b"ab", lens, &mut vec![0; room]);
                assert!(matches!(result, Err(CollectiveError::Mismatch { .. })), "{kind}: {result:?}");
            }
            let result = collective.all_reduce_into(&mut [0; 3], &mut [0.0; 4], &mut |_, _| ());
            assert!(matches!(result, Err(CollectiveError::Mismatch { .. })), "{kind}: {result:?}");
        });
    }
}
