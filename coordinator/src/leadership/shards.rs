//! Which shards there are, in the store: the leader keeps a record of each that is attached to it, under a lease of its
//! own. Shards themselves know no store.
//!
//! Records say who was there to whoever leads next, and nothing else depends on them: losing the store, or a lease, detaches
//! nobody; the record is put again when the store answers. A leader whose leadership ends leaves its records to their
//! leases, so that its successor finds them.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use phalanx_cluster::store::{MembershipStore, StoreError};
use phalanx_proto::v1::{Hello, Member};
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, watch};

use super::{
    LeadershipView, View,
    kept::{Kept, Wish},
};

/// Keys of shards begin so.
const PREFIX: &str = "shards/";

/// One life of a shard, as it lies in the store.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardRecord {
    /// Stable name.
    pub shard_id: String,
    /// Random at each start of the process.
    #[serde(default)]
    pub incarnation: u64,
    /// Where its stream comes from: an address without port; empty if that is not known.
    #[serde(default)]
    pub host: String,
    /// Equal for shards that can share memory.
    #[serde(default)]
    pub host_id: String,
    /// Of the process, on its host.
    #[serde(default)]
    pub pid: u32,
    /// "cpu", "cuda:0", ...
    #[serde(default)]
    pub device: String,
    /// Of a CPU device.
    #[serde(default)]
    pub threads: u32,
    /// Of the device, for weights and KV pages.
    #[serde(default)]
    pub memory_bytes: u64,
    /// Of the program.
    #[serde(default)]
    pub version: String,
    /// Decides the bits that it computes.
    #[serde(default)]
    pub fingerprint: String,
    /// HOST:PORT where ranks of other hosts reach it.
    #[serde(default)]
    pub collective_address: String,
    /// HOST:PORT where it takes copies of KV rows; empty if it takes none.
    #[serde(default)]
    pub mirror_address: String,
    /// The coordinator that it is attached to
    #[serde(default)]
    pub coordinator_id: String,
    /// and the term of that one's leadership.
    #[serde(default)]
    pub term: u64,
}

impl ShardRecord {
    /// Of a shard that is attached to a leader. Secrets stay out of the store.
    pub fn new(hello: &Hello, host: &str, view: &View) -> Self {
        Self {
            shard_id: hello.shard_id.clone(),
            incarnation: hello.incarnation,
            host: host.to_owned(),
            host_id: hello.host_id.clone(),
            pid: hello.pid,
            device: hello.device.clone(),
            threads: hello.threads,
            memory_bytes: hello.memory_bytes,
            version: hello.version.clone(),
            fingerprint: hello.fingerprint.clone(),
            collective_address: hello.collective_address.clone(),
            mirror_address: hello.mirror_address.clone(),
            coordinator_id: view.me.coordinator_id.clone(),
            term: view.session.map_or(0, |s| s.term),
        }
    }
}

/// The records that are in the store, in the order of names.
///
/// # Errors
/// If the store does not answer.
pub async fn recorded(store: &dyn MembershipStore) -> Result<Vec<ShardRecord>, StoreError> {
    let listing = store.list(PREFIX).await?;
    // What another version wrote and this one can't read is nobody that this one could expect.
    Ok(listing.records.iter().filter_map(|r| serde_json::from_slice(&r.value).ok()).collect())
}

/// What the keeper is told.
enum Change {
    Attached { session: u64, stream: u64, record: Box<ShardRecord> },
    Detached { session: u64, shard: String, stream: u64 },
}

/// Until when records live without another sign of life, by shard.
type Leases = Arc<Mutex<BTreeMap<String, watch::Receiver<Option<Instant>>>>>;

/// Says who is attached, and knows how their records' leases stand. Clones are the same.
#[derive(Clone)]
pub struct ShardRegistry {
    changes: mpsc::UnboundedSender<Change>,
    leases: Leases,
}

impl ShardRegistry {
    /// A shard is attached over this stream, in the leadership of this number.
    pub fn attached(&self, session: u64, stream: u64, record: ShardRecord) {
        self.tell(Change::Attached { session, stream, record: Box::new(record) });
    }

    /// That stream ended.
    pub fn detached(&self, session: u64, stream: u64, shard: &str) {
        self.tell(Change::Detached { session, shard: shard.to_owned(), stream });
    }

    /// How long a shard's record lives without another sign of life; none if it is not in the store.
    pub fn lease_of(&self, shard: &str) -> Option<Duration> {
        let leases = self.leases.lock().unwrap_or_else(PoisonError::into_inner);
        let ends_at = (*leases.get(shard)?.borrow())?;
        Some(ends_at.saturating_duration_since(Instant::now())).filter(|left| !left.is_zero())
    }

    /// Shows operators how leases stand.
    pub fn show(&self, members: &mut [Member]) {
        for member in members {
            let left = self.lease_of(&member.shard_id);
            member.lease_ms = left.map(|left| u32::try_from(left.as_millis()).unwrap_or(u32::MAX));
        }
    }

    fn tell(&self, change: Change) {
        // Nobody listens when the process is being torn down.
        let _ = self.changes.send(change);
    }
}

/// A record that is kept.
struct Own {
    stream: u64,
    record: ShardRecord,
    wish: Wish,
}

/// Keeps the records of shards that are attached to this coordinator while it leads.
pub struct ShardKeeper {
    changes: mpsc::UnboundedReceiver<Change>,
    leases: Leases,
    kept: BTreeMap<String, Own>,
    /// Number of the leadership that they belong to.
    session: Option<u64>,
}

impl ShardKeeper {
    /// With what tells it.
    pub fn new() -> (Self, ShardRegistry) {
        let (sender, changes) = mpsc::unbounded_channel();
        let leases = Leases::default();
        let registry = ShardRegistry { changes: sender, leases: Arc::clone(&leases) };
        (Self { changes, leases, kept: BTreeMap::new(), session: None }, registry)
    }

    /// Runs until nobody can tell it anything any more. Records go after `ttl` without a sign of life.
    pub async fn run(mut self, store: Arc<dyn MembershipStore>, ttl: Duration, mut view: LeadershipView) {
        self.follow(&view.now());
        loop {
            tokio::select! {
                // A stream that ends with a leadership takes no record with it: the end of the leadership comes first.
                biased;
                view = view.changed() => self.follow(&view),
                change = self.changes.recv() => match change {
                    Some(change) => self.take(change, &store, ttl),
                    None => return,
                }
            }
        }
    }

    fn follow(&mut self, view: &View) {
        let session = view.session.map(|s| s.number);
        if session != self.session {
            self.session = session;
            // Left to their leases: whoever leads next reads them.
            self.kept.clear();
            self.leases().clear();
        }
        let term = view.session.map_or(0, |s| s.term);
        for own in self.kept.values_mut().filter(|own| own.record.term != term) {
            own.record.term = term;
            own.wish.send_replace(Some(encode(&own.record)));
        }
    }

    fn take(&mut self, change: Change, store: &Arc<dyn MembershipStore>, ttl: Duration) {
        match change {
            Change::Attached { session, stream, record } => {
                if self.session != Some(session) {
                    return;
                }
                let shard = record.shard_id.clone();
                let key = format!("{PREFIX}{shard}");
                let (kept, wish) = Kept::new(Arc::clone(store), key, encode(&record), ttl);
                let kept = kept.yielding(may_replace);
                self.leases().insert(shard.clone(), kept.ends_at());
                // An older stream's record is left to its lease: the new one lies under the same key.
                self.kept.insert(shard, Own { stream, record: *record, wish });
                tokio::spawn(kept.run());
            }
            Change::Detached { session, shard, stream } => {
                let is_present = self.kept.get(&shard).is_some_and(|own| own.stream == stream);
                if self.session == Some(session)
                    && is_present
                    && let Some(own) = self.kept.remove(&shard)
                {
                    self.leases().remove(&shard);
                    own.wish.send_replace(None);
                }
            }
        }
    }

    fn leases(&self) -> MutexGuard<'_, BTreeMap<String, watch::Receiver<Option<Instant>>>> {
        self.leases.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A leader that does not know yet that it leads no more leaves its successor's records alone.
fn may_replace(found: &[u8], ours: &[u8]) -> bool {
    let term = |value: &[u8]| serde_json::from_slice::<ShardRecord>(value).map_or(0, |record| record.term);
    term(found) <= term(ours)
}

fn encode(record: &ShardRecord) -> Vec<u8> {
    serde_json::to_vec(record).expect("numbers and strings can be written as JSON")
}

#[cfg(test)]
mod tests {
    use phalanx_cluster::store::embedded::EmbeddedStore;
    use tokio::time::sleep;

    use super::{
        super::{CoordinatorRecord, Session},
        *,
    };

    const TTL: Duration = Duration::from_secs(60);
    const PATIENCE: Duration = Duration::from_secs(60);

    struct Setup {
        store: Arc<dyn MembershipStore>,
        registry: ShardRegistry,
        view: watch::Sender<View>,
    }

    impl Setup {
        async fn new() -> Self {
            let store: Arc<dyn MembershipStore> = Arc::new(EmbeddedStore::open(None, 64).await.unwrap());
            let (keeper, registry) = ShardKeeper::new();
            let (view, receiver) = watch::channel(Self::leading(1, 7));
            tokio::spawn(keeper.run(Arc::clone(&store), TTL, LeadershipView::new(receiver)));
            Self { store, registry, view }
        }

        fn leading(number: u64, term: u64) -> View {
            let me = CoordinatorRecord { coordinator_id: "c".to_owned(), ..CoordinatorRecord::default() };
            View { me, session: Some(Session { number, term }), ..View::default() }
        }

        fn attach(&self, session: u64, stream: u64, shard: &str) {
            let hello = Hello { shard_id: shard.to_owned(), incarnation: stream, ..Hello::default() };
            let record = ShardRecord::new(&hello, "10.0.0.7", &self.view.borrow());
            self.registry.attached(session, stream, record);
        }

        async fn until(&self, what: &str, holds: impl Fn(&[ShardRecord]) -> bool) {
            let deadline = Instant::now() + PATIENCE;
            loop {
                let records = recorded(&*self.store).await.unwrap();
                if holds(&records) {
                    return;
                }
                assert!(Instant::now() < deadline, "waited in vain until {what}: {records:?}");
                sleep(Duration::from_millis(5)).await;
            }
        }
    }

    #[tokio::test]
    async fn records_come_and_go_with_streams() {
        let setup = Setup::new().await;
        setup.attach(1, 1, "a");
        setup.attach(1, 2, "b");
        setup.until("both are there", |r| r.len() == 2).await;
        let first = recorded(&*setup.store).await.unwrap().remove(0);
        assert_eq!((first.shard_id.as_str(), first.host.as_str(), first.term), ("a", "10.0.0.7", 7));
        assert_eq!(first.coordinator_id, "c");
        // The record is there a moment before it is known to be.
        setup.until("the lease is known", |_| setup.registry.lease_of("a").is_some()).await;
        let mut members = [Member { shard_id: "a".to_owned(), ..Member::default() }, Member::default()];
        setup.registry.show(&mut members);
        assert!(members[0].lease_ms.is_some_and(|ms| ms > 0 && ms <= 60_000), "{members:?}");
        assert_eq!(members[1].lease_ms, None);

        // A shard that came back over another stream is not detached by the end of the old one.
        setup.attach(1, 3, "a");
        setup.registry.detached(1, 1, "a");
        setup.registry.detached(1, 2, "b");
        setup.until("b is gone", |r| r.len() == 1 && r[0].shard_id == "a" && r[0].incarnation == 3).await;
        setup.registry.detached(1, 3, "a");
        setup.until("all are gone", <[ShardRecord]>::is_empty).await;
        assert_eq!(setup.registry.lease_of("a"), None);
    }

    #[tokio::test]
    async fn a_former_leader_takes_no_record_from_its_successor() {
        let setup = Setup::new().await;
        let next = ShardRecord { shard_id: "a".to_owned(), term: 9, ..ShardRecord::default() };
        setup.store.put("shards/a", encode(&next), None).await.unwrap();
        setup.attach(1, 1, "a");
        setup.attach(1, 2, "b");
        setup.until("b is there", |r| r.len() == 2).await;
        assert_eq!(recorded(&*setup.store).await.unwrap()[0], next);
        assert_eq!(setup.registry.lease_of("a"), None);
        // What an older leader left is replaced.
        let former = ShardRecord { shard_id: "c".to_owned(), term: 5, ..ShardRecord::default() };
        setup.store.put("shards/c", encode(&former), None).await.unwrap();
        setup.attach(1, 3, "c");
        setup.until("c is ours", |r| r.len() == 3 && r[2].term == 7).await;
    }

    #[tokio::test]
    async fn records_outlive_the_leadership_and_know_its_term() {
        let setup = Setup::new().await;
        setup.attach(1, 1, "a");
        setup.until("it is there", |r| r.len() == 1).await;
        setup.view.send_replace(Setup::leading(1, 9));
        setup.until("the term has grown", |r| r[0].term == 9).await;
        // The stream ends because the leadership did.
        setup.view.send_replace(View { session: None, ..Setup::leading(1, 9) });
        setup.registry.detached(1, 1, "a");
        // Later leaderships have nothing to do with it.
        setup.view.send_replace(Setup::leading(2, 11));
        setup.registry.detached(1, 1, "a");
        setup.attach(1, 2, "late");
        setup.attach(2, 3, "b");
        setup.until("b is there", |r| r.iter().any(|r| r.shard_id == "b")).await;
        let names: Vec<_> = recorded(&*setup.store).await.unwrap().into_iter().map(|r| r.shard_id).collect();
        assert_eq!(names, ["a", "b"]);
    }
}
