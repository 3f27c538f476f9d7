//! Which coordinators there are: each keeps a record under a lease of its own, and reads those of all.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use futures::StreamExt;
use phalanx_cluster::store::{MembershipStore, Record, StoreError, WatchEvent};
use tokio::time::sleep;

use super::{
    CoordinatorRecord,
    kept::{Kept, Wish},
};

/// Keys of coordinators begin so.
const PREFIX: &str = "coordinators/";
/// Pause before a store is tried again.
const RETRY_PAUSE: Duration = Duration::from_millis(500);

/// Keeps one record, and reads all.
#[derive(Clone)]
pub struct Registrar {
    store: Arc<dyn MembershipStore>,
    me: CoordinatorRecord,
    value: Vec<u8>,
    ttl: Duration,
}

impl Registrar {
    /// `value` is the record's JSON; without a sign of life it goes after `ttl`.
    pub fn new(store: Arc<dyn MembershipStore>, me: CoordinatorRecord, value: Vec<u8>, ttl: Duration) -> Self {
        Self { store, me, value, ttl }
    }

    /// What keeps the record, and what takes it back.
    pub fn kept(&self) -> (Kept, Wish) {
        let key = format!("{PREFIX}{}", self.me.coordinator_id);
        Kept::new(Arc::clone(&self.store), key, self.value.clone(), self.ttl)
    }

    /// Says who is registered, now and at every change, until nobody listens.
    pub async fn watch(&self, mut say: impl FnMut(Vec<CoordinatorRecord>) -> bool) {
        loop {
            match self.changes(&mut say).await {
                Ok(()) => return,
                Err(error) => tracing::debug!(%error, "coordinators can't be watched; trying again"),
            }
            sleep(RETRY_PAUSE).await;
        }
    }

    async fn changes(&self, say: &mut impl FnMut(Vec<CoordinatorRecord>) -> bool) -> Result<(), StoreError> {
        let now = self.store.list(PREFIX).await?;
        let mut watch = self.store.watch(PREFIX, now.revision).await?;
        let mut known: BTreeMap<String, Record> = BTreeMap::new();
        known.extend(now.records.into_iter().map(|r| (r.key.clone(), r)));
        loop {
            if !say(self.all(&known)) {
                return Ok(());
            }
            match watch.next().await {
                Some(Ok(WatchEvent::Put(record))) => {
                    known.insert(record.key.clone(), record);
                }
                Some(Ok(WatchEvent::Deleted { key, .. })) => {
                    known.remove(&key);
                }
                Some(Ok(WatchEvent::Resync(listing))) => {
                    known = listing.records.into_iter().map(|r| (r.key.clone(), r)).collect();
                }
                Some(Err(error)) => return Err(error),
                None => return Err(StoreError::Unavailable { at: PREFIX.to_owned(), reason: "it ended".to_owned() }),
            }
        }
    }

    /// This coordinator is one of them whether the store knows it or not.
    fn all(&self, known: &BTreeMap<String, Record>) -> Vec<CoordinatorRecord> {
        let records = known.values().filter_map(|r| serde_json::from_slice::<CoordinatorRecord>(&r.value).ok());
        let mut by_name: BTreeMap<String, CoordinatorRecord> = records.map(|r| (r.coordinator_id.clone(), r)).collect();
        by_name.insert(self.me.coordinator_id.clone(), self.me.clone());
        by_name.into_values().collect()
    }
}
