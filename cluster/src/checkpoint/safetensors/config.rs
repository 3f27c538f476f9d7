//! The model's shape from `config.json`.

use std::path::Path;

use serde_json::{Map, Value};

use crate::{
    checkpoint::CheckpointError,
    model_config::{ModelConfig, RopeConfig, RopeScaling},
    rope::yarn_magnitude,
};

/// What the tensors say.
pub(super) struct Tensors {
    pub(super) count: usize,
    /// Rows and columns of the embedding table.
    pub(super) embedding: (usize, usize),
    /// Whether there is an output matrix.
    pub(super) has_output: bool,
}

/// What `config.json` leaves unsaid about a family. A family that is not listed is read as plainly as possible.
struct Family {
    model_type: &'static str,
    /// GGUF's name.
    architecture: &'static str,
    /// How wide attention reaches, if not over the whole context.
    window: fn(&Fields<'_>) -> Result<Option<usize>, CheckpointError>,
}

static FAMILIES: &[Family] = &[
    Family { model_type: "llama", architecture: "llama", window: |_| Ok(None) },
    Family { model_type: "mistral", architecture: "llama", window: |fields| fields.count("sliding_window") },
    Family {
        model_type: "qwen2",
        architecture: "qwen2",
        window: |fields| {
            // A width without this switch means nothing.
            if fields.flag("use_sliding_window")? == Some(true) { fields.count("sliding_window") } else { Ok(None) }
        },
    },
];

/// Typed access to a JSON object; null is the same as absent.
struct Fields<'a> {
    path: &'a Path,
    /// Name of the object inside the file, with a dot, or empty.
    prefix: &'static str,
    object: &'a Map<String, Value>,
}

impl<'a> Fields<'a> {
    fn error(&self, key: &str, reason: impl Into<String>) -> CheckpointError {
        CheckpointError::Invalid {
            file: self.path.to_owned(),
            field: format!("{}{key}", self.prefix),
            reason: reason.into(),
        }
    }

    fn get<T>(
        &self,
        key: &str,
        want: &str,
        convert: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, CheckpointError> {
        match self.object.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => convert(value).map(Some).ok_or_else(|| {
                let shown: String = value.to_string().chars().take(80).collect();
                self.error(key, format!("want {want}, got {shown}"))
            }),
        }
    }

    fn count(&self, key: &str) -> Result<Option<usize>, CheckpointError> {
        self.get(key, "an integer that is not negative", |v| usize::try_from(v.as_u64()?).ok())
    }

    fn float(&self, key: &str) -> Result<Option<f64>, CheckpointError> {
        self.get(key, "a number", Value::as_f64)
    }

    fn string(&self, key: &str) -> Result<Option<&'a str>, CheckpointError> {
        self.get(key, "a string", Value::as_str)
    }

    fn flag(&self, key: &str) -> Result<Option<bool>, CheckpointError> {
        self.get(key, "true or false", Value::as_bool)
    }

    fn inner(&self, key: &str, prefix: &'static str) -> Result<Option<Fields<'a>>, CheckpointError> {
        let object = self.get(key, "an object", Value::as_object)?;
        Ok(object.map(|object| Fields { path: self.path, prefix, object }))
    }

    fn wanted<T>(&self, key: &str, value: Option<T>) -> Result<T, CheckpointError> {
        value.ok_or_else(|| self.error(key, "missing"))
    }

    fn wanted_count(&self, key: &str) -> Result<usize, CheckpointError> {
        self.wanted(key, self.count(key)?)
    }

    fn wanted_float(&self, key: &str) -> Result<f64, CheckpointError> {
        self.wanted(key, self.float(key)?)
    }
}

/// Reads `config.json`, whose text is `json`. `name` is the model's.
pub(super) fn read(path: &Path, json: &[u8], name: String, tensors: &Tensors) -> Result<ModelConfig, CheckpointError> {
    let object: Map<String, Value> = serde_json::from_slice(json).map_err(|e| CheckpointError::Invalid {
        file: path.to_owned(),
        field: "config".to_owned(),
        reason: e.to_string(),
    })?;
    let fields = Fields { path, prefix: "", object: &object };
    if let Some(quantization) = fields.inner("quantization_config", "quantization_config.")? {
        let method = quantization.string("quant_method")?.unwrap_or("unknown");
        return Err(fields.error("quantization_config", format!("weights quantized by {method} can't be read")));
    }
    let model_type = fields.wanted("model_type", fields.string("model_type")?)?;
    let family = FAMILIES.iter().find(|f| f.model_type == model_type);

    let hidden = fields.wanted_count("hidden_size")?;
    let n_heads = fields.wanted_count("num_attention_heads")?;
    let head_dim = match fields.count("head_dim")? {
        Some(width) => width,
        None if n_heads > 0 && hidden.is_multiple_of(n_heads) => hidden / n_heads,
        None => {
            let reason = format!("{n_heads} heads don't divide the width of {hidden}, and there's no head_dim");
            return Err(fields.error("num_attention_heads", reason));
        }
    };
    let norm_eps = match fields.float("rms_norm_eps")? {
        Some(eps) => eps,
        None => fields.wanted("rms_norm_eps", fields.float("layer_norm_eps")?)?,
    };
    let (vocab, width) = tensors.embedding;
    if width != hidden {
        return Err(fields.error("hidden_size", format!("{hidden}, but the embedding table has rows of {width}")));
    }
    let mut context_length = fields.wanted_count("max_position_embeddings")?;
    if let Some(family) = family {
        if let Some(activation) = fields.string("hidden_act")?.filter(|&a| a != "silu" && a != "swish") {
            return Err(fields.error("hidden_act", format!("{activation}; {model_type} models have silu")));
        }
        if let Some(window) = (family.window)(&fields)?.filter(|&w| w < context_length) {
            // Up to the window's width, attention over all positions is the same thing.
            tracing::warn!(
                window,
                context_length,
                "attention windows are not served: the context ends with the window"
            );
            context_length = window;
        }
    }
    let said_tied = fields.flag("tie_word_embeddings")? == Some(true);
    let config = ModelConfig {
        architecture: family.map_or(model_type, |f| f.architecture).to_owned(),
        name,
        n_layers: fields.wanted_count("num_hidden_layers")?,
        hidden,
        ffn: fields.wanted_count("intermediate_size")?,
        n_heads,
        n_kv_heads: fields.count("num_key_value_heads")?.unwrap_or(n_heads),
        head_dim,
        vocab,
        context_length,
        norm_eps: norm_eps as f32,
        rope: rope(&fields, head_dim)?,
        tied_embeddings: said_tied || !tensors.has_output,
    };
    config.check(tensors.count).map_err(|(field, reason)| fields.error(field, reason))?;
    Ok(config)
}

/// `rope_parameters` as transformers 5 writes them, or `rope_scaling` and `rope_theta` of all versions before.
fn rope(fields: &Fields<'_>, head_dim: usize) -> Result<RopeConfig, CheckpointError> {
    let parameters = match fields.inner("rope_parameters", "rope_parameters.")? {
        Some(parameters) => Some(parameters),
        None => fields.inner("rope_scaling", "rope_scaling.")?,
    };
    // Either may be inside or outside, whatever the version.
    let float = |key: &str| match parameters.as_ref().map(|p| p.float(key)).transpose()?.flatten() {
        Some(value) => Ok(Some(value)),
        None => fields.float(key),
    };
    let theta = float("rope_theta")?.unwrap_or(10_000.0);
    let rotary = float("partial_rotary_factor")?.unwrap_or(1.0);
    if !(rotary > 0.0 && rotary <= 1.0) {
        return Err(fields.error("partial_rotary_factor", format!("{rotary}; want a number up to 1")));
    }
    let scaling = parameters.map_or(Ok(RopeScaling::None), |p| scaling(fields, &p))?;
    Ok(RopeConfig { theta, dims: (head_dim as f64 * rotary) as usize, interleaved: false, scaling })
}

fn scaling(fields: &Fields<'_>, parameters: &Fields<'_>) -> Result<RopeScaling, CheckpointError> {
    let kind = match parameters.string("rope_type")? {
        Some(kind) => kind,
        None => parameters.string("type")?.unwrap_or("default"),
    };
    let original_context = || match parameters.float("original_max_position_embeddings")? {
        Some(length) => Ok(length),
        None => match fields.float("original_max_position_embeddings")? {
            Some(length) => Ok(length),
            None => fields.wanted_float("max_position_embeddings"),
        },
    };
    match kind {
        "default" => Ok(RopeScaling::None),
        "linear" => Ok(RopeScaling::Linear { factor: parameters.wanted_float("factor")? }),
        "llama3" => Ok(RopeScaling::Llama3 {
            factor: parameters.wanted_float("factor")?,
            low_freq_factor: parameters.wanted_float("low_freq_factor")?,
            high_freq_factor: parameters.wanted_float("high_freq_factor")?,
            original_context: original_context()?,
        }),
        "yarn" => {
            let original_context = original_context()?;
            let factor = match parameters.float("factor")? {
                Some(factor) => factor,
                None => fields.wanted_float("max_position_embeddings")? / original_context,
            };
            let mscale = parameters.float("mscale")?.filter(|&m| m != 0.0);
            let mscale_all_dim = parameters.float("mscale_all_dim")?.filter(|&m| m != 0.0);
            let attention_factor = match (parameters.float("attention_factor")?, mscale, mscale_all_dim) {
                (Some(given), _, _) => Some(given),
                (None, Some(one), Some(all)) => Some(yarn_magnitude(factor, one) / yarn_magnitude(factor, all)),
                (None, _, _) => None,
            };
            // As in Python's `or`, 0 means the default.
            let or_default = |key: &str, default: f64| {
                Ok::<_, CheckpointError>(parameters.float(key)?.filter(|&v| v != 0.0).unwrap_or(default))
            };
            Ok(RopeScaling::Yarn {
                factor,
                original_context,
                beta_fast: or_default("beta_fast", 32.0)?,
                beta_slow: or_default("beta_slow", 1.0)?,
                attention_factor,
                truncate: parameters.flag("truncate")?.unwrap_or(true),
            })
        }
        other => {
            Err(parameters.error("rope_type", format!("{other} can't be served; default, linear, llama3 and yarn can")))
        }
    }
}
