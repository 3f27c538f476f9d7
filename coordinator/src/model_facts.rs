//! What the served checkpoint is, for those who ask.

use std::collections::BTreeMap;

use phalanx_cluster::checkpoint::Checkpoint;

/// A checkpoint in short.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ModelFacts {
    /// Name of the family: `llama`, `qwen2`, …
    pub architecture: String,
    /// How it was published: `gguf` or `safetensors`.
    pub format: &'static str,
    /// SHA-256 that tells checkpoints apart.
    pub identity: String,
    /// Bytes of all tensors.
    pub bytes: u64,
    /// Weights.
    pub n_weights: u64,
    /// The type that most weights have.
    pub weight_type: String,
}

impl ModelFacts {
    /// Of an open checkpoint.
    pub fn of(checkpoint: &dyn Checkpoint) -> Self {
        let mut by_type = BTreeMap::<String, u64>::new();
        let (mut bytes, mut n_weights) = (0u64, 0u64);
        for tensor in checkpoint.tensors() {
            let n = (tensor.rows as u64).saturating_mul(tensor.cols as u64);
            n_weights = n_weights.saturating_add(n);
            bytes = bytes.saturating_add((tensor.row_bytes() as u64).saturating_mul(tensor.rows as u64));
            *by_type.entry(format!("{:?}", tensor.dtype).to_uppercase()).or_default() += n;
        }
        Self {
            architecture: checkpoint.config().architecture.clone(),
            format: if checkpoint.path().is_dir() { "safetensors" } else { "gguf" },
            identity: checkpoint.identity().to_owned(),
            bytes,
            n_weights,
            weight_type: by_type.into_iter().max_by_key(|(_, n)| *n).map(|(name, _)| name).unwrap_or_default(),
        }
    }

    /// The number of weights as people write it: `134.5M`.
    pub fn weights_in_words(&self) -> String {
        match self.n_weights as f64 {
            n if n >= 1e9 => format!("{:.1}B", n / 1e9),
            n if n >= 1e6 => format!("{:.1}M", n / 1e6),
            n => format!("{:.1}K", n / 1e3),
        }
    }
}
