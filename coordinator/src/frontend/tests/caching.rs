use serde_json::{Value, json};

use super::fake::Server;
use crate::{
    frontend::{chat, completions, http_router, response_cache::ResponseCache, responses},
    security::{
        Security,
        keys::{KeyHash, KeyRecord, Role},
        limits::KeyLimits,
    },
};

fn caching(server: Server) -> Server {
    let state = server.state.with_response_cache(Some(ResponseCache::new(1 << 20)));
    Server { router: http_router(state.clone()), state, ..server }
}

/// An answer without what is each answer's own.
fn essence(mut answer: Value) -> Value {
    for name in ["id", "created", "created_at"] {
        answer.as_object_mut().unwrap().remove(name);
    }
    answer
}

#[tokio::test]
async fn the_same_question_is_computed_once_in_whatever_way_it_is_asked() {
    let server = caching(Server::saying("a longer answer"));
    let greedy = json!({"prompt": "x", "temperature": 0, "max_tokens": 20, "logprobs": 2, "n": 2});
    let first = server.post(completions::PATH, &greedy).await.json();
    let second = server.post(completions::PATH, &greedy).await.json();
    assert_ne!(first["id"], second["id"]);
    assert_eq!(essence(first.clone()), essence(second));
    assert_eq!(server.n_seen(), 1);
    let streamed = |name: &'static str| {
        let mut body = greedy.clone();
        body["stream"] = json!(true);
        body["stream_options"] = json!({"include_usage": true});
        body["user"] = json!(name);
        body
    };
    let kept = server.post(completions::PATH, &streamed("a")).await;
    assert_eq!(server.n_seen(), 1);
    let fresh = caching(Server::saying("a longer answer"));
    let computed = fresh.post(completions::PATH, &streamed("a")).await;
    let events = |answer: &super::fake::Answer| answer.events().into_iter().map(essence).collect::<Vec<_>>();
    assert_eq!(events(&kept), events(&computed), "event by event");
    assert_eq!(kept.events().last().unwrap()["usage"], first["usage"]);

    let seeded = json!({"messages": [{"role": "user", "content": "hi"}], "seed": 5, "max_tokens": 20});
    let whole = server.post(chat::PATH, &seeded).await.json();
    assert_eq!(essence(whole), essence(server.post(chat::PATH, &seeded).await.json()));
    let drawn = json!({"messages": [{"role": "user", "content": "hi"}], "max_tokens": 20});
    server.post(chat::PATH, &drawn).await;
    server.post(chat::PATH, &drawn).await;
    assert_eq!(server.n_seen(), 4, "what is drawn without a seed is drawn again");
}

#[tokio::test]
async fn off_means_off_and_failures_are_not_kept() {
    let body = json!({"prompt": "x", "temperature": 0, "max_tokens": 4});
    let plain = Server::saying("x");
    plain.post(completions::PATH, &body).await;
    plain.post(completions::PATH, &body).await;
    assert_eq!(plain.n_seen(), 2);
    let failing = caching(Server::with(|_| {
        Ok(vec![crate::request::RequestEvent::Failed(crate::request::RequestError::DeadlineExceeded)])
    }));
    for _ in 0..2 {
        assert_eq!(failing.post(completions::PATH, &body).await.status, 504);
    }
    assert_eq!(failing.n_seen(), 2);
}

#[tokio::test]
async fn each_key_has_its_own_answers_and_its_limits_count() {
    let key = |name: &str, secret: &str, limits| KeyRecord {
        name: name.to_owned(),
        hash: KeyHash::of(secret),
        role: Role::User,
        limits,
        expires: None,
    };
    let few = KeyLimits { tokens_per_minute: Some(30), ..KeyLimits::default() };
    let security = Security::with_keys(vec![key("a", "key-a", few), key("b", "key-b", KeyLimits::default())]);
    let server = caching(Server::saying("a longer answer"));
    let server = server.behind(security);
    let ask = async |secret: &str| {
        let body = json!({"prompt": "x", "temperature": 0, "max_tokens": 12});
        let mut request = super::fake::post(completions::PATH, body.to_string());
        request.headers_mut().insert("authorization", format!("Bearer {secret}").parse().unwrap());
        server.send(request).await.status.as_u16()
    };
    assert_eq!((ask("key-a").await, server.n_seen()), (200, 1));
    assert_eq!((ask("key-b").await, server.n_seen()), (200, 2), "nobody gets what is somebody else's");
    assert_eq!((ask("key-b").await, server.n_seen()), (200, 2));
    let mut answers = Vec::new();
    for _ in 0..4 {
        answers.push(ask("key-a").await);
    }
    assert!(answers.starts_with(&[200]) && answers.ends_with(&[429]), "{answers:?}");
    assert_eq!(server.n_seen(), 2);
}

#[tokio::test]
async fn a_salt_is_a_text_of_all_of_openai_s_apis() {
    let server = Server::saying("x");
    let chat = json!({"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4});
    let asked = [
        (chat::PATH, chat),
        (completions::PATH, json!({"prompt": "hi", "max_tokens": 4})),
        (responses::PATH, json!({"input": "hi", "max_output_tokens": 4})),
    ];
    for (path, body) in asked {
        let root = async |salt: Option<Value>| {
            let mut body = body.clone();
            if let Some(salt) = salt {
                body["cache_salt"] = salt;
            }
            let answer = server.post(path, &body).await;
            (answer.status.as_u16(), server.last_request().cache_root)
        };
        let (none, one, other) = (root(None).await, root(Some(json!("a"))).await, root(Some(json!("b"))).await);
        assert!(none.0 == 200 && none.1 != one.1 && one.1 != other.1 && none.1 != other.1, "{path}");
        assert_eq!(root(Some(json!("a"))).await, one);
        for wrong in [json!(""), json!(5), json!("x".repeat(2000))] {
            assert_eq!(root(Some(wrong)).await.0, 400, "{path}");
        }
    }
}
