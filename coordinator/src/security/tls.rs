//! TLS: what clients are shown, what the cluster is shown, and which of both a connection asks for.
//!
//! A connection says in its first message which name it wants. Names of the cluster's certificate, and none (an address),
//! are answered with that; all others with the certificate for clients, if there is one. So both can be on one port, and a
//! client's certificate is never taken for one of the cluster. All of them may be renewed while the process runs.

use std::{
    io,
    path::PathBuf,
    sync::{Arc, PoisonError, RwLock},
};

use anyhow::Context;
use phalanx_cluster::{tls::ClusterTls, watched::Watched};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, ServerConfig, SignatureScheme,
    client::{
        WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
        verify_server_name,
    },
    crypto::CryptoProvider,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime, pem::PemObject},
    server::{ParsedCertificate, WebPkiClientVerifier},
    version::{TLS12, TLS13},
};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::{LazyConfigAcceptor, TlsConnector, server::TlsStream};

use crate::metrics::count_reload;

/// What its files are called in logs and metrics.
pub(super) const CERTIFICATE: &str = "TLS certificate";
/// The name that a coordinator asks for on another one's HTTP port.
const COORDINATOR: &str = "coordinator.phalanx.internal";
/// Protocols of the ports.
const HTTP_1: &[u8] = b"http/1.1";
const HTTP_2: &[u8] = b"h2";

/// Files of the certificate for clients.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SslFiles {
    /// The certificate, and those between it and its authority; PEM.
    pub certificate: PathBuf,
    /// Its key; PEM.
    pub key: PathBuf,
    /// Authorities of clients' certificates: then clients must show one; PEM.
    pub client_ca: Option<PathBuf>,
}

/// Whom a connection is with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// A client, whatever certificate it has shown.
    Client,
    /// Whoever speaks plain text.
    Plain,
    /// Somebody who knows the cluster's authority, and has shown a certificate of it (`true`) or none.
    Cluster(bool),
}

/// A side's certificate, for both protocols.
#[derive(Clone)]
struct Shown {
    http: Arc<ServerConfig>,
    grpc: Arc<ServerConfig>,
}

impl Shown {
    fn new(config: ServerConfig) -> Self {
        let with = |protocol: &[u8]| {
            let mut config = config.clone();
            config.alpn_protocols = vec![protocol.to_vec()];
            Arc::new(config)
        };
        Self { http: with(HTTP_1), grpc: with(HTTP_2) }
    }
}

/// The cluster's certificate, ready to be shown.
#[derive(Clone)]
pub struct Cluster {
    shown: Shown,
    certificate: CertificateDer<'static>,
}

/// Everything that is shown.
pub struct ServingTls {
    clients: Option<RwLock<Shown>>,
    cluster: Option<RwLock<Cluster>>,
    /// Whether whoever asks for the cluster's name must show a certificate.
    is_demanding: bool,
}

impl ServingTls {
    /// Reads the files; those for clients are watched from now on.
    ///
    /// # Errors
    /// If they can't be used.
    pub fn start(files: Option<&SslFiles>, cluster: Option<&ClusterTls>) -> anyhow::Result<Arc<Self>> {
        // Where clients need certificates, nobody is let past that by the cluster's name.
        let is_demanding = files.is_some_and(|files| files.client_ca.is_some());
        let cluster = cluster.map(|tls| Cluster::new(tls, is_demanding)).transpose()?.map(RwLock::new);
        let Some(files) = files else {
            return Ok(Arc::new(Self { clients: None, cluster, is_demanding }));
        };
        let mut paths = vec![files.certificate.clone(), files.key.clone()];
        paths.extend(files.client_ca.clone());
        let watched = Watched::open(CERTIFICATE, paths).context("--ssl-certfile, --ssl-keyfile, --ssl-ca-certs")?;
        let watched = watched.counted(count_reload);
        let shown = for_clients(watched.contents()).with_context(|| {
            format!("--ssl-certfile {}, its --ssl-keyfile or --ssl-ca-certs", files.certificate.display())
        })?;
        let tls = Arc::new(Self { clients: Some(RwLock::new(shown)), cluster, is_demanding });
        let shared = Arc::clone(&tls);
        let take = move |contents: &[Vec<u8>]| {
            let shown = for_clients(contents).map_err(|e| format!("{e:#}"))?;
            if let Some(clients) = &shared.clients {
                // Replaced as a whole.
                *clients.write().unwrap_or_else(PoisonError::into_inner) = shown;
            }
            Ok(())
        };
        watched.watch(take).context("no thread watches --ssl-certfile")?;
        Ok(tls)
    }

    /// Whether clients are shown a certificate: then HTTP speaks TLS, and gRPC does so with them.
    pub fn is_for_clients(&self) -> bool {
        self.clients.is_some()
    }

    /// Whether gRPC speaks nothing but TLS.
    pub fn is_for_cluster(&self) -> bool {
        self.cluster.is_some()
    }

    /// What would be shown with these certificates of the cluster.
    ///
    /// # Errors
    /// If they can't be used.
    pub fn prepare(&self, cluster: &ClusterTls) -> anyhow::Result<Cluster> {
        Cluster::new(cluster, self.is_demanding)
    }

    /// Shows this from now on: connections that are there go on with what they were shown.
    pub fn renew(&self, renewed: Cluster) {
        if let Some(cluster) = &self.cluster {
            // Replaced as a whole.
            *cluster.write().unwrap_or_else(PoisonError::into_inner) = renewed;
        }
    }

    fn cluster(&self) -> Option<Cluster> {
        let cluster = self.cluster.as_ref()?;
        Some(cluster.read().unwrap_or_else(PoisonError::into_inner).clone())
    }

    fn clients(&self) -> Option<Shown> {
        let clients = self.clients.as_ref()?;
        Some(clients.read().unwrap_or_else(PoisonError::into_inner).clone())
    }

    /// Shakes hands on the HTTP port.
    ///
    /// # Errors
    /// If the other side wants what we don't have, or shows what we don't trust.
    pub async fn accept_http<S: AsyncRead + AsyncWrite + Unpin>(&self, stream: S) -> io::Result<TlsStream<S>> {
        let hello = LazyConfigAcceptor::new(rustls::server::Acceptor::default(), stream).await?;
        let wants_cluster = hello.client_hello().server_name() == Some(COORDINATOR);
        let cluster = self.cluster().filter(|_| wants_cluster).map(|cluster| cluster.shown);
        let shown = cluster.or_else(|| self.clients()).ok_or_else(|| io::Error::other("no certificate to show"))?;
        hello.into_stream(shown.http).await
    }

    /// Shakes hands on the gRPC port.
    ///
    /// # Errors
    /// If the other side wants what we don't have, or shows what we don't trust.
    pub async fn accept_grpc<S: AsyncRead + AsyncWrite + Unpin>(&self, stream: S) -> io::Result<(TlsStream<S>, Side)> {
        let hello = LazyConfigAcceptor::new(rustls::server::Acceptor::default(), stream).await?;
        let cluster = self.cluster().filter(|c| c.is_meant(hello.client_hello().server_name()));
        let (shown, is_cluster) = match (cluster, self.clients()) {
            (Some(cluster), _) => (cluster.shown, true),
            (None, Some(clients)) => (clients, false),
            (None, None) => match self.cluster() {
                Some(cluster) => (cluster.shown, true),
                None => return Err(io::Error::other("no certificate to show")),
            },
        };
        let stream = hello.into_stream(shown.grpc).await?;
        let has_shown = stream.get_ref().1.peer_certificates().is_some_and(|shown| !shown.is_empty());
        Ok((stream, if is_cluster { Side::Cluster(has_shown) } else { Side::Client }))
    }
}

impl Cluster {
    fn new(tls: &ClusterTls, is_demanding: bool) -> anyhow::Result<Self> {
        let read = || -> anyhow::Result<Self> {
            let chain = certificates(&tls.certificate)?;
            let certificate = chain.first().cloned().context("no certificate")?;
            let roots = Arc::new(roots(&tls.ca)?);
            let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider());
            let verifier = if is_demanding { verifier } else { verifier.allow_unauthenticated() };
            let builder = ServerConfig::builder_with_provider(provider()).with_protocol_versions(&[&TLS13, &TLS12])?;
            let builder = builder.with_client_cert_verifier(verifier.build()?);
            Ok(Self { shown: Shown::new(builder.with_single_cert(chain, key(&tls.key)?)?), certificate })
        };
        read().map_err(|e| tls.unusable(format!("{e:#}")).into())
    }

    /// Whether a name, or the lack of one, asks for the cluster's certificate.
    fn is_meant(&self, name: Option<&str>) -> bool {
        let Some(name) = name else { return true };
        let Ok(name) = ServerName::try_from(name) else { return false };
        ParsedCertificate::try_from(&self.certificate).is_ok_and(|own| verify_server_name(&own, &name).is_ok())
    }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// Of certificate, key and perhaps authorities of clients, as they lie in their files.
fn for_clients(contents: &[Vec<u8>]) -> anyhow::Result<Shown> {
    let [certificate, own_key, rest @ ..] = contents else { anyhow::bail!("certificate or key is missing") };
    let builder = ServerConfig::builder_with_provider(provider()).with_protocol_versions(&[&TLS13, &TLS12])?;
    let builder = match rest.first() {
        Some(ca) => {
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots(ca)?), provider());
            builder.with_client_cert_verifier(verifier.build()?)
        }
        None => builder.with_no_client_auth(),
    };
    Ok(Shown::new(builder.with_single_cert(certificates(certificate)?, key(own_key)?)?))
}

fn certificates(pem: &[u8]) -> anyhow::Result<Vec<CertificateDer<'static>>> {
    let chain: Vec<_> = CertificateDer::pem_slice_iter(pem).collect::<Result<_, _>>()?;
    anyhow::ensure!(!chain.is_empty(), "there is no PEM block CERTIFICATE");
    Ok(chain)
}

fn key(pem: &[u8]) -> anyhow::Result<PrivateKeyDer<'static>> {
    PrivateKeyDer::from_pem_slice(pem).context("there is no PEM block PRIVATE KEY")
}

fn roots(pem: &[u8]) -> anyhow::Result<RootCertStore> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(pem)? {
        roots.add(certificate)?;
    }
    Ok(roots)
}

/// How one coordinator reaches another one's HTTP port: with the cluster's certificates on both sides, or, where there are
/// none, without knowing whom it talks to, as everything else between them does then.
///
/// # Errors
/// If the certificates can't be used.
pub fn to_coordinators(cluster: Option<&ClusterTls>) -> anyhow::Result<(TlsConnector, ServerName<'static>)> {
    let builder = ClientConfig::builder_with_provider(provider()).with_protocol_versions(&[&TLS13, &TLS12])?;
    let trusted = match cluster {
        Some(tls) => {
            let roots = Arc::new(roots(&tls.ca)?);
            Some(WebPkiServerVerifier::builder_with_provider(roots, provider()).build()?)
        }
        None => None,
    };
    let verifier = Arc::new(AnyCoordinator { trusted, provider: provider() });
    let builder = builder.dangerous().with_custom_certificate_verifier(verifier);
    let mut config = match cluster {
        Some(tls) => builder.with_client_auth_cert(certificates(&tls.certificate)?, key(&tls.key)?)?,
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = vec![HTTP_1.to_vec()];
    Ok((TlsConnector::from(Arc::new(config)), ServerName::try_from(COORDINATOR)?))
}

/// Trusts whoever has a coordinator's certificate of the cluster's authority, under whatever name it is reached. Shards'
/// certificates are none for servers. Without an authority it trusts everybody.
#[derive(Debug)]
struct AnyCoordinator {
    trusted: Option<Arc<WebPkiServerVerifier>>,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for AnyCoordinator {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let Some(trusted) = &self.trusted else { return Ok(ServerCertVerified::assertion()) };
        match trusted.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now) {
            // The name is looked at last: everything else was right.
            Err(rustls::Error::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            )) => Ok(ServerCertVerified::assertion()),
            verdict => verdict,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, cert, dss, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, cert, dss, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
#[path = "tls_tests.rs"]
mod tests;
