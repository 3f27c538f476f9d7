//! Fields of OpenAI's and vLLM's APIs that do nothing here. Nothing is accepted and then ignored: a field either has no
//! effect by its nature (a label for somebody's records), or may only have the value that asks for nothing.

use serde_json::Value;

use super::{
    error::ApiError,
    fields::{Fields, Integer, Unsupported},
    generation::UsageObject,
};
use crate::request::Usage;

fn never(_: &Value) -> bool {
    false
}

fn is_false(value: &Value) -> bool {
    *value == Value::Bool(false)
}

fn is_true(value: &Value) -> bool {
    *value == Value::Bool(true)
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Array(items) => items.is_empty(),
        Value::Object(map) => map.is_empty(),
        _ => false,
    }
}

fn is_one(value: &Value) -> bool {
    value.as_f64() == Some(1.0)
}

fn is_plain_tier(value: &Value) -> bool {
    matches!(value.as_str(), Some("auto" | "default"))
}

fn is_no_choice(value: &Value) -> bool {
    matches!(value.as_str(), Some("none" | "auto"))
}

fn is_text_only(value: &Value) -> bool {
    *value == Value::from(vec!["text"])
}

/// Of both endpoints.
static UNSUPPORTED: &[Unsupported] = &[
    ("store", is_false),
    ("service_tier", is_plain_tier),
    ("use_beam_search", is_false),
    ("length_penalty", is_one),
    ("early_stopping", is_false),
    ("spaces_between_special_tokens", is_true),
    ("logits_processors", is_empty),
    ("kv_transfer_params", never),
];

/// Of chat completions.
static UNSUPPORTED_IN_CHAT: &[Unsupported] = &[
    ("modalities", is_text_only),
    ("audio", never),
    ("prediction", never),
    ("web_search_options", never),
    ("verbosity", never),
    ("best_of", is_one),
    ("mm_processor_kwargs", is_empty),
];

/// Of legacy completions.
static UNSUPPORTED_IN_COMPLETIONS: &[Unsupported] = &[("suffix", never)];

/// Takes the labels and what both endpoints lack.
fn take_shared(fields: &mut Fields) -> Result<(), ApiError> {
    fields.take::<String>("user")?;
    fields.take::<String>("safety_identifier")?;
    fields.take::<String>("prompt_cache_key")?;
    fields.take::<Fields>("metadata")?;
    fields.refuse(UNSUPPORTED)
}

/// Takes what chat completions lack.
pub fn take_of_chat(fields: &mut Fields) -> Result<(), ApiError> {
    take_shared(fields)?;
    for (name, is_neutral) in [("functions", is_empty as fn(&Value) -> bool), ("function_call", is_no_choice)] {
        if fields.take::<Value>(name)?.is_some_and(|value| !is_neutral(&value)) {
            return Err(ApiError::invalid(name, "is not possible: send 'tools' and 'tool_choice' instead"));
        }
    }
    fields.refuse(UNSUPPORTED_IN_CHAT)
}

/// Takes what legacy completions lack.
pub fn take_of_completions(fields: &mut Fields) -> Result<(), ApiError> {
    take_shared(fields)?;
    fields.refuse(UNSUPPORTED_IN_COMPLETIONS)
}

/// Longest `request_id`.
const LONGEST_REQUEST_ID: usize = 128;

/// Takes `request_id`: what stands in the answer's name instead of a made-up one.
pub fn take_request_id(fields: &mut Fields) -> Result<Option<String>, ApiError> {
    let name = fields.take::<String>("request_id")?;
    if name.as_ref().is_some_and(|name| {
        name.is_empty() || name.len() > LONGEST_REQUEST_ID || !name.bytes().all(|byte| byte.is_ascii_graphic())
    }) {
        let reason = format!("must be 1 to {LONGEST_REQUEST_ID} visible ASCII characters");
        return Err(ApiError::invalid("request_id", reason));
    }
    Ok(name)
}

/// How an answer travels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Delivery {
    /// In one piece.
    Whole,
    /// In events, as it is made.
    Streamed(StreamedUsage),
}

/// Whether a stream ends with a chunk that counts tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StreamedUsage {
    /// It does.
    Included,
    /// It does, and every chunk counts the tokens of its choice so far.
    Continuous,
    /// It does not.
    Omitted,
}

impl Delivery {
    /// Takes `stream` and `stream_options`.
    pub fn take(fields: &mut Fields) -> Result<Self, ApiError> {
        let is_streamed = fields.flag("stream")?;
        let options = fields.take::<Fields>("stream_options")?;
        if options.is_some() && !is_streamed {
            return Err(ApiError::invalid("stream_options", "is only possible when 'stream' is true"));
        }
        let Some(mut options) = options else {
            return Ok(if is_streamed { Self::Streamed(StreamedUsage::Omitted) } else { Self::Whole });
        };
        let include = options.flag("include_usage")?;
        let is_continuous = options.flag("continuous_usage_stats")?;
        options.refuse(&[("include_obfuscation", is_false)])?;
        let path = options.path("continuous_usage_stats");
        options.finish()?;
        match (include, is_continuous) {
            (true, true) => Ok(Self::Streamed(StreamedUsage::Continuous)),
            (true, false) => Ok(Self::Streamed(StreamedUsage::Included)),
            (false, false) => Ok(Self::Streamed(StreamedUsage::Omitted)),
            (false, true) => Err(ApiError::invalid(&path, "is only possible together with 'include_usage'")),
        }
    }

    /// Whether a last chunk counts tokens.
    pub fn usage(self) -> StreamedUsage {
        match self {
            Self::Whole => StreamedUsage::Omitted,
            Self::Streamed(usage) => usage,
        }
    }
}

impl StreamedUsage {
    /// `usage` of a chunk that is not the last: nothing, null, or the counts of its choice so far.
    pub fn of_chunk(self, prompt_tokens: usize, completion_tokens: usize) -> Option<Value> {
        let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        match self {
            Self::Omitted => None,
            Self::Included => Some(Value::Null),
            Self::Continuous => {
                let usage = Usage {
                    prompt_tokens: count(prompt_tokens),
                    completion_tokens: count(completion_tokens),
                    cached_tokens: 0,
                };
                serde_json::to_value(UsageObject::without_details(usage)).ok()
            }
        }
    }
}

/// Takes `prompt_logprobs`' and others' precondition: scores of prompts are not streamed.
pub fn check_prompt_logprobs(prompt_logprobs: Option<Integer>, delivery: Delivery) -> Result<(), ApiError> {
    if prompt_logprobs.is_some() && delivery != Delivery::Whole {
        return Err(ApiError::invalid("prompt_logprobs", "is not possible when 'stream' is true"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_field_is_listed_twice() {
        for special in [UNSUPPORTED_IN_CHAT, UNSUPPORTED_IN_COMPLETIONS] {
            let mut names: Vec<_> = UNSUPPORTED.iter().chain(special).map(|(name, _)| name).collect();
            let n_listed = names.len();
            names.sort();
            names.dedup();
            assert_eq!(names.len(), n_listed);
        }
    }
}
