//! A shard's process: a link, an engine with pages, and what it keeps of an epoch that is over.

use std::collections::{BTreeMap, VecDeque};

use phalanx_cluster::seal::Seal;
use phalanx_coordinator::scheduler::event::Limits;
use phalanx_proto::v1::StepPlan;
use phalanx_shard::step::seals::Seals;

use crate::fake::{FakeShard, Pages, oracle::Luck};

/// What a coordinator tells a shard.
#[derive(Debug, Clone)]
pub enum ToShard {
    Form(Form),
    Serve { epoch: u64, n_blocks: usize },
    Plan(StepPlan),
    Retire { epoch: u64, keep_kv: bool },
    Prepare { world_size: usize, ranks: Vec<usize> },
    Shutdown,
}

/// Take a rank.
#[derive(Debug, Clone)]
pub struct Form {
    pub epoch: u64,
    pub rank: usize,
    pub ranks: Vec<usize>,
    pub keep_kv_of: Option<u64>,
    pub keep_sealed: bool,
    pub copy_at: Option<usize>,
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
    /// Whether `Loaded` promised the pages that are kept.
    pub has_promised: bool,
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
    pub seals: Seals,
}

/// A rank's pages as they were after a step.
#[derive(Clone)]
pub struct Copied {
    pub world_size: usize,
    pub step: u64,
    pub pages: Pages,
    pub seals: Seals,
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
        let (pages, seals) = fake.abort(|| luck.one_in(2));
        let world_size = engine.ranks.len();
        self.kept = Some(Kept { epoch: engine.epoch, rank: engine.rank, world_size, through_step, pages, seals });
    }

    /// Takes a rank. Returns the last step of the wanted epoch that its pages have, and what their blocks hold if that is
    /// wanted. Other pages are given back.
    pub fn form(&mut self, form: Form) -> (Option<u64>, Option<BTreeMap<u32, Seal>>) {
        let Form { epoch, rank, ranks, keep_kv_of, keep_sealed, .. } = form;
        let of_rank = |kept: &Kept| kept.rank == rank && kept.world_size == ranks.len();
        let is_wanted = |kept: &Kept| of_rank(kept) && (keep_sealed || Some(kept.epoch) == keep_kv_of);
        self.kept = self.kept.take().filter(is_wanted);
        let kept = self.kept.as_ref();
        let through_step = kept.filter(|kept| Some(kept.epoch) == keep_kv_of).map(|kept| kept.through_step);
        let sealed = kept.filter(|_| keep_sealed).map(|kept| kept.seals.iter().collect());
        let has_promised = kept.is_some();
        self.engine = Some(Engine { epoch, rank, ranks, has_promised, serving: None, begun: None });
        (through_step, sealed)
    }

    /// The pages that it says it has when it attaches: world size and rank.
    pub fn holds(&self) -> Option<(usize, usize)> {
        self.kept.as_ref().map(|kept| (kept.world_size, kept.rank))
    }

    /// Takes plans from now on.
    pub fn serve(&mut self, n_blocks: usize, limits: Limits) {
        let Some(engine) = &mut self.engine else { return };
        let fake = FakeShard::new(engine.epoch, n_blocks, limits);
        let kept = self.kept.take().filter(|kept| engine.has_promised && kept.pages.len() == n_blocks);
        engine.serving = Some(match kept {
            Some(Kept { pages, seals, .. }) => fake.with_pages(pages, seals),
            None => fake,
        });
    }
}
