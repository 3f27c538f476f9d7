//! How messages get to a collector: over HTTP, or over gRPC.

use std::{fs, io};

use phalanx_cluster::{error_text::with_causes, web};
use prost::Message;
use tokio::runtime::Runtime;
use tonic::{
    codegen::http::uri::PathAndQuery,
    metadata::{KeyAndValueRef, MetadataMap},
    transport::{Certificate, Channel, ClientTlsConfig, Endpoint},
};
use tonic_prost::ProstCodec;

use super::{
    destination::{Destination, Protocol},
    otlp::{Accepted, Export},
};

/// The call, of `opentelemetry/proto/collector/trace/v1/trace_service.proto`.
const CALL: &str = "/opentelemetry.proto.collector.trace.v1.TraceService/Export";
/// How a certificate begins in a PEM file.
const CERTIFICATE: &[u8] = b"-----BEGIN CERTIFICATE-----";
/// Longest answer that is read.
const MOST_ANSWERED: u64 = 64 << 10;

/// Gets messages to a collector. Waits no longer than the destination allows.
pub trait Carrier: Send {
    /// Sends a message. How many spans the collector refused, and why.
    ///
    /// # Errors
    /// If it has not come, or was refused as a whole.
    fn carry(&mut self, message: Export) -> Result<Accepted, String>;
}

/// For a destination.
///
/// # Errors
/// If its file of authorities can't be used.
pub fn to(destination: &Destination) -> io::Result<Box<dyn Carrier>> {
    let authorities = match &destination.authorities {
        Some(file) => {
            let named = |e: io::Error| io::Error::new(e.kind(), format!("{}: {e}", file.display()));
            let pem = fs::read(file).map_err(named)?;
            let has_one = pem.windows(CERTIFICATE.len()).any(|window| window == CERTIFICATE);
            Some(has_one.then_some(pem).ok_or_else(|| named(io::Error::other("has no PEM block CERTIFICATE")))?)
        }
        None => None,
    };
    Ok(match destination.protocol {
        Protocol::Http => Box::new(OverHttp::new(destination, authorities.as_deref())),
        Protocol::Grpc => Box::new(OverGrpc::new(destination, authorities.as_deref())?),
    })
}

struct OverHttp {
    agent: ureq::Agent,
    destination: Destination,
}

impl OverHttp {
    fn new(destination: &Destination, authorities: Option<&[u8]>) -> Self {
        let config = web::agent().timeout_global(Some(destination.limit));
        let config = match authorities {
            Some(pem) => {
                let all: Vec<_> = ureq::tls::parse_pem(pem)
                    .filter_map(|item| match item {
                        Ok(ureq::tls::PemItem::Certificate(certificate)) => Some(certificate),
                        _ => None,
                    })
                    .collect();
                let roots = ureq::tls::RootCerts::new_with_certs(&all);
                config.tls_config(ureq::tls::TlsConfig::builder().root_certs(roots).build())
            }
            None => config,
        };
        Self { agent: config.build().new_agent(), destination: destination.clone() }
    }
}

impl Carrier for OverHttp {
    fn carry(&mut self, message: Export) -> Result<Accepted, String> {
        let mut request = self.agent.post(&self.destination.url).header("content-type", "application/x-protobuf");
        for (name, value) in &self.destination.headers {
            request = request.header(name, value);
        }
        let mut answer = request.send(&message.encode_to_vec()[..]).map_err(|e| e.to_string())?;
        let body = answer.body_mut().with_config().limit(MOST_ANSWERED).read_to_vec();
        // It was taken. Collectors that say nothing, or something else, have taken all of it.
        Ok(body.ok().and_then(|body| Accepted::decode(&body[..]).ok()).unwrap_or_default())
    }
}

struct OverGrpc {
    /// Of the thread that sends: nobody else has to do with it. There is one until this is dropped.
    runtime: Option<Runtime>,
    channel: Channel,
    headers: MetadataMap,
    destination: Destination,
}

impl OverGrpc {
    fn new(destination: &Destination, authorities: Option<&[u8]>) -> io::Result<Self> {
        let mut endpoint = Endpoint::from_shared(destination.url.clone()).map_err(io::Error::other)?;
        endpoint = endpoint.connect_timeout(destination.limit).timeout(destination.limit);
        if destination.url.starts_with("https://") {
            let tls = ClientTlsConfig::new();
            let tls = match authorities {
                Some(pem) => tls.ca_certificate(Certificate::from_pem(pem)),
                None => tls.with_native_roots(),
            };
            endpoint = endpoint.tls_config(tls).map_err(io::Error::other)?;
        }
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let channel = {
            let _inside = runtime.enter();
            // Connects when there is something to send, and again when the connection was lost.
            endpoint.connect_lazy()
        };
        let headers = destination.headers.iter().cloned().collect();
        let headers = MetadataMap::from_headers(headers);
        Ok(Self { runtime: Some(runtime), channel, headers, destination: destination.clone() })
    }
}

impl Drop for OverGrpc {
    fn drop(&mut self) {
        // It may be dropped where another runtime runs, which must not wait for this one.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Carrier for OverGrpc {
    fn carry(&mut self, message: Export) -> Result<Accepted, String> {
        let Some(runtime) = &self.runtime else { return Err("it has ended".to_owned()) };
        let mut client = tonic::client::Grpc::new(self.channel.clone());
        let mut request = tonic::Request::new(message);
        for entry in self.headers.iter() {
            if let KeyAndValueRef::Ascii(name, value) = entry {
                request.metadata_mut().insert(name, value.clone());
            }
        }
        request.set_timeout(self.destination.limit);
        let limit = self.destination.limit;
        runtime.block_on(async move {
            let call = async {
                client.ready().await.map_err(|e| with_causes(&e))?;
                let codec = ProstCodec::<Export, Accepted>::default();
                let answer = client.unary(request, PathAndQuery::from_static(CALL), codec).await;
                answer.map(tonic::Response::into_inner).map_err(|status| with_causes(&status))
            };
            tokio::time::timeout(limit, call).await.map_err(|_| format!("no answer within {limit:?}"))?
        })
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn destination(protocol: Protocol, authorities: Option<&str>) -> Destination {
        Destination {
            url: "https://127.0.0.1:1".to_owned(),
            protocol,
            headers: Vec::new(),
            authorities: authorities.map(Into::into),
            limit: Duration::from_millis(200),
        }
    }

    #[tokio::test]
    async fn carriers_are_made_and_dropped_where_a_runtime_runs() {
        for protocol in [Protocol::Http, Protocol::Grpc] {
            drop(to(&destination(protocol, None)).unwrap());
            for wrong in ["/does/not/exist.pem", "/dev/null"] {
                assert!(to(&destination(protocol, Some(wrong))).is_err(), "{protocol:?} {wrong}");
            }
            // Its own thread sends.
            let failed = std::thread::spawn(move || to(&destination(protocol, None)).unwrap().carry(Export::default()));
            assert!(failed.join().unwrap().is_err(), "nobody is there");
        }
    }
}
