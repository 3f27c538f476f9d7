//! Grammars that clients send, tried before a shard sees them: a wrong one is refused at once, and one that takes too long,
//! too much memory, or makes the compiler crash, harms nobody.
//!
//! Compilers are bounded, but not in every corner. So a process that can be killed tries each grammar first
//! ([`trial`]); what it said is remembered. What a shard compiles has been compiled there.

mod process;
pub mod trial;
mod verdicts;

use std::{
    path::PathBuf,
    sync::{Arc, Mutex, OnceLock, PoisonError},
    thread,
};

use phalanx_cluster::{
    grammar::{Compiler, Grammar, GrammarError, Limits, STACK_BYTES, fingerprint},
    tokenizer::Tokenizer,
};
use phalanx_proto::v1::{self, grammar::Text};
use tokio::sync::oneshot;

use self::{process::TrialProcess, verdicts::Verdicts};
use crate::request::Request;

/// What became of a trial.
pub type Verdict = Result<(), Refusal>;

/// Why a grammar is not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// It can't be used.
    #[error("{0}")]
    OfGrammar(String),
    /// Trying it takes too long now, or is not possible.
    #[error("grammars can't be tried now: {0}")]
    Busy(String),
}

/// Tries grammars for a model's vocabulary.
pub struct Grammars {
    tokenizer: Arc<Tokenizer>,
    fingerprint: OnceLock<u64>,
    verdicts: Mutex<Verdicts>,
    tried: Tried,
}

/// Where grammars are tried.
enum Tried {
    /// In a process of its own.
    Apart(Box<TrialProcess>),
    /// Here: by tests, which send no hostile ones.
    Here(Arc<OnceLock<Result<Compiler, GrammarError>>>),
    /// Nowhere, and why.
    Nowhere(String),
}

impl Grammars {
    /// In a process of its own, which takes the tokenizer from `path`.
    pub fn apart(tokenizer: Arc<Tokenizer>, path: PathBuf) -> Self {
        Self::new(tokenizer, Tried::Apart(Box::new(TrialProcess::new(path))))
    }

    /// In this process.
    pub fn here(tokenizer: Arc<Tokenizer>) -> Self {
        Self::new(tokenizer, Tried::Here(Arc::default()))
    }

    /// Refuses all of them.
    pub fn none(tokenizer: Arc<Tokenizer>, reason: &str) -> Self {
        Self::new(tokenizer, Tried::Nowhere(reason.to_owned()))
    }

    fn new(tokenizer: Arc<Tokenizer>, tried: Tried) -> Self {
        Self { tokenizer, fingerprint: OnceLock::new(), verdicts: Mutex::default(), tried }
    }

    /// Tries the grammars of requests, and marks them with the vocabulary that they were tried with.
    ///
    /// # Errors
    /// The field that the first bad one came in, and what is wrong.
    pub async fn admit(&self, requests: &mut [Request]) -> Result<(), (String, Refusal)> {
        for grammar in requests.iter_mut().filter_map(|request| request.sampling.grammar.as_mut()) {
            // What bounds thoughts needs what grammars need, and no more.
            let anything = || grammar.thoughts.is_some().then(|| Grammar::Regex("(?s:.*)".to_owned()));
            let wanted = of_wire(grammar).or_else(anything);
            let verdict = match wanted {
                Some(wanted) => self.admit_one(wanted).await,
                None => Err(Refusal::OfGrammar("is of no known kind".to_owned())),
            };
            verdict.map_err(|refusal| (grammar.field.clone(), refusal))?;
            grammar.vocabulary = *self.fingerprint.get_or_init(|| fingerprint(&self.tokenizer));
        }
        Ok(())
    }

    async fn admit_one(&self, grammar: Grammar) -> Verdict {
        // Nothing is left half done between two calls.
        let verdicts = || self.verdicts.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = verdicts().get(&grammar) {
            return known;
        }
        let verdict = match &self.tried {
            Tried::Apart(process) => process.try_out(&grammar).await,
            Tried::Here(compiler) => try_here(Arc::clone(compiler), Arc::clone(&self.tokenizer), grammar.clone()).await,
            Tried::Nowhere(reason) => Err(Refusal::OfGrammar(reason.clone())),
        };
        if !matches!(verdict, Err(Refusal::Busy(_))) {
            verdicts().remember(&grammar, verdict.clone());
        }
        verdict
    }
}

async fn try_here(
    compiler: Arc<OnceLock<Result<Compiler, GrammarError>>>,
    tokenizer: Arc<Tokenizer>,
    grammar: Grammar,
) -> Verdict {
    let (sender, verdict) = oneshot::channel();
    let work = move || {
        let made = compiler.get_or_init(|| Compiler::new(&tokenizer, Limits::default()));
        let tried = made.as_ref().map_err(Clone::clone).and_then(|compiler| trial::try_out(compiler, &grammar));
        // Whoever asked may have gone.
        let _ = sender.send(tried.map_err(|error| Refusal::OfGrammar(error.to_string())));
    };
    let spawned = thread::Builder::new().name("grammar-trial".to_owned()).stack_size(STACK_BYTES).spawn(work);
    spawned.map_err(|error| Refusal::Busy(error.to_string()))?;
    verdict.await.unwrap_or_else(|_| Err(Refusal::OfGrammar("makes the compiler panic".to_owned())))
}

/// A grammar as shards get it.
pub fn to_wire(grammar: Grammar, field: String, ignore_eos: bool) -> v1::Grammar {
    let text = match grammar {
        Grammar::JsonSchema(text) => Text::JsonSchema(text),
        Grammar::Regex(text) => Text::Regex(text),
        Grammar::Lark(text) => Text::Lark(text),
    };
    v1::Grammar { text: Some(text), vocabulary: 0, ignore_eos, field, thoughts: None }
}

/// Bounds the thoughts of an output, which follows a grammar beside, or none. `field` is where the bound came in.
pub fn limit_thoughts(grammar: &mut Option<v1::Grammar>, field: String, limit: v1::ThoughtLimit) {
    grammar.get_or_insert_with(|| v1::Grammar { field, ..v1::Grammar::default() }).thoughts = Some(limit);
}

fn of_wire(grammar: &v1::Grammar) -> Option<Grammar> {
    Some(match grammar.text.clone()? {
        Text::JsonSchema(text) => Grammar::JsonSchema(text),
        Text::Regex(text) => Grammar::Regex(text),
        Text::Lark(text) => Grammar::Lark(text),
    })
}

#[cfg(test)]
mod tests;
