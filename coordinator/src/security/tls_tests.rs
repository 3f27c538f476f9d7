//! Which certificate a connection sees, with real handshakes.

use std::{fs, path::Path};

use phalanx_cluster::tls::ClusterTls;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

use super::*;

struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    fn new(name: &str) -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, name);
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    /// Certificate and key, PEM.
    fn issue(&self, names: &[&str], is_server: bool) -> (String, String) {
        let names: Vec<String> = names.iter().map(|n| (*n).to_owned()).collect();
        let mut params = CertificateParams::new(names).unwrap();
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        if is_server {
            params.extended_key_usages.push(ExtendedKeyUsagePurpose::ServerAuth);
        }
        let key = KeyPair::generate().unwrap();
        (params.signed_by(&key, &self.0).unwrap().pem(), key.serialize_pem())
    }
}

fn write(path: &Path, text: &str) -> PathBuf {
    fs::write(path, text).unwrap();
    path.to_owned()
}

struct Files {
    folder: tempfile::TempDir,
    public: Authority,
    cluster: Authority,
}

impl Files {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        Self { folder, public: Authority::new("public"), cluster: Authority::new("cluster") }
    }

    fn for_clients(&self, client_ca: Option<&Authority>) -> SslFiles {
        let (certificate, key) = self.public.issue(&["api.example"], true);
        let path = |name: &str| self.folder.path().join(name);
        SslFiles {
            certificate: write(&path("ssl.pem"), &certificate),
            key: write(&path("ssl-key.pem"), &key),
            client_ca: client_ca.map(|ca| write(&path("ssl-ca.pem"), &ca.0.pem())),
        }
    }

    fn of_cluster(&self, is_server: bool) -> ClusterTls {
        let (certificate, key) = self.cluster.issue(&["head.lan"], is_server);
        let path = |name: &str| self.folder.path().join(name);
        let name = if is_server { "coordinator" } else { "shard" };
        let ca = write(&path("ca.pem"), &self.cluster.0.pem());
        let certificate = write(&path(&format!("{name}.pem")), &certificate);
        let key = write(&path(&format!("{name}-key.pem")), &key);
        ClusterTls::read(Some(ca), Some(certificate), Some(key)).unwrap().unwrap()
    }
}

/// A client that trusts one authority, and shows a certificate or none.
fn client(trusts: &Authority, shows: Option<(String, String)>) -> TlsConnector {
    let builder = ClientConfig::builder_with_provider(provider()).with_safe_default_protocol_versions().unwrap();
    let builder = builder.with_root_certificates(roots(trusts.0.pem().as_bytes()).unwrap());
    let config = match shows {
        Some((chain, own)) => builder
            .with_client_auth_cert(certificates(chain.as_bytes()).unwrap(), key(own.as_bytes()).unwrap())
            .unwrap(),
        None => builder.with_no_client_auth(),
    };
    TlsConnector::from(Arc::new(config))
}

fn name(name: &str) -> ServerName<'static> {
    ServerName::try_from(name.to_owned()).unwrap()
}

/// Shakes hands and sends a byte each way: in TLS 1.3 a client learns late that its certificate is not wanted.
async fn http(tls: &ServingTls, (connector, name): (TlsConnector, ServerName<'static>)) -> io::Result<()> {
    let (near, far) = tokio::io::duplex(1 << 16);
    let serve = async {
        let mut stream = tls.accept_http(far).await?;
        let said = stream.read_u8().await?;
        stream.write_u8(said).await
    };
    let (served, asked) = tokio::join!(serve, ask(connector, name, near));
    served.and(asked)
}

async fn grpc(tls: &ServingTls, (connector, name): (TlsConnector, ServerName<'static>)) -> io::Result<Side> {
    let (near, far) = tokio::io::duplex(1 << 16);
    let serve = async {
        let (mut stream, side) = tls.accept_grpc(far).await?;
        let said = stream.read_u8().await?;
        stream.write_u8(said).await.map(|()| side)
    };
    let (served, asked) = tokio::join!(serve, ask(connector, name, near));
    asked.and(served)
}

async fn ask(connector: TlsConnector, name: ServerName<'static>, near: DuplexStream) -> io::Result<()> {
    let mut stream = connector.connect(name, near).await?;
    stream.write_u8(7).await?;
    assert_eq!(stream.read_u8().await?, 7);
    Ok(())
}

#[tokio::test]
async fn names_choose_the_certificate() {
    let files = Files::new();
    let tls = ServingTls::start(Some(&files.for_clients(None)), Some(&files.of_cluster(true))).unwrap();
    let (public, cluster) = (|| client(&files.public, None), || client(&files.cluster, None));
    assert!(http(&tls, (public(), name("api.example"))).await.is_ok());
    assert_eq!(grpc(&tls, (public(), name("api.example"))).await.unwrap(), Side::Client);
    assert_eq!(grpc(&tls, (cluster(), name("head.lan"))).await.unwrap(), Side::Cluster(false));
    assert!(grpc(&tls, (cluster(), name("api.example"))).await.is_err());
    let member = files.cluster.issue(&[], false);
    assert_eq!(
        grpc(&tls, (client(&files.cluster, Some(member)), name("head.lan"))).await.unwrap(),
        Side::Cluster(true)
    );
    // What another authority has signed is none of the cluster's.
    let stranger = files.public.issue(&[], true);
    assert!(grpc(&tls, (client(&files.cluster, Some(stranger)), name("head.lan"))).await.is_err());
}

#[tokio::test]
async fn coordinators_know_each_other_under_any_name() {
    let files = Files::new();
    let (own, shard) = (files.of_cluster(true), files.of_cluster(false));
    let tls = ServingTls::start(Some(&files.for_clients(None)), Some(&own)).unwrap();
    assert!(http(&tls, to_coordinators(Some(&own)).unwrap()).await.is_ok());
    // A shard's certificate is no coordinator's.
    let forged = ServingTls::start(Some(&files.for_clients(None)), Some(&shard)).unwrap();
    assert!(http(&forged, to_coordinators(Some(&own)).unwrap()).await.is_err());
    let others = Files::new();
    assert!(http(&tls, to_coordinators(Some(&others.of_cluster(true))).unwrap()).await.is_err());
    // Without certificates of the cluster anybody is believed.
    let open = ServingTls::start(Some(&files.for_clients(None)), None).unwrap();
    assert!(http(&open, to_coordinators(None).unwrap()).await.is_ok());
}

#[tokio::test]
async fn clients_show_certificates_where_they_must() {
    let files = Files::new();
    let clients = Authority::new("clients");
    let tls = ServingTls::start(Some(&files.for_clients(Some(&clients))), Some(&files.of_cluster(true))).unwrap();
    let known = || client(&files.public, Some(clients.issue(&[], false)));
    assert!(http(&tls, (known(), name("api.example"))).await.is_ok());
    assert_eq!(grpc(&tls, (known(), name("api.example"))).await.unwrap(), Side::Client, "none of the cluster's");
    assert!(http(&tls, (client(&files.public, None), name("api.example"))).await.is_err());
    assert!(grpc(&tls, (client(&files.public, None), name("api.example"))).await.is_err());
    // Nor is there a way around by the cluster's names.
    assert!(grpc(&tls, (client(&files.cluster, None), name("head.lan"))).await.is_err());
    let (connector, internal) = (client(&files.cluster, None), name(COORDINATOR));
    assert!(http(&tls, (connector, internal)).await.is_err());
}

#[tokio::test]
async fn the_cluster_s_certificate_can_be_renewed() {
    let (files, next) = (Files::new(), Files::new());
    let tls = ServingTls::start(None, Some(&files.of_cluster(true))).unwrap();
    let known = |files: &Files| (client(&files.cluster, Some(files.cluster.issue(&[], false))), name("head.lan"));
    assert!(grpc(&tls, known(&files)).await.is_ok() && grpc(&tls, known(&next)).await.is_err());
    let renewed = next.of_cluster(true);
    let broken = ClusterTls { key: files.of_cluster(true).key, ..renewed.clone() };
    assert!(tls.prepare(&broken).is_err(), "they don't belong together");
    tls.renew(tls.prepare(&renewed).unwrap());
    assert!(grpc(&tls, known(&next)).await.is_ok() && grpc(&tls, known(&files)).await.is_err());
    // For a while both authorities may be in the file.
    let both = ClusterTls { ca: [&renewed.ca[..], b"\n", &files.of_cluster(true).ca].concat(), ..renewed };
    tls.renew(tls.prepare(&both).unwrap());
    let member = files.cluster.issue(&[], false);
    assert_eq!(grpc(&tls, (client(&next.cluster, Some(member)), name("head.lan"))).await.unwrap(), Side::Cluster(true));
}

#[tokio::test]
async fn a_renewed_certificate_is_shown_and_a_broken_one_is_not() {
    let files = Files::new();
    let config = files.for_clients(None);
    let contents = |certificate: &str, own: &str| vec![certificate.as_bytes().to_vec(), own.as_bytes().to_vec()];
    let tls = ServingTls::start(Some(&config), None).unwrap();
    let next = Authority::new("next");
    assert!(http(&tls, (client(&next, None), name("api.example"))).await.is_err());
    let (certificate, own) = next.issue(&["api.example"], true);
    let (_, other_key) = next.issue(&["api.example"], true);
    assert!(for_clients(&contents(&certificate, &other_key)).is_err(), "they don't belong together");
    assert!(for_clients(&contents("", &own)).is_err());
    write(&config.key, &own);
    write(&config.certificate, &certificate);
    let renewed = async {
        while http(&tls, (client(&next, None), name("api.example"))).await.is_err() {
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(std::time::Duration::from_secs(60), renewed).await.expect("files are watched");
}
