//! The content guard and the moderation webhook of a real server: what they find passes through no door.

use std::{
    io::{Read, Write},
    net::TcpListener,
    sync::{Arc, Mutex},
};

use phalanx_proto::v1::{FinishReason, GenerateRequest, generate_request::Prompt};
use phalanx_tests::{
    client::{generate, metric, post, post_stream},
    model_cache::{SMOLLM2, model},
    process::{Cluster, wait_until},
};
use serde_json::{Value, json};

const PROMPT: &str = "The capital of France is";

fn start(args: &[&str]) -> Cluster {
    let mut all = vec!["--max-model-len", "512", "--kv-cache-memory", "64MiB"];
    all.extend(args);
    Cluster::start(&model(SMOLLM2), &all)
}

fn asking(prompt: &str) -> Value {
    json!({"prompt": prompt, "max_tokens": 6, "temperature": 0})
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_denied_passes_through_no_door() {
    let folder = tempfile::tempdir().unwrap();
    let list = folder.path().join("list.txt");
    std::fs::write(&list, "# cities\nparis\n").unwrap();
    let guard = format!("pii,denylist:{}", list.display());
    let cluster = start(&["--guard", &guard]);
    let url = format!("{}/v1/completions", cluster.http);
    let ask = |body: &Value| {
        let answer = post(&url, body).unwrap();
        assert_eq!(answer.status, 200, "{}", answer.body);
        answer.json().unwrap()["choices"][0].clone()
    };
    let choice = ask(&asking(PROMPT));
    assert_eq!((&choice["text"], &choice["finish_reason"]), (&json!(" "), &json!("content_filter")));
    let mut body = asking(PROMPT);
    body["stream"] = true.into();
    let events: Vec<Value> = post_stream(&url, &body).unwrap().map(Result::unwrap).collect();
    let said: String = events.iter().filter_map(|event| event["choices"][0]["text"].as_str()).collect();
    assert_eq!(
        (said.as_str(), &events.last().unwrap()["choices"][0]["finish_reason"]),
        (" ", &json!("content_filter"))
    );
    let call = GenerateRequest {
        prompt: Some(Prompt::Text(PROMPT.to_owned())),
        temperature: Some(0.0),
        max_tokens: Some(6),
        ..GenerateRequest::default()
    };
    let answer = generate(&cluster.grpc, call).await.unwrap();
    assert_eq!((answer.choices[0].text.as_str(), answer.choices[0].finish), (" ", FinishReason::ContentFilter));
    assert!(answer.choices[0].token_ids.is_empty(), "tokens would tell what was there");
    let refused = post(&url, &asking("I love PARIS")).unwrap();
    assert_eq!((refused.status, &refused.json().unwrap()["error"]["code"]), (400, &json!("content_filter")));

    // The prompt is read without what is personal.
    let mut body = asking("Write to zoe@mail.org or call +49 30 1234567");
    body["echo"] = true.into();
    let text = ask(&body)["text"].as_str().unwrap().to_owned();
    assert!(text.starts_with("Write to [MAIL] or call [PHONE]"), "{text}");

    // Another list counts without a restart; a broken one changes nothing.
    std::fs::write(&list, "berlin\n").unwrap();
    wait_until("the new list counts", || {
        ask(&asking(PROMPT))["text"].as_str().is_some_and(|t| t.starts_with(" Paris"))
    });
    std::fs::write(&list, "/(/\n").unwrap();
    let failures = || metric(&cluster.http, "phalanx_reload_failures_total{of=\"deny-lists\"}");
    wait_until("the broken list is noticed", || failures() >= 1.0);
    assert_eq!(post(&url, &asking("Berlin is")).unwrap().status, 400);
    assert!(metric(&cluster.http, "phalanx_guard_matches_total{kind=\"denylist\"}") >= 3.0);
    assert!(cluster.interrupt().success());
}

/// Answers every question with what `verdict` says of its body, one after the other.
fn service(seen: Arc<Mutex<Vec<Value>>>) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/check", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            let (mut bytes, mut buffer) = (Vec::new(), [0; 4096]);
            let question = loop {
                let n_read = stream.read(&mut buffer).unwrap_or(0);
                bytes.extend_from_slice(&buffer[..n_read]);
                let text = String::from_utf8_lossy(&bytes);
                let body = text.split_once("\r\n\r\n").map_or("", |(_, body)| body);
                match serde_json::from_str::<Value>(body) {
                    Ok(question) => {
                        let is_signed = text.to_lowercase().contains("x-phalanx-signature: sha256=");
                        assert!(is_signed, "{text}");
                        break question;
                    }
                    Err(_) if n_read == 0 => return,
                    Err(_) => {}
                }
            };
            let allow = !question["text"].as_str().unwrap_or_default().contains("Paris");
            seen.lock().unwrap().push(question);
            let body = json!({"allow": allow, "reason": "no cities"}).to_string();
            let head = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nconnection: close\r\n";
            let _gone = write!(stream, "{head}content-length: {}\r\n\r\n{body}", body.len());
        }
    });
    url
}

#[test]
fn the_webhook_decides() {
    let folder = tempfile::tempdir().unwrap();
    let secret = folder.path().join("secret");
    std::fs::write(&secret, "0123456789abcdef0123456789abcdef\n").unwrap();
    let seen: Arc<Mutex<Vec<Value>>> = Arc::default();
    let url = service(Arc::clone(&seen));
    let secret = secret.display().to_string();
    let cluster =
        start(&["--moderation-webhook", &url, "--moderation-secret-file", &secret, "--moderation-timeout", "60"]);
    let url = format!("{}/v1/completions", cluster.http);
    let answer = post(&url, &asking(PROMPT)).unwrap().json().unwrap();
    let choice = &answer["choices"][0];
    assert_eq!((&choice["text"], &choice["finish_reason"]), (&json!(""), &json!("content_filter")));
    let refused = post(&url, &asking("Paris is")).unwrap();
    assert_eq!(refused.status, 400);
    assert!(refused.body.contains("no cities"), "{}", refused.body);
    let directions: Vec<Value> = seen.lock().unwrap().iter().map(|q| q["direction"].clone()).collect();
    assert_eq!(directions, ["input", "output", "input"]);
    assert!(cluster.interrupt().success());
}
