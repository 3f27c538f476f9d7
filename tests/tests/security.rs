//! Keys, limits, TLS and the audit log of a running cluster, as clients and operators meet them.

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::TcpListener,
    path::Path,
    sync::{Arc, Mutex},
    time::Duration,
};

use phalanx_proto::v1::inference_client::InferenceClient;
use phalanx_tests::{
    client::{generate, generate_over, greedy},
    faults::etcd::Etcd,
    model_cache::{SMOLLM2, model},
    process::{Cluster, Process, wait_until},
};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair, SigningKey};
use rustix::process::Signal;
use serde_json::{Value, json};
use tonic::{
    Code, Request,
    transport::{Certificate, Channel, ClientTlsConfig, Endpoint},
};
use ureq::{Agent, http::Response, tls::RootCerts};

const PROMPT: [u32; 3] = [504, 3575, 282];

/// Runs the coordinator's program to its end: whether it worked, and what it said.
fn run(args: &[&str]) -> (bool, String) {
    let mut process = Process::start("coordinator", &args.iter().map(|a| (*a).to_owned()).collect::<Vec<_>>());
    (process.wait().success(), process.log())
}

/// Makes a key.
fn add_key(file: &Path, name: &str, options: &[&str]) -> String {
    let (works, key) = run(&[&["key", "add", "--file", file.to_str().unwrap(), "--name", name], options].concat());
    assert!(works && key.starts_with("phx_") && key.lines().count() == 1, "{key}");
    key.trim().to_owned()
}

fn agent() -> Agent {
    Agent::config_builder().http_status_as_error(false).build().into()
}

struct Client<'a> {
    http: &'a str,
    key: Option<&'a str>,
}

impl Client<'_> {
    fn get(&self, path: &str) -> u16 {
        let mut request = agent().get(format!("{}{path}", self.http));
        if let Some(key) = self.key {
            request = request.header("authorization", format!("Bearer {key}"));
        }
        request.call().unwrap().status().as_u16()
    }

    fn complete(&self, body: &Value) -> Response<ureq::Body> {
        let mut request =
            agent().post(format!("{}/v1/completions", self.http)).header("content-type", "application/json");
        if let Some(key) = self.key {
            request = request.header("authorization", format!("Bearer {key}"));
        }
        request.send(&serde_json::to_vec(body).unwrap()).unwrap()
    }
}

async fn call(grpc: &str, key: &str) -> Result<(), Code> {
    let channel = Endpoint::from_shared(grpc.to_owned()).unwrap().connect().await.unwrap();
    let mut request = Request::new(greedy(&PROMPT, 2));
    request.metadata_mut().insert("authorization", format!("Bearer {key}").parse().unwrap());
    let mut stream = InferenceClient::new(channel).generate(request).await.map_err(|s| s.code())?.into_inner();
    while stream.message().await.map_err(|s| s.code())?.is_some() {}
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_open_limit_and_close() {
    let dir = tempfile::tempdir().unwrap();
    let (keys, audit) = (dir.path().join("keys.json"), dir.path().join("audit.jsonl"));
    let limited = add_key(&keys, "limited", &["--rpm", "5"]);
    let operator = add_key(&keys, "operator", &["--role", "admin"]);
    let (files, log) = (keys.to_str().unwrap(), audit.to_str().unwrap());
    let options = ["--api-keys", files, "--audit-log", log, "--kv-cache-memory", "64MiB", "--max-model-len", "2048"];
    let cluster = Cluster::start(&model(SMOLLM2), &options);
    let with = |key| Client { http: &cluster.http, key };

    for path in ["/health", "/ready"] {
        assert_eq!(with(None).get(path), 200, "{path}");
    }
    for path in ["/v1/models", "/metrics", "/version", "/ping", "/admin/status", "/v1/streams/x", "/no/such/path"] {
        assert_eq!(with(None).get(path), 401, "{path}");
        assert_eq!(with(Some("phx_0000")).get(path), 401, "{path}");
    }
    assert_eq!(with(Some(&limited)).get("/v1/models"), 200);
    assert_eq!((with(Some(&limited)).get("/admin/status"), with(Some(&operator)).get("/admin/status")), (403, 200));

    // Requests in any minute: however slow this machine is, the first five are younger than that or the test is over.
    let small = json!({"prompt": "Once", "max_tokens": 1});
    let began = std::time::Instant::now();
    for left in (0..5).rev() {
        let answer = with(Some(&limited)).complete(&small);
        assert_eq!(answer.status(), 200);
        assert_eq!(answer.headers()["x-ratelimit-remaining-requests"], left.to_string());
    }
    let sixth = with(Some(&limited)).complete(&small);
    if began.elapsed() < Duration::from_secs(60) {
        assert_eq!(sixth.status(), 429);
        for header in ["retry-after", "x-ratelimit-limit-requests", "x-ratelimit-reset-requests"] {
            assert!(sixth.headers().contains_key(header), "{header}");
        }
    }

    // A key that is added counts without a restart; one that is revoked ends what runs under it.
    let fresh = add_key(&keys, "fresh", &[]);
    wait_until("the new key counts", || with(Some(&fresh)).get("/v1/models") == 200);
    assert_eq!(call(&cluster.grpc, &fresh).await, Ok(()));
    assert_eq!(call(&cluster.grpc, "phx_wrong").await, Err(Code::Unauthenticated));
    let long = json!({"prompt": "Once", "max_tokens": 1900, "ignore_eos": true, "stream": true});
    let mut running = with(Some(&fresh)).complete(&long).into_body().into_reader();
    running.read_exact(&mut [0; 16]).unwrap();
    let (works, said) = run(&["key", "revoke", "--file", files, "--name", "fresh"]);
    assert!(works, "{said}");
    let mut rest = String::new();
    running.read_to_string(&mut rest).unwrap();
    assert!(rest.contains("invalid_api_key") && !rest.contains("[DONE]"), "{rest}");
    assert_eq!(with(Some(&fresh)).get("/v1/models"), 401);
    let (works, listed) = run(&["key", "list", "--file", files]);
    assert!(works && listed.contains("revoked") && !listed.contains(&fresh), "{listed}");

    // A file that is broken changes nothing.
    let whole = fs::read(&keys).unwrap();
    fs::write(&keys, &whole[..whole.len() / 2]).unwrap();
    wait_until("the broken file is seen", || cluster.process.log().contains("those before stay in force"));
    assert_eq!(with(Some(&operator)).get("/v1/models"), 200);
    fs::write(&keys, &whole).unwrap();

    // Operators' commands need an admin's key too.
    let plan = |key: &[&str]| run(&[&["cluster", "plan", "--coordinator", &cluster.grpc], key].concat());
    let (works, said) = plan(&[]);
    assert!(!works && said.contains("API key"), "{said}");
    assert!(!plan(&["--api-key", &limited]).0);
    let (works, said) = plan(&["--api-key", &operator]);
    assert!(works && said.contains("local-0"), "{said}");

    assert!(cluster.interrupt().success());
    let text = fs::read_to_string(&audit).unwrap();
    assert!(!text.contains("phx_") && !text.contains("Once"));
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let has = |key: &str, route: &str, status: &str| {
        lines.iter().any(|l| l["key"] == key && l["route"] == route && l["status"] == status)
    };
    assert!(has("limited", "/v1/completions", "200") && has("limited", "/admin/status", "403"), "{text}");
    assert!(has("fresh", "phalanx.v1.Inference/Generate", "ok") && has("fresh", "/v1/completions", "401"), "{text}");
    assert!(has("operator", "/phalanx.v1.Admin/Plan", "ok"), "{text}");
    assert!(lines.iter().any(|l| l["key"].is_null() && l["status"] == "401"), "{text}");
    let first = lines.iter().find(|l| l["key"] == "limited" && l["status"] == "200" && l["output_tokens"] == 1);
    let first = first.expect("a completion");
    assert!(first["prompt_tokens"].as_u64() > Some(0) && first["client"].as_str().unwrap().starts_with("127.0.0.1:"));
}

/// Answers every request with the same JSON, which may change.
fn serve_json(text: &Arc<Mutex<String>>) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/jwks.json", listener.local_addr().unwrap());
    let text = Arc::clone(text);
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let mut reader = BufReader::new(stream.try_clone().unwrap());
            let mut line = String::new();
            while reader.read_line(&mut line).is_ok_and(|n| n > 2) {
                line.clear();
            }
            let body = text.lock().unwrap().clone();
            let head = format!("HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: {}\r\n\r\n", body.len());
            let _gone = stream.write_all(format!("{head}{body}").as_bytes());
        }
    });
    url
}

fn base64url(bytes: &[u8]) -> String {
    const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let mut text = String::new();
    for chunk in bytes.chunks(3) {
        let word = chunk.iter().enumerate().fold(0_u32, |word, (at, byte)| word | u32::from(*byte) << (16 - 8 * at));
        text.extend((0..=chunk.len()).map(|at| char::from(LETTERS[(word >> (18 - 6 * at)) as usize & 63])));
    }
    text
}

/// An issuer of tokens.
struct Signer {
    name: &'static str,
    key: KeyPair,
}

impl Signer {
    fn new(name: &'static str) -> Self {
        Self { name, key: KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap() }
    }

    fn keys(&self) -> String {
        let x = base64url(self.key.public_key_raw());
        json!({"keys": [{"kty": "OKP", "crv": "Ed25519", "kid": self.name, "x": x}]}).to_string()
    }

    fn token(&self, audience: &str) -> String {
        let header = json!({"alg": "EdDSA", "kid": self.name}).to_string();
        let claims = json!({"sub": "robot", "aud": audience, "exp": 4_000_000_000_u64}).to_string();
        let signed = format!("{}.{}", base64url(header.as_bytes()), base64url(claims.as_bytes()));
        let signature = self.key.sign(signed.as_bytes()).unwrap();
        format!("{signed}.{}", base64url(&signature))
    }
}

#[test]
fn tokens_are_checked_with_the_keys_at_an_address() {
    let (first, second) = (Signer::new("k1"), Signer::new("k2"));
    let served = Arc::new(Mutex::new(first.keys()));
    let options = ["--tensor-parallel-size", "1", "--kv-cache-memory", "64MiB", "--jwt-audience", "phalanx"];
    let cluster = Cluster::start(&model(SMOLLM2), &[&["--jwks", &serve_json(&served)][..], &options].concat());
    let with = |token: &str| Client { http: &cluster.http, key: Some(token) }.get("/v1/models");
    assert_eq!(Client { http: &cluster.http, key: None }.get("/v1/models"), 401);
    assert_eq!(with(&first.token("phalanx")), 200);
    assert_eq!(with(&first.token("others")), 401);
    assert_eq!(with(&second.token("phalanx")), 401);
    assert_eq!(with(&Signer::new("k1").token("phalanx")), 401, "another key of that name");
    // A token of a key that is not known has the address asked again.
    *served.lock().unwrap() = second.keys();
    wait_until("the new key is known", || with(&second.token("phalanx")) == 200);
    assert_eq!(with(&first.token("phalanx")), 401, "the old one is gone");
    *served.lock().unwrap() = "nonsense".to_owned();
    assert_eq!(with(&first.token("phalanx")), 401);
    wait_until("the nonsense is seen", || cluster.process.log().contains("those before stay in force"));
    assert_eq!(with(&second.token("phalanx")), 200);
    assert!(cluster.interrupt().success());
}

/// An authority, and what it has issued for `localhost`, as PEM.
struct Issued {
    authority: String,
    certificate: String,
    key: String,
}

fn issue(name: &str) -> Issued {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.distinguished_name.push(DnType::CommonName, name);
    let authority = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
    let key = KeyPair::generate().unwrap();
    let own = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
    let certificate = own.signed_by(&key, &authority).unwrap().pem();
    Issued { authority: authority.pem(), certificate, key: key.serialize_pem() }
}

/// A client that trusts this authority.
fn trusting(authority: &str) -> Agent {
    let root = ureq::tls::Certificate::from_pem(authority.as_bytes()).unwrap();
    let tls = ureq::tls::TlsConfig::builder().root_certs(RootCerts::new_with_certs(&[root])).build();
    Agent::config_builder().http_status_as_error(false).tls_config(tls).build().into()
}

/// The status of an HTTPS request by somebody who trusts this authority.
fn secure_get(url: &str, authority: &str) -> Result<u16, ureq::Error> {
    Ok(trusting(authority).get(url).call()?.status().as_u16())
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_get_tls_and_certificates_are_renewed() {
    let dir = tempfile::tempdir().unwrap();
    let (certificate, key) = (dir.path().join("cert.pem"), dir.path().join("key.pem"));
    let first = issue("first");
    fs::write(&certificate, &first.certificate).unwrap();
    fs::write(&key, &first.key).unwrap();
    let files = ["--ssl-certfile", certificate.to_str().unwrap(), "--ssl-keyfile", key.to_str().unwrap()];
    let options = ["--tensor-parallel-size", "1", "--kv-cache-memory", "64MiB"];
    let cluster = Cluster::start(&model(SMOLLM2), &[&files[..], &options].concat());
    let https = cluster.http.replace("127.0.0.1", "localhost");
    let ready = format!("{https}/ready");
    assert_eq!(secure_get(&ready, &first.authority).unwrap(), 200);
    let other = issue("other");
    assert!(secure_get(&ready, &other.authority).is_err());
    let plain = cluster.http.replace("https://", "http://");
    assert!(agent().get(format!("{plain}/health")).call().is_err(), "plain text");

    // Clients over gRPC get TLS; the shard, which has no certificate, has come by plain text.
    let connect = async |authority: &str| -> Result<Channel, tonic::transport::Error> {
        let tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(authority)).domain_name("localhost");
        let url = cluster.grpc.replace("http://", "https://");
        Endpoint::from_shared(url).unwrap().tls_config(tls).unwrap().connect().await
    };
    let channel = connect(&first.authority).await.unwrap();
    let answer = generate_over(channel, greedy(&PROMPT, 4)).await.unwrap();
    assert_eq!(answer.choices[0].token_ids.len(), 4);
    assert!(connect(&other.authority).await.is_err());
    let refused = format!("{:#}", generate(&cluster.grpc, greedy(&PROMPT, 4)).await.unwrap_err());
    assert!(refused.contains("https://"), "{refused}");

    fs::write(&key, &other.key).unwrap();
    fs::write(&certificate, &other.certificate).unwrap();
    wait_until("the new certificate is shown", || secure_get(&ready, &other.authority).is_ok_and(|s| s == 200));
    assert!(connect(&other.authority).await.is_ok());
    assert!(cluster.interrupt().success());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_standby_passes_on_counts_once() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    let public = issue("public");
    fs::write(path("cert.pem"), &public.certificate).unwrap();
    fs::write(path("key.pem"), &public.key).unwrap();
    assert!(run(&["certs", "init", "--dir", &path("certs")]).0);
    let key = add_key(&dir.path().join("keys.json"), "team", &["--rpm", "5"]);
    let own = |name: &str| {
        let files = [
            ("--cluster-ca", "ca".to_owned()),
            ("--cluster-cert", name.to_owned()),
            ("--cluster-key", format!("{name}-key")),
        ];
        files
            .into_iter()
            .flat_map(|(flag, file)| [flag.to_owned(), path(&format!("certs/{file}.pem"))])
            .collect::<Vec<_>>()
    };
    let etcd = Etcd::start(1).unwrap();
    let start = |audit: &str| {
        let mut args = vec!["--store".to_owned(), etcd.url(), "--api-keys".to_owned(), path("keys.json")];
        args.extend(["--ssl-certfile".to_owned(), path("cert.pem"), "--ssl-keyfile".to_owned(), path("key.pem")]);
        args.extend(["--audit-log".to_owned(), path(audit)]);
        let fixed = ["--local-shards", "0", "--tensor-parallel-size", "1", "--kv-cache-memory", "64MiB"];
        args.extend(fixed.into_iter().chain(["--heartbeat-timeout-ms", "600000"]).map(str::to_owned));
        args.extend(own("coordinator"));
        let mut started = Cluster::launch(&model(SMOLLM2), &args.iter().map(String::as_str).collect::<Vec<_>>());
        started.wait_listening();
        started
    };
    let mut leader = start("leader.jsonl");
    let shard = ["--coordinator", &leader.grpc.replace("http://", "https://"), "--threads", "1", "--shard-id", "east"];
    let shard = Process::start("shard", &[&shard.map(str::to_owned)[..], &own("shard")].concat());
    leader.wait_ready();
    let standby = start("standby.jsonl");
    wait_until("the standby follows", || standby.process.log().contains("following"));

    let agent = trusting(&public.authority);
    let ask = |to: &Cluster, key: &str| {
        let url = to.http.replace("127.0.0.1", "localhost");
        let request = agent.post(format!("{url}/v1/completions")).header("authorization", format!("Bearer {key}"));
        let body = json!({"prompt": "Once", "max_tokens": 1}).to_string();
        request.header("content-type", "application/json").send(body.as_bytes()).unwrap()
    };
    assert_eq!(ask(&standby, "phx_wrong").status(), 401);
    for (left, to) in [(4, &standby), (3, &leader), (2, &standby)] {
        let answer = ask(to, &key);
        assert_eq!(answer.status(), 200);
        assert_eq!(answer.headers()["x-ratelimit-remaining-requests"], left.to_string());
        assert!(!answer.headers().contains_key("x-phalanx-recorded"));
    }
    assert!(standby.interrupt().success());
    drop(shard);
    assert!(leader.interrupt().success());
    let lines = |name: &str| -> Vec<Value> {
        let text = fs::read_to_string(path(name)).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    };
    let (at_leader, at_standby) = (lines("leader.jsonl"), lines("standby.jsonl"));
    let passed_on: Vec<bool> = at_leader.iter().map(|line| line.get("via").is_some()).collect();
    assert_eq!(passed_on, [true, false, true], "{at_leader:?}");
    assert!(at_leader.iter().all(|l| l["key"] == "team" && l["output_tokens"] == 1));
    assert_eq!(at_standby.len(), 1, "{at_standby:?}");
    assert_eq!((&at_standby[0]["status"], &at_standby[0]["key"]), (&json!("401"), &Value::Null));
}

#[test]
fn probes_are_answered_over_tls_while_a_model_is_fetched() {
    // An index that never answers.
    let index = TcpListener::bind("127.0.0.1:0").unwrap();
    let variables = ["env".to_owned(), format!("PHALANX_PYPI_INDEX=http://{}/simple/", index.local_addr().unwrap())];
    let dir = tempfile::tempdir().unwrap();
    let (certificate, key) = (dir.path().join("cert.pem"), dir.path().join("key.pem"));
    let public = issue("public");
    fs::write(&certificate, &public.certificate).unwrap();
    fs::write(&key, &public.key).unwrap();
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port().to_string();
    let files = ["--ssl-certfile", certificate.to_str().unwrap(), "--ssl-keyfile", key.to_str().unwrap()];
    let args = [&["pypi:phalanx-no-such-model", "--port", &port, "--grpc-port", "0"][..], &files].concat();
    let args: Vec<String> = args.iter().map(|a| (*a).to_owned()).collect();
    let mut coordinator = Process::start_in(&variables, "coordinator", &args);
    let url = |path: &str| format!("https://localhost:{port}{path}");
    wait_until("the process says that it lives", || {
        secure_get(&url("/livez"), &public.authority).is_ok_and(|s| s == 200)
    });
    assert_eq!(secure_get(&url("/readyz"), &public.authority).unwrap(), 503);
    assert!(secure_get(&url("/livez"), &issue("other").authority).is_err());
    assert!(agent().get(format!("http://localhost:{port}/livez")).call().is_err(), "plain text");
    coordinator.signal(Signal::TERM);
    assert!(coordinator.wait().success());
}

#[test]
fn an_open_cluster_port_is_refused_unless_it_is_meant() {
    let path = model(SMOLLM2).display().to_string();
    let mut args = vec![path.as_str(), "--port", "0", "--grpc-port", "0", "--local-shards", "0", "--host", "0.0.0.0"];
    let start =
        |args: &[&str]| Process::start("coordinator", &args.iter().map(|a| (*a).to_owned()).collect::<Vec<_>>());
    let mut refused = start(&args);
    assert_eq!(refused.wait().code(), Some(2));
    let log = refused.log();
    assert!(log.contains("--insecure-cluster") && log.contains("certs init"), "{log}");
    args.push("--insecure-cluster");
    let mut meant = start(&args);
    meant.wait_for_line("phalanx listening ");
    meant.signal(Signal::TERM);
    assert!(meant.wait().success());
}
