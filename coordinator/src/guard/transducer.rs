//! Takes a text in pieces and gives it on without what is to be found in it, however it is cut. What may be the beginning
//! of a match is held back until that is certain; patterns have longest matches, so what is held back has a bound.

use std::sync::Arc;

use super::{
    Action,
    rules::{Absorb, End, Looking, Rules, Sort, Verdict},
};

/// Longest block that goes with its beginning, in bytes.
const LONGEST_BLOCK: usize = 64 << 10;

/// What can be given on.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Piece {
    /// Text, with marks where matches were.
    pub text: String,
    /// Kinds of the matches, one after the other.
    pub found: Vec<&'static str>,
    /// Kind of the match at which the text ends for good.
    pub blocked: Option<&'static str>,
}

/// What becomes of the characters after a match.
#[derive(Debug, Clone, Copy)]
enum Absorbing {
    Word,
    /// Dashes in a row so far, runs of five of them, bytes.
    Block {
        dashes: usize,
        runs: usize,
        bytes: usize,
    },
}

impl Absorbing {
    fn after(absorb: Absorb) -> Self {
        match absorb {
            Absorb::Word => Self::Word,
            Absorb::Block => Self::Block { dashes: 0, runs: 0, bytes: 0 },
        }
    }

    /// Whether a character goes too, and how it is with the next one.
    fn take(self, c: char) -> Option<Self> {
        match self {
            Self::Word => (c.is_ascii_alphanumeric() || "-_.+/=".contains(c)).then_some(self),
            // Two runs of dashes are around the words that end it; what is not like such a block is none.
            Self::Block { runs, bytes, .. } if runs == 2 || bytes >= LONGEST_BLOCK => None,
            Self::Block { dashes, runs, bytes } => {
                let dashes = if c == '-' { dashes + 1 } else { 0 };
                let runs = runs + usize::from(dashes == 5);
                let fits = c.is_ascii_alphanumeric() || "+/=-:,.\\\r\n\t ".contains(c);
                fits.then_some(Self::Block { dashes, runs, bytes: bytes + 1 })
            }
        }
    }
}

/// The state between two pieces of one text.
#[derive(Clone)]
pub struct Transducer {
    rules: Arc<Rules>,
    held: String,
    /// Character before what is held.
    before: Option<char>,
    absorbing: Option<Absorbing>,
    is_blocked: bool,
}

impl Transducer {
    /// At the beginning of a text.
    pub fn new(rules: Arc<Rules>) -> Self {
        Self { rules, held: String::new(), before: None, absorbing: None, is_blocked: false }
    }

    /// A text in one piece.
    pub fn whole(rules: &Arc<Rules>, text: &str) -> Piece {
        let mut transducer = Self::new(Arc::clone(rules));
        transducer.held.push_str(text);
        transducer.finish()
    }

    /// Adds text.
    pub fn push(&mut self, text: &str) -> Piece {
        self.held.push_str(text);
        self.advance(End::Open)
    }

    /// No more text comes.
    pub fn finish(&mut self) -> Piece {
        self.advance(End::Closed)
    }

    /// What is held back, in bytes.
    pub fn n_held(&self) -> usize {
        self.held.len()
    }

    fn advance(&mut self, end: End) -> Piece {
        let mut piece = Piece::default();
        if self.is_blocked {
            self.held.clear();
            return piece;
        }
        let rules = Arc::clone(&self.rules);
        let n_done = rules.looking(|looking| self.walk(looking, end, &mut piece));
        if self.is_blocked {
            self.held.clear();
        } else {
            self.held.drain(..n_done);
        }
        piece
    }

    /// Goes on as far as things are certain; how far.
    fn walk(&mut self, looking: &mut Looking<'_>, end: End, piece: &mut Piece) -> usize {
        let mut at = 0;
        while let Some(c) = self.held[at..].chars().next() {
            if let Some(absorbing) = self.absorbing {
                self.absorbing = absorbing.take(c);
                if self.absorbing.is_some() {
                    (at, self.before) = (at + c.len_utf8(), Some(c));
                    continue;
                }
            }
            match looking.at(self.before, &self.held[at..], end) {
                Verdict::Open => break,
                Verdict::Nothing => {
                    piece.text.push(c);
                    (at, self.before) = (at + c.len_utf8(), Some(c));
                }
                Verdict::Match { len, sort: Sort { kind, mark, action }, absorb } => {
                    piece.found.push(kind);
                    if action == Action::Block {
                        piece.blocked = Some(kind);
                        self.is_blocked = true;
                        break;
                    }
                    piece.text.push_str(mark);
                    self.before = self.held[at..at + len].chars().next_back();
                    self.absorbing = absorb.map(Absorbing::after);
                    at += len;
                }
            }
        }
        at
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::guard::{denylist, pii};

    fn rules(phrases: &str, action: Action) -> Arc<Rules> {
        let personal = pii::KINDS.iter().map(|kind| (kind.name, kind.mark, Action::Redact, (kind.patterns)()));
        let denied = ("denylist", "[REDACTED]", action, denylist::parse(phrases.as_bytes()).unwrap());
        Arc::new(Rules::new([denied].into_iter().chain(personal)).unwrap())
    }

    /// All that was given on, after every piece, and what was found.
    fn in_pieces<'a>(rules: &Arc<Rules>, pieces: impl Iterator<Item = &'a str>) -> (Vec<String>, Piece) {
        let mut transducer = Transducer::new(Arc::clone(rules));
        let mut all = Piece::default();
        let mut told = Vec::new();
        let mut take = |piece: Piece| {
            all.text.push_str(&piece.text);
            all.found.extend(piece.found);
            all.blocked = all.blocked.or(piece.blocked);
            told.push(all.text.clone());
        };
        pieces.for_each(|piece| take(transducer.push(piece)));
        take(transducer.finish());
        assert_eq!(transducer.n_held(), 0);
        (told, all)
    }

    #[test]
    fn beginnings_are_held_back() {
        let rules = rules("black bird\n", Action::Redact);
        let mut transducer = Transducer::new(rules);
        let mut push = |text: &str| transducer.push(text).text;
        assert_eq!(push("Hello "), "Hello ");
        assert_eq!(push("a black"), "a ");
        assert_eq!(push(" bi"), "");
        assert_eq!(push("ke, ann@ex"), "black bike, ");
        assert_eq!(push("ample.org "), "");
        assert_eq!(push("and black bird."), "[MAIL] and ");
        assert_eq!(transducer.finish().text, "[REDACTED].");
    }

    #[test]
    fn nothing_comes_after_what_is_blocked() {
        let rules = rules("bird\n", Action::Block);
        let (told, all) = in_pieces(&rules, ["a bi", "rd in", " the hand"].into_iter());
        assert_eq!(told, ["a ", "a ", "a ", "a "]);
        assert_eq!((all.found, all.blocked), (vec!["denylist"], Some("denylist")));
    }

    /// Straight from the definition, for phrases of small letters: the longest one at each word's beginning.
    fn naive(phrases: &[String], text: &str) -> String {
        let mut out = String::new();
        let mut at = 0;
        while at < text.len() {
            let is_letter = |c: char| c.is_ascii_lowercase();
            let is_begin = !text[..at].ends_with(is_letter) || !text[at..].starts_with(is_letter);
            let fits = |p: &&String| {
                let rest = text[at..].strip_prefix(p.as_str());
                is_begin && rest.is_some_and(|rest| !rest.starts_with(is_letter) || !p.ends_with(is_letter))
            };
            match phrases.iter().filter(fits).map(|p| p.len()).max() {
                Some(len) => {
                    out.push_str("[REDACTED]");
                    at += len;
                }
                None => {
                    let c = text[at..].chars().next().unwrap();
                    out.push(c);
                    at += c.len_utf8();
                }
            }
        }
        out
    }

    /// Texts in which matches, beginnings of matches and other things follow each other.
    fn text() -> impl Strategy<Value = String> {
        let part = prop_oneof![
            Just("ann@example.org".to_owned()),
            Just("+49 30 1234567".to_owned()),
            Just("4111 1111 1111 1111".to_owned()),
            Just("DE89 3704 0044 0532 0130 00".to_owned()),
            Just("192.168.0.17".to_owned()),
            Just("fe80::12ab:1".to_owned()),
            Just("ghp_0123456789abcdefghijAB".to_owned()),
            Just("-----BEGIN PRIVATE KEY-----\nAB+/\n-----END PRIVATE KEY-----".to_owned()),
            Just("black  bird".to_owned()),
            Just("Straße".to_owned()),
            "[a-c0-9@.:+ -]{0,6}",
            "[ ,.é漢-]{1,2}",
        ];
        let cut = (part, 0..40_usize).prop_map(|(part, n)| part.chars().take(n).collect::<String>());
        prop::collection::vec(cut, 0..8).prop_map(|parts| parts.concat())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]
        #[test]
        fn every_split_gives_what_the_whole_text_gives(
            text in text(), cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..6), blocks: bool,
        ) {
            let rules = rules("black bird\nstraße\n/a{2,4}b/\n", if blocks { Action::Block } else { Action::Redact });
            let want = Transducer::whole(&rules, &text);
            // At every place once, at every character, and in some pieces.
            let borders: Vec<usize> = text.char_indices().map(|(at, _)| at).chain([text.len()]).collect();
            let mut splits: Vec<Vec<usize>> = borders.iter().map(|border| vec![*border]).collect();
            splits.push(borders.clone());
            splits.push(cuts.iter().map(|cut| borders[cut.index(borders.len())]).collect());
            for mut split in splits {
                split.sort_unstable();
                split.push(text.len());
                let mut from = 0;
                let pieces = split.into_iter().map(|to| &text[std::mem::replace(&mut from, to)..to]);
                let (told, all) = in_pieces(&rules, pieces);
                prop_assert_eq!(&all, &want);
                for told in told {
                    prop_assert!(want.text.starts_with(&told), "{told:?} of {:?}", want.text);
                }
            }
        }

        #[test]
        fn phrases_are_found_as_they_are_defined(
            phrases in prop::collection::vec("[ab]{1,3}|[ab-]{1,3}", 1..4), text in "[ab -]{0,12}",
        ) {
            let patterns = denylist::parse(phrases.join("\n").as_bytes()).unwrap();
            let rules = Rules::new([("denylist", "[REDACTED]", Action::Redact, patterns)].into_iter()).unwrap();
            prop_assert_eq!(Transducer::whole(&Arc::new(rules), &text).text, naive(&phrases, &text));
        }

        #[test]
        fn what_is_held_back_has_a_bound(text in "[a-z0-9@.]{0,400}", times in 1..40_usize) {
            let mut transducer = Transducer::new(rules("bird\n", Action::Redact));
            for _ in 0..times {
                transducer.push(&text);
                prop_assert!(transducer.n_held() <= 2048);
            }
        }
    }
}
