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
    lease: Option<LeaseId>,
}

impl Leader {
    fn of(record: Record) -> Self {
        Self { value: record.value, term: record.mod_revision, lease: record.lease }
    }
}

/// What came of an attempt to take the key.
pub enum Attempt {
    /// The candidate leads.
    Won(Leadership),
    /// The key was not as expected: nothing was changed, and this one leads.
    Held(Option<Leader>),
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
        self.release().await
    }

    /// The same for a leadership that several hold: none of them leads afterwards.
    pub async fn release(&self) -> Result<(), StoreError> {
        self.store.revoke_lease(self.lease).await
    }
}

impl Election {
    /// An election for `key`; a leader that shows no sign of life for `ttl` has lost it.
    pub fn new(store: Arc<dyn MembershipStore>, key: impl Into<String>, ttl: Duration) -> Self {
        Self { store, key: key.into(), ttl }
    }

    /// Tries once to take the key, if it is as expected: free, or held in a certain term by somebody who is known to be
    /// gone. The holder's lease is not ended: its key is now this candidate's. A store that fails may have made the
    /// candidate leader all the same: see [`Election::adopt`].
    pub async fn attempt(&self, value: Vec<u8>, expected: Expected) -> Result<Attempt, StoreError> {
        let lease = self.store.grant_lease(self.ttl).await?;
        match self.store.compare_and_swap(&self.key, expected, value, Some(lease)).await? {
            Swap::Done(term) => Ok(Attempt::Won(Leadership { store: Arc::clone(&self.store), lease, term })),
            Swap::Conflict(holder) => {
                // If this fails, the lease ends by itself.
                let _ = self.store.revoke_lease(lease).await;
                Ok(Attempt::Held(holder.map(Leader::of)))
            }
        }
    }

    /// The leadership of a candidate that finds itself to be the leader: the answer to its attempt was lost.
    pub fn adopt(&self, leader: &Leader) -> Option<Leadership> {
        leader.lease.map(|lease| Leadership { store: Arc::clone(&self.store), lease, term: leader.term })
    }

    /// Who leads, and the revision at which this was so.
    pub async fn look(&self) -> Result<(Option<Leader>, Revision), StoreError> {
        let listing = self.store.list(&self.key).await?;
        Ok((self.find(listing.records), listing.revision))
    }

    /// Every change after a revision: who leads then, and the revision of the change.
    pub async fn changes(
        &self,
        after: Revision,
    ) -> Result<impl Stream<Item = Result<(Option<Leader>, Revision), StoreError>> + Send + use<>, StoreError> {
        let watch = self.store.watch(&self.key, after).await?;
        let election = self.clone();
        Ok(watch.filter_map(move |event| {
            let change = match event {
                Ok(WatchEvent::Put(record)) if record.key == election.key => {
                    let revision = record.mod_revision;
                    Some(Ok((Some(Leader::of(record)), revision)))
                }
                Ok(WatchEvent::Deleted { key, revision }) if key == election.key => Some(Ok((None, revision))),
                Ok(WatchEvent::Resync(listing)) => Some(Ok((election.find(listing.records), listing.revision))),
                Ok(_) => None,
                Err(error) => Some(Err(error)),
            };
            async { change }
        }))
    }

    fn find(&self, records: Vec<Record>) -> Option<Leader> {
        records.into_iter().find(|r| r.key == self.key).map(Leader::of)
    }

    /// Waits until this candidate leads. `value` is what observers see. Dropping the future withdraws; a lease that was
    /// made meanwhile ends by itself.
    pub async fn campaign(&self, value: Vec<u8>) -> Result<Leadership, StoreError> {
        loop {
            // A fresh lease per attempt: waiting may take longer than a lease lives.
            match self.attempt(value.clone(), Expected::Absent).await? {
                Attempt::Won(leadership) => return Ok(leadership),
                Attempt::Held(Some(holder)) => self.until_free(holder.term).await?,
                Attempt::Held(None) => {}
            }
        }
    }

    async fn until_free(&self, after: Revision) -> Result<(), StoreError> {
        let mut changes = Box::pin(self.changes(after).await?);
        while let Some(change) = changes.next().await {
            if change?.0.is_none() {
                return Ok(());
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
        let (first, revision) = self.look().await?;
        let later = self.changes(revision).await?.map(|change| change.map(|(leader, _)| leader));
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
