//! Operations across the ranks of a group.
//!
//! [`connect`] picks a kind from [`KINDS`]: nothing for one rank, shared memory on one host, TCP between hosts.
//! A new kind is one file and one line there.

pub mod auth;
mod op;
mod shm;
mod single;
mod tcp;

use std::{
    net::TcpListener,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::Duration,
};

/// What can go wrong between ranks. After any error the collective is unusable and its group must re-form.
#[derive(Debug, thiserror::Error)]
pub enum CollectiveError {
    /// The group was told to stop.
    #[error("collective of epoch {epoch}: aborted")]
    Aborted {
        /// Epoch of the group.
        epoch: u64,
    },
    /// A rank did not arrive in time.
    #[error("collective of epoch {epoch}: rank {rank} did not arrive within {after:?}")]
    Timeout {
        /// Epoch of the group.
        epoch: u64,
        /// The rank that is missing.
        rank: usize,
        /// How long was waited.
        after: Duration,
    },
    /// A rank's process or connection is gone.
    #[error("collective of epoch {epoch}: rank {rank} is gone: {reason}")]
    PeerLost {
        /// Epoch of the group.
        epoch: u64,
        /// The lost rank.
        rank: usize,
        /// What was seen.
        reason: String,
    },
    /// The group could not be connected.
    #[error("collective of epoch {epoch}: {reason}")]
    Setup {
        /// Epoch of the group.
        epoch: u64,
        /// What was wrong and what to do.
        reason: String,
    },
    /// Ranks disagree about what they do.
    #[error("collective of epoch {epoch}: rank {rank} sent {got}, want {want}")]
    Mismatch {
        /// Epoch of the group.
        epoch: u64,
        /// The rank that sent it.
        rank: usize,
        /// What this rank expected.
        want: String,
        /// What came.
        got: String,
    },
}

/// Lets another thread end a collective that is waiting, and see whom it waits for. Cloning shares the flag.
#[derive(Debug, Clone, Default)]
pub struct AbortFlag(Arc<FlagState>);

#[derive(Debug, Default)]
struct FlagState {
    aborted: AtomicBool,
    /// The rank that is waited for, plus 1; 0 for none.
    waits_for: AtomicU32,
}

impl AbortFlag {
    /// Every waiting and later operation returns [`CollectiveError::Aborted`].
    pub fn abort(&self) {
        self.0.aborted.store(true, Ordering::Release);
    }

    /// Whether [`AbortFlag::abort`] was called.
    pub fn is_aborted(&self) -> bool {
        self.0.aborted.load(Ordering::Acquire)
    }

    /// The rank that the collective waits for at this moment, if it waits longer than it takes to notice.
    pub fn waits_for(&self) -> Option<u32> {
        self.0.waits_for.load(Ordering::Relaxed).checked_sub(1)
    }

    /// Says that a rank is waited for; until the answer is dropped.
    fn waiting_for(&self, peer: usize) -> Waiting<'_> {
        self.0.waits_for.store(peer as u32 + 1, Ordering::Relaxed);
        Waiting(self)
    }
}

/// A wait for a rank; see [`AbortFlag::waits_for`].
struct Waiting<'a>(&'a AbortFlag);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.0.waits_for.store(0, Ordering::Relaxed);
    }
}

/// What is made of sums: see [`Collective::all_reduce_into`].
pub type Finish<'a> = &'a mut dyn FnMut(&[i64], &mut [f32]);

/// Ranks that compute in lock-step. Every rank calls the same operations in the same order.
///
/// No operation waits longer than the time limit the collective was made with, and each ends soon after
/// [`AbortFlag::abort`].
pub trait Collective: Send {
    /// This rank.
    fn rank(&self) -> usize;

    /// Number of ranks.
    fn world_size(&self) -> usize;

    /// Short name, such as `shm` or `tcp`.
    fn name(&self) -> &'static str;

    /// Ends operations from another thread.
    fn abort_flag(&self) -> AbortFlag;

    /// Adds element-wise over all ranks (wrapping); every rank has the sum afterwards. Lengths are equal on all ranks.
    fn all_reduce(&mut self, values: &mut [i64]) -> Result<(), CollectiveError>;

    /// Adds element-wise over all ranks (wrapping) and makes `results` of the sums, which every rank has afterwards; `values` hold
    /// nothing in particular then. Lengths are equal, also on all ranks.
    ///
    /// `finish` gets stretches of the sums and what `results` hold at the same place. A stretch may be finished on one rank, and what came of
    /// it sent to the others: so `finish` has to do the same on all of them, and `results` to hold the same before.
    fn all_reduce_into(
        &mut self,
        values: &mut [i64],
        results: &mut [f32],
        finish: Finish<'_>,
    ) -> Result<(), CollectiveError>;

    /// Concatenates what the ranks give, in rank order, on every rank. `lens[rank]` is each rank's length in bytes;
    /// `mine.len() == lens[self.rank()]`, `all.len()` is their sum.
    fn all_gather(&mut self, mine: &[u8], lens: &[usize], all: &mut [u8]) -> Result<(), CollectiveError>;

    /// The same, but only rank 0 gets the result; other ranks pass an empty `all`.
    fn gather(&mut self, mine: &[u8], lens: &[usize], all: &mut [u8]) -> Result<(), CollectiveError>;

    /// Rank 0's bytes to every rank.
    fn broadcast(&mut self, bytes: &mut [u8]) -> Result<(), CollectiveError>;
}

/// Where a rank is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerAddress {
    /// Equal for ranks that can share memory: same host, same `/dev/shm`, same process ids.
    pub host_id: String,
    /// `HOST:PORT` of the rank's listener; unused where ranks share memory.
    pub address: String,
}

/// What a rank must know to join its group.
#[derive(Clone)]
pub struct CollectiveConfig {
    /// Formation of the group; connections of any other epoch are refused.
    pub epoch: u64,
    /// This rank.
    pub rank: usize,
    /// Number of ranks.
    pub world_size: usize,
    /// Known to the ranks of this epoch only: names the shared memory and proves who connects. Never sent.
    pub secret: Vec<u8>,
    /// Every rank's place, in rank order.
    pub peers: Vec<PeerAddress>,
    /// Longest wait of connecting, and of each operation.
    pub time_limit: Duration,
}

impl std::fmt::Debug for CollectiveConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CollectiveConfig")
            .field("epoch", &self.epoch)
            .field("rank", &self.rank)
            .field("world_size", &self.world_size)
            .field("peers", &self.peers)
            .field("time_limit", &self.time_limit)
            .finish_non_exhaustive()
    }
}

impl CollectiveConfig {
    /// Refuses what no group can be made of.
    fn check(&self) -> Result<(), CollectiveError> {
        if self.world_size == 0 || self.rank >= self.world_size || u32::try_from(self.world_size).is_err() {
            return Err(self.setup(format!("rank {} is not in a world of {} ranks", self.rank, self.world_size)));
        }
        if self.peers.len() != self.world_size {
            return Err(self.setup(format!("{} peers are given for {} ranks", self.peers.len(), self.world_size)));
        }
        if self.secret.is_empty() && self.world_size > 1 {
            return Err(self.setup("the secret is empty: ranks could not tell each other from strangers".to_owned()));
        }
        Ok(())
    }

    fn setup(&self, reason: String) -> CollectiveError {
        CollectiveError::Setup { epoch: self.epoch, reason }
    }
}

type Connect = fn(&CollectiveConfig, Option<&TcpListener>, AbortFlag) -> Result<Box<dyn Collective>, CollectiveError>;

/// A way to connect ranks.
pub struct CollectiveKind {
    /// Name, as [`connect`]'s `force` takes it.
    pub name: &'static str,
    /// Whether it can serve this group.
    fits: fn(&CollectiveConfig) -> bool,
    connect: Connect,
}

/// Every kind, fastest first.
pub static KINDS: &[CollectiveKind] = &[single::KIND, shm::KIND, tcp::KIND];

/// Joins the group: returns when this rank is connected to all others, or after the time limit.
///
/// The first kind that fits is taken, or the one that `force` names. `listener` is bound where the others find this
/// rank, lives as long as the shard, and is switched to non-blocking; only TCP needs it. Call this before the thread is
/// pinned to a core: the number of usable cores decides how long waits spin.
///
/// # Errors
/// [`CollectiveError::Setup`] says what was wrong, [`CollectiveError::Timeout`] and [`CollectiveError::PeerLost`] who is
/// missing.
pub fn connect(
    config: &CollectiveConfig,
    listener: Option<&TcpListener>,
    force: Option<&str>,
) -> Result<Box<dyn Collective>, CollectiveError> {
    connect_abortable(config, listener, force, AbortFlag::default())
}

/// [`connect`], which also ends when `abort` is raised. The collective keeps the same flag.
///
/// # Errors
/// As [`connect`], and [`CollectiveError::Aborted`].
pub fn connect_abortable(
    config: &CollectiveConfig,
    listener: Option<&TcpListener>,
    force: Option<&str>,
    abort: AbortFlag,
) -> Result<Box<dyn Collective>, CollectiveError> {
    config.check()?;
    let kind = match force {
        Some(name) => KINDS.iter().find(|kind| kind.name == name).ok_or_else(|| {
            let names: Vec<_> = KINDS.iter().map(|kind| kind.name).collect();
            config.setup(format!("no collective is called {name:?}; there are {}", names.join(", ")))
        })?,
        None => KINDS
            .iter()
            .find(|kind| (kind.fits)(config))
            .ok_or_else(|| config.setup("no collective fits these peers".to_owned()))?,
    };
    (kind.connect)(config, listener, abort)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(hosts: &[&str]) -> CollectiveConfig {
        CollectiveConfig {
            epoch: 1,
            rank: 0,
            world_size: hosts.len(),
            secret: b"secret".to_vec(),
            peers: hosts.iter().map(|host| PeerAddress { host_id: (*host).into(), address: String::new() }).collect(),
            time_limit: Duration::from_secs(1),
        }
    }

    fn chosen(hosts: &[&str]) -> &'static str {
        KINDS.iter().find(|kind| (kind.fits)(&config(hosts))).map_or("none", |kind| kind.name)
    }

    #[test]
    fn the_fastest_kind_that_fits_is_chosen() {
        assert_eq!(chosen(&["a"]), "single");
        assert_eq!(chosen(&["a", "a", "a"]), "shm");
        assert_eq!(chosen(&["a", "b"]), "tcp");
    }

    #[test]
    fn names_are_unique() {
        for (idx, kind) in KINDS.iter().enumerate() {
            assert!(KINDS[..idx].iter().all(|other| other.name != kind.name));
        }
    }

    #[test]
    fn impossible_groups_are_refused() {
        let good = config(&["a", "a"]);
        for bad in [
            CollectiveConfig { rank: 2, ..good.clone() },
            CollectiveConfig { world_size: 0, ..good.clone() },
            CollectiveConfig { peers: vec![], ..good.clone() },
            CollectiveConfig { secret: vec![], ..good.clone() },
        ] {
            assert!(matches!(connect(&bad, None, None), Err(CollectiveError::Setup { .. })), "{bad:?}");
        }
        let Err(error) = connect(&good, None, Some("pigeon")) else { panic!("an unknown kind connected") };
        assert!(error.to_string().contains("single, shm, tcp"), "{error}");
    }

    #[test]
    fn the_secret_is_not_printed() {
        let shown = format!("{:?}", config(&["a"]));
        assert!(!shown.contains("secret"), "{shown}");
    }
}
