//! What was said so far, as items.

use serde_json::{Value, json};

use super::ask::is_empty;
use crate::frontend::{
    error::ApiError,
    fields::{Fields, FromJson, kind},
};

/// `input`: a text, or what was said so far.
pub fn input(input: Value, messages: &mut Vec<Value>) -> Result<(), ApiError> {
    match input {
        Value::String(text) => messages.push(json!({"role": "user", "content": text})),
        Value::Array(_) => {
            let items = Vec::<Fields>::from_json(input, "input")?;
            if items.is_empty() {
                return Err(ApiError::invalid("input", "must not be empty"));
            }
            let mut thought = None;
            for item in items {
                add(item, messages, &mut thought)?;
            }
        }
        other => return Err(ApiError::wrong_type("input", "a string or a list of items", kind(&other))),
    }
    Ok(())
}

/// Adds an item. Thoughts wait for what the model said then.
fn add(mut item: Fields, messages: &mut Vec<Value>, thought: &mut Option<String>) -> Result<(), ApiError> {
    let kind = item.take::<String>("type")?.unwrap_or_else(|| "message".to_owned());
    let mut said = match kind.as_str() {
        "message" => message(item)?,
        "function_call" => {
            let call = function_call(item)?;
            let is_same_turn = |last: &&mut Value| last["role"] == "assistant" && thought.is_none();
            if let Some(last) = messages.last_mut().filter(is_same_turn) {
                match last["tool_calls"].as_array_mut() {
                    Some(calls) => calls.push(call),
                    None => last["tool_calls"] = json!([call]),
                }
                return Ok(());
            }
            json!({"role": "assistant", "content": "", "tool_calls": [call]})
        }
        "function_call_output" => {
            let (id, at) = (item.require::<String>("call_id")?, item.path("output"));
            let output = text(item.require("output")?, &at)?;
            repeated(item)?;
            json!({"role": "tool", "tool_call_id": id, "content": output})
        }
        "reasoning" => {
            *thought = reasoning(item)?;
            return Ok(());
        }
        _ => {
            let reason =
                "must be message, function_call, function_call_output or reasoning: there are no other items here";
            return Err(ApiError::invalid(&item.path("type"), reason));
        }
    };
    if said["role"] == "assistant"
        && let Some(thought) = thought.take()
    {
        said["reasoning_content"] = thought.into();
    }
    messages.push(said);
    Ok(())
}

/// Takes what clients repeat of earlier answers.
fn repeated(mut item: Fields) -> Result<(), ApiError> {
    item.take::<String>("id")?;
    item.take::<String>("status")?;
    item.finish()
}

fn function_call(mut item: Fields) -> Result<Value, ApiError> {
    let (id, name) = (item.require::<String>("call_id")?, item.require::<String>("name")?);
    let written: String = item.require("arguments")?;
    repeated(item)?;
    // Templates want an object.
    let arguments = serde_json::from_str(&written).unwrap_or(Value::String(written));
    Ok(json!({"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}))
}

fn reasoning(mut item: Fields) -> Result<Option<String>, ApiError> {
    let mut texts = Vec::new();
    for (name, kind) in [("summary", "summary_text"), ("content", "reasoning_text")] {
        for mut part in item.take::<Vec<Fields>>(name)?.unwrap_or_default() {
            if part.require::<String>("type")? != kind {
                return Err(ApiError::invalid(&part.path("type"), format!("must be \"{kind}\"")));
            }
            let text: String = part.require("text")?;
            part.finish()?;
            texts.push(text);
        }
    }
    item.refuse(&[("encrypted_content", |_| false)])?;
    repeated(item)?;
    Ok(Some(texts.join("\n")).filter(|text| !text.is_empty()))
}

fn message(mut item: Fields) -> Result<Value, ApiError> {
    let role: String = item.require("role")?;
    let template_role = match role.as_str() {
        "developer" => "system",
        "system" | "user" | "assistant" => role.as_str(),
        _ => {
            let reason = "must be one of system, developer, user and assistant";
            return Err(ApiError::invalid(&item.path("role"), reason));
        }
    };
    let at = item.path("content");
    let content = text(item.require("content")?, &at)?;
    repeated(item)?;
    Ok(json!({"role": template_role, "content": content}))
}

/// A text, or parts of one, which are joined by newlines.
fn text(content: Value, at: &str) -> Result<String, ApiError> {
    match content {
        Value::String(text) => Ok(text),
        parts @ Value::Array(_) => {
            let parts = Vec::<Fields>::from_json(parts, at)?;
            Ok(parts.into_iter().map(part).collect::<Result<Vec<_>, _>>()?.join("\n"))
        }
        other => Err(ApiError::wrong_type(at, "a string or a list of text parts", kind(&other))),
    }
}

fn part(mut part: Fields) -> Result<String, ApiError> {
    let kind: String = part.require("type")?;
    match kind.as_str() {
        "input_text" | "text" => {}
        "output_text" => {
            part.take::<Vec<Value>>("logprobs")?;
            part.refuse(&[("annotations", is_empty)])?;
        }
        _ => {
            let reason = "must be \"input_text\" or \"output_text\": the model takes nothing else";
            return Err(ApiError::invalid(&part.path("type"), reason));
        }
    }
    let text = part.require("text")?;
    part.finish()?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_and_results_become_what_templates_know() {
        let items = json!([
            {"role": "user", "content": "weather?"},
            {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
            {"type": "function_call", "id": "fc_1", "call_id": "c1", "name": "f", "arguments": "{\"city\": \"Paris\"}",
             "status": "completed"},
            {"type": "function_call", "call_id": "c2", "name": "f", "arguments": "{"},
            {"type": "function_call_output", "call_id": "c1", "output": "sunny"},
            {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "what?"}]},
        ]);
        let mut messages = Vec::new();
        input(items, &mut messages).unwrap();
        let call = |id: &str, arguments: Value| json!({"id": id, "type": "function", "function": {"name": "f", "arguments": arguments}});
        assert_eq!(
            Value::from(messages),
            json!([
                {"role": "user", "content": "weather?"},
                {"role": "assistant", "content": "", "reasoning_content": "hm",
                 "tool_calls": [call("c1", json!({"city": "Paris"})), call("c2", json!("{"))]},
                {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
                {"role": "tool", "tool_call_id": "c2", "content": "what?"},
            ])
        );
    }
}
