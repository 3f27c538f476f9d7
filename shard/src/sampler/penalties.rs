//! What changes logits before a token is chosen: repetition, presence and frequency penalties, biases, and tokens that may
//! not be chosen.

use std::collections::BTreeMap;

use super::Sampling;

/// How often a sequence holds each token.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TokenCounts {
    /// Tokens of prompt or output, with their number in the output.
    in_output: BTreeMap<u32, u32>,
    output: Vec<u32>,
}

impl TokenCounts {
    /// Counts the known tokens of a sequence.
    #[must_use]
    pub fn new(prompt: &[u32], output: &[u32]) -> Self {
        let mut counts = Self { in_output: prompt.iter().map(|token_id| (*token_id, 0)).collect(), output: Vec::new() };
        output.iter().for_each(|token_id| counts.push(*token_id));
        counts
    }

    /// Counts one more token of the output.
    pub fn push(&mut self, token_id: u32) {
        let count = self.in_output.entry(token_id).or_insert(0);
        *count = count.saturating_add(1);
        self.output.push(token_id);
    }

    /// Number of tokens in the output.
    #[must_use]
    pub fn output_len(&self) -> u64 {
        self.output.len() as u64
    }
}

/// Applies everything that `sampling` asks for to `logits`, the rows of the vocabulary from `vocab_start` on.
///
/// Applied to all slices of a vocabulary it does what it does to the whole. In this order:
///
/// 1. repetition penalty: tokens of prompt or output get `logit / r` if it is positive, else `logit * r` (Keskar et al.,
///    "CTRL", 2019, as extended by Hugging Face to negative logits);
/// 2. frequency and presence penalties: tokens of the output get `logit - n * frequency - presence`, where they occur
///    `n` times (the `OpenAI` API's definition);
/// 3. biases are added;
/// 4. minus infinity get: until the output has `min_tokens` tokens, those held back so long; all but the allowed ones, if
///    these are named; and what would complete a bad word.
pub fn apply(sampling: &Sampling, counts: &TokenCounts, vocab_start: u32, logits: &mut [f32]) {
    let vocab_end = vocab_start.saturating_add(u32::try_from(logits.len()).unwrap_or(u32::MAX));
    let vocab = vocab_start..vocab_end;
    let Sampling { repetition_penalty, presence_penalty, frequency_penalty, .. } = *sampling;
    if repetition_penalty != 1.0 || presence_penalty != 0.0 || frequency_penalty != 0.0 {
        for (token_id, n) in counts.in_output.range(vocab.clone()) {
            let logit = &mut logits[(token_id - vocab_start) as usize];
            *logit = if *logit > 0.0 { *logit / repetition_penalty } else { *logit * repetition_penalty };
            if *n > 0 {
                *logit -= *n as f32 * frequency_penalty;
                *logit -= presence_penalty;
            }
        }
    }
    for (token_id, bias) in sampling.logit_bias.iter().filter(|(token_id, _)| vocab.contains(token_id)) {
        logits[(token_id - vocab_start) as usize] += bias;
    }
    for token_id in sampling.held_back(counts.output_len()).iter().filter(|token_id| vocab.contains(token_id)) {
        logits[(token_id - vocab_start) as usize] = f32::NEG_INFINITY;
    }
    if !sampling.allowed_token_ids.is_empty() {
        keep_only(&sampling.allowed_token_ids, vocab_start, logits);
    }
    for run in &sampling.bad_words {
        let Some((last, before)) = run.split_last() else { continue };
        if vocab.contains(last) && counts.output.ends_with(before) {
            logits[(last - vocab_start) as usize] = f32::NEG_INFINITY;
        }
    }
}

/// Gives minus infinity to all tokens but these, which are in ascending order.
fn keep_only(allowed: &[u32], vocab_start: u32, logits: &mut [f32]) {
    let from = allowed.partition_point(|token_id| *token_id < vocab_start);
    let mut next = allowed[from..].iter().peekable();
    for (token_id, logit) in (vocab_start..).zip(logits) {
        let mut is_allowed = false;
        while next.next_if_eq(&&token_id).is_some() {
            is_allowed = true;
        }
        if !is_allowed {
            *logit = f32::NEG_INFINITY;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sampling() -> Sampling {
        Sampling {
            repetition_penalty: 2.0,
            presence_penalty: 0.5,
            frequency_penalty: 0.25,
            logit_bias: vec![(2, 1.5), (5, -100.0), (99, 3.0)],
            min_tokens: 4,
            suppressed_token_ids: vec![7, 1000],
            ..Sampling::greedy()
        }
    }

    #[test]
    fn penalties_are_those_computed_by_hand() {
        // Token 0 unseen, 1 in the prompt, 2 once in the output, 3 twice in it and in the prompt.
        let counts = TokenCounts::new(&[1, 3, 4, 4], &[2, 3, 3]);
        let mut logits = [4.0, 4.0, 4.0, -4.0, -4.0, 1.0, 0.0, 9.0];
        apply(&sampling(), &counts, 0, &mut logits);
        assert_eq!(
            logits,
            [
                4.0,
                4.0 / 2.0,
                4.0 / 2.0 - 0.25 - 0.5 + 1.5,
                -4.0 * 2.0 - 2.0 * 0.25 - 0.5,
                -4.0 * 2.0,
                1.0 - 100.0,
                0.0,
                f32::NEG_INFINITY,
            ]
        );
    }

    #[test]
    fn tokens_are_held_back_for_min_tokens_only() {
        let mut counts = TokenCounts::new(&[1], &[2, 2, 2]);
        let mut logits = [0.0; 8];
        apply(&sampling(), &counts, 0, &mut logits);
        assert_eq!(logits[7], f32::NEG_INFINITY);
        counts.push(2);
        let mut logits = [0.0; 8];
        apply(&sampling(), &counts, 0, &mut logits);
        assert_eq!(logits[7], 0.0);
    }

    #[test]
    fn only_allowed_tokens_stay() {
        let sampling = Sampling { allowed_token_ids: vec![0, 2, 2, 5, 90], ..Sampling::greedy() };
        assert!(!sampling.keeps_logits());
        let mut logits = [1.0; 7];
        apply(&sampling, &TokenCounts::default(), 0, &mut logits);
        let none = f32::NEG_INFINITY;
        assert_eq!(logits, [1.0, none, 1.0, none, none, 1.0, none]);
        let mut slice = [1.0; 3];
        apply(&sampling, &TokenCounts::default(), 4, &mut slice);
        assert_eq!(slice, [none, 1.0, none]);
    }

    #[test]
    fn a_bad_word_is_never_completed() {
        let bad_words = vec![vec![3], vec![1, 2], vec![2, 2, 0]];
        let sampling = Sampling { bad_words, ..Sampling::greedy() };
        assert!(!sampling.keeps_logits());
        let forbidden = |prompt: &[u32], output: &[u32]| {
            let mut logits = [0.0; 5];
            apply(&sampling, &TokenCounts::new(prompt, output), 0, &mut logits);
            (0..5).filter(|id| logits[*id] == f32::NEG_INFINITY).collect::<Vec<_>>()
        };
        assert_eq!(forbidden(&[], &[]), [3], "a word of one token");
        assert_eq!(forbidden(&[1], &[]), [3], "the prompt's tokens begin no word of the output");
        assert_eq!(forbidden(&[], &[4, 1]), [2, 3]);
        assert_eq!(forbidden(&[], &[1, 4]), [3], "the word was left");
        assert_eq!(forbidden(&[], &[2, 2]), [0, 3]);
        assert_eq!(forbidden(&[], &[2]), [3], "an output shorter than the word");
    }

    #[test]
    fn nothing_asked_for_changes_nothing() {
        let mut logits = [1.0, f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -0.0];
        let before = logits.map(f32::to_bits);
        apply(&Sampling::greedy(), &TokenCounts::new(&[0, 1], &[2, 3, 4]), 0, &mut logits);
        assert_eq!(logits.map(f32::to_bits), before);
    }

    proptest! {
        #[test]
        fn counting_one_by_one_is_counting_at_once(
            prompt in proptest::collection::vec(0_u32..20, 0..30),
            output in proptest::collection::vec(0_u32..20, 0..30),
        ) {
            let mut counts = TokenCounts::new(&prompt, &[]);
            output.iter().for_each(|token_id| counts.push(*token_id));
            prop_assert_eq!(counts.output_len(), output.len() as u64);
            prop_assert_eq!(counts, TokenCounts::new(&prompt, &output));
        }

        #[test]
        fn slices_get_what_the_whole_gets(
            logits in proptest::collection::vec(-9.0_f32..9.0, 1..40),
            prompt in proptest::collection::vec(0_u32..60, 0..30),
            output in proptest::collection::vec(0_u32..60, 0..30),
            cut in 0_usize..40,
        ) {
            let counts = TokenCounts::new(&prompt, &output);
            let cut = cut.min(logits.len());
            let (mut whole, mut cut_up) = (logits.clone(), logits);
            apply(&sampling(), &counts, 0, &mut whole);
            let (low, high) = cut_up.split_at_mut(cut);
            apply(&sampling(), &counts, cut as u32, high);
            apply(&sampling(), &counts, 0, low);
            prop_assert_eq!(whole, cut_up);
        }
    }
}
