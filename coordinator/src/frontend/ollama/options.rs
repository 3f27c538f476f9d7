//! `options`: what Ollama calls the parameters of a generation.

use serde_json::Value;

use crate::frontend::{
    error::ApiError,
    fields::{Fields, FromJson, Integer, Unsupported, kind},
    params::RawParams,
};

fn is_zero(value: &Value) -> bool {
    value.as_f64() == Some(0.0)
}

fn is_one(value: &Value) -> bool {
    value.as_f64() == Some(1.0)
}

fn is_true(value: &Value) -> bool {
    *value == Value::Bool(true)
}

fn is_false(value: &Value) -> bool {
    *value == Value::Bool(false)
}

/// What has no implementation, with the value that asks for nothing.
static UNSUPPORTED: &[Unsupported] = &[
    ("typical_p", is_one),
    ("tfs_z", is_one),
    ("mirostat", is_zero),
    ("penalize_newline", is_true),
    ("vocab_only", is_false),
    ("logits_all", is_false),
    ("embedding_only", is_false),
];

/// How the machine is to do it, not what: here its owner says that.
static OF_THE_MACHINE: &[&str] = &[
    "numa",
    "num_batch",
    "num_gpu",
    "main_gpu",
    "num_thread",
    "num_gqa",
    "use_mmap",
    "use_mlock",
    "low_vram",
    "f16_kv",
    // Of a sampler that is off.
    "mirostat_tau",
    "mirostat_eta",
    // Of a context that moves on, which this one does not.
    "num_keep",
];

/// `stop`: one string, or several.
struct Stops(Vec<String>);

impl FromJson for Stops {
    fn from_json(value: Value, at: &str) -> Result<Self, ApiError> {
        match value {
            Value::String(one) => Ok(Self(vec![one])),
            Value::Array(_) => FromJson::from_json(value, at).map(Self),
            other => Err(ApiError::wrong_type(at, "a string or a list of strings", kind(&other))),
        }
    }
}

/// Reads them. Unset ones are Ollama's defaults.
pub fn take(options: Option<Fields>, context: usize) -> Result<RawParams, ApiError> {
    let mut raw = RawParams { temperature: Some(0.8), top_k: Some(40), top_p: Some(0.9), ..RawParams::default() };
    let Some(mut options) = options else { return Ok(raw) };
    raw.temperature = options.take("temperature")?.or(raw.temperature);
    raw.top_k = options.take("top_k")?.or(raw.top_k);
    raw.top_p = options.take("top_p")?.or(raw.top_p);
    raw.min_p = options.take("min_p")?;
    raw.seed = options.take("seed")?;
    raw.stop = options.take::<Stops>("stop")?.map(|stops| stops.0).unwrap_or_default();
    raw.repetition_penalty = options.take("repeat_penalty")?;
    raw.presence_penalty = options.take("presence_penalty")?;
    raw.frequency_penalty = options.take("frequency_penalty")?;
    raw.max_tokens_field = "num_predict";
    // -1 is no limit, -2 what the context has room for: the same here.
    raw.max_tokens = options.take::<Integer>("num_predict")?.filter(|n| !matches!(n, -1 | -2));
    if let Some(asked) = options.take::<Integer>("num_ctx")? {
        let path = options.path("num_ctx");
        if asked < 1 || asked > context as Integer {
            let reason = format!("must be 1 to {context}, the context that is served; raise --max-model-len for more");
            return Err(ApiError::invalid(&path, reason));
        }
        if raw.max_tokens.is_some_and(|n| n > asked) {
            return Err(ApiError::invalid(&path, "is less than 'num_predict'"));
        }
    }
    let window = options.take::<Integer>("repeat_last_n")?;
    let is_penalized = raw.repetition_penalty.is_some_and(|p| p != 1.0)
        || [raw.presence_penalty, raw.frequency_penalty].iter().flatten().any(|p| *p != 0.0);
    if is_penalized && window.is_some_and(|n| n != -1) {
        let reason = "must be -1: penalties look at all tokens";
        return Err(ApiError::invalid(&options.path("repeat_last_n"), reason));
    }
    for name in OF_THE_MACHINE {
        options.take::<Value>(name)?;
    }
    options.refuse(UNSUPPORTED)?;
    options.finish()?;
    Ok(raw)
}

/// Names of parameters as this API has them, for errors.
pub fn renamed(error: ApiError) -> ApiError {
    let name = match error.param() {
        Some("repetition_penalty") => "repeat_penalty",
        Some(
            name @ ("temperature" | "top_k" | "top_p" | "min_p" | "seed" | "stop" | "presence_penalty"
            | "frequency_penalty" | "num_predict"),
        ) => name,
        _ => return error,
    };
    let reason = error.message().split_once("' ").map_or(error.message(), |(_, reason)| reason);
    ApiError::invalid(&format!("options.{name}"), reason)
}
