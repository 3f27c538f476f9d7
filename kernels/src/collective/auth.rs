//! Proofs that a caller knows the secret of its epoch, without sending it.
//!
//! HMAC with SHA-256 (RFC 2104), each use under its own label, so that no proof can stand for another.

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

/// Size of a proof in bytes.
pub const PROOF_BYTES: usize = 32;

fn keyed(secret: &[u8], label: &str, message: &[u8]) -> Hmac<Sha256> {
    let mut mac = Hmac::<Sha256>::new_from_slice(secret).expect("HMAC takes keys of any length");
    mac.update(&(label.len() as u64).to_le_bytes());
    mac.update(label.as_bytes());
    mac.update(message);
    mac
}

/// What only a holder of the secret can compute for this label and message.
pub fn prove(secret: &[u8], label: &str, message: &[u8]) -> [u8; PROOF_BYTES] {
    keyed(secret, label, message).finalize().into_bytes().into()
}

/// Whether the proof is right, in constant time.
pub fn verify(secret: &[u8], label: &str, message: &[u8], proof: &[u8; PROOF_BYTES]) -> bool {
    keyed(secret, label, message).verify_slice(proof).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_proof_holds_for_its_secret_label_and_message_only() {
        let proof = prove(b"secret", "label", b"message");
        assert!(verify(b"secret", "label", b"message", &proof));
        assert!(!verify(b"Secret", "label", b"message", &proof));
        assert!(!verify(b"secret", "labelm", b"essage", &proof));
        assert!(!verify(b"secret", "label", b"massage", &proof));
    }
}
