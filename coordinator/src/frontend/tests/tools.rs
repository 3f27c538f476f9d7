//! Tools and thoughts through every API.

use serde_json::{Value, json};

use super::{
    fake::Server,
    resuming::{Event, read},
};

const CHAT: &str = "/v1/chat/completions";
const RESPONSES: &str = "/v1/responses";
const MESSAGES: &str = "/v1/messages";
const OLLAMA: &str = "/api/chat";

const TEMPLATE: &str = "{% if tools %}{{ tools | tojson }} <tool_call>\n{% endif %}{% for m in messages %}\
    <turn>{{ m.role }}: {{ m.content }}{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}\n{% endfor %}\
    {% if add_generation_prompt %}<turn>assistant: {% endif %}";
const THINKING: &str = "{% for m in messages %}<turn>{{ m.content.split('</think>')[-1] }}\n{% endfor %}";

/// Two calls, of which the second follows a text too.
const SAID: &str = "I look.\n<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"Zürich\", \"days\": [1, 2]}}\n</tool_call>\n\
    <tool_call>\n{\"name\": \"now\", \"arguments\": {}}\n</tool_call>";
const ONLY_CALL: &str = "<tool_call>\n{\"name\": \"now\", \"arguments\": {}}\n</tool_call>";
const ARGUMENTS: &str = "{\"city\": \"Zürich\", \"days\": [1, 2]}";
const THOUGHT: &str = "<think>\nHm, so.\n</think>\n\nYes.";

fn schema() -> Value {
    json!({"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]})
}

fn tools() -> Value {
    json!([
        {"type": "function", "function": {"name": "weather", "description": "Of a city.", "parameters": schema()}},
        {"type": "function", "function": {"name": "now"}},
    ])
}

fn merged(mut body: Value, more: Value) -> Value {
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

fn chat(more: Value) -> Value {
    merged(json!({"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "tools": tools()}), more)
}

fn joined<'a>(deltas: impl Iterator<Item = &'a Value>, pointer: &str) -> String {
    deltas.filter_map(|delta| delta.pointer(pointer)?.as_str()).collect()
}

#[tokio::test]
async fn calls_have_openai_s_shape() {
    let server = Server::saying(SAID).with_template(TEMPLATE);
    let answer = server.post(CHAT, &chat(json!({"n": 2}))).await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    let answer = answer.json();
    let mut ids = Vec::new();
    for choice in answer["choices"].as_array().unwrap() {
        assert_eq!(
            (&choice["finish_reason"], &choice["message"]["content"]),
            (&json!("tool_calls"), &json!("I look."))
        );
        let calls = choice["message"]["tool_calls"].as_array().unwrap();
        assert_eq!(calls[0]["function"], json!({"name": "weather", "arguments": ARGUMENTS}));
        assert_eq!(calls[1]["function"], json!({"name": "now", "arguments": "{}"}));
        for call in calls {
            assert_eq!(call["type"], "function");
            ids.push(call["id"].as_str().unwrap().to_owned());
        }
    }
    ids.sort();
    ids.dedup();
    assert_eq!(ids.len(), 4);
    let request = server.last_request();
    assert!(request.sampling.grammar.is_none(), "nothing binds");
    let prompt = server.tokenizer.decode(&request.prompt, false);
    let shown = "[{\"type\": \"function\", \"function\": {\"name\": \"weather\", \"description\": \"Of a city.\", \"parameters\": \
                 {\"type\": \"object\", \"properties\": {\"city\": {\"type\": \"string\"}}, \"required\": [\"city\"]}}}, ";
    assert!(prompt.starts_with(shown), "{prompt}");
    let only = Server::saying(ONLY_CALL).with_template(TEMPLATE);
    let message = &only.post(CHAT, &chat(json!({}))).await.json()["choices"][0]["message"];
    assert_eq!((&message["content"], &message["tool_calls"][0]["function"]["name"]), (&Value::Null, &json!("now")));
    assert!(message.get("reasoning_content").is_none());
}

#[tokio::test]
async fn streamed_calls_are_the_whole_ones() {
    let server = Server::saying(SAID).with_template(TEMPLATE);
    let more = json!({"logprobs": true, "top_logprobs": 1, "return_token_ids": true, "stream_options": {"include_usage": true}});
    let events = server.post(CHAT, &chat(merged(more.clone(), json!({"stream": true})))).await.events();
    let whole = server.post(CHAT, &chat(merged(more, json!({"stream_options": null})))).await.json();
    let message = &whole["choices"][0]["message"];
    let choices: Vec<&Value> = events.iter().map(|event| &event["choices"][0]).collect();
    let deltas = || choices.iter().map(|choice| &choice["delta"]);
    assert_eq!(joined(deltas(), "/content"), message["content"]);
    for (index, call) in message["tool_calls"].as_array().unwrap().iter().enumerate() {
        let of_call: Vec<&Value> =
            deltas().filter_map(|delta| delta["tool_calls"].get(0)).filter(|call| call["index"] == index).collect();
        let first = of_call[0];
        assert!(first["id"].is_string() && first["type"] == "function", "{first}");
        assert_eq!(
            (&first["function"]["name"], &first["function"]["arguments"]),
            (&call["function"]["name"], &json!(""))
        );
        assert_eq!(joined(of_call.iter().copied(), "/function/arguments"), call["function"]["arguments"]);
        assert!(of_call[1..].iter().all(|later| later.get("id").is_none()));
    }
    let n_pieces = deltas().filter(|delta| delta["tool_calls"][0]["function"]["arguments"] != Value::Null).count();
    assert!(n_pieces > 6, "arguments come as they are made: {n_pieces}");
    assert_eq!(choices[choices.len() - 2]["finish_reason"], "tool_calls");
    assert_eq!(events.last().unwrap()["usage"], whole["usage"]);
    // Every token has its score and its id, whatever it says.
    let scores: Vec<Value> =
        choices.iter().filter_map(|choice| choice["logprobs"]["content"].as_array()).flatten().cloned().collect();
    assert_eq!(Value::from(scores), whole["choices"][0]["logprobs"]["content"]);
    let ids: Vec<Value> =
        choices.iter().filter_map(|choice| choice["token_ids"].as_array()).flatten().cloned().collect();
    assert_eq!(ids, json!(server.tokenizer.encode(SAID, false).unwrap()).as_array().unwrap().clone());
    assert_eq!(Value::from(ids), whole["choices"][0]["token_ids"]);
}

#[tokio::test]
async fn choices_bind_the_output() {
    let server = Server::saying(ONLY_CALL).with_template(TEMPLATE);
    let named = json!({"type": "function", "function": {"name": "now"}});
    let mut strict = tools();
    strict[0]["function"]["strict"] = json!(true);
    for (more, is_bound, has_weather) in [
        (json!({"tool_choice": "auto"}), false, false),
        (json!({"tool_choice": "required"}), true, true),
        (json!({"tool_choice": named}), true, false),
        (json!({"parallel_tool_calls": false}), true, true),
        (json!({"tools": strict}), true, true),
        (
            json!({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": schema()}}}),
            true,
            true,
        ),
    ] {
        let answer = server.post(CHAT, &chat(more.clone())).await;
        assert_eq!(answer.status, 200, "{more}: {}", answer.body);
        let grammar = server.last_request().sampling.grammar;
        assert_eq!(grammar.is_some(), is_bound, "{more}");
        assert_eq!(format!("{grammar:?}").contains("weather"), has_weather, "{more}");
        assert_eq!(answer.json()["choices"][0]["finish_reason"], "tool_calls");
    }
    let none = server.post(CHAT, &chat(json!({"tool_choice": "none"}))).await.json();
    assert_eq!(none["choices"][0]["message"]["content"], ONLY_CALL, "nothing was offered");
    assert!(!server.tokenizer.decode(&server.last_request().prompt, false).contains("weather"));
}

#[tokio::test]
async fn what_tools_can_t_be_is_refused() {
    let server = Server::saying("x").with_template(TEMPLATE);
    let regex = json!({"structured_outputs": {"regex": "a+"}});
    let odd = json!([{"type": "function", "function": {"name": "f", "strict": true,
                      "parameters": {"type": "object", "properties": {"a": {"not": {}}}}}}]);
    for (more, param) in [
        (json!({"tools": [{"type": "web_search"}]}), "tools[0].type"),
        (json!({"tools": [], "tool_choice": "required"}), "tool_choice"),
        (json!({"tool_choice": "any"}), "tool_choice"),
        (json!({"functions": [{"name": "f"}]}), "functions"),
        (json!({"function_call": {"name": "f"}}), "function_call"),
        (json!({"tool_choice": "required", "bad_words": ["x"]}), "bad_words"),
        (json!({"tools": odd}), "tools"),
        (regex, "structured_outputs.regex"),
        (json!({"chat_template": "{{ messages[0].content }}"}), "tools"),
    ] {
        let answer = server.post(CHAT, &chat(more.clone())).await;
        assert_eq!(
            (answer.status.as_u16(), &answer.json()["error"]["param"]),
            (400, &json!(param)),
            "{more}: {}",
            answer.body
        );
    }
    let unknown = Server::saying("x").with_template("{{ tools }}{{ messages[0].content }}");
    let mut model = crate::served_model::ServedModel::clone(&unknown.state.model);
    model.facts.architecture = "gemma3".to_owned();
    let state = crate::frontend::FrontendState { model: std::sync::Arc::new(model), ..unknown.state.clone() };
    let unknown = Server { router: crate::frontend::http_router(state.clone()), state, ..unknown };
    let refused = unknown.post(CHAT, &chat(json!({}))).await;
    assert!(refused.status == 400 && refused.body.contains("--tool-call-parser"), "{}", refused.body);
    assert_eq!(server.n_seen() + unknown.n_seen(), 0);
}

#[tokio::test]
async fn thoughts_go_to_a_field_of_their_own() {
    let server = Server::saying(THOUGHT).with_template(THINKING);
    let body = json!({"messages": [{"role": "user", "content": "hi"}]});
    let whole = server.post(CHAT, &body).await.json();
    let message = &whole["choices"][0]["message"];
    assert_eq!((&message["reasoning_content"], &message["content"]), (&json!("Hm, so."), &json!("Yes.")));
    let details = &whole["usage"]["completion_tokens_details"];
    let n_thought = details["reasoning_tokens"].as_u64().unwrap();
    assert!(n_thought > 3 && n_thought < whole["usage"]["completion_tokens"].as_u64().unwrap(), "{whole}");
    let more = json!({"stream": true, "stream_options": {"include_usage": true}});
    let events = server.post(CHAT, &merged(body.clone(), more)).await.events();
    let deltas = || events.iter().map(|event| &event["choices"][0]["delta"]);
    assert_eq!(
        (joined(deltas(), "/reasoning_content"), joined(deltas(), "/content")),
        ("Hm, so.".to_owned(), "Yes.".to_owned())
    );
    assert_eq!(events.last().unwrap()["usage"], whole["usage"]);
    let without = server.post(CHAT, &merged(body.clone(), json!({"include_reasoning": false}))).await.json();
    let message = json!({"role": "assistant", "content": "Yes.", "refusal": null});
    assert_eq!(without["choices"][0]["message"], message);
    // What follows a schema from its first token on is no thought.
    let schema = json!({"response_format": {"type": "json_object"}});
    let bound = Server::saying("{}").with_template(THINKING).post(CHAT, &merged(body, schema)).await.json();
    assert_eq!(bound["choices"][0]["message"]["content"], "{}");
}

#[tokio::test]
async fn responses_have_items_for_calls_and_thoughts() {
    let server = Server::saying(SAID).with_template(TEMPLATE);
    let tools =
        json!([{"type": "function", "name": "weather", "parameters": schema()}, {"type": "function", "name": "now"}]);
    let body = json!({"input": "hi", "tools": tools, "tool_choice": "auto"});
    let whole = server.post(RESPONSES, &body).await;
    assert_eq!(whole.status, 200, "{}", whole.body);
    let whole = whole.json();
    assert_eq!((&whole["tools"], &whole["status"]), (&tools, &json!("completed")));
    let kinds: Vec<&str> =
        whole["output"].as_array().unwrap().iter().map(|item| item["type"].as_str().unwrap()).collect();
    assert_eq!(kinds, ["message", "function_call", "function_call"]);
    let call = &whole["output"][1];
    assert_eq!(
        (&call["name"], &call["arguments"], &call["status"]),
        (&json!("weather"), &json!(ARGUMENTS), &json!("completed"))
    );
    assert!(call["call_id"].as_str().unwrap().starts_with("call_"));
    let body = merged(body, json!({"stream": true}));
    let events = server.post(RESPONSES, &body).await.named_events();
    let last = &events.last().unwrap().1["response"];
    let texts = |response: &Value| {
        let items = response["output"].as_array().unwrap().iter();
        items.map(|item| (item["name"].clone(), item["arguments"].clone(), item["content"].clone())).collect::<Vec<_>>()
    };
    assert_eq!(texts(last), texts(&whole));
    for (index, item) in last["output"].as_array().unwrap().iter().enumerate() {
        let of_item = || events.iter().map(|(_, event)| event).filter(|event| event["output_index"] == index);
        let names: Vec<&str> = of_item().map(|event| event["type"].as_str().unwrap()).collect();
        assert_eq!((names[0], *names.last().unwrap()), ("response.output_item.added", "response.output_item.done"));
        assert!(of_item().all(|event| event.get("item_id").is_none_or(|id| *id == item["id"])));
        assert_eq!(of_item().next_back().unwrap()["item"], *item);
        if item["type"] == "function_call" {
            assert_eq!(joined(of_item(), "/delta"), item["arguments"]);
            assert_eq!(names[names.len() - 2], "response.function_call_arguments.done");
        }
    }
    for (number, (_, event)) in events.iter().enumerate() {
        assert_eq!(event["sequence_number"], number);
    }
    let named = json!({"tool_choice": {"type": "function", "name": "now"}, "stream": false});
    assert_eq!(server.post(RESPONSES, &merged(body.clone(), named)).await.status, 200);
    assert!(server.last_request().sampling.grammar.is_some());
    let scored = json!({"include": ["message.output_text.logprobs"], "stream": false});
    assert_eq!(server.post(RESPONSES, &merged(body, scored)).await.json()["error"]["param"], "include");

    let thinking = Server::saying(THOUGHT).with_template(THINKING);
    let whole = thinking.post(RESPONSES, &json!({"input": "hi"})).await.json();
    assert_eq!(whole["output"][0]["content"], json!([{"type": "reasoning_text", "text": "Hm, so."}]));
    assert_eq!(whole["output"][1]["content"][0]["text"], "Yes.");
    assert!(whole["usage"]["output_tokens_details"]["reasoning_tokens"].as_u64() > Some(0));
}

#[tokio::test]
async fn messages_have_blocks_for_calls_and_thoughts() {
    let server = Server::saying(SAID).with_template(TEMPLATE);
    let tools =
        json!([{"name": "weather", "description": "d", "input_schema": schema()}, {"name": "now", "type": "custom"}]);
    let body =
        json!({"model": "tiny", "max_tokens": 2000, "messages": [{"role": "user", "content": "hi"}], "tools": tools});
    let whole = server.post(MESSAGES, &body).await;
    assert_eq!(whole.status, 200, "{}", whole.body);
    let whole = whole.json();
    assert_eq!(whole["stop_reason"], "tool_use");
    let content = whole["content"].as_array().unwrap();
    assert_eq!(content[0], json!({"type": "text", "text": "I look."}));
    assert_eq!((&content[1]["type"], &content[1]["name"]), (&json!("tool_use"), &json!("weather")));
    assert_eq!(content[1]["input"], serde_json::from_str::<Value>(ARGUMENTS).unwrap());
    let events = server.post(MESSAGES, &merged(body.clone(), json!({"stream": true}))).await.named_events();
    for (index, block) in content.iter().enumerate() {
        let of_block = || events.iter().map(|(_, event)| event).filter(|event| event["index"] == index);
        let names: Vec<&str> = of_block().map(|event| event["type"].as_str().unwrap()).collect();
        let (first, last) = (names[0], *names.last().unwrap());
        assert_eq!((first, last), ("content_block_start", "content_block_stop"));
        assert_eq!(of_block().next().unwrap()["content_block"]["type"], block["type"]);
        match block["type"].as_str().unwrap() {
            "text" => assert_eq!(joined(of_block(), "/delta/text"), block["text"]),
            _ => {
                let input: Value = serde_json::from_str(&joined(of_block(), "/delta/partial_json")).unwrap();
                assert_eq!(input, block["input"]);
            }
        }
    }
    assert_eq!(events[events.len() - 2].1["delta"]["stop_reason"], "tool_use");
    for (choice, is_bound) in [
        (json!({"type": "any"}), true),
        (json!({"type": "tool", "name": "now"}), true),
        (json!({"type": "auto", "disable_parallel_tool_use": true}), true),
        (json!({"type": "auto"}), false),
    ] {
        server.post(MESSAGES, &merged(body.clone(), json!({"tool_choice": choice}))).await;
        assert_eq!(server.last_request().sampling.grammar.is_some(), is_bound, "{choice}");
    }
    let counted = json!({"model": "tiny", "messages": body["messages"], "tools": tools});
    let counted = server.post("/v1/messages/count_tokens", &counted).await.json();
    assert_eq!(counted["input_tokens"], server.last_request().prompt.len());

    let thinking = Server::saying(THOUGHT).with_template(THINKING);
    let body = json!({"model": "tiny", "max_tokens": 2000, "messages": body["messages"]});
    let hidden = thinking.post(MESSAGES, &body).await.json();
    assert_eq!(hidden["content"], json!([{"type": "text", "text": "Yes."}]), "nobody asked for thoughts");
    let asked = merged(body, json!({"thinking": {"type": "enabled", "budget_tokens": 1024}}));
    let shown = thinking.post(MESSAGES, &asked).await.json();
    assert_eq!(shown["content"][0], json!({"type": "thinking", "thinking": "Hm, so.", "signature": ""}));
    let events = thinking.post(MESSAGES, &merged(asked, json!({"stream": true}))).await.named_events();
    assert_eq!(joined(events.iter().map(|(_, event)| event), "/delta/thinking"), "Hm, so.");
}

#[tokio::test]
async fn lines_have_calls_and_thoughts() {
    let server = Server::saying(SAID).with_template(TEMPLATE);
    let body = json!({"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "tools": tools()});
    let whole = server.post(OLLAMA, &merged(body.clone(), json!({"stream": false}))).await;
    assert_eq!(whole.status, 200, "{}", whole.body);
    let message = whole.json()["message"].clone();
    assert_eq!(message["content"], "I look.");
    let function = &message["tool_calls"][0]["function"];
    assert_eq!(function["arguments"], serde_json::from_str::<Value>(ARGUMENTS).unwrap());
    let lines = server.post(OLLAMA, &body).await.lines();
    assert_eq!(joined(lines.iter(), "/message/content"), "I look.");
    let functions = |message: &Value| -> Vec<Value> {
        message["tool_calls"].as_array().into_iter().flatten().map(|call| call["function"].clone()).collect()
    };
    let streamed: Vec<Value> = lines.iter().flat_map(|line| functions(&line["message"])).collect();
    assert_eq!(streamed, functions(&message));
    let turn = json!([
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "now", "arguments": {}}}]},
        {"role": "tool", "tool_name": "now", "content": "noon"},
    ]);
    server.post(OLLAMA, &merged(body.clone(), json!({"messages": turn}))).await;
    let prompt = server.tokenizer.decode(&server.last_request().prompt, false);
    assert!(prompt.contains("\"name\": \"now\", \"arguments\": {}") && prompt.contains("<turn>tool: noon"), "{prompt}");
    let capabilities = server.post("/api/show", &json!({"model": "tiny"})).await.json()["capabilities"].clone();
    assert_eq!(capabilities, json!(["completion", "tools"]));

    let thinking = Server::saying(THOUGHT).with_template(THINKING);
    let body = json!({"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "think": true});
    let lines = thinking.post(OLLAMA, &body).await.lines();
    assert_eq!(joined(lines.iter(), "/message/thinking"), "Hm, so.");
    assert_eq!(joined(lines.iter(), "/message/content"), "Yes.");
    let whole = thinking.post(OLLAMA, &merged(body, json!({"stream": false}))).await.json();
    assert_eq!((&whole["message"]["thinking"], &whole["message"]["content"]), (&json!("Hm, so."), &json!("Yes.")));
}

#[tokio::test]
async fn what_follows_any_event_of_a_call_is_the_rest() {
    let messages = json!([{"role": "user", "content": "hi"}]);
    let tool = json!([{"name": "weather", "input_schema": schema()}, {"name": "now"}]);
    for (path, body) in [
        (
            RESPONSES,
            json!({"input": "hi", "stream": true,
                           "tools": [{"type": "function", "name": "weather"}, {"type": "function", "name": "now"}]}),
        ),
        (MESSAGES, json!({"model": "tiny", "max_tokens": 2000, "messages": messages, "tools": tool, "stream": true})),
    ] {
        let server = Server::saying(SAID).with_template(TEMPLATE);
        let (status, _, all) = read(&server, path, &body, "idempotency-key", "").await;
        assert_eq!(status, 200, "{path}");
        for (index, event) in all.iter().enumerate() {
            let (_, _, rest) = read(&server, path, &body, "idempotency-key", &event.id).await;
            assert_eq!(rest, all[index + 1..], "{path} after {event:?}");
        }
        assert_eq!(server.n_seen(), 1, "{path} ran once");
        // Another coordinator, which knows nothing of the first run, finds the same calls.
        let other = Server::saying(SAID).with_template(TEMPLATE);
        // Whole responses say when they were made.
        let lasting = |events: Vec<Event>| -> Vec<Event> {
            events.into_iter().filter(|event| event.said["response"].is_null()).collect()
        };
        let again = read(&other, path, &body, "idempotency-key", "").await.2;
        assert_eq!(lasting(again), lasting(all), "{path}");
    }
}

#[tokio::test]
async fn a_chat_asked_again_has_the_same_calls() {
    let ask = |server: Server, body: Value| async move {
        let mut request = super::fake::post(CHAT, body.to_string());
        request.headers_mut().insert("idempotency-key", "k".parse().unwrap());
        let answer = server.send(request).await;
        (server, answer)
    };
    let streamed = chat(json!({"stream": true}));
    let mut bodies = Vec::new();
    for _ in 0..2 {
        let (server, first) = ask(Server::saying(SAID).with_template(TEMPLATE), streamed.clone()).await;
        let (server, again) = ask(server, streamed.clone()).await;
        assert_eq!((first.body.len(), server.n_seen()), (again.body.len(), 1));
        let of_calls = |body: &str| -> Vec<String> {
            body.split("\"id\":\"").filter(|rest| rest.starts_with("call_")).map(|rest| rest[..29].to_owned()).collect()
        };
        assert_eq!(of_calls(&first.body).len(), 2);
        assert_eq!(of_calls(&first.body), of_calls(&again.body));
        bodies.push(of_calls(&first.body));
    }
    assert_eq!(bodies[0], bodies[1], "another coordinator");
}

#[tokio::test]
async fn prompts_with_tools_can_be_looked_at() {
    let server = Server::saying("x").with_template(TEMPLATE);
    let body = json!({"messages": [{"role": "user", "content": "hi"}], "tools": tools()});
    let rendered = server.post("/apply-template", &body).await.json()["prompt"].as_str().unwrap().to_owned();
    assert!(rendered.contains("\"name\": \"weather\""), "{rendered}");
    let tokens = server.post("/tokenize", &body).await.json()["tokens"].clone();
    server.post(CHAT, &body).await;
    assert_eq!(tokens, json!(server.last_request().prompt));
}
