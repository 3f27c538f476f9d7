//! What every kind of collective promises, at world sizes 1 to 4, over threads and over processes.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{TcpListener, TcpStream},
    process::{Child, Command, Stdio},
    sync::{
        Barrier,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use phalanx_kernels::{
    collective::{
        AbortFlag, Collective, CollectiveConfig, CollectiveError, KINDS, PeerAddress, connect, connect_abortable,
    },
    rng::uniform,
};

/// Far above what any operation here takes, so that only a hang can reach it.
const AMPLE: Duration = Duration::from_secs(60);
/// Time within which a rank must notice an abort or a death. Generous, as test machines stall; far below [`AMPLE`].
const SOON: Duration = Duration::from_secs(10);

/// An epoch that no other test of this or another process uses.
fn new_epoch() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    u64::from(std::process::id()) << 20 | NEXT.fetch_add(1, Ordering::Relaxed)
}

struct Member {
    config: CollectiveConfig,
    listener: TcpListener,
}

fn members(world_size: usize, time_limit: Duration) -> Vec<Member> {
    let epoch = new_epoch();
    let listeners: Vec<_> =
        (0..world_size).map(|_| TcpListener::bind("127.0.0.1:0").expect("loopback has free ports")).collect();
    let peers: Vec<_> = listeners
        .iter()
        .map(|listener| PeerAddress {
            host_id: "here".to_owned(),
            address: listener.local_addr().expect("it is bound").to_string(),
        })
        .collect();
    let config = |rank| CollectiveConfig {
        epoch,
        rank,
        world_size,
        secret: b"the secret of this epoch".to_vec(),
        peers: peers.clone(),
        time_limit,
    };
    listeners.into_iter().enumerate().map(|(rank, listener)| Member { config: config(rank), listener }).collect()
}

type Connected = Result<Box<dyn Collective>, CollectiveError>;

/// Runs `body` as each rank, on a thread each; returns what each rank returned.
fn run<T: Send>(kind: &str, members: &[Member], body: impl Fn(usize, Connected) -> T + Sync) -> Vec<T> {
    thread::scope(|scope| {
        let ranks: Vec<_> = members
            .iter()
            .enumerate()
            .map(|(rank, member)| {
                let body = &body;
                scope.spawn(move || body(rank, connect(&member.config, Some(&member.listener), Some(kind))))
            })
            .collect();
        ranks.into_iter().map(|rank| rank.join().expect("a rank panicked")).collect()
    })
}

/// [`run`] with ranks that must connect.
fn run_connected<T: Send>(
    kind: &str,
    world_size: usize,
    time_limit: Duration,
    body: impl Fn(Box<dyn Collective>) -> T + Sync,
) -> Vec<T> {
    run(kind, &members(world_size, time_limit), |rank, connected| {
        let collective = connected.expect("all ranks are here");
        assert_eq!((collective.rank(), collective.world_size(), collective.name()), (rank, world_size, kind));
        body(collective)
    })
}

/// Each kind with the world sizes that it serves.
fn each_group(mut check: impl FnMut(&str, usize)) {
    for kind in KINDS {
        for world_size in 1..=4 {
            if kind.name != "single" || world_size == 1 {
                check(kind.name, world_size);
            }
        }
    }
}

/// A rank's number at an index: uses all bits, so that sums wrap.
fn number(rank: usize, idx: usize, salt: usize) -> i64 {
    ((rank + 1) * (idx + 3) + salt).wrapping_mul(0x9E37_79B9_7F4A_7C15) as i64
}

fn check_sum(collective: &mut dyn Collective, n: usize, salt: usize) {
    let (rank, world_size) = (collective.rank(), collective.world_size());
    let mut values: Vec<i64> = (0..n).map(|idx| number(rank, idx, salt)).collect();
    collective.all_reduce(&mut values).expect("all ranks sum");
    for (idx, value) in values.into_iter().enumerate() {
        let want = (0..world_size).fold(0_i64, |sum, rank| sum.wrapping_add(number(rank, idx, salt)));
        assert_eq!(value, want, "number {idx} of {n} at rank {rank} of {world_size}");
    }
}

/// A rank's byte at an index.
fn byte(rank: usize, idx: usize, salt: usize) -> u8 {
    (number(rank, idx, salt) >> 40) as u8
}

fn bytes(rank: usize, len: usize, salt: usize) -> Vec<u8> {
    (0..len).map(|idx| byte(rank, idx, salt)).collect()
}

fn check_gather(collective: &mut dyn Collective, lens: &[usize], salt: usize, on_all: bool) {
    let rank = collective.rank();
    let mine = bytes(rank, lens[rank], salt);
    let reads = on_all || rank == 0;
    let mut all = vec![0; if reads { lens.iter().sum() } else { 0 }];
    let result =
        if on_all { collective.all_gather(&mine, lens, &mut all) } else { collective.gather(&mine, lens, &mut all) };
    result.expect("all ranks gather");
    if reads {
        let want: Vec<u8> = lens.iter().enumerate().flat_map(|(rank, len)| bytes(rank, *len, salt)).collect();
        assert!(all == want, "gathered bytes differ at rank {rank} with lengths {lens:?}");
    }
}

fn check_broadcast(collective: &mut dyn Collective, len: usize, salt: usize) {
    let mut given = bytes(collective.rank(), len, salt);
    collective.broadcast(&mut given).expect("all ranks take part");
    assert!(given == bytes(0, len, salt), "broadcast of {len} bytes differs at rank {}", collective.rank());
}

#[test]
fn sums_are_exact_on_every_rank() {
    each_group(|kind, world_size| {
        run_connected(kind, world_size, AMPLE, |mut collective| {
            for (salt, n) in
                [0, 1, 7, 576, 2047, 2048, 0, 4096, 65_536, 65_537, 100_003, 300_001].into_iter().enumerate()
            {
                check_sum(&mut *collective, n, salt);
            }
        });
    });
}

#[test]
fn gathers_keep_rank_order_with_unequal_lengths() {
    each_group(|kind, world_size| {
        run_connected(kind, world_size, AMPLE, |mut collective| {
            let lens = [0, 5, 1_300_000, 70_001];
            for salt in 0..4 {
                let lens: Vec<_> = (0..world_size).map(|rank| lens[(rank + salt) % 4]).collect();
                check_gather(&mut *collective, &lens, salt, true);
                check_gather(&mut *collective, &lens, salt, false);
            }
            check_gather(&mut *collective, &vec![0; world_size], 9, true);
            check_gather(&mut *collective, &vec![0; world_size], 9, false);
        });
    });
}

#[test]
fn broadcasts_reach_every_rank() {
    each_group(|kind, world_size| {
        run_connected(kind, world_size, AMPLE, |mut collective| {
            for (salt, len) in [0, 1, 4096, 524_288, 524_289, 3_000_000].into_iter().enumerate() {
                check_broadcast(&mut *collective, len, salt);
            }
        });
    });
}

// Ranks that need not wait run ahead, which must not overwrite what the others still read.
#[test]
fn operations_in_any_order_do_not_mix() {
    each_group(|kind, world_size| {
        run_connected(kind, world_size, AMPLE, |mut collective| {
            for salt in 0..400_usize {
                let draw = |idx| uniform(11, salt as u64, idx);
                let len = (draw(0).powi(3) * 20_000.0) as usize;
                let lens: Vec<_> = (0..world_size).map(|rank| (draw(rank as u32 + 1) * len as f64) as usize).collect();
                match (draw(9) * 4.0) as u32 {
                    0 => check_sum(&mut *collective, len / 4, salt),
                    1 => check_gather(&mut *collective, &lens, salt, true),
                    2 => check_gather(&mut *collective, &lens, salt, false),
                    _ => check_broadcast(&mut *collective, len, salt),
                }
            }
        });
    });
}

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
fn the_last_result_survives_the_sender() {
    for kind in ["shm", "tcp"] {
        let left = Barrier::new(2);
        run_connected(kind, 2, AMPLE, |mut collective| {
            let lens = [3, 4];
            if collective.rank() == 1 {
                collective.gather(b"last", &lens, &mut []).expect("rank 0 is there");
                drop(collective);
                left.wait();
            } else {
                left.wait();
                let mut all = [0; 7];
                collective.gather(b"the", &lens, &mut all).expect("it came before the end");
                assert_eq!(&all, b"thelast");
            }
        });
    }
}

#[test]
fn ranks_that_disagree_are_told() {
    type Body = fn(&mut dyn Collective) -> Result<(), CollectiveError>;
    let pairs: [(Body, Body); 3] = [
        (|c| c.all_reduce(&mut [0; 8]), |c| c.all_reduce(&mut [0; 9])),
        (|c| c.all_reduce(&mut [0; 8]), |c| c.all_gather(&[0; 32], &[32, 32], &mut [0; 64])),
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
        });
    }
}

#[test]
fn a_wrong_secret_is_refused() {
    for kind in ["shm", "tcp"] {
        let mut members = members(2, Duration::from_millis(700));
        members[1].config.secret = b"a guess".to_vec();
        let results = run(kind, &members, |_, connected| connected.err());
        for error in results {
            let error = error.expect("a rank with another secret connected").to_string();
            if kind == "tcp" {
                assert!(error.contains("rank") && !error.contains("guess"), "{error}");
            }
        }
    }
}

#[test]
fn a_rank_that_can_not_be_reached_is_not_waited_for() {
    let mut group = members(2, AMPLE);
    let caller = group.pop().expect("two members");
    // Its port is closed from now on.
    drop(group);
    let error = connect(&caller.config, Some(&caller.listener), Some("tcp")).err().expect("nobody is there");
    assert!(error.to_string().contains("can't be reached"), "{error}");
}

#[test]
fn strangers_and_other_epochs_do_not_disturb_connecting() {
    let group = members(3, AMPLE);
    // Connections that wait in the listener's queue before rank 0 looks at it: silent, noisy, and of an older epoch.
    let address = group[0].config.peers[0].address.clone();
    let silent: Vec<_> = (0..5).map(|_| TcpStream::connect(&address).expect("it listens")).collect();
    let mut noisy = TcpStream::connect(&address).expect("it listens");
    noisy.write_all(&[b'x'; 500]).expect("the socket takes it");
    let old = CollectiveConfig {
        epoch: group[0].config.epoch - 1,
        rank: 2,
        time_limit: Duration::from_millis(400),
        ..group[2].config.clone()
    };
    let refused = thread::scope(|scope| {
        let refused = scope.spawn(|| connect(&old, None, Some("tcp")).err());
        run("tcp", &group, |_, connected| check_sum(&mut *connected.expect("strangers do not matter"), 576, 0));
        refused.join().expect("it returns")
    });
    assert!(matches!(refused, Some(CollectiveError::Setup { .. } | CollectiveError::Timeout { .. })), "{refused:?}");
    drop(silent);
    // A caller of a wrong protocol is hung up on.
    let mut rest = Vec::new();
    let _ = noisy.read_to_end(&mut rest);
    assert!(rest.is_empty());
}

#[test]
fn the_listener_serves_one_epoch_after_another() {
    let mut group = members(3, AMPLE);
    for _ in 0..3 {
        run("tcp", &group, |_, connected| check_sum(&mut *connected.expect("all ranks are here"), 7, 0));
        group.iter_mut().for_each(|member| member.config.epoch += 1 << 50);
    }
}

/// Names in `/dev/shm` of this epoch.
fn shared_memory_files(epoch: u64) -> Vec<String> {
    std::fs::read_dir("/dev/shm")
        .expect("Linux has it")
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| name.starts_with("phalanx-") && name.ends_with(&format!("-{epoch}")))
        .collect()
}

#[test]
fn a_formed_group_has_no_file() {
    let group = members(4, AMPLE);
    run("shm", &group, |_, connected| {
        let collective = connected.expect("all ranks are here");
        assert_eq!(shared_memory_files(group[0].config.epoch), Vec::<String>::new());
        drop(collective);
    });
}

const CHILD: &str = "PHALANX_TEST_COLLECTIVE_CHILD";

/// This binary again, as a rank that sums until an error.
fn spawn_child(kind: &str, config: &CollectiveConfig) -> Child {
    let peers: Vec<_> = config.peers.iter().map(|peer| peer.address.as_str()).collect();
    Command::new(std::env::current_exe().expect("Linux knows"))
        .args(["--exact", "runs_as_a_child", "--nocapture", "--test-threads=1"])
        .env(CHILD, format!("{kind} {} {} {}", config.epoch, config.rank, peers.join(",")))
        .stdout(Stdio::piped())
        .spawn()
        .expect("this binary runs")
}

// Does nothing unless a test below started this process.
#[test]
fn runs_as_a_child() {
    let Ok(order) = std::env::var(CHILD) else { return };
    let [kind, epoch, rank, peers] = order.split(' ').collect::<Vec<_>>()[..] else { panic!("orders: {order}") };
    let peers: Vec<_> =
        peers.split(',').map(|address| PeerAddress { host_id: "here".into(), address: address.into() }).collect();
    let config = CollectiveConfig {
        epoch: epoch.parse().expect("a number"),
        rank: rank.parse().expect("a number"),
        world_size: peers.len(),
        secret: b"the secret of this epoch".to_vec(),
        peers,
        time_limit: AMPLE,
    };
    let mut collective = connect(&config, None, Some(kind)).expect("the parent is there");
    let error = loop {
        let mut values = vec![config.rank as i64; 576];
        if let Err(error) = collective.all_reduce(&mut values) {
            break error;
        }
        assert!(values.iter().all(|value| *value == (0..config.world_size as i64).sum()));
    };
    println!("\nended with {error:?}");
}

#[test]
fn a_killed_process_is_lost_at_once() {
    for (kind, world_size) in [("shm", 2), ("shm", 3), ("tcp", 2)] {
        let group = members(world_size, AMPLE);
        let mut children: Vec<_> = group[1..].iter().map(|member| spawn_child(kind, &member.config)).collect();
        let mut collective = connect(&group[0].config, Some(&group[0].listener), Some(kind)).expect("children come");
        for _ in 0..50 {
            let mut values = vec![0; 576];
            collective.all_reduce(&mut values).expect("children sum");
            assert!(values.iter().all(|value| *value == (0..world_size as i64).sum()));
        }
        // SIGKILL, and not reaped: it stays a zombie while we look.
        children[0].kill().expect("it runs");
        let start = Instant::now();
        let error = loop {
            if let Err(error) = collective.all_reduce(&mut [0; 576]) {
                break error;
            }
        };
        assert!(start.elapsed() < SOON, "{kind}: {:?}", start.elapsed());
        assert!(matches!(error, CollectiveError::PeerLost { .. }), "{kind}: {error:?}");
        drop(collective);
        assert_eq!(shared_memory_files(group[0].config.epoch), Vec::<String>::new());
        children[0].wait().expect("it was killed");
        // The other child noticed as well, and says so.
        for child in &mut children[1..] {
            let output = BufReader::new(child.stdout.take().expect("piped"));
            let lines: Vec<_> = output.lines().map_while(Result::ok).collect();
            assert!(lines.iter().any(|line| line.starts_with("ended with PeerLost")), "{lines:?}");
            assert!(child.wait().expect("it ended").success());
        }
    }
}
