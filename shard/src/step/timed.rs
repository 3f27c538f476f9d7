//! Measures how long a step waits for other ranks.

use std::time::{Duration, Instant};

use phalanx_kernels::collective::{AbortFlag, Collective, CollectiveError, Finish};

use crate::failpoint;

/// A collective that adds up the time spent in it.
pub(super) struct Timed<'a> {
    inner: &'a mut dyn Collective,
    /// Spent so far.
    pub(super) spent: Duration,
}

impl<'a> Timed<'a> {
    pub(super) fn new(inner: &'a mut dyn Collective) -> Self {
        Self { inner, spent: Duration::ZERO }
    }

    fn time<T>(&mut self, call: impl FnOnce(&mut dyn Collective) -> T) -> T {
        let begun = Instant::now();
        let result = call(self.inner);
        self.spent += begun.elapsed();
        result
    }
}

impl Collective for Timed<'_> {
    fn rank(&self) -> usize {
        self.inner.rank()
    }

    fn world_size(&self) -> usize {
        self.inner.world_size()
    }

    fn name(&self) -> &'static str {
        self.inner.name()
    }

    fn abort_flag(&self) -> AbortFlag {
        self.inner.abort_flag()
    }

    fn all_reduce(&mut self, values: &mut [i64]) -> Result<(), CollectiveError> {
        failpoint::all_reduce();
        self.time(|inner| inner.all_reduce(values))
    }

    fn all_reduce_into(
        &mut self,
        values: &mut [i64],
        results: &mut [f32],
        finish: Finish<'_>,
    ) -> Result<(), CollectiveError> {
        failpoint::all_reduce();
        self.time(|inner| inner.all_reduce_into(values, results, finish))
    }

    fn all_gather(&mut self, mine: &[u8], lens: &[usize], all: &mut [u8]) -> Result<(), CollectiveError> {
        self.time(|inner| inner.all_gather(mine, lens, all))
    }

    fn gather(&mut self, mine: &[u8], lens: &[usize], all: &mut [u8]) -> Result<(), CollectiveError> {
        self.time(|inner| inner.gather(mine, lens, all))
    }

    fn broadcast(&mut self, bytes: &mut [u8]) -> Result<(), CollectiveError> {
        self.time(|inner| inner.broadcast(bytes))
    }
}
