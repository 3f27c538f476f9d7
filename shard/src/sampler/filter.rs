//! Temperature, min-p, top-k and top-p, and the draw from what they leave, in this order.
//!
//! The weight of a token is `e^((logit - largest) / temperature)`. What is drawn is a point on the weights of the kept
//! tokens, laid side by side from the most probable token on, ties by lower id. Sorting a vocabulary of 150,000 for that
//! would take longer than a small model's layers; but only the neighbourhood of two points matters, where top-p cuts and
//! where the draw falls. So tokens are counted into buckets by their logit, and only these two buckets are sorted.

use phalanx_kernels::RowMath;

use super::{
    Sampling,
    select::{Candidate, candidates, largest},
};

/// Up to so many tokens are sorted right away.
const FEW: usize = 1024;

const N_BUCKETS: usize = 1024;

/// Logits that are put into buckets at a time, as vector code.
const CHUNK: usize = 64;

/// Adding it rounds a small number to a whole one, which is then in the low bits.
const ROUND: f32 = 8_388_608.0;

/// Buckets reach this far below the largest (scaled) logit, or to the smallest one; the last bucket takes the rest. e^-32
/// is so small that the rest of any vocabulary is next to never drawn.
const FARTHEST: f32 = 32.0;

/// The parameters that choose among tokens.
pub(super) struct Filter {
    scale: f32,
    top_k: Option<usize>,
    top_p: f64,
    min_p: f32,
}

impl From<&Sampling> for Filter {
    fn from(sampling: &Sampling) -> Self {
        Self {
            scale: 1.0 / sampling.temperature,
            top_k: sampling.top_k,
            top_p: f64::from(sampling.top_p),
            min_p: sampling.min_p,
        }
    }
}

impl Filter {
    /// Puts the weights of logits, relative to the most probable one's, into `weights`; 0 where min-p drops a token.
    fn weights(&self, math: RowMath, best: Candidate, logits: &[f32], weights: &mut Vec<f32>) {
        math.odds(logits, best.logit, self.scale, weights);
        if self.min_p > 0.0 {
            weights.iter_mut().for_each(|weight| *weight = if *weight >= self.min_p { *weight } else { 0.0 });
        }
    }
}

/// Memory that draws and scores reuse. One for each thread that samples.
#[derive(Debug, Default)]
pub struct Scratch {
    pub(super) math: RowMath,
    /// Of each token of a row.
    pub(super) odds: Vec<f32>,
    kept: Vec<Candidate>,
    kept_logits: Vec<f32>,
    /// Bucket of each token.
    buckets: Vec<u16>,
    /// The tokens of one bucket, best first, and their weights.
    bucket: Bucket,
    /// Sum of the weights in each bucket.
    sums: Vec<f64>,
}

impl Scratch {
    /// For sampling with these functions.
    #[must_use]
    pub fn new(math: RowMath) -> Self {
        Self { math, ..Self::default() }
    }
}

/// Tokens, best first.
#[derive(Debug, Default)]
struct Bucket {
    tokens: Vec<Candidate>,
    weights: Vec<f32>,
    logits: Vec<f32>,
}

impl Bucket {
    /// Sorts its tokens and weighs them.
    fn finish(&mut self, filter: &Filter, math: RowMath, best: Candidate) {
        self.tokens.sort_unstable_by(Candidate::order);
        self.logits.clear();
        self.logits.extend(self.tokens.iter().map(|token| token.logit));
        filter.weights(math, best, &self.logits, &mut self.weights);
    }

    /// Number of tokens from the best on whose weights reach `goal`, and their weights' sum.
    fn cut(&self, goal: f64) -> (usize, f64) {
        let mut sum = 0.0;
        for (idx, weight) in self.weights.iter().enumerate() {
            sum += f64::from(*weight);
            if sum >= goal {
                return (idx + 1, sum);
            }
        }
        (self.weights.len(), sum)
    }

    /// The token at `goal` when the weights of the first `n_kept` are laid side by side; the last one that has any weight if
    /// rounding puts it past the end.
    fn point(&self, n_kept: usize, goal: f64) -> Option<Candidate> {
        let mut sum = 0.0;
        let mut last = None;
        for (token, weight) in self.tokens.iter().zip(&self.weights).take(n_kept) {
            if *weight > 0.0 {
                sum += f64::from(*weight);
                last = Some(*token);
                if goal < sum {
                    break;
                }
            }
        }
        last
    }
}

/// The token at `draw`, a point in `[0, 1)`.
pub(super) fn draw(filter: &Filter, best: Candidate, logits: &[f32], draw: f64, scratch: &mut Scratch) -> u32 {
    let mut kept = std::mem::take(&mut scratch.kept);
    match filter.top_k.filter(|k| *k < logits.len()) {
        Some(k) if k <= FEW => {
            scratch.kept = kept;
            largest(logits, k, &mut scratch.bucket.tokens);
            return draw_sorted(filter, best, draw, scratch);
        }
        Some(k) => largest(logits, k, &mut kept),
        None if is_sparse(logits) => possible(logits, &mut kept),
        None => {
            scratch.kept = kept;
            // An index is below the length of the row, and ids are 32 bits wide.
            return draw_bucketed(filter, best, logits, |idx| idx as u32, draw, scratch);
        }
    }
    let mut kept_logits = std::mem::take(&mut scratch.kept_logits);
    kept_logits.clear();
    kept_logits.extend(kept.iter().map(|token| token.logit));
    let token_id = draw_bucketed(filter, best, &kept_logits, |idx| kept[idx].token_id, draw, scratch);
    (scratch.kept, scratch.kept_logits) = (kept, kept_logits);
    token_id
}

/// Whether most tokens can't be chosen, as under a grammar: to put these into a bucket costs most, for each sum waits for the
/// last one.
fn is_sparse(logits: &[f32]) -> bool {
    let n_possible = |chunk: &[f32]| chunk.iter().map(|logit| u8::from(*logit > f32::NEG_INFINITY)).sum::<u8>();
    logits.chunks(CHUNK).map(|chunk| usize::from(n_possible(chunk))).sum::<usize>() < logits.len() / 2
}

/// The tokens that can be chosen, in order of their ids. Others have no weight, so that what is drawn is the same without them.
fn possible(logits: &[f32], tokens: &mut Vec<Candidate>) {
    tokens.clear();
    for (first, logits) in (0..).step_by(CHUNK).zip(logits.chunks(CHUNK)) {
        // Most chunks have none, which vector code sees at once.
        if logits.iter().fold(false, |any, logit| any | (*logit > f32::NEG_INFINITY)) {
            tokens.extend(candidates(logits).map(|token| Candidate { token_id: first + token.token_id, ..token }));
        }
    }
}

/// Draws from the few tokens in the scratch's bucket.
fn draw_sorted(filter: &Filter, best: Candidate, draw: f64, scratch: &mut Scratch) -> u32 {
    let bucket = &mut scratch.bucket;
    bucket.finish(filter, scratch.math, best);
    let goal = filter.top_p * bucket.weights.iter().copied().map(f64::from).sum::<f64>();
    let (n_kept, total) = bucket.cut(goal);
    bucket.point(n_kept, draw * total).unwrap_or(best).token_id
}

/// Draws from many tokens, in any order. `id_of` is the token at an index of `logits`.
fn draw_bucketed(
    filter: &Filter,
    best: Candidate,
    logits: &[f32],
    id_of: impl Fn(usize) -> u32,
    draw: f64,
    scratch: &mut Scratch,
) -> u32 {
    put_into_buckets(filter, best, logits, scratch);
    let Scratch { math, buckets, bucket, sums, .. } = scratch;
    let fill = |bucket: &mut Bucket, wanted: usize| {
        bucket.tokens.clear();
        let is_member = |(idx, place): (usize, &u16)| {
            let logit = logits[idx];
            // What can't be chosen is in some bucket, without weight.
            (usize::from(*place) == wanted && logit > f32::NEG_INFINITY)
                .then(|| Candidate { logit, token_id: id_of(idx) })
        };
        bucket.tokens.extend(buckets.iter().enumerate().filter_map(is_member));
        bucket.finish(filter, *math, best);
    };

    // Top-p: whole buckets, then the head of the one in which the goal lies.
    let mut total: f64 = sums.iter().sum();
    if filter.top_p < 1.0 {
        let goal = filter.top_p * total;
        let (cut_bucket, before) = locate(sums, |end| end >= goal);
        fill(bucket, cut_bucket);
        let (n_kept, kept_sum) = bucket.cut(goal - before);
        total = before + kept_sum;
        if draw * total >= before {
            return bucket.point(n_kept, draw * total - before).unwrap_or(best).token_id;
        }
    }
    let goal = draw * total;
    let (drawn_bucket, before) = locate(sums, |end| end > goal);
    fill(bucket, drawn_bucket);
    bucket.point(usize::MAX, goal - before).unwrap_or(best).token_id
}

/// Finds each token's bucket, and each bucket's weight.
fn put_into_buckets(filter: &Filter, best: Candidate, logits: &[f32], scratch: &mut Scratch) {
    let Scratch { math, odds: weights, buckets, sums, .. } = scratch;
    filter.weights(*math, best, logits, weights);
    let span = ((best.logit - smallest(best.logit, logits)) * filter.scale).min(FARTHEST);
    let last_bucket = (N_BUCKETS - 1) as f32;
    let per_unit = if span > 0.0 { last_bucket / span } else { 0.0 };
    let to_bucket = filter.scale * per_unit;
    buckets.clear();
    sums.clear();
    sums.resize(N_BUCKETS, 0.0);
    for (logits, weights) in logits.chunks(CHUNK).zip(weights.chunks(CHUNK)) {
        let mut places = [0; CHUNK];
        for (place, logit) in places.iter_mut().zip(logits) {
            let distance = (best.logit - logit) * to_bucket;
            // Not `min`, which has a case for NaN: that goes into the last bucket, like an infinite distance.
            let distance = if distance < last_bucket { distance } else { last_bucket };
            *place = (distance + ROUND).to_bits() as u16;
        }
        for (place, weight) in places.iter().zip(weights) {
            sums[usize::from(*place) % N_BUCKETS] += f64::from(*weight);
        }
        buckets.extend_from_slice(&places[..logits.len()]);
    }
}

/// The smallest logit above minus infinity, if it is below `bound`; else `bound`.
fn smallest(bound: f32, logits: &[f32]) -> f32 {
    let lower = |least: f32, logit: f32| if logit < least && logit > f32::NEG_INFINITY { logit } else { least };
    // Side by side, as vector code.
    let mut lanes = [bound; 16];
    for chunk in logits.chunks(lanes.len()) {
        lanes.iter_mut().zip(chunk).for_each(|(least, logit)| *least = lower(*least, *logit));
    }
    lanes.into_iter().fold(bound, lower)
}

/// The first bucket with any weight whose end satisfies `reaches`, and the sum of those before it; the last one with any
/// weight if rounding lets none.
fn locate(sums: &[f64], reaches: impl Fn(f64) -> bool) -> (usize, f64) {
    let mut before = 0.0;
    let mut last = (0, 0.0);
    for (idx, sum) in sums.iter().enumerate().filter(|(_, sum)| **sum > 0.0) {
        last = (idx, before);
        if reaches(before + sum) {
            break;
        }
        before += sum;
    }
    last
}
