//! How a text is cut into words before byte pairs are merged: GGUF files name the rule, they do not contain it.

use tokenizers::normalizers::NFC;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{NormalizerWrapper, PreTokenizerWrapper, SplitDelimiterBehavior};

use super::{TokenizerError, library_error};

/// One rule. Byte-level BPE follows it.
pub(super) struct PreTokenizer {
    /// Names in `tokenizer.ggml.pre`.
    names: &'static [&'static str],
    /// Unicode normalization form C comes first.
    nfc: bool,
    /// Each pattern cuts what the former left.
    patterns: &'static [&'static str],
    /// A word that is a vocabulary entry is taken whole, whatever the merges say.
    pub(super) ignore_merges: bool,
}

/// GPT-2's pattern (`encoder.py` in its repository).
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
/// Every digit by itself.
const DIGIT: &str = r"\p{N}";
/// Qwen2's pattern (`tokenizer.json` of its models).
const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Llama 3's pattern (`tokenizer.json` of its models): as Qwen2's, but up to three digits stay together.
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Every rule that is known. Another one is another line.
static PRE_TOKENIZERS: &[PreTokenizer] = &[
    PreTokenizer { names: &["default", "gpt-2"], nfc: false, patterns: &[GPT2], ignore_merges: false },
    PreTokenizer { names: &["smollm"], nfc: false, patterns: &[DIGIT, GPT2], ignore_merges: false },
    PreTokenizer { names: &["qwen2"], nfc: true, patterns: &[QWEN2], ignore_merges: false },
    PreTokenizer { names: &["llama-bpe"], nfc: false, patterns: &[LLAMA3], ignore_merges: true },
];

impl PreTokenizer {
    /// The rule of that name; an empty name is GPT-2's.
    pub(super) fn by_name(name: &str) -> Result<&'static Self, TokenizerError> {
        let name = if name.is_empty() { "default" } else { name };
        PRE_TOKENIZERS.iter().find(|rule| rule.names.contains(&name)).ok_or_else(|| {
            let known: Vec<&str> = PRE_TOKENIZERS.iter().flat_map(|rule| rule.names).copied().collect();
            TokenizerError::UnknownPreTokenizer { got: name.to_owned(), known: known.join(", ") }
        })
    }

    pub(super) fn normalizer(&self) -> Option<NormalizerWrapper> {
        self.nfc.then(|| NFC.into())
    }

    pub(super) fn steps(&self) -> Result<PreTokenizerWrapper, TokenizerError> {
        let mut steps: Vec<PreTokenizerWrapper> = Vec::new();
        for &pattern in self.patterns {
            let pattern = SplitPattern::Regex(pattern.to_owned());
            steps.push(Split::new(pattern, SplitDelimiterBehavior::Isolated, false).map_err(library_error)?.into());
        }
        steps.push(ByteLevel::new(false, false, false).into());
        Ok(Sequence::new(steps).into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;
    use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer as _};

    fn words(name: &str, text: &str) -> Vec<String> {
        let steps = PreTokenizer::by_name(name).unwrap().steps().unwrap();
        let mut words = PreTokenizedString::from(text);
        steps.pre_tokenize(&mut words).unwrap();
        let splits = words.get_splits(OffsetReferential::Original, OffsetType::Byte);
        splits.into_iter().map(|(_, (begin, end), _)| text[begin..end].to_owned()).collect()
    }

    #[test]
    fn names_are_unique_and_every_pattern_compiles() {
        let mut seen = HashSet::new();
        for rule in PRE_TOKENIZERS {
            rule.steps().unwrap();
            assert!(rule.names.iter().all(|name| seen.insert(*name)));
        }
    }

    #[test]
    fn rules_differ_in_digits() {
        assert_eq!(words("gpt-2", "a 12345"), ["a", " 12345"]);
        assert_eq!(words("smollm", "a 12345"), ["a", " ", "1", "2", "3", "4", "5"]);
        assert_eq!(words("qwen2", "a 12345"), ["a", " ", "1", "2", "3", "4", "5"]);
        assert_eq!(words("llama-bpe", "a 12345"), ["a", " ", "123", "45"]);
    }

    #[test]
    fn spaces_go_to_the_next_word_but_for_the_rest() {
        assert_eq!(words("llama-bpe", "x   y\n\n z's"), ["x", "  ", " y", "\n\n", " z", "'s"]);
    }

    #[test]
    fn unknown_rule_names_the_known() {
        let error = PreTokenizer::by_name("nosuch").err().unwrap().to_string();
        assert!(error.contains("\"nosuch\"") && error.contains("llama-bpe"), "{error}");
    }
}
