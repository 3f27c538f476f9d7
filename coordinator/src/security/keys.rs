//! Who may ask: keys, whom they stand for, and how a request shows one.

use std::{
    fmt,
    sync::{Arc, PoisonError, RwLock},
};

use http::{HeaderMap, header};
use jiff::Timestamp;
use phalanx_cluster::hex::hex;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;
use tokio::sync::watch;

use super::limits::KeyLimits;

/// What every key that we make begins with, so that scanners for secrets know one.
pub const PREFIX: &str = "phx_";
/// Random bytes of a key that we make.
const KEY_BYTES: usize = 32;
/// Header in which clients of Anthropic's API send their key.
const X_API_KEY: &str = "x-api-key";

/// What a key may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Everything that is no administration.
    #[default]
    User,
    /// Everything.
    Admin,
}

impl Role {
    /// As flags and files spell it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::User => "user",
            Self::Admin => "admin",
        }
    }
}

/// SHA-256 of a key: keys have more entropy than anybody can guess, so a slow hash would protect nothing.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct KeyHash([u8; 32]);

impl KeyHash {
    /// Of a key as clients send it.
    pub fn of(key: &str) -> Self {
        Self(Sha256::digest(key.as_bytes()).into())
    }

    /// From 64 hexadecimal digits.
    pub fn parse(text: &str) -> Option<Self> {
        let digits = text.as_bytes();
        let mut hash = [0; 32];
        if digits.len() != 64 {
            return None;
        }
        for (byte, pair) in hash.iter_mut().zip(digits.chunks_exact(2)) {
            let digit = |d: u8| char::from(d).to_digit(16).and_then(|d| u8::try_from(d).ok());
            *byte = digit(pair[0])? << 4 | digit(pair[1])?;
        }
        Some(Self(hash))
    }
}

impl fmt::Display for KeyHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex(&self.0))
    }
}

impl fmt::Debug for KeyHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A new key. Nobody else has it.
///
/// # Errors
/// If the system has no randomness.
pub fn new_key() -> std::io::Result<String> {
    let mut bytes = [0u8; KEY_BYTES];
    let mut filled = 0;
    while filled < KEY_BYTES {
        filled += rustix::rand::getrandom(&mut bytes[filled..], rustix::rand::GetRandomFlags::empty())?;
    }
    Ok(format!("{PREFIX}{}", hex(&bytes)))
}

/// A key before anybody has shown it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyRecord {
    /// Of whom it is, in logs and in the audit log.
    pub name: String,
    /// Of the key.
    pub hash: KeyHash,
    /// What it may do.
    pub role: Role,
    /// How much.
    pub limits: KeyLimits,
    /// From when on it is worth nothing.
    pub expires: Option<Timestamp>,
}

/// Whoever has shown a key, or a token.
#[derive(Debug, Clone)]
pub struct Principal {
    /// Name of the key.
    pub name: String,
    /// What it may do.
    pub role: Role,
    /// How much.
    pub limits: KeyLimits,
    revoked: Option<watch::Receiver<bool>>,
}

impl Principal {
    /// Somebody whose right is not taken away before it ends by itself.
    pub fn unrevokable(name: String, role: Role, limits: KeyLimits) -> Self {
        Self { name, role, limits, revoked: None }
    }

    /// Ends when the key is revoked.
    pub fn revoked(&self) -> impl Future<Output = ()> + Send + 'static + use<> {
        let revoked = self.revoked.clone();
        async move {
            if let Some(mut revoked) = revoked
                && revoked.wait_for(|is_revoked| *is_revoked).await.is_ok()
            {
                return;
            }
            std::future::pending().await
        }
    }
}

/// Why somebody is not let in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Denied {
    /// No key was shown.
    #[error("an API key is needed: send it as 'Authorization: Bearer KEY'")]
    Missing,
    /// Nobody has this key, or it was revoked.
    #[error("this API key is not known, or was revoked")]
    Unknown,
    /// It was one.
    #[error("this API key or token has expired")]
    Expired,
    /// It will be one.
    #[error("this token is not good yet")]
    Early,
    /// It is a token of somebody else, or for somebody else.
    #[error("this token was issued by, or for, somebody else")]
    ForOthers,
    /// A token whose signer nobody knows.
    #[error("the key that this token is signed with is not known")]
    UnknownSigner,
}

impl Denied {
    /// All of them.
    pub const ALL: [Self; 6] =
        [Self::Missing, Self::Unknown, Self::Expired, Self::Early, Self::ForOthers, Self::UnknownSigner];

    /// As metrics spell it.
    pub fn reason(self) -> &'static str {
        match self {
            Self::Missing => "missing",
            Self::Unknown => "unknown",
            Self::Expired => "expired",
            Self::Early => "early",
            Self::ForOthers => "for_others",
            Self::UnknownSigner => "unknown_signer",
        }
    }
}

struct Entry {
    hash: KeyHash,
    expires: Option<Timestamp>,
    principal: Arc<Principal>,
    revoke: watch::Sender<bool>,
}

/// All keys that are in force.
#[derive(Default)]
pub struct KeyRing(RwLock<Vec<Entry>>);

impl KeyRing {
    /// Holds these.
    pub fn new(records: Vec<KeyRecord>) -> Self {
        let ring = Self::default();
        ring.replace(records);
        ring
    }

    /// From now on these count and no others; what runs under one that is gone hears of it.
    pub fn replace(&self, records: Vec<KeyRecord>) {
        // Entries are replaced as a whole.
        let mut entries = self.0.write().unwrap_or_else(PoisonError::into_inner);
        let mut old = std::mem::take(&mut *entries);
        for KeyRecord { name, hash, role, limits, expires } in records {
            let known = old.iter().position(|e| e.hash == hash && e.principal.name == name);
            let revoke = known.map_or_else(|| watch::Sender::new(false), |index| old.swap_remove(index).revoke);
            let revoked = Some(revoke.subscribe());
            let principal = Arc::new(Principal { name, role, limits, revoked });
            entries.push(Entry { hash, expires, principal, revoke });
        }
        for gone in old {
            gone.revoke.send_replace(true);
        }
    }

    /// Whose key this is.
    ///
    /// # Errors
    /// If it is nobody's, or no longer.
    pub fn find(&self, key: &str, now: Timestamp) -> Result<Arc<Principal>, Denied> {
        let hash = KeyHash::of(key);
        let entries = self.0.read().unwrap_or_else(PoisonError::into_inner);
        // All of them are looked at: time must not tell how much of a guess was right.
        let mut found = None;
        for entry in entries.iter() {
            if bool::from(entry.hash.0.ct_eq(&hash.0)) {
                found = Some(entry);
            }
        }
        match found {
            None => Err(Denied::Unknown),
            Some(entry) if entry.expires.is_some_and(|end| now >= end) => Err(Denied::Expired),
            Some(entry) => Ok(Arc::clone(&entry.principal)),
        }
    }

    /// Who has a name.
    ///
    /// # Errors
    /// If no key of his is in force.
    pub fn find_named(&self, name: &str, now: Timestamp) -> Result<Arc<Principal>, Denied> {
        let entries = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let mut of_name = entries.iter().filter(|entry| entry.principal.name == name).peekable();
        let gone = if of_name.peek().is_some() { Denied::Expired } else { Denied::Unknown };
        let in_force = of_name.find(|entry| entry.expires.is_none_or(|end| now < end));
        in_force.map(|entry| Arc::clone(&entry.principal)).ok_or(gone)
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.read().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// Whether nobody can be let in.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// What a request shows: the token behind `Authorization: Bearer`, else `x-api-key`.
pub fn shown(headers: &HeaderMap) -> Option<&str> {
    let bearer = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok()).and_then(|value| {
        let (scheme, token) = value.trim().split_once(' ')?;
        scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
    });
    let named = || headers.get(X_API_KEY).and_then(|value| value.to_str().ok()).map(str::trim);
    bearer.or_else(named).filter(|key| !key.is_empty())
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    fn record(name: &str, key: &str) -> KeyRecord {
        let (role, limits) = (Role::User, KeyLimits::default());
        KeyRecord { name: name.to_owned(), hash: KeyHash::of(key), role, limits, expires: None }
    }

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    #[test]
    fn keys_are_found_by_what_they_are() {
        let expiring = KeyRecord { expires: Some(at(100)), ..record("b", "key-b") };
        let ring = KeyRing::new(vec![record("a", "key-a"), expiring]);
        assert_eq!(ring.find("key-a", at(0)).unwrap().name, "a");
        assert_eq!(ring.find("key-b", at(99)).unwrap().name, "b");
        assert_eq!(ring.find("key-b", at(100)).unwrap_err(), Denied::Expired);
        assert_eq!(ring.find_named("b", at(99)).unwrap().name, "b");
        assert_eq!(ring.find_named("b", at(100)).unwrap_err(), Denied::Expired);
        assert_eq!(ring.find_named("key-a", at(0)).unwrap_err(), Denied::Unknown);
        for wrong in ["", "key-", "key-ab", "KEY-A", &KeyHash::of("key-a").to_string()] {
            assert_eq!(ring.find(wrong, at(0)).unwrap_err(), Denied::Unknown, "{wrong}");
        }
    }

    #[test]
    fn what_runs_hears_of_its_end_and_only_of_its_own() {
        let ring = KeyRing::new(vec![record("a", "key-a"), record("b", "key-b")]);
        let (a, b) = (ring.find("key-a", at(0)).unwrap(), ring.find("key-b", at(0)).unwrap());
        let (mut a, mut b) = (Box::pin(a.revoked()), Box::pin(b.revoked()));
        let wider = KeyLimits { concurrency: Some(9), ..KeyLimits::default() };
        ring.replace(vec![KeyRecord { limits: wider, ..record("b", "key-b") }, record("c", "key-c")]);
        assert!((&mut a).now_or_never().is_some());
        assert!((&mut b).now_or_never().is_none());
        assert_eq!(ring.find("key-a", at(0)).unwrap_err(), Denied::Unknown);
        assert_eq!(ring.find("key-b", at(0)).unwrap().limits, wider);
        // Another key under the old name.
        ring.replace(vec![record("b", "key-b2")]);
        assert!((&mut b).now_or_never().is_some());
    }

    #[test]
    fn new_keys_are_long_and_differ() {
        let (one, other) = (new_key().unwrap(), new_key().unwrap());
        assert!(one.starts_with(PREFIX) && one.len() == PREFIX.len() + 2 * KEY_BYTES && one != other);
        let hash = KeyHash::of(&one);
        assert_eq!(KeyHash::parse(&hash.to_string()), Some(hash));
        assert!(KeyHash::parse("xyz").is_none() && KeyHash::parse(&"g".repeat(64)).is_none());
    }

    #[test]
    fn keys_are_shown_in_two_headers() {
        let headers = |pairs: &[(&'static str, &str)]| -> HeaderMap {
            pairs.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap())).collect()
        };
        assert_eq!(shown(&headers(&[("authorization", "Bearer k1"), ("x-api-key", "k2")])), Some("k1"));
        assert_eq!(shown(&headers(&[("authorization", "bearer   k1 ")])), Some("k1"));
        assert_eq!(shown(&headers(&[("authorization", "Basic abc"), ("x-api-key", "k2")])), Some("k2"));
        for none in [&[("authorization", "Bearer ")][..], &[("authorization", "k1")], &[("x-api-key", "")], &[]] {
            assert_eq!(shown(&headers(none)), None);
        }
    }
}
