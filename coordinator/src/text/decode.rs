//! A choice's text: detokenizer, then stop strings.

use phalanx_cluster::{id::TokenId, tokenizer::StreamDecoder};

use super::stop::{Matched, StopMatcher};
use crate::request::StopConditions;

/// Turns a growing sequence of tokens into text, in pieces of whole characters.
pub trait Detokenize: Send {
    /// Adds a token; text, if any is complete.
    fn push(&mut self, id: TokenId) -> Option<String>;

    /// Text that waits for more tokens, when none come.
    fn finish(&mut self) -> Option<String>;
}

impl Detokenize for StreamDecoder {
    fn push(&mut self, id: TokenId) -> Option<String> {
        StreamDecoder::push(self, id)
    }

    fn finish(&mut self) -> Option<String> {
        StreamDecoder::finish(self)
    }
}

/// Makes detokenizers, one per choice.
pub trait Detokenizers: Send {
    /// For a text in which special tokens are left out, all but those that are `shown`, or not.
    fn detokenizer(&self, skip_special_tokens: bool, shown: &[TokenId]) -> Box<dyn Detokenize>;
}

impl Detokenizers for phalanx_cluster::tokenizer::Tokenizer {
    fn detokenizer(&self, skip_special_tokens: bool, shown: &[TokenId]) -> Box<dyn Detokenize> {
        Box::new(StreamDecoder::new(self.clone(), skip_special_tokens).showing(shown))
    }
}

/// Whether stop strings are looked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StopSearch {
    /// They end the text.
    On,
    /// `min_tokens` is not reached: text passes unseen, and no match begins in it.
    Off,
}

/// Text of one choice. It lives as long as the choice: preemption and replay don't touch it, so nothing is said twice.
pub struct OutputText {
    detokenizer: Box<dyn Detokenize>,
    stop: StopMatcher,
}

impl OutputText {
    /// Nothing said yet.
    pub fn new(conditions: &StopConditions, detokenizers: &dyn Detokenizers) -> Self {
        Self {
            detokenizer: detokenizers.detokenizer(conditions.skip_special_tokens, &conditions.shown_tokens),
            stop: StopMatcher::new(&conditions.strings, conditions.include_in_output),
        }
    }

    /// Adds a token: text that may be shown, and the stop string that ended it.
    pub fn push(&mut self, id: TokenId, search: StopSearch) -> (String, Option<Matched>) {
        match (self.detokenizer.push(id), search) {
            (None, _) => (String::new(), None),
            (Some(text), StopSearch::Off) => (text, None),
            (Some(text), StopSearch::On) => self.stop.push(&text),
        }
    }

    /// The rest, when no more tokens come. Even it may end in a stop string.
    pub fn finish(&mut self) -> (String, Option<Matched>) {
        let (mut text, matched) = match self.detokenizer.finish() {
            Some(rest) => self.stop.push(&rest),
            None => (String::new(), None),
        };
        if matched.is_none() {
            text.push_str(&self.stop.flush());
        }
        (text, matched)
    }
}

impl std::fmt::Debug for OutputText {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("OutputText").field("stop", &self.stop).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Token n is the n-th letter; a letter comes out when the next one is there.
    #[derive(Default)]
    struct Letters(Option<char>);

    impl Detokenize for Letters {
        fn push(&mut self, id: TokenId) -> Option<String> {
            self.0.replace(char::from(b'a' + id as u8)).map(String::from)
        }

        fn finish(&mut self) -> Option<String> {
            self.0.take().map(String::from)
        }
    }

    struct Alphabet;

    impl Detokenizers for Alphabet {
        fn detokenizer(&self, _: bool, _: &[TokenId]) -> Box<dyn Detokenize> {
            Box::new(Letters::default())
        }
    }

    fn text(stops: &[&str]) -> OutputText {
        let strings = stops.iter().map(|s| (*s).to_owned()).collect();
        OutputText::new(&StopConditions { strings, ..Default::default() }, &Alphabet)
    }

    #[test]
    fn stop_strings_are_found_even_in_the_rest() {
        let mut text = text(&["bc"]);
        assert_eq!(text.push(0, StopSearch::On), (String::new(), None));
        assert_eq!(text.push(1, StopSearch::On), ("a".to_owned(), None));
        assert_eq!(text.push(2, StopSearch::On), (String::new(), None));
        assert_eq!(text.finish(), (String::new(), Some(Matched { stop_idx: 0 })));
    }

    #[test]
    fn no_match_begins_before_min_tokens() {
        let mut text = text(&["a"]);
        assert_eq!(text.push(0, StopSearch::Off), (String::new(), None));
        assert_eq!(text.push(0, StopSearch::Off), ("a".to_owned(), None));
        assert_eq!(text.push(1, StopSearch::On), (String::new(), Some(Matched { stop_idx: 0 })));
    }
}
