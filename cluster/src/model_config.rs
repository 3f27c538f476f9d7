//! What a checkpoint says of itself, checked.

use crate::id::TokenId;

/// The numbers that shape a decoder-only transformer.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// Name of the family as GGUF spells it: `llama`, `qwen2`, ...
    pub architecture: String,
    /// Name that the checkpoint gives itself.
    pub name: String,
    /// Decoder layers.
    pub n_layers: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width of the feed-forward layer.
    pub ffn: usize,
    /// Query heads.
    pub n_heads: usize,
    /// Key/value heads; divides `n_heads`.
    pub n_kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Rows of the embedding table.
    pub vocab: usize,
    /// Most positions that the model was made for.
    pub context_length: usize,
    /// Epsilon of the norms.
    pub norm_eps: f32,
    /// Rotary embedding.
    pub rope: RopeConfig,
    /// Whether the output matrix is the embedding table.
    pub tied_embeddings: bool,
}

/// Rotary position embedding as configured.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeConfig {
    /// Base of the frequencies.
    pub theta: f64,
    /// Elements of a head that rotate; even, at most `head_dim`.
    pub dims: usize,
    /// Whether elements 2i and 2i + 1 rotate together (GGUF files of the `llama` family) or i and i + dims / 2.
    pub interleaved: bool,
    /// How frequencies are stretched for long contexts.
    pub scaling: RopeScaling,
}

/// Stretching of rotary frequencies. Names and formulas are those of Hugging Face's `rope_scaling`.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// Frequencies as they are.
    None,
    /// All frequencies divided by `factor`.
    Linear {
        /// Stretch.
        factor: f64,
    },
    /// Llama 3.1: low frequencies divided, high ones kept, a ramp between.
    Llama3 {
        /// Stretch of the low frequencies.
        factor: f64,
        /// Wavelengths above `original_context / low_freq_factor` are divided.
        low_freq_factor: f64,
        /// Wavelengths below `original_context / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// Context the model was trained with first.
        original_context: f64,
    },
    /// Per-pair divisors stored in the file (GGUF's `rope_freqs.weight`), `[dims / 2]`.
    Factors(Vec<f32>),
    /// YaRN (Peng et al., 2023, arXiv:2309.00071).
    Yarn {
        /// Stretch.
        factor: f64,
        /// Context the model was trained with first.
        original_context: f64,
        /// Rotations over the original context above which a pair is kept.
        beta_fast: f64,
        /// Rotations over the original context below which a pair is divided.
        beta_slow: f64,
        /// Factor on cosine and sine; `None`: `0.1 ln(factor) + 1`.
        attention_factor: Option<f64>,
        /// Whether the ramp's ends are rounded to whole dimensions (Hugging Face's `truncate`, true by default).
        truncate: bool,
    },
}


/// Token ids that a checkpoint names.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SpecialTokens {
    /// Beginning of sequence.
    pub bos: Option<TokenId>,
    /// Any of these ends a sequence.
    pub eos: Vec<TokenId>,
}
