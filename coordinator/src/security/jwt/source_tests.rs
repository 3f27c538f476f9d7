//! An issuer's address that changes its keys, goes away, and says what it should not.

use std::{
    io::{BufRead, BufReader, Write},
    net::{TcpListener, TcpStream},
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};

use super::*;

/// Never by itself: a test says when.
const AT_ONCE: Pace = Pace { refresh: Duration::from_secs(3600), least_pause: Duration::from_millis(1) };

/// Answers every connection with the same bytes, which may change.
struct Issuer {
    url: String,
    answer: Arc<Mutex<Vec<u8>>>,
    n_asked: Arc<AtomicUsize>,
}

impl Issuer {
    fn start(answer: Vec<u8>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/keys", listener.local_addr().unwrap());
        let (answer, n_asked) = (Arc::new(Mutex::new(answer)), Arc::new(AtomicUsize::new(0)));
        let (said, counted) = (Arc::clone(&answer), Arc::clone(&n_asked));
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let answer = said.lock().unwrap().clone();
                // Whoever hangs up early has heard enough.
                let _gone = reply(stream, &answer);
                counted.fetch_add(1, Ordering::SeqCst);
            }
        });
        Self { url, answer, n_asked }
    }

    fn says(&self, answer: Vec<u8>) {
        *self.answer.lock().unwrap() = answer;
    }

    /// Asks for a look, until one has heard the present answer.
    fn wait_heard(&self, refresher: &Refresher) {
        let before = self.n_asked.load(Ordering::SeqCst);
        // One may be under way that has the answer before; the second one after this has not.
        wait_until("it is asked again", || {
            refresher.ask();
            self.n_asked.load(Ordering::SeqCst) >= before + 3
        });
    }
}

fn reply(mut stream: TcpStream, answer: &[u8]) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut line = String::new();
    while reader.read_line(&mut line)? > 2 {
        line.clear();
    }
    stream.write_all(answer)
}

fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !condition() {
        assert!(begun.elapsed() < Duration::from_secs(120), "waited in vain until {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

fn http(status: &str, headers: &str, body: &[u8]) -> Vec<u8> {
    let length = body.len();
    let head = format!("HTTP/1.1 {status}\r\nconnection: close\r\ncontent-length: {length}\r\n{headers}\r\n");
    [head.as_bytes(), body].concat()
}

/// A set with one key of this name.
fn set(name: &str) -> Vec<u8> {
    let key = "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo";
    let text =
        format!("{{\"keys\": [{{\"kty\": \"OKP\", \"crv\": \"Ed25519\", \"kid\": \"{name}\", \"x\": \"{key}\"}}]}}");
    http("200 OK", "", text.as_bytes())
}

fn knows(keys: &RwLock<KeySet>, name: &str) -> bool {
    keys.read().unwrap().knows(Some(name))
}

#[test]
fn keys_are_those_that_the_issuer_has_now() {
    let issuer = Issuer::start(http("503 Service Unavailable", "", b""));
    let keys = Arc::new(RwLock::new(KeySet::default()));
    let refresher = follow_at(&issuer.url, Arc::clone(&keys), AT_ONCE).unwrap();
    issuer.wait_heard(&refresher);
    assert!(!knows(&keys, "first"), "it does not answer yet");
    issuer.says(set("first"));
    issuer.wait_heard(&refresher);
    assert!(knows(&keys, "first"));
    issuer.says(set("second"));
    issuer.wait_heard(&refresher);
    assert!(knows(&keys, "second") && !knows(&keys, "first"), "what the issuer has given up is given up");
}

#[test]
fn whatever_an_issuer_says_the_keys_before_stay_in_force() {
    let issuer = Issuer::start(set("good"));
    let keys = Arc::new(RwLock::new(KeySet::default()));
    let refresher = follow_at(&issuer.url, Arc::clone(&keys), AT_ONCE).unwrap();
    issuer.wait_heard(&refresher);
    let endless = format!("{{\"keys\": [], \"x\": \"{}\"}}", "a".repeat(MOST_BYTES as usize + 1));
    let deep = "[".repeat(100_000);
    let short = b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\nconnection: close\r\n\r\n{\"keys\": []}".to_vec();
    let to_itself = format!("location: {}\r\n", issuer.url);
    for hostile in [
        Vec::new(),
        b"\0\xff\xfe".to_vec(),
        http("200 OK", "", b""),
        http("200 OK", "", b"not JSON"),
        http("200 OK", "", b"\xff\xff"),
        http("200 OK", "", b"[]"),
        http("200 OK", "", b"{\"keys\": {}}"),
        http("200 OK", "", deep.as_bytes()),
        http("200 OK", "", endless.as_bytes()),
        http("404 Not Found", "", b"{\"keys\": []}"),
        http("302 Found", &to_itself, b""),
        short,
    ] {
        let shown = String::from_utf8_lossy(&hostile[..hostile.len().min(80)]).into_owned();
        issuer.says(hostile);
        issuer.wait_heard(&refresher);
        assert!(knows(&keys, "good"), "{shown:?}");
    }
    issuer.says(set("next"));
    issuer.wait_heard(&refresher);
    assert!(knows(&keys, "next"), "it goes on");
}

#[test]
fn nobody_there_is_no_reason_to_end() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/", listener.local_addr().unwrap());
    drop(listener);
    let keys = Arc::new(RwLock::new(KeySet::default()));
    assert!(follow_at(&url, keys, AT_ONCE).is_ok());
}
