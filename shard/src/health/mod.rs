//! The shard's own HTTP port, for probes and Prometheus: `--health-port`. It shows and changes nothing else.
//!
//! It is answered by the runtime that carries the link to the coordinator: a process in which that is stuck does not answer.

mod report;

use std::{net::SocketAddr, sync::Arc, time::Duration};

use axum::{
    Router,
    extract::State,
    response::{IntoResponse, Response},
    routing::get,
};
use http::{StatusCode, header};
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tokio::{net::TcpListener, sync::Semaphore, time};

pub use self::report::Shard;

/// Connections at the same time; others wait.
const MOST_CONNECTIONS: usize = 16;
/// Longest that a connection lasts: it is for one question.
const CONNECTION_LIMIT: Duration = Duration::from_secs(10);
/// Longest head of a request.
const HEAD_BYTES: usize = 16 << 10;
/// Pause where no connection can be accepted.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// Binds the port.
///
/// # Errors
/// If it is taken.
pub fn bind(address: SocketAddr) -> std::io::Result<TcpListener> {
    let listener = std::net::TcpListener::bind(address)?;
    listener.set_nonblocking(true)?;
    TcpListener::from_std(listener)
}

/// Answers for as long as the shard lives.
pub async fn serve(listener: TcpListener, shard: Shard) -> std::convert::Infallible {
    let router = router(Arc::new(shard));
    let free = Arc::new(Semaphore::new(MOST_CONNECTIONS));
    loop {
        let Ok(place) = Arc::clone(&free).acquire_owned().await else { return std::future::pending().await };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::debug!(%error, "no connection to the health port");
                time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let service = TowerToHyperService::new(router.clone());
        tokio::spawn(async move {
            let mut http = http1::Builder::new();
            http.keep_alive(false).max_buf_size(HEAD_BYTES).timer(TokioTimer::new());
            let served = http.serve_connection(TokioIo::new(stream), service);
            if let Ok(Err(error)) = time::timeout(CONNECTION_LIMIT, served).await {
                tracing::debug!(%error, "a connection to the health port broke");
            }
            drop(place);
        });
    }
}

fn router(shard: Arc<Shard>) -> Router {
    Router::new()
        .route("/livez", get(|| async { "alive\n" }))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics))
        .with_state(shard)
}

async fn readyz(State(shard): State<Arc<Shard>>) -> Response {
    match shard.readiness() {
        Ok(()) => "ready\n".into_response(),
        Err(reason) => (StatusCode::SERVICE_UNAVAILABLE, format!("{reason}\n")).into_response(),
    }
}

async fn metrics(State(shard): State<Arc<Shard>>) -> Response {
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], shard.metrics()).into_response()
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    /// An answer to a request, byte for byte.
    fn ask(address: SocketAddr, request: &str) -> String {
        let mut stream = std::net::TcpStream::connect(address).expect("it listens");
        stream.write_all(request.as_bytes()).expect("it reads");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("it answers and closes");
        answer
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn probes_are_answered_and_nothing_else_is() {
        let listener = bind(([127, 0, 0, 1], 0).into()).expect("a free port");
        let address = listener.local_addr().expect("it is bound");
        tokio::spawn(serve(listener, Shard::for_tests("east")));
        let asked = tokio::task::spawn_blocking(move || {
            // Whoever says nothing holds nobody up.
            let _silent: Vec<_> = (0..MOST_CONNECTIONS - 1).map(|_| std::net::TcpStream::connect(address)).collect();
            let get = |path: &str| ask(address, &format!("GET {path} HTTP/1.1\r\nhost: x\r\n\r\n"));
            assert!(get("/livez").starts_with("HTTP/1.1 200"), "{}", get("/livez"));
            let readyz = get("/readyz");
            assert!(readyz.starts_with("HTTP/1.1 503") && readyz.contains("no coordinator"), "{readyz}");
            let metrics = get("/metrics");
            assert!(metrics.contains("phalanx_shard_attached{shard=\"east\"} 0"), "{metrics}");
            assert!(get("/").starts_with("HTTP/1.1 404"));
            assert!(ask(address, "POST /livez HTTP/1.1\r\nhost: x\r\n\r\n").starts_with("HTTP/1.1 405"));
        });
        asked.await.expect("all is as it should be");
    }
}
