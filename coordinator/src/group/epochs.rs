//! The epoch and its ranks in the store.

use phalanx_cluster::{
    id::{Epoch, ShardId},
    store::{Expected, MembershipStore, StoreError, Swap},
};
use serde::{Deserialize, Serialize};

/// Where the epoch lies in the store.
pub const EPOCH_KEY: &str = "group/0/epoch";
/// Attempts to take an epoch while others take theirs.
const SWAP_ATTEMPTS: usize = 16;

/// What the store keeps.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct EpochRecord {
    /// The greatest that was taken.
    pub epoch: u64,
    /// Who last had the ranks.
    pub ranks: Vec<ShardId>,
}

/// What the store knows of the group; epoch 0 if it is new.
///
/// # Errors
/// If the store does not answer, or the record is damaged.
pub async fn load(store: &dyn MembershipStore) -> Result<EpochRecord, String> {
    match store.get(EPOCH_KEY).await.map_err(|e| e.to_string())? {
        Some(record) => serde_json::from_slice(&record.value)
            .map_err(|e| format!("the store's {EPOCH_KEY} is damaged ({e}): delete it to begin at epoch 1")),
        None => Ok(EpochRecord::default()),
    }
}

/// Puts an epoch greater than `after`, and than any before, in force.
///
/// # Errors
/// If the store does not answer.
pub async fn take(store: &dyn MembershipStore, after: Epoch) -> Result<Epoch, StoreError> {
    let mut found = store.get(EPOCH_KEY).await?;
    for _ in 0..SWAP_ATTEMPTS {
        let record = found.as_ref().and_then(|r| serde_json::from_slice::<EpochRecord>(&r.value).ok());
        let record = record.unwrap_or_default();
        let next = Epoch::from_raw(record.epoch).max(after).next();
        let value = encode(&EpochRecord { epoch: next.raw(), ranks: record.ranks });
        match store.compare_and_swap(EPOCH_KEY, Expected::found(found.as_ref()), value, None).await? {
            Swap::Done(_) => return Ok(next),
            Swap::Conflict(other) => found = other,
        }
    }
    Err(StoreError::Unavailable { at: EPOCH_KEY.to_owned(), reason: "others keep taking epochs".to_owned() })
}

/// Keeps the ranks of a formation, so that a restarted coordinator gives shards their former ranks; unless a newer epoch
/// than `latest`, the greatest that this group has taken, is in force.
///
/// # Errors
/// If the store does not answer.
pub async fn remember_ranks(store: &dyn MembershipStore, latest: Epoch, ranks: Vec<ShardId>) -> Result<(), StoreError> {
    let found = store.get(EPOCH_KEY).await?;
    let record = found.as_ref().and_then(|r| serde_json::from_slice::<EpochRecord>(&r.value).ok());
    if let Some(record) = record.filter(|r| r.epoch == latest.raw()) {
        let value = encode(&EpochRecord { epoch: record.epoch, ranks });
        // A conflict means that a newer epoch is in force: its ranks count.
        store.compare_and_swap(EPOCH_KEY, Expected::found(found.as_ref()), value, None).await?;
    }
    Ok(())
}

fn encode(record: &EpochRecord) -> Vec<u8> {
    serde_json::to_vec(record).expect("numbers and strings can be written as JSON")
}

#[cfg(test)]
mod tests {
    use phalanx_cluster::store::embedded::EmbeddedStore;

    use super::*;

    #[tokio::test]
    async fn epochs_grow_and_ranks_are_kept() {
        let store = EmbeddedStore::open(None, 64).await.unwrap();
        let first = take(&store, Epoch::default()).await.unwrap();
        assert_eq!(first.raw(), 1);
        let ranks = vec![ShardId("b".to_owned()), ShardId("a".to_owned())];
        remember_ranks(&store, first, ranks.clone()).await.unwrap();
        assert_eq!(take(&store, Epoch::from_raw(7)).await.unwrap().raw(), 8);
        // Late ranks of an older epoch change nothing.
        remember_ranks(&store, first, Vec::new()).await.unwrap();
        let record = load(&store).await.unwrap();
        assert_eq!((record.epoch, record.ranks), (8, ranks));
    }

    #[tokio::test]
    async fn two_coordinators_never_take_the_same_epoch() {
        let store = EmbeddedStore::open(None, 64).await.unwrap();
        let taken = futures::future::join_all((0..8).map(|_| take(&store, Epoch::default()))).await;
        let mut taken: Vec<u64> = taken.into_iter().map(|e| e.unwrap().raw()).collect();
        taken.sort_unstable();
        assert_eq!(taken, (1..=8).collect::<Vec<_>>());
    }
}
