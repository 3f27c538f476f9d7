//! Epochs and ranks in the store.
//!
//! All groups of a cluster take their epochs from one counter: a shard that moves from one group to another knows a
//! formation by its number alone.

use phalanx_cluster::{
    id::{Epoch, ShardId},
    store::{Expected, MembershipStore, StoreError, Swap},
};
use serde::{Deserialize, Serialize};

/// Where the greatest epoch lies in the store, beside the ranks of the first group: before there were several groups that
/// was all.
const COUNTER_KEY: &str = "group/0/epoch";
/// Attempts to change a record while others change it.
const SWAP_ATTEMPTS: usize = 16;

/// What the store keeps under a group's key.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Record {
    /// The greatest epoch that was taken, by any group; of the first group's record only.
    #[serde(default)]
    epoch: u64,
    /// Who last had the group's ranks.
    ranks: Vec<ShardId>,
    /// In which epoch. Records of earlier versions don't say.
    #[serde(default)]
    ranks_epoch: u64,
}

/// What the store knows of a group.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Known {
    /// The greatest epoch that any group has taken; 0 if none has.
    pub epoch: Epoch,
    /// Who last had the ranks of this one.
    pub ranks: Vec<ShardId>,
}

fn key(group: usize) -> String {
    // The first group's is the counter's.
    format!("group/{group}/epoch")
}

/// What the store knows of a group.
///
/// # Errors
/// If the store does not answer, or the record is damaged.
pub async fn load(store: &dyn MembershipStore, group: usize) -> Result<Known, String> {
    let own = read(store, &key(group)).await?;
    let epoch = match group {
        0 => own.epoch,
        _ => read(store, COUNTER_KEY).await?.epoch,
    };
    Ok(Known { epoch: Epoch::from_raw(epoch), ranks: own.ranks })
}

async fn read(store: &dyn MembershipStore, key: &str) -> Result<Record, String> {
    match store.get(key).await.map_err(|e| e.to_string())? {
        Some(record) => serde_json::from_slice(&record.value)
            .map_err(|e| format!("the store's {key} is damaged ({e}): delete it to begin at epoch 1")),
        None => Ok(Record::default()),
    }
}

/// Puts an epoch greater than `after`, and than any before, in force.
///
/// # Errors
/// If the store does not answer.
pub async fn take(store: &dyn MembershipStore, after: Epoch) -> Result<Epoch, StoreError> {
    let mut taken = after;
    change(store, COUNTER_KEY, |record| {
        taken = Epoch::from_raw(record.epoch).max(after).next();
        record.epoch = taken.raw();
        true
    })
    .await?;
    Ok(taken)
}

/// Keeps the ranks of a formation, so that a restarted coordinator gives shards their former ranks; unless those of a newer
/// one are there.
///
/// # Errors
/// If the store does not answer.
pub async fn remember_ranks(
    store: &dyn MembershipStore,
    group: usize,
    epoch: Epoch,
    ranks: Vec<ShardId>,
) -> Result<(), StoreError> {
    change(store, &key(group), |record| {
        let is_newer = record.ranks_epoch < epoch.raw();
        if is_newer {
            (record.ranks, record.ranks_epoch) = (ranks.clone(), epoch.raw());
        }
        is_newer
    })
    .await
}

/// Changes a record by compare-and-swap, as often as it takes; or not at all, if the closure says so.
async fn change(
    store: &dyn MembershipStore,
    key: &str,
    mut change: impl FnMut(&mut Record) -> bool,
) -> Result<(), StoreError> {
    let mut found = store.get(key).await?;
    for _ in 0..SWAP_ATTEMPTS {
        let record = found.as_ref().and_then(|r| serde_json::from_slice::<Record>(&r.value).ok());
        let mut record = record.unwrap_or_default();
        if !change(&mut record) {
            return Ok(());
        }
        let value = serde_json::to_vec(&record).expect("numbers and strings can be written as JSON");
        match store.compare_and_swap(key, Expected::found(found.as_ref()), value, None).await? {
            Swap::Done(_) => return Ok(()),
            Swap::Conflict(other) => found = other,
        }
    }
    Err(StoreError::Unavailable { at: key.to_owned(), reason: "others keep changing it".to_owned() })
}

#[cfg(test)]
mod tests {
    use phalanx_cluster::store::embedded::EmbeddedStore;

    use super::*;

    fn ids(names: &[&str]) -> Vec<ShardId> {
        names.iter().map(|n| ShardId((*n).to_owned())).collect()
    }

    #[tokio::test]
    async fn epochs_grow_and_ranks_are_kept() {
        let store = EmbeddedStore::open(None, 64).await.unwrap();
        let first = take(&store, Epoch::default()).await.unwrap();
        assert_eq!(first.raw(), 1);
        remember_ranks(&store, 0, first, ids(&["b", "a"])).await.unwrap();
        assert_eq!(take(&store, Epoch::from_raw(7)).await.unwrap().raw(), 8);
        // Late ranks of an older epoch change nothing.
        remember_ranks(&store, 0, first, Vec::new()).await.unwrap();
        let known = load(&store, 0).await.unwrap();
        assert_eq!((known.epoch.raw(), known.ranks), (8, ids(&["b", "a"])));
    }

    #[tokio::test]
    async fn groups_share_the_counter_and_nothing_else() {
        let store = EmbeddedStore::open(None, 64).await.unwrap();
        let mine = take(&store, Epoch::default()).await.unwrap();
        let others = take(&store, Epoch::default()).await.unwrap();
        assert_ne!(mine, others);
        remember_ranks(&store, 1, others, ids(&["c"])).await.unwrap();
        remember_ranks(&store, 0, mine, ids(&["a"])).await.unwrap();
        assert_eq!(load(&store, 0).await.unwrap(), Known { epoch: others, ranks: ids(&["a"]) });
        assert_eq!(load(&store, 1).await.unwrap(), Known { epoch: others, ranks: ids(&["c"]) });
        assert_eq!(load(&store, 2).await.unwrap(), Known { epoch: others, ranks: Vec::new() });
    }

    #[tokio::test]
    async fn a_record_of_an_earlier_version_is_read() {
        let store = EmbeddedStore::open(None, 64).await.unwrap();
        let old = br#"{"epoch":41,"ranks":["b","a"]}"#.to_vec();
        store.compare_and_swap(COUNTER_KEY, Expected::found(None), old, None).await.unwrap();
        assert_eq!(load(&store, 0).await.unwrap(), Known { epoch: Epoch::from_raw(41), ranks: ids(&["b", "a"]) });
        let next = take(&store, Epoch::default()).await.unwrap();
        assert_eq!(next.raw(), 42);
        remember_ranks(&store, 0, next, ids(&["c"])).await.unwrap();
        assert_eq!(load(&store, 0).await.unwrap().ranks, ids(&["c"]));
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
