//! Finds stop strings in text that comes in pieces.
//!
//! Every stop string has an automaton (Knuth, Morris and Pratt, 1977) whose state is the length of its longest beginning
//! that the text ends with. Text is held back as long as the largest state says, no more; each byte is looked at once per
//! stop string, amortized, however the text is cut.

/// A stop string was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Matched {
    /// Which stop string, by its index.
    pub stop_idx: usize,
}

#[derive(Debug, Clone)]
struct Automaton {
    pattern: Box<[u8]>,
    /// `borders[i]`: length of the longest proper prefix of `pattern[..=i]` that is its suffix too.
    borders: Box<[usize]>,
    n_matched: usize,
}

impl Automaton {
    fn new(pattern: &str) -> Self {
        let pattern: Box<[u8]> = pattern.as_bytes().into();
        let mut borders = vec![0; pattern.len()];
        let mut border = 0;
        for end in 1..pattern.len() {
            while border > 0 && pattern[end] != pattern[border] {
                border = borders[border - 1];
            }
            border += usize::from(pattern[end] == pattern[border]);
            borders[end] = border;
        }
        Self { pattern, borders: borders.into(), n_matched: 0 }
    }

    /// Whether the pattern ends with this byte.
    fn push(&mut self, byte: u8) -> bool {
        while self.n_matched > 0 && self.pattern[self.n_matched] != byte {
            self.n_matched = self.borders[self.n_matched - 1];
        }
        self.n_matched += usize::from(self.pattern[self.n_matched] == byte);
        self.n_matched == self.pattern.len()
    }
}

/// Passes text on until a stop string is complete. The match that ends first counts; of several that end together, the
/// longest. After a match no more text may be pushed.
#[derive(Debug, Clone)]
pub struct StopMatcher {
    /// With each one's index among all strings given.
    automata: Vec<(usize, Automaton)>,
    held: String,
    keep_match: bool,
}

impl StopMatcher {
    /// Empty stop strings are ignored: they would stop before the first character. `keep_match` leaves the match in the
    /// text.
    pub fn new(stops: &[String], keep_match: bool) -> Self {
        let automata = stops.iter().enumerate().filter(|(_, stop)| !stop.is_empty());
        Self {
            automata: automata.map(|(idx, stop)| (idx, Automaton::new(stop))).collect(),
            held: String::new(),
            keep_match,
        }
    }

    /// Takes text; gives text that is certain to be output, and whether a stop string ended it.
    pub fn push(&mut self, text: &str) -> (String, Option<Matched>) {
        if self.automata.is_empty() {
            return (text.to_owned(), None);
        }
        let n_held = self.held.len();
        self.held.push_str(text);
        for (offset, byte) in text.bytes().enumerate() {
            let mut longest: Option<(usize, usize)> = None;
            for (stop_idx, automaton) in &mut self.automata {
                let len = automaton.pattern.len();
                if automaton.push(byte) && longest.is_none_or(|(most, _)| len > most) {
                    longest = Some((len, *stop_idx));
                }
            }
            if let Some((len, stop_idx)) = longest {
                let end = n_held + offset + 1;
                let mut output = std::mem::take(&mut self.held);
                output.truncate(if self.keep_match { end } else { end - len });
                return (output, Some(Matched { stop_idx }));
            }
        }
        let n_hold = self.automata.iter().map(|(_, a)| a.n_matched).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - n_hold);
        (std::mem::replace(&mut self.held, rest), None)
    }

    /// What is held back, when no more text comes.
    pub fn flush(&mut self) -> String {
        self.automata.iter_mut().for_each(|(_, a)| a.n_matched = 0);
        std::mem::take(&mut self.held)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn strings(stops: &[&str]) -> Vec<String> {
        stops.iter().map(|s| (*s).to_owned()).collect()
    }

    /// Output and matched string, straight from the definition.
    fn naive(stops: &[String], text: &str, keep: bool) -> (String, Option<usize>) {
        for end in 1..=text.len() {
            let Some(before) = text.get(..end) else { continue };
            let ending = stops.iter().enumerate().filter(|(_, s)| !s.is_empty() && before.ends_with(s.as_str()));
            let longest = ending.max_by(|(i, a), (j, b)| a.len().cmp(&b.len()).then(j.cmp(i)));
            if let Some((idx, stop)) = longest {
                let cut = if keep { end } else { end - stop.len() };
                return (text[..cut].to_owned(), Some(idx));
            }
        }
        (text.to_owned(), None)
    }

    fn in_pieces<'a>(
        stops: &[String],
        pieces: impl Iterator<Item = &'a str>,
        keep: bool,
    ) -> (Vec<String>, Option<usize>) {
        let mut matcher = StopMatcher::new(stops, keep);
        let mut output = Vec::new();
        for piece in pieces {
            let (text, matched) = matcher.push(piece);
            output.push(text);
            if let Some(matched) = matched {
                return (output, Some(matched.stop_idx));
            }
        }
        output.push(matcher.flush());
        (output, None)
    }

    #[test]
    fn only_what_may_become_a_stop_string_is_held_back() {
        let mut matcher = StopMatcher::new(&strings(&["\n\nUser:"]), false);
        assert_eq!(matcher.push("Hello\n"), ("Hello".to_owned(), None));
        assert_eq!(matcher.push("\n"), (String::new(), None));
        assert_eq!(matcher.push("\nUs"), ("\n".to_owned(), None));
        assert_eq!(matcher.push("a"), ("\n\nUsa".to_owned(), None));
        assert_eq!(matcher.push("\n\nUser"), (String::new(), None));
        assert_eq!(matcher.push(": hi"), (String::new(), Some(Matched { stop_idx: 0 })));
    }

    #[test]
    fn the_match_that_ends_first_wins_then_the_longest() {
        let stops = strings(&["cd", "b", "abcd"]);
        assert_eq!(in_pieces(&stops, ["xabcd"].into_iter(), false), (vec!["xa".to_owned()], Some(1)));
        let stops = strings(&["cd", "abcd"]);
        assert_eq!(in_pieces(&stops, ["xabcd"].into_iter(), false), (vec!["x".to_owned()], Some(1)));
        assert_eq!(in_pieces(&stops, ["xabcdy"].into_iter(), true), (vec!["xabcd".to_owned()], Some(1)));
    }

    #[test]
    fn held_text_comes_out_at_the_end() {
        let (output, matched) = in_pieces(&strings(&["stop"]), ["a st", "o"].into_iter(), false);
        assert_eq!((output.concat().as_str(), matched), ("a sto", None));
        assert_eq!(StopMatcher::new(&strings(&[""]), false).push("x"), ("x".to_owned(), None));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(400))]
        #[test]
        fn every_split_gives_what_the_whole_text_gives(
            stops in prop::collection::vec("[abé]{0,4}", 0..4),
            text in "[abé]{0,9}",
            keep: bool,
        ) {
            let (want, want_idx) = naive(&stops, &text, keep);
            let borders: Vec<usize> = text.char_indices().map(|(i, _)| i).skip(1).collect();
            for split in 0..1_u32 << borders.len() {
                let mut pieces = Vec::new();
                let mut begin = 0;
                for (bit, border) in borders.iter().enumerate() {
                    if split >> bit & 1 == 1 {
                        pieces.push(&text[begin..*border]);
                        begin = *border;
                    }
                }
                pieces.push(&text[begin..]);
                let (output, idx) = in_pieces(&stops, pieces.into_iter(), keep);
                prop_assert_eq!(output.concat(), want.clone());
                prop_assert_eq!(idx, want_idx);
            }
        }

        #[test]
        fn no_more_is_held_than_can_become_a_stop_string(
            stops in prop::collection::vec("[ab]{1,4}", 1..4),
            text in "[ab]{0,12}",
        ) {
            let mut matcher = StopMatcher::new(&stops, false);
            let mut seen = String::new();
            for piece in text.split_inclusive(|_| true) {
                seen.push_str(piece);
                let (_, matched) = matcher.push(piece);
                if matched.is_some() {
                    return Ok(());
                }
                let is_beginning = |n: &usize| stops.iter().any(|s| s.len() > *n && seen.ends_with(&s[..*n]));
                let longest = (0..=seen.len()).rev().find(is_beginning).unwrap_or(0);
                prop_assert_eq!(matcher.held.len(), longest);
            }
        }
    }
}
