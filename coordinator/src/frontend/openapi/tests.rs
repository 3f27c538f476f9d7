//! The document against the endpoints themselves.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use http::{Method, Request, StatusCode};
use serde_json::json;

use super::{
    schema::{entries, fields, operations, resolve},
    *,
};
use crate::{
    admin::{self, http::AdminHttp, testing::FakeControl},
    frontend::{fields::TELL, http_router, tests::fake::Server},
    security::{
        Security,
        keys::{KeyHash, KeyRecord, Role},
        limits::KeyLimits,
    },
};

/// Paths of a router, as it shows them when it is asked to show itself: there is no other way to ask.
fn paths(router: &axum::Router) -> BTreeSet<String> {
    let shown = format!("{router:?}");
    let (_, node) = shown.split_once("paths: {").expect("a router shows its paths");
    let (paths, _) = balanced(node);
    let found = paths.split("): \"").skip(1).filter_map(|rest| Some(rest.split_once('"')?.0.to_owned()));
    // Fallbacks have paths of their own.
    found.filter(|path| !path.contains("__private__")).collect()
}

/// Up to the brace that closes what was opened before; what is quoted does not count.
fn balanced(text: &str) -> (&str, &str) {
    let (mut depth, mut is_quoted) = (1, false);
    for (at, letter) in text.char_indices() {
        match letter {
            '"' => is_quoted = !is_quoted,
            '{' if !is_quoted => depth += 1,
            '}' if !is_quoted => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return text.split_at(at);
        }
    }
    (text, "")
}

/// How the document writes a path.
fn as_documented(path: &str) -> String {
    path.replace("{*", "{")
}

const METHODS: &[(&str, Method)] = &[
    ("get", Method::GET),
    ("post", Method::POST),
    ("put", Method::PUT),
    ("delete", Method::DELETE),
    ("patch", Method::PATCH),
];

#[tokio::test]
async fn every_endpoint_is_described_and_every_description_has_one() {
    let server = Server::saying("x");
    let state = server.state.clone();
    let mut found: BTreeMap<String, BTreeSet<&str>> = BTreeMap::new();
    let routers = [http_router(state), admin::http::router(Arc::new(FakeControl), AdminHttp::All)];
    let server = server.behind(Arc::new(Security::default()));
    for path in routers.iter().flat_map(paths) {
        let concrete = path.split('/').map(|part| if part.starts_with('{') { "x" } else { part });
        let concrete = concrete.collect::<Vec<_>>().join("/");
        for (name, method) in METHODS {
            let request = Request::builder().method(method).uri(&concrete).body(axum::body::Body::empty()).unwrap();
            if server.send(request).await.status != StatusCode::METHOD_NOT_ALLOWED {
                found.entry(as_documented(&path)).or_default().insert(name);
            }
        }
    }
    let mut described: BTreeMap<String, BTreeSet<&str>> = BTreeMap::new();
    for (path, method, _) in operations(&DOCUMENT) {
        described.entry(path.to_owned()).or_default().insert(method);
    }
    assert!(found.len() > 25, "{found:?}");
    assert_eq!(described, found, "described (left), and there (right)");
}

/// Every value in a document, with where it stands.
fn walk<'a>(value: &'a Value, at: &str, visit: &mut impl FnMut(&str, &'a Value)) {
    visit(at, value);
    match value {
        Value::Object(map) => map.iter().for_each(|(name, value)| walk(value, &format!("{at}/{name}"), visit)),
        Value::Array(items) => {
            items.iter().enumerate().for_each(|(index, value)| walk(value, &format!("{at}/{index}"), visit));
        }
        _ => {}
    }
}

#[test]
fn the_document_holds_together() {
    let document = &*DOCUMENT;
    assert_eq!(document["openapi"], "3.1.0");
    let mut referred: BTreeSet<&str> = BTreeSet::new();
    walk(document, "", &mut |at, value| {
        if let Some(reference) = value.get("$ref").and_then(Value::as_str) {
            referred.insert(reference);
            assert!(resolve(document, value).is_object(), "{at}: {reference} is nowhere");
        }
    });
    for kind in ["schemas", "responses", "parameters"] {
        for (name, _) in entries(&document["components"][kind]) {
            let reference = format!("#/components/{kind}/{name}");
            assert!(referred.contains(reference.as_str()), "{reference} is used nowhere");
        }
    }
    let tags: BTreeSet<&str> = document["tags"].as_array().unwrap().iter().filter_map(|t| t["name"].as_str()).collect();
    let mut ids = BTreeSet::new();
    for (path, method, operation) in operations(document) {
        let id = operation["operationId"].as_str().unwrap_or_default();
        assert!(!id.is_empty() && ids.insert(id), "{method} {path}: operationId {id:?}");
        assert!(operation["tags"].as_array().is_some_and(|of| of.iter().all(|t| tags.contains(t.as_str().unwrap()))));
        assert!(operation["summary"].is_string(), "{method} {path}");
        assert!(entries(&operation["responses"]).count() > 0, "{method} {path}");
        for (status, response) in entries(&operation["responses"]) {
            assert!(resolve(document, response)["description"].is_string(), "{method} {path}: {status}");
        }
        let declared: BTreeSet<String> = operation["parameters"]
            .as_array()
            .into_iter()
            .flatten()
            .map(|parameter| resolve(document, parameter))
            .filter(|parameter| parameter["in"] == "path")
            .map(|parameter| {
                assert_eq!(parameter["required"], true, "{method} {path}");
                parameter["name"].as_str().unwrap().to_owned()
            })
            .collect();
        let named = path.split('/').filter_map(|part| part.strip_prefix('{')?.strip_suffix('}'));
        assert_eq!(declared, named.map(str::to_owned).collect(), "{method} {path}");
    }
}

#[test]
fn no_part_describes_what_another_one_does() {
    let mut seen = BTreeSet::new();
    for part in PARTS.iter().copied().chain([BASE]).map(parse) {
        for (path, method, _) in operations(&part) {
            assert!(seen.insert(format!("{method} {path}")), "{method} {path}");
        }
        for (kind, all) in entries(&part["components"]) {
            for (name, _) in entries(all) {
                assert!(seen.insert(format!("{kind} {name}")), "{kind} {name}");
            }
        }
    }
}

/// An operation's example, for the model that is served here.
fn example(operation: &Value) -> Option<Value> {
    let mut example = operation["requestBody"]["content"]["application/json"].get("example")?.clone();
    if example["model"] == "MODEL" {
        example["model"] = "tiny".into();
    }
    Some(example)
}

#[tokio::test]
async fn examples_are_answered_and_described_fields_are_known() {
    let server = Server::saying(" Paris").behind(Arc::new(Security::default()));
    let mut n_fields = 0;
    for (path, method, operation) in operations(&DOCUMENT) {
        // Files are not JSON, and batches are of files that were sent before.
        if operation["tags"] == json!(["Batches"]) {
            continue;
        }
        let body = &operation["requestBody"]["content"]["application/json"];
        let Some(example) = example(operation) else {
            assert!(body.is_null(), "{method} {path} has no example");
            continue;
        };
        let answer = server.post(path, &example).await;
        assert_eq!(answer.status, StatusCode::OK, "{path}: {}", answer.body);
        let sent = answer.headers["content-type"].to_str().unwrap().split(';').next().unwrap().to_owned();
        assert!(operation["responses"]["200"]["content"].get(&sent).is_some(), "{path} answers with {sent}");
        // A value that no field takes: the answer is about it, or about another one, but the name is known.
        let nonsense = json!([{"\u{1f9e8}": {}}]);
        for field in fields(&DOCUMENT, &body["schema"]) {
            let mut asked = example.clone();
            asked[field.name] = nonsense.clone();
            let answer = server.post(path, &asked).await;
            let unknown = format!("unknown field '{}'", field.name);
            assert!(!answer.body.contains(&unknown) && !answer.body.contains("unknown field `"), "{path}: {unknown}");
            n_fields += 1;
            // What must be there must be asked for.
            if field.is_required {
                asked.as_object_mut().unwrap().remove(field.name);
                assert!(server.post(path, &asked).await.status.is_client_error(), "{path} without {}", field.name);
            }
        }
        let mut unknown = example.clone();
        unknown["no_such_field"] = 1.into();
        assert!(server.post(path, &unknown).await.body.contains("no_such_field"), "{path}");
    }
    assert!(n_fields > 150, "{n_fields}");
}

#[tokio::test]
async fn fields_that_are_read_are_described() {
    let server = Server::saying(" Paris");
    let mut missing = Vec::new();
    let mut n_read = 0;
    for (path, _, operation) in operations(&DOCUMENT) {
        let Some(mut asked) = example(operation).filter(|_| operation["tags"] != json!(["Batches"])) else { continue };
        asked[TELL] = 1.into();
        let answer = server.post(path, &asked).await.body;
        // Those of the administration are no `Fields`.
        let Some((_, told)) = answer.split_once('<') else { continue };
        let schema = &operation["requestBody"]["content"]["application/json"]["schema"];
        let described: BTreeSet<&str> = fields(&DOCUMENT, schema).iter().map(|field| field.name).collect();
        let read = told.split('>').next().unwrap().split(',');
        for name in read.inspect(|_| n_read += 1).filter(|name| !described.contains(name)) {
            missing.push(format!("{path}: {name}"));
        }
    }
    assert!(n_read > 150, "{n_read}");
    assert!(missing.is_empty(), "read, and described nowhere: {missing:#?}");
}

#[tokio::test]
async fn the_page_shows_everything_and_loads_nothing() {
    let server = Server::saying("x");
    let document = server.get(DOCUMENT_PATH).await;
    assert_eq!(
        (document.status.as_u16(), document.headers["content-type"].to_str().unwrap()),
        (200, "application/json")
    );
    assert_eq!(document.json(), *DOCUMENT);
    let page = server.get(PAGE_PATH).await;
    assert_eq!(page.status, StatusCode::OK);
    let policy = page.headers["content-security-policy"].to_str().unwrap();
    assert!(policy.starts_with("default-src 'none'; style-src 'sha256-") && !policy.contains("unsafe"), "{policy}");
    for (path, _, operation) in operations(&DOCUMENT) {
        let id = format!("<details id=\"{}\">", operation["operationId"].as_str().unwrap());
        assert!(page.body.contains(&id) && page.body.contains(&format!("<code>{path}</code>")), "{path}");
    }
    for (name, _) in entries(&DOCUMENT["components"]["schemas"]) {
        assert!(page.body.contains(&format!("id=\"schema-{name}\"")), "{name}");
    }
    for forbidden in ["<script", " src=", "javascript:", "http://", "https://", " style=", " onclick"] {
        assert!(!page.body.contains(forbidden), "{forbidden}");
    }
    // Anchors lead somewhere.
    for link in page.body.split("href=\"#").skip(1).filter_map(|rest| rest.split('"').next()) {
        assert!(page.body.contains(&format!("id=\"{link}\"")), "{link}");
    }
}

#[tokio::test]
async fn a_key_opens_it_where_there_are_keys() {
    let key = KeyRecord {
        name: "one".to_owned(),
        hash: KeyHash::of("one"),
        role: Role::User,
        limits: KeyLimits::default(),
        expires: None,
    };
    let (server, _) = Server::saying("x").with_keys(vec![key]);
    for path in [PAGE_PATH, DOCUMENT_PATH] {
        assert_eq!(server.get(path).await.status, StatusCode::UNAUTHORIZED, "{path}");
        let request = Request::get(path).header("authorization", "Bearer one").body(axum::body::Body::empty()).unwrap();
        assert_eq!(server.send(request).await.status, StatusCode::OK, "{path}");
    }
}
