//! Bounds of thoughts, with a real model on two ranks: a thought ends when its tokens are spent and the answer follows,
//! streamed or not, whichever shard is lost.

use phalanx_tests::{
    client::{metric, post, post_stream},
    model_cache::{QWEN_05B, model},
    process::{Cluster, signal_pid, wait_until},
};
use rustix::process::Signal;
use serde_json::{Value, json};

/// The model has no thoughts of its own: its prompt begins one, and it has no token for the mark that ends it.
const TEMPLATE: &str = "{# </think> #}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}\
    <|im_start|>assistant\n<think>\n";
const BUDGET: usize = 24;

fn body(more: &Value) -> Value {
    let mut body = json!({
        "messages": [{"role": "user", "content": "Think at length about the sea, then name three fish."}],
        "chat_template": TEMPLATE, "max_tokens": 90, "temperature": 0.8, "seed": 5, "return_token_ids": true,
        "ignore_eos": true,
    });
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

fn ask(url: &str, body: &Value) -> Value {
    let answer = post(url, body).unwrap();
    assert_eq!(answer.status, 200, "{}", answer.body);
    answer.json().unwrap()
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

/// Thought, content, tokens.
#[derive(Debug, Default, PartialEq)]
struct Said {
    thought: String,
    content: String,
    tokens: Vec<Value>,
}

impl Said {
    fn whole(choice: &Value) -> Self {
        let message = &choice["message"];
        Self {
            thought: text(&message["reasoning_content"]),
            content: text(&message["content"]),
            tokens: choice["token_ids"].as_array().unwrap().clone(),
        }
    }

    fn add(&mut self, event: &Value) {
        assert!(event["error"].is_null(), "{event}");
        let choice = &event["choices"][0];
        self.thought.push_str(choice["delta"]["reasoning_content"].as_str().unwrap_or_default());
        self.content.push_str(choice["delta"]["content"].as_str().unwrap_or_default());
        self.tokens.extend(choice["token_ids"].as_array().into_iter().flatten().cloned());
    }
}

#[test]
fn thoughts_end_when_their_tokens_are_spent_whichever_shard_is_lost() {
    let cluster = Cluster::start(
        &model(QWEN_05B),
        &["--tensor-parallel-size", "2", "--kv-cache-memory", "128MiB", "--max-model-len", "1024"],
    );
    let url = format!("{}/v1/chat/completions", cluster.http);
    let mark = ask(&format!("{}/tokenize", cluster.http), &json!({"prompt": "</think>", "add_special_tokens": false}));
    let mark = mark["tokens"].as_array().unwrap().clone();
    assert!(mark.len() > 1, "the harder case");

    // Up to the bound nothing changes, then the mark comes.
    for more in [json!({}), json!({"temperature": 0})] {
        let free = Said::whole(&ask(&url, &body(&more))["choices"][0]);
        assert!(!free.tokens[..BUDGET + mark.len()].windows(mark.len()).any(|run| run == mark), "{free:?}");
        let mut bounded = body(&more);
        bounded["thinking_token_budget"] = json!(BUDGET);
        let said = Said::whole(&ask(&url, &bounded)["choices"][0]);
        assert_eq!(said.tokens[..BUDGET], free.tokens[..BUDGET]);
        assert_eq!(said.tokens[BUDGET..BUDGET + mark.len()], mark);
        assert!(free.thought.starts_with(&said.thought) && !said.thought.is_empty(), "{said:?}");
        assert!(!said.content.is_empty() && said.tokens.len() == 90, "{said:?}");
    }

    // Scores of each token, and each choice has its own bound.
    let several = ask(
        &url,
        &body(&json!({"n": 3, "thinking_token_budget": BUDGET, "logprobs": true, "top_logprobs": 1, "max_tokens": 40})),
    );
    for choice in several["choices"].as_array().unwrap() {
        let said = Said::whole(choice);
        assert_eq!(said.tokens[BUDGET..BUDGET + mark.len()], mark);
        let scores = choice["logprobs"]["content"].as_array().unwrap();
        assert_eq!(scores.len(), said.tokens.len());
        assert!(scores.iter().all(|score| score["logprob"].as_f64().unwrap() <= 0.0));
    }
    let counted = several["usage"]["completion_tokens_details"]["reasoning_tokens"].as_u64().unwrap();
    assert_eq!(counted, 3 * (BUDGET + mark.len()) as u64);

    // A schema follows the thought; none at all where the bound is 0.
    let schema = json!({"type": "object", "properties": {"fish": {"enum": ["cod", "eel"]}}, "required": ["fish"], "additionalProperties": false});
    for budget in [0, BUDGET] {
        let bound = json!({
            "thinking_token_budget": budget, "ignore_eos": false,
            "response_format": {"type": "json_schema", "json_schema": {"name": "fish", "schema": schema}},
        });
        let said = Said::whole(&ask(&url, &body(&bound))["choices"][0]);
        let value: Value = serde_json::from_str(&said.content).unwrap_or_else(|e| panic!("{e}: {said:?}"));
        assert!(jsonschema::is_valid(&schema, &value), "{value}");
        assert_eq!(said.thought.is_empty(), budget == 0, "{said:?}");
    }

    let mut streamed = body(&json!({"thinking_token_budget": BUDGET}));
    let whole = Said::whole(&ask(&url, &streamed)["choices"][0]);
    streamed["stream"] = json!(true);
    let shards = cluster.local_shards();
    assert_eq!(shards.len(), 2);
    // Before the mark, and about where it stands.
    for (n_lost, (shard, n_tokens)) in (1..).zip(shards.into_iter().zip([BUDGET - 4, BUDGET + 1])) {
        let mut events = post_stream(&url, &streamed).unwrap();
        let mut said = Said::default();
        while said.tokens.len() < n_tokens {
            said.add(&events.next().expect("more comes").expect("the stream goes on"));
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
