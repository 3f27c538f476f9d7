//! Public keys of whoever issues tokens, as RFC 7517 writes them, and what they have signed.

use ring::signature::{
    ECDSA_P256_SHA256_FIXED, ED25519, RSA_PKCS1_2048_8192_SHA256, RsaPublicKeyComponents, UnparsedPublicKey,
};
use serde::Deserialize;

use super::base64url;

/// What a token may be signed with. There is no secret among them that both sides share, and no `none`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub(super) enum Algorithm {
    #[serde(rename = "RS256")]
    Rs256,
    #[serde(rename = "ES256")]
    Es256,
    #[serde(rename = "EdDSA", alias = "Ed25519")]
    EdDsa,
}

/// A key for one algorithm.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Material {
    Rsa { n: Vec<u8>, e: Vec<u8> },
    P256(Vec<u8>),
    Ed25519(Vec<u8>),
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Key {
    id: Option<String>,
    material: Material,
}

/// The keys of a set that can be used here.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct KeySet(Vec<Key>);

#[derive(Deserialize)]
struct RawSet {
    keys: Vec<RawKey>,
}

#[derive(Deserialize)]
struct RawKey {
    kty: String,
    kid: Option<String>,
    r#use: Option<String>,
    alg: Option<String>,
    crv: Option<String>,
    n: Option<String>,
    e: Option<String>,
    x: Option<String>,
    y: Option<String>,
}

impl RawKey {
    /// `None` for keys of other kinds, and for those that are not for signatures.
    fn usable(self) -> Option<Key> {
        if self.r#use.is_some_and(|purpose| purpose != "sig") {
            return None;
        }
        let bytes = |text: Option<String>| base64url(&text?);
        let (material, algorithms): (_, &[&str]) = match (self.kty.as_str(), self.crv.as_deref()) {
            ("RSA", _) => (Material::Rsa { n: bytes(self.n)?, e: bytes(self.e)? }, &["RS256"]),
            ("EC", Some("P-256")) => {
                // Uncompressed: both coordinates.
                let (x, y) = (bytes(self.x)?, bytes(self.y)?);
                let is_whole = x.len() == 32 && y.len() == 32;
                (Material::P256(is_whole.then(|| [&[4], x.as_slice(), y.as_slice()].concat())?), &["ES256"])
            }
            ("OKP", Some("Ed25519")) => (Material::Ed25519(bytes(self.x)?), &["EdDSA", "Ed25519"]),
            _ => return None,
        };
        if self.alg.is_some_and(|alg| !algorithms.contains(&alg.as_str())) {
            return None;
        }
        Some(Key { id: self.kid, material })
    }
}

impl Key {
    fn has_signed(&self, algorithm: Algorithm, message: &[u8], signature: &[u8]) -> bool {
        match (algorithm, &self.material) {
            (Algorithm::Rs256, Material::Rsa { n, e }) => {
                RsaPublicKeyComponents { n, e }.verify(&RSA_PKCS1_2048_8192_SHA256, message, signature).is_ok()
            }
            (Algorithm::Es256, Material::P256(point)) => {
                UnparsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, point).verify(message, signature).is_ok()
            }
            (Algorithm::EdDsa, Material::Ed25519(point)) => {
                UnparsedPublicKey::new(&ED25519, point).verify(message, signature).is_ok()
            }
            _ => false,
        }
    }
}

impl KeySet {
    /// From a document.
    ///
    /// # Errors
    /// If it is none, or has no key that can be used here.
    pub(super) fn parse(text: &[u8]) -> Result<Self, String> {
        let raw: RawSet = serde_json::from_slice(text).map_err(|e| format!("no JSON Web Key Set: {e}"))?;
        let keys: Vec<Key> = raw.keys.into_iter().filter_map(RawKey::usable).collect();
        if keys.is_empty() {
            return Err("there is no key for RS256, ES256 or EdDSA in it".to_owned());
        }
        Ok(Self(keys))
    }

    /// Whether there is a key of this name; of none, whether there is any.
    pub(super) fn knows(&self, id: Option<&str>) -> bool {
        self.0.iter().any(|key| id.is_none() || key.id.as_deref() == id)
    }

    /// Whether one of the keys that the token may mean has signed this.
    pub(super) fn has_signed(&self, id: Option<&str>, algorithm: Algorithm, message: &[u8], signature: &[u8]) -> bool {
        let meant = self.0.iter().filter(|key| id.is_none() || key.id.as_deref() == id);
        meant.into_iter().any(|key| key.has_signed(algorithm, message, signature))
    }
}
