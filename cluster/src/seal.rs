//! Names of what full KV blocks hold.
//!
//! The rows of a block depend on all tokens from position 0 to its end and on nothing else, so these tokens name its
//! content. A seal is that name: a hash chain over blocks. Shards seal blocks when they have computed them; coordinators
//! seal the tokens that they know; equal seals are the same tokens, whoever computed them, in whatever epoch.

use sha2::{Digest, Sha256};

use crate::id::TokenId;

/// Bytes of a seal.
pub const SEAL_BYTES: usize = 16;

/// Names the tokens of a prefix that is a whole number of blocks long.
///
/// 128 bits of SHA-256: nobody finds other tokens for a given seal. Two prefixes of one's own choice with one seal take
/// 2^64 attempts, and harm nobody but who sends both.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Seal([u8; SEAL_BYTES]);

impl Seal {
    /// Of no tokens.
    pub const EMPTY: Self = Self([0; SEAL_BYTES]);

    /// Of the prefix that is one block longer: `tokens` are that block's. O(tokens).
    pub fn then(self, tokens: &[TokenId]) -> Self {
        let mut hasher = Sha256::new();
        hasher.update(self.0);
        tokens.iter().for_each(|token| hasher.update(token.to_le_bytes()));
        let mut seal = [0; SEAL_BYTES];
        seal.copy_from_slice(&hasher.finalize()[..SEAL_BYTES]);
        Self(seal)
    }

    /// Of all whole blocks of `tokens`. O(tokens).
    pub fn of(tokens: &[TokenId], block_size: usize) -> Self {
        tokens.chunks_exact(block_size.max(1)).fold(Self::EMPTY, Self::then)
    }

    /// For the wire.
    pub fn bytes(self) -> [u8; SEAL_BYTES] {
        self.0
    }

    /// From the wire.
    pub fn from_bytes(bytes: [u8; SEAL_BYTES]) -> Self {
        Self(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seals_name_the_whole_prefix() {
        let seal = Seal::of(&[1, 2, 3, 4, 5], 2);
        assert_eq!(seal, Seal::EMPTY.then(&[1, 2]).then(&[3, 4]), "what fills no block does not count");
        assert_ne!(seal, Seal::of(&[1, 9, 3, 4], 2));
        assert_ne!(seal, Seal::of(&[3, 4], 2));
        assert_ne!(seal, Seal::of(&[1, 2, 3, 4], 4));
        assert_eq!(Seal::from_bytes(seal.bytes()), seal);
    }

    #[test]
    fn every_process_and_version_gives_the_same_seals() {
        let want = [0xb2, 0xe7];
        assert_eq!(Seal::of(&[1, 2, 3, 4], 2).bytes()[..2], want);
    }
}
