//! Rows of all ranks of one epoch, as a mirror keeps them: in pages that a device takes over as they are.
//!
//! **Invariant.** What the store says of a rank's rows is true of the pages that it gives away for that rank: frames come
//! in order, and each says through which step rows are whole with it, and which blocks are whole and what they hold.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
};

use phalanx_cluster::seal::Seal;
use phalanx_kernels::{
    error::KernelError,
    pages::KvPages,
    slots::{KvRange, SlotSet},
};

use super::{
    frame::Content,
    handshake::{Source, Verdict},
};
use crate::memory;

/// What `through` holds while rows are missing,
const MISSING: u64 = u64::MAX;
/// and for a rank that has never sent anything.
const ABSENT: u64 = u64::MAX - 1;
/// How much more is taken between two looks at the memory that is free,
const LOOK_EVERY_BYTES: u64 = 32 << 20;
/// and what must be free then: others on this host come first, the ranks' own pages above all.
const LEAST_FREE_BYTES: u64 = 2 * memory::RESERVE_BYTES;

/// Copies of rows, for whoever takes a rank. Cloning shares them.
#[derive(Debug, Clone)]
pub struct Store(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    bounds: Bounds,
}

/// How much memory copies may take.
#[derive(Debug, Clone, Copy)]
struct Bounds {
    /// Most bytes of pages that are written.
    limit: u64,
    /// What the host has left; `None` if it does not say.
    free: fn() -> Option<u64>,
}

#[derive(Debug, Default)]
struct State {
    group: Option<Arc<Group>>,
    /// Term and epoch in which this shard last became a rank: rows of earlier groups are of no use any more.
    over: (u64, u64),
}

/// All ranks of an epoch.
#[derive(Debug)]
struct Group {
    term: u64,
    epoch: u64,
    /// Ranks that copy their rows here.
    n_sources: usize,
    ranks: Vec<Rank>,
    /// Bytes of pages that have been written.
    taken: AtomicU64,
    /// Rows went beyond the limit: the epoch is not mirrored.
    full: AtomicBool,
}

#[derive(Debug)]
struct Rank {
    /// Last step of which all rows are here, and all of earlier ones.
    through: AtomicU64,
    copy: Mutex<Copy>,
}

#[derive(Debug, Default)]
struct Copy {
    /// Counts the connections that have written here; the last one may.
    connection: u64,
    source: Option<Source>,
    /// None on a rank without KV heads, or when they are given away.
    pages: Option<KvPages>,
    /// What blocks hold that are here as their rank has sealed them.
    seals: BTreeMap<u32, Seal>,
}

/// A rank that this shard is to take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Taking {
    /// Leadership under which its group forms.
    pub term: u64,
    /// Epoch that forms.
    pub epoch: u64,
    /// The rank.
    pub rank: u32,
    /// Epoch whose rows are wanted; 0 for none.
    pub kv_of_epoch: u64,
    /// Whether rows of any epoch are wanted, for what their blocks hold.
    pub sealed_kv: bool,
}

/// What a rank's rows are given away as.
#[derive(Debug)]
pub struct Adopted {
    /// Whose rows they are.
    pub source: Source,
    /// The pages; none for a rank without KV heads.
    pub pages: Option<KvPages>,
    /// What blocks hold, of which all rows are there.
    pub seals: BTreeMap<u32, Seal>,
    /// Last step of which all rows are there, and of all before it; `None` if rows are missing.
    pub through_step: Option<u64>,
}

/// Ranks of whose rows there are copies, whole blocks at least.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Copied {
    /// Ranks of their group.
    pub world_size: u32,
    /// Which of them, ascending.
    pub ranks: Vec<u32>,
}

/// How far all ranks are mirrored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// In which epoch.
    pub epoch: u64,
    /// All rows of all ranks through this step.
    pub step: u64,
}

/// Why rows could not be taken in. The connection is of no use then.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Another connection has come, another epoch, or the pages are given away.
    #[error("the rows are not wanted any more")]
    Unwanted,
    /// There is no memory for them.
    #[error("the rows of epoch {epoch} take more than {limit} bytes: it is not mirrored; raise --mirror-memory")]
    Full {
        /// The epoch.
        epoch: u64,
        /// Most bytes.
        limit: u64,
    },
    /// The host has hardly any memory left.
    #[error("the host has {free} bytes of memory left: the rows of epoch {epoch} are not mirrored")]
    Short {
        /// The epoch.
        epoch: u64,
        /// Bytes that are free.
        free: u64,
    },
    /// The pages refuse them.
    #[error(transparent)]
    Kernel(#[from] KernelError),
}

/// Takes in the rows of one connection.
#[derive(Debug)]
pub(super) struct Writer {
    group: Arc<Group>,
    rank: usize,
    connection: u64,
    bounds: Bounds,
}

impl Store {
    /// An empty store of up to `limit` bytes, as long as the host has memory left.
    pub fn new(limit: u64) -> Self {
        Self::bounded(Bounds { limit, free: memory::free_bytes })
    }

    fn bounded(bounds: Bounds) -> Self {
        Self(Arc::new(Shared { state: Mutex::default(), bounds }))
    }

    /// A rank begins to send.
    ///
    /// # Errors
    /// Why it should not.
    pub(super) fn begin(&self, source: &Source) -> Result<Writer, Verdict> {
        let mut state = lock(&self.0.state);
        if (source.term, source.epoch) < state.over {
            return Err(Verdict::Stale);
        }
        let group = match state.group.as_ref().filter(|group| group.is_of(source)) {
            Some(group) => group.clone(),
            None if state.group.as_ref().is_some_and(|group| group.outlives(source)) => return Err(Verdict::Stale),
            None => {
                let group = Arc::new(Group::new(source));
                drop_aside(state.group.replace(group.clone()));
                group
            }
        };
        drop(state);
        if group.full.load(Ordering::Acquire) {
            return Err(Verdict::Full);
        }
        let rank = group.ranks.get(source.rank as usize).ok_or(Verdict::Stale)?;
        let mut copy = lock(&rank.copy);
        // The sender sends all of it again.
        rank.through.store(MISSING, Ordering::Release);
        copy.seals.clear();
        if copy.source != Some(*source) || copy.pages.is_none() {
            let has_pages = source.shape.n_kv_heads > 0 && source.shape.n_layers > 0;
            let pages = has_pages.then(|| KvPages::new(source.shape, source.precision)).transpose();
            match pages {
                Ok(pages) => copy.pages = pages,
                Err(error) => {
                    tracing::warn!(epoch = source.epoch, rank = source.rank, %error, "KV rows are not mirrored");
                    return Err(Verdict::Full);
                }
            }
            copy.source = Some(*source);
        }
        copy.connection += 1;
        let connection = copy.connection;
        drop(copy);
        Ok(Writer { group, rank: source.rank as usize, connection, bounds: self.0.bounds })
    }

    /// How far all ranks of the epoch are mirrored; `None` while a row is missing.
    pub fn progress(&self) -> Option<Progress> {
        let group = lock(&self.0.state).group.clone()?;
        let through = group.ranks.iter().map(|rank| rank.through.load(Ordering::Acquire));
        let through: Vec<u64> = through.filter(|step| *step != ABSENT).collect();
        let all = through.len() >= group.n_sources && !through.contains(&MISSING);
        let step = through.into_iter().min()?;
        (all && !group.full.load(Ordering::Acquire)).then_some(Progress { epoch: group.epoch, step })
    }

    /// Of which ranks there are copies of which it is known what blocks hold.
    pub fn copied(&self) -> Option<Copied> {
        let group = lock(&self.0.state).group.clone().filter(|group| !group.full.load(Ordering::Acquire))?;
        let is_copied = |(_, rank): &(u32, &Rank)| !lock(&rank.copy).seals.is_empty();
        let ranks: Vec<u32> = (0..).zip(&group.ranks).filter(is_copied).map(|(rank, _)| rank).collect();
        let world_size = u32::try_from(group.ranks.len()).unwrap_or(u32::MAX);
        (!ranks.is_empty()).then_some(Copied { world_size, ranks })
    }

    /// Gives away the rows of the rank, if they are here. Others of that epoch stay for whoever fetches them, until
    /// [`Store::forget_before`]; those of other epochs are forgotten.
    pub fn adopt(&self, taking: Taking) -> Option<Adopted> {
        let mut state = lock(&self.0.state);
        state.over = state.over.max((taking.term, taking.epoch));
        if let Some(other) = state.group.take_if(|group| !group.is_wanted_by(taking)) {
            drop_aside(Some(other));
        }
        let group = state.group.clone()?;
        drop(state);
        group.give_away(taking)
    }

    /// A group of this epoch serves: nobody needs rows of earlier ones.
    pub fn forget_before(&self, epoch: u64) {
        drop_aside(lock(&self.0.state).group.take_if(|group| group.epoch < epoch));
    }

    /// The rows that a caller came to fetch, if they are here. From now on they don't change.
    pub(super) fn lend(&self, wanted: &Source) -> Option<Lent> {
        let group = lock(&self.0.state).group.clone().filter(|group| group.is_wanted(wanted.term, wanted.epoch))?;
        let rank = group.ranks.get(wanted.rank as usize)?;
        let mut copy = lock(&rank.copy);
        copy.connection += 1;
        let through_step = group.through_step(rank)?;
        let source = copy.source.filter(|source| source.is_of_kind(wanted))?;
        let written = copy.pages.as_ref().map(|pages| pages.written().clone()).unwrap_or_default();
        let seals = copy.seals.iter().map(|(block, seal)| (*block, *seal)).collect();
        drop(copy);
        Some(Lent { group, rank: wanted.rank as usize, source, written, seals, through_step })
    }
}

/// Rows that somebody else fetches.
#[derive(Debug)]
pub(super) struct Lent {
    group: Arc<Group>,
    rank: usize,
    /// Whose they are.
    pub(super) source: Source,
    /// Which there are.
    pub(super) written: SlotSet,
    /// What blocks hold.
    pub(super) seals: Vec<(u32, Seal)>,
    /// Last step of which all rows are there.
    pub(super) through_step: u64,
}

impl Lent {
    /// Appends the rows of `ranges` to `rows`.
    pub(super) fn read(&self, ranges: &[KvRange], rows: &mut Vec<u8>) -> Result<(), StoreError> {
        let rank = self.group.ranks.get(self.rank).ok_or(StoreError::Unwanted)?;
        let mut copy = lock(&rank.copy);
        Ok(copy.pages.as_mut().ok_or(StoreError::Unwanted)?.read(ranges, rows)?)
    }
}

impl Group {
    fn new(source: &Source) -> Self {
        let rank = || Rank { through: AtomicU64::new(ABSENT), copy: Mutex::default() };
        Self {
            term: source.term,
            epoch: source.epoch,
            n_sources: source.n_sources as usize,
            ranks: (0..source.world_size).map(|_| rank()).collect(),
            taken: AtomicU64::new(0),
            full: AtomicBool::new(false),
        }
    }

    fn is_of(&self, source: &Source) -> bool {
        (self.term, self.epoch, self.ranks.len()) == (source.term, source.epoch, source.world_size as usize)
    }

    /// Whether rows of `source` would come too late.
    fn outlives(&self, source: &Source) -> bool {
        (self.term, self.epoch) >= (source.term, source.epoch)
    }

    /// Whether a formation wants these rows, by their epoch or for what blocks hold.
    fn is_wanted_by(&self, taking: Taking) -> bool {
        self.is_wanted(taking.term, taking.kv_of_epoch) || (taking.sealed_kv && self.term <= taking.term)
    }

    /// Whether a formation of that term wants these rows.
    fn is_wanted(&self, term: u64, kv_of_epoch: u64) -> bool {
        self.epoch == kv_of_epoch && self.term <= term
    }

    /// The last step of which all rows are there.
    fn through_step(&self, rank: &Rank) -> Option<u64> {
        let step = rank.through.load(Ordering::Acquire);
        (step != MISSING && step != ABSENT && !self.full.load(Ordering::Acquire)).then_some(step)
    }

    fn give_away(&self, taking: Taking) -> Option<Adopted> {
        let rank = self.ranks.get(taking.rank as usize)?;
        let mut copy = lock(&rank.copy);
        // Under the lock: no frame comes between the number and the pages.
        copy.connection += 1;
        let through_step = self.through_step(rank);
        // Blocks that are sealed are whole, whatever others lack.
        if through_step.is_none() && (!taking.sealed_kv || self.full.load(Ordering::Acquire)) {
            return None;
        }
        let source = copy.source.take()?;
        rank.through.store(MISSING, Ordering::Release);
        let (pages, seals) = (copy.pages.take(), std::mem::take(&mut copy.seals));
        Some(Adopted { source, pages, seals, through_step })
    }
}

impl Writer {
    /// Takes in a frame.
    pub(super) fn write(&self, content: Content<'_>, rows: &[u8]) -> Result<(), StoreError> {
        let Content { ranges, seals, through, .. } = content;
        let rank = self.group.ranks.get(self.rank).ok_or(StoreError::Unwanted)?;
        let mut copy = lock(&rank.copy);
        if copy.connection != self.connection {
            return Err(StoreError::Unwanted);
        }
        for range in ranges {
            copy.seals.remove(&range.block);
        }
        if !ranges.is_empty() {
            let pages = copy.pages.as_mut().ok_or(StoreError::Unwanted)?;
            let new = n_new_blocks(pages, ranges) * pages.block_bytes() as u64;
            let before = self.group.taken.fetch_add(new, Ordering::AcqRel);
            if let Err(error) = self.check(before, before + new) {
                self.group.full.store(true, Ordering::Release);
                drop_aside(copy.pages.take());
                return Err(error);
            }
            pages.write(ranges, rows)?;
            // Whoever takes them over goes on to write there.
            pages.prefault();
        }
        copy.seals.extend(seals.iter().copied());
        rank.through.store(through.unwrap_or(MISSING), Ordering::Release);
        Ok(())
    }
}

impl Writer {
    /// Whether copies may take so much, having taken less before.
    fn check(&self, before: u64, taken: u64) -> Result<(), StoreError> {
        let Bounds { limit, free } = self.bounds;
        let epoch = self.group.epoch;
        if taken > limit || self.group.full.load(Ordering::Acquire) {
            return Err(StoreError::Full { epoch, limit });
        }
        if taken / LOOK_EVERY_BYTES > before / LOOK_EVERY_BYTES
            && let Some(free) = free().filter(|free| *free < LEAST_FREE_BYTES)
        {
            return Err(StoreError::Short { epoch, free });
        }
        Ok(())
    }
}

/// Blocks among those of `ranges` that had no row before.
fn n_new_blocks(pages: &KvPages, ranges: &[KvRange]) -> u64 {
    let mut blocks: Vec<u32> =
        ranges.iter().map(|range| range.block).filter(|block| !pages.written().has_block(*block)).collect();
    blocks.sort_unstable();
    blocks.dedup();
    blocks.len() as u64
}

/// Giving gigabytes back to the system takes a while.
fn drop_aside<T: Send + 'static>(value: Option<T>) {
    let Some(value) = value else { return };
    // Without a thread it is dropped here: the closure is.
    let _aside = thread::Builder::new().name("mirror-drop".to_owned()).spawn(move || {
        crate::background::Share::Little.bind();
        drop(value);
    });
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Each change is complete in itself, so a panicking thread leaves nothing half done.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
