//! From the text of a grammar to an automaton.

use std::sync::Arc;

use llguidance::{
    Matcher, ParserFactory,
    api::{ParserLimits, TopLevelGrammar},
};

use super::{Automaton, Grammar, GrammarError, MAX_BYTES, automaton, vocabulary, vocabulary::Vocabulary};
use crate::tokenizer::Tokenizer;

/// Stack of a thread that compiles: the library recurses as deep as a grammar is nested.
pub const STACK_BYTES: usize = 64 << 20;

/// How much work and memory a grammar may cost, in the units of the library.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Work of compiling; 50,000 take about a millisecond.
    pub compile_fuel: u64,
    /// Work of one mask in the automaton of words; 14,000 take about a millisecond.
    pub mask_fuel: u64,
    /// Work of one mask in the grammar above them; 20,000 take about a millisecond.
    pub mask_items: usize,
    /// States that an automaton of words may have, of 1 to 2 KiB.
    pub states: usize,
    /// Symbols of the grammar.
    pub symbols: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { compile_fuel: 1_000_000, mask_fuel: 200_000, mask_items: 50_000, states: 50_000, symbols: 200_000 }
    }
}

/// Compiles grammars for one vocabulary. Making one looks at every token several times.
pub struct Compiler {
    factory: ParserFactory,
    eos: Arc<[u32]>,
    fingerprint: u64,
}

impl Compiler {
    /// For a tokenizer's vocabulary.
    ///
    /// # Errors
    /// If no token of it ends a text.
    pub fn new(tokenizer: &Tokenizer, limits: Limits) -> Result<Self, GrammarError> {
        let environment = vocabulary::environment(tokenizer)?;
        let mut factory =
            ParserFactory::new_simple(&environment).map_err(|error| GrammarError::Vocabulary(error.to_string()))?;
        factory.quiet();
        *factory.limits_mut() = ParserLimits {
            initial_lexer_fuel: limits.compile_fuel,
            step_lexer_fuel: limits.mask_fuel,
            step_max_items: limits.mask_items,
            max_lexer_states: limits.states,
            max_grammar_size: limits.symbols,
            verbose_errors: false,
            ..ParserLimits::default()
        };
        Ok(Self { factory, eos: tokenizer.eos_ids().into(), fingerprint: vocabulary::fingerprint(tokenizer) })
    }

    /// Which vocabulary it is for: see [`vocabulary::fingerprint`].
    pub fn fingerprint(&self) -> u64 {
        self.fingerprint
    }

    /// What its tokens say.
    pub fn vocabulary(&self) -> Vocabulary {
        Vocabulary::new(self.factory.tok_env())
    }

    /// Tokens that end a text.
    pub fn eos(&self) -> &[u32] {
        &self.eos
    }

    /// An automaton before the first token. To be called on a thread of [`STACK_BYTES`].
    ///
    /// # Errors
    /// If the grammar is wrong, not supported, or beyond the limits.
    pub fn compile(&self, grammar: &Grammar) -> Result<Automaton, GrammarError> {
        let got = grammar.text().len();
        if got > MAX_BYTES {
            return Err(GrammarError::TooLong { got });
        }
        let top = match grammar {
            Grammar::JsonSchema(text) => {
                let schema = serde_json::from_str(text).map_err(|error| refused(&error.to_string()))?;
                TopLevelGrammar::from_json_schema(schema)
            }
            Grammar::Regex(text) => TopLevelGrammar::from_regex(text),
            Grammar::Lark(text) => TopLevelGrammar::from_lark(text.clone()),
        };
        let matcher = Matcher::new(self.factory.create_parser(top));
        match matcher.get_error() {
            Some(error) => Err(refused(&error)),
            None => Ok(Automaton::new(matcher, Arc::clone(&self.eos))),
        }
    }
}

fn refused(reason: &str) -> GrammarError {
    GrammarError::Refused(format!("can't be used: {}", automaton::readable(reason)))
}
