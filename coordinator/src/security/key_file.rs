//! The file of keys: who has one, what it may do, and its hash. Not the key itself, which nobody can get back.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::{
    keys::{KeyHash, KeyRecord, Role},
    limits::KeyLimits,
};

/// Of the format.
const VERSION: u32 = 1;
/// A longer file is no file of keys.
const MOST_BYTES: u64 = 16 << 20;
/// Longest name of a key, in characters.
const LONGEST_NAME: usize = 64;

/// Why there are no keys.
#[derive(Debug, thiserror::Error)]
pub enum KeyFileError {
    /// The file can't be read or written.
    #[error("{}: {error}", path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// The file holds something else.
    #[error("no file of keys: {0}; `coordinator key add` makes one")]
    Content(String),
    /// The change is impossible.
    #[error("{0}")]
    Change(String),
}

/// A key, as it lies in the file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StoredKey {
    /// Of whom it is.
    pub name: String,
    /// SHA-256 of the key, in hexadecimal digits.
    pub sha256: String,
    /// What it may do.
    #[serde(default)]
    pub role: Role,
    /// Requests in a minute.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rpm: Option<u64>,
    /// Tokens in a minute.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tpm: Option<u64>,
    /// Requests at the same time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub concurrency: Option<u32>,
    /// Tokens of a prompt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_prompt_tokens: Option<u32>,
    /// Tokens of a choice.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_output_tokens: Option<u32>,
    /// When it was made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub created: Option<Timestamp>,
    /// From when on it is worth nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires: Option<Timestamp>,
    /// When it was revoked, if it was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revoked: Option<Timestamp>,
}

/// All keys of a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KeyFile {
    version: u32,
    /// In the order in which they were made.
    pub keys: Vec<StoredKey>,
}

impl Default for KeyFile {
    fn default() -> Self {
        Self { version: VERSION, keys: Vec::new() }
    }
}

impl KeyFile {
    /// From a file's text.
    ///
    /// # Errors
    /// If it is none, a hash is none, or two keys in force have the same name or hash.
    pub fn parse(text: &[u8]) -> Result<Self, KeyFileError> {
        let wrong = |reason: String| KeyFileError::Content(reason);
        let file: Self = serde_json::from_slice(text).map_err(|e| wrong(e.to_string()))?;
        if file.version != VERSION {
            return Err(wrong(format!("its version is {}, known is {VERSION}", file.version)));
        }
        file.check().map_err(wrong)?;
        Ok(file)
    }

    fn check(&self) -> Result<(), String> {
        let (mut names, mut hashes) = (BTreeSet::new(), BTreeSet::new());
        for key in &self.keys {
            check_name(&key.name)?;
            if KeyHash::parse(&key.sha256).is_none() {
                return Err(format!("the sha256 of {:?} must have 64 hexadecimal digits", key.name));
            }
            if !hashes.insert(key.sha256.to_ascii_lowercase()) {
                return Err(format!("two keys have the hash of {:?}", key.name));
            }
            if key.revoked.is_none() && !names.insert(key.name.as_str()) {
                return Err(format!("two keys are called {:?}", key.name));
            }
        }
        Ok(())
    }

    /// Keys that were not revoked.
    pub fn records(&self) -> Vec<KeyRecord> {
        let in_force = self.keys.iter().filter(|key| key.revoked.is_none());
        // Parsing has checked the hashes.
        in_force
            .filter_map(|key| Some((key, KeyHash::parse(&key.sha256)?)))
            .map(|(key, hash)| key.record(hash))
            .collect()
    }

    /// Adds a key. One of the same name that was revoked is forgotten.
    ///
    /// # Errors
    /// If one of this name is in force, or the name is none.
    pub fn add(&mut self, key: StoredKey) -> Result<(), KeyFileError> {
        check_name(&key.name).map_err(KeyFileError::Change)?;
        if self.keys.iter().any(|k| k.name == key.name && k.revoked.is_none()) {
            let reason = format!("there is a key {:?} already: revoke it first, or take another name", key.name);
            return Err(KeyFileError::Change(reason));
        }
        self.keys.retain(|k| k.name != key.name);
        self.keys.push(key);
        Ok(())
    }

    /// Revokes a key.
    ///
    /// # Errors
    /// If none of this name is in force.
    pub fn revoke(&mut self, name: &str, now: Timestamp) -> Result<(), KeyFileError> {
        match self.keys.iter_mut().find(|k| k.name == name && k.revoked.is_none()) {
            Some(key) => key.revoked = Some(now),
            None => {
                let known: Vec<&str> =
                    self.keys.iter().filter(|k| k.revoked.is_none()).map(|k| k.name.as_str()).collect();
                let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
                let reason = format!("no key {name:?} is in force; in force: {known}");
                return Err(KeyFileError::Change(reason));
            }
        }
        Ok(())
    }

    /// Reads a file.
    ///
    /// # Errors
    /// If it can't be read, or is none.
    pub fn read(path: &Path) -> Result<Self, KeyFileError> {
        let failed = |error| KeyFileError::Io { path: path.to_owned(), error };
        Self::parse(&read_bounded(path).map_err(failed)?)
    }

    /// Changes a file, or makes it. Nobody sees half of a change, and of two at the same time none is lost.
    ///
    /// # Errors
    /// If `change` refuses, or the file can't be read or written; then it is as it was.
    pub fn change(path: &Path, change: impl FnOnce(&mut Self) -> Result<(), KeyFileError>) -> Result<(), KeyFileError> {
        // A link stays one: what it names is changed.
        let path = &fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
        let failed = |error| KeyFileError::Io { path: path.clone(), error };
        let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let folder = File::open(folder).map_err(failed)?;
        folder.lock().map_err(failed)?;
        let mut file = match read_bounded(path) {
            Ok(text) => Self::parse(&text)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Self::default(),
            Err(error) => return Err(failed(error)),
        };
        change(&mut file)?;
        let mut text = serde_json::to_string_pretty(&file).map_err(|e| failed(e.into()))?;
        text.push('\n');
        let temporary = path.with_extension(format!("{}.new", std::process::id()));
        let written = write(&temporary, text.as_bytes()).and_then(|()| fs::rename(&temporary, path));
        if let Err(error) = written {
            // What is left of it is of no use.
            let _ = fs::remove_file(&temporary);
            return Err(failed(error));
        }
        folder.sync_all().map_err(failed)
    }
}

impl StoredKey {
    fn record(&self, hash: KeyHash) -> KeyRecord {
        let limits = KeyLimits {
            requests_per_minute: self.rpm,
            tokens_per_minute: self.tpm,
            concurrency: self.concurrency,
            max_prompt_tokens: self.max_prompt_tokens,
            max_output_tokens: self.max_output_tokens,
        };
        KeyRecord { name: self.name.clone(), hash, role: self.role, limits, expires: self.expires }
    }
}

/// Names stand in logs, metrics and ids of streams.
fn check_name(name: &str) -> Result<(), String> {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_.@".contains(c);
    if name.is_empty() || name.len() > LONGEST_NAME || !name.chars().all(is_plain) {
        return Err(format!("the name {name:?} must be 1 to {LONGEST_NAME} letters, digits and -_.@"));
    }
    Ok(())
}

/// Reads a file that must not be endless.
fn read_bounded(path: &Path) -> io::Result<Vec<u8>> {
    use io::Read;
    let mut text = Vec::new();
    File::open(path)?.take(MOST_BYTES + 1).read_to_end(&mut text)?;
    if text.len() as u64 > MOST_BYTES {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, format!("is longer than {MOST_BYTES} bytes")));
    }
    Ok(text)
}

fn write(path: &Path, text: &[u8]) -> io::Result<()> {
    let mut file = File::options().write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(text)?;
    file.sync_all()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn key(name: &str, secret: &str) -> StoredKey {
        StoredKey {
            name: name.to_owned(),
            sha256: KeyHash::of(secret).to_string(),
            role: Role::User,
            rpm: Some(5),
            tpm: None,
            concurrency: None,
            max_prompt_tokens: None,
            max_output_tokens: None,
            created: None,
            expires: None,
            revoked: None,
        }
    }

    #[test]
    fn keys_come_and_go() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("keys.json");
        KeyFile::change(&path, |file| file.add(key("a", "1"))).unwrap();
        KeyFile::change(&path, |file| file.add(key("b", "2"))).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let twice = KeyFile::change(&path, |file| file.add(key("a", "3"))).unwrap_err().to_string();
        assert!(twice.contains("\"a\" already"), "{twice}");
        KeyFile::change(&path, |file| file.revoke("a", Timestamp::UNIX_EPOCH)).unwrap();
        let gone = KeyFile::change(&path, |file| file.revoke("a", Timestamp::UNIX_EPOCH)).unwrap_err().to_string();
        assert!(gone.contains("in force: b"), "{gone}");
        let names =
            |path: &Path| KeyFile::read(path).unwrap().records().into_iter().map(|r| r.name).collect::<Vec<_>>();
        assert_eq!(names(&path), ["b"]);
        KeyFile::change(&path, |file| file.add(key("a", "4"))).unwrap();
        assert_eq!(names(&path), ["b", "a"]);
        assert_eq!(KeyFile::read(&path).unwrap().keys.len(), 2);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "nothing else is left there");
        assert!(!fs::read_to_string(&path).unwrap().contains("phx_"));
    }

    #[test]
    fn changes_at_the_same_time_are_all_there() {
        let dir = tempfile::tempdir().unwrap();
        let path = &dir.path().join("keys.json");
        std::thread::scope(|scope| {
            for i in 0..8 {
                // Names of temporary files are the process's: here the lock alone keeps them apart.
                scope.spawn(move || KeyFile::change(path, |f| f.add(key(&format!("k{i}"), &i.to_string()))).unwrap());
            }
        });
        assert_eq!(KeyFile::read(path).unwrap().records().len(), 8);
    }

    #[test]
    fn other_files_are_refused() {
        let hash = KeyHash::of("x").to_string();
        let file = |keys: &str| format!(r#"{{"version": 1, "keys": [{keys}]}}"#);
        let good = format!(r#"{{"name": "a", "sha256": "{hash}"}}"#);
        assert_eq!(KeyFile::parse(file(&good).as_bytes()).unwrap().records().len(), 1);
        for wrong in [
            String::new(),
            "[]".to_owned(),
            r#"{"version": 2, "keys": []}"#.to_owned(),
            file(r#"{"name": "a", "sha256": "abc"}"#),
            file(&format!(r#"{{"name": "a b", "sha256": "{hash}"}}"#)),
            file(&format!(r#"{{"name": "a", "sha256": "{hash}", "rmp": 5}}"#)),
            file(&format!(r#"{{"name": "a", "sha256": "{hash}", "role": "root"}}"#)),
            file(&format!("{good}, {good}")),
            file(&good)[..20].to_owned(),
        ] {
            assert!(KeyFile::parse(wrong.as_bytes()).is_err(), "{wrong}");
        }
    }
}
