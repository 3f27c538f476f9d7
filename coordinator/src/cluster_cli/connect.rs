//! Finding the coordinator that can answer.
//!
//! Coordinators are tried in the order in which they were named. One that does not lead refuses what only a leader can
//! do and names the leader in its answer's metadata: that one is then asked, once.

use std::{error::Error, fmt, time::Duration};

use phalanx_cluster::error_text::with_causes;
use phalanx_proto::dial::Dialer;
use tonic::{
    Code, Status,
    metadata::{Ascii, MetadataValue},
    service::{Interceptor, interceptor::InterceptedService},
    transport::Channel,
};

use crate::leadership::standby::LEADER_METADATA;

/// Where a coordinator listens unless told otherwise.
pub(super) const DEFAULT_COORDINATOR: &str = "http://127.0.0.1:50051";
/// gRPC's port where a URL names none.
const DEFAULT_PORT: u16 = 50051;
/// Longest wait for a connection: a host that drops packets must not keep us from asking the next coordinator.
const CONNECT_LIMIT: Duration = Duration::from_secs(3);
/// Silence after which a connection is asked for a sign of life, and the longest wait for it. Draining a shard may take
/// long; a dead coordinator must show nevertheless.
const KEEP_ALIVE: Duration = Duration::from_secs(5);

/// Address of a coordinator's gRPC service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Url(String);

impl Url {
    /// `http://HOST:PORT` or `https://HOST:PORT`; scheme and port may be left out.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let wrong =
            || "want http://HOST:PORT, with the port of gRPC (50051 unless --grpc-port says otherwise)".to_owned();
        let text = text.trim();
        let (scheme, authority) = match text.split_once("://") {
            Some((scheme @ ("http" | "https"), rest)) => (scheme, rest),
            Some(_) => return Err(wrong()),
            None => ("http", text),
        };
        let authority: http::uri::Authority = authority.trim_end_matches('/').parse().map_err(|_| wrong())?;
        if authority.host().is_empty() || authority.as_str().contains('@') {
            return Err(wrong());
        }
        match authority.port_u16() {
            Some(_) => Ok(Self(format!("{scheme}://{authority}"))),
            None if authority.as_str() == authority.host() => {
                Ok(Self(format!("{scheme}://{authority}:{DEFAULT_PORT}")))
            }
            // Something behind the host that is no port.
            None => Err(wrong()),
        }
    }

    /// Whether it asks for TLS.
    pub(super) fn wants_tls(&self) -> bool {
        self.0.starts_with("https://")
    }

    /// The same, as it is dialled.
    fn dialled(self, dialer: &Dialer) -> Self {
        let authority = self.0.split_once("://").map_or(self.0.as_str(), |(_, rest)| rest);
        Self(format!("{}://{authority}", dialer.scheme()))
    }
}

impl fmt::Display for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub(super) enum CallError {
    /// Each coordinator that was tried, with what happened.
    #[error(
        "no coordinator answers:{}\nIs one running? Name its gRPC address with --coordinator http://HOST:PORT[,URL]; \
         it says `grpc://HOST:PORT` when it starts.",
        lines(.0)
    )]
    Nobody(Vec<(Url, String)>),
    /// A coordinator answered: no.
    #[error("{}{}", message(.0), advice(.0))]
    Refused(Box<Status>),
}

fn lines(tried: &[(Url, String)]) -> String {
    tried.iter().map(|(url, why)| format!("\n  {url}: {why}")).collect()
}

fn message(status: &Status) -> String {
    if status.message().is_empty() { format!("{:?}", status.code()) } else { super::text::plain(status.message()) }
}

/// What to do, where the message itself does not say.
fn advice(status: &Status) -> &'static str {
    match status.code() {
        Code::Unimplemented => "\nThe coordinator does not know this command: it may run another version.",
        _ if names_leader(status) => "\nLeadership has just changed: try again.",
        _ => "",
    }
}

/// A connection over which every call shows the API key, if there is one.
pub(super) type Line = InterceptedService<Channel, Bearer>;

/// An API key, as calls show it.
#[derive(Debug, Clone, Default)]
pub(super) struct Bearer(Option<MetadataValue<Ascii>>);

impl Bearer {
    /// `None` if the key can't stand in a header.
    pub(super) fn new(key: &str) -> Option<Self> {
        let mut value: MetadataValue<Ascii> = format!("Bearer {key}").parse().ok()?;
        value.set_sensitive(true);
        Some(Self(Some(value)))
    }
}

impl Interceptor for Bearer {
    fn call(&mut self, mut request: tonic::Request<()>) -> Result<tonic::Request<()>, Status> {
        if let Some(key) = &self.0 {
            request.metadata_mut().insert("authorization", key.clone());
        }
        Ok(request)
    }
}

/// The coordinators that were named.
#[derive(Debug, Clone)]
pub(super) struct Coordinators {
    urls: Vec<Url>,
    dialer: Dialer,
    bearer: Bearer,
}

impl Coordinators {
    /// In the order in which they are to be tried. With certificates all are dialled over TLS, whatever their URLs say.
    pub(super) fn new(urls: Vec<Url>, dialer: Dialer, bearer: Bearer) -> Self {
        Self { urls: urls.into_iter().map(|url| url.dialled(&dialer)).collect(), dialer, bearer }
    }

    /// Makes a call to the first coordinator that answers, or to the one that it names as leader.
    ///
    /// What `call` does must be harmless to do twice: a coordinator may die before its answer arrives.
    pub(super) async fn ask<T>(&self, call: impl AsyncFn(Line) -> Result<T, Status>) -> Result<T, CallError> {
        let mut tried = Vec::new();
        for url in &self.urls {
            let status = match self.attempt(url, &call).await {
                Ok(answer) => return Ok(answer),
                Err(status) => status,
            };
            match leader(&status).map(|url| url.dialled(&self.dialer)) {
                Some(leader) => match self.attempt(&leader, &call).await {
                    Ok(answer) => return Ok(answer),
                    Err(status) if is_gone(&status) => tried.push((leader, self.reason(&status))),
                    Err(status) => return Err(CallError::Refused(Box::new(status))),
                },
                None if is_gone(&status) => tried.push((url.clone(), self.reason(&status))),
                None => return Err(CallError::Refused(Box::new(status))),
            }
        }
        Err(CallError::Nobody(tried))
    }

    async fn attempt<T>(&self, url: &Url, call: impl AsyncFn(Line) -> Result<T, Status>) -> Result<T, Status> {
        let endpoint = self
            .dialer
            .endpoint(&url.0)
            .map_err(|e| Status::from_error(e.into()))?
            .connect_timeout(CONNECT_LIMIT)
            .http2_keep_alive_interval(KEEP_ALIVE)
            .keep_alive_timeout(KEEP_ALIVE)
            .keep_alive_while_idle(true);
        let channel = endpoint.connect().await.map_err(|e| {
            let why = innermost(&e);
            let mut status = Status::unavailable(why);
            status.set_source(std::sync::Arc::new(e));
            status
        })?;
        call(InterceptedService::new(channel, self.bearer.clone())).await
    }

    fn reason(&self, status: &Status) -> String {
        match status.source() {
            Some(source) => match self.dialer.advice(&with_causes(source)) {
                Some(advice) => advice.to_owned(),
                None => innermost(source),
            },
            None => message(status),
        }
    }
}

/// Whether another coordinator may do better: this one can't be reached, went away, or can't answer at present.
pub(super) fn is_gone(status: &Status) -> bool {
    // An error that the connection made has a cause; one that the coordinator sent has none.
    status.code() == Code::Unavailable || status.source().is_some()
}

/// Whether a refusal says that another coordinator leads.
pub(super) fn names_leader(status: &Status) -> bool {
    status.code() == Code::FailedPrecondition && status.metadata().get(LEADER_METADATA).is_some()
}

/// The leader that a refusal names.
fn leader(status: &Status) -> Option<Url> {
    if !names_leader(status) {
        return None;
    }
    Url::parse(status.metadata().get(LEADER_METADATA)?.to_str().ok()?).ok()
}

/// The last cause of an error: the ones around it say "transport error".
fn innermost(error: &(dyn Error + 'static)) -> String {
    let mut error = error;
    while let Some(source) = error.source() {
        error = source;
    }
    super::text::plain(&error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> Result<String, String> {
        Url::parse(text).map(|url| url.to_string())
    }

    #[test]
    fn addresses_are_read_as_people_write_them() {
        for (text, want) in [
            ("http://127.0.0.1:50051", "http://127.0.0.1:50051"),
            ("http://host:7/", "http://host:7"),
            ("host:7", "http://host:7"),
            (" host ", "http://host:50051"),
            ("http://[::1]:7", "http://[::1]:7"),
            ("[::1]", "http://[::1]:50051"),
        ] {
            assert_eq!(parsed(text).as_deref(), Ok(want));
        }
        for text in
            ["", "http://", "ftp://host:7", "http://host:port", "http://a b:7", "http://u@host:7", "http://host:70000"]
        {
            assert!(parsed(text).unwrap_err().contains("http://HOST:PORT"), "{text}");
        }
        let secure = Url::parse("https://host:7").unwrap();
        assert!(secure.wants_tls());
        assert_eq!(secure.dialled(&Dialer::default()).to_string(), "http://host:7");
    }

    #[test]
    fn an_error_names_all_that_was_tried() {
        let error = CallError::Nobody(vec![
            (Url::parse("a:1").unwrap(), "connection refused".to_owned()),
            (Url::parse("b:2").unwrap(), "no route to host".to_owned()),
        ]);
        let text = error.to_string();
        for part in ["http://a:1: connection refused", "http://b:2: no route to host", "--coordinator"] {
            assert!(text.contains(part), "{text}");
        }
    }
}
