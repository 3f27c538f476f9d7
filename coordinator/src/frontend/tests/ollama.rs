use axum::body::Body;
use http::Request as HttpRequest;
use phalanx_cluster::tokenizer::Tokenizer;
use serde_json::{Value, json};

use super::fake::{CONTEXT, Server, folder, post, reply};
use crate::request::{Finish, Output, RequestError, RequestEvent};

const CHAT: &str = "/api/chat";
const GENERATE: &str = "/api/generate";

fn ask(path: &str, more: Value) -> Value {
    let mut body = match path {
        CHAT => json!({"model": "tiny:latest", "messages": [{"role": "user", "content": "hi"}]}),
        _ => json!({"model": "tiny", "prompt": "hi"}),
    };
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

fn said(path: &str, line: &Value) -> String {
    let text = if path == CHAT { &line["message"]["content"] } else { &line["response"] };
    text.as_str().unwrap().to_owned()
}

#[tokio::test]
async fn lines_join_to_the_whole_answer() {
    let server = Server::saying(" one two three");
    for path in [CHAT, GENERATE] {
        let streamed = server.post(path, &ask(path, json!({}))).await;
        assert_eq!(streamed.status, 200, "{}", streamed.body);
        assert_eq!(streamed.headers["content-type"], "application/x-ndjson");
        let lines = streamed.lines();
        let (last, parts) = lines.split_last().unwrap();
        assert!(parts.len() > 1 && parts.iter().all(|line| line["done"] == false));
        let joined: String = lines.iter().map(|line| said(path, line)).collect();
        let whole = server.post(path, &ask(path, json!({"stream": false}))).await.json();
        assert_eq!(said(path, &whole), joined);
        for end in [last, &whole] {
            assert_eq!((&end["done"], &end["done_reason"]), (&json!(true), &json!("stop")));
            assert_eq!(end["prompt_eval_count"], server.last_request().prompt.len());
            assert!(end["eval_count"].as_u64().unwrap() > 1);
            for name in ["total_duration", "load_duration", "prompt_eval_duration", "eval_duration"] {
                assert!(end[name].is_u64(), "{name}: {end}");
            }
            assert!(end["created_at"].as_str().unwrap().parse::<jiff::Timestamp>().is_ok());
        }
        assert_eq!(server.tokenizer.decode(&server.last_request().prompt, false), "<turn>user: hi\n<turn>assistant: ");
    }
}

#[tokio::test]
async fn options_are_the_requests_parameters() {
    let server = Server::saying("x");
    let options = json!({"num_predict": 7, "temperature": 0.25, "top_k": 5, "top_p": 0.5, "min_p": 0.1, "seed": 9,
        "stop": ["END"], "repeat_penalty": 1.5, "repeat_last_n": -1, "presence_penalty": 0.5, "frequency_penalty": 0.25,
        "num_ctx": CONTEXT, "num_thread": 3, "mirostat": 0});
    assert_eq!(server.post(CHAT, &ask(CHAT, json!({"options": options}))).await.status, 200);
    let request = server.last_request();
    let sampling = request.sampling;
    assert_eq!((request.max_tokens, sampling.seed, sampling.top_k), (7, 9, 5));
    assert_eq!((sampling.temperature, sampling.top_p, sampling.min_p), (0.25, 0.5, 0.1));
    let penalties = (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty);
    assert_eq!((penalties, request.stop.strings), ((1.5, 0.5, 0.25), vec!["END".to_owned()]));
    server.post(CHAT, &ask(CHAT, json!({"options": {"num_predict": -1}}))).await;
    let request = server.last_request();
    assert_eq!((request.sampling.temperature, request.sampling.top_k, request.sampling.top_p), (0.8, 40, 0.9));
    assert_eq!(request.max_tokens as usize, CONTEXT - request.prompt.len());
}

#[tokio::test]
async fn texts_are_templated_unless_they_are_raw() {
    let server = Server::saying(" fine");
    let prompt = || server.tokenizer.decode(&server.last_request().prompt, false);
    let first = server.post(GENERATE, &ask(GENERATE, json!({"system": "s", "stream": false}))).await.json();
    assert_eq!(prompt(), "<turn>system: s\n<turn>user: hi\n<turn>assistant: ");
    let more = json!({"context": first["context"], "stream": false});
    server.post(GENERATE, &ask(GENERATE, more)).await;
    assert_eq!(
        prompt(),
        "<turn>system: s\n<turn>user: hi\n<turn>assistant:  fine<turn>user: hi\n<turn>assistant: ",
        "the answer's tokens are the next one's beginning"
    );
    let raw = server.post(GENERATE, &ask(GENERATE, json!({"raw": true, "stream": false}))).await.json();
    assert_eq!((prompt().as_str(), raw.get("context")), ("hi", None));
    server.post(CHAT, &ask(CHAT, json!({"messages": [{"role": "assistant", "content": "I am"}]}))).await;
    assert_eq!(prompt(), "<turn>assistant: I am");
}

#[tokio::test]
async fn asking_for_nothing_loads_the_model() {
    let server = Server::saying("x");
    for (path, body) in [
        (GENERATE, json!({"model": "tiny"})),
        (GENERATE, json!({"model": "tiny", "prompt": "", "keep_alive": "5m"})),
        (CHAT, json!({"model": "tiny", "messages": [], "keep_alive": -1})),
    ] {
        let answer = server.post(path, &body).await;
        assert_eq!(answer.status, 200, "{}", answer.body);
        assert_eq!((&answer.json()["done"], &answer.json()["done_reason"]), (&json!(true), &json!("load")));
    }
    assert_eq!(server.post(GENERATE, &json!({"model": "tiny", "keep_alive": 0})).await.status, 400);
    assert_eq!(server.n_seen(), 0);
}

#[tokio::test]
async fn scores_and_ends_are_told() {
    let tokenizer = Tokenizer::from_folder(folder()).unwrap();
    let server = Server::with(move |request| Ok(reply(&tokenizer, request, " one two", &Finish::Length)));
    let body = ask(CHAT, json!({"logprobs": true, "top_logprobs": 2, "stream": false}));
    let whole = server.post(CHAT, &body).await.json();
    assert_eq!(whole["done_reason"], "length");
    assert_eq!(whole["logprobs"][0]["top_logprobs"].as_array().unwrap().len(), 2);
    assert_eq!(whole["logprobs"].as_array().unwrap().len() as u64, whole["eval_count"].as_u64().unwrap());
    let streamed = server.post(CHAT, &ask(CHAT, json!({"logprobs": true, "top_logprobs": 2}))).await.lines();
    let joined: Vec<Value> = streamed.iter().filter_map(|l| l["logprobs"].as_array()).flatten().cloned().collect();
    assert_eq!(json!(joined), whole["logprobs"]);
}

#[tokio::test]
async fn the_model_is_described() {
    let server = Server::saying("x");
    let tags = server.get("/api/tags").await.json();
    let names: Vec<&str> = tags["models"].as_array().unwrap().iter().map(|m| m["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["tiny", "org/tiny"]);
    assert_eq!(tags["models"][0]["details"]["family"], "llama");
    assert_eq!(tags["models"][0]["details"]["parameter_size"], "1.5M");
    let shown = server.post("/api/show", &json!({"model": "tiny:latest"})).await.json();
    assert_eq!(shown["model_info"]["llama.context_length"], CONTEXT);
    assert!(shown["template"].as_str().unwrap().contains("<turn>"));
    assert_eq!(server.post("/api/show", &json!({"model": "other"})).await.status, 404);
    let loaded = server.get("/api/ps").await.json();
    assert!(loaded["models"][0]["expires_at"].as_str().unwrap().parse::<jiff::Timestamp>().is_ok());
    assert_eq!(server.get("/api/version").await.json()["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(server.get("/").await.status, 200);
    let head = server.send(HttpRequest::head("/").body(Body::empty()).unwrap()).await;
    assert_eq!((head.status.as_u16(), head.body.as_str()), (200, ""));
}

#[tokio::test]
async fn errors_have_ollama_s_shape() {
    let server = Server::saying("x");
    for (path, more, said) in [
        (CHAT, json!({"model": "other"}), "other"),
        (CHAT, json!({"model": null}), "model"),
        (CHAT, json!({"messages": [{"role": "wizard", "content": "x"}]}), "role"),
        (CHAT, json!({"messages": [{"role": "user", "content": "x", "images": ["aGk="]}]}), "images"),
        (CHAT, json!({"options": {"num_ctx": CONTEXT + 1}}), "num_ctx"),
        (CHAT, json!({"options": {"num_predict": 1000}}), "num_predict"),
        (CHAT, json!({"options": {"temperature": 99}}), "options.temperature"),
        (CHAT, json!({"options": {"repeat_penalty": 99}}), "options.repeat_penalty"),
        (CHAT, json!({"options": {"repeat_penalty": 1.1, "repeat_last_n": 64}}), "repeat_last_n"),
        (CHAT, json!({"options": {"mirostat": 2}}), "mirostat"),
        (CHAT, json!({"options": {"odd": 2}}), "odd"),
        (CHAT, json!({"options": []}), "options"),
        (CHAT, json!({"format": "xml"}), "format"),
        (CHAT, json!({"tools": [{"type": "function"}]}), "tools"),
        (CHAT, json!({"think": true}), "think"),
        (CHAT, json!({"stream": "yes"}), "stream"),
        (GENERATE, json!({"suffix": "x"}), "suffix"),
        (GENERATE, json!({"template": "{{ .Prompt }}"}), "template"),
        (GENERATE, json!({"context": [1_000_000]}), "context"),
        (GENERATE, json!({"raw": true, "system": "x"}), "system"),
        (GENERATE, json!({"images": ["aGk="]}), "images"),
        (GENERATE, json!({"prompt": 5}), "prompt"),
        (GENERATE, json!({"odd": 5}), "odd"),
    ] {
        let answer = server.post(path, &ask(path, more.clone())).await;
        let expected = if more["model"].is_string() { 404 } else { 400 };
        assert_eq!(answer.status, expected, "{path} {more}: {}", answer.body);
        let error = answer.json();
        assert!(error["error"].as_str().unwrap().contains(said), "{path} {more}: {error}");
    }
    assert_eq!(server.n_seen(), 0);
    assert!(server.post("/api/pull", &json!({"model": "x"})).await.json()["error"].is_string());
    let keyed = HttpRequest::post(CHAT).header("content-type", "application/json").header("idempotency-key", "k");
    let refused = server.send(keyed.body(Body::from(ask(CHAT, json!({})).to_string())).unwrap()).await;
    assert_eq!(refused.status, 400, "lines have no ids");
}

#[tokio::test]
async fn a_stream_that_fails_says_so() {
    let server = Server::with(|_| {
        let part = Output { text: "so far".to_owned(), token_ids: vec![5], ..Output::default() };
        Ok(vec![RequestEvent::Output(part), RequestEvent::Failed(RequestError::Unavailable("gone".to_owned()))])
    });
    let lines = server.post(CHAT, &ask(CHAT, json!({}))).await.lines();
    assert!(lines.last().unwrap()["error"].as_str().unwrap().contains("gone"));
}

#[tokio::test]
async fn who_passes_a_stream_on_gets_events() {
    let server = Server::saying(" one two");
    let mut request = post(CHAT, ask(CHAT, json!({})).to_string());
    request.headers_mut().insert("x-phalanx-resume-key", "k".parse().unwrap());
    let answer = server.send(request).await;
    assert_eq!(answer.headers["content-type"], "text/event-stream");
    assert!(answer.body.contains("id: 1") && answer.body.contains("data: {"), "{}", answer.body);
}
