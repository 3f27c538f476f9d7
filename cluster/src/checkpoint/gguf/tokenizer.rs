//! The tokenizer from GGUF metadata.

use super::{config::Fields, value::Value};
use crate::{checkpoint::CheckpointError, tokenizer::GgufTokenizer};

/// -1 as uint32: some converters write it where there's no such token.
const NO_TOKEN: u64 = 0xffff_ffff;

impl Fields<'_> {
    /// The tokenizer that the file carries: types are checked here, what they mean is for the tokenizer to judge.
    pub(super) fn tokenizer(&self) -> Result<GgufTokenizer, CheckpointError> {
        let fields = self;
        let text = |key: &str| Ok(fields.get(key, "a string", Value::as_str)?.map(str::to_owned));
        let flag = |key: &str| fields.get(key, "a bool", Value::as_bool);
        let id = |key: &str| {
            let id = fields.get(key, "a token id", |v| v.as_u64().filter(|&id| u32::try_from(id).is_ok()))?;
            Ok(id.filter(|&id| id != NO_TOKEN).map(|id| id as u32))
        };
        let strings = |key: &str| Ok(fields.get(key, "strings", Value::as_strings)?.unwrap_or_default().to_vec());
        let types = fields.get("tokenizer.ggml.token_type", "small integers", |v| {
            v.as_u64s()?.into_iter().map(|t| i32::try_from(t).ok()).collect::<Option<Vec<_>>>()
        })?;
        let scores = fields.get("tokenizer.ggml.scores", "32-bit floats", Value::as_f32s)?;
        let key = "tokenizer.ggml.model";
        Ok(GgufTokenizer {
            model: fields.wanted(key, text(key)?)?,
            pre: text("tokenizer.ggml.pre")?.unwrap_or_default(),
            tokens: strings("tokenizer.ggml.tokens")?,
            token_types: types.unwrap_or_default(),
            merges: strings("tokenizer.ggml.merges")?,
            scores: scores.unwrap_or_default().to_vec(),
            bos_id: id("tokenizer.ggml.bos_token_id")?,
            eos_id: id("tokenizer.ggml.eos_token_id")?,
            eot_id: id("tokenizer.ggml.eot_token_id")?,
            eom_id: id("tokenizer.ggml.eom_token_id")?,
            unk_id: id("tokenizer.ggml.unknown_token_id")?,
            pad_id: id("tokenizer.ggml.padding_token_id")?,
            add_bos: flag("tokenizer.ggml.add_bos_token")?,
            add_eos: flag("tokenizer.ggml.add_eos_token")?,
            add_space_prefix: flag("tokenizer.ggml.add_space_prefix")?,
            chat_template: text("tokenizer.chat_template")?,
        })
    }
}
