//! The largest logits of a row.

use std::cmp::Ordering;

/// A token and its logit.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Candidate {
    pub logit: f32,
    pub token_id: u32,
}

impl Candidate {
    /// Best first: by logit, then by lower id. Logits are not NaN.
    pub fn order(&self, other: &Self) -> Ordering {
        other.logit.partial_cmp(&self.logit).unwrap_or(Ordering::Equal).then(self.token_id.cmp(&other.token_id))
    }
}

/// The tokens that can be chosen: NaN and minus infinity can't.
pub(super) fn candidates(logits: &[f32]) -> impl Iterator<Item = Candidate> + Clone + '_ {
    (0_u32..)
        .zip(logits)
        .filter(|(_, logit)| **logit > f32::NEG_INFINITY)
        .map(|(token_id, logit)| Candidate { logit: *logit, token_id })
}

/// Puts the `k` best tokens into `kept`, best first; all, if there are fewer.
///
/// Most of a row is below the k-th best seen so far and costs one comparison; the rest is collected and thinned out now
/// and then: O(n + k log(n / k)) and a final sort of k.
pub(super) fn largest(logits: &[f32], k: usize, kept: &mut Vec<Candidate>) {
    kept.clear();
    if k == 0 {
        return;
    }
    let room = k.saturating_mul(2).max(64);
    // Ids rise: a later token with the logit of the k-th best is not among the k best.
    let mut bar = f32::NEG_INFINITY;
    for candidate in candidates(logits) {
        if candidate.logit > bar {
            kept.push(candidate);
            if kept.len() == room {
                kept.select_nth_unstable_by(k - 1, Candidate::order);
                kept.truncate(k);
                bar = kept[k - 1].logit;
            }
        }
    }
    kept.sort_unstable_by(Candidate::order);
    kept.truncate(k);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn largest_is_the_head_of_the_sorted_row(
            // Few values: many ties.
            logits in proptest::collection::vec(prop_oneof![
                (-4_i32..4).prop_map(|half| half as f32 / 2.0),
                Just(f32::NAN), Just(f32::NEG_INFINITY), Just(f32::INFINITY), Just(-0.0),
            ], 0..500),
            k in 0_usize..100,
        ) {
            let mut want: Vec<_> = candidates(&logits).collect();
            want.sort_by(Candidate::order);
            let mut got = Vec::new();
            largest(&logits, want.len(), &mut got);
            prop_assert_eq!(&got, &want);
            want.truncate(k);
            largest(&logits, k, &mut got);
            prop_assert_eq!(got, want);
        }
    }
}
