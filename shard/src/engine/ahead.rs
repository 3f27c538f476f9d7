//! Loading slices before they are wanted, so that a later form loads nothing.
//!
//! One slice at a time, most wanted first, each by a thread of its own that takes idle processors only: threads that serve
//! on the same machine go first, and whoever wants the engine for something else gets it at once. Where no processor is
//! ever idle, it begins again as a thread of the lowest priority. (A thread without privileges may lower its priority
//! and not raise it again; so it is not the engine's own thread that loads.)

use std::{
    collections::VecDeque,
    ops::ControlFlow,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::mpsc,
    thread,
};

use phalanx_cluster::{checkpoint::Checkpoint, partition::PartitionPlan};
use phalanx_kernels::collective::AbortFlag;
use phalanx_proto::v1::{Form, Peer, Prepare, Prepared};

use super::{
    checkpoints::{self, Checkpoints, Opened},
    rank::{self, EngineError, RankConfig},
    slice::{self, Key, Slices, Weights},
    worker::{Command, Envelope},
};
use crate::{
    background::{Patience, Share},
    memory,
};

/// Share of the free memory that stays free for KV pages where their size is not given.
const KV_RESERVE_DIVISOR: u64 = 8;

/// What is to be loaded ahead, and what is being loaded.
pub(super) struct Ahead {
    /// Where the loading threads' results go: back to the engine.
    results: mpsc::Sender<Envelope>,
    /// Of the last [`Prepare`].
    form: Form,
    /// Whether it wants KV pages too.
    reserve_kv: bool,
    /// Ranks that were not looked at yet.
    waiting: VecDeque<u32>,
    job: Option<Job>,
    n_jobs: u64,
    /// Of the processors, for loading threads.
    share: Share,
}

/// A loading thread at work.
struct Job {
    number: u64,
    abort: AbortFlag,
    /// `None` while the checkpoint is opened.
    rank: Option<u32>,
}

/// What a loading thread came back with.
pub struct LoadedAhead {
    job: u64,
    result: Result<Cargo, EngineError>,
}

enum Cargo {
    Opened(Opened),
    Weights(Box<Weights>),
    /// Nothing: no processor was idle for long enough.
    Starved,
}

/// What the engine has.
pub(super) struct Stock<'a> {
    pub config: &'a RankConfig,
    pub checkpoints: &'a mut Checkpoints,
    pub slices: &'a mut Slices,
    /// The slice of the rank that the engine has taken, and its bytes.
    pub in_use: Option<(&'a Key, u64)>,
}

enum Look {
    /// Of so many bytes.
    Here(u64),
    Missing(PartitionPlan, Key),
}

impl Ahead {
    /// Nothing is to be loaded. Results come back through `results`.
    pub fn new(results: mpsc::Sender<Envelope>) -> Self {
        let share = Share::Leftovers;
        let (form, waiting) = (Form::default(), VecDeque::new());
        Self { results, form, reserve_kv: false, waiting, job: None, n_jobs: 0, share }
    }

    /// Loads what `prepare` wants instead of what was wanted before. Returns what is loaded already.
    pub fn prepare(&mut self, prepare: Prepare, stock: Stock<'_>) -> Vec<Prepared> {
        let mut form = prepare.form.unwrap_or_default();
        if form.peers.is_empty() {
            let peer = |rank| Peer { rank, weight: 1.0, ..Peer::default() };
            form.peers = (0..form.world_size).map(peer).collect();
        }
        let is_alike = is_alike(&form, &self.form);
        let goes_on = |job: &Job| is_alike && job.rank.is_none_or(|rank| prepare.ranks.contains(&rank));
        if self.job.as_ref().is_some_and(|job| !goes_on(job)) {
            self.stop();
        }
        let loading = self.job.as_ref().and_then(|job| job.rank);
        self.waiting = prepare.ranks.into_iter().filter(|rank| Some(*rank) != loading).collect();
        self.form = form;
        self.reserve_kv = prepare.reserve_kv;
        self.go_on(stock)
    }

    /// Ends the loading at once: something else is to be done.
    pub fn stop(&mut self) {
        self.waiting.clear();
        if let Some(job) = self.job.take() {
            // It ends after the tensor that it is at; nobody waits for that.
            job.abort.abort();
        }
    }

    /// Takes a loading thread's result and begins the next slice. Returns what is loaded now.
    pub fn take(&mut self, loaded: LoadedAhead, stock: Stock<'_>) -> Vec<Prepared> {
        if self.job.as_ref().is_none_or(|job| job.number != loaded.job) {
            return Vec::new();
        }
        let rank = self.job.take().and_then(|job| job.rank);
        match loaded.result {
            Ok(Cargo::Opened(opened)) => stock.checkpoints.remember(&self.form, opened),
            Ok(Cargo::Weights(weights)) => {
                tracing::info!(rank, bytes = weights.weight_bytes, "loaded a slice ahead");
                stock.slices.put(weights.key.clone(), *weights);
                // Answered by the look at what is here.
                if let Some(rank) = rank {
                    self.waiting.push_front(rank);
                }
            }
            Ok(Cargo::Starved) => {
                tracing::info!(rank, "no processor is idle: loading ahead begins again with the lowest priority");
                self.share = Share::Least;
                if let Some(rank) = rank {
                    self.waiting.push_front(rank);
                }
            }
            Err(error) => {
                // The group does not depend on it: a form of this rank will say what is wrong.
                tracing::warn!(rank, "loading ahead: {error}");
                if rank.is_none() {
                    self.waiting.clear();
                }
            }
        }
        self.go_on(stock)
    }

    /// Answers for the waiting ranks that are here and begins to load the first that is not.
    fn go_on(&mut self, stock: Stock<'_>) -> Vec<Prepared> {
        let Some(checkpoint) = stock.checkpoints.get(&self.form) else {
            if self.job.is_none() && !self.waiting.is_empty() {
                let form = self.form.clone();
                // Nobody asks meanwhile whether it has waited in vain.
                self.spawn(None, Share::Least, move |_| checkpoints::open(&form).map(Cargo::Opened));
            }
            return Vec::new();
        };
        let mut prepared = Vec::new();
        let mut missing = VecDeque::new();
        for rank in std::mem::take(&mut self.waiting) {
            match self.look_for(rank, checkpoint.as_ref(), &stock) {
                Ok(Look::Here(weight_bytes)) => {
                    let (epoch, world_size) = (self.form.epoch, self.form.world_size);
                    prepared.push(Prepared { epoch, rank, world_size, weight_bytes });
                }
                Ok(Look::Missing(plan, key)) => missing.push_back((rank, plan, key)),
                Err(error) => tracing::warn!(rank, "loading ahead: {error}"),
            }
        }
        while self.job.is_none()
            && let Some((rank, plan, key)) = missing.pop_front()
        {
            // Of another model nothing is wanted any more.
            stock.slices.retain(|other| other.is_of_the_same_model(&key));
            if let Err(error) = self.begin(rank, plan, key, &checkpoint, stock.config) {
                tracing::warn!(rank, "loading ahead: {error}");
            }
        }
        self.waiting = missing.into_iter().map(|(rank, ..)| rank).collect();
        prepared
    }

    fn look_for(&self, rank: u32, checkpoint: &dyn Checkpoint, stock: &Stock<'_>) -> Result<Look, EngineError> {
        let plan = rank::partition(&Form { rank, ..self.form.clone() }, checkpoint)?;
        let key = Key::new(&self.form, checkpoint, &plan, rank as usize)?;
        Ok(match (stock.in_use, stock.slices.get(&key)) {
            (Some((in_use, bytes)), _) if *in_use == key => Look::Here(bytes),
            (_, Some(weights)) => Look::Here(weights.weight_bytes),
            _ => Look::Missing(plan, key),
        })
    }

    fn begin(
        &mut self,
        rank: u32,
        plan: PartitionPlan,
        key: Key,
        checkpoint: &Opened,
        config: &RankConfig,
    ) -> Result<(), EngineError> {
        let need = slice::estimate(checkpoint.as_ref(), &plan, rank as usize, key.precision())?;
        if !self.fits(need) {
            tracing::info!(rank, need, "no memory to load this slice ahead");
            return Ok(());
        }
        // Its threads serve later: they must not inherit the low priority.
        let ops = slice::open_device(&key, &config.device)?;
        let checkpoint = checkpoint.clone();
        let share = self.share;
        let reserve = self.reserve_kv.then(|| self.form.clone());
        self.spawn(Some(rank), share, move |abort| {
            let mut patience = (share == Share::Leftovers).then(Patience::new);
            let mut is_starved = || patience.as_mut().is_some_and(Patience::is_over);
            let mut progress =
                |_| if abort.is_aborted() || is_starved() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) };
            let loaded = Weights::load(key, ops, checkpoint.as_ref(), &plan, rank as usize, &mut progress);
            let mut weights = match loaded {
                Err(_) if is_starved() => return Ok(Cargo::Starved),
                loaded => loaded?,
            };
            if let Some(form) = reserve {
                let kv = rank::kv_shape(&form, checkpoint.config(), &plan, rank as usize);
                weights.reserve_pages(kv, |bytes| rank::kv_blocks(&form, bytes, form.world_size as usize));
            }
            // Everybody will wait for the first step of whoever takes over.
            while !abort.is_aborted() && !is_starved() && weights.ops.prefault(true) {}
            Ok(Cargo::Weights(Box::new(weights)))
        });
        Ok(())
    }

    fn fits(&self, need: u64) -> bool {
        memory::free_bytes().is_none_or(|free| {
            let for_pages = self.form.kv_cache_bytes.max(free / KV_RESERVE_DIVISOR);
            need.saturating_add(for_pages).saturating_add(memory::RESERVE_BYTES) <= free
        })
    }

    fn spawn(
        &mut self,
        rank: Option<u32>,
        share: Share,
        work: impl FnOnce(&AbortFlag) -> Result<Cargo, EngineError> + Send + 'static,
    ) {
        self.n_jobs += 1;
        let (number, abort) = (self.n_jobs, AbortFlag::default());
        let (results, raised) = (self.results.clone(), abort.clone());
        let body = move || {
            share.bind();
            let panicked = |_| Err(EngineError::OutOfOrder("loading panicked".to_owned()));
            let result = catch_unwind(AssertUnwindSafe(|| work(&raised))).unwrap_or_else(panicked);
            let command = Command::LoadedAhead(LoadedAhead { job: number, result });
            // The engine may have ended.
            let _ended = results.send(Envelope { generation: 0, command });
        };
        match thread::Builder::new().name("load-ahead".to_owned()).spawn(body) {
            Ok(_detached) => self.job = Some(Job { number, abort, rank }),
            Err(error) => {
                tracing::warn!("loading ahead: no thread: {error}");
                self.waiting.clear();
            }
        }
    }
}

/// Whether equal ranks of both forms are equal slices.
fn is_alike(one: &Form, other: &Form) -> bool {
    let weights = |form: &Form| form.peers.iter().map(|peer| peer.weight).collect::<Vec<_>>();
    (&one.model, &one.model_hash, &one.dtype, one.world_size, one.max_step_rows)
        == (&other.model, &other.model_hash, &other.dtype, other.world_size, other.max_step_rows)
        && weights(one) == weights(other)
}
