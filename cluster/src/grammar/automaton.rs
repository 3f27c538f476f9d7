//! A grammar's state after some tokens.

use std::sync::Arc;

use llguidance::Matcher;

use super::GrammarError;

/// Where an output is in its grammar.
pub struct Automaton {
    matcher: Matcher,
    eos: Arc<[u32]>,
}

impl Automaton {
    pub(super) fn new(matcher: Matcher, eos: Arc<[u32]>) -> Self {
        Self { matcher, eos }
    }

    /// Another one in the same state. They share nothing: what one has found out never helps, or harms, the other.
    #[must_use]
    pub fn copy(&self) -> Self {
        Self { matcher: self.matcher.deep_clone(), eos: Arc::clone(&self.eos) }
    }

    /// Takes the next token of the output.
    ///
    /// # Errors
    /// If it may not come here. The automaton is of no use then.
    pub fn advance(&mut self, token: u32) -> Result<(), GrammarError> {
        if self.matcher.is_stopped() && self.eos.contains(&token) {
            return Ok(());
        }
        self.matcher.consume_token(token).map_err(|error| stuck(&error.to_string()))
    }

    /// What may come next: end-of-sequence tokens only where the output is complete, and nothing else where it can't go on.
    ///
    /// # Errors
    /// If that can't be found out within the limits. The automaton is of no use then.
    pub fn mask(&mut self) -> Result<Mask, GrammarError> {
        let allowed = self.matcher.compute_mask_or_eos().map_err(|error| stuck(&error.to_string()))?;
        Ok(Mask { bits: allowed.as_slice().to_vec() })
    }
}

fn stuck(reason: &str) -> GrammarError {
    GrammarError::Stuck(readable(reason).to_owned())
}

/// The library's reason without the mark of what it leaves out.
pub(super) fn readable(reason: &str) -> &str {
    reason.trim_end().trim_end_matches("<non-verbose/>").trim_end()
}

/// A set of tokens.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Mask {
    bits: Vec<u32>,
}

impl Mask {
    /// Of one token.
    pub fn only(token: u32) -> Self {
        let mut bits = vec![0; token as usize / 32 + 1];
        bits[token as usize / 32] = 1 << (token % 32);
        Self { bits }
    }

    /// Whether it has a token.
    pub fn allows(&self, token: u32) -> bool {
        self.bits.get(token as usize / 32).is_some_and(|word| word >> (token % 32) & 1 == 1)
    }

    /// Whether it has a token that is none of these.
    pub fn has_other_than(&self, tokens: &[u32]) -> bool {
        let mut rest = self.clone();
        rest.remove(tokens);
        rest.bits.iter().any(|word| *word != 0)
    }

    /// Whether it has all tokens of another one.
    pub fn has_all_of(&self, other: &Self) -> bool {
        let word = |index: usize| self.bits.get(index).copied().unwrap_or(0);
        other.bits.iter().enumerate().all(|(index, wanted)| wanted & !word(index) == 0)
    }

    /// Takes tokens out.
    pub fn remove(&mut self, tokens: &[u32]) {
        for token in tokens {
            if let Some(word) = self.bits.get_mut(*token as usize / 32) {
                *word &= !(1 << (token % 32));
            }
        }
    }

    /// Makes the logits of all other tokens minus infinity, those beyond the vocabulary among them.
    pub fn apply(&self, logits: &mut [f32]) {
        let mut words = self.bits.iter();
        for logits in logits.chunks_mut(32) {
            match words.next().copied().unwrap_or(0) {
                0 => logits.fill(f32::NEG_INFINITY),
                u32::MAX => {}
                word => {
                    for (bit, logit) in logits.iter_mut().enumerate() {
                        if word >> bit & 1 == 0 {
                            *logit = f32::NEG_INFINITY;
                        }
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_leave_what_they_allow() {
        let mask = Mask { bits: vec![0b101, 0, u32::MAX] };
        let mut logits = vec![1.0; 100];
        mask.apply(&mut logits);
        let left: Vec<_> = (0..100_u32).filter(|idx| logits[*idx as usize] == 1.0).collect();
        assert_eq!(left, [0, 2].into_iter().chain(64..96).collect::<Vec<_>>());
        assert!(left.iter().all(|token| mask.allows(*token)) && !mask.allows(1) && !mask.allows(96));
    }

    #[test]
    fn a_mask_may_have_nothing_but_some_tokens() {
        let mask = Mask { bits: vec![0b101] };
        assert!(mask.has_other_than(&[0, 1]) && !mask.has_other_than(&[2, 0, 500]));
        assert!(!Mask::default().has_other_than(&[]));
        for token in [0, 31, 32, 100] {
            let only = Mask::only(token);
            assert!(only.allows(token) && !only.allows(token + 1) && !only.has_other_than(&[token]));
            assert!(only.has_all_of(&only) && !only.has_all_of(&mask));
        }
    }
}
