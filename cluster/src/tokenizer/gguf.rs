//! The tokenizer that a GGUF file describes in its metadata.

use std::collections::{BTreeMap, BTreeSet};

use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::pre_tokenizers::metaspace::{Metaspace, PrependScheme};
use tokenizers::{AddedToken, Tokenizer as Library};

use super::pre::PreTokenizer;
use super::vocabulary::{Spelling, Vocabulary};
use super::{Frame, Inner, Tokenizer, TokenizerError, library_error, merges};

/// What a GGUF file says under `tokenizer.ggml.` and `tokenizer.`.
#[derive(Debug, Clone, Default)]
pub struct GgufTokenizer {
    /// `model`: `gpt2` (byte-level BPE) or `llama` (SentencePiece BPE).
    pub model: String,
    /// `pre`: how words are cut for `gpt2`. Empty when the file has none.
    pub pre: String,
    /// `tokens`: the entry of every id.
    pub tokens: Vec<String>,
    /// `token_type`: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte. Empty: all are normal.
    pub token_types: Vec<i32>,
    /// `merges`, for `gpt2`, best first.
    pub merges: Vec<String>,
    /// `scores`, for `llama`.
    pub scores: Vec<f32>,
    /// `bos_token_id`.
    pub bos_id: Option<u32>,
    /// `eos_token_id`.
    pub eos_id: Option<u32>,
    /// `eot_token_id`: end of a turn.
    pub eot_id: Option<u32>,
    /// `eom_token_id`: end of a message.
    pub eom_id: Option<u32>,
    /// `unknown_token_id`.
    pub unk_id: Option<u32>,
    /// `padding_token_id`.
    pub pad_id: Option<u32>,
    /// `add_bos_token`. When the file is silent: true for `llama`, false for `gpt2`.
    pub add_bos: Option<bool>,
    /// `add_eos_token`. When the file is silent: false.
    pub add_eos: Option<bool>,
    /// `add_space_prefix`, for `llama`. When the file is silent: true.
    pub add_space_prefix: Option<bool>,
    /// `tokenizer.chat_template`.
    pub chat_template: Option<String>,
}

/// Control tokens that end an answer under whichever id: files name one of them as `eos` and forget the others.
const END_TOKENS: &[&str] =
    &["<|endoftext|>", "<|im_end|>", "<|end|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<end_of_turn>"];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Normal,
    /// Unknown and control tokens: in the text only where it is not shown to people.
    Control,
    UserDefined,
    Unused,
    Byte,
}

impl GgufTokenizer {
    fn kind(&self, id: usize) -> Result<Kind, TokenizerError> {
        match self.token_types.get(id).copied().unwrap_or(1) {
            1 => Ok(Kind::Normal),
            2 | 3 => Ok(Kind::Control),
            4 => Ok(Kind::UserDefined),
            5 => Ok(Kind::Unused),
            6 => Ok(Kind::Byte),
            other => Err(bad(format!("token {id} has type {other}; types are 1 to 6"))),
        }
    }

    fn check(&self) -> Result<(), TokenizerError> {
        let n_tokens = self.tokens.len();
        if n_tokens == 0 || u32::try_from(n_tokens).is_err() {
            return Err(bad(format!("{n_tokens} tokens")));
        }
        if !self.token_types.is_empty() && self.token_types.len() != n_tokens {
            return Err(bad(format!("{n_tokens} tokens but {} token types", self.token_types.len())));
        }
        for (name, id) in [
            ("bos", self.bos_id),
            ("eos", self.eos_id),
            ("eot", self.eot_id),
            ("eom", self.eom_id),
            ("unknown", self.unk_id),
            ("padding", self.pad_id),
        ] {
            if let Some(id) = id.filter(|&id| id as usize >= n_tokens) {
                return Err(bad(format!("{name}_token_id is {id}, of {n_tokens} tokens")));
            }
        }
        Ok(())
    }
}

impl Tokenizer {
    /// The tokenizer that a GGUF file describes.
    pub fn from_gguf(gguf: &GgufTokenizer) -> Result<Self, TokenizerError> {
        gguf.check()?;
        let (spelling, add_bos) = match gguf.model.as_str() {
            "gpt2" => (Spelling::ByteLevel, false),
            "llama" => (Spelling::SentencePiece, true),
            other => return Err(TokenizerError::UnknownModel { got: other.to_owned() }),
        };
        let mut vocab = Vocab::default();
        let mut vocabulary = Vocabulary::default();
        let mut added = Vec::new();
        let mut eos_ids: BTreeSet<u32> = [gguf.eos_id, gguf.eot_id, gguf.eom_id].into_iter().flatten().collect();
        for (id, token) in (0u32..).zip(&gguf.tokens) {
            let kind = gguf.kind(id as usize)?;
            match kind {
                Kind::Normal | Kind::Byte => vocabulary.push(&spelling.bytes(token), false),
                Kind::Control => vocabulary.push(token.as_bytes(), true),
                Kind::UserDefined if spelling == Spelling::SentencePiece => {
                    vocabulary.push(&spelling.bytes(token), false);
                }
                Kind::UserDefined => vocabulary.push(token.as_bytes(), false),
                Kind::Unused => vocabulary.push(&[], false),
            }
            if matches!(kind, Kind::Control | Kind::UserDefined) {
                added.push(AddedToken::from(token.as_str(), kind == Kind::Control).normalized(false));
            }
            if kind == Kind::Control && END_TOKENS.contains(&token.as_str()) {
                eos_ids.insert(id);
            }
            if kind != Kind::Unused {
                // Of equal entries the first is the one that texts are encoded to.
                vocab.entry(token.clone()).or_insert(id);
            }
        }
        let mut library = match spelling {
            Spelling::ByteLevel => byte_level(gguf, vocab)?,
            Spelling::SentencePiece => sentence_piece(gguf, vocab)?,
        };
        library.add_tokens(added).map_err(library_error)?;

        let text = |id: Option<u32>| id.and_then(|id| gguf.tokens.get(id as usize)).cloned();
        let named = [
            ("bos_token", text(gguf.bos_id)),
            ("eos_token", text(gguf.eos_id)),
            ("unk_token", text(gguf.unk_id)),
            ("pad_token", text(gguf.pad_id)),
        ];
        let special_tokens: BTreeMap<_, _> =
            named.into_iter().filter_map(|(name, text)| Some((name.to_owned(), text?))).collect();
        Ok(Self::new(Inner {
            library,
            vocabulary,
            frame: Frame::Ids {
                front: gguf.bos_id.filter(|_| gguf.add_bos.unwrap_or(add_bos)),
                back: gguf.eos_id.filter(|_| gguf.add_eos.unwrap_or(false)),
            },
            bos_id: gguf.bos_id,
            eos_ids: eos_ids.into_iter().collect(),
            strip_leading_space: spelling == Spelling::SentencePiece && gguf.add_space_prefix.unwrap_or(true),
            special_tokens,
        }))
    }
}

fn byte_level(gguf: &GgufTokenizer, vocab: Vocab) -> Result<Library, TokenizerError> {
    let rule = PreTokenizer::by_name(&gguf.pre)?;
    let merges = merges::parse(&gguf.merges, &vocab)?;
    let model = BPE::builder().vocab_and_merges(vocab, merges).ignore_merges(rule.ignore_merges);
    let mut library = Library::new(model.build().map_err(library_error)?);
    library.with_normalizer(rule.normalizer()).map_err(library_error)?;
    library.with_pre_tokenizer(Some(rule.steps()?));
    Ok(library)
}

fn sentence_piece(gguf: &GgufTokenizer, vocab: Vocab) -> Result<Library, TokenizerError> {
    if gguf.scores.len() != gguf.tokens.len() {
        return Err(bad(format!("{} tokens but {} scores", gguf.tokens.len(), gguf.scores.len())));
    }
    let mut pieces = Vec::with_capacity(gguf.tokens.len());
    for ((id, token), &score) in (0u32..).zip(&gguf.tokens).zip(&gguf.scores) {
        if gguf.kind(id as usize)? == Kind::Normal && vocab.get(token) == Some(&id) {
            pieces.push((id, token.as_str(), score));
        }
    }
    let merges = merges::from_scores(&pieces, &vocab)?;
    let mut model = BPE::builder().vocab_and_merges(vocab, merges).byte_fallback(true).fuse_unk(true);
    if let Some(unknown) = gguf.unk_id.and_then(|id| gguf.tokens.get(id as usize)) {
        model = model.unk_token(unknown.clone());
    }
    let mut library = Library::new(model.build().map_err(library_error)?);
    let prefix = if gguf.add_space_prefix.unwrap_or(true) { PrependScheme::First } else { PrependScheme::Never };
    library.with_pre_tokenizer(Some(Metaspace::new('\u{2581}', prefix, false)));
    Ok(library)
}

fn bad(reason: String) -> TokenizerError {
    TokenizerError::Vocabulary { reason }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes as GPT-2 spells them would be 256 entries; these texts need a few.
    fn byte_level() -> GgufTokenizer {
        let tokens = ["<|im_end|>", "a", "b", "ab", "Ġ", "Ã", "©", "<tool>", "[PAD]", "ab", "1", "Ċ"];
        GgufTokenizer {
            model: "gpt2".into(),
            pre: "qwen2".into(),
            tokens: tokens.map(str::to_owned).to_vec(),
            token_types: vec![3, 1, 1, 1, 1, 1, 1, 4, 5, 1, 1, 1],
            merges: vec!["a b".into()],
            eos_id: Some(0),
            ..GgufTokenizer::default()
        }
    }

    fn sentence_piece() -> GgufTokenizer {
        let tokens = ["<unk>", "<s>", "</s>", "<0xC3>", "<0xA9>", "▁", "a", "b", "▁a", "ab", "▁b"];
        GgufTokenizer {
            model: "llama".into(),
            tokens: tokens.map(str::to_owned).to_vec(),
            token_types: vec![2, 3, 3, 6, 6, 1, 1, 1, 1, 1, 1],
            scores: vec![0.0, 0.0, 0.0, 0.0, 0.0, -9.0, -9.0, -9.0, -1.0, -2.0, -3.0],
            bos_id: Some(1),
            eos_id: Some(2),
            unk_id: Some(0),
            ..GgufTokenizer::default()
        }
    }

    #[test]
    fn byte_level_text_comes_back() {
        let tokenizer = Tokenizer::from_gguf(&byte_level()).unwrap();
        let text = "ab é1\n<tool>a<|im_end|>";
        let ids = tokenizer.encode(text, true).unwrap();
        assert_eq!(ids, [3, 4, 5, 6, 10, 11, 7, 1, 0]);
        assert_eq!(tokenizer.decode(&ids, false), text);
        assert_eq!(tokenizer.decode(&ids, true), "ab é1\n<tool>a");
        // The unused entry is no text, and neither are ids beyond the vocabulary.
        assert_eq!(tokenizer.decode(&[8, 9, 99], false), "ab");
        assert_eq!((tokenizer.bos_id(), tokenizer.eos_ids(), tokenizer.add_bos()), (None, &[0][..], false));
    }

    #[test]
    fn streams_hold_back_parts_of_characters() {
        let tokenizer = Tokenizer::from_gguf(&byte_level()).unwrap();
        let mut stream = tokenizer.stream(true);
        // é in two tokens; then its first half, a control token between, and a letter that breaks it.
        let pieces = [5, 6, 5, 0, 1, 6].map(|id| stream.push(id));
        let pieces: Vec<Option<&str>> = pieces.iter().map(Option::as_deref).collect();
        assert_eq!(pieces, [None, Some("é"), None, None, Some("\u{FFFD}a"), Some("\u{FFFD}")]);
        assert_eq!(stream.finish(), None);
        stream.push(5);
        assert_eq!(stream.finish().as_deref(), Some("\u{FFFD}"));
    }

    #[test]
    fn sentence_piece_adds_a_space_and_takes_it_back() {
        let tokenizer = Tokenizer::from_gguf(&sentence_piece()).unwrap();
        let ids = tokenizer.encode("ab é", true).unwrap();
        // "▁a" has a better score than "ab": merges are by score, not by length.
        assert_eq!(ids, [1, 8, 7, 5, 3, 4]);
        assert_eq!(tokenizer.decode(&ids, true), "ab é");
        assert!(tokenizer.add_bos());

        let without = GgufTokenizer { add_space_prefix: Some(false), add_bos: Some(false), ..sentence_piece() };
        let tokenizer = Tokenizer::from_gguf(&without).unwrap();
        let ids = tokenizer.encode(" ab", true).unwrap();
        assert_eq!((ids.as_slice(), tokenizer.decode(&ids, false).as_str()), (&[8, 7][..], " ab"));
        let closed = GgufTokenizer { add_eos: Some(true), ..without };
        assert_eq!(Tokenizer::from_gguf(&closed).unwrap().encode("a", true).unwrap(), [6, 2]);
    }

    #[test]
    fn contradictions_are_errors() {
        let (bytes, pieces) = (byte_level(), sentence_piece());
        let cases = [
            (GgufTokenizer { model: "bert".into(), ..bytes.clone() }, "bert"),
            (GgufTokenizer { pre: "nosuch".into(), ..bytes.clone() }, "nosuch"),
            (GgufTokenizer { tokens: Vec::new(), ..bytes.clone() }, "0 tokens"),
            (GgufTokenizer { eos_id: Some(12), ..bytes.clone() }, "eos_token_id is 12"),
            (GgufTokenizer { token_types: vec![1], ..bytes.clone() }, "1 token types"),
            (GgufTokenizer { token_types: vec![9; 12], ..bytes.clone() }, "type 9"),
            (GgufTokenizer { merges: vec!["b a".into()], ..bytes }, "\"ba\""),
            (GgufTokenizer { scores: vec![0.0], ..pieces }, "1 scores"),
        ];
        for (gguf, want) in cases {
            let error = Tokenizer::from_gguf(&gguf).unwrap_err().to_string();
            assert!(error.contains(want), "{error}, want {want}");
        }
        let odd = GgufTokenizer { scores: vec![f32::NAN; 11], ..sentence_piece() };
        assert!(Tokenizer::from_gguf(&odd).unwrap().encode("ab", true).is_ok());
    }
}
