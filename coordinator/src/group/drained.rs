//! Who is drained, in the store: the next leader, or this coordinator after a restart, must not give them ranks.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use phalanx_cluster::{
    id::ShardId,
    store::{MembershipStore, StoreError},
};
use tokio::{sync::watch, time::sleep};

/// Where it lies in the store.
fn key(group: usize) -> String {
    format!("group/{group}/drained")
}

/// Between attempts to write while the store does not answer.
const RETRY_PAUSE: Duration = Duration::from_secs(1);

/// Who is drained in a group; nobody if the store knows nothing.
///
/// # Errors
/// If the store does not answer, or the record is damaged.
pub async fn load(store: &dyn MembershipStore, group: usize) -> Result<BTreeSet<ShardId>, String> {
    let key = key(group);
    match store.get(&key).await.map_err(|e| e.to_string())? {
        Some(record) => serde_json::from_slice(&record.value)
            .map_err(|e| format!("the store's {key} is damaged ({e}): delete it to have nobody drained")),
        None => Ok(BTreeSet::new()),
    }
}

/// Writes what is drained, in the background, until the store has it.
pub struct DrainedRecord(watch::Sender<BTreeSet<ShardId>>);

impl DrainedRecord {
    /// With what the store has.
    pub fn start(store: Arc<dyn MembershipStore>, group: usize, stored: BTreeSet<ShardId>) -> Self {
        let (sender, receiver) = watch::channel(stored);
        tokio::spawn(keep(store, key(group), receiver));
        Self(sender)
    }

    /// These are drained from now on.
    pub fn set(&self, drained: &BTreeSet<ShardId>) {
        self.0.send_if_modified(|known| {
            let is_new = known != drained;
            if is_new {
                known.clone_from(drained);
            }
            is_new
        });
    }
}

/// Ends with the [`DrainedRecord`].
async fn keep(store: Arc<dyn MembershipStore>, key: String, mut wanted: watch::Receiver<BTreeSet<ShardId>>) {
    while wanted.changed().await.is_ok() {
        let mut is_told = false;
        loop {
            let drained = wanted.borrow_and_update().clone();
            let Err(error) = write(&*store, &key, &drained).await else { break };
            if !is_told {
                is_told = true;
                tracing::warn!(%error, "who is drained can't be kept in the store; trying again");
            }
            sleep(RETRY_PAUSE).await;
            if wanted.has_changed().is_err() {
                // Somebody else leads, and knows better.
                return;
            }
        }
    }
}

async fn write(store: &dyn MembershipStore, key: &str, drained: &BTreeSet<ShardId>) -> Result<(), StoreError> {
    let value = serde_json::to_vec(drained).expect("names can be written as JSON");
    store.put(key, value, None).await.map(|_| ())
}

#[cfg(test)]
mod tests {
    use phalanx_cluster::store::embedded::EmbeddedStore;

    use super::*;

    #[tokio::test]
    async fn the_next_leader_knows_who_is_drained() {
        let store: Arc<dyn MembershipStore> = Arc::new(EmbeddedStore::open(None, 64).await.unwrap());
        assert!(load(&*store, 1).await.unwrap().is_empty());
        let record = DrainedRecord::start(Arc::clone(&store), 1, BTreeSet::new());
        let drained = BTreeSet::from([ShardId("a".to_owned()), ShardId("b".to_owned())]);
        for wanted in [drained, BTreeSet::new()] {
            let mut watch = store.watch(&key(1), store.list("").await.unwrap().revision).await.unwrap();
            record.set(&wanted);
            futures::StreamExt::next(&mut watch).await.unwrap().unwrap();
            assert_eq!(load(&*store, 1).await.unwrap(), wanted);
            assert!(load(&*store, 0).await.unwrap().is_empty(), "another group's record");
        }
        store.put(&key(1), b"?".to_vec(), None).await.unwrap();
        assert!(load(&*store, 1).await.unwrap_err().contains("delete it"));
    }
}
