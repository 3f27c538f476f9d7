//! How long a request lets the model think.

use phalanx_cluster::{id::TokenId, tokenizer::Tokenizer};
use phalanx_proto::v1::{SamplingParams, ThoughtLimit, thought_limit::Place};

use super::{
    Format,
    thoughts::{Start, Thoughts},
};
use crate::frontend::{
    error::ApiError,
    fields::{Fields, Integer},
    params::in_range,
};

/// What clients call it: vLLM's name, llama-server's two, Qwen's.
const NAMES: &[&str] =
    &["thinking_token_budget", "thinking_budget_tokens", "reasoning_budget_tokens", "thinking_budget"];

/// Most tokens of thoughts, and the field that says so.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ThoughtBudget {
    /// Name of the field, for errors.
    pub field: String,
    /// Behind the mark that begins the thought.
    pub tokens: u32,
}

impl ThoughtBudget {
    /// Takes the fields of OpenAI's APIs that servers have added for it; -1 is no bound.
    pub fn take(fields: &mut Fields) -> Result<Option<Self>, ApiError> {
        let mut budget: Option<Self> = None;
        for name in NAMES {
            let field = fields.path(name);
            let given = fields.take::<Integer>(name)?.filter(|tokens| *tokens != -1);
            let Some(tokens) = in_range(&field, given, 0..=u32::MAX)? else { continue };
            if let Some(other) = budget.as_ref().filter(|other| other.tokens != tokens) {
                return Err(ApiError::invalid(&field, format!("and '{}' differ: give one of them", other.field)));
            }
            budget.get_or_insert(Self { field, tokens });
        }
        Ok(budget)
    }

    /// As shards get it; `None` if the answer has no thoughts. `format` is the one that marks thoughts too, if one does.
    pub fn limit(
        &self,
        thoughts: Option<(&'static Thoughts, Start)>,
        format: Option<&dyn Format>,
        tokenizer: &Tokenizer,
    ) -> Result<Option<ThoughtLimit>, ApiError> {
        let (marks, place) = match (thoughts, format.and_then(Format::thought_marks)) {
            (Some((_, Start::Behind)), _) => return Ok(None),
            (Some((form, Start::Inside)), _) => (form.marks(), Place::Begun),
            (Some((form, Start::Open)), _) => (form.marks(), Place::First),
            (None, Some(marks)) => (marks, Place::Anywhere),
            (None, None) => {
                return Err(ApiError::invalid(&self.field, "is not possible: the model has no thoughts"));
            }
        };
        let spelt = |mark: &str| match tokenizer.encode(mark, false) {
            Ok(ids) if tokenizer.decode(&ids, false).contains(mark) => Ok(ids),
            _ => Err(ApiError::invalid(
                &self.field,
                format!("is not possible: the model has no tokens for '{mark}', which ends its thoughts"),
            )),
        };
        let texts = |texts: &[&str]| texts.iter().map(|text| (*text).to_owned()).collect();
        Ok(Some(ThoughtLimit {
            tokens: self.tokens,
            place: place.into(),
            opens: texts(marks.open),
            closes: texts(marks.close),
            end: spelt(marks.end)?,
            end_again: marks.end_again.map_or(Ok(Vec::new()), spelt)?,
        }))
    }
}

/// How thoughts are marked, and what ends one that may not go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ThoughtMarks {
    /// What they begin with.
    pub open: &'static [&'static str],
    /// What ends them.
    pub close: &'static [&'static str],
    /// Ends one that has had its tokens.
    pub end: &'static str,
    /// Ends those that begin when none are left, if the same would only bring the next one.
    pub end_again: Option<&'static str>,
}

/// An error if the tokens that end a thought may not come.
pub fn check_end_may_come(field: &str, limit: &ThoughtLimit, sampling: &SamplingParams) -> Result<(), ApiError> {
    let mut end = limit.end.iter().chain(&limit.end_again);
    let allowed = &sampling.allowed_token_ids;
    let is_bad = |id: &TokenId| sampling.bad_words.iter().any(|run| run.token_ids.last() == Some(id));
    if let Some(id) = end.clone().find(|id| !allowed.is_empty() && !allowed.contains(id)) {
        let reason = format!("must have token {id}, which ends a thought, beside '{field}'");
        return Err(ApiError::invalid("allowed_token_ids", reason));
    }
    if let Some(id) = end.find(|id| is_bad(id)) {
        let reason = format!("can't have a word that ends with token {id}, which ends a thought, beside '{field}'");
        return Err(ApiError::invalid("bad_words", reason));
    }
    Ok(())
}
