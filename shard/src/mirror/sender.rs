//! What a serving rank does for its mirrors: after each step it copies the step's rows, without ever waiting.
//!
//! Rows that were not copied yet are *missing* at the mirror: those of short steps, which are gathered, those that found no
//! room in the queue, and all rows when a connection is new. They are copied from the pages later, a few after each step and
//! more when there is none: pages have whatever was written last, which is all that anybody can want. While rows are missing
//! the mirror counts as being at the last step that it has whole.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use phalanx_cluster::seal::Seal;
use phalanx_kernels::{
    error::KernelError,
    slots::{self, KvRange, SlotSet},
};

use super::{
    frame::{Content, Header, MOST_RANGES, MOST_SEALS, Stream},
    handshake::Source,
    lane::{Lane, Target},
};
use crate::step::{executor::Pages, seals::Seals};

/// Rows of steps that follow each other within this time leave together: a row alone touches as many cache lines as those beside
/// it in its tile, and every frame wakes two threads, which costs steps on hosts whose cores all compute. After a loss they
/// are computed again.
const GATHER: Duration = Duration::from_millis(100);
/// Bytes of missing rows that are copied after one step, for each microsecond since the one before: about a twentieth of
/// that time goes into it.
const CATCH_UP_PER_US: u128 = 50;
/// Least of that, and what is copied at a time between steps: some tenths of a millisecond.
const CATCH_UP_BYTES: usize = 512 << 10;
/// Most of that, whatever a step took.
const MOST_CATCH_UP_BYTES: usize = 8 << 20;
/// Between steps: how soon to look again while rows are missing,
const SOON: Duration = Duration::from_millis(2);
/// and while none is, for mirrors that connect anew.
const LATER: Duration = Duration::from_millis(200);

/// The mirrors of a rank.
#[derive(Debug)]
pub struct Mirrors {
    stream: Stream,
    lanes: Vec<Outgoing>,
    /// The last step that ran.
    step: u64,
    /// When it had run.
    stepped: Instant,
    ranges: Vec<KvRange>,
}

/// What one mirror has.
#[derive(Debug)]
struct Outgoing {
    lane: Lane,
    /// The connection that `missing` is about.
    connection: Option<u64>,
    missing: SlotSet,
    /// Blocks of whose seals the mirror has not been told.
    untold: BTreeSet<u32>,
    /// Rows of steps since a frame was queued,
    gathered: usize,
    /// and in which turn that was.
    queued: Option<u128>,
    /// The last step that the mirror has whole.
    told: Option<u64>,
}

impl Mirrors {
    /// Starts to send to these mirrors. One that can't be reached is tried again for as long as the rank serves.
    pub fn start(source: Source, targets: Vec<Target>) -> Self {
        let start = |target: Target| match Lane::start(source, target) {
            Ok(lane) => Some(Outgoing::new(lane)),
            Err(error) => {
                tracing::warn!(epoch = source.epoch, %error, "no thread for a mirror");
                None
            }
        };
        let lanes = targets.into_iter().filter_map(start).collect();
        Self { stream: source.stream(), lanes, step: 0, stepped: Instant::now(), ranges: Vec::new() }
    }

    /// Copies the rows that a step wrote. `pages`: as they are after it.
    ///
    /// # Errors
    /// If the device can't read its pages.
    pub fn step_done(&mut self, step: u64, pages: &mut Pages<'_>) -> Result<(), KernelError> {
        self.step = step;
        let took = self.stepped.elapsed();
        self.stepped += took;
        let catch_up = usize::try_from(took.as_micros() * CATCH_UP_PER_US).unwrap_or(usize::MAX);
        let catch_up = catch_up.clamp(CATCH_UP_BYTES, MOST_CATCH_UP_BYTES);
        self.ranges.clear();
        for chunk in pages.last_chunks.iter().filter(|_| self.stream.row_bytes > 0) {
            let positions = chunk.start..chunk.start + chunk.n_rows;
            self.ranges.extend(KvRange::of_positions(&chunk.blocks, positions, self.stream.block_size));
        }
        for outgoing in &mut self.lanes {
            outgoing.step_done(&self.stream, step, &self.ranges, catch_up, pages)?;
        }
        Ok(())
    }

    /// Copies some of the rows that mirrors lack.
    ///
    /// # Errors
    /// If the device can't read its pages.
    pub fn catch_up(&mut self, pages: &mut Pages<'_>) -> Result<(), KernelError> {
        for outgoing in &mut self.lanes {
            outgoing.catch_up(&self.stream, self.step, CATCH_UP_BYTES, pages)?;
        }
        Ok(())
    }

    /// Whether all mirrors are connected, as far as the last look saw.
    #[cfg(test)]
    pub(super) fn are_connected(&self) -> bool {
        self.lanes.iter().all(|outgoing| outgoing.connection.is_some())
    }

    /// When to call [`Mirrors::catch_up`] if there is no step to run.
    pub fn next_look(&self) -> Option<Duration> {
        let is_behind = |o: &Outgoing| o.connection.is_some() && (!o.missing.is_empty() || o.told != Some(self.step));
        match self.lanes.iter().any(is_behind) {
            _ if self.lanes.is_empty() => None,
            true => Some(SOON),
            false => Some(LATER),
        }
    }
}

/// Which [`GATHER`] of the wall clock it is: one that ranks have in common, so that they copy after the same step. Each waits for
/// the slowest in the next one.
fn turn() -> u128 {
    // A clock that jumps makes a turn shorter or longer.
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis() / GATHER.as_millis()
}

impl Outgoing {
    fn new(lane: Lane) -> Self {
        let (missing, untold) = (SlotSet::default(), BTreeSet::new());
        Self { lane, connection: None, missing, untold, gathered: 0, queued: None, told: None }
    }

    /// Sends the rows of the last steps, and about so many bytes of others that are missing; or leaves them for later
    /// steps, if the last frame has only just been queued.
    fn step_done(
        &mut self,
        stream: &Stream,
        step: u64,
        ranges: &[KvRange],
        catch_up: usize,
        pages: &mut Pages<'_>,
    ) -> Result<(), KernelError> {
        // A new connection lacks this step's rows with all others.
        let is_new = self.look_at_connection(pages);
        if self.connection.is_none() {
            return Ok(());
        }
        if !is_new {
            ranges.iter().for_each(|range| self.missing.insert(*range));
            self.untold.extend(pages.seals.newly_sealed());
            self.gathered += slots::n_rows(ranges);
        }
        match self.queued == Some(turn()) {
            true => Ok(()),
            false => self.send_missing(stream, step, catch_up + self.gathered * stream.row_bytes, pages),
        }
    }

    /// Sends about so many bytes of missing rows, or else says that there are none.
    fn catch_up(&mut self, stream: &Stream, step: u64, bytes: usize, pages: &mut Pages<'_>) -> Result<(), KernelError> {
        self.look_at_connection(pages);
        match self.connection {
            Some(_) => self.send_missing(stream, step, bytes, pages),
            None => Ok(()),
        }
    }

    fn send_missing(
        &mut self,
        stream: &Stream,
        step: u64,
        bytes: usize,
        pages: &mut Pages<'_>,
    ) -> Result<(), KernelError> {
        let mut left = (bytes / stream.row_bytes.max(1)).max(1);
        while left > 0 && !self.missing.is_empty() {
            let mut ranges = Vec::new();
            self.missing.take(left.min(MOST_RANGES).min(stream.most_rows()), &mut ranges);
            left -= slots::n_rows(&ranges);
            if !self.send(stream, step, &ranges, pages)? {
                return Ok(());
            }
        }
        if self.missing.is_empty() && self.told != Some(step) {
            self.send(stream, step, &[], pages)?;
        }
        Ok(())
    }

    /// Whether the connection is a new one, which lacks all rows that were ever written.
    fn look_at_connection(&mut self, pages: &Pages<'_>) -> bool {
        let connection = self.lane.connection();
        let is_new = connection.is_some() && connection != self.connection;
        self.connection = connection;
        if is_new {
            self.missing = pages.ops.written_kv().cloned().unwrap_or_default();
            self.untold = pages.seals.iter().map(|(block, _)| block).collect();
            self.told = None;
            (self.gathered, self.queued) = (0, None);
        }
        is_new
    }

    /// What the mirror is to be told of blocks of which it has all rows.
    fn news(&self, seals: &Seals) -> Vec<(u32, Seal)> {
        let whole = self.untold.iter().filter(|block| !self.missing.has_block(**block));
        whole.filter_map(|block| Some((*block, seals.of(*block)?))).take(MOST_SEALS).collect()
    }

    /// Copies rows into a frame and queues it. Returns whether there was room; without, the rows are missing.
    fn send(
        &mut self,
        stream: &Stream,
        step: u64,
        ranges: &[KvRange],
        pages: &mut Pages<'_>,
    ) -> Result<bool, KernelError> {
        let Some(connection) = self.connection else { return Ok(false) };
        let Some(mut bytes) = self.lane.buffer(slots::n_rows(ranges) * stream.row_bytes) else {
            ranges.iter().for_each(|range| self.missing.insert(*range));
            return Ok(false);
        };
        ranges.iter().for_each(|range| self.missing.remove(*range));
        // Whatever later steps lack, earlier ones have.
        let through = if self.missing.is_empty() { Some(step) } else { self.told };
        // A block that is to be written again has lost its seal, and will have another.
        self.untold.retain(|block| pages.seals.of(*block).is_some());
        let seals = self.news(pages.seals);
        Header::begin(stream, Content { step, through, ranges, seals: &seals }, &mut bytes);
        if let Err(error) = if ranges.is_empty() { Ok(()) } else { pages.ops.read_kv(ranges, &mut bytes) } {
            self.lane.give_back(bytes);
            return Err(error);
        }
        for (block, _) in &seals {
            self.untold.remove(block);
        }
        self.lane.send(connection, bytes, step, through);
        self.told = through;
        (self.gathered, self.queued) = (0, Some(turn()));
        Ok(true)
    }
}
