//! Temperature, min-p, top-k and top-p, and the draw from what they leave, in this order.
//!
//! The weight of a token is `e^((logit - largest) / temperature)`. What is drawn is a point on the weights of the kept
//! tokens, laid side by side from the most probable token on, ties by lower id. Sorting a vocabulary of 150,000 for that
//! would take longer than a small model's layers; but only the neighbourhood of two points matters, where top-p cuts and
//! where the draw falls. So tokens are counted into buckets by their logit, and only these two buckets are sorted.

use super::{
    Sampling,
    exp::exp,
    score::distance,
    select::{Candidate, largest},
};

/// Up to so many tokens are sorted right away.
const FEW: usize = 1024;

const N_BUCKETS: usize = 1024;

/// Bucket of tokens that can't be chosen.
const NO_BUCKET: u16 = u16::MAX;

/// Weights that are computed at a time, as vector code.
const CHUNK: usize = 64;

/// Buckets reach this far below the largest (scaled) logit, or to the smallest one; the last bucket takes the rest. e^-32
/// is so small that the rest of any vocabulary is next to never drawn.
const FARTHEST: f64 = 32.0;

/// The parameters that choose among tokens.
pub(super) struct Filter {
    scale: f64,
    top_k: Option<usize>,
    top_p: f64,
    min_p: f64,
}

impl From<&Sampling> for Filter {
    fn from(sampling: &Sampling) -> Self {
        Self {
            scale: 1.0 / f64::from(sampling.temperature),
            top_k: sampling.top_k,
            top_p: f64::from(sampling.top_p),
            min_p: f64::from(sampling.min_p),
        }
    }
}

impl Filter {
    /// Weight of a token relative to the most probable one's; 0 if min-p drops it.
    #[inline]
    fn weight(&self, best: Candidate, logit: f32) -> f64 {
        let weight = exp(distance(best.logit, logit) * self.scale);
        if weight >= self.min_p { weight } else { 0.0 }
    }
}

/// Memory that draws reuse. One for each thread that samples.
#[derive(Debug, Default)]
pub struct Scratch {
    kept: Vec<Candidate>,
    kept_logits: Vec<f32>,
    /// Bucket of each token.
    buckets: Vec<u16>,
    /// The tokens of one bucket.
    bucket: Vec<Candidate>,
    /// Sum of the weights in each bucket.
    sums: Vec<f64>,
}

/// The token at `draw`, a point in `[0, 1)`.
pub(super) fn draw(filter: &Filter, best: Candidate, logits: &[f32], draw: f64, scratch: &mut Scratch) -> u32 {
    let Some(k) = filter.top_k.filter(|k| *k < logits.len()) else {
        // An index is below the length of the row, and ids are 32 bits wide.
        return draw_bucketed(filter, best, logits, |idx| idx as u32, draw, scratch);
    };
    let mut kept = std::mem::take(&mut scratch.kept);
    largest(logits, k, &mut kept);
    let token_id = if k <= FEW {
        draw_sorted(filter, best, &kept, draw)
    } else {
        let mut kept_logits = std::mem::take(&mut scratch.kept_logits);
        kept_logits.clear();
        kept_logits.extend(kept.iter().map(|token| token.logit));
        let token_id = draw_bucketed(filter, best, &kept_logits, |idx| kept[idx].token_id, draw, scratch);
        scratch.kept_logits = kept_logits;
        token_id
    };
    scratch.kept = kept;
    token_id
}

/// Draws from few tokens, best first.
fn draw_sorted(filter: &Filter, best: Candidate, kept: &[Candidate], draw: f64) -> u32 {
    let weight = |candidate: &Candidate| filter.weight(best, candidate.logit);
    let goal = filter.top_p * kept.iter().map(weight).sum::<f64>();
    let (n_kept, total) = cut(kept, weight, goal);
    point(&kept[..n_kept], weight, draw * total).unwrap_or(best).token_id
}

/// Number of tokens from the best on whose weights reach `goal`, and their weights' sum.
fn cut(sorted: &[Candidate], weight: impl Fn(&Candidate) -> f64, goal: f64) -> (usize, f64) {
    let mut sum = 0.0;
    for (idx, candidate) in sorted.iter().enumerate() {
        sum += weight(candidate);
        if sum >= goal {
            return (idx + 1, sum);
        }
    }
    (sorted.len(), sum)
}

/// The token at `goal` when the weights are laid side by side; the last one that has any weight if rounding puts it past
/// the end.
fn point(sorted: &[Candidate], weight: impl Fn(&Candidate) -> f64, goal: f64) -> Option<Candidate> {
    let mut sum = 0.0;
    let mut last = None;
    for candidate in sorted {
        let weight = weight(candidate);
        if weight > 0.0 {
            sum += weight;
            last = Some(*candidate);
            if goal < sum {
                break;
            }
        }
    }
    last
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
    let Scratch { buckets, bucket, sums, .. } = scratch;
    put_into_buckets(filter, best, logits, buckets, sums);
    let weight = |token: &Candidate| filter.weight(best, token.logit);
    let fill = |bucket: &mut Vec<Candidate>, wanted: usize| {
        bucket.clear();
        let members = buckets.iter().enumerate().filter(|(_, bucket)| usize::from(**bucket) == wanted);
        bucket.extend(members.map(|(idx, _)| Candidate { logit: logits[idx], token_id: id_of(idx) }));
        bucket.sort_unstable_by(Candidate::order);
    };

    // Top-p: whole buckets, then the head of the one in which the goal lies.
    let mut total: f64 = sums.iter().sum();
    if filter.top_p < 1.0 {
        let goal = filter.top_p * total;
        let (cut_bucket, before) = locate(sums, |end| end >= goal);
        fill(bucket, cut_bucket);
        let (n_kept, kept_sum) = cut(bucket, weight, goal - before);
        total = before + kept_sum;
        if draw * total >= before {
            return point(&bucket[..n_kept], weight, draw * total - before).unwrap_or(best).token_id;
        }
    }
    let goal = draw * total;
    let (drawn_bucket, before) = locate(sums, |end| end > goal);
    fill(bucket, drawn_bucket);
    point(bucket, weight, goal - before).unwrap_or(best).token_id
}

/// Finds each token's bucket, and each bucket's weight.
fn put_into_buckets(filter: &Filter, best: Candidate, logits: &[f32], buckets: &mut Vec<u16>, sums: &mut Vec<f64>) {
    let lower = |least: f32, logit: &f32| if *logit < least && *logit > f32::NEG_INFINITY { *logit } else { least };
    let smallest = logits.iter().fold(best.logit, lower);
    let span = (-distance(best.logit, smallest) * filter.scale).min(FARTHEST);
    let per_unit = if span > 0.0 { (N_BUCKETS - 1) as f64 / span } else { 0.0 };
    let to_bucket = -filter.scale * per_unit;
    buckets.clear();
    sums.clear();
    sums.resize(N_BUCKETS, 0.0);
    for chunk in logits.chunks(CHUNK) {
        let mut weights = [0.0; CHUNK];
        let mut places = [0_i32; CHUNK];
        for ((weight, place), logit) in weights.iter_mut().zip(&mut places).zip(chunk) {
            *weight = filter.weight(best, *logit);
            // Saturates, also for an infinite distance.
            *place = ((distance(best.logit, *logit) * to_bucket) as i32).min(N_BUCKETS as i32 - 1);
        }
        for ((weight, place), logit) in weights.iter().zip(&places).zip(chunk) {
            let can_be_chosen = *logit > f32::NEG_INFINITY;
            buckets.push(if can_be_chosen { *place as u16 } else { NO_BUCKET });
            if can_be_chosen {
                sums[*place as usize] += weight;
            }
        }
    }
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
