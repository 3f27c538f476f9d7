//! Text to token ids and back.
//!
//! Encoding is the `tokenizers` crate's. Decoding is done here, from a table of each token's bytes, because a stream of
//! tokens must be turned into text one token at a time, without ever decoding the whole sequence again, and because
//! grammars and log-probabilities want a token's bytes.

pub mod gguf;
mod huggingface;
mod merges;
mod pre;
mod stream;
mod vocabulary;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

pub use gguf::GgufTokenizer;
pub use stream::StreamDecoder;
use vocabulary::Vocabulary;

/// Why a tokenizer could not be made, or a text not be encoded.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// A file could not be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// A file is not the JSON that it should be.
    #[error("{path}: {reason}")]
    Json {
        /// The file.
        path: PathBuf,
        /// What is wrong in it.
        reason: String,
    },
    /// `tokenizer.ggml.model` names an algorithm that is not implemented.
    #[error("tokenizer.ggml.model is {got:?}; known are \"gpt2\" and \"llama\"")]
    UnknownModel {
        /// What the file says.
        got: String,
    },
    /// `tokenizer.ggml.pre` names a pre-tokenizer that is not registered.
    #[error("tokenizer.ggml.pre is {got:?}; known are {known}")]
    UnknownPreTokenizer {
        /// What the file says.
        got: String,
        /// Names that are registered, comma separated.
        known: String,
    },
    /// The vocabulary contradicts itself.
    #[error("tokenizer vocabulary: {reason}")]
    Vocabulary {
        /// What is wrong, and at which entry.
        reason: String,
    },
    /// `tokenizer.json` has a decoder whose tokens cannot be turned into bytes one by one.
    #[error("{path}: decoder {got} is not supported; known are ByteLevel, Metaspace and ByteFallback with Replace")]
    UnknownDecoder {
        /// The file.
        path: PathBuf,
        /// Its decoder, as JSON.
        got: String,
    },
    /// The tokenizer library refuses.
    #[error("tokenizer: {reason}")]
    Library {
        /// What it says.
        reason: String,
    },
}

/// What is put around a text when special tokens are asked for.
enum Frame {
    /// These ids, in front and behind. GGUF files say so by flags.
    Ids { front: Option<u32>, back: Option<u32> },
    /// What the post-processor of `tokenizer.json` does.
    PostProcessor,
}

struct Inner {
    library: tokenizers::Tokenizer,
    vocabulary: Vocabulary,
    frame: Frame,
    bos_id: Option<u32>,
    eos_ids: Vec<u32>,
    strip_leading_space: bool,
    special_tokens: BTreeMap<String, String>,
}

/// A model's tokenizer. Immutable; a clone shares everything.
#[derive(Clone)]
pub struct Tokenizer {
    inner: Arc<Inner>,
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer")
            .field("vocab_size", &self.vocab_size())
            .field("bos_id", &self.inner.bos_id)
            .field("eos_ids", &self.inner.eos_ids)
            .finish_non_exhaustive()
    }
}

impl Tokenizer {
    fn new(inner: Inner) -> Self {
        Self { inner: Arc::new(inner) }
    }

    /// Token ids of `text`. Special and user-defined tokens that stand in the text are recognized.
    ///
    /// `add_special_tokens` adds what the model wants around every text, usually a beginning-of-sequence token; leave it
    /// out for rendered chat templates, which write those tokens themselves.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, TokenizerError> {
        let by_library = add_special_tokens && matches!(self.inner.frame, Frame::PostProcessor);
        let encoding = self.inner.library.encode_fast(text, by_library).map_err(library_error)?;
        let ids = encoding.get_ids();
        Ok(match self.inner.frame {
            Frame::Ids { front, back } if add_special_tokens => {
                front.into_iter().chain(ids.iter().copied()).chain(back).collect()
            }
            _ => ids.to_vec(),
        })
    }

    /// Text of `ids`. What is not UTF-8 becomes U+FFFD; ids outside the vocabulary are left out.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        let mut bytes = Vec::new();
        for &id in ids {
            bytes.extend_from_slice(self.streamed_bytes(id, skip_special));
        }
        let text = String::from_utf8_lossy(&bytes);
        let text = if self.inner.strip_leading_space { text.strip_prefix(' ').unwrap_or(&text) } else { &text };
        text.to_owned()
    }

    /// Decodes token by token; see [`StreamDecoder`].
    pub fn stream(&self, skip_special: bool) -> StreamDecoder {
        StreamDecoder::new(self.clone(), skip_special)
    }

    /// The bytes that token `id` adds to the text: a part of a character, perhaps. Empty outside the vocabulary.
    pub fn token_bytes(&self, id: u32) -> &[u8] {
        self.inner.vocabulary.bytes(id)
    }

    /// [`Tokenizer::token_bytes`] as text, U+FFFD for what is not a whole character.
    pub fn token_text(&self, id: u32) -> String {
        String::from_utf8_lossy(self.token_bytes(id)).into_owned()
    }

    /// The id of the token whose vocabulary entry is exactly `token`, such as `<|im_end|>`.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.library.token_to_id(token)
    }

    /// One more than the largest id. The model's logits may be wider, for padding.
    pub fn vocab_size(&self) -> usize {
        self.inner.vocabulary.len()
    }

    /// Tokens that end a generation, ascending.
    pub fn eos_ids(&self) -> &[u32] {
        &self.inner.eos_ids
    }

    /// The token that begins a sequence, if the model has one.
    pub fn bos_id(&self) -> Option<u32> {
        self.inner.bos_id
    }

    /// Whether `encode(text, true)` begins with [`Tokenizer::bos_id`].
    pub fn add_bos(&self) -> bool {
        self.inner.bos_id.is_some_and(|bos| self.encode("", true).is_ok_and(|ids| ids.first() == Some(&bos)))
    }

    /// Whether `id` is a control token, which `skip_special` leaves out of the text.
    pub fn is_special(&self, id: u32) -> bool {
        self.inner.vocabulary.is_special(id)
    }

    /// Texts of the named special tokens (`bos_token`, `eos_token`, `pad_token`, `unk_token`), for chat templates.
    pub fn special_tokens(&self) -> &BTreeMap<String, String> {
        &self.inner.special_tokens
    }

    fn streamed_bytes(&self, id: u32, skip_special: bool) -> &[u8] {
        if skip_special && self.is_special(id) { &[] } else { self.token_bytes(id) }
    }
}

fn library_error(error: tokenizers::Error) -> TokenizerError {
    TokenizerError::Library { reason: error.to_string() }
}
