//! What every kind of collective promises, at world sizes 1 to 4, over threads and over processes.

mod connecting;
mod failures;
mod processes;

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

/// As [`check_sum`], of what comes of sums that are finished by whichever rank.
fn check_sum_into(collective: &mut dyn Collective, n: usize, salt: usize) {
    let (rank, world_size) = (collective.rank(), collective.world_size());
    let mut values: Vec<i64> = (0..n).map(|idx| number(rank, idx, salt)).collect();
    // What is there before is the same on all ranks.
    let before = |idx: usize| (idx % 1000) as f32;
    let finished = |sum: i64| (sum >> 48) as f32;
    let mut results: Vec<f32> = (0..n).map(before).collect();
    let mut finish = |sums: &[i64], results: &mut [f32]| {
        assert_eq!(sums.len(), results.len());
        for (result, sum) in results.iter_mut().zip(sums) {
            *result += finished(*sum);
        }
    };
    collective.all_reduce_into(&mut values, &mut results, &mut finish).expect("all ranks sum");
    for (idx, result) in results.into_iter().enumerate() {
        let sum = (0..world_size).fold(0_i64, |sum, rank| sum.wrapping_add(number(rank, idx, salt)));
        let want = before(idx) + finished(sum);
        assert_eq!(result, want, "result {idx} of {n} at rank {rank} of {world_size}");
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
                check_sum_into(&mut *collective, n, salt);
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
                match (draw(9) * 5.0) as u32 {
                    0 => check_sum(&mut *collective, len / 4, salt),
                    4 => check_sum_into(&mut *collective, len / 4, salt),
                    1 => check_gather(&mut *collective, &lens, salt, true),
                    2 => check_gather(&mut *collective, &lens, salt, false),
                    _ => check_broadcast(&mut *collective, len, salt),
                }
            }
        });
    });
}

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

/// Names in `/dev/shm` of this epoch.
fn shared_memory_files(epoch: u64) -> Vec<String> {
    std::fs::read_dir("/dev/shm")
        .expect("Linux has it")
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| name.starts_with("phalanx-") && name.ends_with(&format!("-{epoch}")))
        .collect()
}
