//! Mirrors and the engine: a serving rank sends them its rows, a spare takes pages over from what ranks sent to it.

use std::time::{Duration, Instant};

use phalanx_kernels::{
    collective::AbortFlag,
    error::KernelError,
    ops::{KvShape, Precision},
};
use phalanx_proto::v1::{Form, MirrorTarget};

use super::{
    kept::{KeptPages, KeptState},
    rank::EngineError,
    slice::{Key, Weights},
};
use crate::{
    mirror::{self, Adopted, FetchError, Mirrors, RowsIdentity, Source, Store, Taking, Target},
    model::LoadError,
    step::{executor::Pages, seals::Seals},
};

fn target(mirror: &MirrorTarget) -> Target {
    let MirrorTarget { shard_id, address, secret, ranks } = mirror.clone();
    Target { shard_id, address, secret, n_sources: ranks }
}

/// A rank's mirrors: named by its form, sent to from the moment it serves.
#[derive(Debug)]
pub(super) struct Mirroring {
    targets: Vec<Target>,
    /// Of the rank; its shape is known when it serves.
    source: Source,
    /// Nothing before it serves, and after the device could not read its pages.
    mirrors: Option<Mirrors>,
}

impl Mirroring {
    /// To the mirrors that the form names.
    pub fn new(form: &Form) -> Self {
        let no_pages = KvShape { n_layers: 0, n_blocks: 0, block_size: 0, n_kv_heads: 0, head_dim: 0 };
        let source = Source {
            term: form.term,
            epoch: form.epoch,
            rank: form.rank,
            world_size: form.world_size,
            n_sources: 1,
            shape: no_pages,
            precision: Precision::Auto,
            identity: RowsIdentity::default(),
        };
        Self { targets: form.mirrors.iter().map(target).collect(), source, mirrors: None }
    }

    /// The rank serves from these pages.
    pub fn begin(&mut self, shape: KvShape, precision: Precision, identity: RowsIdentity) {
        let targets = std::mem::take(&mut self.targets);
        if !targets.is_empty() {
            self.source = Source { shape, precision, identity, ..self.source };
            self.mirrors = Some(Mirrors::start(self.source, targets));
        }
    }

    /// A step has written its rows.
    pub fn step_done(&mut self, step: u64, mut pages: Pages<'_>) {
        self.attempt(|mirrors| mirrors.step_done(step, &mut pages));
    }

    /// There is no step to run.
    pub fn catch_up(&mut self, mut pages: Pages<'_>) {
        self.attempt(|mirrors| mirrors.catch_up(&mut pages));
    }

    /// When to catch up next if there is no step to run.
    pub fn next_look(&self) -> Option<Duration> {
        self.mirrors.as_ref().and_then(Mirrors::next_look)
    }

    fn attempt(&mut self, work: impl FnOnce(&mut Mirrors) -> Result<(), KernelError>) {
        if let Some(mirrors) = &mut self.mirrors
            && let Err(error) = work(mirrors)
        {
            tracing::error!(epoch = self.source.epoch, %error, "KV pages can't be read: they are mirrored no more");
            self.mirrors = None;
        }
    }
}

/// The copy of the rank's pages that the form wants, if the store has it and it is of the shape that the rank needs. Of
/// other epochs' rows the store forgets all that it has.
pub(super) fn wanted(store: Option<&Store>, form: &Form, shape: KvShape, key: &Key) -> Option<Adopted> {
    let taking = Taking {
        term: form.term,
        epoch: form.epoch,
        rank: form.rank,
        kv_of_epoch: form.keep_kv_of_epoch,
        sealed_kv: form.keep_sealed_kv,
    };
    let adopted = store?.adopt(taking)?;
    let Source { world_size, shape: copied, precision, identity, .. } = adopted.source;
    let fits = world_size == form.world_size
        && (precision, identity) == (key.precision(), key.rows_identity())
        && KvShape { n_blocks: 0, ..copied } == KvShape { n_blocks: 0, ..shape };
    if !fits {
        tracing::warn!(epoch = form.epoch, rank = form.rank, ?copied, ?shape, "mirrored pages are of another slice");
    }
    fits.then_some(adopted)
}

/// The same from the mirror that the form names, if it has it.
///
/// # Errors
/// If the formation is over.
pub(super) fn fetched(
    form: &Form,
    shape: KvShape,
    key: &Key,
    abort: &AbortFlag,
) -> Result<Option<Adopted>, EngineError> {
    let Some(mirror) = form.kv_from.as_ref().filter(|_| form.keep_kv_of_epoch != 0) else { return Ok(None) };
    let wanted = Source {
        term: form.term,
        epoch: form.keep_kv_of_epoch,
        rank: form.rank,
        world_size: form.world_size,
        n_sources: mirror.ranks,
        shape,
        precision: key.precision(),
        identity: key.rows_identity(),
    };
    let begun = Instant::now();
    match mirror::fetch(&target(mirror), &wanted, abort) {
        Ok(adopted) => {
            let (epoch, rank, elapsed_ms) = (form.epoch, form.rank, begun.elapsed().as_millis() as u64);
            tracing::info!(epoch, rank, from = mirror.shard_id, elapsed_ms, "KV rows are fetched from a mirror");
            Ok(Some(adopted))
        }
        Err(FetchError::Interrupted) => Err(LoadError::Interrupted.into()),
        // It was about to take them in.
        Err(error @ FetchError::Nothing(_)) => {
            tracing::info!(
                epoch = form.epoch,
                rank = form.rank,
                from = mirror.shard_id,
                "KV rows are computed again: {error}"
            );
            Ok(None)
        }
        Err(error) => {
            let from = &mirror.shard_id;
            tracing::warn!(epoch = form.epoch, rank = form.rank, from, "KV rows can't be fetched: {error}");
            Ok(None)
        }
    }
}

/// Makes the copy the pages of these weights, unless they have the wanted pages themselves.
///
/// # Errors
/// If the device takes no such pages.
pub(super) fn adopt(
    weights: &mut Weights,
    adopted: Option<Adopted>,
    form: &Form,
    shape: KvShape,
) -> Result<(), KernelError> {
    let Some(adopted) = adopted else { return Ok(()) };
    if weights.kept.as_ref().is_some_and(|kept| kept.are_wanted(form, shape)) {
        return Ok(());
    }
    let Source { term, epoch, rank, world_size, shape, .. } = adopted.source;
    if let Some(pages) = adopted.pages {
        weights.ops.adopt_kv(pages)?;
    }
    let n_blocks = u32::try_from(shape.n_blocks).unwrap_or(u32::MAX);
    let (through_step, n_sealed) = (adopted.through_step, adopted.seals.len());
    tracing::info!(epoch, rank = form.rank, through_step, n_sealed, "mirrored pages are taken over");
    let seals = Seals::of_copies(shape.n_blocks, shape.block_size, adopted.seals);
    let states = through_step.map(|through_step| KeptState { epoch, through_step }).into_iter().collect();
    weights.kept = Some(KeptPages { term, rank, world_size, shape, n_blocks, states, seals });
    Ok(())
}
