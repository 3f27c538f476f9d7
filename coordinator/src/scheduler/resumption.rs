//! Requests that an earlier coordinator had begun to answer.

use super::{event::Action, machine::Machine};
use crate::sequence::{RequestKey, SequenceKey};

impl Machine {
    /// Tells what an earlier life of a request told, in order, as if it had just been sampled: clients and journal see one
    /// life. Choices that were complete are complete again; the others go on behind their tokens like after a loss.
    pub(super) fn tell_earlier_life(&mut self, key: RequestKey, out: &mut Vec<Action>) {
        // Scores of the prompt come before any output and must be computed first. The same tokens follow them.
        let Some(live) = self.requests.get(&key).filter(|live| !live.waits_for_scores()) else { return };
        let request = live.request.clone();
        for (choice, earlier) in (0..request.n).zip(&request.resume) {
            let key = SequenceKey { request: key, choice };
            if self.sequences.get(&key).is_none_or(|s| s.is_score_only()) {
                continue;
            }
            let mut scores = earlier.scores.iter().cloned();
            let ended = earlier.tokens.iter().any(|token| self.tell_token(key, *token, scores.next(), out));
            if !ended
                && !earlier.tokens.is_empty()
                && let Some(sequence) = self.sequences.get_mut(&key)
            {
                sequence.replay_until = sequence.n_known() - 1;
            }
        }
    }
}
