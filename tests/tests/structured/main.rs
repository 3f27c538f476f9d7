//! Outputs that have to follow a grammar: they do, whatever happens, and whatever clients send harms nobody.

mod hostile;
mod schemas;

use std::time::{Duration, Instant};

use phalanx_proto::v1::{
    FinishReason, GenerateRequest, StructuredOutput, generate_request::Prompt, structured_output::Constraint,
};
use phalanx_tests::{
    client::{Answer, generate, generate_all, metric, post, post_stream},
    model_cache::{SMOLLM2, model},
    process::{Cluster, signal_pid, wait_until},
};
use rustix::process::Signal;
use serde_json::{Value, json};

/// Longest that a bad grammar may take to be refused: a trial's limit, a new process for the next one, and a loaded machine.
const REFUSED_WITHIN: Duration = Duration::from_secs(60);

fn start(args: &[&str]) -> Cluster {
    let mut all = vec!["--max-model-len", "1024", "--kv-cache-memory", "256MiB"];
    all.extend(args);
    Cluster::start(&model(SMOLLM2), &all)
}

/// A request that draws freely, as long as the grammar lets it.
fn asking(constraint: Constraint, seed: u64) -> GenerateRequest {
    GenerateRequest {
        prompt: Some(Prompt::Text("Here is an example of what you asked for:\n".to_owned())),
        temperature: Some(1.0),
        seed: Some(seed),
        max_tokens: Some(160),
        structured_output: Some(StructuredOutput { constraint: Some(constraint), ..StructuredOutput::default() }),
        ..GenerateRequest::default()
    }
}

fn of_schema(schema: &Value, seed: u64) -> GenerateRequest {
    asking(Constraint::JsonSchema(schema.to_string()), seed)
}

fn essence(answers: Vec<Answer>) -> Vec<Answer> {
    answers.into_iter().map(Answer::essence).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_complete_output_is_valid_at_every_world_size() {
    let schemas = schemas::all();
    let requests = || schemas.iter().flat_map(|(_, schema)| (0..2).map(|seed| of_schema(schema, seed))).collect();
    let cluster = start(&["--tensor-parallel-size", "2"]);
    let answers = essence(generate_all(&cluster.grpc, requests()).await.expect("all are answered"));
    let mut n_complete = 0;
    for (idx, answer) in answers.iter().enumerate() {
        let (name, schema) = &schemas[idx / 2];
        let choice = &answer.choices[0];
        if choice.finish != FinishReason::Stop {
            continue;
        }
        n_complete += 1;
        let value: Value =
            serde_json::from_str(&choice.text).unwrap_or_else(|error| panic!("{name}: {error}: {:?}", choice.text));
        let validator = jsonschema::options().should_validate_formats(true).build(schema).expect(name);
        let wrong: Vec<_> = validator.iter_errors(&value).map(|error| error.to_string()).collect();
        assert!(wrong.is_empty(), "{name}: {wrong:?}: {:?}", choice.text);
    }
    assert!(n_complete * 10 >= answers.len() * 9, "{n_complete} of {} came to an end", answers.len());
    assert!(cluster.interrupt().success());

    for size in ["1", "3"] {
        let cluster = start(&["--tensor-parallel-size", size, "--max-num-seqs", "7", "--max-num-batched-tokens", "16"]);
        let again = essence(generate_all(&cluster.grpc, requests()).await.expect("all are answered"));
        for (idx, (want, got)) in answers.iter().zip(&again).enumerate() {
            assert_eq!(want, got, "{} on {size} ranks", schemas[idx / 2].0);
        }
        assert!(cluster.interrupt().success());
    }
}

fn finish(answer: &Answer, text: &str) {
    let choice = &answer.choices[0];
    assert_eq!((choice.text.as_str(), choice.finish), (text, FinishReason::Stop));
}

#[tokio::test(flavor = "multi_thread")]
async fn grammars_meet_all_other_parameters() {
    let cluster = start(&[]);
    let ask = |request| generate(&cluster.grpc, request);
    let regex = |text: &str| asking(Constraint::Regex(text.to_owned()), 1);

    // The end comes where the grammar has one, be it greedy or drawn, with `ignore_eos` or without.
    for (temperature, ignore_eos) in [(0.0, false), (1.0, false), (0.0, true), (1.0, true)] {
        let request = GenerateRequest { temperature: Some(temperature), ignore_eos, ..regex("yes or no") };
        finish(&ask(request).await.unwrap(), "yes or no");
    }
    // `ignore_eos` goes on for as long as the grammar can.
    let longest = GenerateRequest { ignore_eos: true, max_tokens: Some(400), ..regex("a{1,70}") };
    finish(&ask(longest).await.unwrap(), &"a".repeat(70));
    let cut = ask(GenerateRequest { ignore_eos: true, max_tokens: Some(5), ..regex("[a-z ]*") }).await.unwrap();
    assert_eq!((cut.choices[0].finish, cut.usage.completion_tokens), (FinishReason::Length, 5));
    // A minimum length holds the end back, but not where nothing else is allowed.
    let long = ask(GenerateRequest { min_tokens: Some(30), ..regex("[a-z ]{0,400}") }).await.unwrap();
    assert!(long.usage.completion_tokens >= 30, "{long:?}");
    finish(&ask(GenerateRequest { min_tokens: Some(100), ..regex("short") }).await.unwrap(), "short");
    // Stop strings cut.
    finish(&ask(GenerateRequest { stop: vec!["b".to_owned()], ..regex("aaabbb") }).await.unwrap(), "aaa");
    // Scores are the model's own: of greedily chosen tokens, some are not the most probable.
    let scored = GenerateRequest { temperature: Some(0.0), logprobs: Some(2), ..regex("[0-9]{30}") };
    let scored = ask(scored).await.unwrap();
    let choice = &scored.choices[0];
    assert_eq!(choice.scores.len(), choice.token_ids.len());
    assert!(choice.scores.iter().any(|score| score.rank > 1), "{:?}", choice.scores);
    let without = ask(GenerateRequest { temperature: Some(0.0), ..regex("[0-9]{30}") }).await.unwrap();
    assert_eq!(without.choices[0].token_ids, choice.token_ids, "scores change nothing");
    // Biases and penalties choose among what is allowed.
    let penalized =
        GenerateRequest { frequency_penalty: Some(2.0), repetition_penalty: Some(1.5), ..regex("[ab]{40}") };
    let penalized = ask(penalized).await.unwrap();
    assert!(penalized.choices[0].text.len() == 40 && penalized.choices[0].text.chars().all(|c| "ab".contains(c)));
    // Choices draw on their own.
    let several = GenerateRequest { n: Some(4), ..regex("[a-z]{12}") };
    let several = ask(several).await.unwrap();
    assert!(several.choices.iter().all(|c| c.text.len() == 12 && c.finish == FinishReason::Stop));
    assert!(several.choices.iter().any(|c| c.text != several.choices[0].text));
    // Of the other notations.
    let gbnf = "root ::= item (\", \" item){2}\nitem ::= \"[\" [0-9]{2} \"]\"";
    let listed = ask(asking(Constraint::Grammar(gbnf.to_owned()), 3)).await.unwrap();
    assert_eq!(listed.choices[0].text.matches(']').count(), 3, "{listed:?}");
    let object =
        ask(GenerateRequest { max_tokens: Some(12), ..asking(Constraint::JsonObject(true), 3) }).await.unwrap();
    assert!(object.choices[0].text.starts_with('{'), "{object:?}");

    // Over HTTP, under every name that clients have for it.
    let chat = |fields: Value| {
        let mut body = json!({"messages": [{"role": "user", "content": "Say it."}], "max_tokens": 60, "seed": 1});
        body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        let answer = post(&format!("{}/v1/chat/completions", cluster.http), &body).unwrap();
        assert_eq!(answer.status, 200, "{}", answer.body);
        let choice = answer.json().unwrap()["choices"][0].clone();
        assert_eq!(choice["finish_reason"], "stop", "{choice}");
        choice["message"]["content"].as_str().unwrap().to_owned()
    };
    let schema = json!({"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"], "additionalProperties": false});
    for fields in [
        json!({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "strict": true, "schema": schema}}}),
        json!({"structured_outputs": {"json": schema, "whitespace_pattern": " ?"}}),
        json!({"structured_outputs": {"json": schema.to_string(), "disable_any_whitespace": true}}),
        json!({"guided_json": schema}),
    ] {
        let text = chat(fields);
        assert!(serde_json::from_str::<Value>(&text).unwrap()["ok"].is_boolean(), "{text}");
    }
    for fields in [
        json!({"structured_outputs": {"choice": ["left", "right"]}}),
        json!({"guided_choice": ["left", "right"]}),
        json!({"structured_outputs": {"regex": "left|right"}}),
        json!({"guided_grammar": "start: \"left\" | \"right\""}),
    ] {
        let text = chat(fields);
        assert!(["left", "right"].contains(&text.as_str()), "{text}");
    }
    let body = json!({"prompt": "The sides are", "max_tokens": 40, "structured_outputs": {"regex": " (left|right)"}});
    let text = post(&format!("{}/v1/completions", cluster.http), &body).unwrap().json().unwrap();
    assert!([" left", " right"].contains(&text["choices"][0]["text"].as_str().unwrap()), "{text}");
    assert!(cluster.interrupt().success());
}

/// Tokens of the rest of a stream.
fn tokens(stream: impl Iterator<Item = anyhow::Result<Value>>) -> Vec<u64> {
    let events = stream.map(|event| event.expect("the stream goes on"));
    events.flat_map(|event| tokens_of(&event)).collect()
}

fn tokens_of(event: &Value) -> Vec<u64> {
    assert!(event["error"].is_null(), "{event}");
    let ids = event["choices"][0]["token_ids"].as_array().cloned().unwrap_or_default();
    ids.iter().filter_map(Value::as_u64).collect()
}

#[test]
fn a_killed_shard_changes_no_token() {
    let cluster = start(&["--tensor-parallel-size", "2"]);
    let url = format!("{}/v1/completions", cluster.http);
    let item = json!({"type": "object", "properties": {"word": {"type": "string", "minLength": 4, "maxLength": 12}, "n": {"type": "integer", "minimum": 10, "maximum": 99_999}}, "required": ["word", "n"], "additionalProperties": false});
    let schema = json!({"type": "array", "items": item, "minItems": 12, "maxItems": 12});
    let body = json!({
        "prompt": "A list of words with their counts:\n", "max_tokens": 700, "temperature": 1, "seed": 7, "stream": true,
        "return_token_ids": true, "frequency_penalty": 0.2,
        "response_format": {"type": "json_schema", "json_schema": {"name": "words", "schema": schema}},
    });
    let expected = tokens(post_stream(&url, &body).unwrap());
    assert!(expected.len() > 100, "{}", expected.len());
    let shards = cluster.local_shards();
    assert_eq!(shards.len(), 2);
    for (n_lost, shard) in (1..).zip(shards) {
        let mut stream = post_stream(&url, &body).unwrap();
        let mut got = Vec::new();
        while got.len() < 40 {
            got.extend(tokens_of(&stream.next().expect("more comes").expect("the stream goes on")));
        }
        signal_pid(shard, Signal::KILL);
        got.extend(tokens(stream));
        assert_eq!(got, expected);
        wait_until("the loss is counted", || metric(&cluster.http, "phalanx_failovers_total") >= f64::from(n_lost));
    }
    assert!(cluster.interrupt().success());
}

#[test]
fn hostile_grammars_are_refused_while_a_stream_runs() {
    let cluster = start(&["--tensor-parallel-size", "2"]);
    let url = format!("{}/v1/completions", cluster.http);
    let endless = json!({"prompt": "Once upon a time", "max_tokens": 900, "temperature": 0, "ignore_eos": true, "stream": true, "return_token_ids": true});
    let expected = tokens(post_stream(&url, &endless).unwrap());
    let shards = cluster.local_shards();
    let mut stream = post_stream(&url, &endless).unwrap();
    let mut got = tokens_of(&stream.next().unwrap().unwrap());
    let reader = std::thread::spawn(move || {
        got.extend(tokens(stream));
        got
    });
    for (name, fields, param) in hostile::all() {
        // The second time it is remembered.
        for _ in 0..2 {
            let mut body = json!({"prompt": "Go", "max_tokens": 5});
            body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
            let begun = Instant::now();
            let answer = post(&url, &body).unwrap();
            assert!(begun.elapsed() < REFUSED_WITHIN, "{name}: {:?}", begun.elapsed());
            assert_eq!(answer.status, 400, "{name}: {}", answer.body);
            let error = &answer.json().unwrap()["error"];
            assert_eq!(error["param"], param, "{name}: {error}");
            assert!(error["message"].as_str().is_some_and(|m| m.len() > 20 && m.len() < 1000), "{name}: {error}");
        }
    }
    assert_eq!(reader.join().expect("the stream goes on"), expected);
    assert_eq!(cluster.local_shards(), shards, "no shard was lost");
    // What can't be followed far enough ends alone.
    let body = json!({"prompt": "Go", "max_tokens": 200, "temperature": 1, "seed": 1,
        "structured_outputs": {"json": {"type": "string", "pattern": "^(([a-z]{1,100}){1,100}){1,100}$"}}});
    let answer = post(&url, &body).unwrap();
    if answer.status != 200 {
        let error = &answer.json().unwrap()["error"];
        assert_eq!(
            (answer.status, &error["code"], &error["param"]),
            (400, &json!("grammar_too_complex"), &json!("structured_outputs.json"))
        );
    }
    assert_eq!(cluster.local_shards(), shards, "no shard was lost");
    assert!(cluster.interrupt().success());
}
