use std::{collections::BTreeSet, time::Duration};

use axum::body::Body;
use http::{HeaderMap, Request as HttpRequest};
use jiff::Timestamp;
use serde_json::{Value, json};

use super::fake::{Answer, Server, post};
use crate::{
    frontend::{chat, completions, door::PROBES, files, openapi},
    request::{Output, RequestEvent},
    security::{
        Security,
        audit::{AuditConfig, AuditLog, OnError},
        keys::{KeyHash, KeyRecord, Role},
        limits::KeyLimits,
    },
};

const USER: &str = "phx_user";
const ADMIN: &str = "phx_admin";

fn key(name: &str, secret: &str, role: Role, limits: KeyLimits) -> KeyRecord {
    KeyRecord { name: name.to_owned(), hash: KeyHash::of(secret), role, limits, expires: None }
}

fn keys() -> Vec<KeyRecord> {
    let none = KeyLimits::default();
    vec![key("team", USER, Role::User, none), key("operator", ADMIN, Role::Admin, none)]
}

fn limited(limits: KeyLimits) -> Vec<KeyRecord> {
    vec![key("team", USER, Role::User, limits)]
}

fn with_key(mut request: HttpRequest<Body>, key: &str) -> HttpRequest<Body> {
    request.headers_mut().insert("authorization", format!("Bearer {key}").parse().unwrap());
    request
}

async fn complete(server: &Server, key: &str, body: &Value) -> Answer {
    server.send(with_key(post(completions::PATH, body.to_string()), key)).await
}

/// Every path of every router, as its source spells it, with names for what is variable.
fn all_paths() -> BTreeSet<String> {
    let sources = [
        include_str!("../mod.rs"),
        include_str!("../family.rs"),
        include_str!("../anthropic/mod.rs"),
        include_str!("../ollama/mod.rs"),
        include_str!("../tgi/mod.rs"),
        include_str!("../responses/mod.rs"),
        include_str!("../../admin/http.rs"),
    ];
    let path = |source: &str, route: &str| {
        let route = route.trim_start();
        if let Some(literal) = route.strip_prefix('"') {
            return literal.split('"').next().unwrap().replace(['{', '}', '*'], "");
        }
        let name = route.split(',').next().unwrap().trim();
        let known = [
            ("chat::PATH", chat::PATH),
            ("completions::PATH", completions::PATH),
            ("files::PATH", files::PATH),
            ("openapi::DOCUMENT_PATH", openapi::DOCUMENT_PATH),
            ("openapi::PAGE_PATH", openapi::PAGE_PATH),
        ];
        if let Some((_, path)) = known.iter().find(|(known, _)| *known == name) {
            return (*path).to_owned();
        }
        let declared = source.split_once(&format!("const {name}: &str = \""));
        declared.unwrap_or_else(|| panic!("which path is {name}?")).1.split('"').next().unwrap().to_owned()
    };
    let routes = |source: &'static str| source.split(".route(").skip(1).map(move |route| path(source, route));
    sources.iter().copied().flat_map(routes).collect()
}

#[tokio::test]
async fn nothing_but_probes_answers_without_a_key() {
    let (server, _) = Server::saying("x").with_keys(keys());
    let mut paths = all_paths();
    for known in ["/admin/drain", "/v1/models", "/v1/messages", "/api/chat", "/generate", "/v1/responses"] {
        assert!(paths.contains(known), "{paths:?}");
    }
    paths.extend(["/", "/no/such/path", "/docs", "/invocations"].map(str::to_owned));
    for path in &paths {
        for method in ["GET", "POST", "OPTIONS", "DELETE", "HEAD"] {
            let request = || HttpRequest::builder().method(method).uri(path).body(Body::empty()).unwrap();
            let bare = server.send(request()).await;
            let wrong = server.send(with_key(request(), "phx_use")).await;
            if PROBES.contains(&path.as_str()) {
                assert_ne!(bare.status, 401, "{method} {path}");
                continue;
            }
            for answer in [bare, wrong] {
                assert_eq!(answer.status, 401, "{method} {path}: {}", answer.body);
                assert_eq!(answer.headers["www-authenticate"], "Bearer");
            }
        }
    }
    let refused = server.get("/v1/models").await.json();
    assert_eq!(refused["error"]["code"], "invalid_api_key");
    assert!(refused["error"]["message"].as_str().unwrap().contains("Authorization: Bearer"), "{refused}");
    let anthropic = server.get("/v1/messages").await.json();
    assert_eq!(anthropic["error"]["type"], "authentication_error");
    assert_eq!(anthropic["type"], "error");
}

#[tokio::test]
async fn keys_open_what_their_role_is_for() {
    let (server, _) = Server::saying("x").with_keys(keys());
    let get = |path: &str, key: &str| with_key(HttpRequest::get(path).body(Body::empty()).unwrap(), key);
    assert_eq!(server.send(get("/v1/models", USER)).await.status, 200);
    assert_eq!(server.send(get("/metrics", USER)).await.status, 200);
    let named = HttpRequest::get("/v1/models").header("x-api-key", USER).body(Body::empty()).unwrap();
    assert_eq!(server.send(named).await.status, 200);
    let refused = server.send(get("/admin/status", USER)).await;
    assert_eq!((refused.status.as_u16(), &refused.json()["error"]["type"]), (403, &json!("permission_error")));
    assert_eq!(server.send(get("/debug/cluster", USER)).await.status, 403);
    assert_eq!(server.send(get("/admin/status", ADMIN)).await.status, 200);
    assert_eq!(complete(&server, ADMIN, &json!({"prompt": "a"})).await.status, 200);
}

fn number(headers: &HeaderMap, name: &str) -> u64 {
    headers[name].to_str().unwrap().parse().unwrap()
}

#[tokio::test]
async fn the_sixth_request_of_five_is_too_many() {
    let limits = KeyLimits { requests_per_minute: Some(5), ..KeyLimits::default() };
    let mut records = limited(limits);
    records.extend(keys().pop());
    let (server, _) = Server::saying("x").with_keys(records);
    for left in (0..5).rev() {
        let answer = complete(&server, USER, &json!({"prompt": "a", "stream": left % 2 == 0})).await;
        assert_eq!(answer.status, 200, "{}", answer.body);
        assert_eq!(number(&answer.headers, "x-ratelimit-limit-requests"), 5);
        assert_eq!(number(&answer.headers, "x-ratelimit-remaining-requests"), left);
        assert!(!answer.headers.contains_key("x-ratelimit-limit-tokens"));
    }
    let seen = server.n_seen();
    let refused = complete(&server, USER, &json!({"prompt": "a"})).await;
    assert_eq!((refused.status.as_u16(), server.n_seen()), (429, seen));
    let error = &refused.json()["error"];
    assert_eq!((&error["code"], &error["type"]), (&json!("rate_limit_exceeded"), &json!("rate_limit_error")));
    assert!((1..=61).contains(&number(&refused.headers, "retry-after")));
    assert_eq!(number(&refused.headers, "x-ratelimit-remaining-requests"), 0);
    assert!(refused.headers["x-ratelimit-reset-requests"].to_str().unwrap().ends_with('s'));
    // Looking costs nothing, and other keys are not concerned.
    let models = with_key(HttpRequest::get("/v1/models").body(Body::empty()).unwrap(), USER);
    assert_eq!(server.send(models).await.status, 200);
    assert_eq!(complete(&server, ADMIN, &json!({"prompt": "a"})).await.status, 200);
}

#[tokio::test]
async fn tokens_are_reserved_and_what_was_not_taken_is_given_back() {
    let limits = KeyLimits { tokens_per_minute: Some(100), ..KeyLimits::default() };
    let (server, _) = Server::saying(" x").with_keys(limited(limits));
    let n_prompt = server.tokenizer.encode("a b c", true).unwrap().len() as u64;
    let n_output = server.tokenizer.encode(" x", false).unwrap().len() as u64;
    let body = json!({"prompt": "a b c", "max_tokens": 40});
    let first = complete(&server, USER, &body).await;
    assert_eq!(first.status, 200, "{}", first.body);
    assert_eq!(number(&first.headers, "x-ratelimit-limit-tokens"), 100);
    assert_eq!(number(&first.headers, "x-ratelimit-remaining-tokens"), 100 - n_prompt - n_output);
    let never = complete(&server, USER, &json!({"prompt": "a b c", "n": 4, "max_tokens": 40})).await;
    assert_eq!((never.status.as_u16(), &never.json()["error"]["code"]), (400, &json!("rate_limit_exceeded")));
    let half = (100 - n_prompt) / 2;
    let later = complete(&server, USER, &json!({"prompt": "a b c", "n": 2, "max_tokens": half})).await;
    assert_eq!(later.status, 429, "{}", later.body);
    assert!((1..=61).contains(&number(&later.headers, "retry-after")));
    // Prompts of one request count together.
    let both = complete(&server, USER, &json!({"prompt": ["a b c", "a b c"], "max_tokens": half - n_prompt})).await;
    assert_eq!(both.status, 429, "{}", both.body);
}

#[tokio::test]
async fn prompts_and_outputs_have_the_key_s_lengths() {
    let limits = KeyLimits { max_prompt_tokens: Some(8), max_output_tokens: Some(4), ..KeyLimits::default() };
    let (server, _) = Server::saying(" x").with_keys(limited(limits));
    let long = complete(&server, USER, &json!({"prompt": vec![5; 9], "max_tokens": 4})).await;
    assert_eq!((long.status.as_u16(), &long.json()["error"]["code"]), (400, &json!("context_length_exceeded")));
    let much = complete(&server, USER, &json!({"prompt": vec![5; 8], "max_tokens": 5})).await;
    assert_eq!((much.status.as_u16(), &much.json()["error"]["param"]), (400, &json!("max_tokens")));
    assert_eq!(complete(&server, USER, &json!({"prompt": vec![5; 8], "max_tokens": 4})).await.status, 200);
    // Who names no length has the key's.
    let chat = json!({"messages": [{"role": "user", "content": "a"}]});
    let unlimited = Server::saying(" x").with_keys(keys()).0;
    unlimited.send(with_key(post(chat::PATH, chat.to_string()), USER)).await;
    assert!(unlimited.last_request().max_tokens > 4);
    let limits = KeyLimits { max_output_tokens: Some(4), ..KeyLimits::default() };
    let (server, _) = Server::saying(" x").with_keys(limited(limits));
    assert_eq!(server.send(with_key(post(chat::PATH, chat.to_string()), USER)).await.status, 200);
    assert_eq!(server.last_request().max_tokens, 4);
}

#[tokio::test]
async fn places_are_given_back_when_requests_end() {
    let limits = KeyLimits { concurrency: Some(1), ..KeyLimits::default() };
    // Streams stay open until they are told.
    let server = Server::with(|_| Ok(vec![RequestEvent::Output(Output { text: "x".to_owned(), ..Output::default() })]));
    let (server, _) = server.with_keys(limited(limits));
    let open = || async {
        let request = with_key(post(completions::PATH, json!({"prompt": "a", "stream": true}).to_string()), USER);
        tower::ServiceExt::oneshot(server.router.clone(), request).await.unwrap()
    };
    let first = open().await;
    assert_eq!(first.status(), 200);
    let second = open().await;
    assert_eq!(second.status(), 429);
    drop(second);
    drop(first);
    assert_eq!(open().await.status(), 200, "its client has gone");
}

#[tokio::test]
async fn a_revoked_key_stops_at_once() {
    let server = Server::with(|_| Ok(vec![RequestEvent::Output(Output { text: "x".to_owned(), ..Output::default() })]));
    let (server, security) = server.with_keys(keys());
    let request = with_key(post(completions::PATH, json!({"prompt": "a", "stream": true}).to_string()), USER);
    let running = tower::ServiceExt::oneshot(server.router.clone(), request).await.unwrap();
    assert_eq!(running.status(), 200);
    security.replace_keys(keys().into_iter().filter(|k| k.name != "team").collect());
    let body = tokio::time::timeout(Duration::from_secs(60), axum::body::to_bytes(running.into_body(), 1 << 16)).await;
    let body = String::from_utf8(body.expect("it ends").unwrap().to_vec()).unwrap();
    assert!(body.contains("\"invalid_api_key\"") && body.contains("revoked") && !body.contains("[DONE]"), "{body}");
    assert_eq!(server.n_cancelled(), 1, "nothing computes for it any more");
    assert_eq!(complete(&server, USER, &json!({"prompt": "a"})).await.status, 401);
    let expired = KeyRecord { expires: Some(Timestamp::UNIX_EPOCH), ..keys().swap_remove(0) };
    security.replace_keys(vec![expired]);
    let refused = complete(&server, USER, &json!({"prompt": "a"})).await;
    assert_eq!(refused.status, 401);
    assert!(refused.body.contains("expired"), "{}", refused.body);
}

#[tokio::test]
async fn nobody_reads_what_another_key_has_asked() {
    let (server, _) = Server::saying("secret").with_keys(keys());
    let body = json!({"prompt": "a", "stream": true}).to_string();
    let keyed = |key: &str| {
        let mut request = with_key(post(completions::PATH, body.clone()), key);
        request.headers_mut().insert("idempotency-key", "mine".parse().unwrap());
        request
    };
    assert_eq!(server.send(keyed(USER)).await.status, 200);
    let read = |key: &str| with_key(HttpRequest::get("/v1/streams/mine").body(Body::empty()).unwrap(), key);
    assert_eq!(server.send(read(ADMIN)).await.status, 404);
    let own = server.send(read(USER)).await;
    assert_eq!((own.status.as_u16(), server.n_seen()), (200, 1));
    // The same key of another client is another request.
    assert_eq!(server.send(keyed(ADMIN)).await.status, 200);
    assert_eq!(server.n_seen(), 2);
}

#[tokio::test]
async fn every_request_has_a_line_in_the_audit_log() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("audit.jsonl");
    let config =
        AuditConfig { path: path.clone(), max_bytes: 1 << 20, keep: 1, on_error: OnError::Refuse, content: false };
    let log = AuditLog::start(&config).unwrap();
    let server = Server::saying(" secret").behind(Security::with_audit(log.clone(), Some(keys())));
    let body = json!({"prompt": "private words", "max_tokens": 40});
    let answer = complete(&server, USER, &body).await;
    assert_eq!(answer.status, 200);
    assert!(!answer.headers.keys().any(|name| name.as_str().starts_with("x-phalanx-")), "{:?}", answer.headers);
    let streamed = json!({"prompt": "private words", "stream": true});
    assert_eq!(complete(&server, USER, &streamed).await.status, 200);
    assert_eq!(complete(&server, "wrong", &body).await.status, 401);
    assert_eq!(complete(&server, USER, &json!({"prompt": 1.5})).await.status, 400);
    let admin = with_key(HttpRequest::get("/admin/status").body(Body::empty()).unwrap(), ADMIN);
    assert_eq!(server.send(admin).await.status, 200);
    assert_eq!(server.get("/health").await.status, 200);
    log.flush(Duration::from_secs(60)).await;
    let text = std::fs::read_to_string(&path).unwrap();
    assert!(!text.contains("private") && !text.contains("secret") && !text.contains("phx_"), "{text}");
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let summary: Vec<_> =
        lines.iter().map(|l| (l["status"].as_str().unwrap(), l["route"].as_str().unwrap(), &l["key"])).collect();
    let (team, operator) = (json!("team"), json!("operator"));
    let want = [
        ("200", completions::PATH, &team),
        ("200", completions::PATH, &team),
        ("401", completions::PATH, &Value::Null),
        ("400", completions::PATH, &team),
        ("200", "/admin/status", &operator),
    ];
    assert_eq!(summary, want);
    let usage = &answer.json()["usage"];
    assert_eq!((&lines[0]["prompt_tokens"], &lines[0]["model"]), (&usage["prompt_tokens"], &json!("tiny")));
    for line in &lines[..2] {
        assert_eq!(line["output_tokens"], usage["completion_tokens"], "{line}");
    }
    assert_eq!(lines[0]["request_id"], answer.headers["x-request-id"].to_str().unwrap());
}

#[tokio::test]
async fn nothing_is_served_that_can_not_be_recorded() {
    let config = AuditConfig {
        path: "/dev/full".into(),
        max_bytes: 1 << 20,
        keep: 1,
        on_error: OnError::Refuse,
        content: false,
    };
    let log = AuditLog::start(&config).unwrap();
    let server = Server::saying("x").behind(Security::with_audit(log.clone(), None));
    let refused = async {
        loop {
            let answer = server.post(completions::PATH, &json!({"prompt": "a"})).await;
            if answer.status == 503 {
                return answer;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    let answer = tokio::time::timeout(Duration::from_secs(60), refused).await.expect("the log can't be written");
    assert_eq!(answer.json()["error"]["code"], "not_recorded");
    assert_eq!(server.get("/health").await.status, 200);
    assert_eq!(server.get("/v1/models").await.status, 503);
}
