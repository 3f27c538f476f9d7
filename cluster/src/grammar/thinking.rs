//! How long an output may think, and where it has to stop.
//!
//! Marks are looked for in the bytes of the output, as whoever reads it does: a model may spell a mark with any tokens.

use std::sync::Arc;

use super::vocabulary::Vocabulary;

/// A bound of thoughts, and how they are marked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ThoughtLimit {
    /// Most tokens behind the opening mark.
    pub tokens: u32,
    /// What thoughts begin with.
    pub opens: Vec<String>,
    /// What ends them.
    pub closes: Vec<String>,
    /// Where they begin.
    pub place: ThoughtPlace,
    /// Tokens that end a thought which may not go on.
    pub end: Vec<u32>,
    /// Tokens that end one which begins when nothing of the bound is left, if the same would only make it begin again.
    pub end_again: Vec<u32>,
}

/// Where an output thinks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ThoughtPlace {
    /// The prompt has begun the thought. The mark may come once more.
    Begun,
    /// At the beginning of the output, if a mark stands there.
    First,
    /// Behind every mark.
    Anywhere,
}

/// An output that may think for so long: which token has to come next, if one has to.
pub struct Thinking {
    limit: Arc<ThoughtLimit>,
    vocabulary: Vocabulary,
    at: At,
    /// Tokens inside thoughts so far.
    n_tokens: u32,
    /// Bytes that may be part of a mark.
    tail: Vec<u8>,
    /// Once the bound is spent: how many of these begin a closing mark, and whether the last token has added to them.
    n_of_mark: usize,
    is_closing: bool,
    /// The tokens that are being given, and how many of them have been.
    given: Option<(End, usize)>,
    was_ended: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum At {
    /// Before the opening mark, which need not come.
    Begin {
        is_inside: bool,
    },
    Inside,
    Behind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    First,
    Again,
}

impl Thinking {
    /// Before the first token.
    pub fn new(limit: Arc<ThoughtLimit>, vocabulary: Vocabulary) -> Self {
        let at = match limit.place {
            ThoughtPlace::Begun => At::Begin { is_inside: true },
            ThoughtPlace::First => At::Begin { is_inside: false },
            ThoughtPlace::Anywhere => At::Behind,
        };
        Self {
            limit,
            vocabulary,
            at,
            n_tokens: 0,
            tail: Vec::new(),
            n_of_mark: 0,
            is_closing: false,
            given: None,
            was_ended: false,
        }
    }

    /// The token that has to come next.
    pub fn required(&self) -> Option<u32> {
        let (end, n_given) = self.next_given()?;
        self.tokens_of(end).get(n_given).copied()
    }

    /// Takes the next token.
    pub fn push(&mut self, token: u32) {
        // A grammar may have wanted another one than what was required.
        let taken = self.next_given().filter(|(end, n_given)| self.tokens_of(*end).get(*n_given) == Some(&token));
        self.was_ended |= taken.is_some();
        let next = taken.map(|(end, n_given)| (end, n_given + 1));
        self.given = next.filter(|(end, n_given)| *n_given < self.tokens_of(*end).len());
        let n_before = self.n_tokens;
        if self.is_inside() {
            self.n_tokens = n_before.saturating_add(1);
        }
        let vocabulary = self.vocabulary.clone();
        let (bytes, is_control) = vocabulary.bytes(token);
        if !is_control || self.is_in_a_mark(bytes) {
            for byte in bytes {
                self.take(*byte);
            }
        }
        if !self.is_inside() {
            self.n_tokens = n_before;
        }
        let n_of_mark = if self.is_spent() { self.n_of_mark() } else { 0 };
        self.is_closing = n_of_mark > self.n_of_mark;
        self.n_of_mark = n_of_mark;
    }

    fn is_spent(&self) -> bool {
        self.is_inside() && self.n_tokens >= self.limit.tokens
    }

    /// How much of a closing mark there is.
    fn n_of_mark(&self) -> usize {
        let begun = |mark: &String| {
            let longest = self.tail.len().min(mark.len().saturating_sub(1));
            (1..=longest).rev().find(|n| self.tail.ends_with(&mark.as_bytes()[..*n])).unwrap_or(0)
        };
        self.limit.closes.iter().map(begun).max().unwrap_or(0)
    }

    fn is_inside(&self) -> bool {
        matches!(self.at, At::Inside | At::Begin { is_inside: true })
    }

    /// A character, or a mark that the model writes by itself, is not cut.
    fn has_to_end(&self) -> bool {
        self.is_spent() && !self.is_closing && partial(&self.tail) == 0
    }

    /// What is being given, or has to be from now on.
    fn next_given(&self) -> Option<(End, usize)> {
        let end = if self.was_ended && !self.limit.end_again.is_empty() { End::Again } else { End::First };
        self.given.or_else(|| self.has_to_end().then_some((end, 0)))
    }

    fn tokens_of(&self, end: End) -> &[u32] {
        match end {
            End::First => &self.limit.end,
            End::Again => &self.limit.end_again,
        }
    }

    /// Control tokens are no text unless they mark something.
    fn is_in_a_mark(&self, bytes: &[u8]) -> bool {
        let mut marks = self.limit.opens.iter().chain(&self.limit.closes);
        !bytes.is_empty() && marks.any(|mark| contains(mark.as_bytes(), bytes))
    }

    fn take(&mut self, byte: u8) {
        self.tail.push(byte);
        match self.at {
            At::Begin { is_inside } => {
                let begun = without_blanks(&self.tail);
                let is_open = self.limit.opens.iter().any(|mark| mark.as_bytes() == begun);
                if is_open {
                    // What the mark took counts for nothing.
                    self.at = At::Inside;
                    self.n_tokens = 0;
                    self.tail.clear();
                } else if partial(begun) < begun.len().max(1)
                    && !self.limit.opens.iter().any(|mark| mark.as_bytes().starts_with(begun))
                {
                    let held = std::mem::take(&mut self.tail);
                    self.at = if is_inside { At::Inside } else { At::Behind };
                    held.into_iter().for_each(|byte| self.take(byte));
                }
            }
            At::Inside if ends_with(&self.tail, &self.limit.closes) => {
                self.at = At::Behind;
                self.tail.clear();
            }
            At::Behind if self.limit.place != ThoughtPlace::Anywhere => self.tail.clear(),
            At::Behind if ends_with(&self.tail, &self.limit.opens) => {
                self.at = At::Inside;
                self.tail.clear();
            }
            At::Inside | At::Behind => self.shorten(),
        }
    }

    /// Forgets what is no part of a mark any more.
    fn shorten(&mut self) {
        let marks = self.limit.opens.iter().chain(&self.limit.closes);
        let longest = marks.map(String::len).max().unwrap_or(0).max(4);
        if self.tail.len() > 4 * longest {
            self.tail.drain(..self.tail.len() - longest);
        }
    }
}

fn contains(text: &[u8], part: &[u8]) -> bool {
    text.windows(part.len()).any(|window| window == part)
}

fn ends_with(text: &[u8], marks: &[String]) -> bool {
    marks.iter().any(|mark| text.ends_with(mark.as_bytes()))
}

/// Without blanks at the beginning. What is no whole character yet is none.
fn without_blanks(bytes: &[u8]) -> &[u8] {
    let whole = match std::str::from_utf8(bytes) {
        Ok(text) => text,
        Err(error) => std::str::from_utf8(&bytes[..error.valid_up_to()]).unwrap_or_default(),
    };
    &bytes[whole.len() - whole.trim_start().len()..]
}

/// How many bytes at the end are the beginning of a character that is not whole.
fn partial(bytes: &[u8]) -> usize {
    let longest = bytes.len().min(3);
    let n_missing = |first: u8| match first {
        0xc2..=0xdf => 2,
        0xe0..=0xef => 3,
        0xf0..=0xf4 => 4,
        _ => 0,
    };
    (1..=longest)
        .find(|n| bytes[bytes.len() - n] & 0xc0 != 0x80)
        .filter(|n| n_missing(bytes[bytes.len() - n]) > *n)
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{grammar::Limits, tokenizer::Tokenizer};

    struct Fixture {
        tokenizer: Tokenizer,
        vocabulary: Vocabulary,
    }

    impl Fixture {
        fn new() -> Self {
            let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/arch-tokenizer");
            let tokenizer = Tokenizer::from_folder(std::path::Path::new(folder)).expect("a good tokenizer");
            let compiler = super::super::Compiler::new(&tokenizer, Limits::default()).expect("it has an end");
            Self { vocabulary: compiler.vocabulary(), tokenizer }
        }

        fn ids(&self, text: &str) -> Vec<u32> {
            self.tokenizer.encode(text, false).expect("text")
        }

        fn limit(&self, tokens: u32, place: ThoughtPlace) -> ThoughtLimit {
            ThoughtLimit {
                tokens,
                opens: vec!["<think>".to_owned()],
                closes: vec!["</think>".to_owned()],
                place,
                end: self.ids("</think>"),
                end_again: Vec::new(),
            }
        }

        /// The text of an output that would be `text` if nothing had to come.
        fn bounded(&self, limit: ThoughtLimit, text: &str) -> String {
            let mut thinking = Thinking::new(Arc::new(limit), self.vocabulary.clone());
            let mut output = Vec::new();
            for token in self.ids(text) {
                while let Some(required) = thinking.required() {
                    thinking.push(required);
                    output.push(required);
                    assert!(output.len() < 10_000, "it ends");
                }
                thinking.push(token);
                output.push(token);
            }
            self.tokenizer.decode(&output, false)
        }
    }

    #[test]
    fn a_thought_ends_when_its_tokens_are_spent() {
        let fixture = Fixture::new();
        let n = |text: &str| u32::try_from(fixture.ids(text).len()).expect("short");
        let thought = "one two three four";
        for (place, open) in
            [(ThoughtPlace::Begun, ""), (ThoughtPlace::Begun, "<think>"), (ThoughtPlace::First, "<think>")]
        {
            let text = format!("{open}{thought} and more");
            let cut = format!("{open}{thought}</think> and more");
            assert_eq!(fixture.bounded(fixture.limit(n(thought), place), &text), cut, "{place:?} {open}");
            let whole = format!("{open}{thought}</think> and more");
            assert_eq!(fixture.bounded(fixture.limit(100, place), &whole), whole, "nothing has to come");
        }
        let none = fixture.bounded(fixture.limit(0, ThoughtPlace::First), "<think>one");
        assert_eq!(none, "<think></think>one");
        assert_eq!(fixture.bounded(fixture.limit(0, ThoughtPlace::Begun), "one"), "</think>one");
    }

    #[test]
    fn what_is_no_thought_has_no_bound() {
        let fixture = Fixture::new();
        for text in ["one two <think> three four", "</think> a <think>", "<thin one two three", " \n one two three"] {
            assert_eq!(fixture.bounded(fixture.limit(0, ThoughtPlace::First), text), text);
        }
        let text = " one</think> two <think> three four five six";
        assert_eq!(fixture.bounded(fixture.limit(9, ThoughtPlace::Begun), text), text, "a thought comes once");
    }

    #[test]
    fn a_mark_that_the_model_has_begun_is_not_given_again() {
        let fixture = Fixture::new();
        let n = |text: &str| u32::try_from(fixture.ids(text).len()).expect("short");
        for begun in ["<", "</", "</th"] {
            let limit = || fixture.limit(n("one") + n(begun), ThoughtPlace::Begun);
            let text = "one</think>two";
            assert_eq!(fixture.bounded(limit(), text), text, "{begun}");
            // What goes on otherwise was none.
            let bounded = fixture.bounded(limit(), &format!("one{begun}!!!!"));
            assert_eq!(bounded, format!("one{begun}!</think>!!!"));
        }
        let bounded = fixture.bounded(fixture.limit(n("one<"), ThoughtPlace::Begun), "one<<<<<");
        assert_eq!(bounded, "one<<</think><<<", "a mark has an end");
    }

    #[test]
    fn characters_stay_whole() {
        let fixture = Fixture::new();
        let text = "<think>\u{1f600}\u{1f600}\u{1f600}\u{20ac}";
        for tokens in 0..20 {
            let bounded = fixture.bounded(fixture.limit(tokens, ThoughtPlace::First), text);
            assert!(!bounded.contains('\u{fffd}'), "{tokens}: {bounded}");
            assert_eq!(bounded.replace("</think>", ""), text);
        }
        assert_eq!(partial("a\u{20ac}".as_bytes()), 0);
        for n in 1..4 {
            let bytes = "\u{1f600}".as_bytes();
            assert_eq!(partial(&[b"ab", &bytes[..n]].concat()), n);
        }
        assert_eq!(partial(&[0x80, 0x80, 0x80]), 0, "no character at all");
    }

    #[test]
    fn thoughts_that_come_again_share_the_bound() {
        let fixture = Fixture::new();
        let limit = |tokens| ThoughtLimit {
            end_again: fixture.ids("</think>[ANSWER]"),
            ..fixture.limit(tokens, ThoughtPlace::Anywhere)
        };
        let text = "<think>one</think> a <think>one</think> b";
        assert_eq!(fixture.bounded(limit(100), text), text);
        let n_one = u32::try_from(fixture.ids("one").len()).expect("short");
        let bounded = fixture.bounded(limit(n_one), "<think>oneone a <think>b");
        assert_eq!(bounded, "<think>one</think>one a <think></think>[ANSWER]b");
    }

    #[test]
    fn another_token_than_the_required_one_is_taken_too() {
        let fixture = Fixture::new();
        let mut thinking = Thinking::new(Arc::new(fixture.limit(1, ThoughtPlace::Begun)), fixture.vocabulary.clone());
        let end = fixture.ids("</think>");
        for token in fixture.ids("one two") {
            thinking.push(token);
        }
        assert_eq!(thinking.required(), Some(end[0]));
        let mut after = end.clone();
        after.insert(1, fixture.ids(" x")[0]);
        thinking.push(after[0]);
        thinking.push(after[1]);
        assert_eq!(thinking.required(), Some(end[0]), "from the beginning");
        for token in &end {
            assert_eq!(thinking.required(), Some(*token));
            thinking.push(*token);
        }
        assert_eq!(thinking.required(), None);
    }
}
