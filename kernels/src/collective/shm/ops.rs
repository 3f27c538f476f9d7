//! The operations, as rounds of the exchange.

use std::{ops::Range, time::Instant};

use super::{BUFFER_BYTES, Exchange, KIND, Sources};
use crate::collective::{
    AbortFlag, Collective, CollectiveError, Finish,
    op::{Op, OpKind, check_lens, check_results, share},
};

/// Numbers in one buffer.
const CHUNK: usize = BUFFER_BYTES / size_of::<i64>();

/// From this many numbers on, ranks add a share each and give each other the sums, or what came of them: two rounds instead of one,
/// but each rank reads `2 (world_size - 1) / world_size` times the vector instead of `world_size - 1` times. Two ranks gain
/// only where what comes of the sums is smaller or takes work.
const SHARED_FROM: usize = 2048;

pub(super) struct Shm {
    exchange: Exchange,
    n_ops: u32,
    /// Why the group is over.
    failed: Option<String>,
}

impl Shm {
    pub fn new(exchange: Exchange) -> Self {
        Self { exchange, n_ops: 0, failed: None }
    }

    /// Runs one operation; after an error there is no other, and the peers know.
    fn run(
        &mut self,
        kind: OpKind,
        bytes: usize,
        op: impl FnOnce(&mut Exchange, Op, Instant) -> Result<(), CollectiveError>,
    ) -> Result<(), CollectiveError> {
        let epoch = self.exchange.epoch;
        self.exchange.check_abort().inspect_err(|_| self.exchange.leave())?;
        if let Some(failed) = &self.failed {
            return Err(CollectiveError::Setup {
                epoch,
                reason: format!("form a new group, this one failed: {failed}"),
            });
        }
        let described = Op::new(kind, self.n_ops, bytes);
        self.n_ops = self.n_ops.wrapping_add(1);
        let deadline = Instant::now() + self.exchange.time_limit;
        op(&mut self.exchange, described, deadline).inspect_err(|error| {
            self.failed = Some(error.to_string());
            self.exchange.leave();
        })
    }

    /// Gathering in rounds of a buffer each; `all` is empty where this rank reads nothing.
    fn gather_to(
        &mut self,
        kind: OpKind,
        sources: Sources,
        mine: &[u8],
        lens: &[usize],
        all: &mut [u8],
    ) -> Result<(), CollectiveError> {
        let (rank, world_size) = (self.exchange.rank, self.exchange.world_size);
        let reads = sources == Sources::All;
        let total = check_lens(self.exchange.epoch, (rank, world_size), mine, lens, reads.then_some(&*all))?;
        let starts: Vec<usize> = lens
            .iter()
            .scan(0, |end, len| {
                let start = *end;
                *end += len;
                Some(start)
            })
            .collect();
        let longest = lens.iter().copied().max().unwrap_or(0);
        self.run(kind, total, |exchange, op, deadline| {
            if reads {
                all[starts[rank]..][..mine.len()].copy_from_slice(mine);
            }
            for start in (0..longest).step_by(BUFFER_BYTES) {
                let part = |len: usize| start.min(len)..(start + BUFFER_BYTES).min(len);
                exchange.publish(op, &[(0, &mine[part(mine.len())])], deadline)?;
                exchange.collect(op, sources, deadline, |peer, piece| {
                    piece.copy_to(0, &mut all[starts[peer]..][part(lens[peer])]);
                })?;
            }
            Ok(())
        })
    }
}

/// One round: every rank reads every other's numbers.
fn sum_directly(exchange: &mut Exchange, op: Op, deadline: Instant, values: &mut [i64]) -> Result<(), CollectiveError> {
    exchange.publish(op, &[(0, bytemuck::cast_slice(values))], deadline)?;
    exchange.collect(op, Sources::All, deadline, |_, piece| piece.add_to(0, values))
}

/// One round: each rank sums its share, which is returned.
fn sum_share(
    exchange: &mut Exchange,
    op: Op,
    deadline: Instant,
    values: &mut [i64],
) -> Result<Range<usize>, CollectiveError> {
    let mine = share(values.len(), exchange.rank, exchange.world_size);
    let (before, after) = (bytemuck::cast_slice(&values[..mine.start]), bytemuck::cast_slice(&values[mine.end..]));
    exchange.publish(op, &[(0, before), (mine.end * size_of::<i64>(), after)], deadline)?;
    exchange.collect(op, Sources::All, deadline, |_, piece| piece.add_to(mine.start, &mut values[mine.clone()]))?;
    Ok(mine)
}

/// One round: each rank gives its share to the others.
fn gather_shares<T: bytemuck::Pod>(
    exchange: &mut Exchange,
    op: Op,
    deadline: Instant,
    values: &mut [T],
) -> Result<(), CollectiveError> {
    let (n, world_size) = (values.len(), exchange.world_size);
    let mine = bytemuck::cast_slice(&values[share(n, exchange.rank, world_size)]);
    exchange.publish(op, &[(0, mine)], deadline)?;
    exchange.collect(op, Sources::All, deadline, |peer, piece| {
        piece.copy_to(0, bytemuck::cast_slice_mut(&mut values[share(n, peer, world_size)]));
    })
}

/// Two rounds: each rank sums its share, then reads the others' sums.
fn sum_shared(exchange: &mut Exchange, op: Op, deadline: Instant, values: &mut [i64]) -> Result<(), CollectiveError> {
    sum_share(exchange, op, deadline, values)?;
    gather_shares(exchange, op, deadline, values)
}

impl Collective for Shm {
    fn rank(&self) -> usize {
        self.exchange.rank
    }

    fn world_size(&self) -> usize {
        self.exchange.world_size
    }

    fn name(&self) -> &'static str {
        KIND.name
    }

    fn abort_flag(&self) -> AbortFlag {
        self.exchange.abort.clone()
    }

    fn all_reduce(&mut self, values: &mut [i64]) -> Result<(), CollectiveError> {
        self.run(OpKind::AllReduce, size_of_val(values), |exchange, op, deadline| {
            let sum = if exchange.world_size > 2 && values.len() >= SHARED_FROM { sum_shared } else { sum_directly };
            values.chunks_mut(CHUNK).try_for_each(|chunk| sum(exchange, op, deadline, chunk))
        })
    }

    fn all_reduce_into(
        &mut self,
        values: &mut [i64],
        results: &mut [f32],
        finish: Finish<'_>,
    ) -> Result<(), CollectiveError> {
        check_results(self.exchange.epoch, self.exchange.rank, values, results)?;
        self.run(OpKind::AllReduceInto, size_of_val(values), |exchange, op, deadline| {
            values.chunks_mut(CHUNK).zip(results.chunks_mut(CHUNK)).try_for_each(|(values, results)| {
                if values.len() < SHARED_FROM {
                    sum_directly(exchange, op, deadline, values)?;
                    finish(values, results);
                    return Ok(());
                }
                let mine = sum_share(exchange, op, deadline, values)?;
                finish(&values[mine.clone()], &mut results[mine]);
                gather_shares(exchange, op, deadline, results)
            })
        })
    }

    fn all_gather(&mut self, mine: &[u8], lens: &[usize], all: &mut [u8]) -> Result<(), CollectiveError> {
        self.gather_to(OpKind::AllGather, Sources::All, mine, lens, all)
    }

    fn gather(&mut self, mine: &[u8], lens: &[usize], all: &mut [u8]) -> Result<(), CollectiveError> {
        let sources = if self.exchange.rank == 0 { Sources::All } else { Sources::None };
        self.gather_to(OpKind::Gather, sources, mine, lens, all)
    }

    fn broadcast(&mut self, bytes: &mut [u8]) -> Result<(), CollectiveError> {
        self.run(OpKind::Broadcast, bytes.len(), |exchange, op, deadline| {
            let is_root = exchange.rank == 0;
            for chunk in bytes.chunks_mut(BUFFER_BYTES) {
                exchange.publish(op, &[(0, if is_root { chunk } else { &[] })], deadline)?;
                let sources = if is_root { Sources::None } else { Sources::Root };
                exchange.collect(op, sources, deadline, |_, piece| piece.copy_to(0, chunk))?;
            }
            Ok(())
        })
    }
}
