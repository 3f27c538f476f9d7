//! A model's vocabulary as the grammar engine wants it.

use std::sync::Arc;

use llguidance::toktrie::{ApproximateTokEnv, TokEnv, TokRxInfo, TokTrie};
use sha2::{Digest, Sha256};

use super::GrammarError;
use crate::tokenizer::Tokenizer;

/// Longer tokens can't follow a grammar: the trie has no room for deeper nodes. No known vocabulary has one.
const LONGEST_TOKEN: usize = 1000;

/// What the tokens of a model say. Copies share it.
#[derive(Clone)]
pub struct Vocabulary(TokEnv);

impl Vocabulary {
    pub(super) fn new(environment: &TokEnv) -> Self {
        Self(Arc::clone(environment))
    }

    /// A token's bytes, and whether it is a control token. None outside the vocabulary.
    pub fn bytes(&self, token: u32) -> (&[u8], bool) {
        let trie = self.0.tok_trie();
        let bytes = if (token as usize) < trie.vocab_size() { trie.token(token) } else { &[] };
        match bytes.split_first() {
            Some((&TokTrie::SPECIAL_TOKEN_MARKER, rest)) => (rest, true),
            _ => (bytes, false),
        }
    }
}

/// The trie of all tokens' bytes. Control tokens are no text: they stand under a marker byte that no text has.
///
/// # Errors
/// If no token ends a text.
pub(super) fn environment(tokenizer: &Tokenizer) -> Result<TokEnv, GrammarError> {
    let eos = tokenizer.eos_ids();
    let first = *eos.first().ok_or(GrammarError::NoEnd)?;
    let n_tokens = u32::try_from(tokenizer.vocab_size()).map_err(|e| GrammarError::Vocabulary(e.to_string()))?;
    if let Some(outside) = eos.iter().find(|id| **id >= n_tokens) {
        return Err(GrammarError::Vocabulary(format!("end-of-sequence token {outside} of {n_tokens} tokens")));
    }
    let words: Vec<Vec<u8>> = (0..n_tokens).map(|id| word(tokenizer, id, eos.contains(&id))).collect();
    let trie = TokTrie::from(&TokRxInfo::new(n_tokens, first), &words).with_eos_tokens(eos);
    Ok(Arc::new(ApproximateTokEnv::new(trie)))
}

fn word(tokenizer: &Tokenizer, id: u32, is_end: bool) -> Vec<u8> {
    let bytes = tokenizer.token_bytes(id);
    if bytes.len() > LONGEST_TOKEN {
        return Vec::new();
    }
    if tokenizer.is_special(id) || is_end {
        let marker = [TokTrie::SPECIAL_TOKEN_MARKER];
        return [marker.as_slice(), bytes].concat();
    }
    bytes.to_vec()
}

/// Equal for vocabularies under which grammars give equal masks.
pub fn fingerprint(tokenizer: &Tokenizer) -> u64 {
    let mut hash = Sha256::new();
    let n_tokens = u32::try_from(tokenizer.vocab_size()).unwrap_or(u32::MAX);
    for id in 0..n_tokens {
        let bytes = tokenizer.token_bytes(id);
        hash.update((bytes.len() as u64).to_le_bytes());
        hash.update([u8::from(tokenizer.is_special(id))]);
        hash.update(bytes);
    }
    for id in tokenizer.eos_ids() {
        hash.update(id.to_le_bytes());
    }
    let digest = hash.finalize();
    digest.iter().take(8).fold(0, |value, byte| value << 8 | u64::from(*byte))
}
