//! Chat messages, from OpenAI's shapes to what chat templates expect.

use serde_json::{Map, Value, json};

use super::{
    error::ApiError,
    fields::{Fields, FromJson, kind},
};

/// Most messages of one request.
const MAX_MESSAGES: usize = 65_536;

/// Checks messages: `role`, `content` (a string, or text parts, which are joined by newlines), `name`, and of
/// assistants' and tools' messages what earlier tool calls left behind.
pub fn parse(messages: Vec<Value>) -> Result<Vec<Value>, ApiError> {
    if messages.is_empty() || messages.len() > MAX_MESSAGES {
        return Err(ApiError::invalid("messages", format!("must have 1 to {MAX_MESSAGES} messages")));
    }
    let message = |(index, value)| parse_one(Fields::from_json(value, &format!("messages[{index}]"))?);
    messages.into_iter().enumerate().map(message).collect()
}

fn parse_one(mut fields: Fields) -> Result<Value, ApiError> {
    let role: String = fields.require("role")?;
    // Templates don't know OpenAI's newer word for system.
    let template_role = match role.as_str() {
        "developer" => "system",
        "system" | "user" | "assistant" | "tool" => role.as_str(),
        _ => {
            let reason = "must be one of system, developer, user, assistant and tool";
            return Err(ApiError::invalid(&fields.path("role"), reason));
        }
    };
    let mut message = Map::new();
    message.insert("role".to_owned(), Value::from(template_role));
    let content = fields.take::<Value>("content")?.map(|c| text(c, &fields.path("content"))).transpose()?;
    let mut optional = |fields: &mut Fields, name: &str| -> Result<(), ApiError> {
        if let Some(value) = fields.take::<String>(name)? {
            message.insert(name.to_owned(), Value::from(value));
        }
        Ok(())
    };
    optional(&mut fields, "name")?;
    let mut calls_tools = false;
    match role.as_str() {
        "assistant" => {
            optional(&mut fields, "reasoning_content")?;
            // Newer clients' word for it.
            if let Some(thought) = fields.take::<String>("reasoning")? {
                message.entry("reasoning_content").or_insert(thought.into());
            }
            if let Some(calls) = fields.take::<Vec<Fields>>("tool_calls")?.filter(|calls| !calls.is_empty()) {
                let calls = calls.into_iter().map(tool_call).collect::<Result<Vec<_>, _>>()?;
                message.insert("tool_calls".to_owned(), Value::from(calls));
                calls_tools = true;
            }
            // What clients repeat of our answers; only its empty form means nothing.
            let is_empty: fn(&Value) -> bool = |value| value.as_array().is_some_and(Vec::is_empty);
            let never: fn(&Value) -> bool = |_| false;
            let unsupported =
                [("refusal", never), ("audio", never), ("function_call", never), ("annotations", is_empty)];
            fields.refuse(&unsupported)?;
        }
        "tool" => optional(&mut fields, "tool_call_id")?,
        _ => {}
    }
    let content = match content {
        Some(content) => content,
        None if calls_tools => String::new(),
        None => return Err(ApiError::missing(&fields.path("content"))),
    };
    message.insert("content".to_owned(), Value::from(content));
    fields.finish()?;
    Ok(Value::Object(message))
}

fn text(content: Value, at: &str) -> Result<String, ApiError> {
    match content {
        Value::String(text) => Ok(text),
        Value::Array(_) => {
            let parts = Vec::<Fields>::from_json(content, at)?;
            Ok(parts.into_iter().map(text_part).collect::<Result<Vec<_>, _>>()?.join("\n"))
        }
        other => Err(ApiError::wrong_type(at, "a string or a list of text parts", kind(&other))),
    }
}

fn text_part(mut part: Fields) -> Result<String, ApiError> {
    let kind: String = part.require("type")?;
    if kind != "text" {
        return Err(ApiError::invalid(&part.path("type"), "must be \"text\": the model takes nothing else"));
    }
    let text = part.require("text")?;
    part.finish()?;
    Ok(text)
}

/// An earlier call: templates want its arguments as an object, OpenAI's clients send them as a string of JSON.
fn tool_call(mut call: Fields) -> Result<Value, ApiError> {
    let id = call.take::<String>("id")?;
    if call.take::<String>("type")?.is_some_and(|kind| kind != "function") {
        return Err(ApiError::invalid(&call.path("type"), "must be \"function\""));
    }
    let mut function: Fields = call.require("function")?;
    let name: String = function.require("name")?;
    let arguments = match function.take::<Value>("arguments")? {
        Some(Value::String(json)) => serde_json::from_str(&json).unwrap_or(Value::String(json)),
        Some(other @ Value::Object(_)) => other,
        None => Value::Object(Map::new()),
        Some(other) => {
            return Err(ApiError::wrong_type(&function.path("arguments"), "a string of JSON", kind(&other)));
        }
    };
    function.finish()?;
    call.finish()?;
    Ok(json!({"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(message: Value) -> Result<Value, ApiError> {
        parse(vec![message]).map(|mut all| all.remove(0))
    }

    #[test]
    fn roles_and_parts_become_what_templates_know() {
        let parts = json!([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]);
        assert_eq!(
            one(json!({"role": "developer", "content": parts, "name": "x"})).unwrap(),
            json!({"role": "system", "name": "x", "content": "a\nb"})
        );
    }

    #[test]
    fn earlier_tool_calls_are_kept() {
        let call = json!({"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{\"x\": 1}"}});
        let message = json!({"role": "assistant", "content": null, "tool_calls": [call], "refusal": null});
        let parsed = one(message).unwrap();
        assert_eq!(parsed["tool_calls"][0]["function"]["arguments"]["x"], 1);
        assert_eq!(parsed["content"], "");
        let result = one(json!({"role": "tool", "tool_call_id": "c1", "content": "2"})).unwrap();
        assert_eq!(result["tool_call_id"], "c1");
    }

    #[test]
    fn wrong_messages_are_named() {
        let image = json!([{"type": "image_url", "image_url": {"url": "x"}}]);
        for (message, named) in [
            (json!({"content": "x"}), "messages[0].role"),
            (json!({"role": "wizard", "content": "x"}), "messages[0].role"),
            (json!({"role": "user"}), "messages[0].content"),
            (json!({"role": "user", "content": 5}), "messages[0].content"),
            (json!({"role": "user", "content": image}), "messages[0].content[0].type"),
            (json!({"role": "user", "content": [{"type": "text"}]}), "messages[0].content[0].text"),
            (json!({"role": "user", "content": "x", "odd": 1}), "messages[0].odd"),
            (json!({"role": "assistant", "content": null}), "messages[0].content"),
            (json!({"role": "assistant", "content": "x", "refusal": "no"}), "messages[0].refusal"),
            (json!({"role": "assistant", "tool_calls": [{"function": {}}]}), "messages[0].tool_calls[0].function.name"),
        ] {
            let error = one(message.clone()).unwrap_err().to_string();
            assert!(error.contains(&format!("'{named}'")), "{message}: {error}");
        }
    }
}
