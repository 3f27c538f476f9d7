//! How coordinators are dialled: in plain text, or over TLS with certificates on both sides.

use std::time::Duration;

use tonic::transport::{Certificate, ClientTlsConfig, Endpoint, Error, Identity};

/// Longest wait for a TLS handshake.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(2);

/// Everybody who dials a coordinator does it with one of these. Without certificates it speaks plain text.
#[derive(Clone, Debug, Default)]
pub struct Dialer {
    tls: Option<ClientTlsConfig>,
}

impl Dialer {
    /// Trusts the authority `ca` and shows a certificate with its key; all PEM.
    ///
    /// # Errors
    /// If they can't be used, or key and certificate don't belong together.
    pub fn with_certificates(ca: &[u8], certificate: &[u8], key: &[u8]) -> Result<Self, Error> {
        let identity = Identity::from_pem(certificate, key);
        let tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(ca)).identity(identity);
        let dialer = Self { tls: Some(tls.timeout(HANDSHAKE_LIMIT)) };
        // They are read only when they are used: do it now.
        dialer.endpoint("localhost:1")?;
        Ok(dialer)
    }

    /// What the URLs of coordinators begin with.
    pub fn scheme(&self) -> &'static str {
        if self.tls.is_some() { "https" } else { "http" }
    }

    /// A coordinator at `HOST:PORT`. A scheme before it does not count. Its certificate must name the host.
    ///
    /// # Errors
    /// If that is no address.
    pub fn endpoint(&self, address: &str) -> Result<Endpoint, Error> {
        let authority = address.split_once("://").map_or(address, |(_, rest)| rest);
        let endpoint = Endpoint::from_shared(format!("{}://{authority}", self.scheme()))?;
        match &self.tls {
            Some(tls) => {
                // Certificates name IPv6 addresses without brackets.
                let host = endpoint.uri().host().unwrap_or_default().trim_matches(['[', ']']).to_owned();
                endpoint.tls_config(tls.clone().domain_name(host))
            }
            None => Ok(endpoint),
        }
    }

    /// What to do about a connection that failed for this reason, where that is known.
    pub fn advice(&self, reason: &str) -> Option<&'static str> {
        let known: &[(&str, &str)] = if self.tls.is_some() { TLS_ADVICE } else { PLAIN_ADVICE };
        known.iter().find(|(sign, _)| reason.contains(sign)).map(|(_, advice)| *advice)
    }
}

/// What rustls says, and what that means here.
const TLS_ADVICE: &[(&str, &str)] = &[
    (
        "InvalidContentType",
        "the coordinator speaks plain text: start it with --cluster-ca, --cluster-cert and --cluster-key too, or leave \
         them out here and dial http://",
    ),
    ("UnknownIssuer", "the coordinator's certificate is not from the authority in --cluster-ca"),
    // An authority of the same name.
    ("BadSignature", "the coordinator's certificate is not from the authority in --cluster-ca"),
    (
        "not valid for name",
        "the coordinator's certificate does not name the host that was dialled: dial a name that it has, or make one with \
         `coordinator certs init --host NAME`",
    ),
    ("alert: CertificateExpired", "the certificate in --cluster-cert has expired: give this process a new one"),
    ("certificate expired", "the coordinator's certificate has expired: give it a new one"),
    (
        "alert: ",
        "the coordinator does not accept the certificate in --cluster-cert: take one from the authority in the \
         coordinator's --cluster-ca",
    ),
];

/// What is seen of a peer that speaks TLS: its alert is no HTTP/2 frame.
const PLAIN_ADVICE: &[(&str, &str)] = &[(
    "frame with invalid size",
    "the coordinator speaks TLS: give this process --cluster-ca, --cluster-cert and --cluster-key, and dial https://",
)];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_become_endpoints() {
        let dialer = Dialer::default();
        assert_eq!(dialer.endpoint("host:1").unwrap().uri(), "http://host:1/");
        assert_eq!(dialer.endpoint("https://[::1]:1").unwrap().uri(), "http://[::1]:1/");
        assert!(dialer.endpoint("no address").is_err());
        assert!(dialer.advice("connection refused").is_none());
        assert!(dialer.advice("connection error detected: frame with invalid size").unwrap().contains("--cluster-ca"));
    }

    #[test]
    fn files_without_certificates_are_refused() {
        assert!(Dialer::with_certificates(b"", b"", b"").is_err());
    }
}
