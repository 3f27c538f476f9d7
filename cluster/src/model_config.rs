//! What a checkpoint says of itself, checked.

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

impl ModelConfig {
    /// Whether the numbers make a model, given how many tensors the checkpoint has: the field that is wrong, and why.
    pub(crate) fn check(&self, n_tensors: usize) -> Result<(), (&'static str, String)> {
        // Generous: several times what the largest published models have. They keep products of two far from overflow.
        let counts = [
            ("layers", self.n_layers, 1 << 16),
            ("hidden width", self.hidden, 1 << 20),
            ("feed-forward width", self.ffn, 1 << 24),
            ("query heads", self.n_heads, 1 << 16),
            ("key/value heads", self.n_kv_heads, 1 << 16),
            ("head width", self.head_dim, 1 << 16),
            ("vocabulary", self.vocab, 1 << 26),
            ("context length", self.context_length, 1 << 40),
        ];
        for (field, count, most) in counts {
            if !(1..=most).contains(&count) {
                return Err((field, format!("{count}; want 1 to {most}")));
            }
        }
        if self.n_layers > n_tensors {
            return Err(("layers", format!("{}, but there are only {n_tensors} tensors", self.n_layers)));
        }
        if !self.n_heads.is_multiple_of(self.n_kv_heads) {
            return Err((
                "key/value heads",
                format!("{} don't divide the {} query heads", self.n_kv_heads, self.n_heads),
            ));
        }
        if !(self.norm_eps > 0.0 && self.norm_eps < 1.0) {
            return Err(("norm epsilon", format!("{}; want a number between 0 and 1", self.norm_eps)));
        }
        self.rope.check(self.head_dim)
    }
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

impl RopeConfig {
    fn check(&self, head_dim: usize) -> Result<(), (&'static str, String)> {
        if self.dims == 0 || !self.dims.is_multiple_of(2) || self.dims > head_dim {
            let reason = format!("{}; want an even number up to the head width of {head_dim}", self.dims);
            return Err(("rotary dimensions", reason));
        }
        let at_least = |field, value: f64, least: f64| {
            if value.is_finite() && value >= least {
                Ok(())
            } else {
                Err((field, format!("{value}; want a finite number from {least} on")))
            }
        };
        if !(self.theta.is_finite() && self.theta > 1.0) {
            return Err(("rope base", format!("{}; want a finite number above 1", self.theta)));
        }
        match &self.scaling {
            RopeScaling::None => Ok(()),
            RopeScaling::Linear { factor } => at_least("rope scaling factor", *factor, 1e-3),
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
                at_least("rope scaling factor", *factor, 1e-3)?;
                at_least("rope low_freq_factor", *low_freq_factor, 1e-6)?;
                at_least("rope high_freq_factor", *high_freq_factor, *low_freq_factor)?;
                at_least("rope original context", *original_context, 1.0)?;
                if high_freq_factor == low_freq_factor {
                    return Err((
                        "rope high_freq_factor",
                        format!("{high_freq_factor}; want more than low_freq_factor"),
                    ));
                }
                Ok(())
            }
            RopeScaling::Factors(factors) => {
                if factors.len() != self.dims / 2 {
                    return Err(("rope factors", format!("{} of them for {} dimensions", factors.len(), self.dims)));
                }
                factors.iter().try_for_each(|&f| at_least("rope factors", f.into(), 1e-6))
            }
            RopeScaling::Yarn { factor, original_context, beta_fast, beta_slow, attention_factor, truncate: _ } => {
                at_least("rope scaling factor", *factor, 1e-3)?;
                at_least("rope original context", *original_context, 1.0)?;
                at_least("rope beta_slow", *beta_slow, 1e-6)?;
                at_least("rope beta_fast", *beta_fast, 1e-6)?;
                attention_factor.map_or(Ok(()), |f| at_least("rope attention factor", f, 1e-6))
            }
        }
    }
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
