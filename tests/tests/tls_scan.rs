//! What a scan of the ports finds: TLS 1.2 and 1.3, nothing older, and no weak suite. Asked by OpenSSL's client, which shows
//! first that it could speak what must be refused.

use std::{
    path::Path,
    process::{Command, Stdio},
};

use phalanx_tests::{
    faults::{free_port, tools},
    golden,
    process::{Cluster, Process, wait_until},
    programs::address,
};
use rcgen::{CertificateParams, KeyPair};

/// Everything that OpenSSL has, also what nobody should use.
const ALL: &str = "ALL:@SECLEVEL=0";
/// TLS 1.2 without the suites that are any good.
const WEAK: &str = "ALL:COMPLEMENTOFALL:!AESGCM:!CHACHA20:@SECLEVEL=0";

/// Whether a server at `HOST:PORT` completes a handshake with a client of these options.
fn is_accepted(address: &str, version: &str, ciphers: &str) -> bool {
    let client = Command::new("openssl")
        .args(["s_client", "-connect", address, version, "-cipher", ciphers, "-brief"])
        .stdin(Stdio::null())
        .output()
        .expect("openssl was found");
    let said = String::from_utf8_lossy(&client.stderr).into_owned();
    let is_connected = said.contains("CONNECTION ESTABLISHED");
    assert_eq!(is_connected, client.status.success(), "{address} {version}: {said}");
    assert!(
        is_connected || said.contains("alert") || said.contains("handshake failure"),
        "{address} {version}: {said}"
    );
    is_connected
}

/// A server of OpenSSL that takes anything.
fn anything(dir: &Path) -> (Process, String) {
    let port = free_port().to_string();
    let mut command = Command::new("openssl");
    command.args(["s_server", "-accept", &port, "-cipher", ALL, "-no_tls1_3", "-quiet", "-cert"]);
    command.arg(dir.join("cert.pem")).arg("-key").arg(dir.join("key.pem"));
    let address = format!("127.0.0.1:{port}");
    let server = Process::run(command);
    wait_until("OpenSSL's server listens", || std::net::TcpStream::connect(&address).is_ok());
    (server, address)
}

fn check(address: &str) {
    for version in ["-tls1_2", "-tls1_3"] {
        assert!(is_accepted(address, version, ALL), "{address} refuses {version}");
    }
    for version in ["-tls1", "-tls1_1"] {
        assert!(!is_accepted(address, version, ALL), "{address} accepts {version}");
    }
    assert!(!is_accepted(address, "-tls1_2", WEAK), "{address} accepts a weak suite");
}

/// The same in the eyes of `sslscan`, which brings a TLS of its own.
fn scan(address: &str) {
    let Ok(sslscan) = tools::unpacked("sslscan", "sslscan") else {
        println!("sslscan is missing: only OpenSSL's client has asked");
        return;
    };
    let report = Command::new(sslscan).args(["--no-colour", address]).output().expect("it was found");
    let report = String::from_utf8_lossy(&report.stdout).into_owned();
    let state = |protocol: &str| {
        let line = report.lines().find_map(|line| line.strip_prefix(protocol));
        line.unwrap_or_else(|| panic!("{protocol}: {report}")).trim().to_owned()
    };
    let old = ["SSLv2", "SSLv3", "TLSv1.0", "TLSv1.1"].map(state);
    assert_eq!(old, ["disabled"; 4].map(str::to_owned), "{report}");
    assert_eq!(["TLSv1.2", "TLSv1.3"].map(state), ["enabled"; 2].map(str::to_owned), "{report}");
    let suites: Vec<_> = report.lines().filter(|l| l.starts_with("Accepted") || l.starts_with("Preferred")).collect();
    assert!(!suites.is_empty() && suites.iter().all(|s| s.contains("GCM") || s.contains("CHACHA20")), "{suites:#?}");
}

#[test]
fn only_tls_1_2_and_1_3_are_spoken() {
    if let Err(why) = tools::installed("openssl", "openssl") {
        println!("skipped: {why:#}");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    let key = KeyPair::generate().unwrap();
    let own = CertificateParams::new(vec!["localhost".to_owned()]).unwrap().self_signed(&key).unwrap();
    std::fs::write(path("cert.pem"), own.pem()).unwrap();
    std::fs::write(path("key.pem"), key.serialize_pem()).unwrap();
    let (server, anything) = anything(dir.path());
    for (version, ciphers) in [("-tls1", ALL), ("-tls1_1", ALL), ("-tls1_2", WEAK)] {
        assert!(is_accepted(&anything, version, ciphers), "this OpenSSL can't ask for {version}: {}", server.log());
    }
    drop(server);

    let public = ["--ssl-certfile", &path("cert.pem"), "--ssl-keyfile", &path("key.pem")].map(str::to_owned);
    let made = ["certs", "init", "--dir", &path("certs")].map(str::to_owned);
    assert!(Process::start("coordinator", &made).wait().success());
    let inner = [("--cluster-ca", "ca"), ("--cluster-cert", "coordinator"), ("--cluster-key", "coordinator-key")];
    let inner = inner.into_iter().flat_map(|(flag, file)| [flag.to_owned(), path(&format!("certs/{file}.pem"))]);
    // gRPC has the public certificate, or the cluster's.
    for options in [public.to_vec(), public.iter().cloned().chain(inner).collect()] {
        let common = ["--tensor-parallel-size", "1", "--kv-cache-memory", "32MiB"];
        let all: Vec<&str> = common.into_iter().chain(options.iter().map(String::as_str)).collect();
        let cluster = Cluster::start(&golden::tiny("llama"), &all);
        for address in [address(&cluster.http), address(&cluster.grpc)] {
            check(&address);
            scan(&address);
        }
        assert!(cluster.interrupt().success());
    }
}
