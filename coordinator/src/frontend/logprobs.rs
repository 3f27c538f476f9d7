//! Scores of tokens in the shapes that clients know.

use phalanx_cluster::{id::TokenId, tokenizer::Tokenizer};
use phalanx_proto::v1::TokenScore;
use serde::Serialize;
use serde_json::{Map, Value, json};

use super::{error::ApiError, fields::Fields};

/// Log-probability of the impossible: JSON has no infinity.
const LEAST: f32 = -9999.0;

/// As JSON can have it.
pub fn finite(logprob: f32) -> f32 {
    // `max` takes the number if the other is NaN.
    logprob.max(LEAST)
}

/// What tokens are called in scores.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TokenNames {
    /// By their text.
    Texts,
    /// `token_id:N`: certain also where several tokens have the same text, or none.
    Ids,
}

impl TokenNames {
    /// Takes `return_tokens_as_token_ids`.
    pub fn take(fields: &mut Fields) -> Result<Self, ApiError> {
        Ok(if fields.flag("return_tokens_as_token_ids")? { Self::Ids } else { Self::Texts })
    }

    fn name(self, id: TokenId, text: impl FnOnce() -> String) -> String {
        match self {
            Self::Texts => text(),
            Self::Ids => format!("token_id:{id}"),
        }
    }
}

/// `choices[].logprobs` of chat completions.
#[derive(Debug, Serialize)]
pub struct ChatLogprobs {
    content: Vec<ChatToken>,
    refusal: Option<()>,
}

/// A token, its score, and what else it could have been.
#[derive(Debug, Serialize)]
pub struct ChatToken {
    #[serde(flatten)]
    token: ChatTop,
    top_logprobs: Vec<ChatTop>,
}

#[derive(Debug, Serialize)]
struct ChatTop {
    token: String,
    logprob: f32,
    bytes: Vec<u8>,
}

impl ChatTop {
    fn new(tokenizer: &Tokenizer, names: TokenNames, id: TokenId, logprob: f32) -> Self {
        let token = names.name(id, || tokenizer.token_text(id));
        Self { token, logprob: finite(logprob), bytes: tokenizer.token_bytes(id).to_vec() }
    }
}

impl ChatLogprobs {
    /// One entry per score.
    pub fn new(tokenizer: &Tokenizer, names: TokenNames, scores: &[TokenScore]) -> Self {
        let top = |id, logprob| ChatTop::new(tokenizer, names, id, logprob);
        let entry = |score: &TokenScore| ChatToken {
            token: top(score.token_id, score.logprob),
            top_logprobs: score.top.iter().map(|t| top(t.token_id, t.logprob)).collect(),
        };
        Self { content: scores.iter().map(entry).collect(), refusal: None }
    }

    /// The entries alone, as other APIs have them.
    pub fn into_entries(self) -> Vec<ChatToken> {
        self.content
    }
}

/// `choices[].logprobs` of legacy completions: columns, a row per token.
#[derive(Debug, Default, Serialize)]
pub struct LegacyLogprobs {
    text_offset: Vec<usize>,
    token_logprobs: Vec<Option<f32>>,
    tokens: Vec<String>,
    top_logprobs: Vec<Option<Map<String, Value>>>,
}

/// Makes [`LegacyLogprobs`] of a choice, part by part, counting where each token begins in the choice's text.
#[derive(Debug, Clone)]
pub struct LegacyWriter {
    n_top: usize,
    /// Characters that began before here.
    n_begun: usize,
    skip_special: bool,
    names: TokenNames,
}

impl LegacyWriter {
    /// At the start of a text that leaves special tokens out, or not. `n_top`: alternatives that were asked for.
    pub fn new(n_top: u32, skip_special: bool, names: TokenNames) -> Self {
        Self { n_top: n_top as usize, n_begun: 0, skip_special, names }
    }

    /// Rows of an echoed prompt: `text` is what is echoed, `scores` are of the second token and those that follow.
    pub fn prompt(
        &mut self,
        tokenizer: &Tokenizer,
        ids: &[TokenId],
        scores: &[TokenScore],
        text: &str,
        into: &mut LegacyLogprobs,
    ) {
        let mut rest = text.as_bytes();
        let scores = std::iter::once(None).chain(scores.iter().map(Some));
        for (&id, score) in ids.iter().zip(scores) {
            // A token stands in the text if its bytes come next: special ones may, or may have been added to it.
            let bytes = tokenizer.token_bytes(id);
            let without_space = bytes.strip_prefix(b" ").unwrap_or(bytes);
            let standing = [bytes, without_space].into_iter().find(|b| rest.starts_with(b)).unwrap_or_default();
            self.row(tokenizer, id, standing, score, into);
            rest = &rest[standing.len()..];
        }
        self.n_begun = text.chars().count();
    }

    /// Rows of new tokens.
    pub fn output(&mut self, tokenizer: &Tokenizer, scores: &[TokenScore], into: &mut LegacyLogprobs) {
        for score in scores {
            let id = score.token_id;
            let is_left_out = self.skip_special && tokenizer.is_special(id);
            let standing = if is_left_out { &[] } else { tokenizer.token_bytes(id) };
            self.row(tokenizer, id, standing, Some(score), into);
        }
    }

    fn row(
        &mut self,
        tokenizer: &Tokenizer,
        id: TokenId,
        standing: &[u8],
        score: Option<&TokenScore>,
        into: &mut LegacyLogprobs,
    ) {
        // A token that begins inside a character stands at that character.
        let is_inside = standing.first().is_some_and(|byte| is_continuation(*byte));
        into.text_offset.push(self.n_begun.saturating_sub(usize::from(is_inside)));
        self.n_begun += standing.iter().filter(|byte| !is_continuation(**byte)).count();
        let names = self.names;
        let spelling = |id| names.name(id, || spelling(tokenizer, id));
        into.tokens.push(spelling(id));
        into.token_logprobs.push(score.map(|s| finite(s.logprob)));
        into.top_logprobs.push(score.map(|s| {
            let mut top = Map::new();
            let mut add = |id, logprob| {
                // Two tokens may be spelt alike: the more probable one counts.
                top.entry(spelling(id)).or_insert_with(|| json!(finite(logprob)));
            };
            s.top.iter().take(self.n_top).for_each(|t| add(t.token_id, t.logprob));
            add(s.token_id, s.logprob);
            top
        }));
    }
}

fn is_continuation(byte: u8) -> bool {
    byte & 0xc0 == 0x80
}

/// A token's text; OpenAI's notation for bytes that are no text.
fn spelling(tokenizer: &Tokenizer, id: TokenId) -> String {
    let bytes = tokenizer.token_bytes(id);
    match std::str::from_utf8(bytes) {
        Ok(text) => text.to_owned(),
        Err(_) => bytes.iter().fold("bytes:".to_owned(), |text, byte| text + &format!("\\x{byte:02x}")),
    }
}

/// `prompt_logprobs` as vLLM has it: null for the first token, then an object from token ids to scores.
pub fn prompt_logprobs(tokenizer: &Tokenizer, scores: &[TokenScore], n_top: u32) -> Vec<Value> {
    let entry = |logprob: f32, rank: u32, id: TokenId| json!({"logprob": finite(logprob), "rank": rank, "decoded_token": tokenizer.token_text(id)});
    let object = |score: &TokenScore| {
        let mut object = Map::new();
        object.insert(score.token_id.to_string(), entry(score.logprob, score.rank, score.token_id));
        for (rank, top) in (1..=n_top).zip(&score.top) {
            let id = top.token_id;
            object.entry(id.to_string()).or_insert_with(|| entry(top.logprob, rank, id));
        }
        Value::Object(object)
    };
    std::iter::once(Value::Null).chain(scores.iter().map(object)).collect()
}
