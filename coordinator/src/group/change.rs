//! Changes that operators ask of a group, and what comes of them.

use phalanx_cluster::id::ShardId;

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
