//! Where membership lives: small records under string keys, with leases, compare-and-swap and watches.
//!
//! A store holds who is in the cluster and which epoch is in force; it is never on the path of a token. A kind of store
//! is one module, one line in [`KINDS`], and passes the suite in `contract.rs`.

#[cfg(test)]
mod contract;
pub mod election;
pub mod embedded;
pub mod etcd;

use std::{path::PathBuf, pin::Pin, sync::Arc, time::Duration};

use async_trait::async_trait;
use futures::{Stream, future::BoxFuture};

/// Counts the store's changes; never goes back. 0 is before the first change.
pub type Revision = u64;

/// Name of a lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
pub struct LeaseId(pub i64);

/// A value with its key.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Record {
    /// Full key.
    pub key: String,
    /// Whatever was put.
    #[serde(with = "readable")]
    pub value: Vec<u8>,
    /// The store's revision at the record's last change.
    pub mod_revision: Revision,
    /// The lease that it dies with.
    pub lease: Option<LeaseId>,
}

/// Values as text where they are text, so that people can read a store's file; else as a list of bytes.
mod readable {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Form {
        Text(String),
        Bytes(Vec<u8>),
    }

    pub fn serialize<S: Serializer>(value: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        match std::str::from_utf8(value) {
            Ok(text) => text.serialize(serializer),
            Err(_) => value.serialize(serializer),
        }
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
        Ok(match Form::deserialize(deserializer)? {
            Form::Text(text) => text.into_bytes(),
            Form::Bytes(bytes) => bytes,
        })
    }
}

/// All records under a prefix at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listing {
    /// In key order.
    pub records: Vec<Record>,
    /// The moment: a watch after this revision misses nothing.
    pub revision: Revision,
}

/// What a compare-and-swap wants to find.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expected {
    /// No such key.
    Absent,
    /// The key, last changed at this revision.
    Unchanged(Revision),
}

impl Expected {
    /// What was found by [`MembershipStore::get`].
    pub fn found(record: Option<&Record>) -> Self {
        record.map_or(Self::Absent, |r| Self::Unchanged(r.mod_revision))
    }
}

/// What came of a compare-and-swap.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Swap {
    /// The value is in the store, at this revision.
    Done(Revision),
    /// Somebody was faster: nothing was changed, and this is there.
    Conflict(Option<Record>),
}

/// A change under a watched prefix.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WatchEvent {
    /// The record is new or changed.
    Put(Record),
    /// The key is gone: deleted, or its lease ended.
    Deleted {
        /// Which key.
        key: String,
        /// When.
        revision: Revision,
    },
    /// History between was forgotten (compaction): this is all there is now; what was known before is void.
    Resync(Listing),
}

/// Changes in order. Survives lost connections; ends only after an error that retrying can't mend.
pub type Watch = Pin<Box<dyn Stream<Item = Result<WatchEvent, StoreError>> + Send>>;

/// A membership store. All methods may be called from many tasks.
#[async_trait]
pub trait MembershipStore: Send + Sync {
    /// Writes a record whatever was there; it dies with `lease` if one is given.
    async fn put(&self, key: &str, value: Vec<u8>, lease: Option<LeaseId>) -> Result<Revision, StoreError>;

    /// Reads one record.
    async fn get(&self, key: &str) -> Result<Option<Record>, StoreError>;

    /// Reads all records whose keys start with `prefix`.
    async fn list(&self, prefix: &str) -> Result<Listing, StoreError>;

    /// Removes a record; says whether it was there.
    async fn delete(&self, key: &str) -> Result<bool, StoreError>;

    /// Writes a record if the key is as expected.
    async fn compare_and_swap(
        &self,
        key: &str,
        expected: Expected,
        value: Vec<u8>,
        lease: Option<LeaseId>,
    ) -> Result<Swap, StoreError>;

    /// Makes a lease that ends `ttl` after its last sign of life. A store may round up (etcd: to whole seconds, at
    /// least its election timeout).
    async fn grant_lease(&self, ttl: Duration) -> Result<LeaseId, StoreError>;

    /// A sign of life. [`StoreError::LeaseEnded`] if it came too late.
    async fn keep_alive(&self, lease: LeaseId) -> Result<(), StoreError>;

    /// Ends a lease with all its records. A lease that ended already is no error.
    async fn revoke_lease(&self, lease: LeaseId) -> Result<(), StoreError>;

    /// Changes under `prefix` with revisions greater than `after`.
    async fn watch(&self, prefix: &str, after: Revision) -> Result<Watch, StoreError>;

    /// Whether no other process can use this store: whoever left a record before it was opened is gone.
    fn is_exclusive(&self) -> bool {
        false
    }
}

/// Why a store can't do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The URL names no store.
    #[error("store {url:?}: {reason}")]
    BadUrl {
        /// As given, without password.
        url: String,
        /// What is wrong, and what is possible.
        reason: String,
    },
    /// The state folder can't be used.
    #[error("store file {path}: {reason}")]
    File {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The store can't be reached or does not answer; trying again may help.
    #[error("the store at {at} does not answer: {reason}")]
    Unavailable {
        /// Where.
        at: String,
        /// What was seen.
        reason: String,
    },
    /// The store refuses; trying again won't help.
    #[error("the store at {at} refuses: {reason}")]
    Refused {
        /// Where.
        at: String,
        /// What it said.
        reason: String,
    },
    /// The lease is over: what was bound to it is gone.
    #[error("lease {0:?} has ended")]
    LeaseEnded(LeaseId),
}

/// How to open a store.
#[derive(Debug, Clone, Default)]
pub struct OpenOptions {
    /// Folder where an embedded store keeps its file; `None` keeps it in memory only.
    pub state_dir: Option<PathBuf>,
    /// User name and password, if the URL has none.
    pub credentials: Option<(String, String)>,
    /// Speak TLS with the store; `None`: plain text.
    pub tls: Option<TlsFiles>,
}

/// PEM files for TLS with a store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsFiles {
    /// Certificates of the authorities that the store's own certificate must come from.
    pub ca: PathBuf,
    /// Certificate and key that this process shows, where the store asks for them.
    pub identity: Option<(PathBuf, PathBuf)>,
}

/// Opens a store at the URL's part behind `scheme:`.
type Opener = for<'a> fn(&'a str, &'a OpenOptions) -> BoxFuture<'a, Result<Arc<dyn MembershipStore>, StoreError>>;

/// A kind of store.
pub struct StoreKind {
    /// What its URLs start with.
    pub scheme: &'static str,
    /// Shape of its URLs.
    pub form: &'static str,
    /// Whether the rest of a URL can be right, without connecting.
    check: fn(&str) -> Result<(), String>,
    open: Opener,
}

/// All kinds.
pub static KINDS: &[StoreKind] = &[
    StoreKind {
        scheme: "embedded",
        form: "embedded",
        check: embedded::check,
        open: |rest, options| Box::pin(embedded::open(rest, options)),
    },
    StoreKind {
        scheme: "etcd",
        form: "etcd://[USER:PASSWORD@]HOST:PORT,HOST:PORT[/PREFIX]",
        check: etcd::check,
        open: |rest, options| Box::pin(etcd::open(rest, options)),
    },
];

/// The URL without its password.
pub fn redacted(url: &str) -> String {
    match (url.find("://"), url.rfind('@')) {
        (Some(scheme), Some(at)) if scheme < at => {
            let user = url[scheme + 3..at].split(':').next().unwrap_or_default();
            format!("{}://{user}:***{}", &url[..scheme], &url[at..])
        }
        _ => url.to_owned(),
    }
}

fn split(url: &str) -> Result<(&'static StoreKind, &str), StoreError> {
    let (scheme, rest) = url.split_once("://").unwrap_or((url, ""));
    let bad = |reason| StoreError::BadUrl { url: redacted(url), reason };
    let kind = KINDS.iter().find(|k| k.scheme == scheme).ok_or_else(|| {
        let forms: Vec<_> = KINDS.iter().map(|k| k.form).collect();
        bad(format!("no such kind of store; want one of: {}", forms.join(", ")))
    })?;
    (kind.check)(rest).map_err(|reason| bad(format!("{reason}; want {}", kind.form)))?;
    Ok((kind, rest))
}

/// Whether a URL can be right, without connecting.
pub fn check_url(url: &str) -> Result<(), StoreError> {
    split(url).map(drop)
}

/// Opens the store at a URL such as `embedded` or `etcd://10.0.0.1:2379,10.0.0.2:2379/cluster-a`.
pub async fn open(url: &str, options: &OpenOptions) -> Result<Arc<dyn MembershipStore>, StoreError> {
    let (kind, rest) = split(url)?;
    (kind.open)(rest, options).await
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn kinds_are_distinct() {
        let schemes: BTreeSet<_> = KINDS.iter().map(|k| k.scheme).collect();
        assert_eq!(schemes.len(), KINDS.len());
    }

    #[test]
    fn urls_are_checked() {
        for good in ["embedded", "etcd://127.0.0.1:2379", "etcd://u:p@a:1,b:2/prefix", "etcd://[::1]:2379"] {
            check_url(good).unwrap();
        }
        for bad in ["", "zookeeper://a:1", "etcd", "etcd://", "etcd://a", "etcd://a:x", "etcd://a:1,", "embedded://x"] {
            let error = check_url(bad).unwrap_err().to_string();
            assert!(error.contains("want"), "{error}");
        }
        let error = check_url("etcd://me:secret@host").unwrap_err().to_string();
        assert!(error.contains("me:***@host") && !error.contains("secret"), "{error}");
    }
}
