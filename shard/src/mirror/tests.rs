//! Ranks and mirrors over loopback.

use std::{
    net::{Shutdown, TcpListener},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use phalanx_cluster::seal::Seal;
use phalanx_kernels::{
    CpuConfig, CpuOps,
    collective::AbortFlag,
    ops::{KvShape, Ops, Precision, RowChunk, StepRows},
    slots::KvRange,
};

use proptest::prelude::*;

use super::{
    FetchError, Mirrors, Progress, Receiver, Source, Store, Taking, Target, fetch,
    handshake::{self, Purpose, Verdict},
};
use crate::step::{
    executor::Pages,
    seals::{SealedPrefix, Seals},
};

/// Far longer than anything here takes.
const AMPLE: Duration = Duration::from_secs(60);
const SMALL: KvShape = KvShape { n_layers: 2, n_blocks: 12, block_size: 16, n_kv_heads: 2, head_dim: 8 };
/// Rows of 64 KiB.
const LARGE: KvShape = KvShape { n_layers: 16, n_blocks: 16, block_size: 16, n_kv_heads: 8, head_dim: 128 };

fn any_port() -> std::net::SocketAddr {
    ([127, 0, 0, 1], 0).into()
}

fn source(rank: u32, world_size: u32, shape: KvShape) -> Source {
    let (precision, identity) = (Precision::Auto, [7; 16]);
    Source { term: 1, epoch: 5, rank, world_size, n_sources: world_size, shape, precision, identity }
}

fn target(receiver: &Receiver) -> Target {
    receiver.target("spare", 1)
}

/// A rank with pages and mirrors.
struct TestRank {
    ops: CpuOps,
    seals: Seals,
    source: Source,
    mirrors: Mirrors,
    step: u64,
}

impl TestRank {
    fn new(source: Source, targets: Vec<Target>) -> Self {
        let mut ops = CpuOps::new(CpuConfig::new(source.precision)).expect("cpu");
        if source.shape.n_kv_heads > 0 {
            ops.alloc_kv(source.shape).expect("memory");
        }
        let all = |target| Target { n_sources: source.n_sources, ..target };
        let mirrors = Mirrors::start(source, targets.into_iter().map(all).collect());
        let seals = Seals::new(source.shape.n_blocks, source.shape.block_size);
        Self { ops, seals, source, mirrors, step: 0 }
    }

    /// Between steps, as the engine does.
    fn catch_up(&mut self) {
        let mut pages = Pages { ops: &mut self.ops, seals: &self.seals, last_chunks: &[] };
        self.mirrors.catch_up(&mut pages).expect("readable pages");
    }

    /// A step that writes these slots, other values each time.
    fn step(&mut self, ranges: &[(u32, usize, usize)]) {
        self.step += 1;
        let mut first_row = 0;
        let chunk = |&(block, start, n_rows): &(u32, usize, usize)| {
            first_row += n_rows;
            RowChunk { first_row: first_row - n_rows, n_rows, start, blocks: vec![block] }
        };
        let rows = StepRows { chunks: ranges.iter().map(chunk).collect() };
        let shape = self.source.shape;
        if shape.n_kv_heads > 0 && rows.n_rows() > 0 {
            self.ops.begin_step(&rows).expect("slots in the pages");
            let n = rows.n_rows() * shape.n_kv_heads * shape.head_dim;
            let value = |i: usize| (i as u64 * 31 + self.step * 7 + u64::from(self.source.rank)) as f32 % 1021.0;
            let values: Vec<f32> = (0..n).map(value).collect();
            let buf = self.ops.load_vector(&values).expect("memory");
            for layer in 0..shape.n_layers {
                self.ops.store_kv(layer, buf, buf).expect("a layer");
            }
        }
        self.seals.begin_step();
        for chunk in &rows.chunks {
            self.seals.unseal(&chunk.blocks, chunk.start..chunk.start + chunk.n_rows);
            // A block that is written to its end is as good as full here; its only token is the step that wrote it.
            if chunk.start + chunk.n_rows == shape.block_size {
                let tokens = vec![self.step as u32; shape.block_size];
                self.seals.seal(&mut SealedPrefix::default(), &tokens, &chunk.blocks, shape.block_size);
            }
        }
        let mut pages = Pages { ops: &mut self.ops, seals: &self.seals, last_chunks: &rows.chunks };
        self.mirrors.step_done(self.step, &mut pages).expect("readable pages");
    }

    /// As the engine does while there is no step.
    fn idle_until(&mut self, is_there: impl Fn() -> bool) {
        let begun = Instant::now();
        while !is_there() {
            assert!(begun.elapsed() < AMPLE, "the mirror does not get there");
            self.catch_up();
            thread::sleep(self.mirrors.next_look().expect("a mirror").min(Duration::from_millis(1)));
        }
    }

    /// All rows, as bytes.
    fn rows(&mut self) -> Vec<u8> {
        let mut rows = Vec::new();
        self.ops.read_kv(&all(self.source.shape), &mut rows).expect("readable pages");
        rows
    }
}

fn all(shape: KvShape) -> Vec<KvRange> {
    let n_rows = shape.block_size as u32;
    (0..shape.n_blocks as u32).map(|block| KvRange { block, first: 0, n_rows }).collect()
}

fn taking(rank: u32) -> Taking {
    Taking { term: 1, epoch: 6, rank, kv_of_epoch: 5, sealed_kv: false }
}

fn assert_adopted(store: &Store, rank: &mut TestRank) {
    let adopted = store.adopt(taking(rank.source.rank)).expect("rows");
    assert_eq!((adopted.source, adopted.through_step), (rank.source, Some(rank.step)));
    assert_eq!(adopted.seals, rank.seals.iter().collect());
    let mut rows = Vec::new();
    adopted.pages.expect("pages").read(&all(rank.source.shape), &mut rows).expect("readable pages");
    assert!(rows == rank.rows(), "the mirror's rows are others");
}

fn at(step: u64) -> Option<Progress> {
    Some(Progress { epoch: 5, step })
}

#[test]
fn a_mirror_has_the_rows_of_all_ranks() {
    let store = Store::new(1 << 30);
    let receiver = Receiver::start(any_port(), store.clone()).expect("a port");
    let mut ranks = [0, 1].map(|rank| TestRank::new(source(rank, 3, SMALL), vec![target(&receiver)]));
    let headless = KvShape { n_kv_heads: 0, ..SMALL };
    let mut third = TestRank::new(source(2, 3, headless), vec![target(&receiver)]);
    for i in 0..40usize {
        let ranges = [(i as u32 % 10, i % 16, 1), (10 + i as u32 % 2, i % 8, i % 9)];
        ranks.iter_mut().for_each(|rank| rank.step(&ranges));
        third.step(&ranges);
    }
    let begun = Instant::now();
    while store.progress() != at(40) {
        assert!(begun.elapsed() < AMPLE, "{:?}", store.progress());
        ranks.iter_mut().for_each(TestRank::catch_up);
        third.catch_up();
        thread::yield_now();
    }
    assert_adopted(&store, &mut ranks[1]);
    assert_eq!(store.progress(), None);
}

#[test]
fn rows_of_before_are_sent_to_a_mirror_that_comes_later() {
    let mut rank = TestRank::new(source(0, 1, SMALL), Vec::new());
    (0..30).for_each(|i| rank.step(&[(i % 12, 3, 5)]));
    assert_eq!(rank.mirrors.next_look(), None);
    let store = Store::new(1 << 30);
    let receiver = Receiver::start(any_port(), store.clone()).expect("a port");
    rank.mirrors = Mirrors::start(rank.source, vec![target(&receiver)]);
    rank.step = 0;
    rank.step(&[]);
    rank.idle_until(|| store.progress() == at(1));
    assert_adopted(&store, &mut rank);
}

#[test]
fn a_broken_connection_is_dialled_again() {
    let store = Store::new(1 << 30);
    let receiver = Receiver::start(any_port(), store.clone()).expect("a port");
    let mut rank = TestRank::new(source(0, 1, SMALL), vec![target(&receiver)]);
    for round in 1..=3 {
        rank.step(&[(round, 0, 16)]);
        rank.idle_until(|| store.progress() == at(u64::from(round)));
        receiver.shared.links().iter().for_each(|(_, link)| link.shutdown(Shutdown::Both).expect("open"));
    }
    rank.step(&[(9, 1, 1)]);
    rank.idle_until(|| store.progress() == at(4));
    assert_adopted(&store, &mut rank);
}

#[test]
fn a_slow_mirror_delays_no_step_and_gets_all_rows_in_the_end() {
    // It says welcome, and takes nothing before it is told to.
    let listener = TcpListener::bind(any_port()).expect("a port");
    let address = listener.local_addr().expect("an address");
    let store = Store::new(1 << 30);
    let (go, wait) = mpsc::channel::<()>();
    let of_mirror = store.clone();
    let mirror = thread::spawn(move || {
        let (mut link, _) = listener.accept().expect("a rank");
        let (_, source) = handshake::hear(&mut link, b"s").expect("a rank");
        let writer = of_mirror.begin(&source).expect("room");
        handshake::answer(&mut link, Verdict::Welcome).expect("a rank");
        wait.recv().expect("the test goes on");
        super::receiver::take_frames(&mut link, &source, &writer)
    });
    let (shard_id, address) = ("slow".to_owned(), address.to_string());
    let target = Target { shard_id, address, secret: b"s".to_vec(), n_sources: 1 };
    let mut rank = TestRank::new(source(0, 1, LARGE), vec![target]);
    let begun = Instant::now();
    while !rank.mirrors.are_connected() {
        assert!(begun.elapsed() < AMPLE, "no connection");
        rank.catch_up();
    }
    // 16 MiB a step: more than queue and sockets hold.
    let blocks: Vec<(u32, usize, usize)> = (0..16).map(|block| (block, 0, 16)).collect();
    (0..8).for_each(|_| rank.step(&blocks));
    assert_eq!(store.progress(), None);
    go.send(()).expect("the mirror waits");
    rank.idle_until(|| store.progress() == at(8));
    assert_adopted(&store, &mut rank);
    drop(rank);
    assert!(mirror.join().expect("no panic").is_err());
}

#[test]
fn a_mirror_that_vanishes_holds_nothing_up() {
    let store = Store::new(1 << 30);
    let receiver = Receiver::start(any_port(), store.clone()).expect("a port");
    let (lost, stays) = (Store::new(1 << 30), Receiver::start(any_port(), store.clone()).expect("a port"));
    let vanishing = Receiver::start(any_port(), lost.clone()).expect("a port");
    let mut rank = TestRank::new(source(0, 1, SMALL), vec![target(&vanishing), target(&stays)]);
    rank.step(&[(1, 0, 16)]);
    rank.idle_until(|| lost.progress() == at(1) && store.progress() == at(1));
    drop((vanishing, receiver));
    (2..40).for_each(|block| rank.step(&[(block % 12, 0, 16)]));
    rank.idle_until(|| store.progress() == at(39));
    assert_ne!(lost.progress(), at(39));
    assert_adopted(&store, &mut rank);
}

/// What happens to a rank and its mirror.
#[derive(Debug, Clone, Copy)]
enum Happening {
    Step { block: u32, first: usize, n_rows: usize },
    Idle,
    Break,
    Wait,
}

fn happening() -> impl Strategy<Value = Happening> {
    prop_oneof![
        6 => (0..12u32, 0..16usize, 0..17usize)
            .prop_map(|(block, first, n)| Happening::Step { block, first, n_rows: n.min(16 - first) }),
        2 => Just(Happening::Idle),
        1 => Just(Happening::Break),
        1 => Just(Happening::Wait),
    ]
}

/// One slot's bytes after each step that wrote it.
type History = Vec<(u64, Vec<u8>)>;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Connections break anywhere, also within a frame, and the mirror's pages are taken at any moment: each slot is what
    /// a step up to the claimed one wrote last, or what a later one wrote.
    #[test]
    fn no_mirror_claims_rows_that_it_has_not(happenings in prop::collection::vec(happening(), 1..80)) {
        let store = Store::new(1 << 30);
        let receiver = Receiver::start(any_port(), store.clone()).expect("a port");
        let mut rank = TestRank::new(source(0, 1, SMALL), vec![target(&receiver)]);
        let slots: Vec<KvRange> = all(SMALL)
            .into_iter()
            .flat_map(|r| (0..r.n_rows).map(move |first| KvRange { first, n_rows: 1, ..r }))
            .collect();
        let mut histories: Vec<History> = vec![Vec::new(); slots.len()];
        for happening in happenings {
            match happening {
                Happening::Step { block, first, n_rows } => {
                    rank.step(&[(block, first, n_rows)]);
                    for slot in first..first + n_rows {
                        let idx = block as usize * 16 + slot;
                        let mut bytes = Vec::new();
                        rank.ops.read_kv(&[slots[idx]], &mut bytes).expect("readable pages");
                        histories[idx].push((rank.step, bytes));
                    }
                }
                Happening::Idle => rank.catch_up(),
                Happening::Break => {
                    // One that has ended already is as good.
                    receiver.shared.links().iter().for_each(|(_, link)| drop(link.shutdown(Shutdown::Both)));
                }
                Happening::Wait => thread::sleep(Duration::from_millis(2)),
            }
        }
        let claimed = store.progress();
        let Some(adopted) = store.adopt(Taking { sealed_kv: true, ..taking(0) }) else { return Ok(()) };
        let mut pages = adopted.pages.expect("pages");
        // A sealed block is as it was after the step that its seal names, all of it.
        for (block, seal) in adopted.seals {
            let sealed_by = (1..=rank.step).find(|step| Seal::of(&[*step as u32; 16], 16) == seal);
            let step = sealed_by.expect("a seal of a step");
            for slot in block as usize * 16..(block as usize + 1) * 16 {
                let mut got = Vec::new();
                pages.read(&[slots[slot]], &mut got).expect("readable pages");
                let was = histories[slot].iter().rev().find(|(of, _)| *of <= step);
                prop_assert!(was.is_none_or(|(_, bytes)| *bytes == got), "block {block}, slot {slot}, step {step}");
            }
        }
        let Some(through) = adopted.through_step else { return Ok(()) };
        prop_assert!(through <= rank.step && claimed.is_none_or(|progress| progress.step <= through));
        for (slot, history) in slots.iter().zip(&histories) {
            let mut got = Vec::new();
            pages.read(&[*slot], &mut got).expect("readable pages");
            let last = history.iter().rposition(|(step, _)| *step <= through);
            let may_be = last.map_or(&history[..], |last| &history[last..]);
            prop_assert!(last.is_none() || may_be.iter().any(|(_, bytes)| *bytes == got), "{slot:?} through {through}");
        }
    }
}

#[test]
fn a_shard_that_takes_the_rank_fetches_its_rows() {
    // More than a frame holds.
    for shape in [SMALL, LARGE] {
        let store = Store::new(1 << 30);
        let receiver = Receiver::start(any_port(), store.clone()).expect("a port");
        // The other rank is the mirror itself, and sends nothing.
        let alone = Source { n_sources: 1, ..source(1, 2, shape) };
        let mut rank = TestRank::new(alone, vec![target(&receiver)]);
        (0..20).for_each(|i| rank.step(&[(i % 12, 3, 9)]));
        rank.idle_until(|| store.progress() == at(20));
        // It forms a group as a rank, and has no rows of its own rank.
        assert!(store.adopt(taking(0)).is_none());
        let wanted = Source { term: 1, shape: KvShape { n_blocks: 0, ..shape }, ..rank.source };
        let abort = AbortFlag::default();
        for _ in 0..2 {
            let fetched = fetch(&target(&receiver), &wanted, &abort).expect("rows");
            assert_eq!((fetched.through_step, fetched.seals), (Some(rank.step), rank.seals.iter().collect()));
            let mut rows = Vec::new();
            fetched.pages.expect("pages").read(&all(shape), &mut rows).expect("readable pages");
            assert!(rows == rank.rows(), "the rows that were fetched are others");
        }
        // What is lent changes no more.
        rank.step(&[(1, 0, 1)]);
        for other in [
            Source { epoch: 4, ..wanted },
            Source { rank: 0, ..wanted },
            Source { precision: Precision::Float32, ..wanted },
            Source { identity: [8; 16], ..wanted },
            Source { shape: KvShape { head_dim: 16, ..wanted.shape }, ..wanted },
        ] {
            let refused = fetch(&target(&receiver), &other, &abort).expect_err("other rows");
            assert!(matches!(refused, FetchError::Nothing(_)), "{refused}");
        }
        let stranger = Target { secret: b"guessed".to_vec(), ..target(&receiver) };
        assert!(matches!(fetch(&stranger, &wanted, &abort), Err(FetchError::Handshake(_))));
        abort.abort();
        assert!(matches!(fetch(&target(&receiver), &wanted, &abort), Err(FetchError::Interrupted)));
        store.forget_before(6);
        let gone = fetch(&target(&receiver), &wanted, &AbortFlag::default()).expect_err("they are forgotten");
        assert!(matches!(gone, FetchError::Nothing(_)), "{gone}");
    }
}

#[test]
fn strangers_are_not_heard() {
    let store = Store::new(1 << 30);
    let receiver = Receiver::start(any_port(), store.clone()).expect("a port");
    let stranger = Target { secret: b"guessed".to_vec(), ..target(&receiver) };
    let mut rank = TestRank::new(source(0, 1, SMALL), vec![stranger]);
    rank.step(&[(1, 0, 4)]);
    let mut link = std::net::TcpStream::connect(receiver.address()).expect("a listener");
    let refused = handshake::call(&mut link, b"guessed", Purpose::Send, &rank.source);
    assert!(refused.is_err());
    rank.step(&[(1, 4, 4)]);
    assert_eq!(store.progress(), None);
    assert_eq!(rank.mirrors.next_look(), Some(Duration::from_millis(200)));
}

#[test]
fn a_mirror_without_room_is_left_alone() {
    let store = Store::new(10);
    let receiver = Receiver::start(any_port(), store.clone()).expect("a port");
    let mut rank = TestRank::new(source(0, 2, SMALL), vec![target(&receiver)]);
    rank.step(&[(1, 0, 4)]);
    let begun = Instant::now();
    // The other rank is told as soon as the first one's rows are too many.
    loop {
        rank.catch_up();
        let mut link = std::net::TcpStream::connect(receiver.address()).expect("a listener");
        let verdict = handshake::call(&mut link, receiver.secret(), Purpose::Send, &source(1, 2, SMALL));
        match verdict.expect("a verdict") {
            Verdict::Full => break,
            _ => assert!(begun.elapsed() < AMPLE),
        }
    }
    assert_eq!(store.progress(), None);
    rank.step(&[(1, 4, 4)]);
}
