//! Files of the cache: one process fetches at a time, and a finished file is known as such.

use std::fs::{File, TryLockError};
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::SourceError;
use crate::hex::hex;

/// Held while a file is fetched; let go when dropped, and by the system when the process dies.
pub(super) struct FetchLock {
    _file: File,
}

impl FetchLock {
    /// Waits until no other process fetches `target`. Its folder is made.
    pub(super) fn acquire(target: &Path) -> Result<Self, SourceError> {
        if let Some(folder) = target.parent() {
            std::fs::create_dir_all(folder).map_err(SourceError::file("create", folder))?;
        }
        let path = beside(target, "lock");
        let file = File::create(&path).map_err(SourceError::file("create", &path))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                tracing::info!(file = %target.display(), "another process fetches this model: waiting for it");
                file.lock().map_err(SourceError::file("lock", &path))?;
            }
            Err(TryLockError::Error(error)) => return Err(SourceError::file("lock", &path)(error)),
        }
        Ok(Self { _file: file })
    }
}

/// `target` with `.extension` after its whole name.
pub(super) fn beside(target: &Path, extension: &str) -> PathBuf {
    let mut name = target.as_os_str().to_owned();
    name.push(".");
    name.push(extension);
    name.into()
}

/// Says that a file was checked, so that gigabytes need not be hashed at every start.
#[derive(Debug, Serialize, Deserialize, PartialEq, Eq)]
struct Marker {
    bytes: u64,
    /// Time of the last change, in ns since 1970.
    modified_ns: u64,
    sha256: String,
}

/// Size and time of change, as the marker has them. `None` if there is no such file.
fn state(path: &Path) -> Option<(u64, u64)> {
    let metadata = std::fs::metadata(path).ok()?;
    let since = metadata.modified().ok()?.duration_since(UNIX_EPOCH).ok()?;
    Some((metadata.len(), u64::try_from(since.as_nanos()).ok()?))
}

/// Whether `target` is there, finished, unchanged since, and has the wanted checksum.
///
/// A file without a marker (copied into the cache by hand) is hashed, if there is a checksum to compare with.
pub(super) fn is_finished(target: &Path, sha256: Option<&str>) -> Result<bool, SourceError> {
    let Some((bytes, modified_ns)) = state(target) else { return Ok(false) };
    let marker = std::fs::read(beside(target, "ok")).ok().and_then(|text| serde_json::from_slice::<Marker>(&text).ok());
    if let Some(marker) = marker
        && (marker.bytes, marker.modified_ns) == (bytes, modified_ns)
    {
        return Ok(sha256.is_none_or(|sha256| sha256 == marker.sha256));
    }
    let Some(want) = sha256 else { return Ok(false) };
    let got = hash(target)?;
    if got == want {
        mark(target, got)?;
        return Ok(true);
    }
    Ok(false)
}

/// Makes `part` the finished `target`.
pub(super) fn finish(part: &Path, target: &Path, sha256: String) -> Result<(), SourceError> {
    std::fs::rename(part, target).map_err(SourceError::file("rename", part))?;
    mark(target, sha256)
}

fn mark(target: &Path, sha256: String) -> Result<(), SourceError> {
    let path = beside(target, "ok");
    let Some((bytes, modified_ns)) = state(target) else { return Ok(()) };
    let marker = serde_json::json!(Marker { bytes, modified_ns, sha256 }).to_string();
    let draft = beside(target, "ok.part");
    std::fs::write(&draft, marker).map_err(SourceError::file("write", &draft))?;
    std::fs::rename(&draft, &path).map_err(SourceError::file("rename", &draft))
}

/// SHA-256 of a file, in hexadecimal digits.
pub(super) fn hash(path: &Path) -> Result<String, SourceError> {
    let mut file = File::open(path).map_err(SourceError::file("read", path))?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer).map_err(SourceError::file("read", path))? {
            0 => return Ok(hex(&hasher.finalize())),
            n => hasher.update(&buffer[..n]),
        }
    }
}

/// Removes a file; that it is gone already is as good.
pub(super) fn remove(path: &Path) -> Result<(), SourceError> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(SourceError::file("remove", path)(error)),
        _ => Ok(()),
    }
}
