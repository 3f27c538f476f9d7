//! How coordinators are dialled: in plain text, or over TLS with certificates on both sides.

use std::{
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use tonic::transport::{Certificate, ClientTlsConfig, Endpoint, Error, Identity};

/// Longest wait for a TLS handshake.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(2);

/// Everybody who dials a coordinator does it with one of these. Without certificates it speaks plain text. Clones are the
/// same: certificates that one gets are those of all.
#[derive(Clone, Debug, Default)]
pub struct Dialer {
    tls: Option<Arc<RwLock<Shown>>>,
}

/// What is trusted and shown.
#[derive(Debug)]
struct Shown {
    tls: ClientTlsConfig,
    /// How often that was renewed.
    generation: u64,
}

impl Dialer {
    /// Trusts the authority `ca` and shows a certificate with its key; all PEM.
    ///
    /// # Errors
    /// If they can't be used, or key and certificate don't belong together.
    pub fn with_certificates(ca: &[u8], certificate: &[u8], key: &[u8]) -> Result<Self, Error> {
        let tls = tls_config(ca, certificate, key)?;
        Ok(Self { tls: Some(Arc::new(RwLock::new(Shown { tls, generation: 0 }))) })
    }

    /// Trusts and shows these from now on, as all clones do. Endpoints that were made before go on with what they have.
    ///
    /// # Errors
    /// If they can't be used: then nothing changes.
    pub fn renew(&self, ca: &[u8], certificate: &[u8], key: &[u8]) -> Result<(), Error> {
        let Some(shown) = &self.tls else { return Ok(()) };
        let tls = tls_config(ca, certificate, key)?;
        let mut shown = shown.write().unwrap_or_else(PoisonError::into_inner);
        *shown = Shown { tls, generation: shown.generation + 1 };
        Ok(())
    }

    /// How often certificates were renewed: what keeps an endpoint for long makes a new one when this changes.
    pub fn generation(&self) -> u64 {
        self.tls.as_ref().map_or(0, |shown| shown.read().unwrap_or_else(PoisonError::into_inner).generation)
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
                let tls = tls.read().unwrap_or_else(PoisonError::into_inner).tls.clone();
                endpoint.tls_config(tls.domain_name(host))
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

fn tls_config(ca: &[u8], certificate: &[u8], key: &[u8]) -> Result<ClientTlsConfig, Error> {
    let identity = Identity::from_pem(certificate, key);
    let tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(ca)).identity(identity);
    let tls = tls.timeout(HANDSHAKE_LIMIT);
    // They are read only when they are used: do it now.
    Endpoint::from_static("https://localhost:1").tls_config(tls.clone())?;
    Ok(tls)
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
