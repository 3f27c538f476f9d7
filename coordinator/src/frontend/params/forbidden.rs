//! `allowed_token_ids` and `bad_words`: tokens that may not be chosen.

use std::collections::BTreeSet;

use phalanx_cluster::{id::TokenId, tokenizer::Tokenizer};
use phalanx_proto::v1::TokenRun;

use super::{MAX_ALLOWED_TOKENS, at_most};
use crate::frontend::{error::ApiError, fields::Integer};

/// Most bad words.
pub const MAX_BAD_WORDS: usize = 256;
/// Longest bad word, in bytes.
pub const MAX_BAD_WORD_BYTES: usize = 256;

/// The ids that alone may be chosen, in order; none are all.
pub fn allowed(
    ids: Option<&[Integer]>,
    check: impl Fn(Integer) -> Result<TokenId, ApiError>,
) -> Result<Vec<TokenId>, ApiError> {
    let Some(ids) = ids else { return Ok(Vec::new()) };
    if ids.is_empty() {
        return Err(ApiError::invalid("allowed_token_ids", "must not be empty: nothing could be written"));
    }
    at_most("allowed_token_ids", "ids", ids.len(), MAX_ALLOWED_TOKENS)?;
    let ids = ids.iter().map(|id| check(*id)).collect::<Result<BTreeSet<_>, _>>()?;
    Ok(ids.into_iter().collect())
}

/// The runs of tokens that spell these words, at the beginning of a text and inside it, where most tokenizers put the
/// space before a word into its first token.
pub fn bad_words(words: &[String], tokenizer: &Tokenizer) -> Result<Vec<TokenRun>, ApiError> {
    at_most("bad_words", "words", words.len(), MAX_BAD_WORDS)?;
    if words.iter().any(|word| word.trim().is_empty() || word.len() > MAX_BAD_WORD_BYTES) {
        let reason = format!("must have words of 1 to {MAX_BAD_WORD_BYTES} bytes that are not blank");
        return Err(ApiError::invalid("bad_words", reason));
    }
    let mut runs = BTreeSet::new();
    for word in words {
        for text in [word.clone(), format!(" {}", word.trim_start())] {
            let run = tokenizer
                .encode(&text, false)
                .map_err(|error| ApiError::invalid("bad_words", format!("has a word without tokens: {error}")))?;
            if !run.is_empty() {
                runs.insert(run);
            }
        }
    }
    Ok(runs.into_iter().map(|token_ids| TokenRun { token_ids }).collect())
}

/// An error if there may come a moment in which no token is allowed: better now than in the middle of an answer.
pub fn check_choice_is_left(
    allowed: &[TokenId],
    bad_words: &[TokenRun],
    held_back: impl Iterator<Item = TokenId>,
    n_vocab: usize,
) -> Result<(), ApiError> {
    let may_be_forbidden: BTreeSet<TokenId> =
        bad_words.iter().filter_map(|run| run.token_ids.last().copied()).chain(held_back).collect();
    let is_left = match allowed {
        [] => may_be_forbidden.len() < n_vocab,
        allowed => allowed.iter().any(|id| !may_be_forbidden.contains(id)),
    };
    if is_left {
        return Ok(());
    }
    let field = if allowed.is_empty() { "bad_words" } else { "allowed_token_ids" };
    Err(ApiError::invalid(field, "leaves no token: 'bad_words' or 'min_tokens' hold all of them back"))
}
