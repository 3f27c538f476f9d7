//! Bearer tokens that somebody else has issued (JWT, RFC 7519), checked with that one's public keys.

mod jwks;
mod source;

use std::sync::{Arc, PoisonError, RwLock};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use phalanx_cluster::hex::hex;
use serde::Deserialize;
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use self::{
    jwks::{Algorithm, KeySet},
    source::Refresher,
};
use super::{
    keys::{Denied, Principal, Role},
    limits::KeyLimits,
};

/// What a set of keys is called in logs and metrics.
pub(super) const KEYS: &str = "token keys";
/// Clocks may differ by this many seconds.
const LEEWAY_S: f64 = 60.0;
/// A longer token is none.
const LONGEST_TOKEN: usize = 16 << 10;
/// What names begin with of those who show tokens; no key's name can.
pub const NAMED: &str = "jwt:";
/// Longest subject that stands in names as it is.
const LONGEST_SUBJECT: usize = 64;

/// What is configured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JwtConfig {
    /// File, or `http(s)://` address, of the issuer's keys.
    pub jwks: String,
    /// Whom tokens must be for.
    pub audience: Option<String>,
    /// Who must have issued them.
    pub issuer: Option<String>,
    /// The claim that says `admin`, or has it in a list.
    pub role_claim: String,
}

/// Knows the issuer's keys.
pub struct Tokens {
    config: JwtConfig,
    keys: Arc<RwLock<KeySet>>,
    refresher: Refresher,
}

#[derive(Deserialize)]
struct Header {
    alg: Value,
    kid: Option<String>,
    /// Extensions that must be understood: none is.
    crit: Option<Value>,
}

impl Tokens {
    /// Reads the keys; they are read again from now on.
    ///
    /// # Errors
    /// If a file can't be read. An address may answer later.
    pub fn start(config: JwtConfig) -> anyhow::Result<Self> {
        if config.audience.is_none() {
            tracing::warn!("without --jwt-audience every token of the issuer is taken, whomever it was made for");
        }
        let keys = Arc::new(RwLock::new(KeySet::default()));
        let refresher = source::follow(&config.jwks, Arc::clone(&keys))?;
        Ok(Self { config, keys, refresher })
    }

    /// Whether a bearer looks like a token at all.
    pub fn is_token(shown: &str) -> bool {
        shown.starts_with("ey") && shown.len() <= LONGEST_TOKEN && shown.bytes().filter(|b| *b == b'.').count() == 2
    }

    /// Whose token this is. `now` is in seconds since 1970.
    ///
    /// # Errors
    /// If it is none of the issuer, not for us, or not for now.
    pub fn check(&self, token: &str, now: f64) -> Result<Principal, Denied> {
        let checked = check(&self.config, &self.keys.read().unwrap_or_else(PoisonError::into_inner), token, now);
        if checked.as_ref().is_err_and(|denied| *denied == Denied::UnknownSigner) {
            // The issuer may have new ones.
            self.refresher.ask();
        }
        checked
    }
}

/// The same without anything around it.
fn check(config: &JwtConfig, keys: &KeySet, token: &str, now: f64) -> Result<Principal, Denied> {
    let (signed, signature) = token.rsplit_once('.').ok_or(Denied::Unknown)?;
    let (header, claims) = signed.split_once('.').ok_or(Denied::Unknown)?;
    let decoded = |part: &str| base64url(part).ok_or(Denied::Unknown);
    let header: Header = serde_json::from_slice(&decoded(header)?).map_err(|_| Denied::Unknown)?;
    if header.crit.is_some() {
        return Err(Denied::Unknown);
    }
    let algorithm: Algorithm = serde_json::from_value(header.alg).map_err(|_| Denied::Unknown)?;
    let id = header.kid.as_deref();
    if !keys.knows(id) {
        return Err(Denied::UnknownSigner);
    }
    if !keys.has_signed(id, algorithm, signed.as_bytes(), &decoded(signature)?) {
        return Err(Denied::Unknown);
    }
    let claims: Map<String, Value> = serde_json::from_slice(&decoded(claims)?).map_err(|_| Denied::Unknown)?;
    let moment = |name: &str| match claims.get(name) {
        None => Ok(None),
        Some(value) => value.as_f64().map(Some).ok_or(Denied::Unknown),
    };
    // A token that never ends could not be taken back.
    if now >= moment("exp")?.ok_or(Denied::Unknown)? + LEEWAY_S {
        return Err(Denied::Expired);
    }
    if moment("nbf")?.is_some_and(|begin| now < begin - LEEWAY_S) {
        return Err(Denied::Early);
    }
    let is_or_has = |name: &str, want: &str| match claims.get(name) {
        Some(Value::String(one)) => one == want,
        Some(Value::Array(all)) => all.iter().any(|one| one == want),
        _ => false,
    };
    if config.audience.as_ref().is_some_and(|audience| !is_or_has("aud", audience)) {
        return Err(Denied::ForOthers);
    }
    if config.issuer.as_ref().is_some_and(|issuer| claims.get("iss").and_then(Value::as_str) != Some(issuer)) {
        return Err(Denied::ForOthers);
    }
    let subject = claims.get("sub").and_then(Value::as_str).filter(|sub| !sub.is_empty()).ok_or(Denied::Unknown)?;
    let role = if is_or_has(&config.role_claim, Role::Admin.as_str()) { Role::Admin } else { Role::User };
    Ok(Principal::unrevokable(name(subject), role, KeyLimits::default()))
}

/// Names of keys have no colon: no subject can have the name of one.
fn name(subject: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_.@|".contains(c);
    if subject.len() <= LONGEST_SUBJECT && subject.chars().all(is_plain) {
        return format!("{NAMED}{subject}");
    }
    let digest: [u8; 32] = Sha256::digest(subject.as_bytes()).into();
    format!("{NAMED}sha256:{}", hex(&digest[..16]))
}

fn base64url(text: &str) -> Option<Vec<u8>> {
    URL_SAFE_NO_PAD.decode(text.trim_end_matches('=')).ok()
}

#[cfg(test)]
mod tests;
