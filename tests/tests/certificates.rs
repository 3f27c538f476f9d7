//! Who may join a cluster that has certificates, who may ask it, and what everybody else is told.

use std::{
    fs,
    path::{Path, PathBuf},
};

use phalanx_proto::v1::{
    JournalRequest, StatusRequest, cluster_client::ClusterClient, inference_client::InferenceClient,
    leadership_client::LeadershipClient,
};
use phalanx_tests::{
    client::{Answer, generate, generate_over, get, greedy, metric},
    faults::etcd::Etcd,
    model_cache::{SMOLLM2, model},
    process::{Cluster, Process, wait_until},
};
use rcgen::{CertificateParams, DnType, Issuer, KeyPair, date_time_ymd};
use rustix::process::Signal;
use tonic::{
    Code, Request,
    transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity},
};

const PROMPT: [u32; 5] = [504, 3575, 282, 4649, 314];

/// Nobody counts as silent, however busy this machine is.
const PATIENT: [&str; 2] = ["--heartbeat-timeout-ms", "600000"];

/// A folder with what `coordinator certs init` makes.
struct Certificates(tempfile::TempDir);

impl Certificates {
    fn init() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let args = ["certs", "init", "--host", "phalanx.test", "--dir", dir.path().to_str().unwrap()];
        let mut made = Process::start("coordinator", &args.map(str::to_owned));
        assert!(made.wait().success(), "{}", made.log());
        Self(dir)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn read(&self, name: &str) -> Vec<u8> {
        fs::read(self.path(name)).unwrap()
    }

    /// Options of a process with this certificate, which trusts this authority.
    fn options(&self, name: &str) -> Vec<String> {
        options(&self.path("ca.pem"), &self.path(&format!("{name}.pem")), &self.path(&format!("{name}-key.pem")))
    }

    /// A shard's certificate of this authority that is no longer good.
    fn expired(&self) -> Vec<String> {
        let key = KeyPair::from_pem(&String::from_utf8(self.read("ca-key.pem")).unwrap()).unwrap();
        let mut authority = CertificateParams::default();
        authority.distinguished_name.push(DnType::CommonName, "Phalanx cluster authority");
        let issuer = Issuer::new(authority, key);
        let mut params = CertificateParams::default();
        (params.not_before, params.not_after) = (date_time_ymd(2020, 1, 1), date_time_ymd(2021, 1, 1));
        let own_key = KeyPair::generate().unwrap();
        let (certificate, key) = (self.path("old.pem"), self.path("old-key.pem"));
        fs::write(&certificate, params.signed_by(&own_key, &issuer).unwrap().pem()).unwrap();
        fs::write(&key, own_key.serialize_pem()).unwrap();
        options(&self.path("ca.pem"), &certificate, &key)
    }

    /// A connection of somebody who trusts the authority, with a certificate or without.
    async fn connect(&self, address: &str, identity: Option<&str>) -> Channel {
        let mut tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(self.read("ca.pem")));
        if let Some(name) = identity {
            let key = self.read(&format!("{name}-key.pem"));
            tls = tls.identity(Identity::from_pem(self.read(&format!("{name}.pem")), key));
        }
        let endpoint = Endpoint::from_shared(secure(address)).unwrap().tls_config(tls).unwrap();
        endpoint.connect().await.unwrap()
    }
}

fn options(ca: &Path, certificate: &Path, key: &Path) -> Vec<String> {
    let files = [("--cluster-ca", ca), ("--cluster-cert", certificate), ("--cluster-key", key)];
    files.iter().flat_map(|(flag, file)| [(*flag).to_owned(), file.display().to_string()]).collect()
}

fn secure(address: &str) -> String {
    address.replace("http://", "https://")
}

fn shard(coordinators: &str, name: &str, options: &[String]) -> Process {
    let args = ["--coordinator", coordinators, "--threads", "1", "--shard-id", name].map(str::to_owned);
    Process::start("shard", &[&args[..], options].concat())
}

async fn ask(channel: Channel) -> Answer {
    generate_over(channel, greedy(&PROMPT, 16)).await.unwrap().essence()
}

/// Copies what one folder has over another one's files, as a renewal does.
fn renew(ours: &Certificates, next: &Certificates) {
    for file in ["ca.pem", "coordinator-key.pem", "coordinator.pem", "shard-key.pem", "shard.pem"] {
        fs::write(ours.path(file), next.read(file)).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_are_renewed_while_the_cluster_serves() {
    let (ours, next) = (Certificates::init(), Certificates::init());
    let old = tempfile::tempdir().unwrap();
    fs::write(old.path().join("ca.pem"), ours.read("ca.pem")).unwrap();
    let state = tempfile::tempdir().unwrap();
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port().to_string();
    let start = || {
        let fixed = ["--local-shards", "0", "--tensor-parallel-size", "1", "--kv-cache-memory", "64MiB"];
        let mut args: Vec<String> = fixed.iter().chain(&PATIENT).map(|a| (*a).to_owned()).collect();
        // The same place again: the shard knows no other.
        args.extend(["--grpc-port".to_owned(), port.clone()]);
        args.extend(["--state-dir".to_owned(), state.path().display().to_string()]);
        args.extend(ours.options("coordinator"));
        Cluster::launch(&model(SMOLLM2), &args.iter().map(String::as_str).collect::<Vec<_>>())
    };
    let mut cluster = start();
    cluster.wait_listening();
    let shard = shard(&secure(&cluster.grpc), "east", &ours.options("shard"));
    cluster.wait_ready();
    let before = ours.connect(&cluster.grpc, None).await;
    let expected = ask(before.clone()).await;

    renew(&ours, &next);
    let trusting = async |ca: Vec<u8>| {
        let tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(ca));
        Endpoint::from_shared(secure(&cluster.grpc)).unwrap().tls_config(tls).unwrap().connect().await
    };
    let mut renewed = trusting(next.read("ca.pem")).await;
    while renewed.is_err() {
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        renewed = trusting(next.read("ca.pem")).await;
    }
    assert!(trusting(fs::read(old.path().join("ca.pem")).unwrap()).await.is_err(), "the old authority is gone");
    assert_eq!(ask(renewed.unwrap()).await, expected);
    assert_eq!(ask(before).await, expected, "a connection that was there goes on");
    assert_eq!(shard.log().matches("attached").count(), 1, "and so does the shard's: {}", shard.log());
    wait_until("the shard has read its files", || shard.log().contains("cluster certificate read again"));
    let counted = "phalanx_reloads_total{of=\"cluster certificate\"}";
    assert!(metric(&cluster.http, counted) >= 1.0);

    // A pair that does not fit is not taken.
    fs::write(ours.path("coordinator-key.pem"), ours.read("shard-key.pem")).unwrap();
    let failures = "phalanx_reload_failures_total{of=\"cluster certificate\"}";
    wait_until("the broken pair is seen", || metric(&cluster.http, failures) >= 1.0);
    assert_eq!(ask(trusting(next.read("ca.pem")).await.unwrap()).await, expected);
    fs::write(ours.path("coordinator-key.pem"), next.read("coordinator-key.pem")).unwrap();

    // The next connection of the shard is made with the new ones: the coordinator that it finds knows no others.
    cluster.process.signal(Signal::KILL);
    cluster.process.wait();
    let mut again = start();
    again.wait_ready();
    assert_eq!(ask(next.connect(&again.grpc, None).await).await, expected);
    drop(shard);
    assert!(again.interrupt().success());
}

#[tokio::test(flavor = "multi_thread")]
async fn only_who_has_a_certificate_joins() {
    let (ours, others) = (Certificates::init(), Certificates::init());
    let mut args = vec!["--local-shards", "1", "--tensor-parallel-size", "1", "--kv-cache-memory", "64MiB"];
    args.extend(PATIENT);
    let own = ours.options("coordinator");
    args.extend(own.iter().map(String::as_str));
    let mut cluster = Cluster::launch(&model(SMOLLM2), &args);
    cluster.wait_ready();

    // Clients need no certificate, but TLS.
    let expected = ask(ours.connect(&cluster.grpc, None).await).await;
    assert_eq!(ask(ours.connect(&cluster.grpc, Some("shard")).await).await, expected);
    assert!(generate(&cluster.grpc, greedy(&PROMPT, 4)).await.is_err(), "plain text");

    // Everything but inference is the cluster's own affair.
    let anybody = ours.connect(&cluster.grpc, None).await;
    let refusals = [
        ClusterClient::new(anybody.clone()).status(StatusRequest {}).await.err(),
        LeadershipClient::new(anybody.clone()).journal(JournalRequest::default()).await.err(),
        {
            let mut passed_on = Request::new(greedy(&PROMPT, 4));
            passed_on.metadata_mut().insert("x-phalanx-forwarded", "1".parse().unwrap());
            InferenceClient::new(anybody).generate(passed_on).await.err()
        },
    ];
    for refusal in refusals {
        let refusal = refusal.expect("it needs a certificate");
        assert_eq!(refusal.code(), Code::Unauthenticated, "{refusal}");
        assert!(refusal.message().contains("--cluster-ca"), "{refusal}");
    }
    let status = async || {
        let mut client = ClusterClient::new(ours.connect(&cluster.grpc, Some("coordinator")).await);
        client.status(StatusRequest {}).await.unwrap().into_inner()
    };
    assert!(status().await.members.iter().all(|m| m.shard_id == "local-0"));

    // Operators show a certificate too.
    let look = |address: &str, options: &[String]| {
        let args = ["cluster", "status", "--coordinator", address].map(str::to_owned);
        let mut looked = Process::start("coordinator", &[&args[..], options].concat());
        (looked.wait().success(), looked.log())
    };
    let (works, shown) = look(&secure(&cluster.grpc), &ours.options("shard"));
    assert!(works && shown.contains("local-0"), "{shown}");
    let (works, shown) = look(&cluster.grpc, &[]);
    assert!(!works && !shown.contains("local-0"), "{shown}");

    // Shards that may not join hear why.
    let url = secure(&cluster.grpc);
    let foreign = options(&ours.path("ca.pem"), &others.path("shard.pem"), &others.path("shard-key.pem"));
    let mut strangers = [
        (shard(&cluster.grpc, "plain", &[]), "the coordinator speaks TLS: give this process --cluster-ca"),
        (shard(&url, "other-authority", &others.options("shard")), "is not from the authority in --cluster-ca"),
        (shard(&url, "foreign", &foreign), "does not accept the certificate in --cluster-cert"),
        (shard(&url, "expired", &ours.expired()), "the certificate in --cluster-cert has expired"),
    ];
    for (stranger, reason) in &mut strangers {
        wait_until("the shard says why it can't join", || stranger.log().contains(*reason));
        assert!(stranger.ended().is_none(), "it goes on trying");
    }
    // Options that can't be right end it at once.
    let mut contradictory = shard(&url, "no-files", &[]);
    assert_eq!(contradictory.wait().code(), Some(2));
    assert!(contradictory.log().contains("needs --cluster-ca"), "{}", contradictory.log());
    let mut contradictory = shard(&cluster.grpc, "wrong-scheme", &ours.options("shard"));
    assert_eq!(contradictory.wait().code(), Some(2));
    assert!(contradictory.log().contains("want https://"), "{}", contradictory.log());

    // And the cluster goes on; who has a certificate joins it.
    assert_eq!(ask(ours.connect(&cluster.grpc, None).await).await, expected);
    let members = status().await.members;
    assert!(members.iter().all(|m| m.shard_id == "local-0"), "{members:?}");
    let friend = shard(&url, "friend", &ours.options("shard"));
    wait_until("the shard joins", || friend.log().contains("attached"));
    drop(strangers);
    assert!(cluster.interrupt().success());
}

#[tokio::test(flavor = "multi_thread")]
async fn coordinators_with_the_wrong_certificate_or_none_are_recognized() {
    let ours = Certificates::init();
    let mut cluster = Cluster::launch(&model(SMOLLM2), &["--local-shards", "0"]);
    cluster.wait_listening();
    let stranger = shard(&secure(&cluster.grpc), "secure", &ours.options("shard"));
    wait_until("the shard says why it can't join", || stranger.log().contains("the coordinator speaks plain text"));
    drop(stranger);
    assert!(cluster.interrupt().success());

    // The name that is dialled must be in the certificate.
    let own = ours.options("coordinator");
    let args: Vec<&str> =
        ["--local-shards", "0", "--host", "127.0.0.2"].into_iter().chain(own.iter().map(String::as_str)).collect();
    let mut elsewhere = Cluster::launch(&model(SMOLLM2), &args);
    elsewhere.wait_listening();
    let lost = shard(&secure(&elsewhere.grpc), "lost", &ours.options("shard"));
    wait_until("the shard says why it can't join", || lost.log().contains("does not name the host that was dialled"));
    drop(lost);
    assert!(elsewhere.interrupt().success());
}

#[tokio::test(flavor = "multi_thread")]
async fn coordinators_with_certificates_hand_over() {
    let ours = Certificates::init();
    let etcd = Etcd::start(1).unwrap();
    let url = etcd.url();
    let own = ours.options("coordinator");
    let mut args = vec!["--store", &url, "--local-shards", "0", "--tensor-parallel-size", "1"];
    args.extend(["--kv-cache-memory", "64MiB"]);
    args.extend(PATIENT);
    args.extend(own.iter().map(String::as_str));
    let mut first = Cluster::launch(&model(SMOLLM2), &args);
    first.wait_listening();
    wait_until("the first coordinator leads", || metric(&first.http, "phalanx_is_leader") == 1.0);
    let mut second = Cluster::launch(&model(SMOLLM2), &args);
    second.wait_listening();
    // The shard knows the one that leads; it learns of the other.
    let east = shard(&secure(&first.grpc), "east", &ours.options("shard"));
    first.wait_ready();
    wait_until("the second one follows", || second.process.log().contains("following"));
    wait_until("the second one is ready", || get(&format!("{}/ready", second.http)).is_ok_and(|a| a.status == 200));

    let expected = ask(ours.connect(&first.grpc, None).await).await;
    assert_eq!(ask(ours.connect(&second.grpc, None).await).await, expected, "passed on by the standby");
    let mut client = ClusterClient::new(ours.connect(&second.grpc, Some("coordinator")).await);
    let status = client.status(StatusRequest {}).await.unwrap().into_inner();
    assert_eq!((status.members.len(), status.coordinators.len()), (1, 2), "asked of the leader");

    first.process.signal(Signal::TERM);
    assert!(first.process.wait().success());
    second.wait_ready();
    assert_eq!(ask(ours.connect(&second.grpc, None).await).await, expected);
    assert!(first.process.log().contains("handing leadership over"), "{}", first.process.log());
    drop(east);
    assert!(second.interrupt().success());
}
