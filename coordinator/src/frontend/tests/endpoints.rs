use std::{sync::Arc, time::Duration};

use axum::body::Body;
use futures::StreamExt;
use http::Request as HttpRequest;
use serde_json::{Value, json};
use tower::ServiceExt;

use super::fake::{CONTEXT, Server, post};
use crate::{
    frontend::{Limits, prometheus},
    request::{Output, Queued, Request, RequestError, RequestEvent},
    scheduler::handle::Readiness,
};

#[tokio::test]
async fn models_are_listed_by_every_name() {
    let server = Server::saying("x");
    let list = server.get("/v1/models").await.json();
    assert_eq!(list["object"], "list");
    let ids: Vec<&Value> = list["data"].as_array().unwrap().iter().map(|m| &m["id"]).collect();
    assert_eq!(ids, ["tiny", "org/tiny"]);
    assert_eq!(list["data"][0]["max_model_len"], CONTEXT);
    let one = server.get("/v1/models/org/tiny").await.json();
    assert_eq!(
        (&one["id"], &one["object"], &one["created"]),
        (&json!("org/tiny"), &json!("model"), &json!(1_700_000_000))
    );
    let none = server.get("/v1/models/other").await;
    assert_eq!((none.status.as_u16(), &none.json()["error"]["code"]), (404, &json!("model_not_found")));
}

#[tokio::test]
async fn health_is_shallow_and_readiness_is_not() {
    let server = Server::saying("x");
    assert_eq!(server.get("/health").await.status, 200);
    assert_eq!(server.get("/ready").await.status, 200);
    *server.fake.readiness.lock().unwrap() = Readiness::NotReady("1 of 2 shards".to_owned());
    assert_eq!(server.get("/health").await.status, 200);
    assert_eq!(server.get("/ping").await.status, 200);
    let ready = server.get("/ready").await;
    assert_eq!(ready.status, 503);
    assert!(ready.headers.contains_key("retry-after"));
    assert!(ready.json()["error"]["message"].as_str().unwrap().contains("1 of 2 shards"));
    assert_eq!(server.get("/version").await.json()["version"], env!("CARGO_PKG_VERSION"));
}

#[tokio::test]
async fn text_goes_to_tokens_and_back() {
    let server = Server::saying("x");
    let body = json!({"model": "tiny", "prompt": "the cat", "return_token_strs": true});
    let tokens = server.post("/tokenize", &body).await.json();
    assert_eq!(tokens["tokens"], json!(server.tokenizer.encode("the cat", true).unwrap()));
    assert_eq!(tokens["count"], tokens["tokens"].as_array().unwrap().len());
    assert_eq!(tokens["token_strs"].as_array().unwrap().len(), tokens["count"].as_u64().unwrap() as usize);
    assert_eq!(tokens["max_model_len"], CONTEXT);
    let text = server.post("/detokenize", &json!({"tokens": tokens["tokens"]})).await.json();
    assert_eq!(text["prompt"], "the cat");
    let chat = server.post("/tokenize", &json!({"messages": [{"role": "user", "content": "hi"}]})).await.json();
    let text = server.post("/detokenize", &json!({"tokens": chat["tokens"]})).await.json();
    assert_eq!(text["prompt"], "<turn>user: hi\n<turn>assistant: ");
    assert_eq!(server.post("/tokenize", &json!({"model": "tiny"})).await.status, 400);
    assert_eq!(server.post("/detokenize", &json!({"tokens": [1_000_000]})).await.status, 400);
}

#[tokio::test]
async fn requests_keep_their_names() {
    let server = Server::saying("x");
    let named = |name: &str| HttpRequest::get("/health").header("x-request-id", name).body(Body::empty()).unwrap();
    assert_eq!(server.send(named("job-17")).await.headers["x-request-id"], "job-17");
    let forged = server.send(named("a b")).await;
    assert_eq!(forged.headers["x-request-id"].len(), 32, "a name with a space is replaced");
    let missing = server.get("/no/such").await;
    assert_eq!(missing.headers["x-request-id"].len(), 32);
    assert!(missing.headers["openai-processing-ms"].to_str().unwrap().parse::<u64>().is_ok());
}

/// One token, and then nothing for ever.
fn endless_with(limits: Limits) -> Server {
    let script = |_: &Request| {
        let output = Output { text: "and".to_owned(), token_ids: vec![5], ..Output::default() };
        Ok(vec![RequestEvent::Output(output)])
    };
    Server::limited(script, limits)
}

fn endless() -> Server {
    endless_with(Limits::default())
}

#[tokio::test]
async fn a_client_that_leaves_cancels_its_stream() {
    let server = endless();
    let body = json!({"prompt": ["a", "b"], "stream": true}).to_string();
    let response = server.router.clone().oneshot(post("/v1/completions", body)).await.unwrap();
    let mut stream = response.into_body().into_data_stream();
    let first = stream.next().await.unwrap().unwrap();
    assert!(String::from_utf8_lossy(&first).contains("and"));
    assert_eq!(server.n_cancelled(), 0);
    drop(stream);
    assert_eq!(server.n_cancelled(), 2, "both prompts");
}

#[tokio::test]
async fn a_client_that_leaves_cancels_its_whole_answer() {
    let server = endless();
    let (router, path) = (server.router.clone(), "/v1/chat/completions");
    let body = json!({"messages": [{"role": "user", "content": "hi"}]}).to_string();
    let call = tokio::spawn(async move { router.oneshot(post(path, body)).await });
    while server.fake.seen.lock().unwrap().is_empty() {
        tokio::task::yield_now().await;
    }
    call.abort();
    assert!(call.await.unwrap_err().is_cancelled());
    assert_eq!(server.n_cancelled(), 1);
}

#[tokio::test]
async fn one_refused_prompt_cancels_the_others() {
    let count = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let server = Server::with(move |_| match count.fetch_add(1, std::sync::atomic::Ordering::SeqCst) {
        0 | 1 => Ok(Vec::new()),
        _ => Err(RequestError::Overloaded {
            waiting: 2,
            limit: 2,
            of: Queued::Requests,
            retry_after: Duration::from_secs(1),
        }),
    });
    let answer = server.post("/v1/completions", &json!({"prompt": ["a", "b", "c"]})).await;
    assert_eq!(answer.status, 429);
    assert_eq!(server.n_cancelled(), 2);
}

#[tokio::test]
async fn a_silent_stream_is_kept_alive() {
    let server = endless_with(Limits { keep_alive: Duration::from_millis(1), ..Limits::default() });
    let body = json!({"prompt": "a", "stream": true}).to_string();
    let response = server.router.clone().oneshot(post("/v1/completions", body)).await.unwrap();
    let mut stream = response.into_body().into_data_stream();
    stream.next().await.unwrap().unwrap();
    for _ in 0..2 {
        let comment = stream.next().await.unwrap().unwrap();
        assert_eq!(&comment[..], b":\n\n");
    }
}

#[tokio::test]
async fn the_server_s_deadline_is_the_request_s() {
    let limits = Limits { deadline: Some(Duration::from_secs(30)), ..Limits::default() };
    let server = Server::limited(|_| Err(RequestError::DeadlineExceeded), limits);
    assert_eq!(server.post("/v1/completions", &json!({"prompt": "a"})).await.status, 504);
    let server = Server::limited(|r| Err(RequestError::Internal(format!("{:?}", r.deadline))), Limits::default());
    let answer = server.post("/v1/completions", &json!({"prompt": "a"})).await;
    assert!(answer.body.contains("None"), "no deadline by default: {}", answer.body);
}

#[test]
fn requests_are_counted_by_endpoint_and_status() {
    let recorder = prometheus::recorder().unwrap().build_recorder();
    let handle = recorder.handle();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    metrics::with_local_recorder(&recorder, || {
        runtime.block_on(async {
            let server = Server::saying("x");
            let chat = |stream: bool| json!({"messages": [{"role": "user", "content": "hi"}], "stream": stream});
            server.post("/v1/chat/completions", &chat(false)).await;
            server.post("/v1/chat/completions", &chat(true)).await;
            server.post("/v1/chat/completions", &json!({})).await;
            server.get("/made/up/path").await;
            let failing = Server::with(|_| Ok(vec![RequestEvent::Failed(RequestError::Internal("bug".to_owned()))]));
            failing.post("/v1/chat/completions", &chat(true)).await;
            let endless = endless();
            let body = chat(true).to_string();
            let response = endless.router.clone().oneshot(post("/v1/chat/completions", body)).await.unwrap();
            drop(response);
        });
    });
    let text = handle.render();
    let count = |endpoint: &str, status: &str| {
        let line = format!("inference_requests_total{{endpoint=\"{endpoint}\",status=\"{status}\"}} ");
        text.lines().find_map(|l| l.strip_prefix(&line)).map(|n| n.parse::<u64>().unwrap())
    };
    assert_eq!(count("/v1/chat/completions", "200"), Some(2), "{text}");
    assert_eq!(count("/v1/chat/completions", "400"), Some(1));
    assert_eq!(count("/v1/chat/completions", "500"), Some(1), "failed in mid-stream");
    assert_eq!(count("/v1/chat/completions", "499"), Some(1), "left in mid-stream");
    assert_eq!(count("unknown", "404"), Some(1));
    assert!(text.contains("inference_latency_seconds_count{endpoint=\"/v1/chat/completions\"} 5"), "{text}");
}
