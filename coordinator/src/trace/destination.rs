//! Where spans are sent, and how: from flags, and from the variables that OpenTelemetry defines for every program.
//!
//! <https://opentelemetry.io/docs/specs/otel/protocol/exporter/>: a variable for traces comes before the one for everything;
//! the flags come before both.

use std::{collections::BTreeMap, fmt, path::PathBuf, time::Duration};

use clap::ValueEnum;
use http::{HeaderName, HeaderValue, Uri};
use serde::{Deserialize, Serialize};

/// Path of traces at a collector (OTLP over HTTP).
const PATH: &str = "/v1/traces";
/// Longest wait for the collector, unless told otherwise.
const SEND_LIMIT: Duration = Duration::from_secs(5);

/// How spans travel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum, Serialize, Deserialize)]
pub enum Protocol {
    /// A POST for each message, as protobuf; mostly port 4318.
    #[default]
    #[value(name = "http/protobuf")]
    #[serde(rename = "http/protobuf")]
    Http,
    /// gRPC; mostly port 4317.
    #[value(name = "grpc")]
    #[serde(rename = "grpc")]
    Grpc,
}

/// A collector.
#[derive(Clone, PartialEq, Eq)]
pub struct Destination {
    /// Over HTTP with its path, over gRPC without one.
    pub url: String,
    /// How it is spoken to.
    pub protocol: Protocol,
    /// What goes with every message, such as a key: not for logs.
    pub headers: Vec<(HeaderName, HeaderValue)>,
    /// PEM file with the authorities of its certificate; `None`: the system's.
    pub authorities: Option<PathBuf>,
    /// Longest wait for an answer.
    pub limit: Duration,
}

impl fmt::Debug for Destination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Destination").field("url", &self.url).field("protocol", &self.protocol).finish_non_exhaustive()
    }
}

impl fmt::Display for Destination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.url)
    }
}

/// Something that is none of a collector's.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{name} {value}: {reason}")]
pub struct DestinationError {
    /// The flag or the variable.
    pub name: String,
    /// As given.
    pub value: String,
    /// What is wrong, and what would do.
    pub reason: &'static str,
}

/// Name of the flag.
const FLAG: &str = "--otlp-traces-endpoint";
/// How variables of traces begin.
const OF_TRACES: &str = "OTEL_EXPORTER_OTLP_TRACES_";
/// How those of everything begin.
const OF_ALL: &str = "OTEL_EXPORTER_OTLP_";

/// Variables of the process that begin with `OTEL_`.
pub type Variables = BTreeMap<String, String>;

/// A variable of traces, else that of everything: its name and its value.
fn variable<'a>(variables: &'a Variables, name: &str) -> Option<(String, &'a str)> {
    [OF_TRACES, OF_ALL].iter().find_map(|prefix| {
        let name = format!("{prefix}{name}");
        let value = variables.get(&name).map(|value| value.trim()).filter(|value| !value.is_empty())?;
        Some((name, value))
    })
}

/// Whether variables say that nothing is traced.
fn is_off(variables: &Variables) -> bool {
    let is = |name: &str, off: &str| variables.get(name).is_some_and(|value| value.trim().eq_ignore_ascii_case(off));
    is("OTEL_SDK_DISABLED", "true") || is("OTEL_TRACES_EXPORTER", "none")
}

impl Destination {
    /// Of the flags, as far as they are given, and of variables. `None`: nothing is traced.
    ///
    /// # Errors
    /// If one of them is wrong, or a protocol is named without a collector.
    pub fn resolve(
        endpoint: Option<&str>,
        protocol: Option<Protocol>,
        variables: &Variables,
    ) -> Result<Option<Self>, DestinationError> {
        let of_variables = || variable(variables, "ENDPOINT").filter(|_| !is_off(variables));
        let Some((name, url)) = endpoint.map(|url| (FLAG.to_owned(), url)).or_else(of_variables) else {
            return match protocol.and_then(|protocol| protocol.to_possible_value()) {
                Some(value) => Err(DestinationError {
                    name: "--otlp-traces-protocol".to_owned(),
                    value: value.get_name().to_owned(),
                    reason: "needs --otlp-traces-endpoint too",
                }),
                None => Ok(None),
            };
        };
        let protocol = match (protocol, variable(variables, "PROTOCOL")) {
            (Some(protocol), _) => protocol,
            (None, None) => Protocol::default(),
            (None, Some((name, value))) => Protocol::from_str(value, true).map_err(|_| DestinationError {
                name,
                value: value.to_owned(),
                reason: "want http/protobuf or grpc",
            })?,
        };
        let limit = match variable(variables, "TIMEOUT") {
            None => SEND_LIMIT,
            Some((name, value)) => match value.parse::<u64>() {
                Ok(ms) if ms > 0 => Duration::from_millis(ms),
                _ => return Err(DestinationError { name, value: value.to_owned(), reason: "want milliseconds" }),
            },
        };
        let headers = match variable(variables, "HEADERS") {
            None => Vec::new(),
            // They may be secrets: they are not shown.
            Some((name, value)) => headers(value).ok_or(DestinationError {
                name,
                value: "(secret)".to_owned(),
                reason: "want NAME=VALUE,NAME=VALUE with values percent-encoded",
            })?,
        };
        let authorities = variable(variables, "CERTIFICATE").map(|(_, file)| PathBuf::from(file));
        let url = located(&name, url, protocol)?;
        Ok(Some(Self { url, protocol, headers, authorities, limit }))
    }
}

/// The address, as the protocol and whoever named it have it.
fn located(name: &str, url: &str, protocol: Protocol) -> Result<String, DestinationError> {
    let wrong = |reason| DestinationError { name: name.to_owned(), value: url.to_owned(), reason };
    let uri: Uri = url.parse().map_err(|_| wrong("want http://HOST:PORT or https://HOST:PORT of a collector"))?;
    if uri.scheme_str() == Some("grpc") {
        return Err(wrong("give http://HOST:4317 and --otlp-traces-protocol grpc"));
    }
    if !matches!(uri.scheme_str(), Some("http" | "https")) || uri.host().is_none_or(str::is_empty) {
        return Err(wrong("want http://HOST:PORT or https://HOST:PORT of a collector"));
    }
    let is_bare = matches!(uri.path(), "" | "/") && uri.query().is_none();
    let trimmed = url.trim_end_matches('/');
    match protocol {
        Protocol::Grpc if is_bare => Ok(trimmed.to_owned()),
        Protocol::Grpc => Err(wrong("gRPC knows no path: want http://HOST:PORT, mostly with port 4317")),
        // The variable for everything is a place that traces have a path in; the one for traces is taken as it is.
        Protocol::Http if name == format!("{OF_ALL}ENDPOINT") => Ok(format!("{trimmed}{PATH}")),
        Protocol::Http if name == FLAG && is_bare => Ok(format!("{trimmed}{PATH}")),
        Protocol::Http => Ok(url.to_owned()),
    }
}

/// `NAME=VALUE,NAME=VALUE`, as W3C's baggage has it, without properties.
fn headers(text: &str) -> Option<Vec<(HeaderName, HeaderValue)>> {
    let pair = |pair: &str| {
        let (name, value) = pair.split_once('=')?;
        let mut value = HeaderValue::from_bytes(&percent_decoded(value.trim())?).ok()?;
        value.set_sensitive(true);
        Some((name.trim().parse().ok()?, value))
    };
    text.split(',').filter(|part| !part.trim().is_empty()).map(pair).collect()
}

fn percent_decoded(text: &str) -> Option<Vec<u8>> {
    let mut decoded = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        let digit = |byte: u8| char::from(byte).to_digit(16);
        decoded.push(match byte {
            b'%' => u8::try_from(digit(bytes.next()?)? * 16 + digit(bytes.next()?)?).ok()?,
            other => other,
        });
    }
    Some(decoded)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolved(
        endpoint: Option<&str>,
        protocol: Option<Protocol>,
        variables: &[(&str, &str)],
    ) -> Result<Option<Destination>, DestinationError> {
        let variables = variables.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        Destination::resolve(endpoint, protocol, &variables)
    }

    fn url(endpoint: &str, protocol: Protocol) -> Result<String, DestinationError> {
        resolved(Some(endpoint), Some(protocol), &[]).map(|to| to.unwrap().url)
    }

    #[test]
    fn a_collector_is_an_http_url() {
        let http = |text| url(text, Protocol::Http);
        assert_eq!(http("http://localhost:4318").unwrap(), "http://localhost:4318/v1/traces");
        assert_eq!(http("https://otlp.example/").unwrap(), "https://otlp.example/v1/traces");
        assert_eq!(http("http://c:4318/v1/traces").unwrap(), "http://c:4318/v1/traces");
        assert_eq!(http("https://c/otlp/v1/traces").unwrap(), "https://c/otlp/v1/traces");
        let grpc = |text| url(text, Protocol::Grpc);
        assert_eq!(grpc("http://localhost:4317").unwrap(), "http://localhost:4317");
        assert_eq!(grpc("https://c:4317/").unwrap(), "https://c:4317");
        assert!(grpc("http://c:4317/v1/traces").unwrap_err().reason.contains("no path"));
        for protocol in [Protocol::Http, Protocol::Grpc] {
            assert!(url("grpc://c:4317", protocol).unwrap_err().reason.contains("--otlp-traces-protocol"));
            for wrong in ["", "c:4318", "ftp://c", "http://", "not a url"] {
                assert!(url(wrong, protocol).is_err(), "{wrong}");
            }
        }
    }

    #[test]
    fn variables_stand_in_for_flags() {
        let all = ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://all:4318/base/");
        let traces = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://traces:4318");
        let to = |endpoint, variables: &[_]| resolved(endpoint, None, variables).unwrap().map(|to| to.url);
        assert_eq!(to(None, &[]), None);
        assert_eq!(to(None, &[("OTEL_EXPORTER_OTLP_ENDPOINT", " ")]), None, "empty is unset");
        assert_eq!(to(None, &[all]).as_deref(), Some("http://all:4318/base/v1/traces"));
        assert_eq!(to(None, &[all, traces]).as_deref(), Some("http://traces:4318"), "as it is");
        assert_eq!(to(Some("http://flag:1"), &[all, traces]).as_deref(), Some("http://flag:1/v1/traces"));
        for off in [("OTEL_SDK_DISABLED", "true"), ("OTEL_TRACES_EXPORTER", "none")] {
            assert_eq!(to(None, &[all, off]), None, "{off:?}");
            assert!(to(Some("http://flag:1"), &[off]).is_some(), "a flag is meant");
        }
        let protocol =
            |flag, variables: &[_]| resolved(Some("http://c:1"), flag, variables).map(|to| to.unwrap().protocol);
        let grpc = ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc");
        assert_eq!(protocol(None, &[]).unwrap(), Protocol::Http);
        assert_eq!(protocol(None, &[grpc]).unwrap(), Protocol::Grpc);
        assert_eq!(
            protocol(None, &[grpc, ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/protobuf")]).unwrap(),
            Protocol::Http
        );
        assert_eq!(protocol(Some(Protocol::Http), &[grpc]).unwrap(), Protocol::Http);
        let json = protocol(None, &[("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json")]).unwrap_err().to_string();
        assert!(json.contains("OTEL_EXPORTER_OTLP_PROTOCOL http/json"), "{json}");
        assert!(resolved(None, Some(Protocol::Grpc), &[]).is_err(), "a protocol without a collector");
    }

    #[test]
    fn headers_and_limits_are_taken_and_not_shown() {
        let variables = [
            ("OTEL_EXPORTER_OTLP_HEADERS", "x-other=1"),
            ("OTEL_EXPORTER_OTLP_TRACES_HEADERS", "Authorization=Bearer%20s%2Cecret, x-team = a ,"),
            ("OTEL_EXPORTER_OTLP_TIMEOUT", "250"),
            ("OTEL_EXPORTER_OTLP_CERTIFICATE", "/ca.pem"),
        ];
        let to = resolved(Some("http://c:1"), None, &variables).unwrap().unwrap();
        let sent: Vec<_> = to.headers.iter().map(|(name, value)| (name.as_str(), value.to_str().unwrap())).collect();
        assert_eq!(sent, [("authorization", "Bearer s,ecret"), ("x-team", "a")]);
        assert_eq!((to.limit, to.authorities.as_deref()), (Duration::from_millis(250), Some("/ca.pem".as_ref())));
        assert!(!format!("{to:?}").contains("ecret"));
        for wrong in ["no pair", "a b=1", "x=%2", "x=%zz", "x=\u{1}"] {
            let error = resolved(Some("http://c:1"), None, &[("OTEL_EXPORTER_OTLP_HEADERS", wrong)]).unwrap_err();
            assert!(!error.to_string().contains(wrong), "{error}");
        }
        for wrong in ["0", "-1", "1s"] {
            assert!(resolved(Some("http://c:1"), None, &[("OTEL_EXPORTER_OTLP_TIMEOUT", wrong)]).is_err(), "{wrong}");
        }
    }
}
