//! Who may call what over gRPC, where the cluster has certificates, and where clients have keys.
//!
//! Clients need none. Whoever joins as a shard, follows the leader's journal (it holds everybody's answers), passes others'
//! requests on or changes something shows a certificate of the cluster's authority. A service that is not named here is
//! not for everybody.

use std::{sync::Arc, time::Instant};

use axum::{
    body::Body,
    extract::{Request, State},
    middleware::Next,
    response::{IntoResponse, Response},
};
use tonic::{Code, Status};

use super::incoming::Caller;
use crate::{
    frontend::{error::ApiError, forward::FORWARDED, grpc::code_name},
    security::{
        Security,
        audit::{Line, Origin},
        keys::Role,
        tls::Side,
    },
};

/// Generations.
const INFERENCE: &str = "/phalanx.v1.Inference/";
/// What changes the cluster.
const ADMIN: &str = "/phalanx.v1.Admin/";
/// Services that anybody may call who has no certificate.
const OPEN: &[&str] = &[
    INFERENCE,
    "/grpc.health.v1.Health/",
    "/grpc.reflection.v1.ServerReflection/",
    "/grpc.reflection.v1alpha.ServerReflection/",
];

/// Passes a call on if its caller may make it.
pub async fn admit(request: Request<Body>, next: Next) -> Response {
    let is_ours = shows_certificate(&request);
    let is_passed_on = request.headers().contains_key(FORWARDED);
    if is_ours || (is_open(request.uri().path()) && !is_passed_on) {
        return next.run(request).await;
    }
    let reason = "this needs a certificate of the cluster: give --cluster-ca, --cluster-cert and --cluster-key";
    Status::unauthenticated(reason).into_http::<Body>().into_response()
}

/// Records what is asked of the `Admin` service, and calls of `Inference` that were refused before it saw them.
pub async fn record(State(security): State<Arc<Security>>, request: Request<Body>, next: Next) -> Response {
    let path = request.uri().path().to_owned();
    let Some(audit) = security.audit().filter(|_| path.starts_with(ADMIN) || path.starts_with(INFERENCE)) else {
        return next.run(request).await;
    };
    if let Err(error) = audit.check() {
        return Status::from(ApiError::from(error)).into_http::<Body>().into_response();
    }
    let began = Instant::now();
    let origin = Origin::new(request.headers(), uuid::Uuid::new_v4().simple().to_string(), "gRPC", &path);
    let key = security.name_of(request.headers());
    let response = next.run(request).await;
    // Calls that reach `Inference` are recorded there.
    let refused = response.extensions().get::<Refusal>();
    if path.starts_with(ADMIN) || refused.is_some() {
        let status = Status::from_header_map(response.headers()).map_or(Code::Ok, |status| status.code());
        match audit.ticket().await {
            Ok(ticket) => ticket.write(&Line::short(origin, key, &code_name(status), began.elapsed())),
            Err(error) => return Status::from(ApiError::from(error)).into_http::<Body>().into_response(),
        }
    }
    response
}

/// Marks answers of [`recognize`].
#[derive(Clone)]
struct Refusal;

/// Where keys are needed: passes generations on if their caller has one, and what changes the cluster if it is an admin's.
/// A certificate of the cluster is as good as an admin's key. What shards and coordinators say to each other is for
/// [`admit`] and the join token to judge; health and reflection tell nothing that is secret.
pub async fn recognize(State(security): State<Arc<Security>>, request: Request<Body>, next: Next) -> Response {
    let path = request.uri().path();
    let is_admin = path.starts_with(ADMIN);
    if !is_admin && !path.starts_with(INFERENCE) || is_admin && shows_certificate(&request) {
        return next.run(request).await;
    }
    let refused = match security.authenticate(request.headers()) {
        Ok(Some(principal)) if is_admin && principal.role != Role::Admin => ApiError::forbidden(path),
        Ok(_) => return next.run(request).await,
        Err(denied) => denied.into(),
    };
    let mut response = Status::from(refused).into_http::<Body>().into_response();
    response.extensions_mut().insert(Refusal);
    response
}

/// Where clients are shown a certificate and the cluster has none: clients' calls over plain text are refused, so that
/// nobody sends secrets that way by mistake. Calls that a coordinator passes on come so.
pub async fn demand_tls(request: Request<Body>, next: Next) -> Response {
    let is_plain = request.extensions().get::<Caller>().is_none_or(|caller| caller.side == Side::Plain);
    if is_plain && request.uri().path().starts_with(INFERENCE) && !request.headers().contains_key(FORWARDED) {
        let reason = "this port speaks TLS with clients (--ssl-certfile): dial https://";
        return Status::failed_precondition(reason).into_http::<Body>().into_response();
    }
    next.run(request).await
}

/// Whether the caller shows a certificate of the cluster: the handshake has refused those of other authorities.
fn shows_certificate(request: &Request<Body>) -> bool {
    request.extensions().get::<Caller>().is_some_and(|caller| caller.side == Side::Cluster(true))
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
