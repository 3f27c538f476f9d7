//! How probable the model found a token, before penalties, temperature and filters.

use phalanx_proto::v1::{TokenScore, TopToken};

use super::{SamplingError, Scratch, select};

/// Odds are added in so many sums, one after the other, so that the additions need not wait for each other.
const LANES: usize = 8;

/// Score of a token under the model.
#[derive(Debug, Clone, PartialEq)]
pub struct Score {
    /// The scored token.
    pub token_id: u32,
    /// Natural logarithm of its probability; minus infinity if its logit is that or NaN.
    pub logprob: f32,
    /// 1 is the most probable; ties by lower id.
    pub rank: u32,
    /// The most probable tokens with their log-probabilities, best first; ties by lower id.
    pub top: Vec<(u32, f32)>,
}

/// Scores a token with the `n_top` most probable ones (fewer, if the row has fewer that can be chosen).
///
/// `logits`: a row over the whole vocabulary, raw.
///
/// # Errors
/// [`SamplingError::UnknownToken`] if the row does not reach to the token.
pub fn score(logits: &[f32], token_id: u32, n_top: usize, scratch: &mut Scratch) -> Result<Score, SamplingError> {
    let index = token_id as usize;
    let logit = *logits.get(index).ok_or(SamplingError::UnknownToken { token_id, vocab_size: logits.len() })?;
    let normalizer = Normalizer::new(logits, scratch);
    let n_above = if logit.is_nan() {
        count(logits, |other| other > f32::NEG_INFINITY)
    } else {
        count(logits, |other| other > logit)
    };
    let n_equal_before = count(&logits[..index], |other| other == logit);
    let mut best = Vec::new();
    select::largest(logits, n_top.min(logits.len()), &mut best);
    Ok(Score {
        token_id,
        logprob: normalizer.logprob(logit),
        rank: (n_above + n_equal_before).saturating_add(1),
        top: best.iter().map(|best| (best.token_id, normalizer.logprob(best.logit))).collect(),
    })
}

/// Number of logits with a property. (Counting in 32 bits becomes vector code.)
fn count(logits: &[f32], has: impl Fn(f32) -> bool) -> u32 {
    logits.iter().map(|logit| u32::from(has(*logit))).sum()
}

/// Largest logit of a row and the logarithm of the sum of the odds beside it.
struct Normalizer {
    max: f32,
    log_sum: f64,
}

impl Normalizer {
    fn new(logits: &[f32], scratch: &mut Scratch) -> Self {
        let Scratch { math, odds, .. } = scratch;
        let max = math.largest(logits).map_or(f32::NEG_INFINITY, |(largest, _)| largest);
        math.odds(logits, max, 1.0, odds);
        let mut sums = [0.0; LANES];
        let mut chunks = odds.chunks_exact(LANES);
        for chunk in &mut chunks {
            sums.iter_mut().zip(chunk).for_each(|(sum, odds)| *sum += f64::from(*odds));
        }
        sums.iter_mut().zip(chunks.remainder()).for_each(|(sum, odds)| *sum += f64::from(*odds));
        Self { max, log_sum: libm::log(sums.iter().sum()) }
    }

    fn logprob(&self, logit: f32) -> f32 {
        if logit > f32::NEG_INFINITY { (distance(self.max, logit) - self.log_sum) as f32 } else { f32::NEG_INFINITY }
    }
}

/// How far a logit is below the largest one; 0 for it, also if it is infinite.
fn distance(max: f32, logit: f32) -> f64 {
    if logit == max { 0.0 } else { f64::from(logit) - f64::from(max) }
}

impl From<Score> for TokenScore {
    fn from(score: Score) -> Self {
        Self {
            token_id: score.token_id,
            logprob: score.logprob,
            rank: score.rank,
            top: score.top.into_iter().map(|(token_id, logprob)| TopToken { token_id, logprob }).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn score(logits: &[f32], token_id: u32, n_top: usize) -> Result<Score, SamplingError> {
        super::score(logits, token_id, n_top, &mut Scratch::default())
    }

    #[test]
    fn scores_are_those_computed_by_hand() {
        // Probabilities 1/8, 1/2, 1/8, 1/4.
        let logits = [1.0, 4.0, 1.0, 2.0].map(|odds: f32| odds.ln());
        let close = |a: f32, b: f32| (a - b).abs() < 1e-6;
        let scored = score(&logits, 2, 9).expect("it exists");
        assert!(close(scored.logprob, 0.125_f32.ln()));
        assert_eq!(scored.rank, 4);
        assert_eq!(scored.top.iter().map(|(token_id, _)| *token_id).collect::<Vec<_>>(), [1, 3, 0, 2]);
        assert!(close(scored.top[0].1, 0.5_f32.ln()));
        assert_eq!(score(&logits, 0, 0).expect("it exists"), Score { token_id: 0, rank: 3, top: vec![], ..scored });
        let wire = TokenScore::from(score(&logits, 1, 1).expect("it exists"));
        assert_eq!((wire.token_id, wire.rank, wire.top.len(), wire.top[0].token_id), (1, 1, 1, 1));
        assert!(matches!(score(&logits, 4, 0), Err(SamplingError::UnknownToken { token_id: 4, vocab_size: 4 })));
    }

    #[test]
    fn odd_rows_have_scores() {
        let (inf, nan) = (f32::INFINITY, f32::NAN);
        let two = score(&[0.0, inf, nan, inf], 3, 4).expect("it exists");
        assert!((two.logprob - 0.5_f32.ln()).abs() < 1e-6 && two.rank == 2, "{two:?}");
        assert_eq!(two.top[2], (0, -inf));
        let not_a_number = score(&[0.0, inf, nan, -inf], 2, 0).expect("it exists");
        assert_eq!((not_a_number.logprob, not_a_number.rank), (-inf, 3));
        let nothing = score(&[nan, -inf], 1, 2).expect("it exists");
        assert_eq!((nothing.logprob, nothing.top.len()), (-inf, 0));
    }

    proptest! {
        #[test]
        fn probabilities_add_up_to_one(logits in proptest::collection::vec(-30.0_f32..30.0, 1..300), pick in 0_usize..300) {
            let token_id = (pick % logits.len()) as u32;
            let scored = score(&logits, token_id, logits.len()).expect("it exists");
            let sum: f64 = scored.top.iter().map(|(_, logprob)| f64::from(*logprob).exp()).sum();
            prop_assert!((sum - 1.0).abs() < 1e-5, "sum {}", sum);
            prop_assert_eq!(scored.top[scored.rank as usize - 1], (token_id, scored.logprob));
        }
    }
}
