//! How a GGUF file's makers want it sampled.

use super::{config::Fields, value::Value};
use crate::checkpoint::{CheckpointError, generation::GenerationDefaults};

impl Fields<'_> {
    /// What `general.sampling.*` says.
    pub(super) fn generation_defaults(&self) -> Result<GenerationDefaults, CheckpointError> {
        let float = |key: &str| Ok(self.get(key, "a float", Value::as_f64)?.map(|x| x as f32));
        let top_k = |v: &Value| match v.as_u64() {
            Some(k) => u32::try_from(k).ok(),
            // Negative ones keep all tokens.
            None => matches!(v, Value::I8(_) | Value::I16(_) | Value::I32(_) | Value::I64(_)).then_some(0),
        };
        let defaults = GenerationDefaults {
            temperature: float("general.sampling.temp")?,
            top_k: self.get("general.sampling.top_k", "an integer", top_k)?,
            top_p: float("general.sampling.top_p")?,
            min_p: float("general.sampling.min_p")?,
            repetition_penalty: float("general.sampling.penalty_repeat")?,
            max_new_tokens: None,
        };
        defaults.checked(|field, reason| self.error(&format!("general.sampling.* ({field})"), reason))
    }
}
