use std::{collections::BTreeMap, path::Path, sync::Arc, time::Duration};

use axum::body::Body;
use http::{Request as HttpRequest, StatusCode};
use phalanx_cluster::tokenizer::Tokenizer;
use serde_json::{Value, json};

use super::fake::{Answer, Server, post, reply};
use crate::{
    batches::{FilesConfig, service::Batches},
    frontend::{door, http_router},
    request::{Finish, RequestEvent},
    security::{
        Security,
        keys::{KeyHash, KeyRecord, Role},
        limits::KeyLimits,
    },
};

const BOUNDARY: &str = "form-boundary";

fn files_in(folder: &Path) -> FilesConfig {
    FilesConfig { folder: folder.to_owned(), max_file_bytes: 4096, max_files: 20, max_total_bytes: 100_000 }
}

/// Endpoints with files and batches in a folder.
struct Offline {
    server: Server,
    batches: Batches,
    key: Option<&'static str>,
}

impl Offline {
    async fn start(server: Server, folder: &Path) -> Self {
        Self::behind(server, folder, Arc::default()).await
    }

    async fn behind(server: Server, folder: &Path, security: Arc<Security>) -> Self {
        let state = server.state.clone().with_security(Arc::clone(&security));
        let batches = Batches::start(files_in(folder), http_router(state.clone()), Arc::clone(&security), 3);
        let state = state.with_batches(Some(batches.clone()));
        let router = door::before(http_router(state.clone()), security);
        let offline = Self { server: Server { state, router, ..server }, batches, key: None };
        while offline.batches.files().is_err() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        offline
    }

    async fn send(&self, mut request: HttpRequest<Body>) -> Answer {
        if let Some(key) = self.key {
            request.headers_mut().insert("authorization", format!("Bearer {key}").parse().unwrap());
        }
        self.server.send(request).await
    }

    async fn get(&self, path: &str) -> Answer {
        self.send(HttpRequest::get(path).body(Body::empty()).unwrap()).await
    }

    async fn upload(&self, fields: &[(&str, &str)]) -> Answer {
        let mut body = String::new();
        for (name, value) in fields {
            let file = if *name == "file" { "; filename=\"in.jsonl\"" } else { "" };
            body +=
                &format!("--{BOUNDARY}\r\nContent-Disposition: form-data; name=\"{name}\"{file}\r\n\r\n{value}\r\n");
        }
        body += &format!("--{BOUNDARY}--\r\n");
        let form = format!("multipart/form-data; boundary={BOUNDARY}");
        let request = HttpRequest::post("/v1/files").header("content-type", form);
        self.send(request.body(Body::from(body)).unwrap()).await
    }

    async fn file(&self, text: &str) -> String {
        let answer = self.upload(&[("purpose", "batch"), ("file", text)]).await;
        assert_eq!(answer.status, 200, "{}", answer.body);
        answer.json()["id"].as_str().unwrap().to_owned()
    }

    async fn create(&self, file: &str) -> Answer {
        let body = json!({"input_file_id": file, "endpoint": "/v1/completions", "completion_window": "24h",
                          "metadata": {"job": "nightly"}});
        self.send(post("/v1/batches", body.to_string())).await
    }

    /// Waits until a batch has a status.
    async fn reaches(&self, id: &str, status: &str) -> Value {
        loop {
            let batch = self.get(&format!("/v1/batches/{id}")).await.json();
            if batch["status"] == status {
                return batch;
            }
            let is_over = ["completed", "failed", "cancelled", "expired"].contains(&batch["status"].as_str().unwrap());
            assert!(!is_over, "wanted {status}: {batch}");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    /// A file's lines by their names.
    async fn lines(&self, id: &Value) -> BTreeMap<String, Value> {
        let answer = self.get(&format!("/v1/files/{}/content", id.as_str().unwrap())).await;
        assert_eq!(answer.status, 200, "{}", answer.body);
        let mut lines = BTreeMap::new();
        for line in answer.lines() {
            let name = line["custom_id"].as_str().unwrap().to_owned();
            assert!(lines.insert(name.clone(), line).is_none(), "{name} stands twice");
        }
        lines
    }
}

fn line(id: &str, body: &Value) -> String {
    json!({"custom_id": id, "method": "POST", "url": "/v1/completions", "body": body}).to_string() + "\n"
}

fn good(id: &str) -> String {
    line(id, &json!({"prompt": id, "max_tokens": 4}))
}

fn text_of(line: &Value) -> &str {
    line["response"]["body"]["choices"][0]["text"].as_str().unwrap()
}

#[tokio::test]
async fn files_are_kept_listed_and_deleted() {
    let folder = tempfile::tempdir().unwrap();
    let offline = Offline::start(Server::saying("x"), folder.path()).await;
    let sent = offline.upload(&[("file", "one\n"), ("purpose", "batch")]).await;
    let file = sent.json();
    assert_eq!((&file["object"], &file["bytes"], &file["filename"]), (&json!("file"), &json!(4), &json!("in.jsonl")));
    assert_eq!((&file["purpose"], &file["status"]), (&json!("batch"), &json!("processed")));
    let id = file["id"].as_str().unwrap();
    assert!(id.starts_with("file-") && id.len() > 30);
    assert_eq!(offline.get(&format!("/v1/files/{id}")).await.json(), file);
    let content = offline.get(&format!("/v1/files/{id}/content")).await;
    assert_eq!((content.body.as_str(), &content.headers["content-length"]), ("one\n", &"4".parse().unwrap()));
    let other = offline.upload(&[
        ("purpose", "batch"),
        ("expires_after[anchor]", "created_at"),
        ("expires_after[seconds]", "3600"),
        ("file", "two"),
    ]);
    let other = other.await.json();
    assert_eq!(other["expires_at"].as_u64(), other["created_at"].as_u64().map(|at| at + 3600));
    let list = offline.get("/v1/files?purpose=batch&limit=1").await.json();
    assert_eq!((list["data"].as_array().unwrap().len(), &list["has_more"]), (1, &json!(true)));
    assert_eq!(offline.get("/v1/files?purpose=vision").await.json()["data"], json!([]));

    let delete = HttpRequest::delete(format!("/v1/files/{id}")).body(Body::empty()).unwrap();
    assert_eq!(offline.send(delete).await.json(), json!({"id": id, "object": "file", "deleted": true}));
    for path in [format!("/v1/files/{id}"), format!("/v1/files/{id}/content"), "/v1/files/file-x".to_owned()] {
        let gone = offline.get(&path).await;
        assert_eq!((gone.status, gone.json()["error"]["code"].clone()), (StatusCode::NOT_FOUND, json!("not_found")));
    }
}

#[tokio::test]
async fn bad_uploads_are_refused_and_leave_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let offline = Offline::start(Server::saying("x"), folder.path()).await;
    let long = "x".repeat(5000);
    for (fields, status, param) in [
        (&[("file", "x")][..], 400, Some("purpose")),
        (&[("purpose", "batch")], 400, Some("file")),
        (&[("purpose", "vision"), ("file", "x")], 400, Some("purpose")),
        (&[("purpose", "batch"), ("file", "x"), ("file", "y")], 400, Some("file")),
        (&[("purpose", "batch"), ("color", "red"), ("file", "x")], 400, Some("color")),
        (&[("purpose", "batch"), ("expires_after[seconds]", "5"), ("file", "x")], 400, Some("expires_after")),
        (&[("purpose", "batch"), ("file", &long)], 413, None),
    ] {
        let answer = offline.upload(fields).await;
        let error = &answer.json()["error"];
        assert_eq!((answer.status.as_u16(), error["param"].as_str()), (status, param), "{}", answer.body);
    }
    let json = offline.send(post("/v1/files", "{}")).await;
    assert_eq!(json.status, 400);
    assert_eq!(offline.get("/v1/files").await.json()["data"], json!([]));
    // What was begun is removed behind the answers.
    let n_left = || std::fs::read_dir(folder.path().join("files")).unwrap().count();
    let gone = async {
        while n_left() > 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), gone).await.expect("nothing is left");

    let off = Server::saying("x").get("/v1/files").await;
    assert_eq!((off.status.as_u16(), off.json()["error"]["code"].clone()), (400, json!("files_off")));
    assert!(off.body.contains("--files-dir"));
}

#[tokio::test]
async fn a_batch_answers_every_line() {
    let folder = tempfile::tempdir().unwrap();
    let offline = Offline::start(Server::saying("abc"), folder.path()).await;
    let refused = line("too-long", &json!({"prompt": "x", "max_tokens": 100_000}));
    let file = offline.file(&[good("a"), refused, good("b"), good("c"), good("d")].concat()).await;
    let made = offline.create(&file).await;
    assert_eq!(made.status, 200, "{}", made.body);
    let made = made.json();
    let id = made["id"].as_str().unwrap();
    assert_eq!((&made["object"], &made["status"]), (&json!("batch"), &json!("validating")));
    assert_eq!(made["metadata"], json!({"job": "nightly"}));
    assert_eq!(made["expires_at"].as_u64(), made["created_at"].as_u64().map(|at| at + 24 * 3600));

    let done = offline.reaches(id, "completed").await;
    assert_eq!(done["request_counts"], json!({"total": 5, "completed": 4, "failed": 1}));
    let output = offline.lines(&done["output_file_id"]).await;
    assert_eq!(output.keys().collect::<Vec<_>>(), ["a", "b", "c", "d"]);
    assert!(output.values().all(|line| text_of(line) == "abc" && line["error"].is_null()));
    assert!(output.values().all(|line| line["response"]["request_id"].as_str().is_some_and(|id| !id.is_empty())));
    let errors = offline.lines(&done["error_file_id"]).await;
    assert_eq!(errors["too-long"]["response"]["status_code"], 400);
    assert_eq!(errors["too-long"]["response"]["body"]["error"]["code"], "context_length_exceeded");
    let seen = offline.server.fake.seen.lock().unwrap().clone();
    assert!(seen.len() == 4 && seen.iter().all(|request| request.priority > 1 << 20), "clients come first");

    let list = offline.get("/v1/batches?limit=5").await.json();
    assert_eq!((&list["data"][0]["id"], &list["has_more"]), (&json!(id), &json!(false)));
    let late = offline.send(post(&format!("/v1/batches/{id}/cancel"), "")).await;
    assert_eq!((late.status.as_u16(), late.json()["error"]["code"].clone()), (409, json!("batch_over")));
}

#[tokio::test]
async fn files_that_are_no_batches_say_why() {
    let folder = tempfile::tempdir().unwrap();
    let offline = Offline::start(Server::saying("x"), folder.path()).await;
    let file = offline.file(&[good("a"), good("a"), "nonsense".to_owned()].concat()).await;
    let id = offline.create(&file).await.json()["id"].as_str().unwrap().to_owned();
    let failed = offline.reaches(&id, "failed").await;
    let codes: Vec<_> = failed["errors"]["data"].as_array().unwrap().iter().map(|e| (&e["code"], &e["line"])).collect();
    assert_eq!(
        codes,
        [(&json!("invalid_json_line"), &json!(3)), (&json!("duplicate_custom_id"), &json!(2))],
        "{failed}"
    );
    assert_eq!((&failed["output_file_id"], offline.server.n_seen()), (&Value::Null, 0));

    let unknown = offline.create("file-unknown").await;
    assert_eq!(unknown.status, 404);
    let body = json!({"input_file_id": file, "endpoint": "/v1/completions", "completion_window": "24h"});
    for (name, value) in [
        ("endpoint", json!("/v1/embeddings")),
        ("completion_window", json!("soon")),
        ("metadata", json!({"a": 1})),
        ("output_expires_after", json!({"anchor": "created_at", "seconds": 1})),
        ("priority", json!(1)),
    ] {
        let mut wrong = body.clone();
        wrong[name] = value;
        let answer = offline.send(post("/v1/batches", wrong.to_string())).await;
        assert_eq!(answer.status, 400, "{name}: {}", answer.body);
    }
}

/// Prompts that begin with `s` are not answered.
fn slow() -> Server {
    let tokenizer = Tokenizer::from_folder(super::fake::folder()).unwrap();
    let slow = tokenizer.encode("slow", true).unwrap();
    Server::with(move |request| {
        let mut events = reply(&tokenizer, request, "abc", &Finish::EndOfSequence);
        if request.prompt == slow {
            events.retain(|event| !matches!(event, RequestEvent::Finished(_)));
        }
        Ok(events)
    })
}

fn slow_line(id: &str) -> String {
    line(id, &json!({"prompt": "slow", "max_tokens": 4}))
}

#[tokio::test]
async fn a_cancelled_batch_keeps_what_it_has() {
    let folder = tempfile::tempdir().unwrap();
    let offline = Offline::start(slow(), folder.path()).await;
    let file = offline.file(&[good("a"), slow_line("s1"), slow_line("s2"), slow_line("s3"), good("b")].concat()).await;
    let id = offline.create(&file).await.json()["id"].as_str().unwrap().to_owned();
    while offline.get(&format!("/v1/batches/{id}")).await.json()["request_counts"]["completed"] != 1
        || offline.server.n_seen() < 4
    {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    let delete = HttpRequest::delete(format!("/v1/files/{file}")).body(Body::empty()).unwrap();
    assert_eq!(offline.send(delete).await.json()["error"]["code"], "file_in_use");
    let answer = offline.send(post(&format!("/v1/batches/{id}/cancel"), "")).await.json();
    assert!(["cancelling", "cancelled"].contains(&answer["status"].as_str().unwrap()), "{answer}");
    let cancelled = offline.reaches(&id, "cancelled").await;
    assert_eq!(cancelled["request_counts"], json!({"total": 5, "completed": 1, "failed": 0}));
    assert_eq!(offline.lines(&cancelled["output_file_id"]).await.keys().collect::<Vec<_>>(), ["a"]);
    assert_eq!(cancelled["error_file_id"], Value::Null);
    while offline.server.n_cancelled() < 4 {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

#[tokio::test]
async fn a_batch_goes_on_in_another_process() {
    let folder = tempfile::tempdir().unwrap();
    let offline = Offline::start(slow(), folder.path()).await;
    let lines = [good("a"), good("b"), slow_line("s1"), slow_line("s2"), slow_line("s3"), good("c")];
    let file = offline.file(&lines.concat()).await;
    let id = offline.create(&file).await.json()["id"].as_str().unwrap().to_owned();
    while offline.get(&format!("/v1/batches/{id}")).await.json()["request_counts"]["completed"] != 2 {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    offline.batches.stop().await;
    assert_eq!(offline.get("/v1/files").await.status, 200, "what is known can be read");
    let refused = offline.upload(&[("purpose", "batch"), ("file", "x")]).await;
    assert_eq!(refused.status, 503, "another process has the folder now");
    // A line that was torn when the process was killed.
    let stored = std::fs::read_to_string(folder.path().join(format!("batches/{id}.json"))).unwrap();
    let output = serde_json::from_str::<Value>(&stored).unwrap()["output"].as_str().unwrap().to_owned();
    let path = folder.path().join("files").join(output);
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, format!("{text}{{\"id\":\"batch_req_")).unwrap();

    let next = Offline::start(Server::saying("abc"), folder.path()).await;
    let done = next.reaches(&id, "completed").await;
    assert_eq!(done["request_counts"], json!({"total": 6, "completed": 6, "failed": 0}));
    assert_eq!(next.lines(&done["output_file_id"]).await.len(), 6);
    assert_eq!(next.server.n_seen(), 4, "two were done");
}

fn key(name: &str, secret: &str, limits: KeyLimits) -> KeyRecord {
    KeyRecord { name: name.to_owned(), hash: KeyHash::of(secret), role: Role::User, limits, expires: None }
}

#[tokio::test]
async fn files_and_batches_are_those_of_their_key() {
    let folder = tempfile::tempdir().unwrap();
    let none = KeyLimits::default();
    let narrow = KeyLimits { concurrency: Some(1), ..none };
    let security = Security::with_keys(vec![key("a", "key-a", narrow), key("b", "key-b", none)]);
    let mut offline = Offline::behind(slow(), folder.path(), Arc::clone(&security)).await;
    offline.key = Some("key-a");
    // More at once than the key may: the others wait.
    let file = offline.file(&[good("1"), good("2"), good("3"), good("4"), good("5")].concat()).await;
    let id = offline.create(&file).await.json()["id"].as_str().unwrap().to_owned();
    let done = offline.reaches(&id, "completed").await;
    assert_eq!(done["request_counts"]["completed"], 5, "{done}");

    offline.key = Some("key-b");
    for path in [
        format!("/v1/files/{file}"),
        format!("/v1/files/{}/content", done["output_file_id"].as_str().unwrap()),
        format!("/v1/batches/{id}"),
    ] {
        assert_eq!(offline.get(&path).await.status, 404, "{path}");
    }
    assert_eq!(offline.get("/v1/files").await.json()["data"], json!([]));
    assert_eq!(offline.get("/v1/batches").await.json()["data"], json!([]));
    assert_eq!(offline.create(&file).await.status, 404);
    assert_eq!(offline.send(post(&format!("/v1/batches/{id}/cancel"), "")).await.status, 404);
    let delete = HttpRequest::delete(format!("/v1/files/{file}")).body(Body::empty()).unwrap();
    assert_eq!(offline.send(delete).await.status, 404);

    // A key that is revoked stops at once, in the middle of a batch too.
    let file = offline.file(&[good("1"), slow_line("s1"), good("2")].concat()).await;
    let id = offline.create(&file).await.json()["id"].as_str().unwrap().to_owned();
    while offline.get(&format!("/v1/batches/{id}")).await.json()["request_counts"]["completed"] != 2 {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    security.replace_keys(vec![key("b", "another", none)]);
    offline.key = Some("another");
    let done = offline.reaches(&id, "completed").await;
    assert_eq!(done["request_counts"], json!({"total": 3, "completed": 2, "failed": 1}));
    assert_eq!(offline.lines(&done["error_file_id"]).await["s1"]["response"]["status_code"], 401);
}

#[tokio::test]
async fn a_request_that_is_passed_on_twice_makes_one_batch() {
    let folder = tempfile::tempdir().unwrap();
    let offline = Offline::start(Server::saying("x"), folder.path()).await;
    let file = offline.file(&good("a")).await;
    let body = json!({"input_file_id": file, "endpoint": "/v1/completions", "completion_window": "24h"}).to_string();
    let ask = async |key: &str| {
        let mut request = post("/v1/batches", body.clone());
        request.headers_mut().insert("x-phalanx-resume-key", key.parse().unwrap());
        offline.send(request).await.json()["id"].as_str().unwrap().to_owned()
    };
    let (first, again, other) = (ask("k").await, ask("k").await, ask("l").await);
    assert!(first == again && first != other, "{first} {again} {other}");
}
