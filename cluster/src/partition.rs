//! The partition plan: which heads, feed-forward columns and vocabulary rows each rank holds.
//!
//! Any world size works, divisible or not. Ranks meet after each layer's attention, after its feed-forward part, and for the
//! logits, and the slowest decides how long each of these *phases* takes: so each is dealt evenly by itself, and a rank that
//! has more of one is not given less of another, for which all would wait. Query heads are dealt in whole KV-head groups
//! or one by one, whichever is quicker; in the latter case a KV head may be held by several ranks.

use std::ops::Range;

use crate::model_config::ModelConfig;

/// Rows of the vocabulary are dealt in units of this many.
const VOCAB_UNIT: usize = 16;

/// Positions that a row attends to in the cost model: a short conversation. Costs of attention grow with the context,
/// those of the weights don't; no split is right for all contexts.
const TYPICAL_CONTEXT: f64 = 256.0;

/// How much of the time must be left for KV heads to be held twice.
const WORTH_WHILE: f64 = 0.95;

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
    /// Heads, feed-forward slices and vocabulary rows, each by themselves. The same arguments give the same plan on every
    /// machine.
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

        let slice_width = ffn_slice_width(config.ffn);
        let ffn = ranges(&apportion(config.ffn / slice_width, &speeds), slice_width);
        let vocab = ranges(&apportion(config.vocab / VOCAB_UNIT, &speeds), VOCAB_UNIT);
        let heads = deal_heads(config, &speeds);
        let slice = |((heads, ffn), vocab): ((Heads, Range<usize>), Range<usize>)| RankSlice {
            q_heads: heads.query,
            kv_heads: heads.kv,
            ffn,
            vocab,
        };
        let mut ranks: Vec<RankSlice> = heads.into_iter().zip(ffn).zip(vocab).map(slice).collect();
        // Less than a unit is left.
        if let Some(last) = ranks.last_mut() {
            last.vocab.end = config.vocab;
        }
        Ok(Self { ffn_slice_width: slice_width, ranks })
    }
}

/// Heads of one rank.
#[derive(Debug, Clone)]
struct Heads {
    query: Range<usize>,
    /// Those that the query heads read.
    kv: Range<usize>,
}

/// Deals the query heads: one by one where there are more ranks than KV heads, and where that makes the slowest rank quicker
/// without giving any rank more KV heads to keep pages of; else in groups that share a KV head.
fn deal_heads(config: &ModelConfig, speeds: &[f64]) -> Vec<Heads> {
    let group = config.n_heads / config.n_kv_heads;
    let deal = |unit: usize| -> Vec<Heads> {
        let heads = |query: Range<usize>| {
            let first = query.start / group;
            let kv = if query.is_empty() { first..first } else { first..query.end.div_ceil(group) };
            Heads { query, kv }
        };
        ranges(&apportion(config.n_heads / unit, speeds), unit).into_iter().map(heads).collect()
    };
    let (groups, singles) = (deal(group), deal(1));
    if speeds.len() > config.n_kv_heads {
        return singles;
    }
    let most_kv = |heads: &[Heads]| heads.iter().map(|h| h.kv.len()).max();
    let takes = |heads: &[Heads]| {
        let of_rank = |(heads, speed): (&Heads, &f64)| attention_cost(config, heads) / speed;
        heads.iter().zip(speeds).map(of_rank).fold(0.0, f64::max)
    };
    let is_better = most_kv(&singles) <= most_kv(&groups) && takes(&singles) < WORTH_WHILE * takes(&groups);
    if is_better { singles } else { groups }
}

/// Multiply-adds that one row costs in the attention of one layer: the heads' rows of the query, key and value matrices,
/// columns of the output matrix, and the attention itself.
fn attention_cost(config: &ModelConfig, heads: &Heads) -> f64 {
    let (hidden, head_dim) = (config.hidden as f64, config.head_dim as f64);
    let query = 2.0 * head_dim * (hidden + TYPICAL_CONTEXT);
    let kv = 2.0 * head_dim * hidden;
    heads.query.len() as f64 * query + heads.kv.len() as f64 * kv
}

/// Width of the feed-forward slices: a function of the model alone, because it decides where exact sums round.
///
/// - 256 if it divides the width into at least 24 slices, or else the widest of 128, 64 and 32 with at least 8: wide slices
///   round seldom, many slices can be dealt evenly.
/// - Of a very narrow layer 32: a quant group is never cut.
/// - Where 32 doesn't divide the width (so that the weights can't be quantized in groups of 32), the largest power of
///   two that divides it into at least 8 slices, or else 1.
fn ffn_slice_width(ffn: usize) -> usize {
    let widest =
        |widths: &[usize], least: usize| widths.iter().copied().find(|&w| ffn.is_multiple_of(w) && ffn / w >= least);
    widest(&[256], 24)
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
