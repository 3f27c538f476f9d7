//! Collectives over TCP: one connection between each two ranks, data as frames.
//!
//! `tcp/mesh.rs` connects the ranks, `tcp/duplex.rs` moves frames both ways at once, and this file makes operations of
//! them.

mod duplex;
mod mesh;

use std::{
    net::{Shutdown, TcpListener, TcpStream},
    ops::Range,
    time::{Duration, Instant},
};

use duplex::{Frame, Incoming, Outgoing, Transfer};

use super::{
    AbortFlag, Collective, CollectiveConfig, CollectiveError, CollectiveKind, Finish,
    op::{Op, OpKind, check_lens, check_results, share},
};

pub(super) const KIND: CollectiveKind = CollectiveKind { name: "tcp", fits: |_| true, connect };

fn connect(
    config: &CollectiveConfig,
    listener: Option<&TcpListener>,
    abort: AbortFlag,
) -> Result<Box<dyn Collective>, CollectiveError> {
    let links = mesh::connect(config, listener, &abort)?;
    Ok(Box::new(Tcp {
        epoch: config.epoch,
        rank: config.rank,
        time_limit: config.time_limit,
        abort,
        links,
        n_ops: 0,
        scratch: Vec::new(),
        failed: None,
    }))
}

/// Numbers that are summed at a time: bounds the memory for what the peers send, and lets adding overlap with sending.
const CHUNK: usize = 128 << 10;

/// From this many numbers on, more than two ranks add a share each and give each other the sums, which halves (three ranks: cuts by
/// a third) what each sends. What comes of sums takes half of their bytes: two ranks send a quarter less.
const SHARED_FROM: usize = 4096;

struct Tcp {
    epoch: u64,
    rank: usize,
    time_limit: Duration,
    abort: AbortFlag,
    /// Connection to each rank; none to itself.
    links: Vec<Option<TcpStream>>,
    n_ops: u32,
    /// What peers send of a sum.
    scratch: Vec<i64>,
    /// Why the group is over.
    failed: Option<String>,
}

impl Tcp {
    /// Runs one operation; after an error there is no other, and the peers know.
    fn run(
        &mut self,
        kind: OpKind,
        bytes: usize,
        op: impl FnOnce(&mut Self, Op, Instant) -> Result<(), CollectiveError>,
    ) -> Result<(), CollectiveError> {
        let epoch = self.epoch;
        if self.abort.is_aborted() {
            self.close();
            return Err(CollectiveError::Aborted { epoch });
        }
        if let Some(failed) = &self.failed {
            return Err(CollectiveError::Setup {
                epoch,
                reason: format!("form a new group, this one failed: {failed}"),
            });
        }
        let described = Op::new(kind, self.n_ops, bytes);
        self.n_ops = self.n_ops.wrapping_add(1);
        let deadline = Instant::now() + self.time_limit;
        op(self, described, deadline).inspect_err(|error| {
            self.failed = Some(error.to_string());
            self.close();
        })
    }

    fn close(&self) {
        for link in self.links.iter().flatten() {
            // An error means that it is closed already.
            let _ = link.shutdown(Shutdown::Both);
        }
    }

    fn transfer(&self, deadline: Instant) -> Transfer<'_> {
        Transfer { epoch: self.epoch, links: &self.links, abort: &self.abort, deadline, time_limit: self.time_limit }
    }

    fn others(&self) -> impl Iterator<Item = usize> + use<> {
        let (rank, world_size) = (self.rank, self.links.len());
        (0..world_size).filter(move |peer| *peer != rank)
    }

    /// Every rank sends all its numbers to every other.
    fn sum_directly(
        &mut self,
        op: Op,
        part: &mut u32,
        deadline: Instant,
        values: &mut [i64],
    ) -> Result<(), CollectiveError> {
        let n = values.len();
        self.exchange_numbers(op, part, deadline, |_| values, n)?;
        for theirs in self.scratch.chunks_exact(n) {
            add(values, theirs);
        }
        Ok(())
    }

    /// Every rank gets its share from all others and sums it; returns which it is.
    fn sum_share(
        &mut self,
        op: Op,
        part: &mut u32,
        deadline: Instant,
        values: &mut [i64],
    ) -> Result<Range<usize>, CollectiveError> {
        let (world_size, n) = (self.links.len(), values.len());
        let mine = share(n, self.rank, world_size);
        self.exchange_numbers(op, part, deadline, |peer| &values[share(n, peer, world_size)], mine.len())?;
        for theirs in self.scratch.chunks_exact(mine.len()) {
            add(&mut values[mine.clone()], theirs);
        }
        Ok(mine)
    }

    /// Every rank sends its share to all others.
    fn gather_shares<T: bytemuck::Pod>(
        &mut self,
        op: Op,
        part: &mut u32,
        deadline: Instant,
        values: &mut [T],
    ) -> Result<(), CollectiveError> {
        let (world_size, n) = (self.links.len(), values.len());
        let mine = values[share(n, self.rank, world_size)].to_vec();
        let mut rest = values;
        let mut incoming = Vec::with_capacity(world_size - 1);
        for rank in 0..world_size {
            let (share_of_rank, after) = rest.split_at_mut(share(n, rank, world_size).len());
            rest = after;
            if rank != self.rank {
                incoming.push(Incoming::new(rank, bytemuck::cast_slice_mut(share_of_rank)));
            }
        }
        let frame = Frame { epoch: self.epoch, op, part: next(part) };
        let mut outgoing: Vec<_> =
            self.others().map(|peer| Outgoing::new(peer, frame, bytemuck::cast_slice(&mine))).collect();
        self.transfer(deadline).run(frame, &mut outgoing, &mut incoming)
    }

    /// Sends `theirs(peer)` to each peer and takes `n` numbers from each into the scratch memory, in rank order.
    fn exchange_numbers<'a>(
        &mut self,
        op: Op,
        part: &mut u32,
        deadline: Instant,
        theirs: impl Fn(usize) -> &'a [i64],
        n: usize,
    ) -> Result<(), CollectiveError> {
        let frame = Frame { epoch: self.epoch, op, part: next(part) };
        let mut scratch = std::mem::take(&mut self.scratch);
        scratch.resize((self.links.len() - 1) * n, 0);
        let mut outgoing: Vec<_> =
            self.others().map(|peer| Outgoing::new(peer, frame, bytemuck::cast_slice(theirs(peer)))).collect();
        let mut incoming: Vec<_> = self
            .others()
            .zip(scratch.chunks_exact_mut(n))
            .map(|(peer, room)| Incoming::new(peer, bytemuck::cast_slice_mut(room)))
            .collect();
        let result = self.transfer(deadline).run(frame, &mut outgoing, &mut incoming);
        self.scratch = scratch;
        result
    }
}

fn next(part: &mut u32) -> u32 {
    *part = part.wrapping_add(1);
    *part
}

fn add(sums: &mut [i64], numbers: &[i64]) {
    for (sum, number) in sums.iter_mut().zip(numbers) {
        *sum = sum.wrapping_add(*number);
    }
}

/// Cuts `all` into the ranks' parts; the lengths were checked to fill it.
fn cut<'a>(mut all: &'a mut [u8], lens: &[usize]) -> Vec<&'a mut [u8]> {
    lens.iter()
        .map(|len| {
            let (part, rest) = std::mem::take(&mut all).split_at_mut(*len);
            all = rest;
            part
        })
        .collect()
}

impl Collective for Tcp {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.links.len()
    }

    fn name(&self) -> &'static str {
        KIND.name
    }

    fn abort_flag(&self) -> AbortFlag {
        self.abort.clone()
    }

    fn all_reduce(&mut self, values: &mut [i64]) -> Result<(), CollectiveError> {
        self.run(OpKind::AllReduce, size_of_val(values), |tcp, op, deadline| {
            let mut part = 0;
            for chunk in values.chunks_mut(CHUNK) {
                if tcp.links.len() > 2 && chunk.len() >= SHARED_FROM {
                    tcp.sum_share(op, &mut part, deadline, chunk)?;
                    tcp.gather_shares(op, &mut part, deadline, chunk)?;
                } else {
                    tcp.sum_directly(op, &mut part, deadline, chunk)?;
                }
            }
            Ok(())
        })
    }

    fn all_reduce_into(
        &mut self,
        values: &mut [i64],
        results: &mut [f32],
        finish: Finish<'_>,
    ) -> Result<(), CollectiveError> {
        check_results(self.epoch, self.rank, values, results)?;
        self.run(OpKind::AllReduceInto, size_of_val(values), |tcp, op, deadline| {
            let mut part = 0;
            for (values, results) in values.chunks_mut(CHUNK).zip(results.chunks_mut(CHUNK)) {
                if tcp.links.len() > 1 && values.len() >= SHARED_FROM {
                    let mine = tcp.sum_share(op, &mut part, deadline, values)?;
                    finish(&values[mine.clone()], &mut results[mine]);
                    tcp.gather_shares(op, &mut part, deadline, results)?;
                } else {
                    tcp.sum_directly(op, &mut part, deadline, values)?;
                    finish(values, results);
                }
            }
            Ok(())
        })
    }

    fn all_gather(&mut self, mine: &[u8], lens: &[usize], all: &mut [u8]) -> Result<(), CollectiveError> {
        let total = check_lens(self.epoch, (self.rank, self.links.len()), mine, lens, Some(all))?;
        self.run(OpKind::AllGather, total, |tcp, op, deadline| {
            let frame = Frame { epoch: tcp.epoch, op, part: 0 };
            let mut outgoing: Vec<_> = tcp.others().map(|peer| Outgoing::new(peer, frame, mine)).collect();
            let mut incoming = Vec::with_capacity(lens.len());
            for (rank, part) in cut(all, lens).into_iter().enumerate() {
                if rank == tcp.rank {
                    part.copy_from_slice(mine);
                } else {
                    incoming.push(Incoming::new(rank, part));
                }
            }
            tcp.transfer(deadline).run(frame, &mut outgoing, &mut incoming)
        })
    }

    fn gather(&mut self, mine: &[u8], lens: &[usize], all: &mut [u8]) -> Result<(), CollectiveError> {
        let is_root = self.rank == 0;
        let total = check_lens(self.epoch, (self.rank, self.links.len()), mine, lens, is_root.then_some(&*all))?;
        self.run(OpKind::Gather, total, |tcp, op, deadline| {
            let frame = Frame { epoch: tcp.epoch, op, part: 0 };
            let (mut outgoing, mut incoming) = (Vec::new(), Vec::new());
            if is_root {
                for (rank, part) in cut(all, lens).into_iter().enumerate() {
                    if rank == 0 {
                        part.copy_from_slice(mine);
                    } else {
                        incoming.push(Incoming::new(rank, part));
                    }
                }
            } else {
                outgoing.push(Outgoing::new(0, frame, mine));
            }
            tcp.transfer(deadline).run(frame, &mut outgoing, &mut incoming)
        })
    }

    fn broadcast(&mut self, bytes: &mut [u8]) -> Result<(), CollectiveError> {
        self.run(OpKind::Broadcast, bytes.len(), |tcp, op, deadline| {
            let frame = Frame { epoch: tcp.epoch, op, part: 0 };
            if tcp.rank == 0 {
                let mut outgoing: Vec<_> = tcp.others().map(|peer| Outgoing::new(peer, frame, bytes)).collect();
                tcp.transfer(deadline).run(frame, &mut outgoing, &mut [])
            } else {
                tcp.transfer(deadline).run(frame, &mut [], &mut [Incoming::new(0, bytes)])
            }
        })
    }
}
