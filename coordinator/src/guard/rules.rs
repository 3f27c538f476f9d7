//! Patterns as one automaton, which says of each place in a text whether a match begins there.
//!
//! Every pattern has a longest match, so what is said of a place depends on a bounded piece of text behind it: that is what
//! lets a text be looked at in pieces, however it is cut.

use std::sync::Arc;

use regex_automata::{
    Anchored, MatchKind,
    hybrid::dfa::{Cache, DFA},
    nfa::thompson,
    util::{pool::Pool, start, syntax},
};

use super::Action;

/// Memory of the patterns' automaton before it is run.
const MOST_MEMORY: usize = 64 << 20;
/// Characters behind a match that a check may look at.
const LOOKAHEAD: usize = 2;

/// A possible match, and what stands around it.
#[derive(Debug)]
pub struct Candidate<'a> {
    /// Character before it.
    pub before: Option<char>,
    /// Itself.
    pub text: &'a str,
    /// What follows: two characters at least, unless the text ends there.
    pub after: &'a str,
}

/// What goes with a match.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Absorb {
    /// Characters of which keys are made.
    Word,
    /// Lines of a block, up to the line that ends it.
    Block,
}

/// What is looked for.
#[derive(Debug, Clone)]
pub struct Pattern {
    regex: String,
    check: fn(&Candidate<'_>) -> bool,
    absorb: Option<Absorb>,
}

impl Pattern {
    /// Matches of a regex that pass a check.
    pub fn checked(regex: impl Into<String>, check: fn(&Candidate<'_>) -> bool) -> Self {
        Self { regex: regex.into(), check, absorb: None }
    }

    /// Beginnings of something longer.
    pub fn absorbing(regex: impl Into<String>, absorb: Absorb) -> Self {
        Self { regex: regex.into(), check: |_| true, absorb: Some(absorb) }
    }
}

/// Matches of one sort, and what becomes of them.
#[derive(Debug, Clone, Copy)]
pub struct Sort {
    /// As metrics and the audit log name it.
    pub kind: &'static str,
    /// What stands in a match's place.
    pub mark: &'static str,
    /// What is done.
    pub action: Action,
}

struct Entry {
    sort: Sort,
    check: fn(&Candidate<'_>) -> bool,
    absorb: Option<Absorb>,
}

/// What is to be found in texts.
pub struct Rules {
    entries: Vec<Entry>,
    automaton: Arc<DFA>,
    caches: Pool<Cache, Box<dyn Fn() -> Cache + Send + Sync>>,
}

/// What is said of a place in a text.
#[derive(Debug, Clone, Copy)]
pub enum Verdict {
    /// It depends on what follows.
    Open,
    /// No match begins there.
    Nothing,
    /// One does.
    Match {
        /// Its bytes.
        len: usize,
        /// What it is.
        sort: Sort,
        /// What goes with it.
        absorb: Option<Absorb>,
    },
}

/// Whether more of a text may come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// It may.
    Open,
    /// This is all.
    Closed,
}

impl Rules {
    /// Of several sorts; of equally long matches at one place that of the first sort counts.
    ///
    /// # Errors
    /// If patterns are no regexes, or together too large.
    pub fn new(
        sorts: impl Iterator<Item = (&'static str, &'static str, Action, Vec<Pattern>)>,
    ) -> Result<Self, String> {
        let (mut entries, mut regexes) = (Vec::new(), Vec::new());
        for (kind, mark, action, patterns) in sorts {
            for Pattern { regex, check, absorb } in patterns {
                entries.push(Entry { sort: Sort { kind, mark, action }, check, absorb });
                regexes.push(regex);
            }
        }
        let automaton = DFA::builder()
            .configure(DFA::config().match_kind(MatchKind::All).skip_cache_capacity_check(true))
            .syntax(syntax::Config::new())
            .thompson(thompson::Config::new().nfa_size_limit(Some(MOST_MEMORY)))
            .build_many(&regexes)
            .map_err(|error| error.to_string())?;
        let automaton = Arc::new(automaton);
        let shared = Arc::clone(&automaton);
        Ok(Self { entries, automaton, caches: Pool::new(Box::new(move || shared.create_cache())) })
    }

    /// Whether there is nothing to be found.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Looks at places of a text, one after the other.
    pub fn looking<T>(&self, look: impl FnOnce(&mut Looking<'_>) -> T) -> T {
        let mut cache = self.caches.get();
        look(&mut Looking { rules: self, cache: &mut cache })
    }
}

/// The rules with a memory for their automaton.
pub struct Looking<'a> {
    rules: &'a Rules,
    cache: &'a mut Cache,
}

/// Whether a character belongs to words that others border on. Scripts that are written without spaces have no borders.
pub fn is_of_words(c: char) -> bool {
    c.is_alphanumeric()
        && matches!(c, '\0'..='\u{dff}' | '\u{10a0}'..='\u{10ff}' | '\u{1e00}'..='\u{1fff}' | '\u{2c00}'..='\u{2dff}')
}

impl Looking<'_> {
    /// What begins at the beginning of `text`, behind `before`. The longest match counts. None begins within a word.
    pub fn at(&mut self, before: Option<char>, text: &str, end: End) -> Verdict {
        let begins_in_word = before.is_some_and(is_of_words) && text.starts_with(is_of_words);
        if self.rules.entries.is_empty() || begins_in_word {
            return Verdict::Nothing;
        }
        let automaton = &self.rules.automaton;
        let never = "a lazy automaton that may clear its cache as often as it likes does not give up";
        let config = start::Config::new().anchored(Anchored::Yes);
        let mut state = automaton.start_state(self.cache, &config).expect(never);
        let mut best = None;
        let mut is_short = false;
        for (at, byte) in text.bytes().enumerate() {
            state = automaton.next_state(self.cache, state, byte).expect(never);
            if state.is_match() {
                // Told one byte late.
                is_short |= self.weigh(state, before, text, at, end, &mut best);
            } else if state.is_dead() {
                break;
            }
        }
        if !state.is_dead() {
            if end == End::Open {
                return Verdict::Open;
            }
            state = automaton.next_eoi_state(self.cache, state).expect(never);
            if state.is_match() {
                self.weigh(state, before, text, text.len(), end, &mut best);
            }
        }
        match best {
            _ if is_short => Verdict::Open,
            None => Verdict::Nothing,
            Some((len, index)) => {
                let entry = &self.rules.entries[index];
                Verdict::Match { len, sort: entry.sort, absorb: entry.absorb }
            }
        }
    }

    /// Takes the first match that ends at `at` and passes its check; whether a check needs more text.
    fn weigh(
        &self,
        state: regex_automata::hybrid::LazyStateID,
        before: Option<char>,
        text: &str,
        at: usize,
        end: End,
        best: &mut Option<(usize, usize)>,
    ) -> bool {
        let (found, after) = text.split_at(at);
        if end == End::Open && after.chars().take(LOOKAHEAD).count() < LOOKAHEAD {
            return true;
        }
        let automaton = &self.rules.automaton;
        let matched = (0..automaton.match_len(self.cache, state))
            .map(|place| automaton.match_pattern(self.cache, state, place).as_usize());
        let candidate = Candidate { before, text: found, after };
        let first = matched.filter(|index| (self.rules.entries[*index].check)(&candidate)).min();
        if let Some(index) = first {
            *best = Some((at, index));
        }
        false
    }
}
