use std::time::Duration;

use futures::StreamExt;
use phalanx_cluster::tokenizer::Tokenizer;
use serde_json::{Value, json};

use tower::ServiceExt;

use super::fake::{Server, folder, post, reply};
use crate::{
    frontend::Limits,
    request::{Finish, Output, RequestError, RequestEvent},
};

const PATH: &str = "/v1/messages";

fn ask(more: Value) -> Value {
    let mut body = json!({"model": "tiny", "max_tokens": 20, "messages": [{"role": "user", "content": "hi"}]});
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

fn ending_with(finish: Finish) -> Server {
    let tokenizer = Tokenizer::from_folder(folder()).unwrap();
    Server::with(move |request| Ok(reply(&tokenizer, request, " fine", &finish)))
}

#[tokio::test]
async fn a_message_has_anthropic_s_shape() {
    let server = Server::saying(" fine, thanks");
    let more = json!({"system": [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
                      "temperature": 0.5, "top_p": 0.9, "top_k": 3, "metadata": {"user_id": "u"}});
    let answer = server.post(PATH, &ask(more)).await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    assert_eq!(answer.headers["request-id"], answer.headers["x-request-id"]);
    let answer = answer.json();
    assert!(answer["id"].as_str().unwrap().starts_with("msg_"));
    assert_eq!(
        (&answer["type"], &answer["role"], &answer["model"]),
        (&json!("message"), &json!("assistant"), &json!("tiny"))
    );
    assert_eq!(answer["content"], json!([{"type": "text", "text": " fine, thanks"}]));
    assert_eq!((&answer["stop_reason"], &answer["stop_sequence"]), (&json!("end_turn"), &Value::Null));
    let request = server.last_request();
    let prompt = server.tokenizer.decode(&request.prompt, false);
    assert_eq!(prompt, "<turn>system: Be brief.\n<turn>user: hi\n<turn>assistant: ");
    assert_eq!(answer["usage"]["cache_read_input_tokens"], 2);
    assert_eq!(answer["usage"]["input_tokens"], request.prompt.len() - 2, "without what came from the cache");
    assert_eq!((request.sampling.temperature, request.sampling.top_k, request.max_tokens), (0.5, 3, 20));
}

#[tokio::test]
async fn messages_end_for_a_reason() {
    for (finish, reason, sequence) in [
        (Finish::Length, "max_tokens", Value::Null),
        (Finish::StopString("END".to_owned()), "stop_sequence", json!("END")),
        (Finish::EndOfSequence, "end_turn", Value::Null),
    ] {
        let server = ending_with(finish);
        let whole = server.post(PATH, &ask(json!({"stop_sequences": ["END"]}))).await.json();
        assert_eq!((&whole["stop_reason"], &whole["stop_sequence"]), (&json!(reason), &sequence));
        assert_eq!(server.last_request().stop.strings, ["END"]);
        let events = server.post(PATH, &ask(json!({"stream": true}))).await.named_events();
        let delta = &events[events.len() - 2].1["delta"];
        assert_eq!((&delta["stop_reason"], &delta["stop_sequence"]), (&json!(reason), &sequence));
    }
}

#[tokio::test]
async fn a_stream_has_anthropic_s_events() {
    let server = Server::saying(" one two three");
    let answer = server.post(PATH, &ask(json!({"stream": true}))).await;
    assert_eq!(answer.headers["content-type"], "text/event-stream");
    let events = answer.named_events();
    let names: Vec<&str> = events.iter().map(|(name, _)| name.as_str()).collect();
    let (begin, rest) = names.split_at(2);
    assert_eq!(begin, ["message_start", "content_block_start"]);
    let (deltas, end) = rest.split_at(rest.len() - 3);
    assert!(deltas.len() > 1 && deltas.iter().all(|name| *name == "content_block_delta"), "{names:?}");
    assert_eq!(end, ["content_block_stop", "message_delta", "message_stop"]);
    assert!(events.iter().all(|(name, object)| object["type"] == name.as_str()), "names stand in the objects too");
    assert_eq!(events[0].1["message"]["content"], json!([]));
    assert_eq!(events[0].1["message"]["usage"]["input_tokens"], server.last_request().prompt.len());
    let text: String = events.iter().filter_map(|(_, object)| object["delta"]["text"].as_str()).collect();
    let whole = server.post(PATH, &ask(json!({}))).await.json();
    assert_eq!(whole["content"][0]["text"], text);
    assert_eq!(events[events.len() - 2].1["usage"], whole["usage"]);
}

#[tokio::test]
async fn turns_are_joined_and_begun_ones_go_on() {
    let server = Server::saying("x");
    let messages = json!([
        {"role": "user", "content": "a"}, {"role": "user", "content": [{"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "I am"},
    ]);
    server.post(PATH, &ask(json!({"messages": messages}))).await;
    assert_eq!(
        server.tokenizer.decode(&server.last_request().prompt, false),
        "<turn>user: a\nb\n<turn>assistant: I am"
    );
}

#[tokio::test]
async fn tokens_are_counted_as_they_are_computed() {
    let server = Server::saying("x");
    let body = json!({"model": "tiny", "system": "s", "messages": [{"role": "user", "content": "the cat"}]});
    let counted = server.post("/v1/messages/count_tokens", &body).await.json();
    let mut body = body;
    body["max_tokens"] = json!(1);
    server.post(PATH, &body).await;
    assert_eq!(counted, json!({"input_tokens": server.last_request().prompt.len()}));
}

#[tokio::test]
async fn errors_have_anthropic_s_shape() {
    let server = Server::saying("x");
    for (more, status, kind, said) in [
        (json!({"model": "other"}), 404, "not_found_error", "other"),
        (json!({"temperature": 1.5}), 400, "invalid_request_error", "temperature"),
        (json!({"max_tokens": null}), 400, "invalid_request_error", "max_tokens"),
        (json!({"max_tokens": 1000}), 400, "invalid_request_error", "context"),
        (json!({"messages": []}), 400, "invalid_request_error", "messages"),
        (json!({"messages": [{"role": "system", "content": "x"}]}), 400, "invalid_request_error", "role"),
        (json!({"messages": [{"role": "user", "content": [{"type": "image"}]}]}), 400, "invalid_request_error", "type"),
        (json!({"messages": [{"role": "assistant", "content": " "}]}), 400, "invalid_request_error", "gone on with"),
        (json!({"stop_sequences": [""]}), 400, "invalid_request_error", "stop_sequences"),
        (json!({"tools": [{"name": "f"}]}), 400, "invalid_request_error", "tools"),
        (json!({"thinking": {"type": "enabled", "budget_tokens": 9}}), 400, "invalid_request_error", "thinking"),
        (json!({"odd": 1}), 400, "invalid_request_error", "odd"),
    ] {
        let answer = server.post(PATH, &ask(more.clone())).await;
        let error = answer.json();
        assert_eq!((answer.status.as_u16(), &error["type"]), (status, &json!("error")), "{more}: {error}");
        assert_eq!(error["error"]["type"], kind, "{more}");
        assert!(error["error"]["message"].as_str().unwrap().contains(said), "{more}: {error}");
        assert!(answer.headers.contains_key("x-request-id"));
    }
    assert_eq!(server.n_seen(), 0);
    assert_eq!(server.get(PATH).await.json()["type"], "error", "of the wrong method too");
    let limits = Limits { max_body_bytes: 10, ..Limits::default() };
    let large = Server::limited(|_| Ok(Vec::new()), limits).post(PATH, &ask(json!({}))).await;
    assert_eq!((large.status.as_u16(), &large.json()["error"]["type"]), (413, &json!("request_too_large")));
}

#[tokio::test]
async fn a_stream_that_fails_says_so() {
    let server = Server::with(|_| {
        let part = Output { text: "so far".to_owned(), token_ids: vec![5], ..Output::default() };
        Ok(vec![RequestEvent::Output(part), RequestEvent::Failed(RequestError::Unavailable("gone".to_owned()))])
    });
    let events = server.post(PATH, &ask(json!({"stream": true}))).await.named_events();
    let (name, error) = events.last().unwrap();
    assert_eq!(name, "error");
    assert_eq!(error["error"]["type"], "overloaded_error");
    let whole = server.post(PATH, &ask(json!({}))).await;
    assert_eq!(whole.status, 503);
    assert!(whole.headers.contains_key("retry-after"));
}

#[tokio::test]
async fn a_silent_stream_pings() {
    let script = |_: &crate::request::Request| {
        let output = Output { text: "and".to_owned(), token_ids: vec![5], ..Output::default() };
        Ok(vec![RequestEvent::Output(output)])
    };
    let server = Server::limited(script, Limits { keep_alive: Duration::from_millis(1), ..Limits::default() });
    let request = post(PATH, ask(json!({"stream": true})).to_string());
    let mut stream = server.router.clone().oneshot(request).await.unwrap().into_body().into_data_stream();
    let mut said = String::new();
    while !said.ends_with("event: ping\ndata: {\"type\":\"ping\"}\n\n") {
        said.push_str(std::str::from_utf8(&stream.next().await.unwrap().unwrap()).unwrap());
    }
    assert!(said.contains("text_delta"));
}
