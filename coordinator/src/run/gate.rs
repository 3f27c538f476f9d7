//! Who may call what, where the cluster has certificates.
//!
//! Clients need none. Whoever joins as a shard, follows the leader's journal (it holds everybody's answers), passes others'
//! requests on or changes something shows a certificate of the cluster's authority. A service that is not named here is
//! not for everybody.

use axum::{
    body::Body,
    extract::Request,
    middleware::Next,
    response::{IntoResponse, Response},
};
use tonic::{
    Status,
    transport::server::{TcpConnectInfo, TlsConnectInfo},
};

use crate::frontend::forward::FORWARDED;

/// Services that anybody may call.
const OPEN: &[&str] = &[
    "/phalanx.v1.Inference/",
    "/grpc.health.v1.Health/",
    "/grpc.reflection.v1.ServerReflection/",
    "/grpc.reflection.v1alpha.ServerReflection/",
];

/// Passes a call on if its caller may make it.
pub async fn admit(request: Request<Body>, next: Next) -> Response {
    let connection = request.extensions().get::<TlsConnectInfo<TcpConnectInfo>>();
    // The handshake has refused certificates of other authorities.
    let is_ours = connection.and_then(TlsConnectInfo::peer_certs).is_some_and(|shown| !shown.is_empty());
    let is_passed_on = request.headers().contains_key(FORWARDED);
    if is_ours || (is_open(request.uri().path()) && !is_passed_on) {
        return next.run(request).await;
    }
    let reason = "this needs a certificate of the cluster: give --cluster-ca, --cluster-cert and --cluster-key";
    Status::unauthenticated(reason).into_http::<Body>().into_response()
}

fn is_open(path: &str) -> bool {
    OPEN.iter().any(|service| path.starts_with(service))
}

#[cfg(test)]
mod tests {
    use phalanx_proto::v1::FILE_DESCRIPTOR_SET;
    use prost::Message;

    use super::*;

    #[derive(Message)]
    struct Files {
        #[prost(message, repeated, tag = "1")]
        file: Vec<File>,
    }

    #[derive(Message)]
    struct File {
        #[prost(message, repeated, tag = "6")]
        service: Vec<Service>,
    }

    #[derive(Message)]
    struct Service {
        #[prost(string, tag = "1")]
        name: String,
    }

    #[test]
    fn of_our_services_inference_alone_is_for_everybody() {
        let files = Files::decode(FILE_DESCRIPTOR_SET).unwrap();
        let services: Vec<String> = files.file.into_iter().flat_map(|f| f.service).map(|s| s.name).collect();
        assert!(services.len() >= 4, "{services:?}");
        let open: Vec<&String> = services.iter().filter(|s| is_open(&format!("/phalanx.v1.{s}/Anything"))).collect();
        assert_eq!(open, ["Inference"]);
        assert!(is_open("/grpc.health.v1.Health/Check") && !is_open("/") && !is_open("/phalanx.v1.InferenceX/A"));
    }
}
