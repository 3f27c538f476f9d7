//! Keys under which requests can be resumed, and what a key makes of a request.

use std::time::Duration;

use http::{HeaderMap, HeaderName};
use phalanx_cluster::hex::hex;
use sha2::{Digest, Sha256};

use super::position::Position;
use crate::{frontend::error::ApiError, security::keys::Principal};

/// Header by which clients name a request that they may have to ask again.
pub const IDEMPOTENCY_KEY: &str = "idempotency-key";
/// Header by which a coordinator that forwards a request names it.
pub const FORWARDERS_KEY: &str = "x-phalanx-resume-key";
/// Header that says after which event a stream is to go on.
pub const LAST_EVENT_ID: &str = "last-event-id";
/// Longest key.
const LONGEST_KEY: usize = 255;
/// How long a client's request goes on without it.
const CLIENTS_PATIENCE: Duration = Duration::from_secs(30);

/// Whether a request has a key.
pub fn is_named(headers: &HeaderMap) -> bool {
    [IDEMPOTENCY_KEY, FORWARDERS_KEY].into_iter().any(|name| headers.contains_key(name))
}

/// A request that can be resumed, before anything is known of it.
#[derive(Debug, Clone)]
pub struct Keyed {
    /// Names it.
    pub key: String,
    /// SHA-256 of what is asked: another request under the same key is an error.
    pub hash: [u8; 32],
    /// How long it goes on while nobody reads its answer.
    pub patience: Duration,
    /// What the client has already.
    pub has: Position,
}

impl Keyed {
    /// From a request's headers and body; `None` if it has no key. A client's own key comes before a forwarder's.
    pub fn of_http(headers: &HeaderMap, endpoint: &str, body: &[u8]) -> Result<Option<Self>, ApiError> {
        let (key, patience) = match (header(headers, IDEMPOTENCY_KEY)?, header(headers, FORWARDERS_KEY)?) {
            (Some(key), _) => (checked(key, "Idempotency-Key")?, CLIENTS_PATIENCE),
            (None, Some(key)) => (checked(key, FORWARDERS_KEY)?, Duration::ZERO),
            (None, None) => return Ok(None),
        };
        let has = last_event_id(headers)?.unwrap_or_default();
        Ok(Some(Self { key, hash: hash(endpoint, body), patience, has }))
    }

    /// From a gRPC call. A key in its message is the client's, one in its metadata a forwarder's.
    pub fn of_grpc(
        named: &str,
        metadata: &tonic::metadata::MetadataMap,
        endpoint: &str,
        message: &[u8],
        has: Position,
    ) -> Result<Option<Self>, ApiError> {
        let forwarders = metadata.get(FORWARDERS_KEY).map(|key| key.to_str().unwrap_or_default());
        let (key, patience) = match (named, forwarders) {
            ("", None) => return Ok(None),
            ("", Some(key)) => (checked(key, FORWARDERS_KEY)?, Duration::ZERO),
            (key, _) => (checked(key, "resume_key")?, CLIENTS_PATIENCE),
        };
        Ok(Some(Self { key, hash: hash(endpoint, message), patience, has }))
    }

    /// The same key of another client is another one.
    #[must_use]
    pub fn owned_by(self, principal: Option<&Principal>) -> Self {
        Self { key: owned(&self.key, principal), ..self }
    }

    /// Whether a coordinator gave the key that passes the request on, not a client.
    pub fn is_forwarders(&self) -> bool {
        self.patience.is_zero()
    }

    /// A part of answers' names: every coordinator gives the same to the same request.
    pub fn name(&self) -> String {
        let digest = self.digest("name");
        hex(&digest[..16])
    }

    /// Seed of a request that brings none: every coordinator draws the same.
    pub fn seed(&self) -> u64 {
        leading(&self.digest("seed"))
    }

    fn digest(&self, purpose: &str) -> [u8; 32] {
        let mut sha = Sha256::new();
        sha.update(purpose);
        sha.update([0]);
        // A key has no zero byte: where it ends is certain.
        sha.update(&self.key);
        sha.update([0]);
        sha.update(self.hash);
        sha.finalize().into()
    }
}

/// A key as it is known here: where clients have keys of their own, nobody reads what another one asked.
pub fn owned(key: &str, principal: Option<&Principal>) -> String {
    // A name has no slash: where it ends is certain.
    principal.map_or_else(|| key.to_owned(), |principal| format!("{}/{key}", principal.name))
}

/// Seed of a prompt of several, from the first one's.
pub fn seed_of_prompt(first: u64, prompt_idx: usize) -> u64 {
    if prompt_idx == 0 {
        return first;
    }
    let mut sha = Sha256::new();
    sha.update(first.to_le_bytes());
    sha.update((prompt_idx as u64).to_le_bytes());
    let digest: [u8; 32] = sha.finalize().into();
    leading(&digest)
}

fn leading(digest: &[u8; 32]) -> u64 {
    digest[..8].iter().fold(0, |all, byte| all << 8 | u64::from(*byte))
}

/// The event after which a stream is to go on, if the request says.
pub fn last_event_id(headers: &HeaderMap) -> Result<Option<Position>, ApiError> {
    let id = header(headers, LAST_EVENT_ID)?.filter(|id| !id.is_empty());
    id.map(|id| id.parse().map_err(|reason| ApiError::invalid("Last-Event-ID", reason))).transpose()
}

fn header<'a>(headers: &'a HeaderMap, name: &'static str) -> Result<Option<&'a str>, ApiError> {
    let name = HeaderName::from_static(name);
    let text = |value: &'a http::HeaderValue| {
        value.to_str().map_err(|_| ApiError::invalid(name.as_str(), "must be visible ASCII characters"))
    };
    headers.get(&name).map(text).transpose()
}

fn checked(key: &str, field: &str) -> Result<String, ApiError> {
    if key.is_empty() || key.len() > LONGEST_KEY || !key.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(ApiError::invalid(field, format!("must be 1 to {LONGEST_KEY} visible ASCII characters")));
    }
    Ok(key.to_owned())
}

fn hash(endpoint: &str, body: &[u8]) -> [u8; 32] {
    let mut sha = Sha256::new();
    sha.update(endpoint);
    sha.update([0]);
    sha.update(body);
    sha.finalize().into()
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    fn of(headers: &[(&'static str, &str)]) -> Result<Option<Keyed>, ApiError> {
        let header = |(name, value): &(&'static str, &str)| {
            (HeaderName::from_static(name), HeaderValue::from_str(value).unwrap())
        };
        Keyed::of_http(&headers.iter().map(header).collect(), "/v1/completions", b"{}")
    }

    #[test]
    fn a_client_s_key_comes_first() {
        let keyed = of(&[(IDEMPOTENCY_KEY, "mine"), (FORWARDERS_KEY, "its"), (LAST_EVENT_ID, "3,4")]).unwrap().unwrap();
        assert_eq!(
            (keyed.key.as_str(), keyed.patience, keyed.has.to_string()),
            ("mine", CLIENTS_PATIENCE, "3,4".into())
        );
        let keyed = of(&[(FORWARDERS_KEY, "its")]).unwrap().unwrap();
        assert_eq!((keyed.key.as_str(), keyed.patience), ("its", Duration::ZERO));
        assert!(of(&[(LAST_EVENT_ID, "nonsense")]).unwrap().is_none(), "says nothing without a key");
    }

    #[test]
    fn keys_are_visible_and_short() {
        let long = "x".repeat(LONGEST_KEY + 1);
        for wrong in ["", "a b", &long] {
            assert!(of(&[(IDEMPOTENCY_KEY, wrong)]).is_err(), "{wrong}");
        }
        assert!(of(&[(IDEMPOTENCY_KEY, &long[1..])]).is_ok());
        assert!(of(&[(IDEMPOTENCY_KEY, "k"), (LAST_EVENT_ID, "nonsense")]).is_err());
    }

    #[test]
    fn seeds_depend_on_key_and_body() {
        let seed = |key: &str, body: &[u8]| {
            let headers = [(HeaderName::from_static(IDEMPOTENCY_KEY), HeaderValue::from_str(key).unwrap())];
            Keyed::of_http(&headers.into_iter().collect(), "/v1/completions", body).unwrap().unwrap().seed()
        };
        assert_eq!(seed("a", b"x"), seed("a", b"x"));
        assert_ne!(seed("a", b"x"), seed("b", b"x"));
        assert_ne!(seed("a", b"x"), seed("a", b"y"));
        assert_eq!(seed_of_prompt(7, 0), 7);
        assert_ne!(seed_of_prompt(7, 1), seed_of_prompt(7, 2));
    }
}
