//! Messages of Anthropic's clients, as chat templates know them.

use serde_json::{Value, json};

use super::ask::is_empty;
use crate::frontend::{
    error::ApiError,
    fields::{Fields, FromJson, kind},
};

/// What was said so far. Neighbours of one role are one turn.
#[derive(Default)]
pub struct Turns(Vec<Value>);

/// What one message says.
#[derive(Default)]
struct Said {
    texts: Vec<String>,
    thoughts: Vec<String>,
    calls: Vec<Value>,
    /// Of calls: they come before the text.
    results: Vec<Value>,
}

impl Turns {
    /// Adds the system's words.
    pub fn add_system(&mut self, system: Value) -> Result<(), ApiError> {
        let text = text_of(system, "system")?;
        self.0.push(json!({"role": "system", "content": text}));
        Ok(())
    }

    /// Adds a message.
    pub fn add(&mut self, mut message: Fields) -> Result<(), ApiError> {
        let role: String = message.require("role")?;
        if !matches!(role.as_str(), "user" | "assistant") {
            return Err(ApiError::invalid(&message.path("role"), "must be user or assistant"));
        }
        let at = message.path("content");
        let mut said = Said::default();
        match message.require::<Value>("content")? {
            Value::String(text) => said.texts.push(text),
            blocks @ Value::Array(_) => {
                for block in Vec::<Fields>::from_json(blocks, &at)? {
                    said.add(&role, block)?;
                }
            }
            other => return Err(ApiError::wrong_type(&at, "a string or a list of blocks", kind(&other))),
        }
        message.finish()?;
        self.0.append(&mut said.results);
        self.say(&role, said);
        Ok(())
    }

    fn say(&mut self, role: &str, said: Said) {
        let content = said.texts.join("\n");
        let has_nothing = said.texts.is_empty() && said.calls.is_empty() && said.thoughts.is_empty();
        if has_nothing && self.0.last().is_some_and(|last| last["role"] == "tool") {
            // Results alone are a turn.
            return;
        }
        match self.0.last_mut().filter(|last| last["role"] == role && last.get("tool_calls").is_none()) {
            Some(last) => {
                last["content"] = format!("{}\n{content}", last["content"].as_str().unwrap_or_default()).into();
            }
            None => self.0.push(json!({"role": role, "content": content})),
        }
        let Some(last) = self.0.last_mut() else { return };
        if !said.thoughts.is_empty() {
            last["reasoning_content"] = said.thoughts.join("\n").into();
        }
        if !said.calls.is_empty() {
            last["tool_calls"] = said.calls.into();
        }
    }

    /// All of them.
    pub fn into_messages(self) -> Vec<Value> {
        self.0
    }
}

impl Said {
    fn add(&mut self, role: &str, mut block: Fields) -> Result<(), ApiError> {
        let kind: String = block.require("type")?;
        match (kind.as_str(), role) {
            ("text", _) => {
                self.texts.push(block.require("text")?);
                block.refuse(&[("citations", is_empty)])?;
            }
            ("thinking", "assistant") => {
                self.thoughts.push(block.require("thinking")?);
                // Ours are empty; others' are nothing that could be checked here.
                block.take::<String>("signature")?;
            }
            ("tool_use", "assistant") => {
                let (id, name) = (block.require::<String>("id")?, block.require::<String>("name")?);
                let input = block.require::<Fields>("input")?.into_entries();
                let function = json!({"name": name, "arguments": input});
                self.calls.push(json!({"id": id, "type": "function", "function": function}));
            }
            ("tool_result", "user") => {
                let id: String = block.require("tool_use_id")?;
                let at = block.path("content");
                let text = block.take::<Value>("content")?.map(|content| text_of(content, &at)).transpose()?;
                let mut text = text.unwrap_or_default();
                if block.flag("is_error")? {
                    // Templates have no other place for it.
                    text = format!("Error: {text}");
                }
                self.results.push(json!({"role": "tool", "tool_call_id": id, "content": text}));
            }
            _ => {
                let reason = format!("must be text, or what a message of the role {role} has of tools and thoughts");
                return Err(ApiError::invalid(&block.path("type"), reason));
            }
        }
        block.take::<Fields>("cache_control")?;
        block.finish()
    }
}

/// A content: a text, or blocks of text, which are joined by newlines.
pub fn text_of(content: Value, at: &str) -> Result<String, ApiError> {
    match content {
        Value::String(text) => Ok(text),
        Value::Array(_) => {
            let blocks = Vec::<Fields>::from_json(content, at)?;
            Ok(blocks.into_iter().map(text_block).collect::<Result<Vec<_>, _>>()?.join("\n"))
        }
        other => Err(ApiError::wrong_type(at, "a string or a list of text blocks", kind(&other))),
    }
}

fn text_block(mut block: Fields) -> Result<String, ApiError> {
    let kind: String = block.require("type")?;
    if kind != "text" {
        return Err(ApiError::invalid(&block.path("type"), "must be \"text\": the model takes nothing else"));
    }
    let text = block.require("text")?;
    block.take::<Fields>("cache_control")?;
    block.refuse(&[("citations", is_empty)])?;
    block.finish()?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_and_results_become_what_templates_know() {
        let mut turns = Turns::default();
        let messages = json!([
            {"role": "user", "content": "weather?"},
            {"role": "assistant", "content": [
                {"type": "thinking", "thinking": "hm", "signature": ""},
                {"type": "text", "text": "I look."},
                {"type": "tool_use", "id": "c1", "name": "f", "input": {"city": "Paris"}},
                {"type": "tool_use", "id": "c2", "name": "f", "input": {}},
            ]},
            {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": "sunny"}]},
                {"type": "tool_result", "tool_use_id": "c2", "content": "no city", "is_error": true},
                {"type": "text", "text": "and?", "cache_control": {"type": "ephemeral"}},
            ]},
        ]);
        for message in Vec::<Fields>::from_json(messages, "messages").unwrap() {
            turns.add(message).unwrap();
        }
        let call = |id: &str, input: Value| json!({"id": id, "type": "function", "function": {"name": "f", "arguments": input}});
        assert_eq!(
            Value::from(turns.into_messages()),
            json!([
                {"role": "user", "content": "weather?"},
                {"role": "assistant", "content": "I look.", "reasoning_content": "hm",
                 "tool_calls": [call("c1", json!({"city": "Paris"})), call("c2", json!({}))]},
                {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
                {"role": "tool", "tool_call_id": "c2", "content": "Error: no city"},
                {"role": "user", "content": "and?"},
            ])
        );
    }
}
