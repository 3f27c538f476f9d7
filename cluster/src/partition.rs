//! The partition plan: which heads, feed-forward columns and vocabulary rows each rank holds.
//!
//! Any world size works, divisible or not. Whole KV-head groups go to ranks; where there are more ranks than KV heads,
//! query heads are dealt out and the KV heads that they read are held by several ranks. Feed-forward columns (in units
//! of [`PartitionPlan::ffn_slice_width`]) and vocabulary rows are then dealt so that every rank's cost is balanced.

use std::ops::Range;

use crate::model_config::ModelConfig;

/// Rows of the vocabulary are dealt in units of this many.
const VOCAB_UNIT: usize = 16;

/// Positions that a row attends to in the cost model: a short conversation. Costs of attention grow with the context,
/// those of the weights don't; no split is right for all contexts.
const TYPICAL_CONTEXT: f64 = 256.0;

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

impl PartitionPlan {
    /// Deals a model to as many ranks as there are weights, in proportion to the weights (relative speeds).
    ///
    /// First heads: whole groups of query heads that share a KV head where there are enough for all ranks, else query
    /// heads. Then feed-forward slices and at last vocabulary rows, each to whichever rank is then done first. The same
    /// arguments give the same plan on every machine.
    ///
    /// # Errors
    /// If there are no weights, some weight is not a positive number, or there are more ranks than query heads.
    pub fn new(config: &ModelConfig, weights: &[f64]) -> Result<Self, PartitionError> {
        let world_size = weights.len();
        if world_size == 0 || !weights.iter().all(|w| w.is_finite() && *w > 0.0) {
            return Err(PartitionError::BadWeights(weights.to_vec()));
        }
        if world_size > config.n_heads {
            return Err(PartitionError::TooManyRanks { world_size, n_heads: config.n_heads });
        }
        // Relative to the fastest, so that no sum or quotient overflows.
        let fastest = weights.iter().copied().fold(0.0, f64::max);
        let speeds: Vec<f64> = weights.iter().map(|w| (w / fastest).max(1e-9)).collect();

        let group = config.n_heads / config.n_kv_heads;
        // Query heads that are dealt together.
        let unit = if world_size <= config.n_kv_heads { group } else { 1 };
        let heads = ranges(&apportion(config.n_heads / unit, &speeds), unit);
        let mut ranks: Vec<RankSlice> = heads
            .into_iter()
            .map(|q_heads| {
                let kv_heads = q_heads.start / group..q_heads.end.div_ceil(group);
                let kv_heads = if q_heads.is_empty() { kv_heads.start..kv_heads.start } else { kv_heads };
                RankSlice { q_heads, kv_heads, ffn: 0..0, vocab: 0..0 }
            })
            .collect();

        let slice_width = ffn_slice_width(config.ffn);
        let costs: Vec<f64> = ranks.iter().map(|r| r.cost(config)).collect();
        let slice_cost = Costs::of(config).ffn_column * slice_width as f64;
        let ffn = ranges(&level(config.ffn / slice_width, slice_cost, &costs, &speeds), slice_width);
        for (rank, ffn) in ranks.iter_mut().zip(ffn) {
            rank.ffn = ffn;
        }

        let costs: Vec<f64> = ranks.iter().map(|r| r.cost(config)).collect();
        let unit_cost = Costs::of(config).vocab_row * VOCAB_UNIT as f64;
        let vocab = ranges(&level(config.vocab / VOCAB_UNIT, unit_cost, &costs, &speeds), VOCAB_UNIT);
        for (rank, vocab) in ranks.iter_mut().zip(vocab) {
            rank.vocab = vocab;
        }
        // Less than a unit is left.
        if let Some(last) = ranks.last_mut() {
            last.vocab.end = config.vocab;
        }
        Ok(Self { ffn_slice_width: slice_width, ranks })
    }
}

impl RankSlice {
    /// Multiply-adds that one row costs this rank, all layers and the logits together.
    pub fn cost(&self, config: &ModelConfig) -> f64 {
        let costs = Costs::of(config);
        self.q_heads.len() as f64 * costs.q_head
            + self.kv_heads.len() as f64 * costs.kv_head
            + self.ffn.len() as f64 * costs.ffn_column
            + self.vocab.len() as f64 * costs.vocab_row
    }
}

/// Multiply-adds per row of each thing that is dealt.
struct Costs {
    /// A query head's rows of the query matrix, columns of the output matrix, and its attention.
    q_head: f64,
    /// A KV head's rows of the key and value matrices.
    kv_head: f64,
    /// A row of the gate and up matrices, a column of the down matrix.
    ffn_column: f64,
    /// A row of the output matrix.
    vocab_row: f64,
}

impl Costs {
    fn of(config: &ModelConfig) -> Self {
        let (layers, hidden, head_dim) = (config.n_layers as f64, config.hidden as f64, config.head_dim as f64);
        Self {
            q_head: layers * 2.0 * head_dim * (hidden + TYPICAL_CONTEXT),
            kv_head: layers * 2.0 * head_dim * hidden,
            ffn_column: layers * 3.0 * hidden,
            vocab_row: hidden,
        }
    }
}

/// Width of the feed-forward slices: a function of the model alone, because it decides where exact sums round.
///
/// - The widest of 256, 128, 64 and 32 that divides the width into at least 24 slices: wide slices round seldom, many
///   slices can be dealt evenly.
/// - Of a narrower layer the widest of 128, 64 and 32 with at least 8 slices, or else 32: a quant group is never cut.
/// - Where 32 doesn't divide the width (so that the weights can't be quantized in groups of 32), the largest power of
///   two that divides it into at least 8 slices, or else 1.
fn ffn_slice_width(ffn: usize) -> usize {
    let widest =
        |widths: &[usize], least: usize| widths.iter().copied().find(|&w| ffn.is_multiple_of(w) && ffn / w >= least);
    widest(&[256, 128, 64, 32], 24)
        .or_else(|| widest(&[128, 64, 32], 8))
        .or_else(|| widest(&[32], 1))
        .or_else(|| widest(&[16, 8, 4, 2], 8))
        .unwrap_or(1)
}

/// Divides `n` things in proportion to `speeds`: whole parts first, then one each by largest remainder, then rank.
fn apportion(n: usize, speeds: &[f64]) -> Vec<usize> {
    let total: f64 = speeds.iter().sum();
    let shares: Vec<f64> = speeds.iter().map(|s| n as f64 * s / total).collect();
    let mut counts: Vec<usize> = shares.iter().map(|s| s.floor() as usize).collect();
    let mut by_remainder: Vec<usize> = (0..speeds.len()).collect();
    // A stable sort: equal remainders stay in rank order.
    by_remainder.sort_by(|&a, &b| shares[b].fract().total_cmp(&shares[a].fract()));
    let left = n.saturating_sub(counts.iter().sum());
    for &rank in by_remainder.iter().cycle().take(left) {
        counts[rank] += 1;
    }
    counts
}

/// Deals `n` things of equal cost one by one, each to the rank that would then be done first (the lower rank of two).
fn level(n: usize, cost: f64, costs: &[f64], speeds: &[f64]) -> Vec<usize> {
    let mut counts = vec![0; costs.len()];
    let done = |rank: usize, count: usize| (costs[rank] + (count + 1) as f64 * cost) / speeds[rank];
    for _ in 0..n {
        let first = (0..costs.len()).min_by(|&a, &b| done(a, counts[a]).total_cmp(&done(b, counts[b])));
        // There's a rank: `new` refuses an empty world.
        counts[first.unwrap_or_default()] += 1;
    }
    counts
}

/// Consecutive ranges of `counts` units each.
fn ranges(counts: &[usize], unit: usize) -> Vec<Range<usize>> {
    let mut start = 0;
    counts
        .iter()
        .map(|count| {
            let range = start..start + count * unit;
            start = range.end;
            range
        })
        .collect()
}

#[cfg(test)]
mod tests;
