//! The tokenizer of a Hugging Face model folder.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde_json::Value;
use tokenizers::Tokenizer as Library;
use tokenizers::models::bpe::Vocab;

use super::vocabulary::{Spelling, Vocabulary};
use super::{Frame, Inner, Tokenizer, TokenizerError, merges};

/// Names of special tokens in `tokenizer_config.json`.
const NAMED: &[&str] = &["bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token"];
/// Ids beyond this are refused: the table of token bytes is dense, and no model has as many.
const MOST_TOKENS: u32 = 1 << 24;

impl Tokenizer {
    /// The tokenizer of a model folder: `tokenizer.json`, and what `tokenizer_config.json`, `generation_config.json` and
    /// `config.json` add to it, as far as they are there.
    ///
    /// Ids that end a generation are those of `generation_config.json` (of `config.json` where it has none) and the
    /// tokenizer's `eos_token`.
    pub fn from_folder(folder: &Path) -> Result<Self, TokenizerError> {
        let path = folder.join("tokenizer.json");
        let bytes = std::fs::read(&path).map_err(|source| TokenizerError::Read { path: path.clone(), source })?;
        let json = |reason: String| TokenizerError::Json { path: path.clone(), reason };
        let document: Value = serde_json::from_slice(&bytes).map_err(|error| json(error.to_string()))?;
        check_model(&document).map_err(|error| json(error.to_string()))?;
        let (spelling, strip_leading_space) = decoder(&document["decoder"]).ok_or_else(|| {
            TokenizerError::UnknownDecoder { path: path.clone(), got: document["decoder"].to_string() }
        })?;

        let mut library = Library::from_bytes(&bytes).map_err(|error| json(error.to_string()))?;
        // Some files carry the settings of a training run.
        library.with_truncation(None).map_err(|error| json(error.to_string()))?;
        library.with_padding(None);

        let config = optional_json(folder, "tokenizer_config.json")?;
        let model = optional_json(folder, "config.json")?;
        let generation = optional_json(folder, "generation_config.json")?;
        let special_tokens: BTreeMap<String, String> = NAMED
            .iter()
            .filter_map(|&name| Some((name.to_owned(), token_content(&config[name])?.to_owned())))
            .collect();
        let id_of = |name: &str| special_tokens.get(name).and_then(|token| library.token_to_id(token));
        let bos_id = id_of("bos_token")
            .or_else(|| token_ids(&generation["bos_token_id"]).first().copied())
            .or_else(|| token_ids(&model["bos_token_id"]).first().copied());
        let mut eos_ids: BTreeSet<u32> = token_ids(&generation["eos_token_id"]).into_iter().collect();
        if eos_ids.is_empty() {
            eos_ids.extend(token_ids(&model["eos_token_id"]));
        }
        eos_ids.extend(id_of("eos_token"));

        let vocabulary = vocabulary(&library, spelling).map_err(json)?;
        Ok(Self::new(Inner {
            library,
            vocabulary,
            frame: Frame::PostProcessor,
            bos_id,
            eos_ids: eos_ids.into_iter().collect(),
            strip_leading_space,
            special_tokens,
        }))
    }
}

/// A BPE model's merges must be about its vocabulary; the library assumes it.
fn check_model(document: &Value) -> Result<(), TokenizerError> {
    let model = &document["model"];
    let (Some(entries), Some(merge_list)) = (model["vocab"].as_object(), model["merges"].as_array()) else {
        return Ok(()); // Not BPE: the library says what is missing.
    };
    if model["continuing_subword_prefix"].as_str().is_some_and(|prefix| !prefix.is_empty()) {
        return Err(TokenizerError::Vocabulary { reason: "continuing_subword_prefix is not supported".into() });
    }
    let ids = entries.iter().filter_map(|(entry, id)| Some((entry.clone(), u32::try_from(id.as_u64()?).ok()?)));
    let vocab: Vocab = ids.collect();
    let mut lines = Vec::new();
    for (rank, merge) in merge_list.iter().enumerate() {
        match (merge, merge.as_array().map(Vec::as_slice)) {
            (Value::String(line), _) => lines.push(line.clone()),
            (_, Some([Value::String(left), Value::String(right)])) => merges::check(rank, left, right, &vocab)?,
            _ => return Err(TokenizerError::Vocabulary { reason: format!("merge {rank} is {merge}") }),
        }
    }
    merges::parse(&lines, &vocab).map(|_| ())
}

/// How the decoder spells bytes, and whether it takes a space from the text's start. `None` if it does anything else.
fn decoder(decoder: &Value) -> Option<(Spelling, bool)> {
    match decoder["type"].as_str()? {
        "ByteLevel" => Some((Spelling::ByteLevel, false)),
        "Metaspace" if decoder["replacement"] == "\u{2581}" => {
            let never = decoder["prepend_scheme"] == "never" || decoder["add_prefix_space"] == false;
            Some((Spelling::SentencePiece, !never))
        }
        "Sequence" => {
            let (mut spelling, mut strip) = (None, false);
            for step in decoder["decoders"].as_array()? {
                match step["type"].as_str()? {
                    "Fuse" => {}
                    "ByteFallback" => spelling = spelling.or(Some(Spelling::SentencePiece)),
                    "Replace" if step["pattern"]["String"] == "\u{2581}" && step["content"] == " " => {
                        spelling = Some(Spelling::SentencePiece);
                    }
                    "Strip" if step["content"] == " " && step["start"] == 1 && step["stop"] == 0 => strip = true,
                    _ => {
                        let (inner, inner_strip) = self::decoder(step)?;
                        spelling = Some(inner);
                        strip |= inner_strip;
                    }
                }
            }
            Some((spelling?, strip))
        }
        _ => None,
    }
}

fn vocabulary(library: &Library, spelling: Spelling) -> Result<Vocabulary, String> {
    let added = library.get_added_tokens_decoder();
    let mut entries: BTreeMap<u32, (Vec<u8>, bool)> =
        library.get_vocab(false).into_iter().map(|(entry, id)| (id, (spelling.bytes(&entry), false))).collect();
    for (&id, token) in &added {
        let bytes = match spelling {
            Spelling::ByteLevel => token.content.clone().into_bytes(),
            Spelling::SentencePiece => spelling.bytes(&token.content),
        };
        entries.insert(id, (bytes, token.special));
    }
    let mut vocabulary = Vocabulary::default();
    for (id, (bytes, special)) in entries {
        if id >= MOST_TOKENS {
            return Err(format!("token id {id}; at most {MOST_TOKENS} tokens can be"));
        }
        while vocabulary.len() < id as usize {
            vocabulary.push(&[], false);
        }
        vocabulary.push(&bytes, special);
    }
    Ok(vocabulary)
}

/// The document, or null when there is no such file.
fn optional_json(folder: &Path, name: &str) -> Result<Value, TokenizerError> {
    let path = folder.join(name);
    match std::fs::read(&path) {
        Ok(bytes) => {
            serde_json::from_slice(&bytes).map_err(|error| TokenizerError::Json { path, reason: error.to_string() })
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Value::Null),
        Err(source) => Err(TokenizerError::Read { path, source }),
    }
}

/// A named special token: a string, or an object around one.
fn token_content(token: &Value) -> Option<&str> {
    token.as_str().or_else(|| token["content"].as_str())
}

/// An id or a list of them.
fn token_ids(ids: &Value) -> Vec<u32> {
    let id = |id: &Value| id.as_u64().and_then(|id| u32::try_from(id).ok());
    match ids {
        Value::Array(ids) => ids.iter().filter_map(id).collect(),
        one => id(one).into_iter().collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn decoders_of_the_known_families() {
        let gemma = json!({"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}]});
        let llama2 = json!({"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]});
        assert_eq!(decoder(&gemma), Some((Spelling::SentencePiece, false)));
        assert_eq!(decoder(&llama2), Some((Spelling::SentencePiece, true)));
        assert_eq!(decoder(&json!({"type": "ByteLevel"})), Some((Spelling::ByteLevel, false)));
        assert_eq!(decoder(&json!({"type": "WordPiece"})), None);
        assert_eq!(decoder(&Value::Null), None);
    }

    #[test]
    fn ids_are_one_or_many() {
        assert_eq!(token_ids(&json!([1, 3])), [1, 3]);
        assert_eq!(token_ids(&json!(2)), [2]);
        assert!(token_ids(&Value::Null).is_empty() && token_ids(&json!(-1)).is_empty());
    }

    #[test]
    fn merges_outside_the_vocabulary_are_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let document = json!({"decoder": {"type": "ByteLevel"}, "added_tokens": [],
            "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": [["a", "b"]]}});
        std::fs::write(folder.path().join("tokenizer.json"), document.to_string()).unwrap();
        let error = Tokenizer::from_folder(folder.path()).unwrap_err().to_string();
        assert!(error.contains("tokenizer.json") && error.contains("\"ab\""), "{error}");
    }
}
