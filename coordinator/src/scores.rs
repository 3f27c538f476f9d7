//! Scores of many tokens in little memory.

use phalanx_proto::v1::{TokenScore, TopToken};

/// Scores in order, end to end: a message of its own for each takes several times as much.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct PackedScores {
    scores: Vec<Score>,
    /// The alternatives of all of them.
    tops: Vec<TopToken>,
}

#[derive(Debug, Clone, Copy, PartialEq)]
struct Score {
    token_id: u32,
    logprob: f32,
    rank: u32,
    n_top: u32,
}

/// A place between two scores.
#[derive(Debug, Clone, Copy, Default)]
pub struct ScoreCursor {
    score: usize,
    top: usize,
}

impl PackedScores {
    /// Adds scores at the end.
    pub fn extend(&mut self, scores: impl IntoIterator<Item = TokenScore>) {
        for TokenScore { token_id, logprob, rank, top } in scores {
            let n_top = u32::try_from(top.len()).expect("messages are shorter");
            self.scores.push(Score { token_id, logprob, rank, n_top });
            self.tops.extend(top);
        }
    }

    /// Takes so many scores, or all that are left, from a place on, and moves the place behind them.
    pub fn take(&self, n: usize, from: &mut ScoreCursor) -> Vec<TokenScore> {
        let packed = self.scores.iter().skip(from.score).take(n);
        let unpack = |&Score { token_id, logprob, rank, n_top }: &Score| {
            let begin = from.top;
            from.top += n_top as usize;
            TokenScore { token_id, logprob, rank, top: self.tops[begin..from.top].to_vec() }
        };
        let scores: Vec<_> = packed.map(unpack).collect();
        from.score += scores.len();
        scores
    }

    /// All scores.
    pub fn to_vec(&self) -> Vec<TokenScore> {
        self.take(self.scores.len(), &mut ScoreCursor::default())
    }

    /// Memory that they take.
    pub fn bytes(&self) -> usize {
        self.scores.capacity() * size_of::<Score>() + self.tops.capacity() * size_of::<TopToken>()
    }

    /// Gives back memory that was meant for more.
    pub fn shrink(&mut self) {
        self.scores.shrink_to_fit();
        self.tops.shrink_to_fit();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scores_come_out_as_they_went_in() {
        let score = |token_id: u32| {
            let top = (0..token_id % 3).map(|token_id| TopToken { token_id, logprob: -1.5 }).collect();
            TokenScore { token_id, logprob: -0.5, rank: 1 + token_id, top }
        };
        let all: Vec<_> = (0..10).map(score).collect();
        let mut packed = PackedScores::default();
        packed.extend(all[..4].iter().cloned());
        let mut from = ScoreCursor::default();
        assert_eq!(packed.take(3, &mut from), all[..3]);
        packed.extend(all[4..].iter().cloned());
        packed.shrink();
        assert_eq!(packed.take(0, &mut from), []);
        assert_eq!(packed.take(5, &mut from), all[3..8]);
        assert_eq!(packed.take(5, &mut from), all[8..], "no more than there are");
        assert_eq!(packed.to_vec(), all);
        assert!(packed.bytes() < all.len() * size_of::<TokenScore>());
    }
}
