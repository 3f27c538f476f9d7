//! The model's shape from GGUF metadata.

use std::path::Path;

use super::{header::Header, value::Value};
use crate::{
    checkpoint::{CheckpointError, TensorType},
    model_config::{ModelConfig, RopeConfig, RopeScaling},
};

/// What the metadata of a family leaves unsaid. A family that is not listed is read as the default.
struct Family {
    architecture: &'static str,
    /// Whether the converter permuted query and key rows so that elements 2i and 2i + 1 rotate together.
    interleaved: bool,
}

static FAMILIES: &[Family] =
    &[Family { architecture: "llama", interleaved: true }, Family { architecture: "qwen2", interleaved: false }];

/// Typed access to metadata: `key` may start with `{arch}`.
pub(super) struct Fields<'a> {
    pub(super) path: &'a Path,
    pub(super) header: &'a Header,
    /// The whole file.
    pub(super) bytes: &'a [u8],
}

impl<'a> Fields<'a> {
    pub(super) fn error(&self, key: &str, reason: impl Into<String>) -> CheckpointError {
        CheckpointError::Invalid { file: self.path.to_owned(), field: format!("metadata {key}"), reason: reason.into() }
    }

    /// The value of `key` as what `convert` makes of it; `None` where it's absent.
    pub(super) fn get<T>(
        &self,
        key: &str,
        want: &str,
        convert: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, CheckpointError> {
        match self.header.metadata.get(key) {
            None => Ok(None),
            Some(value) => match convert(value) {
                Some(v) => Ok(Some(v)),
                None => {
                    Err(self.error(key, format!("want {want}, the file has a value of type {}", value.type_name())))
                }
            },
        }
    }

    fn count(&self, key: &str) -> Result<Option<usize>, CheckpointError> {
        self.get(key, "an integer that is not negative", |v| usize::try_from(v.as_u64()?).ok())
    }

    /// A count that some files give per layer; the layers must agree.
    fn uniform_count(&self, key: &str) -> Result<Option<usize>, CheckpointError> {
        let Some(Value::Array(_)) = self.header.metadata.get(key) else { return self.count(key) };
        let per_layer = self.get(key, "integers", Value::as_u64s)?.unwrap_or_default();
        match per_layer.split_first() {
            Some((&first, rest)) if rest.iter().all(|&v| v == first) => {
                usize::try_from(first).map(Some).map_err(|_| self.error(key, format!("{first} is too large")))
            }
            _ => Err(self.error(key, "differs from layer to layer, which can't be served")),
        }
    }

    pub(super) fn wanted<T>(&self, key: &str, value: Option<T>) -> Result<T, CheckpointError> {
        value.ok_or_else(|| self.error(key, "missing"))
    }

    fn float(&self, key: &str) -> Result<Option<f64>, CheckpointError> {
        self.get(key, "a float", Value::as_f64)
    }

    fn string(&self, key: &str) -> Result<Option<&'a str>, CheckpointError> {
        self.get(key, "a string", Value::as_str)
    }

    pub(super) fn model_config(&self) -> Result<ModelConfig, CheckpointError> {
        let arch = self.wanted("general.architecture", self.string("general.architecture")?)?;
        if let Some(parts @ 2..) = self.count("split.count")? {
            return Err(
                self.error("split.count", format!("one of {parts} parts: merge them (llama-gguf-split --merge)"))
            );
        }
        let key = |suffix: &str| format!("{arch}.{suffix}");
        let count = |suffix| self.count(&key(suffix));
        let wanted = |suffix| self.wanted(&key(suffix), self.uniform_count(&key(suffix))?);

        let hidden = wanted("embedding_length")?;
        let n_heads = wanted("attention.head_count")?;
        let n_kv_heads = self.uniform_count(&key("attention.head_count_kv"))?.unwrap_or(n_heads);
        let head_dim = match count("attention.key_length")? {
            Some(width) => width,
            None if n_heads > 0 && hidden.is_multiple_of(n_heads) => hidden / n_heads,
            None => {
                let reason = format!("{n_heads} heads don't divide the width of {hidden}");
                return Err(self.error(&key("attention.head_count"), reason));
            }
        };
        if let Some(width) = count("attention.value_length")?.filter(|&w| w != head_dim) {
            let reason = format!("value heads of {width} beside key heads of {head_dim} can't be served");
            return Err(self.error(&key("attention.value_length"), reason));
        }
        let eps_key = key("attention.layer_norm_rms_epsilon");
        let norm_eps = match self.float(&eps_key)? {
            Some(eps) => eps,
            None => self.wanted(&eps_key, self.float(&key("attention.layer_norm_epsilon"))?)?,
        };
        let table = self.header.by_name.get("token_embd.weight").map(|&i| &self.header.tensors[i]);
        let table = table.ok_or_else(|| CheckpointError::Tensor {
            file: self.path.to_owned(),
            tensor: "token_embd.weight".to_owned(),
            reason: "missing; every model has it".to_owned(),
        })?;
        if table.cols != hidden {
            let reason = format!("{hidden}, but the embedding table has rows of {}", table.cols);
            return Err(self.error(&key("embedding_length"), reason));
        }
        let dims = count("rope.dimension_count")?.unwrap_or(head_dim);
        let config = ModelConfig {
            architecture: arch.to_owned(),
            name: self.string("general.name")?.unwrap_or(arch).to_owned(),
            n_layers: wanted("block_count")?,
            hidden,
            ffn: wanted("feed_forward_length")?,
            n_heads,
            n_kv_heads,
            head_dim,
            vocab: table.rows,
            context_length: wanted("context_length")?,
            norm_eps: norm_eps as f32,
            rope: RopeConfig {
                theta: self.float(&key("rope.freq_base"))?.unwrap_or(10_000.0),
                dims,
                interleaved: FAMILIES.iter().any(|f| f.architecture == arch && f.interleaved),
                scaling: self.rope_scaling(arch, dims)?,
            },
            tied_embeddings: !self.header.by_name.contains_key("output.weight"),
        };
        config.check(self.header.tensors.len()).map_err(|(field, reason)| CheckpointError::Invalid {
            file: self.path.to_owned(),
            field: field.to_owned(),
            reason,
        })?;
        Ok(config)
    }

    fn rope_scaling(&self, arch: &str, dims: usize) -> Result<RopeScaling, CheckpointError> {
        let key = |suffix: &str| format!("{arch}.rope.scaling.{suffix}");
        let kind = self.string(&key("type"))?;
        let factor = match self.float(&key("factor"))? {
            Some(factor) => Some(factor),
            // As files of the first versions have it.
            None => self.float(&format!("{arch}.rope.scale_linear"))?,
        };
        let factor = factor.filter(|&f| f != 0.0 && f != 1.0);
        if let Some(factors) = self.rope_factors(dims)? {
            return match (kind, factor) {
                (None | Some("none" | "linear"), None) => Ok(RopeScaling::Factors(factors)),
                _ => Err(self.error(&key("type"), "scaling on top of rope_freqs.weight can't be served")),
            };
        }
        match (kind, factor) {
            (Some("none"), _) | (None | Some("linear"), None) => Ok(RopeScaling::None),
            // A factor without a type is linear scaling.
            (None | Some("linear"), Some(factor)) => Ok(RopeScaling::Linear { factor }),
            (Some("yarn"), factor) => {
                let factor = factor.unwrap_or(1.0);
                let original = self.count(&key("original_context_length"))?;
                let original = self.wanted(&key("original_context_length"), original)?;
                // Multiplies the magnitude that follows from the factor, where Hugging Face's replaces it.
                let attention_factor = self
                    .float(&key("attn_factor"))?
                    .filter(|&f| f != 1.0)
                    .map(|f| f * (0.1 * libm::log(factor.max(1.0)) + 1.0));
                Ok(RopeScaling::Yarn {
                    factor,
                    original_context: original as f64,
                    beta_fast: self.float(&key("yarn_beta_fast"))?.unwrap_or(32.0),
                    beta_slow: self.float(&key("yarn_beta_slow"))?.unwrap_or(1.0),
                    attention_factor,
                    truncate: true,
                })
            }
            (Some(other), _) => {
                Err(self.error(&key("type"), format!("{other} can't be served; none, linear and yarn can")))
            }
        }
    }

    /// Llama 3.1 and its like carry their frequencies' divisors as a tensor.
    fn rope_factors(&self, dims: usize) -> Result<Option<Vec<f32>>, CheckpointError> {
        const NAME: &str = "rope_freqs.weight";
        let Some(&index) = self.header.by_name.get(NAME) else { return Ok(None) };
        let tensor = &self.header.tensors[index];
        if (tensor.dtype, tensor.rows, tensor.cols) != (TensorType::F32, 1, dims / 2) {
            return Err(CheckpointError::Tensor {
                file: self.path.to_owned(),
                tensor: NAME.to_owned(),
                reason: format!(
                    "want F32 [{}], the file has {:?} [{}, {}]",
                    dims / 2,
                    tensor.dtype,
                    tensor.rows,
                    tensor.cols
                ),
            });
        }
        let bytes = &self.bytes[self.header.ranges[index].clone()];
        Ok(Some(bytes.as_chunks().0.iter().map(|&c| f32::from_le_bytes(c)).collect()))
    }
}
