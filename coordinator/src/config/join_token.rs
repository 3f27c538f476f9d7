//! The secret that shards must know to join.

use std::{
    fmt,
    path::{Path, PathBuf},
};

use super::{ConfigError, wrong};

/// Fewest bytes of a token: anything shorter can be guessed.
const LEAST_BYTES: usize = 16;

/// A secret, and where it is from. Its `Debug` does not show it.
#[derive(Clone, PartialEq, Eq)]
pub struct JoinToken {
    secret: String,
    file: Option<PathBuf>,
}

impl fmt::Debug for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JoinToken").field("file", &self.file).finish_non_exhaustive()
    }
}

impl JoinToken {
    /// From the command line, else from a file (its surrounding white space does not count); `None` if neither is given.
    pub(super) fn from_flags(token: Option<String>, file: Option<PathBuf>) -> Result<Option<Self>, ConfigError> {
        let too_short = |n: usize| format!("has {n} bytes: want at least {LEAST_BYTES} (openssl rand -hex 32)");
        if let Some(secret) = token {
            let n = secret.len();
            return match n < LEAST_BYTES {
                true => Err(wrong("join-token", "(secret)", too_short(n))),
                false => Ok(Some(Self { secret, file: None })),
            };
        }
        let Some(file) = file else { return Ok(None) };
        let refused = |reason: String| wrong("join-token-file", file.display(), reason);
        let secret = std::fs::read_to_string(&file).map_err(|e| refused(e.to_string()))?.trim().to_owned();
        if secret.len() < LEAST_BYTES {
            return Err(refused(too_short(secret.len())));
        }
        Ok(Some(Self { secret, file: Some(file) }))
    }

    /// What shards say.
    pub fn secret(&self) -> &str {
        &self.secret
    }

    /// Where it is from, if from a file.
    pub fn file(&self) -> Option<&Path> {
        self.file.as_deref()
    }

    /// Whether a shard said the right thing. Takes as long for a wrong guess as for a right one of its length.
    pub fn admits(&self, said: &str) -> bool {
        let (want, got) = (self.secret.as_bytes(), said.as_bytes());
        let differs = want.iter().zip(got).fold(0u8, |differs, (a, b)| differs | (a ^ b));
        std::hint::black_box(differs) == 0 && want.len() == got.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_token_admits() {
        let token = JoinToken::from_flags(Some("0123456789abcdef".to_owned()), None).unwrap().unwrap();
        assert!(token.admits("0123456789abcdef"));
        for wrong in ["", "0123456789abcdeX", "0123456789abcdef0", "0123456789abcde"] {
            assert!(!token.admits(wrong), "{wrong}");
        }
        assert!(!format!("{token:?}").contains("0123"));
    }

    #[test]
    fn a_token_comes_from_a_file_and_is_not_short() {
        let file = std::env::temp_dir().join(format!("phalanx-token-{}", std::process::id()));
        std::fs::write(&file, "  0123456789abcdef\n").unwrap();
        let token = JoinToken::from_flags(None, Some(file.clone())).unwrap().unwrap();
        assert_eq!((token.secret(), token.file()), ("0123456789abcdef", Some(file.as_path())));
        std::fs::write(&file, "short\n").unwrap();
        let error = JoinToken::from_flags(None, Some(file.clone())).unwrap_err().to_string();
        assert!(error.contains("--join-token-file") && error.contains("5 bytes"), "{error}");
        std::fs::remove_file(&file).unwrap();
        assert!(JoinToken::from_flags(None, Some(file)).is_err());
        assert!(JoinToken::from_flags(Some("short".to_owned()), None).is_err());
        assert_eq!(JoinToken::from_flags(None, None).unwrap(), None);
    }
}
