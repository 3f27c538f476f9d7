//! Two coordinators with one folder of files: whoever leads has it, both tell what is in it, and the next leader finishes
//! what the one before has begun.

use std::{
    fs,
    io::{BufReader, Read},
};

use phalanx_tests::{
    client::{get, metric, post},
    faults::etcd::Etcd,
    model_cache::{SMOLLM2, model},
    offline::{results, said, upload},
    process::{Cluster, Process, wait_until},
};
use rustix::process::Signal;
use serde_json::{Value, json};

const LINES: usize = 24;
/// What a standby may need to pass a file on, whatever its length.
const BOUND: u64 = 24 << 20;
/// A file that is longer, and longer than the body of any other request may be.
const LONG: u64 = 80 << 20;

fn line(n: usize, max_tokens: u32) -> String {
    let messages = json!([{"role": "user", "content": format!("Tell me about the number {n}.")}]);
    let mut body = json!({"messages": messages, "max_tokens": max_tokens});
    if n.is_multiple_of(2) {
        body["temperature"] = 0.into();
    } else {
        body["seed"] = n.into();
    }
    json!({"custom_id": format!("line-{n}"), "method": "POST", "url": "/v1/chat/completions", "body": body}).to_string()
}

fn lines(n: usize, max_tokens: u32) -> String {
    (0..n).map(|n| line(n, max_tokens) + "\n").collect()
}

fn create(http: &str, file: &Value) -> String {
    let asked = json!({"input_file_id": file["id"], "endpoint": "/v1/chat/completions", "completion_window": "24h"});
    let made = post(&format!("{http}/v1/batches"), &asked).unwrap();
    assert_eq!(made.status, 200, "{}", made.body);
    made.json().unwrap()["id"].as_str().unwrap().to_owned()
}

/// A batch; `None` while nobody can tell.
fn batch(http: &str, id: &str) -> Option<Value> {
    let answer = get(&format!("{http}/v1/batches/{id}")).unwrap();
    assert!([200, 503].contains(&answer.status), "{}: {}", answer.status, answer.body);
    (answer.status == 200).then(|| answer.json().unwrap())
}

fn done(batch: &Value) -> u64 {
    batch["request_counts"]["completed"].as_u64().unwrap()
}

fn ended(http: &str, id: &str, status: &str) -> Value {
    let mut last = Value::Null;
    wait_until(&format!("the batch is {status}"), || {
        last = batch(http, id).unwrap_or_default();
        let is_other = ["completed", "failed", "cancelled", "expired"].iter().any(|end| last["status"] == *end);
        assert!(!is_other || last["status"] == status, "{last}");
        is_other
    });
    last
}

fn content(http: &str, id: &Value) -> String {
    let answer = get(&format!("{http}/v1/files/{}/content", id.as_str().unwrap_or_else(|| panic!("{id}")))).unwrap();
    assert_eq!(answer.status, 200, "{}", answer.body);
    answer.body
}

fn listed(http: &str, what: &str) -> Value {
    let answer = get(&format!("{http}/v1/{what}")).unwrap();
    assert_eq!(answer.status, 200, "{}", answer.body);
    answer.json().unwrap()["data"].clone()
}

/// Most memory that a process had since it was asked to forget, in bytes.
fn peak(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("Linux tells");
    line.trim().trim_end_matches(" kB").parse::<u64>().expect("it is a number") << 10
}

fn forget_peak(pid: u32) {
    fs::write(format!("/proc/{pid}/clear_refs"), "5").unwrap();
}

/// Bytes that are different everywhere, as many as there are to be.
struct Pattern {
    at: u64,
    end: u64,
}

impl Read for Pattern {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let n_bytes = usize::try_from(self.end - self.at).unwrap().min(buffer.len());
        for byte in &mut buffer[..n_bytes] {
            *byte = self.at.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_be_bytes()[0];
            self.at += 1;
        }
        Ok(n_bytes)
    }
}

fn a_long_file_passes_through(standby: &Cluster) {
    let pid = standby.process.pid();
    forget_peak(pid);
    let before = peak(pid);
    let file = upload(&standby.http, Pattern { at: 0, end: LONG });
    assert_eq!(file["bytes"], LONG, "{file}");
    let url = format!("{}/v1/files/{}", standby.http, file["id"].as_str().unwrap());
    let answer = ureq::get(format!("{url}/content")).call().unwrap();
    assert_eq!(answer.headers()["content-length"], LONG.to_string().as_str());
    let mut content = BufReader::new(answer.into_body().into_reader());
    let mut pattern = BufReader::new(Pattern { at: 0, end: LONG });
    let (mut got, mut want) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    for _ in 0..LONG >> 20 {
        content.read_exact(&mut got).unwrap();
        pattern.read_exact(&mut want).unwrap();
        assert!(got == want, "the content is another one");
    }
    assert_eq!(content.read(&mut got).unwrap(), 0);
    let grown = peak(pid).saturating_sub(before);
    println!("a standby that passes {LONG} bytes on in both directions needs {grown} more");
    assert!(grown < BOUND, "{grown} bytes");
    assert_eq!(ureq::delete(&url).call().unwrap().status(), 200);
}

#[test]
fn the_next_leader_finishes_what_is_in_the_folder() {
    let (etcd, folder) = (Etcd::start(1).expect("etcd starts"), tempfile::tempdir().unwrap());
    let (store, files) = (etcd.url(), folder.path().display().to_string());
    let coordinator = || {
        let args = ["--store", &store, "--local-shards", "0", "--tensor-parallel-size", "1", "--files-dir", &files];
        let more = ["--heartbeat-timeout-ms", "600000", "--kv-cache-memory", "64MiB", "--max-model-len", "1024"];
        let mut cluster = Cluster::launch(&model(SMOLLM2), &[&args[..], &more, &["--max-num-seqs", "4"]].concat());
        cluster.wait_listening();
        cluster
    };
    let leads = |cluster: &Cluster| metric(&cluster.http, "phalanx_is_leader") > 0.0;
    let mut first = coordinator();
    wait_until("the first coordinator leads", || leads(&first));
    let args = ["--coordinator", &first.grpc, "--threads", "1", "--shard-id", "only"];
    let _shard = Process::start("shard", &args.map(str::to_owned));
    first.wait_ready();
    let second = coordinator();
    a_long_file_passes_through(&second);

    // Without a fault.
    let file = upload(&second.http, lines(LINES, 12).as_bytes());
    let whole = create(&second.http, &file);
    let whole = ended(&second.http, &whole, "completed");
    let expected = results(&content(&second.http, &whole["output_file_id"]));
    assert_eq!(expected.len(), LINES);

    // The same, and its leader is killed.
    let id = create(&second.http, &file);
    wait_until("some lines are done", || batch(&second.http, &id).is_some_and(|batch| done(&batch) >= 4));
    for what in ["files", "batches"] {
        let (here, there) = (listed(&first.http, what), listed(&second.http, what));
        let ids =
            |list: &Value| -> Vec<Value> { list.as_array().unwrap().iter().map(|one| one["id"].clone()).collect() };
        assert_eq!(ids(&here), ids(&there), "{what}");
        assert_eq!(ids(&here).len(), 2, "{what}: {here}");
    }
    let before = batch(&first.http, &id).unwrap();
    assert_eq!(before["status"], "in_progress", "it was too quick for this test: {before}");
    first.process.signal(Signal::KILL);
    first.process.wait();
    wait_until("the other coordinator leads", || leads(&second));
    let third = coordinator();
    wait_until("it has the folder", || batch(&second.http, &id).is_some());
    let after = batch(&third.http, &id).unwrap();
    assert!(done(&after) >= done(&before), "what was done is done: {before} {after}");
    let after = ended(&third.http, &id, "completed");
    assert_eq!(after["request_counts"], json!({"total": LINES, "completed": LINES, "failed": 0}));
    let got = results(&content(&third.http, &after["output_file_id"]));
    assert_eq!(got.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>());
    for (name, line) in &got {
        assert_eq!(said(line), said(&expected[name]), "{name}");
    }

    // What there was before is there, whoever is asked, and can be changed.
    for what in ["files", "batches"] {
        assert_eq!(listed(&second.http, what), listed(&third.http, what), "{what}");
    }
    assert_eq!(content(&third.http, &file["id"]), lines(LINES, 12));
    assert_eq!(listed(&third.http, "batches").as_array().unwrap().len(), 2);
    let long = create(&third.http, &upload(&third.http, lines(200, 48).as_bytes()));
    wait_until("a line is done", || batch(&third.http, &long).is_some_and(|batch| done(&batch) >= 1));
    let cancelled = post(&format!("{}/v1/batches/{long}/cancel", third.http), &json!({})).unwrap();
    assert_eq!(cancelled.status, 200, "{}", cancelled.body);
    let cancelled = ended(&second.http, &long, "cancelled");
    let n_done = done(&cancelled);
    assert!((1..200).contains(&n_done), "{cancelled}");
    assert_eq!(results(&content(&third.http, &cancelled["output_file_id"])).len() as u64, n_done);
    let url = format!("{}/v1/files/{}", third.http, file["id"].as_str().unwrap());
    assert_eq!(ureq::delete(&url).call().unwrap().status(), 200);
    assert_eq!(get(&url).unwrap().status, 404);
    assert!(third.interrupt().success());
    assert!(second.interrupt().success());
}
