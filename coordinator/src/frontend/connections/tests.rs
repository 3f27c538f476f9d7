use std::sync::atomic::{AtomicUsize, Ordering};

use axum::routing::get;
use futures::stream;
use serde_json::json;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    task::JoinHandle,
    time::timeout,
};

use super::*;
use crate::{
    frontend::tests::fake::Server,
    request::{Output, RequestEvent},
};

/// Idle connections of the test below, if the machine allows as many files.
const N_IDLE: usize = 2000;
/// Longest wait for what must happen.
const LIMIT: Duration = Duration::from_secs(60);

struct Running {
    address: SocketAddr,
    stop: watch::Sender<bool>,
    task: JoinHandle<io::Result<()>>,
}

async fn start(router: Router, patience: Patience) -> Running {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (stop, mut stopping) = watch::channel(false);
    let stopped = async move {
        let _gone = stopping.wait_for(|s| *s).await;
    };
    Running { address, stop, task: tokio::spawn(serve(listener, router, patience, None, stopped)) }
}

async fn read_until(stream: &mut TcpStream, what: &str) -> String {
    let mut all = Vec::new();
    timeout(LIMIT, async {
        while !String::from_utf8_lossy(&all).contains(what) {
            let n_read = stream.read_buf(&mut all).await.unwrap();
            assert!(n_read > 0, "{what}: {}", String::from_utf8_lossy(&all));
        }
    })
    .await
    .unwrap_or_else(|_| panic!("no {what}"));
    String::from_utf8(all).unwrap()
}

async fn is_closed(stream: &mut TcpStream) {
    let mut rest = Vec::new();
    // Either end of a connection that is cut may find it reset.
    let _closed_or_reset = timeout(LIMIT, stream.read_to_end(&mut rest)).await.expect("the server closes it");
}

#[tokio::test]
async fn thousands_of_idle_connections_are_borne() {
    let limit = raise_file_limit().unwrap_or(u64::MAX);
    // Both ends are in this process, and other tests need files too.
    let n_idle = N_IDLE.min(usize::try_from(limit / 4).unwrap_or(N_IDLE));
    let output = || Output { text: "word".to_owned(), token_ids: vec![5], ..Output::default() };
    let server = Server::with(move |_| Ok(vec![RequestEvent::Output(output())]));
    let running = start(server.router.clone(), Patience::new(LIMIT)).await;
    let mut reading = TcpStream::connect(running.address).await.unwrap();
    let body = json!({"prompt": "a", "stream": true}).to_string();
    let head = format!(
        "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    reading.write_all(format!("{head}{body}").as_bytes()).await.unwrap();
    read_until(&mut reading, "word").await;
    let mut idle = Vec::new();
    for _ in 0..n_idle {
        idle.push(TcpStream::connect(running.address).await.unwrap());
    }
    // The stream goes on, and each of them still gets an answer.
    server.tell(&RequestEvent::Output(output()));
    read_until(&mut reading, "word").await;
    for stream in idle.iter_mut().step_by(100) {
        stream.write_all(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
        assert!(read_until(stream, "ok").await.starts_with("HTTP/1.1 200"));
    }
    running.stop.send_replace(true);
    for stream in &mut idle {
        is_closed(stream).await;
    }
    assert!(!running.task.is_finished(), "the stream goes on");
    drop(reading);
    timeout(LIMIT, running.task).await.expect("all connections have ended").unwrap().unwrap();
}

#[tokio::test]
async fn a_head_that_does_not_end_is_cut() {
    let patience = Patience { head: Duration::from_millis(50), ..Patience::new(LIMIT) };
    let router = Router::new().route("/", get(async || "fine"));
    let running = start(router, patience).await;
    let mut slow = TcpStream::connect(running.address).await.unwrap();
    slow.write_all(b"GET / HTTP/1.1\r\nhost:").await.unwrap();
    is_closed(&mut slow).await;
    let mut idle = TcpStream::connect(running.address).await.unwrap();
    // Longer than a head may take.
    sleep(Duration::from_millis(200)).await;
    idle.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    read_until(&mut idle, "fine").await;
}

#[tokio::test]
async fn a_client_that_does_not_read_is_cut() {
    let n_made = Arc::new(AtomicUsize::new(0));
    let making = Arc::clone(&n_made);
    let endless = move || {
        let making = Arc::clone(&making);
        async move {
            let piece = move || {
                making.fetch_add(1, Ordering::SeqCst);
                Some(Ok::<_, io::Error>(Bytes::from(vec![b'x'; 1 << 16])))
            };
            Body::from_stream(stream::unfold(piece, async |piece| Some((piece()?, piece))))
        }
    };
    let patience = Patience { write: Duration::from_millis(50), ..Patience::new(LIMIT) };
    let running = start(Router::new().route("/", get(endless)), patience).await;
    let mut stream = TcpStream::connect(running.address).await.unwrap();
    stream.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    // It is being answered: from here on nothing is read.
    let mut one = [0];
    stream.read_exact(&mut one).await.unwrap();
    running.stop.send_replace(true);
    // It ends with its connection.
    timeout(LIMIT, running.task).await.expect("the connection is cut").unwrap().unwrap();
    assert!(n_made.load(Ordering::SeqCst) < 1 << 12, "what is not read is not made");
    drop(stream);
}
