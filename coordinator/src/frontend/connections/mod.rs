//! The HTTP server's connections: thousands may be idle, and none may hold memory for long without taking or giving a byte.

pub mod progress;

use std::{
    future::Future,
    io::{self, ErrorKind, IoSlice},
    net::SocketAddr,
    pin::{Pin, pin},
    sync::Arc,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use axum::{
    Router,
    body::Body,
    extract::{ConnectInfo, Request},
};
use bytes::Bytes;
use http_body::{Frame, SizeHint};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use rustix::process::{Resource, getrlimit, setrlimit};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::{mpsc, watch},
    time::{sleep, sleep_until, timeout},
};
use tower::ServiceExt;

use self::progress::{Patience, Progress, Verdict};
use crate::security::tls::ServingTls;

/// Longest head of a request, and most bytes of an answer that wait in a connection.
const MOST_BUFFERED: usize = 64 << 10;
/// Longest wait for a TLS handshake.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);
/// Time for others to close their files when this process has too many.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

impl Patience {
    /// With this much for clients that read slowly.
    pub fn new(write: Duration) -> Self {
        // Load balancers keep connections for about a minute: they must be the ones who close them.
        Self { head: Duration::from_secs(30), idle: Duration::from_secs(600), write }
    }
}

/// Lets the process have as many files, which connections are, as its hard limit allows. Returns how many.
pub fn raise_file_limit() -> Option<u64> {
    let limit = getrlimit(Resource::Nofile);
    let raised = rustix::process::Rlimit { current: limit.maximum, maximum: limit.maximum };
    if limit.current != limit.maximum
        && let Err(error) = setrlimit(Resource::Nofile, raised)
    {
        tracing::warn!(%error, "the limit of open files stays as it is");
        return limit.current;
    }
    limit.maximum
}

/// Serves until `stopped`, then until all connections have ended: those that are idle at once.
pub async fn serve(
    listener: TcpListener,
    router: Router,
    patience: Patience,
    tls: Option<Arc<ServingTls>>,
    stopped: impl Future<Output = ()>,
) -> io::Result<()> {
    let (stop, stopping) = watch::channel(false);
    let (alive, mut all_gone) = mpsc::channel::<()>(1);
    let mut stopped = pin!(stopped);
    loop {
        let (stream, peer) = tokio::select! {
            accepted = accept(&listener) => accepted,
            () = &mut stopped => break,
        };
        let (router, stopping, alive) = (router.clone(), stopping.clone(), alive.clone());
        let tls = tls.clone();
        tokio::spawn(async move {
            welcome(stream, peer, router, patience, tls, stopping).await;
            drop(alive);
        });
    }
    drop((listener, alive, stopping));
    stop.send_replace(true);
    // Nothing is ever sent: it ends with the last connection.
    all_gone.recv().await;
    Ok(())
}

/// Waits for the next connection, whatever goes wrong with those before.
pub async fn accept(listener: &TcpListener) -> (TcpStream, SocketAddr) {
    loop {
        match listener.accept().await {
            Ok(accepted) => return accepted,
            // The client's business.
            Err(error)
                if matches!(
                    error.kind(),
                    ErrorKind::ConnectionAborted | ErrorKind::ConnectionReset | ErrorKind::ConnectionRefused
                ) => {}
            Err(error) => {
                tracing::warn!(%error, "no connection can be accepted");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Shakes hands, if the server speaks TLS, and serves.
async fn welcome(
    stream: TcpStream,
    peer: SocketAddr,
    router: Router,
    patience: Patience,
    tls: Option<Arc<ServingTls>>,
    mut stopping: watch::Receiver<bool>,
) {
    // A token is a small packet: it must not wait for the next one.
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "TCP_NODELAY");
    }
    let progress = Arc::new(Progress::new(Instant::now()));
    let stream = Watched { stream, progress: Arc::clone(&progress) };
    let Some(tls) = tls else { return connection(stream, peer, router, patience, progress, stopping).await };
    let shaken = tokio::select! {
        shaken = timeout(HANDSHAKE_LIMIT, tls.accept_http(stream)) => shaken,
        _ = stopping.changed() => return,
    };
    match shaken {
        Ok(Ok(stream)) => {
            // No request has begun with that.
            progress.answered(Instant::now());
            connection(stream, peer, router, patience, progress, stopping).await;
        }
        Ok(Err(error)) => tracing::debug!(%peer, %error, "no TLS connection"),
        Err(_) => tracing::debug!(%peer, "a TLS handshake takes too long"),
    }
}

async fn connection(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    peer: SocketAddr,
    router: Router,
    patience: Patience,
    progress: Arc<Progress>,
    mut stopping: watch::Receiver<bool>,
) {
    let socket = TokioIo::new(stream);
    let answering = Arc::clone(&progress);
    let service = service_fn(move |request: Request<Incoming>| {
        answering.begun();
        let answer = Answer { body: None, progress: Arc::clone(&answering) };
        let router = router.clone();
        let mut request = request.map(Body::new);
        request.extensions_mut().insert(ConnectInfo(peer));
        async move { router.oneshot(request).await.map(|r| r.map(|body| answer.with(body))) }
    });
    let http = http1::Builder::new().max_buf_size(MOST_BUFFERED).serve_connection(socket, service);
    let mut http = pin!(http);
    let mut is_stopping = false;
    let mut look_at = Instant::now() + patience.shortest();
    loop {
        tokio::select! {
            ended = http.as_mut() => {
                if let Err(error) = ended {
                    tracing::debug!(%peer, %error, "a connection broke");
                }
                return;
            }
            () = sleep_until(look_at.into()) => match progress.verdict(Instant::now(), &patience) {
                Verdict::Until(then) => look_at = then,
                Verdict::Cut(slow) => {
                    tracing::debug!(%peer, ?slow, "a connection is cut");
                    return;
                }
            },
            // An error means that the process is being torn down.
            _ = stopping.changed(), if !is_stopping => {
                is_stopping = true;
                http.as_mut().graceful_shutdown();
            }
        }
    }
}

/// An answer's body, which says when it is over.
struct Answer {
    body: Option<Body>,
    progress: Arc<Progress>,
}

impl Answer {
    fn with(mut self, body: Body) -> Self {
        self.body = Some(body);
        self
    }
}

impl http_body::Body for Answer {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Self::Data>, Self::Error>>> {
        match &mut self.body {
            Some(body) => Pin::new(body).poll_frame(context),
            None => Poll::Ready(None),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.as_ref().is_none_or(http_body::Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.body.as_ref().map(http_body::Body::size_hint).unwrap_or_default()
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        self.progress.answered(Instant::now());
    }
}

/// A socket that notes whether bytes move.
struct Watched {
    stream: TcpStream,
    progress: Arc<Progress>,
}

impl Watched {
    fn note<T>(&self, polled: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        match &polled {
            Poll::Ready(_) => self.progress.sent(),
            Poll::Pending => self.progress.blocked(Instant::now()),
        }
        polled
    }
}

impl AsyncRead for Watched {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let n_before = buffer.filled().len();
        let polled = Pin::new(&mut self.stream).poll_read(context, buffer);
        if buffer.filled().len() > n_before {
            self.progress.received(Instant::now());
        }
        polled
    }
}

impl AsyncWrite for Watched {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.note(polled)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.stream).poll_write_vectored(context, slices);
        self.note(polled)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests;
