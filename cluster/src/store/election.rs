//! Who leads: a key that one candidate at a time holds with its lease. Works over any store.
//!
//! The revision at which the key was taken is the leader's *term*: it only grows, so whatever carries a term can be
//! refused when a newer one is known.

use std::{sync::Arc, time::Duration};

use futures::{Stream, StreamExt, stream};

use super::{Expected, LeaseId, MembershipStore, Record, Revision, StoreError, Swap, WatchEvent};

/// A key to win.
#[derive(Clone)]
pub struct Election {
    store: Arc<dyn MembershipStore>,
    key: String,
    ttl: Duration,
}

/// Who leads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leader {
    /// What the candidate put: its name, its address.
    pub value: Vec<u8>,
    /// Grows with every leadership.
    pub term: Revision,
}

impl Leader {
    fn of(record: Record) -> Self {
        Self { value: record.value, term: record.mod_revision }
    }
}

/// A won election. Keep it alive more often than its time to live, or it is lost.
pub struct Leadership {
    store: Arc<dyn MembershipStore>,
    lease: LeaseId,
    term: Revision,
}

impl Leadership {
    /// Fences what an earlier leader may still say.
    pub fn term(&self) -> Revision {
        self.term
    }

    /// A sign of life; an error of kind [`StoreError::LeaseEnded`] means that somebody else may lead by now.
    pub async fn keep_alive(&self) -> Result<(), StoreError> {
        self.store.keep_alive(self.lease).await
    }

    /// Gives way at once.
    pub async fn resign(self) -> Result<(), StoreError> {
        self.store.revoke_lease(self.lease).await
    }
}

impl Election {
    /// An election for `key`; a leader that shows no sign of life for `ttl` has lost it.
    pub fn new(store: Arc<dyn MembershipStore>, key: impl Into<String>, ttl: Duration) -> Self {
        Self { store, key: key.into(), ttl }
    }

    /// Waits until this candidate leads. `value` is what observers see. Dropping the future withdraws; a lease that was
    /// made meanwhile ends by itself.
    pub async fn campaign(&self, value: Vec<u8>) -> Result<Leadership, StoreError> {
        loop {
            // A fresh lease per attempt: waiting may take longer than a lease lives.
            let lease = self.store.grant_lease(self.ttl).await?;
            match self.store.compare_and_swap(&self.key, Expected::Absent, value.clone(), Some(lease)).await? {
                Swap::Done(term) => return Ok(Leadership { store: Arc::clone(&self.store), lease, term }),
                Swap::Conflict(holder) => {
                    self.store.revoke_lease(lease).await?;
                    if let Some(holder) = holder {
                        self.until_free(holder.mod_revision).await?;
                    }
                }
            }
        }
    }

    async fn until_free(&self, after: Revision) -> Result<(), StoreError> {
        let mut watch = self.store.watch(&self.key, after).await?;
        while let Some(event) = watch.next().await {
            match event? {
                WatchEvent::Deleted { key, .. } if key == self.key => return Ok(()),
                WatchEvent::Resync(listing) if listing.records.iter().all(|r| r.key != self.key) => return Ok(()),
                _ => {}
            }
        }
        Ok(())
    }

    /// Who leads now.
    pub async fn leader(&self) -> Result<Option<Leader>, StoreError> {
        Ok(self.store.get(&self.key).await?.map(Leader::of))
    }

    /// Every change of leader, beginning with the present one.
    pub async fn observe(
        &self,
    ) -> Result<impl Stream<Item = Result<Option<Leader>, StoreError>> + Send + use<>, StoreError> {
        let now = self.store.list(&self.key).await?;
        let watch = self.store.watch(&self.key, now.revision).await?;
        let key = self.key.clone();
        let find = |records: Vec<Record>, key: &str| records.into_iter().find(|r| r.key == key).map(Leader::of);
        let first = find(now.records, &self.key);
        let later = watch.filter_map(move |event| {
            let change = match event {
                Ok(WatchEvent::Put(record)) if record.key == key => Some(Ok(Some(Leader::of(record)))),
                Ok(WatchEvent::Deleted { key: gone, .. }) if gone == key => Some(Ok(None)),
                Ok(WatchEvent::Resync(listing)) => Some(Ok(find(listing.records, &key))),
                Ok(_) => None,
                Err(error) => Some(Err(error)),
            };
            async { change }
        });
        Ok(stream::iter([Ok(first)]).chain(later))
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::{contract, embedded::EmbeddedStore},
        *,
    };

    #[tokio::test]
    async fn one_leads_at_a_time_and_terms_grow() {
        let store: Arc<dyn MembershipStore> = Arc::new(EmbeddedStore::open(None, 64).await.unwrap());
        contract::check_election(&store).await;
    }
}
