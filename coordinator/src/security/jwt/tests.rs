use ring::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, Ed25519KeyPair, KeyPair};
use serde_json::json;

use super::*;

const NOW: f64 = 1_900_000_000.0;
/// Made with OpenSSL, good until 2_000_000_000.
const RSA_KEY: &str = r#"{"kty": "RSA", "kid": "r1", "n": "pnWEOlbOMKfJ5EwUasMrBUS1HyhD1avtYY9OBsZSJ4gb03QfhM0jsnAozUdrk4TpAVDb89ZhIECvUPFpzm5sWD_8k4KIGQTKsG4wzctrqTLfCYwnO0L4LD0YB29OvJfTX99vL7OdSMZTu6YpIr24-hkM8ZPUmaxeWA4dvvxRvUOxTafcqiIaYs83W_LTFyYV-Z-jufU-bVkYDOL955yRBeP0vjeIpMU6EgtgNhZMuSgGvcUUpmb74S3vmvMTMLCw_Pq_-aZw0OFIjTTud7Szdq3S2N2QQf6FLGN8_VX4xGGE1SmMC7Ws-nrDTs7okaEumwFIBtYxAB1skYMl3kVDuw", "e": "AQAB"}"#;
const RSA_TOKEN: &str = "eyJhbGciOiJSUzI1NiIsImtpZCI6InIxIn0.eyJzdWIiOiJzdmMiLCJleHAiOjIwMDAwMDAwMDAsImlzcyI6Imh0dHBzOi8vaXNzdWVyLmV4YW1wbGUifQ.WoCm2nr_vSrddYsQ0j6iPimPkcu5UWe2VFK7ZvKFYZr2KmDYEeae1bQ3MSIYfeR_tDSU6hdbrkdPY9qdZe48TUO4suEaGSdsXto8K4DGldukKKsRNo7xVWQ6DLFoi3CrlwRYNfsS0jK4G-eE6NZVTvPUavlXe5AAANNRCgbgrYGl5xhnjjDTtoC-wUvzyytgwGqV9CnppmpAcqmMfYlij6cGRkIh8ppSL2luU6ItV-FnkDEETluklqdbZK1foTmZlT1PKu2CYaKdTF7DyieGfGVryE0oWaPDRgMwFJgFCj_oOPaKbJg_n8leudKYTLw8h44yvAuFe-JUB-gzsifjGA";

fn text(bytes: &[u8]) -> String {
    URL_SAFE_NO_PAD.encode(bytes)
}

struct Issuer(Ed25519KeyPair);

impl Issuer {
    fn new(seed: u8) -> Self {
        Self(Ed25519KeyPair::from_seed_unchecked(&[seed; 32]).unwrap())
    }

    fn key(&self) -> Value {
        json!({"kty": "OKP", "crv": "Ed25519", "kid": "e1", "use": "sig", "x": text(self.0.public_key().as_ref())})
    }

    fn token(&self, header: &Value, claims: &Value) -> String {
        let signed = format!("{}.{}", text(header.to_string().as_bytes()), text(claims.to_string().as_bytes()));
        format!("{signed}.{}", text(self.0.sign(signed.as_bytes()).as_ref()))
    }

    fn says(&self, claims: &Value) -> String {
        self.token(&json!({"alg": "EdDSA", "kid": "e1"}), claims)
    }
}

fn set(keys: &[Value]) -> KeySet {
    KeySet::parse(json!({"keys": keys}).to_string().as_bytes()).unwrap()
}

fn config() -> JwtConfig {
    JwtConfig {
        jwks: String::new(),
        audience: Some("phalanx".to_owned()),
        issuer: Some("https://issuer.example".to_owned()),
        role_claim: "roles".to_owned(),
    }
}

fn claims() -> Value {
    json!({"sub": "a@b.example", "aud": ["other", "phalanx"], "iss": "https://issuer.example", "exp": NOW + 60.0, "nbf": NOW})
}

fn changed(field: &str, value: Value) -> Value {
    let mut claims = claims();
    claims[field] = value;
    claims
}

#[test]
fn a_token_says_who_and_what() {
    let issuer = Issuer::new(1);
    let keys = set(&[issuer.key()]);
    let found = |claims: &Value| check(&config(), &keys, &issuer.says(claims), NOW).map(|p| (p.name, p.role));
    assert_eq!(found(&claims()), Ok(("jwt:a@b.example".to_owned(), Role::User)));
    assert_eq!(found(&changed("roles", json!(["x", "admin"]))).unwrap().1, Role::Admin);
    assert_eq!(found(&changed("roles", json!("admin"))).unwrap().1, Role::Admin);
    assert_eq!(found(&changed("role", json!("admin"))).unwrap().1, Role::User, "another claim");
    assert_eq!(found(&changed("aud", json!("phalanx"))).unwrap().1, Role::User);
    let odd = found(&changed("sub", json!("a/b"))).unwrap().0;
    assert!(odd.starts_with("jwt:sha256:") && !odd.contains('/'), "{odd}");
    for (field, value, denied) in [
        ("exp", json!(NOW - 61.0), Denied::Expired),
        ("exp", Value::Null, Denied::Unknown),
        ("exp", json!("tomorrow"), Denied::Unknown),
        ("nbf", json!(NOW + 61.0), Denied::Early),
        ("aud", json!("other"), Denied::ForOthers),
        ("aud", json!({"phalanx": 1}), Denied::ForOthers),
        ("iss", json!("https://issuer.example.evil"), Denied::ForOthers),
        ("sub", json!(""), Denied::Unknown),
    ] {
        assert_eq!(found(&changed(field, value.clone())), Err(denied), "{field}: {value}");
    }
}

#[test]
fn only_what_the_issuer_has_signed_is_believed() {
    let (issuer, other) = (Issuer::new(1), Issuer::new(2));
    let keys = set(&[issuer.key()]);
    let denied = |token: &str| check(&config(), &keys, token, NOW).unwrap_err();
    assert_eq!(denied(&other.says(&claims())), Denied::Unknown);
    let unknown = issuer.token(&json!({"alg": "EdDSA", "kid": "e2"}), &claims());
    assert_eq!(denied(&unknown), Denied::UnknownSigner);
    for header in [
        json!({"alg": "none", "kid": "e1"}),
        json!({"alg": "HS256", "kid": "e1"}),
        json!({"alg": "RS256", "kid": "e1"}),
        json!({"alg": "EdDSA", "kid": "e1", "crit": ["b64"]}),
        json!({"kid": "e1"}),
    ] {
        assert_eq!(denied(&issuer.token(&header, &claims())), Denied::Unknown, "{header}");
    }
    let good = issuer.says(&claims());
    let forged = text(changed("sub", json!("root")).to_string().as_bytes());
    let parts: Vec<&str> = good.split('.').collect();
    assert_eq!(denied(&format!("{}.{forged}.{}", parts[0], parts[2])), Denied::Unknown);
    for cut in 0..good.len() {
        assert!(check(&config(), &keys, &good[..cut], NOW).is_err(), "{cut}");
    }
    // No name: any key of the set may have signed it.
    assert!(check(&config(), &keys, &issuer.token(&json!({"alg": "EdDSA"}), &claims()), NOW).is_ok());
}

#[test]
fn three_algorithms_are_known() {
    let any = JwtConfig { audience: None, issuer: None, ..config() };
    let rsa: Value = serde_json::from_str(RSA_KEY).unwrap();
    let random = ring::rand::SystemRandom::new();
    let pkcs8 = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &random).unwrap();
    let pair = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, pkcs8.as_ref(), &random).unwrap();
    let point = pair.public_key().as_ref();
    let p256 = json!({"kty": "EC", "crv": "P-256", "kid": "p1", "x": text(&point[1..33]), "y": text(&point[33..])});
    let strange = json!({"kty": "oct", "kid": "s", "k": "AAAA"});
    let keys = set(&[strange.clone(), rsa, p256]);
    let signed = format!("{}.{}", text(br#"{"alg":"ES256","kid":"p1"}"#), text(br#"{"sub":"p","exp":2000000000}"#));
    let signature = pair.sign(&random, signed.as_bytes()).unwrap();
    let token = format!("{signed}.{}", text(signature.as_ref()));
    assert!(Tokens::is_token(&token) && Tokens::is_token(RSA_TOKEN) && !Tokens::is_token("phx_00"));
    assert_eq!(check(&any, &keys, &token, NOW).unwrap().name, "jwt:p");
    assert_eq!(check(&any, &keys, RSA_TOKEN, NOW).unwrap().name, "jwt:svc");
    assert_eq!(check(&any, &keys, RSA_TOKEN, 2_000_000_061.0).unwrap_err(), Denied::Expired);
    assert!(KeySet::parse(json!({"keys": [strange]}).to_string().as_bytes()).is_err());
    assert!(KeySet::parse(b"{}").is_err());
}
