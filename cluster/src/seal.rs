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

    /// Of no tokens, in a room of its own: what begins with another salt, or with none, has other seals.
    pub fn root(salt: &str) -> Self {
        let mut hasher = Sha256::new();
        hasher.update(Sha256::digest(salt));
        // A chain's links are a seal and whole tokens: none is as long as this.
        hasher.update([0]);
        Self::cut(&hasher.finalize())
    }

    fn cut(digest: &[u8]) -> Self {
        let mut seal = [0; SEAL_BYTES];
        seal.copy_from_slice(&digest[..SEAL_BYTES]);
        Self(seal)
    }

    /// Of the prefix that is one block longer: `tokens` are that block's. O(tokens).
    pub fn then(self, tokens: &[TokenId]) -> Self {
        let mut hasher = Sha256::new();
        hasher.update(self.0);
        tokens.iter().for_each(|token| hasher.update(token.to_le_bytes()));
        Self::cut(&hasher.finalize())
    }

    /// Of all whole blocks of `tokens`. O(tokens).
    pub fn of(tokens: &[TokenId], block_size: usize) -> Self {
        Self::EMPTY.then_all(tokens, block_size)
    }

    /// Of the prefix that is longer by all whole blocks of `tokens`. O(tokens).
    pub fn then_all(self, tokens: &[TokenId], block_size: usize) -> Self {
        tokens.chunks_exact(block_size.max(1)).fold(self, Self::then)
    }

    /// For the wire.
    pub fn bytes(self) -> [u8; SEAL_BYTES] {
        self.0
    }

    /// From the wire, where no bytes are no tokens; `None` if they are no seal.
    pub fn from_slice(bytes: &[u8]) -> Option<Self> {
        if bytes.is_empty() { Some(Self::EMPTY) } else { bytes.try_into().ok().map(Self) }
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
    fn each_salt_has_seals_of_its_own() {
        let roots = [Seal::EMPTY, Seal::root(""), Seal::root("a"), Seal::root("b"), Seal::root("ab")];
        for (index, one) in roots.iter().enumerate() {
            for other in &roots[..index] {
                assert_ne!(one, other);
                assert_ne!(one.then_all(&[1, 2, 3, 4], 2), other.then_all(&[1, 2, 3, 4], 2));
            }
            assert_eq!(Seal::from_slice(&one.bytes()), Some(*one));
        }
        assert_eq!(Seal::root("a"), Seal::root("a"));
        assert_eq!((Seal::from_slice(&[]), Seal::from_slice(&[1; 15])), (Some(Seal::EMPTY), None));
    }

    #[test]
    fn every_process_and_version_gives_the_same_seals() {
        let want = [0xb2, 0xe7];
        assert_eq!(Seal::of(&[1, 2, 3, 4], 2).bytes()[..2], want);
    }
}
