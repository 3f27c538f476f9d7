//! The store inside the coordinator: a map in memory, and one small file that is replaced at each change.
//!
//! The file is written beside its predecessor, synced and renamed over it, so that it is always whole. A lock file keeps
//! a second process out. Leases run on the monotonic clock; a restarted store gives each its full time again.

use std::{
    collections::{BTreeMap, VecDeque},
    fs::{self, File},
    io::Write,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use futures::stream;
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};
use tokio::{sync::watch, time::Instant};

use super::{
    Expected, LeaseId, Listing, MembershipStore, OpenOptions, Record, Revision, StoreError, Swap, Watch, WatchEvent,
};

/// Changes that are kept for watches that resume.
const HISTORY: usize = 4096;
const FILE: &str = "membership.json";

pub(super) fn check(rest: &str) -> Result<(), String> {
    if rest.is_empty() { Ok(()) } else { Err(format!("nothing may follow, got {rest:?}")) }
}

pub(super) async fn open(_rest: &str, options: &OpenOptions) -> Result<Arc<dyn MembershipStore>, StoreError> {
    Ok(Arc::new(EmbeddedStore::open(options.state_dir.clone(), HISTORY).await?))
}

/// A store in this process.
pub struct EmbeddedStore {
    shared: Arc<Shared>,
}

/// What the file holds.
#[derive(Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Durable {
    revision: Revision,
    records: BTreeMap<String, Record>,
    last_lease: i64,
    lease_ms: BTreeMap<i64, u64>,
}

struct State {
    durable: Durable,
    deadlines: BTreeMap<LeaseId, Instant>,
    history: VecDeque<(Revision, WatchEvent)>,
    /// Changes up to this revision are no longer in `history`.
    forgotten: Revision,
}

struct Shared {
    state: Mutex<State>,
    file: Option<StateFile>,
    history_limit: usize,
    /// The latest revision; wakes watches.
    revision: watch::Sender<Revision>,
    /// Bumped when deadlines changed; wakes the reaper.
    leases: watch::Sender<u64>,
}

struct StateFile {
    path: PathBuf,
    // Held for the life of the store.
    _lock: File,
}

impl EmbeddedStore {
    /// Opens the store whose file lies in `state_dir`, or one in memory. Watches can resume over the last
    /// `history_limit` changes; older ones are told to start afresh.
    pub async fn open(state_dir: Option<PathBuf>, history_limit: usize) -> Result<Self, StoreError> {
        let (file, durable) = match state_dir {
            None => (None, Durable::default()),
            Some(dir) => {
                let (file, durable) = blocking(move || StateFile::open(&dir)).await?;
                (Some(file), durable)
            }
        };
        let now = Instant::now();
        let deadlines =
            durable.lease_ms.iter().map(|(id, ms)| (LeaseId(*id), now + Duration::from_millis(*ms))).collect();
        let forgotten = durable.revision;
        let shared = Arc::new(Shared {
            revision: watch::Sender::new(durable.revision),
            leases: watch::Sender::new(0),
            state: Mutex::new(State { durable, deadlines, history: VecDeque::new(), forgotten }),
            file,
            history_limit,
        });
        let weak = Arc::downgrade(&shared);
        let mut changed = shared.leases.subscribe();
        // Ends with the store: the sender in `Shared` goes with it.
        tokio::spawn(async move {
            loop {
                // Not held while waiting: the store ends when its last user does.
                let next = {
                    let Some(shared) = weak.upgrade() else { return };
                    let next = shared.lock().deadlines.values().min().copied();
                    if next.is_some_and(|n| n <= Instant::now())
                        && let Err(error) = blocking(move || shared.reap(Instant::now())).await
                    {
                        tracing::warn!(%error, "leases have ended but can't be removed");
                        tokio::time::sleep(Duration::from_secs(1)).await;
                    }
                    next
                };
                let ended = match next {
                    Some(next) => tokio::select! {
                        () = tokio::time::sleep_until(next) => false,
                        changed = changed.changed() => changed.is_err(),
                    },
                    None => changed.changed().await.is_err(),
                };
                if ended {
                    return;
                }
            }
        });
        Ok(Self { shared })
    }

    async fn run<T: Send + 'static>(
        &self,
        f: impl FnOnce(&Shared) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let shared = Arc::clone(&self.shared);
        blocking(move || f(&shared)).await
    }
}

async fn blocking<T: Send + 'static>(
    f: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
) -> Result<T, StoreError> {
    tokio::task::spawn_blocking(f)
        .await
        .map_err(|e| StoreError::Unavailable { at: "embedded".to_owned(), reason: e.to_string() })?
}

impl StateFile {
    fn open(dir: &Path) -> Result<(Self, Durable), StoreError> {
        let path = dir.join(FILE);
        let error = |reason: String| StoreError::File { path: path.clone(), reason };
        fs::create_dir_all(dir).map_err(|e| error(format!("its folder can't be made: {e}")))?;
        let lock = File::create(dir.join("lock")).map_err(|e| error(format!("no lock file: {e}")))?;
        flock(&lock, FlockOperation::NonBlockingLockExclusive).map_err(|e| {
            error(format!("another process uses it ({e}): end that one, or give this one another --state-dir"))
        })?;
        let durable = match fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes)
                .map_err(|e| error(format!("it is damaged ({e}): delete it to forget the cluster's epochs")))?,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Durable::default(),
            Err(e) => return Err(error(e.to_string())),
        };
        Ok((Self { path, _lock: lock }, durable))
    }

    fn write(&self, durable: &Durable) -> Result<(), StoreError> {
        let next = self.path.with_extension("new");
        let write = || {
            let mut file = File::create(&next)?;
            file.write_all(&serde_json::to_vec(durable)?)?;
            file.sync_all()?;
            fs::rename(&next, &self.path)
        };
        write().map_err(|e| StoreError::File { path: self.path.clone(), reason: format!("it can't be written: {e}") })
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic can't leave the state half changed: `commit` replaces it whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes the next state to disk, then makes it the state, then wakes watches.
    fn commit(&self, state: &mut State, next: Durable, events: Vec<WatchEvent>) -> Result<(), StoreError> {
        if let Some(file) = &self.file {
            file.write(&next)?;
        }
        let revision = next.revision;
        state.durable = next;
        state.history.extend(events.into_iter().map(|e| (revision, e)));
        while state.history.len() > self.history_limit {
            if let Some((revision, _)) = state.history.pop_front() {
                state.forgotten = revision;
            }
        }
        self.revision.send_replace(revision);
        Ok(())
    }

    fn put(
        &self,
        state: &mut State,
        key: String,
        value: Vec<u8>,
        lease: Option<LeaseId>,
    ) -> Result<Revision, StoreError> {
        if let Some(lease) = lease.filter(|l| !alive(state, *l)) {
            return Err(StoreError::LeaseEnded(lease));
        }
        let mut next = state.durable.clone();
        next.revision += 1;
        let record = Record { key: key.clone(), value, mod_revision: next.revision, lease };
        next.records.insert(key, record.clone());
        let revision = next.revision;
        self.commit(state, next, vec![WatchEvent::Put(record)])?;
        Ok(revision)
    }

    /// Removes the records that `dies` picks, all in one revision.
    fn remove(&self, state: &mut State, mut next: Durable, dies: impl Fn(&Record) -> bool) -> Result<bool, StoreError> {
        let revision = next.revision + 1;
        let gone: Vec<_> = next.records.values().filter(|r| dies(r)).map(|r| r.key.clone()).collect();
        if !gone.is_empty() {
            next.revision = revision;
        }
        for key in &gone {
            next.records.remove(key);
        }
        let any = !gone.is_empty();
        self.commit(state, next, gone.into_iter().map(|key| WatchEvent::Deleted { key, revision }).collect())?;
        Ok(any)
    }

    fn end_leases(&self, state: &mut State, ended: &[LeaseId]) -> Result<(), StoreError> {
        let mut next = state.durable.clone();
        for lease in ended {
            next.lease_ms.remove(&lease.0);
        }
        self.remove(state, next, |r| r.lease.is_some_and(|l| ended.contains(&l)))?;
        for lease in ended {
            state.deadlines.remove(lease);
        }
        Ok(())
    }

    fn reap(&self, now: Instant) -> Result<(), StoreError> {
        let mut state = self.lock();
        let ended: Vec<_> = state.deadlines.iter().filter(|(_, d)| **d <= now).map(|(l, _)| *l).collect();
        if ended.is_empty() { Ok(()) } else { self.end_leases(&mut state, &ended) }
    }

    /// Events after `after`, or all records if history does not reach back so far; and the revision they lead to.
    fn since(&self, prefix: &str, after: Revision) -> (Vec<WatchEvent>, Revision) {
        let state = self.lock();
        if after < state.forgotten {
            let listing = listing(&state.durable, prefix);
            return (vec![WatchEvent::Resync(listing)], state.durable.revision);
        }
        let under_prefix = |event: &WatchEvent| match event {
            WatchEvent::Put(record) => record.key.starts_with(prefix),
            WatchEvent::Deleted { key, .. } => key.starts_with(prefix),
            WatchEvent::Resync(_) => true,
        };
        let events = state.history.iter().filter(|(r, e)| *r > after && under_prefix(e));
        (events.map(|(_, e)| e.clone()).collect(), state.durable.revision.max(after))
    }
}

fn alive(state: &State, lease: LeaseId) -> bool {
    state.deadlines.get(&lease).is_some_and(|d| *d > Instant::now())
}

fn listing(durable: &Durable, prefix: &str) -> Listing {
    let records = durable.records.range(prefix.to_owned()..).map(|(_, r)| r);
    let records = records.take_while(|r| r.key.starts_with(prefix)).cloned().collect();
    Listing { records, revision: durable.revision }
}

#[async_trait]
impl MembershipStore for EmbeddedStore {
    async fn put(&self, key: &str, value: Vec<u8>, lease: Option<LeaseId>) -> Result<Revision, StoreError> {
        let key = key.to_owned();
        self.run(move |shared| shared.put(&mut shared.lock(), key, value, lease)).await
    }

    async fn get(&self, key: &str) -> Result<Option<Record>, StoreError> {
        Ok(self.shared.lock().durable.records.get(key).cloned())
    }

    async fn list(&self, prefix: &str) -> Result<Listing, StoreError> {
        Ok(listing(&self.shared.lock().durable, prefix))
    }

    async fn delete(&self, key: &str) -> Result<bool, StoreError> {
        let key = key.to_owned();
        self.run(move |shared| {
            let mut state = shared.lock();
            let next = state.durable.clone();
            shared.remove(&mut state, next, |r| r.key == key)
        })
        .await
    }

    async fn compare_and_swap(
        &self,
        key: &str,
        expected: Expected,
        value: Vec<u8>,
        lease: Option<LeaseId>,
    ) -> Result<Swap, StoreError> {
        let key = key.to_owned();
        self.run(move |shared| {
            let mut state = shared.lock();
            let found = state.durable.records.get(&key);
            if Expected::found(found) != expected {
                return Ok(Swap::Conflict(found.cloned()));
            }
            shared.put(&mut state, key, value, lease).map(Swap::Done)
        })
        .await
    }

    async fn grant_lease(&self, ttl: Duration) -> Result<LeaseId, StoreError> {
        self.run(move |shared| {
            let mut state = shared.lock();
            let mut next = state.durable.clone();
            next.last_lease += 1;
            let lease = LeaseId(next.last_lease);
            next.lease_ms.insert(lease.0, u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX));
            shared.commit(&mut state, next, Vec::new())?;
            state.deadlines.insert(lease, Instant::now() + ttl);
            drop(state);
            shared.leases.send_modify(|n| *n += 1);
            Ok(lease)
        })
        .await
    }

    async fn keep_alive(&self, lease: LeaseId) -> Result<(), StoreError> {
        let mut state = self.shared.lock();
        let ttl = state.durable.lease_ms.get(&lease.0).copied().filter(|_| alive(&state, lease));
        let ttl = ttl.ok_or(StoreError::LeaseEnded(lease))?;
        state.deadlines.insert(lease, Instant::now() + Duration::from_millis(ttl));
        Ok(())
    }

    async fn revoke_lease(&self, lease: LeaseId) -> Result<(), StoreError> {
        self.run(move |shared| shared.end_leases(&mut shared.lock(), &[lease])).await
    }

    async fn watch(&self, prefix: &str, after: Revision) -> Result<Watch, StoreError> {
        let shared = Arc::clone(&self.shared);
        let changed = shared.revision.subscribe();
        let start = (shared, changed, prefix.to_owned(), after, VecDeque::new());
        Ok(Box::pin(stream::unfold(start, |(shared, mut changed, prefix, mut after, mut queue)| async move {
            loop {
                if let Some(event) = queue.pop_front() {
                    return Some((Ok(event), (shared, changed, prefix, after, queue)));
                }
                changed.borrow_and_update();
                let (events, revision) = shared.since(&prefix, after);
                after = revision;
                queue.extend(events);
                if queue.is_empty() {
                    // The sender lives in `shared`, which this stream holds.
                    changed.changed().await.ok()?;
                }
            }
        })))
    }

    fn is_exclusive(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use super::{super::contract, *};

    #[tokio::test]
    async fn keeps_the_contract_in_memory() {
        contract::check(&EmbeddedStore::open(None, HISTORY).await.unwrap()).await;
    }

    #[tokio::test]
    async fn keeps_the_contract_on_disk() {
        let dir = tempfile::tempdir().unwrap();
        contract::check(&EmbeddedStore::open(Some(dir.path().to_owned()), HISTORY).await.unwrap()).await;
    }

    #[tokio::test]
    async fn forgotten_history_is_a_resync() {
        let store = EmbeddedStore::open(None, 2).await.unwrap();
        contract::check_resync(&store, async |_| {}).await;
    }

    #[tokio::test]
    async fn a_reopened_store_remembers() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().to_owned();
        let store = EmbeddedStore::open(Some(path.clone()), HISTORY).await.unwrap();
        let lease = store.grant_lease(Duration::from_secs(60)).await.unwrap();
        store.put("a", vec![0xff, 0], None).await.unwrap();
        let second = store.put("b", b"2".to_vec(), Some(lease)).await.unwrap();
        let before = store.list("").await.unwrap();

        let refused = EmbeddedStore::open(Some(path.clone()), HISTORY).await.err().unwrap().to_string();
        assert!(refused.contains("another process uses it"), "{refused}");

        drop(store);
        // The reaper may hold the store for a moment longer.
        let mut reopened = EmbeddedStore::open(Some(path.clone()), HISTORY).await;
        while reopened.is_err() {
            tokio::task::yield_now().await;
            reopened = EmbeddedStore::open(Some(path.clone()), HISTORY).await;
        }
        let store = reopened.unwrap();
        assert_eq!(store.list("").await.unwrap(), before);
        store.keep_alive(lease).await.unwrap();
        assert!(store.put("c", Vec::new(), None).await.unwrap() > second, "revisions go on");
        store.revoke_lease(lease).await.unwrap();
        assert_eq!(store.get("b").await.unwrap(), None);
    }

    #[tokio::test]
    async fn a_damaged_file_is_an_error_that_says_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(FILE), b"{\"revision\":").unwrap();
        let error = EmbeddedStore::open(Some(dir.path().to_owned()), HISTORY).await.err().unwrap().to_string();
        assert!(error.contains(FILE) && error.contains("delete it"), "{error}");
    }
}
