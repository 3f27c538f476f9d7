//! Requests with a key, over a scheduler that says what its script says.

use axum::body::Body;
use http::{Request as HttpRequest, StatusCode};
use phalanx_cluster::tokenizer::Tokenizer;
use phalanx_proto::v1::{JournalBegan, JournalTokens, TokenScore};
use proptest::prelude::*;
use serde_json::{Value, json};
use tower::ServiceExt;

use super::{run::Read, *};
use crate::{
    frontend::{
        chat, completions, http_router,
        tests::fake::{Answer, Server, folder, post},
    },
    leadership::journal_feed::JournalSink,
    request::{Finish, Output, RequestError, RequestEvent, Usage},
    text::decode::{OutputText, StopSearch},
};

/// A token at a time, as the scheduler says it: text is held back while it may become a stop string.
fn choice(tokenizer: &Tokenizer, request: &Request, index: u32, text: &str) -> Vec<Output> {
    let mut said = OutputText::new(&request.stop, tokenizer);
    let ids = tokenizer.encode(text, false).unwrap();
    let n_ids = ids.len().min(request.max_tokens as usize);
    let mut outputs = Vec::new();
    for (at, id) in ids[..n_ids].iter().enumerate() {
        let (mut text, mut matched) = said.push(*id, StopSearch::On);
        let is_last = at + 1 == n_ids;
        if is_last && matched.is_none() {
            let (rest, in_rest) = said.finish();
            text.push_str(&rest);
            matched = in_rest;
        }
        let finish = matched.map(|m| Finish::StopString(request.stop.strings[m.stop_idx].clone()));
        let finish = finish.or(is_last.then_some(Finish::Length));
        let score = TokenScore { token_id: *id, logprob: -0.5 - at as f32, rank: 1, top: Vec::new() };
        let scores = request.sampling.logprobs.map(|_| score).into_iter().collect();
        let is_over = finish.is_some();
        outputs.push(Output { index, text, token_ids: vec![*id], scores, finish });
        if is_over {
            break;
        }
    }
    outputs
}

/// All choices, whose outputs come in the order that the bits of `order` say.
fn events(tokenizer: &Tokenizer, request: &Request, texts: &[String], mut order: u64) -> Vec<RequestEvent> {
    let outputs = |index: u32| choice(tokenizer, request, index, &texts[index as usize % texts.len()]).into_iter();
    let mut choices: Vec<_> = (0..request.n).map(outputs).collect();
    let mut all = Vec::new();
    while !choices.is_empty() {
        let which = (order & 1) as usize % choices.len();
        order = order.rotate_right(1);
        match choices[which].next() {
            Some(output) => all.push(RequestEvent::Output(output)),
            None => drop(choices.remove(which)),
        }
    }
    let completion_tokens = all.len() as u32;
    let prompt_tokens = request.prompt.len() as u32;
    all.push(RequestEvent::Finished(Usage { prompt_tokens, completion_tokens, cached_tokens: 0 }));
    all
}

fn keyed(path: &str, key: &str, last: Option<&str>, body: &Value) -> HttpRequest<Body> {
    let mut request = post(path, body.to_string());
    request.headers_mut().insert(key::IDEMPOTENCY_KEY, key.parse().unwrap());
    if let Some(last) = last {
        request.headers_mut().insert(key::LAST_EVENT_ID, last.parse().unwrap());
    }
    request
}

/// Ids and data of a stream's events. `created` is left out.
fn parse(answer: &Answer) -> Vec<(String, Value)> {
    assert_eq!(answer.status, 200, "{}", answer.body);
    let mut all = Vec::new();
    for (index, event) in answer.body.split_terminator("\n\n").enumerate() {
        let field = |name: &str| event.lines().find_map(|line| line.strip_prefix(name));
        let data = field("data: ").unwrap();
        let mut data = if data == "[DONE]" { json!(data) } else { serde_json::from_str(data).unwrap() };
        if let Some(object) = data.as_object_mut() {
            object.remove("created");
        }
        assert_eq!(field("retry: "), (index == 0).then_some("250"), "{event}");
        all.push((field("id: ").unwrap().to_owned(), data));
    }
    all
}

/// Data of one choice, in order; with none, of what belongs to no choice.
fn of_choice(events: &[(String, Value)], index: Option<u64>) -> Vec<Value> {
    let belongs = |data: &&Value| data["choices"][0]["index"].as_u64() == index;
    events.iter().map(|(_, data)| data).filter(belongs).cloned().collect()
}

fn body(path: &str, n: u32, stops: bool, logprobs: bool, usage: bool, ids: bool) -> Value {
    let mut body = json!({"stream": true, "n": n, "max_tokens": 12, "return_token_ids": ids});
    if path == chat::PATH {
        body["messages"] = json!([{"role": "user", "content": "hi"}]);
        body["logprobs"] = json!(logprobs);
    } else {
        body["prompt"] = json!(["hi", "ho"]);
        body["logprobs"] = if logprobs { json!(1) } else { Value::Null };
        body["echo"] = json!(logprobs && !ids);
        if logprobs && !ids {
            // Echoed prompts are scored, which the script does not do.
            body["logprobs"] = Value::Null;
        }
    }
    if stops {
        body["stop"] = json!(["abc", "é!"]);
    }
    if usage {
        body["stream_options"] = json!({"include_usage": true});
    }
    body
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn what_follows_any_event_is_the_rest(
        is_chat: bool, n in 1..3_u32, stops: bool, logprobs: bool, usage: bool, ids: bool,
        texts in prop::collection::vec("[abcé! ]{1,10}", 2), order: u64, other_order: u64,
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let path = if is_chat { chat::PATH } else { completions::PATH };
            let body = body(path, n, stops, logprobs, usage, ids);
            let server = |order: u64| {
                let (tokenizer, texts) = (Tokenizer::from_folder(folder()).unwrap(), texts.clone());
                Server::with(move |request| Ok(events(&tokenizer, request, &texts, order)))
            };
            let (first, second) = (server(order), server(other_order));
            let whole = parse(&first.send(keyed(path, "k", None, &body)).await);
            prop_assert_eq!(&whole.last().unwrap().1, &json!("[DONE]"));
            let prompts = if is_chat { 1 } else { 2 };
            for cut in 0..whole.len() - 1 {
                let id = whole[cut].0.as_str();
                let rest = parse(&first.send(keyed(path, "k", Some(id), &body)).await);
                prop_assert_eq!(&rest[..], &whole[cut + 1..], "the same run after {}", id);
                let read = HttpRequest::get(format!("/v1/streams/k?starting_after={id}")).body(Body::empty()).unwrap();
                prop_assert_eq!(parse(&first.send(read).await), rest, "by key after {}", id);

                // Another coordinator, whose choices come in another order.
                let rest = parse(&second.send(keyed(path, "k", Some(&format!("k:{id}")), &body)).await);
                let both: Vec<_> = whole[..=cut].iter().chain(&rest).cloned().collect();
                let indices = (0..u64::from(n) * prompts).map(Some).chain([None]);
                for index in indices {
                    prop_assert_eq!(of_choice(&both, index), of_choice(&whole, index), "{:?} after {}", index, id);
                }
                prop_assert_eq!(&both.last().unwrap().1, &json!("[DONE]"));
            }
            prop_assert_eq!(first.n_seen(), prompts as usize, "it ran once");
            let done = first.send(keyed(path, "k", Some(&whole.last().unwrap().0), &body)).await;
            prop_assert_eq!(done.status, StatusCode::NO_CONTENT);
            Ok(())
        })?;
    }
}

fn output(token: u32, text: &str) -> RequestEvent {
    RequestEvent::Output(Output { text: text.to_owned(), token_ids: vec![token], ..Output::default() })
}

fn finished() -> [RequestEvent; 2] {
    let last = Output { text: "!".to_owned(), token_ids: vec![9], finish: Some(Finish::Length), ..Output::default() };
    [RequestEvent::Output(last), RequestEvent::Finished(Usage::default())]
}

/// One token, then what [`Server::tell`] says.
fn open_ended() -> Server {
    Server::with(|_| Ok(vec![output(5, "one")]))
}

/// A stream that is being read.
struct Reading(axum::body::BodyDataStream);

impl Reading {
    async fn of(server: &Server, request: HttpRequest<Body>) -> Self {
        let response = server.router.clone().oneshot(request).await.unwrap();
        assert_eq!(response.status(), 200);
        Self(response.into_body().into_data_stream())
    }

    /// The next event, if the stream goes on.
    async fn next(&mut self) -> Option<String> {
        let piece = tokio::time::timeout(Duration::from_secs(30), self.0.next()).await.expect("an event in time");
        piece.map(|piece| String::from_utf8(piece.unwrap().to_vec()).unwrap())
    }

    async fn rest(mut self) -> String {
        let mut all = String::new();
        while let Some(piece) = self.next().await {
            all.push_str(&piece);
        }
        all
    }
}

const STREAMED: &str = r#"{"prompt": "a", "stream": true}"#;

fn streamed(key: &str, last: Option<&str>) -> HttpRequest<Body> {
    keyed(completions::PATH, key, last, &serde_json::from_str(STREAMED).unwrap())
}

#[tokio::test]
async fn a_run_goes_on_without_its_client() {
    let server = open_ended();
    let mut stream = Reading::of(&server, streamed("k", None)).await;
    assert!(stream.next().await.unwrap().contains("id: 1\n"));
    drop(stream);
    server.tell(&output(6, "two"));
    for event in finished() {
        server.tell(&event);
    }
    let rest = Reading::of(&server, streamed("k", Some("1"))).await.rest().await;
    assert!(!rest.contains("one") && rest.contains("two") && rest.contains("[DONE]"), "{rest}");
    assert_eq!((server.n_seen(), server.n_cancelled()), (1, 1), "its stream is dropped at its end, not before");
    assert!(rest.contains("id: 2\n") && rest.contains("id: 3\n"), "{rest}");
}

#[tokio::test]
async fn the_newest_reader_wins() {
    let server = open_ended();
    let mut older = Reading::of(&server, streamed("k", None)).await;
    older.next().await.unwrap();
    let mut newer = Reading::of(&server, streamed("k", None)).await;
    assert!(newer.next().await.unwrap().contains("one"));
    assert_eq!(older.next().await, None, "ends without [DONE]");
    for event in finished() {
        server.tell(&event);
    }
    assert!(newer.rest().await.contains("[DONE]"));

    let server = open_ended();
    let body = json!({"prompt": "a"});
    let older = tokio::spawn(server.router.clone().oneshot(keyed(completions::PATH, "k", None, &body)));
    while server.n_seen() == 0 {
        tokio::task::yield_now().await;
    }
    let newer = tokio::spawn(server.router.clone().oneshot(keyed(completions::PATH, "k", None, &body)));
    assert_eq!(older.await.unwrap().unwrap().status(), 409);
    for event in finished() {
        server.tell(&event);
    }
    assert_eq!(newer.await.unwrap().unwrap().status(), 200);
}

#[tokio::test]
async fn a_key_is_one_request() {
    let server = Server::saying(" fine");
    let ask = async |key: &str, body: Value| server.send(keyed(completions::PATH, key, None, &body)).await;
    let first = ask("k", json!({"prompt": "a"})).await;
    let second = ask("k", json!({"prompt": "a"})).await;
    assert_eq!((first.status.as_u16(), &first.body), (200, &second.body), "even its id");
    assert_eq!(server.n_seen(), 1);
    let other = ask("k", json!({"prompt": "b"})).await;
    assert_eq!((other.status.as_u16(), &other.json()["error"]["code"]), (422, &json!("idempotency_key_reuse")));
    let elsewhere = server.send(keyed("/v1/chat/completions", "k", None, &json!({"prompt": "a"}))).await;
    assert_eq!(elsewhere.status, 422, "another endpoint is another request");
    assert_eq!(ask("a b", json!({"prompt": "a"})).await.status, 400);
    let wrong = server.send(keyed(completions::PATH, "k", Some("x"), &json!({"prompt": "a"}))).await;
    assert_eq!(wrong.status, 400);
    assert_eq!(server.get("/v1/streams/k").await.body, first.body);
    assert_eq!(server.get("/v1/streams/k?starting_after=x").await.status, 400);
    assert_eq!(server.get("/v1/streams/k?begin=1").await.status, 400);
    let none = server.get("/v1/streams/other").await;
    assert_eq!((none.status.as_u16(), &none.json()["error"]["code"]), (404, &json!("stream_not_found")));
    assert_eq!(ask("s", json!({"prompt": "a", "stream": true})).await.status, 200);
    let many = server.send(keyed(completions::PATH, "s", Some("1,1"), &json!({"prompt": "a", "stream": true}))).await;
    assert_eq!(many.status, 400, "there is one choice");
}

#[tokio::test]
async fn seeds_are_the_client_s_or_the_key_s() {
    let seeds = async |key: &str, body: Value| {
        let server = Server::saying("x");
        assert_eq!(server.send(keyed(completions::PATH, key, None, &body)).await.status, 200);
        let seen = server.fake.seen.lock().unwrap();
        seen.iter().map(|request| request.sampling.seed).collect::<Vec<_>>()
    };
    let two = json!({"prompt": ["a", "b"]});
    let drawn = seeds("k", two.clone()).await;
    assert_eq!(drawn, seeds("k", two.clone()).await, "on another server");
    assert_ne!(drawn[0], drawn[1]);
    assert_ne!(drawn, seeds("j", two).await);
    assert_eq!(seeds("k", json!({"prompt": ["a", "b"], "seed": 7})).await, [7, 7]);
}

#[tokio::test]
async fn failures_are_not_kept() {
    let server = Server::with(|_| Ok(vec![RequestEvent::Failed(RequestError::DeadlineExceeded)]));
    for n_tries in 1..3 {
        assert_eq!(server.send(streamed("k", None)).await.status, 504, "known before the first event");
        assert_eq!(server.n_seen(), n_tries);
    }
    assert!(server.state.streams().is_empty());
    let refused = Server::with(|_| Err(RequestError::Unavailable("no".to_owned())));
    assert_eq!(refused.send(streamed("k", None)).await.status, 503);
    assert!(refused.state.streams().is_empty());
}

#[tokio::test]
async fn a_server_that_stops_does_not_fail_what_can_be_resumed() {
    let gone = RequestEvent::Failed(RequestError::Unavailable("another\ncoordinator leads".to_owned()));
    let failing = gone.clone();
    let server = Server::with(move |_| Ok(vec![output(5, "one"), failing.clone()]));
    let answer = server.send(streamed("k", None)).await;
    assert!(answer.body.contains("one") && answer.body.contains("\n\n: ask again: "), "{}", answer.body);
    assert!(!answer.body.contains("error") && !answer.body.contains("[DONE]"), "{}", answer.body);
    let unkeyed = server.post_raw(completions::PATH, STREAMED).await;
    assert!(unkeyed.body.contains("error"));
}

#[tokio::test]
async fn nobody_waits_for_ever() {
    let server = open_ended();
    let mut request = post(completions::PATH, STREAMED);
    request.headers_mut().insert(key::FORWARDERS_KEY, "f".parse().unwrap());
    let mut stream = Reading::of(&server, request).await;
    stream.next().await.unwrap();
    assert_eq!((server.state.streams().len(), server.n_cancelled()), (1, 0));
    let cancelled = server.fake.cancelled.notified();
    drop(stream);
    tokio::time::timeout(Duration::from_secs(30), cancelled).await.expect("a forwarder's run ends with it");
    assert!(server.state.streams().is_empty());

    let patient = Keyed {
        key: "p".to_owned(),
        hash: [0; 32],
        patience: Duration::from_millis(20),
        has: position::Position::default(),
    };
    let prepared = Prepared { requests: vec![server.last_request()], has_seed: true, reply: None };
    let streams = server.state.streams();
    let watch = Watch::default();
    let (mut generation, _) = streams.begin(&patient, server.fake.as_ref(), prepared, None, None, &watch).unwrap();
    generation.next().await.unwrap().unwrap();
    let cancelled = server.fake.cancelled.notified();
    drop(generation);
    tokio::time::timeout(Duration::from_secs(30), cancelled).await.expect("a client is waited for a while");
    assert!(streams.is_empty());
}

fn told(key: &str, what: What) -> JournalEntry {
    JournalEntry { key: key.to_owned(), what: Some(what) }
}

#[tokio::test]
async fn a_new_leader_goes_on_behind_what_was_told() {
    // What the old leader tells its standby, as it happens.
    let old = open_ended();
    let mut feed = old.state.streams().subscribe();
    let mut stream = Reading::of(&old, streamed("k", None)).await;
    stream.next().await.unwrap();
    old.tell(&output(6, "two"));
    assert!(stream.next().await.unwrap().contains("two"));
    let journal = Arc::new(ReplicatedJournal::default());
    for _ in 0..4 {
        journal.apply(feed.next().await.unwrap());
    }
    let known = journal.get("k").unwrap();
    assert_eq!(known.choices[0].token_ids, [5, 6]);
    assert_eq!(known.seed, old.last_request().sampling.seed);

    // A standby that comes late hears the same.
    let mut late = old.state.streams().subscribe();
    let again = ReplicatedJournal::default();
    loop {
        let entry = late.next().await.unwrap();
        let is_all = matches!(entry.what, Some(What::Synced(_)));
        again.apply(entry);
        if is_all {
            break;
        }
    }
    assert_eq!(again.get("k"), Some(known));

    let new = Server::with(|request| {
        let mut events: Vec<_> = request.resume[0].tokens.iter().map(|id| output(*id, &format!("<{id}>"))).collect();
        events.extend(finished());
        Ok(events)
    });
    let router = http_router(new.state.clone().with_journal(Arc::clone(&journal)));
    let response = router.clone().oneshot(streamed("k", Some("1"))).await.unwrap();
    let rest = Reading(response.into_body().into_data_stream()).rest().await;
    assert_eq!(new.last_request().resume[0].tokens, [5, 6]);
    assert_eq!(new.last_request().sampling.seed, old.last_request().sampling.seed);
    assert!(!rest.contains("<5>") && rest.contains("<6>") && rest.contains("[DONE]"), "{rest}");

    // Another request under a key of the journal, and one whose choices do not fit, begin afresh.
    let other = Server::saying("x");
    let began = JournalBegan { request_hash: vec![1; 32], choices: 1, seed: 3 };
    journal.apply(told("j", What::Began(began)));
    journal.apply(told("j", What::Tokens(JournalTokens { choice: 0, token_ids: vec![5], scores: Vec::new() })));
    let router = http_router(other.state.clone().with_journal(journal));
    assert_eq!(router.oneshot(streamed("j", None)).await.unwrap().status(), 200);
    assert!(other.last_request().resume.is_empty());
}

#[test]
fn memory_is_bounded_and_old_answers_are_forgotten() {
    let now = Instant::now();
    let asked = Asked { hash: [0; 32], seed: 0, n_prompts: 1, n: 1 };
    let mut registry = Registry::new(Retention { bytes: 1 << 16, after_end: Duration::from_secs(10) });
    for index in 0..100 {
        let key = format!("{index:03}");
        let (run, _) = registry.begin(&key, asked, None);
        registry.push(now, &key, &run, 0, output(1, &"x".repeat(4096)));
        if index > 0 {
            let end = RequestEvent::Finished(Usage::default());
            registry.push(now + Duration::from_millis(index), &key, &run, 0, end);
        }
    }
    assert!(registry.len() < 20 && registry.bytes() <= 1 << 16);
    assert!(registry.get(now, "000").is_some(), "live");
    assert!(registry.get(now, "099").is_some() && registry.get(now, "001").is_none());
    assert!(registry.get(now + Duration::from_secs(60), "099").is_none());
}

#[tokio::test]
async fn a_run_that_ends_gets_smaller_and_its_readers_do_not_notice() {
    let asked = Asked { hash: [0; 32], seed: 0, n_prompts: 1, n: 1 };
    let mut registry = Registry::new(Retention::default());
    let (run, _) = registry.begin("k", asked, None);
    let mut reader = run.attach();
    let mut said: Vec<_> = (0..700).map(|token| output(token, "text")).collect();
    said.extend(finished());
    let mut read = Vec::new();
    let mut largest = 0;
    for (at, event) in said.iter().enumerate() {
        registry.push(Instant::now(), "k", &run, 0, event.clone());
        largest = largest.max(registry.bytes());
        if at % 2 == 0 {
            let Read::Event(0, event) = reader.next().await else { panic!("there is more") };
            read.push(event);
        }
    }
    assert!(registry.bytes() < largest && registry.bytes() < 36 * said.len() + 2000, "{} {largest}", registry.bytes());
    while let Read::Event(0, event) = reader.next().await {
        read.push(event);
    }
    assert_eq!(read, said);
    let mut late = run.attach();
    for event in said {
        assert!(matches!(late.next().await, Read::Event(0, again) if again == event));
    }
    assert!(matches!(late.next().await, Read::Over) && matches!(reader.next().await, Read::Superseded));
    registry.forget("k", run.id());
    assert_eq!(registry.bytes(), 0);
}

#[tokio::test]
async fn answers_are_kept_as_long_as_the_window_says() {
    let (zero, long, patient) = (Duration::ZERO, Duration::from_secs(600), Duration::from_secs(30));
    assert_eq!(kept_for(patient, long), long);
    assert_eq!(kept_for(zero, long), Duration::from_secs(60), "for a forwarder");
    let window = Duration::from_millis(20);
    assert_eq!((kept_for(patient, window), kept_for(zero, window)), (window, window));

    let server = Server::saying("x");
    server.send(keyed(completions::PATH, "other", None, &json!({"prompt": "a"}))).await;
    let retention = Retention { after_end: window, ..Retention::default() };
    let streams = Arc::new(Streams::new(retention, Arc::default()));
    let keyed = Keyed { key: "k".to_owned(), hash: [0; 32], patience: patient, has: position::Position::default() };
    let prepared = Prepared { requests: vec![server.last_request()], has_seed: true, reply: None };
    let (generation, _) = streams.begin(&keyed, server.fake.as_ref(), prepared, None, None, &Watch::default()).unwrap();
    assert_eq!(streams.len(), 1);
    generation.collect().await.unwrap();
    let forgotten = async {
        while !streams.is_empty() {
            tokio::time::sleep(window / 4).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), forgotten).await.expect("nobody has to ask for it");
    assert_eq!(streams.lock().registry.bytes(), 0);
}
