//! A shard's process: a link, an engine with pages, and what it keeps of an epoch that is over.

use std::collections::VecDeque;

use phalanx_coordinator::scheduler::event::Limits;
use phalanx_proto::v1::StepPlan;

use crate::fake::{FakeShard, Pages, oracle::Luck};

/// What a coordinator tells a shard.
#[derive(Debug, Clone)]
pub enum ToShard {
    Form { epoch: u64, rank: usize, ranks: Vec<usize>, keep_kv_of: Option<u64>, copy_at: Option<usize> },
    Serve { epoch: u64, n_blocks: usize },
    Plan(StepPlan),
    Retire { epoch: u64, keep_kv: bool },
    Prepare { world_size: usize, ranks: Vec<usize> },
    Shutdown,
}

/// How a process is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Health {
    Alive,
    Paused,
    Dead,
}

/// What a rank has in one epoch.
pub struct Engine {
    pub epoch: u64,
    pub rank: usize,
    pub ranks: Vec<usize>,
    /// Pages that `Loaded` promised.
    pub promised: Option<(u64, Pages)>,
    /// Takes plans.
    pub serving: Option<FakeShard>,
    /// The step that all ranks have begun, if there is one.
    pub begun: Option<u64>,
}

/// Pages of an epoch that is over.
pub struct Kept {
    pub epoch: u64,
    pub rank: usize,
    pub world_size: usize,
    pub through_step: u64,
    pub pages: Pages,
}

/// A process.
pub struct Shard {
    pub health: Health,
    pub incarnation: u64,
    /// Its end of the link: number and coordinator.
    pub link: Option<(u64, usize)>,
    pub known_term: u64,
    pub n_blocks: usize,
    pub engine: Option<Engine>,
    pub kept: Option<Kept>,
    /// What came while it was paused.
    pub inbox: VecDeque<(u64, ToShard)>,
}

impl Shard {
    /// A fresh process.
    pub fn new(incarnation: u64, n_blocks: usize) -> Self {
        Self {
            health: Health::Alive,
            incarnation,
            link: None,
            known_term: 0,
            n_blocks,
            engine: None,
            kept: None,
            inbox: VecDeque::new(),
        }
    }

    /// Leaves its group; a step that has begun is left half done.
    pub fn leave(&mut self, luck: &mut Luck) {
        let Some(engine) = self.engine.take() else { return };
        let Some(mut fake) = engine.serving else {
            // What was promised to this epoch is still what the epoch before left.
            return;
        };
        let through_step = fake.last_step();
        if engine.begun.is_none() {
            fake.queue.clear();
        }
        let pages = fake.abort(|| luck.one_in(2));
        let world_size = engine.ranks.len();
        self.kept = Some(Kept { epoch: engine.epoch, rank: engine.rank, world_size, through_step, pages });
    }

    /// Takes a rank. Returns the last step of the wanted epoch that its pages have.
    pub fn form(&mut self, epoch: u64, rank: usize, ranks: Vec<usize>, keep_kv_of: Option<u64>) -> Option<u64> {
        let fits = |kept: &&Kept| Some(kept.epoch) == keep_kv_of && kept.rank == rank && kept.world_size == ranks.len();
        let promised = self.kept.as_ref().filter(fits).map(|kept| (kept.through_step, kept.pages.clone()));
        let through_step = promised.as_ref().map(|(step, _)| *step);
        self.engine = Some(Engine { epoch, rank, ranks, promised, serving: None, begun: None });
        through_step
    }

    /// Takes plans from now on.
    pub fn serve(&mut self, n_blocks: usize, limits: Limits) {
        let Some(engine) = &mut self.engine else { return };
        let fake = FakeShard::new(engine.epoch, n_blocks, limits);
        let fitting = engine.promised.take().filter(|(_, pages)| pages.len() == n_blocks);
        engine.serving = Some(match fitting {
            Some((_, pages)) => fake.with_pages(pages),
            None => fake,
        });
        self.kept = None;
    }
}
