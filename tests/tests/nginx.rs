//! A real NGINX, configured as `deploy/nginx` has it, before two coordinators: streams pass event by event, both
//! coordinators are asked, and a coordinator that dies costs its clients what the documentation says.

use std::{
    collections::BTreeSet,
    sync::{Arc, atomic::Ordering},
};

use phalanx_proto::v1::{
    GenerateRequest, StatusRequest, cluster_client::ClusterClient, inference_client::InferenceClient,
};
use phalanx_tests::{
    client::{generate, get, greedy, metric, post, post_stream},
    faults::{
        deployment::{Deployment, own_id},
        load::{Call, Job},
        setup::{Model, OwnShard, Setup, StoreKind},
        stream::{self, Client, Progress},
    },
    process::{signal_pid, wait_until},
    programs::{
        address,
        nginx::{Nginx, Upstream, obstacle},
    },
};
use rustix::process::Signal;
use serde_json::{Value, json};
use tokio::runtime::Runtime;

/// Tokens of a stream in whose middle something happens: several seconds.
const LONG: u32 = 120;
/// Tokens of an answer that is not streamed.
const SHORT: u32 = 8;

/// Two coordinators, an etcd, and two ranks that take their time and are never thought to be lost.
fn setup() -> Setup {
    let slow = OwnShard { always: ["--failpoint", "step:slow:50"].map(str::to_owned).to_vec(), ..OwnShard::default() };
    let setup =
        Setup { coordinators: 2, store: StoreKind::Etcd(1), own_shards: vec![slow; 2], ..Setup::own(Model::Tiny, 0) };
    setup.with(&["--heartbeat-timeout-ms", "600000"])
}

fn start(runtime: &Arc<Runtime>) -> (Deployment, Nginx) {
    let deployment = Deployment::start(runtime, &setup()).expect("the cluster starts");
    let upstream = |index: usize| {
        let coordinator = &deployment.coordinators[index];
        Upstream { http: coordinator.http.clone(), grpc: coordinator.grpc.clone() }
    };
    let nginx = Nginx::start([upstream(0), upstream(1)]).expect("NGINX starts");
    (deployment, nginx)
}

/// Lets no step end until it is dropped: a rank stands still.
struct Standstill(u32);

impl Standstill {
    fn of(deployment: &Deployment) -> Self {
        let pid = deployment.own.pid(&own_id(1)).expect("the second shard runs");
        signal_pid(pid, Signal::STOP);
        Self(pid)
    }
}

impl Drop for Standstill {
    fn drop(&mut self) {
        signal_pid(self.0, Signal::CONT);
    }
}

/// Sequences that run or wait on the leader.
fn at_work(deployment: &Deployment) -> u64 {
    let http = &deployment.coordinators[deployment.leader().expect("somebody leads")].http;
    let shown = get(&format!("{http}/debug/cluster")).unwrap().json().unwrap();
    let sequences = &shown["groups"][0]["load"]["sequences"];
    sequences.as_object().into_iter().flatten().filter_map(|(_, n)| n.as_u64()).sum()
}

/// Reads the beginning of a stream, then everything that there is of it while it stands still, then the rest. Each piece is
/// its text and its tokens.
fn read_along(deployment: &Deployment, mut piece: impl FnMut() -> Option<(String, u64)>) -> String {
    let told = || deployment.metric("tokens_generated_total") as u64;
    let before = told();
    let (mut text, mut n_read) = (String::new(), 0);
    let mut read = |n_read: &mut u64| {
        let next = piece();
        if let Some((more, n)) = &next {
            text.push_str(more);
            *n_read += n;
        }
        next.is_some()
    };
    while n_read == 0 {
        assert!(read(&mut n_read), "the stream ended without a token");
    }
    let standstill = Standstill::of(deployment);
    let n_made = told() - before;
    assert!(n_made < u64::from(LONG), "the stream was too quick for this test");
    // A proxy that gathers events would keep some back, and this would wait in vain.
    while n_read < n_made {
        assert!(read(&mut n_read), "the stream ended after {n_read} tokens");
    }
    assert_eq!(at_work(deployment), 1, "the client has read {n_read} tokens, and the generation goes on");
    drop(standstill);
    while read(&mut n_read) {}
    assert_eq!(n_read, u64::from(LONG));
    text
}

fn completion(prompt: &[u32], max_tokens: u32) -> Value {
    json!({"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": true, "return_token_ids": true})
}

fn with(mut body: Value, more: &Value) -> Value {
    for (name, value) in more.as_object().into_iter().flatten() {
        body[name] = value.clone();
    }
    body
}

/// The text that the leader has for a request, without NGINX.
fn direct(deployment: &Deployment, body: &Value) -> String {
    let http = &deployment.coordinators[deployment.leader().expect("somebody leads")].http;
    let answer = post(&format!("{http}/v1/completions"), body).unwrap().json().unwrap();
    answer["choices"][0]["text"].as_str().unwrap_or_else(|| panic!("{answer}")).to_owned()
}

#[test]
fn streams_pass_event_by_event_and_both_coordinators_are_asked() {
    if let Some(why) = obstacle() {
        println!("skipped: {why}");
        return;
    }
    let runtime = Arc::new(Runtime::new().unwrap());
    let (deployment, nginx) = start(&runtime);
    let url = format!("{}/v1/completions", nginx.http);
    let prompt = [200, 201, 202];
    let wanted = direct(&deployment, &completion(&prompt, LONG));

    let mut events = post_stream(&url, &with(completion(&prompt, LONG), &json!({"stream": true}))).unwrap();
    let text = read_along(&deployment, || {
        let event = events.next()?.expect("the stream goes on");
        let choice = &event["choices"][0];
        let n_tokens = choice["token_ids"].as_array().map_or(0, Vec::len);
        Some((choice["text"].as_str().unwrap_or_default().to_owned(), n_tokens as u64))
    });
    assert_eq!(text, wanted);

    let mut stream = runtime.block_on(async {
        let mut client = InferenceClient::connect(nginx.grpc.clone()).await.expect("NGINX speaks gRPC");
        client.generate(greedy(&prompt, LONG)).await.expect("it is asked").into_inner()
    });
    let text = read_along(&deployment, || {
        let part = runtime.block_on(stream.message()).expect("the stream goes on")?;
        Some((part.text, part.token_ids.len() as u64))
    });
    assert_eq!(text, wanted, "the same over gRPC");

    // One after the other they take turns: each begins when NGINX knows that the one before has ended, which it logs then.
    let streams = ["/v1/completions", "/phalanx.v1.Inference/Generate"];
    let logged = |path: &str| nginx.accesses().iter().any(|access| access.request.ends_with(path));
    wait_until("both streams are in the log", || streams.into_iter().all(logged));
    let n_before = nginx.accesses().len();
    for n in 1..=6 {
        assert_eq!(post(&url, &completion(&prompt, 1)).unwrap().status, 200);
        wait_until("it is in the log", || nginx.accesses().len() >= n_before + n);
    }
    for coordinator in &deployment.coordinators {
        let upstreams = vec![address(&coordinator.http)];
        let n = nginx.accesses()[n_before..].iter().filter(|access| access.upstreams == upstreams).count();
        assert_eq!(n, 3, "{upstreams:?} in {:#?}", nginx.accesses());
    }
    let standby = deployment.standby().expect("there is one");
    assert_eq!(metric(&deployment.coordinators[standby].http, "phalanx_is_leader"), 0.0);
    nothing_inside_is_shown(&runtime, &nginx);
    drop(nginx);
    assert_eq!(deployment.end(), Vec::<String>::new());
}

/// What is for operators stays inside, however it is spelled.
fn nothing_inside_is_shown(runtime: &Runtime, nginx: &Nginx) {
    let n_before = nginx.accesses().len();
    let inside = [
        "/metrics",
        "//metrics",
        "/%6Detrics",
        "/v1/../metrics",
        "/metrics?format=text",
        "/admin/status",
        "//admin/status",
        "/admin/../admin/status",
        "/%61dmin/status",
        "/debug/cluster",
        "/%64ebug/cluster",
    ];
    for path in inside {
        let answer = get(&format!("{}{path}", nginx.http)).unwrap();
        assert_eq!(answer.status, 404, "{path}: {answer:?}");
        assert!(!answer.body.contains("phalanx_"), "{path}");
    }
    wait_until("all are in the log", || nginx.accesses().len() >= n_before + inside.len());
    for access in &nginx.accesses()[n_before..] {
        assert_eq!(access.upstreams, Vec::<String>::new(), "{access:?} was passed on");
    }
    let asked = runtime.block_on(async {
        let mut cluster = ClusterClient::connect(nginx.grpc.clone()).await.expect("NGINX speaks gRPC");
        cluster.status(StatusRequest {}).await
    });
    assert_eq!(asked.expect_err("it is for operators").code(), tonic::Code::Unimplemented);
    let request = GenerateRequest { max_tokens: Some(1), ..greedy(&[7], 1) };
    assert!(runtime.block_on(generate(&nginx.grpc, request)).is_ok());
}

/// A request whose answer is not streamed, by a client that asks once.
fn ask(url: &str, key: Option<&str>, body: &Value) -> (u16, Option<String>, Value) {
    let agent: ureq::Agent = ureq::Agent::config_builder().http_status_as_error(false).build().into();
    let mut call = agent.post(url).header("content-type", "application/json");
    if let Some(key) = key {
        call = call.header("idempotency-key", key);
    }
    let mut response = call.send(body.to_string().as_bytes()).expect("NGINX answers");
    let retry_after = response.headers().get("retry-after").and_then(|v| v.to_str().ok()).map(str::to_owned);
    let text = response.body_mut().read_to_string().expect("a text");
    let body = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"));
    (response.status().as_u16(), retry_after, body)
}

#[test]
fn a_leader_that_is_killed_costs_one_more_request() {
    if let Some(why) = obstacle() {
        println!("skipped: {why}");
        return;
    }
    let runtime = Arc::new(Runtime::new().unwrap());
    let (mut deployment, nginx) = start(&runtime);
    let url = format!("{}/v1/completions", nginx.http);
    let leader = deployment.leader().expect("somebody leads");
    let next = deployment.standby().expect("somebody stands by");

    // Two streams: one through each coordinator.
    let bodies = [[200, 201, 202], [210, 211, 212]].map(|prompt| completion(&prompt, LONG));
    let progress = Arc::new(Progress::default());
    let mut streams = Vec::new();
    for (index, body) in bodies.iter().enumerate() {
        let client = Client {
            http: vec![nginx.http.clone()],
            grpc: Vec::new(),
            key: Some(format!("stream-{index}")),
            vanish: Arc::default(),
            progress: Arc::clone(&progress),
        };
        let body = with(body.clone(), &json!({"stream": true, "stream_options": {"include_usage": true}}));
        let job = Job { kind: "completions", call: Call::Http { path: "/v1/completions", body }, n: 1 };
        streams.push(runtime.spawn(stream::run(client, job)));
        wait_until("the stream has a token", || progress.begun.load(Ordering::Relaxed) > index as u64);
    }
    let standstill = Standstill::of(&deployment);
    assert_eq!(at_work(&deployment), 2, "the streams were too quick for this test");
    // Answers that are not streamed, with and without a key: again one through each coordinator.
    let mut answers = Vec::new();
    for (n, key) in [(3, None), (4, None), (5, Some("whole-0")), (6, Some("whole-1"))] {
        let (url, body) = (url.clone(), completion(&[220 + n], SHORT));
        let asked = body.clone();
        answers.push((key, body, std::thread::spawn(move || ask(&url, key, &asked))));
        wait_until("the leader has the request", || at_work(&deployment) == u64::from(n));
    }

    deployment.coordinators[leader].process.signal(Signal::KILL);
    wait_until("the other coordinator leads", || deployment.leads(next));
    drop(standstill);

    let records: Vec<_> = streams.into_iter().map(|s| runtime.block_on(s).expect("no panic")).collect();
    let mut returns: Vec<_> = records.iter().map(|record| record.returns).collect();
    returns.sort_unstable();
    assert_eq!(returns, [0, 1], "who was connected to the leader asks once more; {records:?}\n{}", nginx.log());
    for (record, body) in records.iter().zip(&bodies) {
        assert_eq!(record.error, None);
        assert_eq!(record.choices[0].text, direct(&deployment, body));
        assert_eq!(record.usage.map(|(_, completion)| completion), Some(u64::from(LONG)));
    }
    let mut without_key = BTreeSet::new();
    for (key, body, answer) in answers {
        let (status, retry_after, answer) = answer.join().expect("the client does not panic");
        let text = answer["choices"][0]["text"].as_str();
        if key.is_none() {
            without_key.insert(status);
        }
        match status {
            // It may have been running: only the client can know whether it may be sent again.
            503 if key.is_none() => {
                assert_eq!((retry_after.as_deref(), &answer["error"]["code"]), (Some("1"), &json!("unavailable")));
            }
            _ => assert_eq!((status, text), (200, Some(direct(&deployment, &body).as_str())), "{key:?}: {answer}"),
        }
    }
    assert_eq!(without_key, BTreeSet::from([200, 503]), "one was lost with the leader");

    // With one of two away nobody notices, and whoever comes back gets requests again.
    for _ in 0..4 {
        assert_eq!(ask(&url, None, &completion(&[7], 1)).0, 200);
    }
    deployment.restart_coordinator(leader).expect("it starts again");
    let back = address(&deployment.coordinators[leader].http);
    let n_before = nginx.accesses().len();
    wait_until("it is asked again", || {
        let (status, ..) = ask(&url, None, &completion(&[7], 1));
        let accesses = nginx.accesses();
        status == 200 && accesses[n_before..].iter().any(|a| a.status == 200 && a.upstreams == [back.clone()])
    });
    drop(nginx);
    assert_eq!(deployment.end(), Vec::<String>::new());
}
