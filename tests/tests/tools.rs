//! Calls of tools by a real model on two ranks: what must be called is, with arguments that are valid, streamed or not,
//! whichever shard is lost.

use phalanx_tests::{
    client::{metric, post, post_stream},
    model_cache::{QWEN_05B, model},
    process::{Cluster, signal_pid, wait_until},
    resuming::Said,
};
use rustix::process::Signal;
use serde_json::{Value, json};

fn weather() -> Value {
    json!({
        "type": "object",
        "properties": {
            "city": {"type": "string", "minLength": 2, "maxLength": 30},
            "unit": {"enum": ["celsius", "fahrenheit"]},
            "days": {"type": "integer", "minimum": 1, "maximum": 7},
        },
        "required": ["city", "unit"],
        "additionalProperties": false,
    })
}

fn words() -> Value {
    let word = json!({"type": "string", "minLength": 3, "maxLength": 12, "pattern": "^[a-z]+$"});
    json!({"type": "object", "properties": {"words": {"type": "array", "items": word, "minItems": 20, "maxItems": 20}},
           "required": ["words"], "additionalProperties": false})
}

fn tools() -> Value {
    let tool = |name: &str, description: &str, parameters: Value| json!({"type": "function", "function": {"name": name, "description": description, "parameters": parameters}});
    json!([tool("get_weather", "The weather in a city.", weather()), tool("count_words", "Counts words.", words())])
}

fn body(more: Value) -> Value {
    let mut body = json!({
        "messages": [{"role": "user", "content": "How will the weather be in Paris tomorrow?"}],
        "tools": tools(), "max_tokens": 400, "temperature": 1, "seed": 1,
    });
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

fn ask(url: &str, body: &Value) -> Said {
    let answer = post(url, body).unwrap();
    assert_eq!(answer.status, 200, "{}", answer.body);
    Said::whole(&answer.json().unwrap())
}

fn stream(url: &str, mut body: Value) -> Said {
    body["stream"] = json!(true);
    let mut said = Said::default();
    for event in post_stream(url, &body).unwrap() {
        said.add(&event.expect("the stream goes on"));
    }
    said
}

fn check(said: &Said) {
    assert_eq!(said.finish, "tool_calls", "{said:?}");
    assert!(!said.calls.is_empty() && said.content.is_empty(), "{said:?}");
    for (name, arguments) in &said.calls {
        let schema = if name == "get_weather" { weather() } else { words() };
        let value: Value = serde_json::from_str(arguments).unwrap_or_else(|e| panic!("{e}: {arguments}"));
        assert!(jsonschema::is_valid(&schema, &value), "{name}: {value}");
    }
}

#[test]
fn what_must_be_called_is_called_whichever_shard_is_lost() {
    let cluster = Cluster::start(
        &model(QWEN_05B),
        &[
            "--tensor-parallel-size",
            "2",
            "--kv-cache-memory",
            "128MiB",
            "--max-model-len",
            "2048",
            "--enable-auto-tool-choice",
        ],
    );
    let url = format!("{}/v1/chat/completions", cluster.http);

    for seed in 1..=3 {
        let required = body(json!({"tool_choice": "required", "parallel_tool_calls": false, "seed": seed}));
        let whole = ask(&url, &required);
        check(&whole);
        assert_eq!(whole.calls.len(), 1);
        assert_eq!(stream(&url, required), whole);
    }
    let named = body(json!({"tool_choice": {"type": "function", "function": {"name": "count_words"}}}));
    let whole = ask(&url, &named);
    check(&whole);
    assert_eq!(whole.calls[0].0, "count_words");
    assert_eq!(stream(&url, named.clone()), whole);
    // As the model likes: whatever that is, it is the same streamed.
    for more in [json!({"temperature": 0}), json!({"temperature": 0, "parallel_tool_calls": false})] {
        let free = body(more);
        assert_eq!(stream(&url, free.clone()), ask(&url, &free));
    }
    let none = ask(&url, &body(json!({"tool_choice": "none", "max_tokens": 8})));
    assert!(none.calls.is_empty() && !none.content.is_empty(), "{none:?}");

    let shards = cluster.local_shards();
    assert_eq!(shards.len(), 2);
    for (n_lost, shard) in (1..).zip(shards) {
        let mut streamed = named.clone();
        streamed["stream"] = json!(true);
        let mut events = post_stream(&url, &streamed).unwrap();
        let mut said = Said::default();
        let mut n_pieces = 0;
        while n_pieces < 10 {
            n_pieces += usize::from(said.add(&events.next().expect("more comes").expect("the stream goes on")));
        }
        signal_pid(shard, Signal::KILL);
        for event in events {
            said.add(&event.expect("the stream goes on"));
        }
        assert_eq!(said, whole);
        wait_until("the loss is counted", || metric(&cluster.http, "phalanx_failovers_total") >= f64::from(n_lost));
    }
    assert!(cluster.interrupt().success());
}
