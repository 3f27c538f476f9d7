#![allow(unsafe_code)]
//! Collectives through memory that processes of one host share.
//!
//! Each rank has a lane: a few words that say how far it is, and two buffers. An operation is a series of *rounds*. In a
//! round each rank writes a piece to its own buffer, publishes the round's number, waits for the others' and reads
//! theirs. Rounds alternate between the two buffers: before a rank overwrites the one of round `k - 2` it waits until
//! all have published round `k - 1`, which they do only when they have read all of round `k - 2`.
//!
//! This file alone touches the memory; `shm/setup.rs` makes it, `shm/ops.rs` builds the operations from rounds.

mod liveness;
mod ops;
mod placement;
mod setup;

use std::{
    ffi::c_void,
    net::TcpListener,
    os::fd::AsFd,
    sync::atomic::{AtomicU32, AtomicU64, Ordering, fence},
    time::{Duration, Instant},
};

use liveness::Liveness;
use placement::Placement;
use rustix::{
    mm::{MapFlags, ProtFlags, mmap, munmap},
    thread::futex,
};

use super::{AbortFlag, Collective, CollectiveConfig, CollectiveError, CollectiveKind, op::Op};

pub(super) const KIND: CollectiveKind = CollectiveKind { name: "shm", fits, connect };

fn fits(config: &CollectiveConfig) -> bool {
    config.peers.windows(2).all(|pair| pair[0].host_id == pair[1].host_id)
}

fn connect(
    config: &CollectiveConfig,
    _listener: Option<&TcpListener>,
    abort: AbortFlag,
) -> Result<Box<dyn Collective>, CollectiveError> {
    Ok(Box::new(ops::Shm::new(setup::attach(config, abort)?)))
}

/// Bytes of one buffer. Fits a second-level cache; a rank takes twice this from `/dev/shm`.
const BUFFER_BYTES: usize = 512 << 10;

/// How often a sleeping rank looks for an abort, a dead peer and the time.
const WAKE_INTERVAL: Duration = Duration::from_millis(20);

/// Values of [`Lane::state`].
const ATTACHED: u32 = 1;
const LEFT: u32 = 2;

/// Start of the memory.
#[repr(C, align(128))]
struct Header {
    /// [`setup::MAGIC`] once the rest is written.
    ready: AtomicU32,
    world_size: AtomicU32,
    buffer_bytes: AtomicU32,
    /// Non-zero once all ranks are attached.
    complete: AtomicU32,
    /// Proof that rank 0 knows the secret.
    proof: [AtomicU64; 4],
}

/// What a rank tells the others. Alone on its cache lines (two: they are prefetched in pairs).
#[repr(C, align(128))]
struct Lane {
    /// Number of rounds published; wraps. Others sleep on this word.
    published: AtomicU32,
    /// How many ranks sleep on `published`.
    sleepers: AtomicU32,
    state: AtomicU32,
    pid: AtomicU32,
    /// The processor on which it last published.
    processor: AtomicU32,
    /// Inode of the PID namespace that `pid` is of.
    pid_namespace: AtomicU64,
    /// The operation that each buffer's piece belongs to.
    op: [AtomicU64; 2],
}

/// The mapped memory: header, lanes, buffers.
struct Segment {
    start: *mut u8,
    world_size: usize,
}

// SAFETY: the mapping belongs to no thread; what lies in it is reached through atomics and by the rounds' protocol.
unsafe impl Send for Segment {}

impl Segment {
    fn bytes(world_size: usize) -> usize {
        size_of::<Header>() + world_size * (size_of::<Lane>() + 2 * BUFFER_BYTES)
    }

    /// Maps the memory behind `fd`, which must be [`Segment::bytes`] long.
    fn map(fd: impl AsFd, world_size: usize) -> rustix::io::Result<Self> {
        // SAFETY: a new mapping at an address of the kernel's choice touches no other memory. The file has its length and
        // its pages (the creator reserved them) and nobody shrinks it: it is private to this user and soon has no name.
        let start = unsafe {
            mmap(
                std::ptr::null_mut(),
                Self::bytes(world_size),
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED | MapFlags::POPULATE,
                fd,
                0,
            )?
        };
        Ok(Self { start: start.cast(), world_size })
    }

    fn header(&self) -> &Header {
        // SAFETY: the mapping starts page-aligned with a header, which is all atomics: any bits are valid, and other
        // processes may write them at any time.
        unsafe { &*self.start.cast::<Header>() }
    }

    fn lane(&self, rank: usize) -> &Lane {
        assert!(rank < self.world_size, "no lane of rank {rank} among {}", self.world_size);
        // SAFETY: the lanes follow the header, whose size is a multiple of their alignment; the index is in range. All
        // fields are atomics.
        unsafe { &*self.start.add(size_of::<Header>() + rank * size_of::<Lane>()).cast::<Lane>() }
    }

    /// Start of a rank's buffer of a round; at least 8-byte aligned.
    fn buffer(&self, rank: usize, round: u32) -> *mut u8 {
        assert!(rank < self.world_size, "no buffer of rank {rank} among {}", self.world_size);
        let buffer_idx = 2 * rank + (round & 1) as usize;
        let offset = size_of::<Header>() + self.world_size * size_of::<Lane>() + buffer_idx * BUFFER_BYTES;
        // SAFETY: the offset is inside the mapping by `Segment::bytes`.
        unsafe { self.start.add(offset) }
    }
}

impl Drop for Segment {
    fn drop(&mut self) {
        // SAFETY: `map` made this mapping with this length, and every reference into it borrows `self`. An error could
        // only mean that it was not mapped; there is nothing to do about it.
        let _ = unsafe { munmap(self.start.cast::<c_void>(), Self::bytes(self.world_size)) };
    }
}

/// Another rank's piece of the present round.
struct Piece<'a> {
    bytes: *const u8,
    exchange: std::marker::PhantomData<&'a Exchange>,
}

impl Piece<'_> {
    /// Copies the bytes from `offset` on.
    fn copy_to(&self, offset: usize, out: &mut [u8]) {
        check_range(offset, out.len());
        // SAFETY: the range is inside the buffer. Its owner published it (we saw that with acquire) and does not write it
        // again before this rank publishes its next round, for which the borrow must end. `out` is our own memory.
        unsafe { std::ptr::copy_nonoverlapping(self.bytes.add(offset), out.as_mut_ptr(), out.len()) }
    }

    /// Adds the numbers from the `offset`-th on, wrapping.
    fn add_to(&self, offset: usize, out: &mut [i64]) {
        check_range(offset * 8, out.len() * 8);
        // SAFETY: as in `copy_to`; buffers are 8-byte aligned and any bits are a number.
        let numbers = unsafe { std::slice::from_raw_parts(self.bytes.cast::<i64>().add(offset), out.len()) };
        for (sum, number) in out.iter_mut().zip(numbers) {
            *sum = sum.wrapping_add(*number);
        }
    }
}

fn check_range(offset: usize, len: usize) {
    assert!(
        offset.checked_add(len).is_some_and(|end| end <= BUFFER_BYTES),
        "bytes {offset}..+{len} are not in a buffer of {BUFFER_BYTES}"
    );
}

/// Whose pieces a rank reads in a round.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Sources {
    All,
    Root,
    None,
}

/// This rank's end of the shared memory.
struct Exchange {
    segment: Segment,
    epoch: u64,
    rank: usize,
    world_size: usize,
    time_limit: Duration,
    abort: AbortFlag,
    /// Rounds that this rank has finished; wraps.
    round: u32,
    /// Whether this rank's piece of the present round is published.
    published: bool,
    liveness: Vec<Liveness>,
    spin: Spin,
    placement: Placement,
    /// Whether this rank's lane is its own; until then it must not say there that it leaves.
    attached: bool,
}

impl Exchange {
    /// Gives this rank's piece of the next round to the others: bytes at offsets; what lies between is anything. Returns when
    /// they are done with the buffer it takes.
    fn publish(&mut self, op: Op, piece: &[(usize, &[u8])], deadline: Instant) -> Result<(), CollectiveError> {
        assert!(!self.published, "one piece in each round");
        piece.iter().for_each(|(offset, bytes)| check_range(*offset, bytes.len()));
        for peer in self.others() {
            self.wait(peer, self.round, deadline)?;
        }
        for (offset, bytes) in piece {
            // SAFETY: the buffer is this rank's own and holds the piece by the check above. Every other rank has published
            // the previous round, so none reads this buffer's older piece any more, and none reads the new one before
            // `published` says so below. `&mut self`: no other thread of ours is here.
            unsafe {
                let at = self.segment.buffer(self.rank, self.round).add(*offset);
                std::ptr::copy_nonoverlapping(bytes.as_ptr(), at, bytes.len());
            }
        }
        let lane = self.segment.lane(self.rank);
        lane.op[(self.round & 1) as usize].store(op.to_word(), Ordering::Relaxed);
        lane.processor.store(Placement::here(), Ordering::Relaxed);
        lane.published.store(self.round.wrapping_add(1), Ordering::SeqCst);
        wake(lane);
        self.published = true;
        Ok(())
    }

    /// Waits for the sources' pieces of the present round, shows each to `take`, and ends the round.
    fn collect(
        &mut self,
        op: Op,
        sources: Sources,
        deadline: Instant,
        mut take: impl FnMut(usize, Piece<'_>),
    ) -> Result<(), CollectiveError> {
        assert!(self.published, "a round starts with publishing");
        let next = self.round.wrapping_add(1);
        for peer in self.others() {
            if sources == Sources::None || sources == Sources::Root && peer != 0 {
                continue;
            }
            self.wait(peer, next, deadline)?;
            let got = self.segment.lane(peer).op[(self.round & 1) as usize].load(Ordering::Relaxed);
            if got != op.to_word() {
                return Err(CollectiveError::Mismatch {
                    epoch: self.epoch,
                    rank: peer,
                    want: op.to_string(),
                    got: Op::from_word(got).to_string(),
                });
            }
            take(peer, Piece { bytes: self.segment.buffer(peer, self.round), exchange: std::marker::PhantomData });
        }
        self.round = next;
        self.published = false;
        Ok(())
    }

    /// The other ranks, from the next one on, so that not all read the same lane at once.
    fn others(&self) -> impl Iterator<Item = usize> + use<> {
        let (rank, world_size) = (self.rank, self.world_size);
        (1..world_size).map(move |step| (rank + step) % world_size)
    }

    /// Waits until a peer has published `rounds` rounds: spins for a while, then sleeps.
    fn wait(&mut self, peer: usize, rounds: u32, deadline: Instant) -> Result<(), CollectiveError> {
        if reached(self.segment.lane(peer), rounds) {
            return self.check_abort();
        }
        let budget = self.spin.next();
        let mut came = false;
        if !budget.is_zero() {
            let start = Instant::now();
            let lane = self.segment.lane(peer);
            while !came && start.elapsed() < budget {
                for _ in 0..16 {
                    std::hint::spin_loop();
                }
                came = reached(lane, rounds);
                self.check_abort()?;
            }
            self.spin.learn(came);
        }
        let _waiting = (!came).then(|| self.abort.waiting_for(peer));
        // One of two moves: if both did, they would meet again.
        if !came && self.rank > peer {
            self.placement.part_from(self.segment.lane(peer).processor.load(Ordering::Relaxed));
        }
        while !came {
            self.check_abort()?;
            // Order matters: a peer that published and then left has done its part.
            let gone = self.gone(peer);
            if reached(self.segment.lane(peer), rounds) {
                break;
            }
            if let Some(reason) = gone {
                return Err(CollectiveError::PeerLost { epoch: self.epoch, rank: peer, reason });
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(CollectiveError::Timeout { epoch: self.epoch, rank: peer, after: self.time_limit });
            }
            sleep(self.segment.lane(peer), rounds, left.min(WAKE_INTERVAL));
            came = reached(self.segment.lane(peer), rounds);
        }
        Ok(())
    }

    fn check_abort(&self) -> Result<(), CollectiveError> {
        if self.abort.is_aborted() { Err(CollectiveError::Aborted { epoch: self.epoch }) } else { Ok(()) }
    }

    /// Why the peer will publish nothing more, if so.
    fn gone(&self, peer: usize) -> Option<String> {
        if self.segment.lane(peer).state.load(Ordering::Acquire) == LEFT {
            return Some("it left the group".to_owned());
        }
        self.liveness[peer].ended()
    }

    /// Tells the others that this rank publishes nothing more.
    fn leave(&self) {
        if !self.attached {
            return;
        }
        let lane = self.segment.lane(self.rank);
        lane.state.store(LEFT, Ordering::SeqCst);
        let _ = futex::wake(&lane.published, futex::Flags::empty(), i32::MAX as u32);
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        self.leave();
    }
}

/// Whether the lane has published `rounds` rounds. Counters wrap, and are never 2^31 apart.
fn reached(lane: &Lane, rounds: u32) -> bool {
    lane.published.load(Ordering::Acquire).wrapping_sub(rounds) as i32 >= 0
}

/// Wakes who sleeps on the lane, without a system call where nobody does.
fn wake(lane: &Lane) {
    // The sleeper counts itself and then reads `published`; we wrote `published` and then read the count. With both
    // sequentially consistent, one sees the other.
    fence(Ordering::SeqCst);
    if lane.sleepers.load(Ordering::SeqCst) > 0 {
        // Can't fail for a mapped, aligned word.
        let _ = futex::wake(&lane.published, futex::Flags::empty(), i32::MAX as u32);
    }
}

/// Sleeps until the lane changes, or for `limit`, or for no reason.
fn sleep(lane: &Lane, rounds: u32, limit: Duration) {
    lane.sleepers.fetch_add(1, Ordering::SeqCst);
    fence(Ordering::SeqCst);
    let seen = lane.published.load(Ordering::SeqCst);
    if seen.wrapping_sub(rounds) as i32 >= 0 {
        lane.sleepers.fetch_sub(1, Ordering::SeqCst);
        return;
    }
    let limit = futex::Timespec { tv_sec: limit.as_secs() as i64, tv_nsec: i64::from(limit.subsec_nanos()) };
    // Timed out, woken, interrupted or changed before: the caller looks again in any case. Not `PRIVATE`: other
    // processes wake us.
    let _ = futex::wait(&lane.published, futex::Flags::empty(), seen, Some(&limit));
    lane.sleepers.fetch_sub(1, Ordering::SeqCst);
}

/// Whether to spin before sleeping.
///
/// Spinning is fastest where every rank has a core. Where the peer waits for a core itself, a spinning rank uses up the
/// time that the scheduler would have given it on waking, and both get slower; so after a spin in vain the next waits
/// sleep at once, up to [`Spin::MOST_SKIPPED`] of them while spins go on failing.
struct Spin {
    budget: Duration,
    /// Waits that are still to sleep at once.
    skip: u32,
    /// Waits to skip after the last failure.
    penalty: u32,
}

impl Spin {
    const MOST_SKIPPED: u32 = 64;

    /// Longer than ranks that compute drift apart from one sum to the next, in steps of many rows too. Who sleeps for less is woken later
    /// than it could have gone on, and a core that has gone idle begins slowly.
    const LONG: Duration = Duration::from_millis(2);

    fn new(world_size: usize, n_cores: usize) -> Self {
        let budget = if world_size <= n_cores { Self::LONG } else { Duration::from_micros(2) };
        Self { budget, skip: 0, penalty: 0 }
    }

    /// How long the next wait spins.
    fn next(&mut self) -> Duration {
        if self.skip == 0 {
            return self.budget;
        }
        self.skip -= 1;
        Duration::ZERO
    }

    /// Whether a spin saw what it waited for.
    fn learn(&mut self, came: bool) {
        self.penalty = if came { self.penalty / 2 } else { (2 * self.penalty + 1).min(Self::MOST_SKIPPED) };
        self.skip = if came { 0 } else { self.penalty };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spins_in_vain_become_rare_and_come_back() {
        let mut spin = Spin::new(2, 2);
        let spins = |spin: &mut Spin, came: bool| {
            let mut n_spins = 0;
            for _ in 0..1000 {
                if !spin.next().is_zero() {
                    n_spins += 1;
                    spin.learn(came);
                }
            }
            n_spins
        };
        assert!(spins(&mut spin, false) < 30);
        assert!(spins(&mut spin, true) > 900);
        assert!(Spin::new(3, 2).next() < Spin::new(2, 2).next());
    }
}
