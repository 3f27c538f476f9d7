//! What every store must do, and a real etcd to check it with.

use std::{
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::Arc,
    time::Duration,
};

use futures::StreamExt;

use super::{
    Expected, MembershipStore, Revision, StoreError, Swap, TlsFiles, Watch, WatchEvent,
    election::{Attempt, Election},
};

/// Longest that a step of a test may take; reached by failing tests only.
const PATIENCE: Duration = Duration::from_secs(60);
/// The shortest that every store can do.
const SHORT_LEASE: Duration = Duration::from_secs(1);

/// The next event of a watch.
pub async fn next(watch: &mut Watch) -> WatchEvent {
    tokio::time::timeout(PATIENCE, watch.next())
        .await
        .expect("an event comes in time")
        .expect("the watch goes on")
        .expect("the watch is no error")
}

/// Calls until the store is back.
pub async fn retry<T>(mut call: impl AsyncFnMut() -> Result<T, StoreError>) -> T {
    let deadline = std::time::Instant::now() + PATIENCE;
    loop {
        match call().await {
            Ok(answer) => return answer,
            Err(e) => assert!(std::time::Instant::now() < deadline, "the store does not come back: {e}"),
        }
    }
}

fn put_value(event: &WatchEvent) -> (&str, &[u8]) {
    match event {
        WatchEvent::Put(record) => (&record.key, &record.value),
        other => panic!("want a put, got {other:?}"),
    }
}

/// Everything but what a store does when it forgets history.
pub async fn check(store: &dyn MembershipStore) {
    records(store).await;
    swaps(store).await;
    watches(store).await;
    leases(store).await;
}

async fn records(store: &dyn MembershipStore) {
    assert_eq!(store.get("r/a").await.unwrap(), None);
    let first = store.put("r/a", b"1".to_vec(), None).await.unwrap();
    let second = store.put("r/b", vec![0, 255, 128], None).await.unwrap();
    store.put("s/a", b"other".to_vec(), None).await.unwrap();
    assert!(second > first);

    let record = store.get("r/a").await.unwrap().unwrap();
    assert_eq!((record.key.as_str(), record.value.as_slice(), record.lease), ("r/a", &b"1"[..], None));
    assert_eq!(record.mod_revision, first);

    let listing = store.list("r/").await.unwrap();
    assert_eq!(listing.records.iter().map(|r| r.key.as_str()).collect::<Vec<_>>(), ["r/a", "r/b"]);
    assert_eq!(listing.records[1].value, [0, 255, 128]);
    assert!(listing.revision > second, "the listing is newer than what it lists");

    assert!(store.put("r/a", b"2".to_vec(), None).await.unwrap() > listing.revision);
    assert_eq!(store.get("r/a").await.unwrap().unwrap().value, b"2");
    assert!(store.delete("r/a").await.unwrap());
    assert!(!store.delete("r/a").await.unwrap());
    assert_eq!(store.get("r/a").await.unwrap(), None);
}

async fn swaps(store: &dyn MembershipStore) {
    let Swap::Done(first) = store.compare_and_swap("c", Expected::Absent, b"1".to_vec(), None).await.unwrap() else {
        panic!("the key was absent")
    };
    let Swap::Conflict(Some(found)) = store.compare_and_swap("c", Expected::Absent, b"x".to_vec(), None).await.unwrap()
    else {
        panic!("the key is there")
    };
    assert_eq!((found.value.as_slice(), found.mod_revision), (&b"1"[..], first));
    let done = store.compare_and_swap("c", Expected::found(Some(&found)), b"2".to_vec(), None).await.unwrap();
    assert!(matches!(done, Swap::Done(second) if second > first), "{done:?}");
    let late = store.compare_and_swap("c", Expected::Unchanged(first), b"x".to_vec(), None).await.unwrap();
    assert!(matches!(&late, Swap::Conflict(Some(r)) if r.value == b"2"), "{late:?}");
    store.delete("c").await.unwrap();
    let gone = store.compare_and_swap("c", Expected::Unchanged(first), b"x".to_vec(), None).await.unwrap();
    assert_eq!(gone, Swap::Conflict(None));

    // Of many at once exactly one wins each round.
    let round = async |round: u8| {
        let before = store.get("race").await.unwrap();
        let expected = Expected::found(before.as_ref());
        let tries = (0..8).map(|i| store.compare_and_swap("race", expected, vec![round, i], None));
        let won = futures::future::join_all(tries).await;
        won.into_iter().filter(|s| matches!(s, Ok(Swap::Done(_)))).count()
    };
    assert_eq!((round(0).await, round(1).await), (1, 1));
}

async fn watches(store: &dyn MembershipStore) {
    let start = store.list("w/").await.unwrap().revision;
    let mut live = store.watch("w/", start).await.unwrap();
    store.put("w/a", b"1".to_vec(), None).await.unwrap();
    store.put("v/a", b"not ours".to_vec(), None).await.unwrap();
    let second = store.put("w/a", b"2".to_vec(), None).await.unwrap();
    store.delete("w/a").await.unwrap();
    store.put("w/b", b"3".to_vec(), None).await.unwrap();

    assert_eq!(put_value(&next(&mut live).await), ("w/a", &b"1"[..]));
    assert_eq!(put_value(&next(&mut live).await), ("w/a", &b"2"[..]));
    let deleted = next(&mut live).await;
    assert!(matches!(&deleted, WatchEvent::Deleted { key, revision } if key == "w/a" && *revision > second));
    assert_eq!(put_value(&next(&mut live).await), ("w/b", &b"3"[..]));

    // Resumed in the middle: nothing twice, nothing missed.
    let mut resumed = store.watch("w/", second).await.unwrap();
    assert_eq!(next(&mut resumed).await, deleted);
    assert_eq!(put_value(&next(&mut resumed).await), ("w/b", &b"3"[..]));
    store.put("w/c", b"4".to_vec(), None).await.unwrap();
    assert_eq!(put_value(&next(&mut resumed).await), ("w/c", &b"4"[..]));
    assert_eq!(put_value(&next(&mut live).await), ("w/c", &b"4"[..]));
}

async fn leases(store: &dyn MembershipStore) {
    let start = store.list("l/").await.unwrap().revision;
    let mut watch = store.watch("l/", start).await.unwrap();
    let kept = store.grant_lease(PATIENCE).await.unwrap();
    let dying = store.grant_lease(SHORT_LEASE).await.unwrap();
    assert_ne!(kept, dying);
    store.put("l/kept", Vec::new(), Some(kept)).await.unwrap();
    store.put("l/dying", Vec::new(), Some(dying)).await.unwrap();
    assert_eq!(store.get("l/kept").await.unwrap().unwrap().lease, Some(kept));
    store.keep_alive(kept).await.unwrap();

    // Without a sign of life the record goes by itself.
    put_value(&next(&mut watch).await);
    put_value(&next(&mut watch).await);
    let gone = next(&mut watch).await;
    assert!(matches!(&gone, WatchEvent::Deleted { key, .. } if key == "l/dying"), "{gone:?}");
    assert_eq!(store.get("l/dying").await.unwrap(), None);
    let late = store.keep_alive(dying).await;
    assert!(matches!(late, Err(StoreError::LeaseEnded(l)) if l == dying), "{late:?}");
    let late = store.put("l/dying", Vec::new(), Some(dying)).await;
    assert!(matches!(late, Err(StoreError::LeaseEnded(l)) if l == dying), "{late:?}");
    store.revoke_lease(dying).await.unwrap();

    assert!(store.get("l/kept").await.unwrap().is_some());
    store.revoke_lease(kept).await.unwrap();
    let gone = next(&mut watch).await;
    assert!(matches!(&gone, WatchEvent::Deleted { key, .. } if key == "l/kept"), "{gone:?}");
}

/// What a watch from forgotten history begins with. `forget` makes the store forget up to a revision.
pub async fn check_resync(store: &dyn MembershipStore, forget: impl AsyncFnOnce(Revision)) {
    let old = store.put("f/a", b"1".to_vec(), None).await.unwrap();
    for i in 0..4 {
        store.put("f/b", vec![i], None).await.unwrap();
    }
    let last = store.put("f/c", b"3".to_vec(), None).await.unwrap();
    forget(last).await;
    let mut watch = store.watch("f/", old).await.unwrap();
    let WatchEvent::Resync(listing) = next(&mut watch).await else { panic!("history is gone") };
    let seen: Vec<_> = listing.records.iter().map(|r| (r.key.as_str(), r.value.as_slice())).collect();
    assert_eq!(seen, [("f/a", &b"1"[..]), ("f/b", &[3][..]), ("f/c", &b"3"[..])]);
    assert!(listing.revision >= last);
    store.delete("f/c").await.unwrap();
    let event = next(&mut watch).await;
    assert!(matches!(&event, WatchEvent::Deleted { key, .. } if key == "f/c"), "{event:?}");
}

/// Leaders follow each other with growing terms.
pub async fn check_election(store: &Arc<dyn MembershipStore>) {
    let election = Election::new(Arc::clone(store), "e/leader", SHORT_LEASE);
    let mut leaders = Box::pin(election.observe().await.unwrap());
    assert_eq!(leaders.next().await.unwrap().unwrap(), None);

    let first = election.campaign(b"one".to_vec()).await.unwrap();
    assert_eq!(leaders.next().await.unwrap().unwrap().unwrap().value, b"one");
    assert_eq!(election.leader().await.unwrap().unwrap().term, first.term());
    let waiting = tokio::spawn({
        let election = election.clone();
        async move { election.campaign(b"two".to_vec()).await }
    });
    first.keep_alive().await.unwrap();
    let first_term = first.term();
    first.resign().await.unwrap();
    let second = waiting.await.unwrap().unwrap();
    assert!(second.term() > first_term);
    assert_eq!(leaders.next().await.unwrap().unwrap(), None);
    assert_eq!(leaders.next().await.unwrap().unwrap().unwrap().value, b"two");

    // A leader that shows no sign of life loses to the next.
    let third = election.campaign(b"three".to_vec()).await.unwrap();
    assert!(third.term() > second.term());
    assert!(matches!(second.keep_alive().await, Err(StoreError::LeaseEnded(_))));

    // An attempt does not wait, and takes from a holder only in the term that it knows.
    third.keep_alive().await.unwrap();
    let Attempt::Held(Some(holder)) = election.attempt(b"four".to_vec(), Expected::Absent).await.unwrap() else {
        panic!("the key is held")
    };
    assert_eq!((holder.value.as_slice(), holder.term), (&b"three"[..], third.term()));
    let old = election.attempt(b"four".to_vec(), Expected::Unchanged(second.term())).await.unwrap();
    assert!(matches!(old, Attempt::Held(Some(h)) if h == holder));
    let taken = election.attempt(b"four".to_vec(), Expected::Unchanged(holder.term)).await.unwrap();
    let Attempt::Won(fourth) = taken else { panic!("the holder's term was known") };
    assert!(fourth.term() > third.term());
    // The end of the former holder's lease does not take the key with it.
    third.resign().await.unwrap();
    let (leader, revision) = election.look().await.unwrap();
    let leader = leader.unwrap();
    assert_eq!((leader.value.as_slice(), leader.term), (&b"four"[..], fourth.term()));
    assert!(revision >= fourth.term());
    let adopted = election.adopt(&leader).unwrap();
    adopted.keep_alive().await.unwrap();
    assert_eq!(adopted.term(), fourth.term());
    let mut changes = Box::pin(election.changes(revision).await.unwrap());
    adopted.resign().await.unwrap();
    assert!(matches!(changes.next().await.unwrap().unwrap(), (None, at) if at > revision));
}

/// A real etcd on free ports, gone when dropped.
pub struct EtcdServer {
    child: Child,
    ports: (u16, u16),
    dir: tempfile::TempDir,
    /// HOST:PORT of the client socket.
    pub endpoint: String,
}

impl EtcdServer {
    /// Starts it; installs Debian's package if it is missing and this is root.
    ///
    /// # Panics
    /// If there is no etcd and none can be installed; says what to install.
    pub fn start() -> Self {
        let free = || {
            let socket = TcpListener::bind("127.0.0.1:0").expect("a port is free");
            socket.local_addr().expect("it is bound").port()
        };
        let ports = (free(), free());
        let dir = tempfile::tempdir().expect("a temporary folder can be made");
        let child = launch(ports, dir.path().to_owned(), None);
        Self { child, ports, dir, endpoint: format!("127.0.0.1:{}", ports.0) }
    }

    /// As [`EtcdServer::start`], for clients with a certificate only. Returns what such a client needs.
    ///
    /// # Panics
    /// As [`EtcdServer::start`].
    pub fn start_with_tls() -> (Self, TlsFiles) {
        let mut server = Self::start();
        server.stop();
        let files = certificates(server.dir.path());
        // A new server: the old one's data say that it speaks plain text.
        match std::fs::remove_dir_all(server.dir.path().join("data")) {
            // It was stopped before it had any.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            removed => removed.expect("its data can be removed"),
        }
        server.child = launch(server.ports, server.dir.path().to_owned(), Some(&files));
        (server, files)
    }

    /// Kills it and starts it again on the same files and ports.
    pub fn restart(&mut self) {
        self.stop();
        self.child = launch(self.ports, self.dir.path().to_owned(), None);
    }

    fn stop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for EtcdServer {
    fn drop(&mut self) {
        self.stop();
    }
}

/// An authority and a certificate of 127.0.0.1, good for both ends.
fn certificates(dir: &Path) -> TlsFiles {
    use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
    let key = || KeyPair::generate().expect("a key can be made");
    let mut authority = CertificateParams::default();
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority = CertifiedIssuer::self_signed(authority, key()).expect("an authority can be made");
    let own_key = key();
    let own = CertificateParams::new(vec!["127.0.0.1".to_owned()]).expect("a name");
    let own = own.signed_by(&own_key, &authority).expect("a certificate can be signed");
    let write = |name: &str, text: String| {
        let path = dir.join(name);
        std::fs::write(&path, text).expect("the folder is writable");
        path
    };
    TlsFiles {
        ca: write("ca.pem", authority.pem()),
        identity: Some((write("own.pem", own.pem()), write("own-key.pem", own_key.serialize_pem()))),
    }
}

fn launch((client, peer): (u16, u16), dir: PathBuf, tls: Option<&TlsFiles>) -> Child {
    let scheme = if tls.is_some() { "https" } else { "http" };
    let (client, peer) = (format!("{scheme}://127.0.0.1:{client}"), format!("http://127.0.0.1:{peer}"));
    let mut command = Command::new(installed());
    if let Some(TlsFiles { ca, identity: Some((certificate, key)) }) = tls {
        command.arg("--client-cert-auth").arg("--trusted-ca-file").arg(ca);
        command.arg("--cert-file").arg(certificate).arg("--key-file").arg(key);
    }
    let mut child = command
        .args(["--name", "test", "--data-dir"])
        .arg(dir.join("data"))
        .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
        .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
        .args(["--initial-cluster", &format!("test={peer}")])
        // Kernels of shared machines sync slowly; this data is thrown away.
        .arg("--unsafe-no-fsync")
        .env_clear()
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("etcd starts");
    let deadline = std::time::Instant::now() + PATIENCE;
    let address = client.trim_start_matches(&format!("{scheme}://")).to_owned();
    while std::net::TcpStream::connect(&address).is_err() {
        assert!(std::time::Instant::now() < deadline, "etcd does not listen at {address}");
        let ended = child.try_wait().expect("the child is ours");
        assert!(ended.is_none(), "etcd ended at once: {ended:?}");
        std::thread::yield_now();
    }
    child
}

fn installed() -> PathBuf {
    let find = || {
        let paths = std::env::var_os("PATH").unwrap_or_default();
        std::env::split_paths(&paths).map(|p| p.join("etcd")).find(|p| p.is_file())
    };
    if let Some(etcd) = find() {
        return etcd;
    }
    let advice = "etcd is missing: install it with `apt-get install etcd-server`, or put etcd 3.4 or later in PATH";
    assert!(rustix::process::geteuid().is_root(), "{advice}");
    let apt = |args: &[&str]| {
        Command::new("apt-get")
            // Tests of other crates may be installing at the same time.
            .args(["-o", "DPkg::Lock::Timeout=300", "-y", "--no-install-recommends"])
            .args(args)
            .env("DEBIAN_FRONTEND", "noninteractive")
            // The package would start a server of its own.
            .env("RUNLEVEL", "1")
            .output()
    };
    let install = || apt(&["install", "etcd-server"]).is_ok_and(|o| o.status.success());
    if !install() {
        let _ = apt(&["update"]);
        let outcome = apt(&["install", "etcd-server"]);
        assert!(outcome.as_ref().is_ok_and(|o| o.status.success()), "{advice}; apt-get said: {outcome:?}");
    }
    find().expect(advice)
}
