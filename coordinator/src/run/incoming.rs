//! Connections to the gRPC port: plain ones and TLS, whichever the process is for.

use std::{
    io::{self, IoSlice},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use axum::{body::Body, extract::Request, middleware::Next, response::Response};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::mpsc,
    time::timeout,
};
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::{Connected, TcpConnectInfo};

use crate::{
    frontend::{connections::accept, door},
    security::tls::{ServingTls, Side},
};

/// Longest wait for a TLS handshake.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);
/// Connections that wait to be served.
const QUEUE: usize = 64;
/// First byte of a connection that speaks TLS.
const HANDSHAKE: u8 = 0x16;

/// A connection.
pub struct Arrived {
    stream: Stream,
    side: Side,
}

enum Stream {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

/// What is known of the connection that a call comes over.
#[derive(Debug, Clone)]
pub struct Caller {
    tcp: TcpConnectInfo,
    /// Whom it is with.
    pub side: Side,
}

/// Accepts connections until the receiver is gone.
pub fn incoming(listener: TcpListener, tls: Arc<ServingTls>) -> ReceiverStream<io::Result<Arrived>> {
    let (ready, arrived) = mpsc::channel(QUEUE);
    tokio::spawn(async move {
        loop {
            let (stream, peer) = tokio::select! {
                accepted = accept(&listener) => accepted,
                () = ready.closed() => return,
            };
            let (tls, ready) = (Arc::clone(&tls), ready.clone());
            // Whoever is slow to shake hands holds nobody else up.
            tokio::spawn(async move {
                if let Err(error) = stream.set_nodelay(true) {
                    tracing::debug!(%error, "TCP_NODELAY");
                }
                match timeout(HANDSHAKE_LIMIT, shake_hands(stream, &tls)).await {
                    // The server has ended: the connection ends too.
                    Ok(Ok(connection)) => drop(ready.send(Ok(connection)).await),
                    Ok(Err(error)) => tracing::debug!(%peer, %error, "no connection"),
                    Err(_) => tracing::debug!(%peer, "the handshake takes too long"),
                }
            });
        }
    });
    ReceiverStream::new(arrived)
}

async fn shake_hands(stream: TcpStream, tls: &ServingTls) -> io::Result<Arrived> {
    let is_plain = match (tls.is_for_cluster(), tls.is_for_clients()) {
        (false, false) => true,
        (true, _) => false,
        // Shards without certificates speak plain text, clients are asked for TLS.
        (false, true) => {
            let mut first = [0];
            stream.peek(&mut first).await? == 1 && first[0] != HANDSHAKE
        }
    };
    if is_plain {
        return Ok(Arrived { stream: Stream::Plain(stream), side: Side::Plain });
    }
    let (stream, side) = tls.accept_grpc(stream).await?;
    Ok(Arrived { stream: Stream::Tls(Box::new(stream)), side })
}

/// Tells those behind it what tonic would tell of its own connections.
pub async fn introduce(mut request: Request<Body>, next: Next) -> Response {
    if let Some(caller) = request.extensions().get::<Caller>() {
        let tcp = caller.tcp.clone();
        door::introduce(request.headers_mut(), tcp.remote_addr);
        request.extensions_mut().insert(tcp);
    }
    next.run(request).await
}

impl Connected for Arrived {
    type ConnectInfo = Caller;

    fn connect_info(&self) -> Caller {
        let tcp = match &self.stream {
            Stream::Plain(stream) => stream.connect_info(),
            Stream::Tls(stream) => stream.get_ref().0.connect_info(),
        };
        Caller { tcp, side: self.side }
    }
}

impl AsyncRead for Arrived {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().stream {
            Stream::Plain(stream) => Pin::new(stream).poll_read(context, buffer),
            Stream::Tls(stream) => Pin::new(stream).poll_read(context, buffer),
        }
    }
}

impl AsyncWrite for Arrived {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match &mut self.get_mut().stream {
            Stream::Plain(stream) => Pin::new(stream).poll_write(context, bytes),
            Stream::Tls(stream) => Pin::new(stream).poll_write(context, bytes),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match &mut self.get_mut().stream {
            Stream::Plain(stream) => Pin::new(stream).poll_write_vectored(context, slices),
            Stream::Tls(stream) => Pin::new(stream).poll_write_vectored(context, slices),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match &self.stream {
            Stream::Plain(stream) => stream.is_write_vectored(),
            Stream::Tls(stream) => stream.is_write_vectored(),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().stream {
            Stream::Plain(stream) => Pin::new(stream).poll_flush(context),
            Stream::Tls(stream) => Pin::new(stream).poll_flush(context),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().stream {
            Stream::Plain(stream) => Pin::new(stream).poll_shutdown(context),
            Stream::Tls(stream) => Pin::new(stream).poll_shutdown(context),
        }
    }
}
