//! A group of one rank: every operation is a copy at most.

use std::net::TcpListener;

use super::{
    AbortFlag, Collective, CollectiveConfig, CollectiveError, CollectiveKind, Finish,
    op::{check_lens, check_results},
};

pub(super) const KIND: CollectiveKind =
    CollectiveKind { name: "single", fits: |config| config.world_size == 1, connect };

fn connect(
    config: &CollectiveConfig,
    _listener: Option<&TcpListener>,
    abort: AbortFlag,
) -> Result<Box<dyn Collective>, CollectiveError> {
    if config.world_size != 1 {
        return Err(config.setup(format!("single serves one rank, not {}: choose shm or tcp", config.world_size)));
    }
    Ok(Box::new(Single { epoch: config.epoch, abort }))
}

struct Single {
    epoch: u64,
    abort: AbortFlag,
}

impl Single {
    fn check(&self) -> Result<(), CollectiveError> {
        if self.abort.is_aborted() { Err(CollectiveError::Aborted { epoch: self.epoch }) } else { Ok(()) }
    }
}

impl Collective for Single {
    fn rank(&self) -> usize {
        0
    }

    fn world_size(&self) -> usize {
        1
    }

    fn name(&self) -> &'static str {
        KIND.name
    }

    fn abort_flag(&self) -> AbortFlag {
        self.abort.clone()
    }

    fn all_reduce(&mut self, _values: &mut [i64]) -> Result<(), CollectiveError> {
        self.check()
    }

    fn all_reduce_into(
        &mut self,
        values: &mut [i64],
        results: &mut [f32],
        finish: Finish<'_>,
    ) -> Result<(), CollectiveError> {
        self.check()?;
        check_results(self.epoch, 0, values, results)?;
        finish(values, results);
        Ok(())
    }

    fn all_gather(&mut self, mine: &[u8], lens: &[usize], all: &mut [u8]) -> Result<(), CollectiveError> {
        self.check()?;
        check_lens(self.epoch, (0, 1), mine, lens, Some(all))?;
        all.copy_from_slice(mine);
        Ok(())
    }

    fn gather(&mut self, mine: &[u8], lens: &[usize], all: &mut [u8]) -> Result<(), CollectiveError> {
        self.all_gather(mine, lens, all)
    }

    fn broadcast(&mut self, _bytes: &mut [u8]) -> Result<(), CollectiveError> {
        self.check()
    }
}
