//! Connections to another coordinator's HTTP port.

use std::{
    io,
    pin::Pin,
    sync::{Arc, PoisonError, RwLock},
    task::{Context, Poll},
    time::Duration,
};

use futures::{FutureExt, future::BoxFuture};
use http::Uri;
use hyper_util::{
    client::legacy::connect::{Connected, Connection},
    rt::TokioIo,
};
use phalanx_cluster::tls::ClusterTls;
use rustls::pki_types::ServerName;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    time::timeout,
};
use tokio_rustls::TlsConnector;
use tower::Service;

use crate::security::tls::to_coordinators;

/// Longest wait for a connection to the leader.
const CONNECT_LIMIT: Duration = Duration::from_secs(2);

trait Io: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}

/// Connects to `http://` and `https://` addresses of coordinators.
#[derive(Clone)]
pub struct Connector(Arc<RwLock<Way>>);

/// How a connection is made.
#[derive(Clone)]
pub struct Way {
    tls: TlsConnector,
    name: ServerName<'static>,
}

impl Connector {
    /// With the cluster's certificates, if it has some.
    ///
    /// # Errors
    /// If they can't be used.
    pub fn new(cluster: Option<&ClusterTls>) -> anyhow::Result<Self> {
        Ok(Self(Arc::new(RwLock::new(Way::new(cluster)?))))
    }

    /// Connects this way from now on, as all clones do.
    pub fn renew(&self, way: Way) {
        // Replaced as a whole.
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = way;
    }

    fn way(&self) -> Way {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Way {
    /// With the cluster's certificates, if it has some.
    ///
    /// # Errors
    /// If they can't be used.
    pub fn new(cluster: Option<&ClusterTls>) -> anyhow::Result<Self> {
        let (tls, name) = to_coordinators(cluster)?;
        Ok(Self { tls, name })
    }

    async fn connect(self, uri: Uri) -> io::Result<Line> {
        let authority = uri.authority().ok_or_else(|| io::Error::other(format!("{uri} names no host")))?;
        let stream = TcpStream::connect(authority.as_str()).await?;
        stream.set_nodelay(true)?;
        let io: Box<dyn Io> = match uri.scheme_str() {
            Some("https") => Box::new(self.tls.connect(self.name, stream).await?),
            _ => Box::new(stream),
        };
        Ok(Line(TokioIo::new(io)))
    }
}

impl Service<Uri> for Connector {
    type Response = Line;
    type Error = io::Error;
    type Future = BoxFuture<'static, io::Result<Line>>;

    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let connecting = timeout(CONNECT_LIMIT, self.way().connect(uri));
        async { connecting.await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))? }.boxed()
    }
}

/// A connection.
pub struct Line(TokioIo<Box<dyn Io>>);

impl Connection for Line {
    fn connected(&self) -> Connected {
        Connected::new()
    }
}

impl hyper::rt::Read for Line {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: hyper::rt::ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(context, buffer)
    }
}

impl hyper::rt::Write for Line {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(context)
    }
}
