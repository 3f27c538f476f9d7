//! The partition plan: which heads, feed-forward columns and vocabulary rows each rank holds.
//!
//! Any world size works, divisible or not. Whole KV-head groups go to ranks; where there are more ranks than KV heads,
//! query heads are dealt out and the KV heads that they read are held by several ranks. Feed-forward columns (in units
//! of [`PartitionPlan::ffn_slice_width`]) and vocabulary rows are then dealt so that every rank's cost is balanced.

use std::ops::Range;

/// Slices of all ranks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PartitionPlan {
    /// Width of the feed-forward slices of exact sums: the unit in which columns are dealt. Depends on the model only.
    pub ffn_slice_width: usize,
    /// In rank order.
    pub ranks: Vec<RankSlice>,
}

/// What one rank holds of every layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RankSlice {
    /// Query heads; may be empty.
    pub q_heads: Range<usize>,
    /// KV heads that those query heads read.
    pub kv_heads: Range<usize>,
    /// Feed-forward columns, a multiple of the slice width; may be empty.
    pub ffn: Range<usize>,
    /// Rows of embedding table and output matrix; may be empty.
    pub vocab: Range<usize>,
}

/// Why there is no plan.
#[derive(Debug, thiserror::Error, PartialEq)]
pub enum PartitionError {
    /// More ranks than the model has query heads.
    #[error("tensor parallel size {world_size}: the model has {n_heads} query heads: use at most {n_heads} ranks")]
    TooManyRanks {
        /// Ranks asked for.
        world_size: usize,
        /// Query heads of the model.
        n_heads: usize,
    },
    /// No ranks, or weights that are not positive numbers.
    #[error("partition weights {0:?}: want one positive number per rank")]
    BadWeights(Vec<f64>),
}
