//! Streams of every API can be gone on with after any of their events.

use http::HeaderMap;
use serde_json::{Value, json};

use super::fake::{Server, post};

/// An event: its id, and what is in it.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Event {
    pub id: String,
    name: String,
    pub said: Value,
}

fn events(body: &str) -> Vec<Event> {
    let event = |event: &str| {
        let field = |name: &str| {
            let prefix = format!("{name}: ");
            event.lines().find_map(|line| line.strip_prefix(&prefix)).unwrap_or_default().to_owned()
        };
        let mut said: Value = serde_json::from_str(&field("data")).unwrap_or_else(|e| panic!("{e}: {event}"));
        if let Some(object) = said.as_object_mut() {
            // Times are those at which it was told.
            object.retain(|name, _| name != "created_at" && !name.ends_with("_duration"));
        }
        Event { id: field("id"), name: field("event"), said }
    };
    body.split_terminator("\n\n").map(event).collect()
}

pub(super) async fn read(
    server: &Server,
    path: &str,
    body: &Value,
    header: &'static str,
    after: &str,
) -> (u16, HeaderMap, Vec<Event>) {
    let mut request = post(path, body.to_string());
    request.headers_mut().insert(header, "some-key".parse().unwrap());
    request.headers_mut().insert("last-event-id", after.parse().unwrap());
    let answer = server.send(request).await;
    (answer.status.as_u16(), answer.headers.clone(), events(&answer.body))
}

#[tokio::test]
async fn what_follows_any_event_is_the_rest() {
    let messages = json!([{"role": "user", "content": "hi"}]);
    for (path, header, body) in [
        (
            "/v1/messages",
            "idempotency-key",
            json!({"model": "tiny", "max_tokens": 9, "messages": messages, "stream": true}),
        ),
        ("/v1/responses", "idempotency-key", json!({"input": "hi", "stream": true})),
        ("/generate_stream", "idempotency-key", json!({"inputs": "hi"})),
        // As another coordinator asks.
        ("/api/chat", "x-phalanx-resume-key", json!({"model": "tiny", "messages": messages})),
        ("/api/generate", "x-phalanx-resume-key", json!({"model": "tiny", "prompt": "hi"})),
    ] {
        let server = Server::saying(" one two three");
        let (status, headers, all) = read(&server, path, &body, header, "").await;
        assert_eq!((status, headers["content-type"].to_str().unwrap()), (200, "text/event-stream"), "{path}");
        assert!(all.len() > 3 && all.iter().all(|event| !event.id.is_empty()), "{path}: {all:?}");
        for (index, event) in all.iter().enumerate() {
            let (status, _, rest) = read(&server, path, &body, header, &event.id).await;
            assert!(matches!(status, 200 | 204), "{path}: {status}");
            assert_eq!(rest, all[index + 1..], "{path} after {event:?}");
        }
        assert_eq!(server.n_seen(), 1, "{path} ran once");
    }
}
