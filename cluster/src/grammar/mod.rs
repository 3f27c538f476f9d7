//! Grammars that an output has to follow: which tokens may come next.
//!
//! A [`Grammar`] is text: a JSON schema, a regular expression, or a grammar in Lark's notation. A [`Compiler`], one for each
//! model's vocabulary, makes an [`Automaton`] of it, which takes the output's tokens one by one and says as a [`Mask`] what
//! may follow. What it says depends on the grammar and on these tokens, and on nothing else: a sequence that is computed
//! again after a loss goes on with the same masks. [`Thinking`] does the same for outputs that may think for so long only.
//!
//! The work is done by the `llguidance` crate. Everything it does is bounded by [`Limits`] but the expansion of a schema;
//! who takes grammars from strangers compiles them in a process that can be killed first.

mod automaton;
mod compiler;
mod gbnf;
mod sources;
mod thinking;
mod vocabulary;

pub use automaton::{Automaton, Mask};
pub use compiler::{Compiler, Limits, STACK_BYTES};
pub use gbnf::quoted;
pub use sources::WhiteSpace;
pub use thinking::{Thinking, ThoughtLimit, ThoughtPlace};
pub use vocabulary::{Vocabulary, fingerprint};

/// Longest text of a grammar, in bytes.
pub const MAX_BYTES: usize = 64 << 10;

/// What an output has to follow.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Grammar {
    /// A JSON text that is valid under this schema.
    JsonSchema(String),
    /// A text that this regular expression (of the `regex` crate's syntax) matches as a whole.
    Regex(String),
    /// A text of this grammar, in llguidance's dialect of Lark.
    Lark(String),
}

impl Grammar {
    /// Its text.
    pub fn text(&self) -> &str {
        let (Self::JsonSchema(text) | Self::Regex(text) | Self::Lark(text)) = self;
        text
    }
}

/// Why a grammar can't be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GrammarError {
    /// It is longer than [`MAX_BYTES`].
    #[error("has {got} bytes, at most {MAX_BYTES} are possible")]
    TooLong {
        /// Its length.
        got: usize,
    },
    /// It can't be compiled: wrong, not supported, or beyond the limits.
    #[error("{0}")]
    Refused(String),
    /// What may follow can't be found out within the limits, or a token came that may not.
    #[error("the grammar can't be followed any further: {0}")]
    Stuck(String),
    /// The model has no token that ends a text.
    #[error("the model has no end-of-sequence token, which ends what follows a grammar")]
    NoEnd,
    /// The vocabulary can't be used.
    #[error("the model's vocabulary: {0}")]
    Vocabulary(String),
}

#[cfg(test)]
mod tests;
