use std::time::Duration;

use axum::body::Body;
use http::Request as HttpRequest;
use serde_json::{Value, json};

use super::fake::Server;
use crate::{
    frontend::Limits,
    request::{Queued, RequestError},
};

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";

fn good(path: &str) -> Value {
    match path {
        CHAT => json!({"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}),
        _ => json!({"model": "tiny", "prompt": "Hi", "max_tokens": 2}),
    }
}

/// Bodies that are wrong in one field, with that field's name.
fn wrong_fields(path: &str) -> Vec<(String, Value)> {
    let mut all = Vec::new();
    let mut add = |field: &str, value: Value| {
        let mut body = good(path);
        body[field] = value;
        all.push((field.to_owned(), body));
    };
    let numbers = ["temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"];
    for field in numbers {
        for value in [json!("1"), json!([1]), json!({"a": 1}), json!(true), json!(1e300), json!(-1e300), json!(-2.5)] {
            add(field, value);
        }
    }
    for field in ["n", "max_tokens", "min_tokens", "seed", "top_k", "prompt_logprobs"] {
        let too_large = json!(u64::MAX);
        for value in [json!("1"), json!([1]), json!({}), json!(false), json!(1.5), json!(1e300), json!(-1e300)] {
            add(field, value);
        }
        if field != "seed" {
            add(field, too_large);
            add(field, json!(-7));
        }
    }
    for field in ["stream", "ignore_eos", "include_stop_str_in_output", "skip_special_tokens", "return_token_ids"] {
        for value in [json!("yes"), json!(1), json!([]), json!({})] {
            add(field, value);
        }
    }
    for (field, values) in [
        ("temperature", vec![json!(-0.1), json!(2.1)]),
        ("top_p", vec![json!(0), json!(1.1)]),
        ("min_p", vec![json!(-0.1), json!(1.1)]),
        ("repetition_penalty", vec![json!(0), json!(10.5)]),
        ("presence_penalty", vec![json!(2.1), json!(-2.1)]),
        ("frequency_penalty", vec![json!(2.1), json!(-2.1)]),
        ("n", vec![json!(0), json!(129)]),
        ("max_tokens", vec![json!(0)]),
        ("min_tokens", vec![json!(3)]),
        ("top_k", vec![json!(-2)]),
        ("prompt_logprobs", vec![json!(21)]),
        ("stop", vec![json!(1), json!([1]), json!(""), json!([""]), json!(vec!["x"; 17]), json!("x".repeat(1025))]),
        ("stop_token_ids", vec![json!("x"), json!([-1]), json!([1_000_000]), json!(vec![1; 257]), json!([1.5])]),
        ("logit_bias", vec![json!([1]), json!({"x": 1}), json!({"-1": 1}), json!({"1000000": 1}), json!({"5": 101})]),
        ("logit_bias", vec![json!({"5": -101}), json!({"5": "1"}), json!({"5": null}), json!("x")]),
        ("stream_options", vec![json!({"include_usage": true}), json!([]), json!("x")]),
        ("model", vec![json!("other"), json!(1), json!([]), json!("")]),
        ("no_such_field", vec![json!(1), json!({}), json!(false)]),
        ("response_format", vec![json!({"type": "yaml"}), json!({"type": "json_schema"}), json!({}), json!("text")]),
        ("store", vec![json!(true)]),
        ("service_tier", vec![json!("flex")]),
        ("user", vec![json!(1)]),
        ("metadata", vec![json!("x")]),
        ("guided_json", vec![json!({"type": "text"}), json!([]), json!("{")]),
        ("guided_regex", vec![json!("(a"), json!(1)]),
        (
            "structured_outputs",
            vec![json!({"choice": []}), json!({"odd": "a"}), json!({"grammar": "start: a"}), json!(1)],
        ),
        ("truncate_prompt_tokens", vec![json!(0), json!(-2), json!("x")]),
        ("allowed_token_ids", vec![json!([]), json!([-1]), json!([1_000_000]), json!("x"), json!(vec![5; 4097])]),
        ("bad_words", vec![json!([""]), json!([" "]), json!("x"), json!([1]), json!(vec!["x"; 257])]),
        ("bad_words", vec![json!(["x".repeat(257)])]),
        ("return_tokens_as_token_ids", vec![json!(1)]),
        ("request_id", vec![json!(""), json!("a b"), json!(1), json!("x".repeat(129))]),
        ("use_beam_search", vec![json!(true)]),
        ("priority", vec![json!("1"), json!(1.5), json!(1_i64 << 31), json!(-(1_i64 << 31) - 1), json!(true)]),
        ("best_of", vec![json!(0), json!("x")]),
        ("suffix", vec![json!("end")]),
        ("tools", vec![json!([{"type": "function"}]), json!("x")]),
        ("functions", vec![json!([{"name": "f"}])]),
    ] {
        for value in values {
            add(field, value);
        }
    }
    let special: Vec<(&str, Vec<Value>)> = match path {
        CHAT => vec![
            ("messages", vec![json!([]), json!("hi"), json!({}), json!([1]), json!([null]), Value::Null]),
            ("messages", vec![json!([{"role": "user"}]), json!([{"role": "u", "content": "x"}]), json!([[]])]),
            ("messages", vec![json!([{"role": "user", "content": [{"type": "image_url"}]}])]),
            ("messages", vec![json!([{"role": "user", "content": "word ".repeat(500)}])]),
            ("logprobs", vec![json!(1), json!("x")]),
            ("top_logprobs", vec![json!(5), json!(21), json!(-1), json!("x")]),
            ("max_completion_tokens", vec![json!(3), json!(0), json!("x"), json!(-1)]),
            ("tool_choice", vec![json!("required"), json!({"type": "function"})]),
            ("parallel_tool_calls", vec![json!("x")]),
            ("chat_template_kwargs", vec![json!([]), json!("x")]),
            ("add_generation_prompt", vec![json!("x")]),
            ("continue_final_message", vec![json!(true), json!(1)]),
            ("chat_template", vec![json!("{% if %}"), json!("{{ 1 + }}"), json!(1), json!("{".repeat(2 << 20))]),
            ("documents", vec![json!([{"text": "x"}]), json!("x")]),
            ("modalities", vec![json!(["text", "audio"])]),
            ("reasoning_effort", vec![json!("high"), json!("much"), json!(1)]),
            ("echo", vec![json!("x")]),
            ("prompt", vec![json!("x")]),
        ],
        _ => vec![
            ("prompt", vec![json!(5), json!([]), json!({}), json!([""]), json!(""), json!([{}]), Value::Null]),
            ("prompt", vec![json!([-1]), json!([1, 1_000_000]), json!([1, "a"]), json!(["a", 1]), json!([[1], 2])]),
            ("prompt", vec![json!([[]]), json!([1.5]), json!("word ".repeat(500)), json!(vec![5; 64]), json!([null])]),
            ("prompt", vec![json!(vec!["a"; 2049])]),
            ("logprobs", vec![json!(true), json!(21), json!(-1), json!("x")]),
            ("echo", vec![json!("x"), json!(1)]),
            ("add_special_tokens", vec![json!("x")]),
            ("messages", vec![json!([])]),
        ],
    };
    for (field, values) in special {
        for value in values {
            add(field, value);
        }
    }
    all
}

#[tokio::test]
async fn every_malformed_body_gets_an_error_object() {
    let server = Server::saying("x");
    let mut n_bodies = 0;
    for path in [CHAT, COMPLETIONS] {
        assert_eq!(server.post(path, &good(path)).await.status, 200, "the body that is made wrong is right");
        for (field, body) in wrong_fields(path) {
            n_bodies += 1;
            let answer = server.post(path, &body).await;
            let shown: String = format!("{path} {field}: {body}").chars().take(300).collect();
            let expected = if field == "model" && body["model"].is_string() { 404 } else { 400 };
            assert_eq!(answer.status, expected, "{shown}: {}", answer.body);
            let error = answer.json();
            let message = error["error"]["message"].as_str().unwrap();
            assert!(message.contains(&field), "{shown}: {message}");
            assert!(error["error"]["param"].as_str().is_some_and(|p| p.starts_with(&field)), "{shown}: {error}");
            assert_eq!(error["error"]["type"], "invalid_request_error", "{shown}");
            assert!(error["error"]["code"].is_string(), "{shown}: {error}");
        }
        let text = good(path).to_string();
        let mut raw: Vec<Vec<u8>> = (0..text.len()).map(|end| text.as_bytes()[..end].to_vec()).collect();
        for at in 0..text.len() {
            let mut noise = text.clone().into_bytes();
            noise[at] = 0x01;
            raw.push(noise);
        }
        raw.extend([b"\xff\xfe\x00".to_vec(), b"null".to_vec(), b"[]".to_vec(), b"\"x\"".to_vec(), b"7".to_vec()]);
        raw.push("[".repeat(100_000).into_bytes());
        raw.push(format!("{{\"messages\":{}", "[".repeat(1_000_000)).into_bytes());
        raw.push(format!("{{\"prompt\":{}", "{\"a\":".repeat(1_000_000)).into_bytes());
        raw.push(br#"{"prompt":"\ud800","messages":"\ud800"}"#.to_vec());
        raw.push(br#"{"prompt":"x","temperature":1e999,"messages":[{"role":"user","content":"x"}]}"#.to_vec());
        for body in raw {
            n_bodies += 1;
            let shown = String::from_utf8_lossy(&body[..body.len().min(200)]).into_owned();
            let answer = server.post_raw(path, body).await;
            assert!(answer.status.is_client_error(), "{shown}: {}", answer.body);
            assert!(answer.json()["error"]["message"].as_str().is_some_and(|m| !m.is_empty()), "{shown}");
        }
    }
    assert!(n_bodies >= 200, "{n_bodies} bodies");
    assert_eq!(server.fake.seen.lock().unwrap().len(), 2, "none of them reached the scheduler");
}

#[tokio::test]
async fn too_long_prompts_are_told_all_counts() {
    let server = Server::saying("x");
    let answer = server.post(COMPLETIONS, &json!({"prompt": vec![5; 60], "max_tokens": 10})).await;
    assert_eq!(answer.status, 400);
    let error = answer.json();
    assert_eq!(error["error"]["code"], "context_length_exceeded");
    let message = error["error"]["message"].as_str().unwrap();
    assert!(["64", "60", "10"].iter().all(|count| message.contains(count)), "{message}");
    let fits = server.post(COMPLETIONS, &json!({"prompt": vec![5; 60], "max_tokens": 4})).await;
    assert_eq!(fits.status, 200);
    // The default gives way.
    assert_eq!(server.post(COMPLETIONS, &json!({"prompt": vec![5; 60]})).await.status, 200);
    assert_eq!(server.last_request().max_tokens, 4);
    // A text that can't fit is not tokenized.
    let huge = server.post(COMPLETIONS, &json!({"prompt": "x".repeat(1 << 20)})).await;
    assert!(huge.json()["error"]["message"].as_str().unwrap().contains("at least"));
}

#[tokio::test]
async fn protocol_errors_have_their_status() {
    let server = Server::limited(
        |_| {
            Err(RequestError::Overloaded {
                waiting: 9,
                limit: 9,
                of: Queued::Requests,
                retry_after: Duration::from_secs(1),
            })
        },
        Limits { max_body_bytes: 4096, ..Limits::default() },
    );
    let untyped = HttpRequest::post(CHAT).body(Body::from("{}")).unwrap();
    let form = HttpRequest::post(CHAT).header("content-type", "text/plain").body(Body::from("{}")).unwrap();
    for (answer, status) in [
        (server.get("/no/such/path").await, 404),
        (server.post("/v1/chat", &json!({})).await, 404),
        (server.get(CHAT).await, 405),
        (server.post("/v1/models", &json!({})).await, 405),
        (server.send(untyped).await, 415),
        (server.send(form).await, 415),
        (server.post(COMPLETIONS, &json!({"prompt": "x".repeat(5000)})).await, 413),
        (server.post(COMPLETIONS, &json!({"prompt": "x"})).await, 429),
        (server.post(COMPLETIONS, &json!({"prompt": "x", "stream": true})).await, 429),
    ] {
        assert_eq!(answer.status, status, "{}", answer.body);
        assert_eq!(answer.headers["content-type"], "application/json");
        let error = answer.json();
        assert!(error["error"]["message"].is_string() && error["error"]["type"].is_string());
        assert_eq!(answer.headers.contains_key("retry-after"), status == 429);
        assert!(answer.headers.contains_key("x-request-id"));
        assert_eq!(answer.headers.contains_key("allow"), status == 405);
    }
    let charset = HttpRequest::post(COMPLETIONS).header("content-type", "Application/JSON; charset=utf-8");
    let answer = server.send(charset.body(Body::from(r#"{"prompt": "x"}"#)).unwrap()).await;
    assert_eq!(answer.status, 429, "the type was taken");
}

#[tokio::test]
async fn failures_of_the_scheduler_have_their_status() {
    for (error, status) in [
        (RequestError::Unavailable("forming".to_owned()), 503),
        (RequestError::DeadlineExceeded, 504),
        (RequestError::TooLarge { need: 9, have: 3 }, 400),
        (RequestError::Internal("bug".to_owned()), 500),
    ] {
        let failure = error.clone();
        let at_once = Server::with(move |_| Err(failure.clone()));
        assert_eq!(at_once.post(COMPLETIONS, &json!({"prompt": "x"})).await.status, status);
        let later = Server::with(move |_| Ok(vec![crate::request::RequestEvent::Failed(error.clone())]));
        assert_eq!(later.post(COMPLETIONS, &json!({"prompt": "x"})).await.status, status);
    }
}
