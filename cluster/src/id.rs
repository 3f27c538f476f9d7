//! Names of things in the cluster.

use std::fmt;

/// One formation of a group. Plans, results and collective messages carry it; anything older is dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Epoch(u64);

impl Epoch {
    /// From the wire or the store.
    pub fn from_raw(raw: u64) -> Self {
        Self(raw)
    }

    /// For the wire or the store.
    pub fn raw(self) -> u64 {
        self.0
    }

    /// The epoch after this one.
    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Stable name of a shard.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
pub struct ShardId(pub String);

impl fmt::Display for ShardId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Index of a token in the vocabulary.
pub type TokenId = u32;
