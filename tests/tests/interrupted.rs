//! Answers that are guarded, that follow a schema or call a tool, and whose shard or leader is killed in the middle: they say
//! what they would have said, and no more.

use std::{fs, path::Path};

use phalanx_tests::{
    client::{metric, post},
    faults::etcd::Etcd,
    model_cache::{QWEN_05B, SMOLLM2, model},
    process::{Cluster, Process, signal_pid, wait_until},
    resuming::{Reader, Said, Told},
};
use rustix::process::Signal;
use serde_json::{Value, json};

/// An answer that is nearly all personal: wherever it is interrupted, that is in the middle of an address.
const MAIL: &str = "ann.of.the.north.and.her.seven.brothers@mail.example.org";
const MAILS: usize = 6;
/// What is told before the phrase that is denied.
const BEFORE: &str = "All of it: ";
const DENIED: &str = "The moon over the harbour is made of green cheese that seven old sailors stole from a baker, \
                      and whoever has eaten of it will sing to the gulls";
/// Parts of both that must not be seen, in whatever event.
const SECRETS: [&str; 8] = ["ann", "north", "brothers", "example", "moon", "cheese", "sailors", "gulls"];
/// Tokens that a long answer has at least when it is interrupted.
const SOME: u64 = 8;

fn escaped(text: &str) -> String {
    text.replace('.', "\\.")
}

fn chat(ask: &str, max_tokens: u32, more: &Value) -> Value {
    let mut body =
        json!({"messages": [{"role": "user", "content": ask}], "temperature": 1, "seed": 5, "max_tokens": max_tokens});
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

/// Says exactly this.
fn dictated(regex: &str) -> Value {
    chat("Say it.", 600, &json!({"structured_outputs": {"regex": regex}}))
}

fn personal() -> Value {
    dictated(&format!("(Write to {} now; ){{{MAILS}}}", escaped(MAIL)))
}

fn denied() -> Value {
    dictated(&format!("{BEFORE}{DENIED}, and so on\\."))
}

fn words() -> Value {
    let word = json!({"type": "string", "minLength": 3, "maxLength": 12, "pattern": "^[a-z]+$"});
    json!({"type": "object", "properties": {"words": {"type": "array", "items": word, "minItems": 36, "maxItems": 36}},
           "required": ["words"], "additionalProperties": false})
}

fn schema() -> Value {
    let format = json!({"type": "json_schema", "json_schema": {"name": "words", "strict": true, "schema": words()}});
    chat("Name things that float.", 600, &json!({"response_format": format}))
}

fn tool() -> Value {
    let function = json!({"name": "count_words", "description": "Counts words.", "parameters": words()});
    let tools = json!([{"type": "function", "function": function}]);
    let more = json!({"tools": tools, "tool_choice": "required", "parallel_tool_calls": false});
    chat("Count the words of a poem about the sea.", 600, &more)
}

/// The guard's option, with a list in a folder.
fn guard(folder: &Path) -> String {
    let list = folder.join("list.txt");
    fs::write(&list, format!("{DENIED}\n")).unwrap();
    format!("pii,denylist:{}", list.display())
}

/// What a stream said; nothing of what must not be seen was in any event.
fn said(told: &Told) -> Said {
    for (_, event) in &told.events {
        let text = event.to_string();
        assert!(!SECRETS.iter().any(|secret| text.contains(secret)), "{text}");
    }
    told.said()
}

fn check_personal(said: &Said) {
    let want = "Write to [MAIL] now; ".repeat(MAILS);
    assert_eq!((said.content.as_str(), said.finish.as_str()), (want.as_str(), "stop"));
}

fn check_denied(said: &Said) {
    assert_eq!((said.content.as_str(), said.finish.as_str()), (BEFORE, "content_filter"));
}

fn check_words(text: &str) {
    let value: Value = serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"));
    assert!(jsonschema::is_valid(&words(), &value), "{value}");
}

/// Whether a stream is far enough. Tokens that are held back are not told: of the denied phrase nothing is.
fn is_in_the_middle(told: &Told) -> bool {
    told.n_tokens() >= SOME || told.said().content.trim_end() == BEFORE.trim_end()
}

/// Waits until all have begun; none may have ended.
fn wait_until_in_the_middle(readers: &[Reader]) {
    wait_until("every stream has some tokens", || {
        readers.iter().map(Reader::told).all(|told| told.is_over || is_in_the_middle(&told))
    });
    for (n, told) in readers.iter().map(Reader::told).enumerate() {
        assert!(!told.is_over, "stream {n} was too quick for this test: {:?}", told.said());
    }
}

#[test]
fn a_guarded_stream_tells_nothing_when_its_shard_is_killed() {
    let folder = tempfile::tempdir().unwrap();
    let args = ["--tensor-parallel-size", "2", "--kv-cache-memory", "64MiB", "--max-model-len", "1024"];
    let cluster = Cluster::start(&model(SMOLLM2), &[&args[..], &["--guard", &guard(folder.path())]].concat());
    let ask = |body: &Value, key: &str| Reader::start(&[&cluster.http], body, Some(key));
    let bodies = [personal(), denied()];
    let expected: Vec<_> =
        (0..).zip(&bodies).map(|(n, body)| said(&ask(body, &format!("whole-{n}")).finish())).collect();
    check_personal(&expected[0]);
    check_denied(&expected[1]);

    let shards = cluster.local_shards();
    assert_eq!(shards.len(), 2);
    for (n_lost, shard) in (1..).zip(shards) {
        let readers: Vec<_> = (0..).zip(&bodies).map(|(n, body)| ask(body, &format!("lost-{n_lost}-{n}"))).collect();
        wait_until_in_the_middle(&readers);
        signal_pid(shard, Signal::KILL);
        for (reader, expected) in readers.into_iter().zip(&expected) {
            let told = reader.finish();
            assert_eq!(told.returns, 0, "its client notices nothing");
            assert_eq!(&said(&told), expected);
        }
        wait_until("the loss is counted", || metric(&cluster.http, "phalanx_failovers_total") >= f64::from(n_lost));
    }
    assert!(metric(&cluster.http, "phalanx_replayed_tokens_total") > 0.0);
    assert!(cluster.interrupt().success());
}

#[test]
fn answers_go_on_as_they_were_when_their_leader_is_killed() {
    let folder = tempfile::tempdir().unwrap();
    let etcd = Etcd::start(1).expect("etcd starts");
    let (store, guard) = (etcd.url(), guard(folder.path()));
    let coordinator = || {
        let args = ["--store", &store, "--local-shards", "0", "--tensor-parallel-size", "1", "--guard", &guard];
        // Nobody counts as silent, however busy this machine is.
        let more = ["--heartbeat-timeout-ms", "600000", "--kv-cache-memory", "128MiB", "--max-model-len", "1024"];
        let mut cluster =
            Cluster::launch(&model(QWEN_05B), &[&args[..], &more, &["--enable-auto-tool-choice"]].concat());
        cluster.wait_listening();
        cluster
    };
    let leads = |cluster: &Cluster| metric(&cluster.http, "phalanx_is_leader") > 0.0;
    let mut leader = coordinator();
    wait_until("the first coordinator leads", || leads(&leader));
    let args = ["--coordinator", &leader.grpc, "--threads", "1", "--shard-id", "only"];
    let shard = Process::start("shard", &args.map(str::to_owned));
    leader.wait_ready();
    let next = coordinator();

    let bodies = [personal(), schema(), tool(), denied()];
    let whole = |body: &Value| {
        let answer = post(&format!("{}/v1/chat/completions", leader.http), body).unwrap();
        assert_eq!(answer.status, 200, "{}: {body}", answer.body);
        Said::whole(&answer.json().unwrap())
    };
    let expected: Vec<_> = bodies.iter().map(whole).collect();
    check_personal(&expected[0]);
    assert_eq!(expected[1].finish, "stop");
    check_words(&expected[1].content);
    assert_eq!((expected[2].finish.as_str(), expected[2].calls.len()), ("tool_calls", 1), "{:?}", expected[2]);
    check_words(&expected[2].calls[0].1);
    check_denied(&expected[3]);

    // Half of the clients have the leader itself, and come back with the last id that they have. The others have the
    // standby, and neither a key nor a reason to come back.
    let mut readers = Vec::new();
    for (n, body) in bodies.iter().enumerate() {
        // The last is the shortest: it begins when the others are under way.
        if n == bodies.len() - 1 {
            wait_until_in_the_middle(&readers);
        }
        readers.push(Reader::start(&[&leader.http, &next.http], body, Some(&format!("answer-{n}"))));
        readers.push(Reader::start(&[&next.http], body, None));
    }
    wait_until_in_the_middle(&readers);
    // They stand still from here on.
    shard.signal(Signal::STOP);
    wait_until_in_the_middle(&readers);
    leader.process.signal(Signal::KILL);
    leader.process.wait();
    wait_until("the other coordinator leads", || leads(&next));
    shard.signal(Signal::CONT);

    let mut usages = Vec::new();
    for (n, reader) in readers.into_iter().enumerate() {
        let told = reader.finish();
        assert_eq!(told.returns > 0, n % 2 == 0, "who has a key comes back");
        // Of the others some are about the sea, too.
        let is_guarded = [0, bodies.len() - 1].contains(&(n / 2));
        let mut said = if is_guarded { said(&told) } else { told.said() };
        usages.push(said.usage.take().expect("usage is told"));
        assert_eq!(said, expected[n / 2], "{n}");
    }
    for pair in usages.chunks(2) {
        assert_eq!(pair[0], pair[1]);
    }
    assert!(next.interrupt().success());
}
