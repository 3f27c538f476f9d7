//! Nothing that the guard finds and nothing that the moderation refuses passes, whatever API asks.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use axum::{Json, Router, extract::State, routing::post as posting};
use serde_json::{Value, json};
use tokio::net::TcpListener;

use super::fake::{Answer, Server, post};
use crate::{
    guard::{
        Action, DENIED, Guard, denylist,
        moderation::{Moderation, ModerationConfig, OnError},
        pii,
        rules::Rules,
    },
    request::{Finish, Output, RequestEvent},
    security::Security,
};

fn rules(phrases: &str, action: Action) -> Rules {
    let denied = (DENIED, "[REDACTED]", action, denylist::parse(phrases.as_bytes()).unwrap());
    let personal = pii::KINDS.iter().map(|kind| (kind.name, kind.mark, Action::Redact, (kind.patterns)()));
    Rules::new([denied].into_iter().chain(personal)).unwrap()
}

fn guarded(server: Server, phrases: &str, action: Action) -> Server {
    server.behind(Security::with_watch(Some(Arc::new(Guard::new(rules(phrases, action)))), None))
}

/// Requests of all APIs, whole and streamed, that say this.
fn requests(said: &str) -> Vec<(&'static str, Value)> {
    let messages = json!([{"role": "user", "content": said}]);
    let parts = json!([{"role": "user", "content": [{"type": "text", "text": said}]}]);
    let mut all = Vec::new();
    for stream in [false, true] {
        all.extend([
            ("/v1/completions", json!({"prompt": said, "stream": stream, "max_tokens": 30})),
            ("/v1/completions", json!({"prompt": said, "stream": stream, "max_tokens": 30, "echo": true})),
            ("/v1/chat/completions", json!({"messages": messages, "stream": stream})),
            ("/v1/chat/completions", json!({"messages": parts, "stream": stream})),
            ("/v1/responses", json!({"input": said, "stream": stream})),
            ("/v1/messages", json!({"model": "tiny", "max_tokens": 30, "messages": messages, "stream": stream})),
            ("/api/chat", json!({"model": "tiny", "messages": messages, "stream": stream})),
            ("/api/generate", json!({"model": "tiny", "prompt": said, "stream": stream})),
            ("/api/generate", json!({"model": "tiny", "prompt": said, "stream": stream, "raw": true})),
            ("/", json!({"inputs": said, "stream": stream, "parameters": {"max_new_tokens": 30}})),
        ]);
    }
    all
}

/// All texts of an answer, one after the other.
fn texts(answer: &Answer) -> String {
    fn collect(value: &Value, texts: &mut String) {
        match value {
            Value::Array(items) => items.iter().for_each(|item| collect(item, texts)),
            Value::Object(map) => {
                for (name, value) in map {
                    match value {
                        Value::String(text) if ["content", "text", "delta", "response"].contains(&name.as_str()) => {
                            texts.push_str(text);
                        }
                        value => collect(value, texts),
                    }
                }
            }
            _ => {}
        }
    }
    let mut all = String::new();
    for line in answer.body.lines() {
        let line = line.strip_prefix("data: ").unwrap_or(line);
        if let Ok(value) = serde_json::from_str(line) {
            collect(&value, &mut all);
        }
    }
    all
}

#[tokio::test]
async fn answers_of_every_api_are_redacted() {
    let server = guarded(Server::saying(" to zoe@mail.org, ok"), "", Action::Redact);
    for (path, body) in requests("hi") {
        let answer = server.post(path, &body).await;
        assert_eq!(answer.status, 200, "{path} {body}: {}", answer.body);
        assert!(!answer.body.contains("zoe") && !answer.body.contains("mail.org"), "{path} {body}: {}", answer.body);
        assert!(answer.body.contains("[MAIL]"), "{path} {body}: {}", answer.body);
        if path != "/" {
            assert!(texts(&answer).contains(" to [MAIL], ok"), "{path} {body}: {}", answer.body);
        }
    }
}

#[tokio::test]
async fn prompts_of_every_api_are_redacted() {
    let server = guarded(Server::saying(" x"), "", Action::Redact);
    let read = |server: &Server| server.tokenizer.decode(&server.last_request().prompt, false);
    for (path, body) in requests("a@b.io") {
        let answer = server.post(path, &body).await;
        assert_eq!(answer.status, 200, "{path} {body}: {}", answer.body);
        assert!(read(&server).contains("[MAIL]") && !read(&server).contains("a@b"), "{path} {body}: {}", read(&server));
        assert!(!answer.body.contains("a@b"), "{}", answer.body);
    }
    let ids = server.tokenizer.encode("to a@b.io", false).unwrap();
    server.post("/v1/completions", &json!({"prompt": ids})).await;
    assert_eq!(read(&server), "to [MAIL]");
    let plain = server.tokenizer.encode("to a at b", false).unwrap();
    server.post("/v1/completions", &json!({"prompt": plain})).await;
    assert_eq!(server.last_request().prompt, plain);
}

#[tokio::test]
async fn what_is_denied_ends_answers_and_refuses_prompts() {
    let server = guarded(Server::saying(" a black bird sings"), "black bird\n", Action::Block);
    for (path, body) in requests("hi") {
        let answer = server.post(path, &body).await;
        assert_eq!(answer.status, 200, "{path} {body}: {}", answer.body);
        assert!(!answer.body.contains("black") && !answer.body.contains("sings"), "{path} {body}: {}", answer.body);
        let reason = if path == "/v1/messages" { "refusal" } else { "content_filter" };
        // Without details nothing says there how it ended.
        assert!(path == "/" || answer.body.contains(reason), "{path} {body}: {}", answer.body);
    }
    let n_seen = server.n_seen();
    for (path, body) in requests("BLACK\nBird") {
        let answer = server.post(path, &body).await;
        let status = if path == "/" { 422 } else { 400 };
        assert_eq!(answer.status, status, "{path} {body}: {}", answer.body);
        assert!(answer.body.contains("does not let through"), "{}", answer.body);
    }
    assert_eq!(server.n_seen(), n_seen, "nothing is submitted");
    let answer = server.post("/v1/completions", &json!({"prompt": ["a", "black bird"]})).await;
    let error = &answer.json()["error"];
    assert_eq!((&error["code"], &error["param"]), (&json!("content_filter"), &json!("prompt[1]")));
}

#[tokio::test]
async fn a_choice_that_is_ended_leaves_the_others_alone_and_costs_no_more() {
    let output = |index, text: &str, finish| {
        RequestEvent::Output(Output { index, text: text.to_owned(), token_ids: vec![5], finish, ..Output::default() })
    };
    // Its stream stays open: only who leaves it ends it.
    let script = move |_: &_| {
        Ok(vec![
            output(0, "a bird ", None),
            output(1, "a fish", None),
            output(0, "more", None),
            output(1, ".", Some(Finish::Length)),
        ])
    };
    let server = guarded(Server::with(script), "bird\n", Action::Block);
    let answer = server.post("/v1/completions", &json!({"prompt": "hi", "n": 2})).await.json();
    let choice = |index: usize| {
        let choice = &answer["choices"][index];
        (choice["text"].as_str().unwrap(), choice["finish_reason"].as_str().unwrap())
    };
    assert_eq!((choice(0), choice(1)), (("a ", "content_filter"), ("a fish.", "length")));
    assert_eq!(answer["usage"]["completion_tokens"], 4);
    assert_eq!(server.n_cancelled(), 1);
}

#[tokio::test]
async fn tokens_are_not_told() {
    let server = guarded(Server::saying(" x"), "", Action::Redact);
    let messages = json!([{"role": "user", "content": "hi"}]);
    for (path, body, named) in [
        ("/v1/completions", json!({"prompt": "hi", "logprobs": 1}), "logprobs"),
        ("/v1/completions", json!({"prompt": "hi", "return_token_ids": true}), "return_token_ids"),
        ("/v1/chat/completions", json!({"messages": messages, "logprobs": true}), "logprobs"),
        ("/v1/chat/completions", json!({"messages": messages, "return_token_ids": true}), "return_token_ids"),
        ("/v1/responses", json!({"input": "hi", "include": ["message.output_text.logprobs"]}), "include"),
        ("/api/chat", json!({"model": "tiny", "messages": messages, "logprobs": true}), "logprobs"),
        ("/generate", json!({"inputs": "hi", "parameters": {"details": true}}), "details"),
        ("/generate_stream", json!({"inputs": "hi", "parameters": {"top_n_tokens": 2}}), "top_n_tokens"),
    ] {
        let answer = server.post(path, &body).await;
        assert!(answer.status.is_client_error(), "{path} {body}: {}", answer.body);
        assert!(answer.body.contains(&format!("'{named}' is not possible")), "{path} {body}: {}", answer.body);
    }
    // What is asked only to compare choices is not told.
    let best = json!({"prompt": "hi", "best_of": 2, "n": 1});
    assert_eq!(server.post("/v1/completions", &best).await.status, 200);
    assert_eq!(server.n_seen(), 1);
    let generated = server.post("/api/generate", &json!({"model": "tiny", "prompt": "hi", "stream": false})).await;
    assert!(generated.json().get("context").is_none());
    let event = server.post("/generate_stream", &json!({"inputs": "hi"})).await.named_events().remove(0).1;
    assert_eq!((&event["token"]["id"], &event["token"]["logprob"]), (&json!(0), &Value::Null));
}

#[tokio::test]
async fn resumed_streams_are_redacted_alike() {
    let server = guarded(Server::saying(" to zoe@mail.org, ok"), "", Action::Redact);
    let read = async |after: Option<&str>| {
        let mut request =
            post("/v1/completions", json!({"prompt": "hi", "stream": true, "max_tokens": 30}).to_string());
        request.headers_mut().insert("idempotency-key", "k".parse().unwrap());
        if let Some(after) = after {
            request.headers_mut().insert("last-event-id", after.parse().unwrap());
        }
        server.send(request).await.body
    };
    let whole = read(None).await;
    assert!(whole.contains("[MAIL]") && !whole.contains("zoe"), "{whole}");
    let events: Vec<&str> = whole.split_terminator("\n\n").collect();
    for (at, event) in events.iter().enumerate() {
        let id = event.lines().find_map(|line| line.strip_prefix("id: ")).unwrap();
        let rest = read(Some(id)).await;
        let want = events[at + 1..].iter().map(|event| format!("{event}\n\n")).collect::<String>();
        assert_eq!(rest.replace("retry: 250\n", ""), want, "after {id}");
    }
    assert_eq!(server.n_seen(), 1);
}

#[tokio::test]
async fn new_rules_count_for_new_answers() {
    let guard = Arc::new(Guard::new(rules("bird\n", Action::Redact)));
    let server = Server::saying(" a bird").behind(Security::with_watch(Some(Arc::clone(&guard)), None));
    let ask =
        async || server.post("/v1/completions", &json!({"prompt": "hi"})).await.json()["choices"][0]["text"].clone();
    assert_eq!(ask().await, " a [REDACTED]");
    guard.replace(rules("fish\n", Action::Redact));
    assert_eq!(ask().await, " a bird");
}

/// A service that refuses what has "nasty" in it, and keeps the questions.
async fn service(seen: Arc<Mutex<Vec<Value>>>) -> String {
    let judge = async |State(seen): State<Arc<Mutex<Vec<Value>>>>, Json(question): Json<Value>| {
        let is_bad = question["text"].as_str().unwrap().contains("nasty");
        seen.lock().unwrap().push(question);
        Json(if is_bad { json!({"allow": false, "reason": "not nice"}) } else { json!({"allow": true}) })
    };
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let router = Router::new().route("/check", posting(judge)).with_state(seen);
    tokio::spawn(axum::serve(listener, router).into_future());
    format!("http://{address}/check")
}

fn moderated(server: Server, url: String, on_error: OnError) -> Server {
    let config = ModerationConfig { url, limit: Duration::from_secs(60), on_error, secret_file: None };
    server.behind(Security::with_watch(None, Some(Moderation::start(&config).unwrap())))
}

#[tokio::test]
async fn the_webhook_is_asked_about_every_text() {
    let seen: Arc<Mutex<Vec<Value>>> = Arc::default();
    let server = moderated(Server::saying(" good"), service(Arc::clone(&seen)).await, OnError::Refuse);
    for (path, body) in requests("hi") {
        let answer = server.post(path, &body).await;
        assert_eq!(answer.status, 200, "{path} {body}: {}", answer.body);
        let said = format!("{}{}", answer.body, texts(&answer));
        assert!(said.contains("good"), "{path} {body}: {}", answer.body);
        let questions = std::mem::take(&mut *seen.lock().unwrap());
        assert_eq!(questions.len(), 2, "{path} {body}: {questions:?}");
        let (input, output) = (&questions[0], &questions[1]);
        assert_eq!((&input["direction"], &output["direction"]), (&json!("input"), &json!("output")));
        assert!(input["text"].as_str().unwrap().contains("hi") && output["text"] == " good", "{questions:?}");
        assert_eq!((&output["is_last"], &output["before"], &output["key"]), (&json!(true), &json!(""), &Value::Null));
        assert_eq!((&input["route"], &input["request_id"]), (&json!(path), &output["request_id"]));
        assert_eq!(answer.headers["x-request-id"], input["request_id"].as_str().unwrap());
    }
}

#[tokio::test]
async fn what_the_webhook_refuses_does_not_pass() {
    let url = service(Arc::default()).await;
    let server = moderated(Server::saying(" nasty words"), url, OnError::Refuse);
    for (path, body) in requests("hi") {
        let answer = server.post(path, &body).await;
        assert_eq!(answer.status, 200, "{path} {body}: {}", answer.body);
        assert!(!answer.body.contains("nasty") && !answer.body.contains("words"), "{path} {body}: {}", answer.body);
    }
    let n_seen = server.n_seen();
    let answer = server.post("/v1/completions", &json!({"prompt": "nasty"})).await;
    let error = answer.json()["error"].clone();
    assert_eq!((answer.status.as_u16(), &error["code"]), (400, &json!("content_filter")));
    assert!(error["message"].as_str().unwrap().contains("not nice"));
    assert_eq!(server.n_seen(), n_seen);
}

#[tokio::test]
async fn long_answers_are_asked_about_in_parts() {
    let seen: Arc<Mutex<Vec<Value>>> = Arc::default();
    let output = |n: u32| {
        let finish = (n == 99).then_some(Finish::EndOfSequence);
        let text = format!("word {n:03} of it. ");
        RequestEvent::Output(Output { index: 0, text, token_ids: vec![n], finish, ..Output::default() })
    };
    let script = move |_: &_| {
        Ok((0..100).map(output).chain([RequestEvent::Finished(crate::request::Usage::default())]).collect())
    };
    let server = moderated(Server::with(script), service(Arc::clone(&seen)).await, OnError::Refuse);
    let want: String = (0..100).map(|n| format!("word {n:03} of it. ")).collect();
    let answer = server.post("/v1/completions", &json!({"prompt": "hi", "stream": true})).await;
    let said: String = answer.events().iter().map(|event| event["choices"][0]["text"].as_str().unwrap()).collect();
    assert_eq!(said, want);
    let questions = std::mem::take(&mut *seen.lock().unwrap());
    let parts: Vec<&str> = questions[1..].iter().map(|q| q["text"].as_str().unwrap()).collect();
    assert_eq!(parts.concat(), want);
    assert!(parts.len() > 2 && parts.iter().all(|part| part.len() < 600), "{parts:?}");
    let before = questions[3]["before"].as_str().unwrap();
    assert!(
        want.contains(&format!("{before}{}", parts[2])) && before.len() == 1024.min(parts[0].len() + parts[1].len())
    );
    // Whole answers are asked about once.
    server.post("/v1/completions", &json!({"prompt": "hi"})).await;
    assert_eq!(seen.lock().unwrap().len(), 2);
}

#[tokio::test]
async fn a_webhook_that_does_not_answer_is_as_was_chosen() {
    // Nobody listens where a listener was.
    let address = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let url = format!("http://{address}/");
    let server = moderated(Server::saying(" x"), url.clone(), OnError::Refuse);
    let answer = server.post("/v1/completions", &json!({"prompt": "hi"})).await;
    let code = answer.json()["error"]["code"].clone();
    assert_eq!((answer.status.as_u16(), code), (503, json!("moderation_unavailable")));
    assert!(answer.headers.contains_key("retry-after"));
    assert_eq!(server.n_seen(), 0);
    let server = moderated(Server::saying(" x"), url, OnError::Allow);
    assert_eq!(server.post("/v1/completions", &json!({"prompt": "hi"})).await.status, 200);
}
