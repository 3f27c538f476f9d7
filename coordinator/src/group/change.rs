//! Changes that operators ask of a group, and what comes of them.

use std::time::Duration;

use phalanx_cluster::id::ShardId;

/// A rolling restart as it is asked for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RollingRestart {
    /// Shards that are left as they are.
    pub but: Vec<ShardId>,
    /// Longest wait for a shard to be there again, if not the usual one.
    pub return_limit: Option<Duration>,
}

/// Why a change was not made. The group goes on as it was.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ChangeError {
    /// No shard of that name is attached.
    #[error("no shard named {0} is attached")]
    UnknownShard(ShardId),
    /// It can't be done as things are; the text says what is missing.
    #[error("{0}")]
    Impossible(String),
    /// It was begun and given up; the text says why.
    #[error("{0}")]
    Failed(String),
}
