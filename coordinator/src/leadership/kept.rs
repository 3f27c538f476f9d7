//! A record that is in the store as long as somebody keeps it there: it has a lease of its own, and is put again whenever
//! that was lost.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use phalanx_cluster::store::{Expected, LeaseId, MembershipStore, Record, StoreError, Swap};
use tokio::{
    sync::watch,
    time::{sleep, timeout},
};

/// Renewals in a lease's time to live.
const RENEWALS: u32 = 3;
/// Pause before a store is tried again.
const RETRY_PAUSE: Duration = Duration::from_millis(500);
/// Longest wait for the store to forget a record that is taken back.
const FAREWELL_LIMIT: Duration = Duration::from_secs(2);

/// Whoever holds this says what the record is; `None` takes it back. Dropped, the record is left to its lease.
pub type Wish = watch::Sender<Option<Vec<u8>>>;

/// Whether what is found under the key may be replaced by what is ours.
pub type MayReplace = fn(found: &[u8], ours: &[u8]) -> bool;

/// Keeps one record.
pub struct Kept {
    store: Arc<dyn MembershipStore>,
    key: String,
    ttl: Duration,
    may_replace: MayReplace,
    wish: watch::Receiver<Option<Vec<u8>>>,
    /// The last lease that the record was put under.
    lease: Option<LeaseId>,
    /// Until when the record lives without another sign of life; none while it is not known to be in the store.
    ends_at: watch::Sender<Option<Instant>>,
}

impl Kept {
    /// Of a key that goes after `ttl` without a sign of life.
    pub fn new(store: Arc<dyn MembershipStore>, key: String, value: Vec<u8>, ttl: Duration) -> (Self, Wish) {
        let (sender, wish) = watch::channel(Some(value));
        let (ends_at, _) = watch::channel(None);
        (Self { store, key, ttl, may_replace: |_, _| true, wish, lease: None, ends_at }, sender)
    }

    /// Leaves alone what somebody with a better right has put under the key, and waits until that is gone.
    pub fn yielding(self, may_replace: MayReplace) -> Self {
        Self { may_replace, ..self }
    }

    /// Until when the record lives without another sign of life.
    pub fn ends_at(&self) -> watch::Receiver<Option<Instant>> {
        self.ends_at.subscribe()
    }

    /// Keeps the record until it is taken back, or nobody wants anything any more. A store that is away, or a lease that
    /// ended, is no reason to end.
    pub async fn run(mut self) {
        loop {
            match self.hold().await {
                Ok(()) => break,
                // A lease that ended means that the store, or this process, was away: the record is simply put again.
                Err(error) => tracing::debug!(key = self.key, %error, "registering again"),
            }
            tokio::select! {
                () = sleep(RETRY_PAUSE) => {}
                // An error means that nobody wants anything any more.
                _ = self.wish.wait_for(Option::is_none) => break,
            }
        }
        let is_taken_back = self.wish.borrow().is_none();
        self.ends_at.send_replace(None);
        if let Some(lease) = self.lease.filter(|_| is_taken_back)
            && !matches!(timeout(FAREWELL_LIMIT, self.store.revoke_lease(lease)).await, Ok(Ok(())))
        {
            tracing::debug!(key = self.key, "the store does not answer: the record goes with its lease");
        }
    }

    /// What is under the key, if that may be replaced.
    async fn look(&self, ours: &[u8]) -> Result<Option<Record>, StoreError> {
        let found = self.store.get(&self.key).await?;
        match &found {
            Some(record) if !(self.may_replace)(&record.value, ours) => {
                let reason = "somebody with a better right keeps the record".to_owned();
                Err(StoreError::Refused { at: self.key.clone(), reason })
            }
            _ => Ok(found),
        }
    }

    async fn put(&self, value: Vec<u8>, lease: LeaseId) -> Result<(), StoreError> {
        let found = self.look(&value).await?;
        match self.store.compare_and_swap(&self.key, Expected::found(found.as_ref()), value, Some(lease)).await? {
            Swap::Done(_) => Ok(()),
            Swap::Conflict(_) => {
                let reason = "the record was changed at the same time".to_owned();
                Err(StoreError::Unavailable { at: self.key.clone(), reason })
            }
        }
    }

    /// Returns when the record is taken back or left to its lease.
    async fn hold(&mut self) -> Result<(), StoreError> {
        let Some(mut value) = self.wish.borrow_and_update().clone() else { return Ok(()) };
        self.look(&value).await?;
        let mut asked_at = Instant::now();
        let lease = self.store.grant_lease(self.ttl).await?;
        self.lease = Some(lease);
        loop {
            self.put(value, lease).await?;
            value = loop {
                self.ends_at.send_replace(Some(asked_at + self.ttl));
                let wished = tokio::select! {
                    () = sleep(self.ttl / RENEWALS) => None,
                    wished = self.wish.changed() => Some(wished),
                };
                match wished {
                    None => {
                        let now = Instant::now();
                        self.store.keep_alive(lease).await?;
                        asked_at = now;
                    }
                    Some(Err(_)) => return Ok(()),
                    Some(Ok(())) => match self.wish.borrow_and_update().clone() {
                        Some(next) => break next,
                        None => return Ok(()),
                    },
                }
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use phalanx_cluster::store::embedded::EmbeddedStore;

    use super::*;

    /// Long enough to be renewed in time on a busy machine, short enough to wait for its end.
    const TTL: Duration = Duration::from_secs(3);
    const PATIENCE: Duration = Duration::from_secs(60);

    async fn store() -> Arc<dyn MembershipStore> {
        Arc::new(EmbeddedStore::open(None, 64).await.unwrap())
    }

    async fn until(what: &str, mut holds: impl AsyncFnMut() -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !holds().await {
            assert!(Instant::now() < deadline, "waited in vain until {what}");
            sleep(Duration::from_millis(5)).await;
        }
    }

    #[tokio::test]
    async fn a_record_is_there_until_it_is_taken_back() {
        let store = store().await;
        let (kept, wish) = Kept::new(Arc::clone(&store), "k".to_owned(), b"1".to_vec(), TTL);
        let mut ends_at = kept.ends_at();
        let task = tokio::spawn(kept.run());
        ends_at.wait_for(Option::is_some).await.unwrap();
        let found = store.get("k").await.unwrap().unwrap();
        assert_eq!(found.value, b"1");
        let lease = found.lease.expect("it has a lease");

        // Another value lies under the same lease.
        wish.send_replace(Some(b"2".to_vec()));
        until("the value is changed", async || store.get("k").await.unwrap().is_some_and(|r| r.value == b"2")).await;
        assert_eq!(store.get("k").await.unwrap().unwrap().lease, Some(lease));

        wish.send_replace(None);
        task.await.unwrap();
        assert_eq!(store.get("k").await.unwrap(), None);
        assert_eq!(*ends_at.borrow(), None);
    }

    #[tokio::test]
    async fn a_record_whose_lease_was_lost_is_put_again() {
        let store = store().await;
        let (kept, wish) = Kept::new(Arc::clone(&store), "k".to_owned(), b"1".to_vec(), TTL);
        let mut ends_at = kept.ends_at();
        let task = tokio::spawn(kept.run());
        ends_at.wait_for(Option::is_some).await.unwrap();
        let lost = store.get("k").await.unwrap().unwrap().lease.unwrap();
        store.revoke_lease(lost).await.unwrap();
        assert_eq!(store.get("k").await.unwrap(), None);
        until("it is back", async || store.get("k").await.unwrap().is_some_and(|r| r.lease != Some(lost))).await;
        drop(wish);
        task.await.unwrap();
        // Left to its lease: whoever comes next still finds it.
        assert!(store.get("k").await.unwrap().is_some());
        until("the lease ends", async || store.get("k").await.unwrap().is_none()).await;
    }

    #[tokio::test]
    async fn a_better_record_is_left_alone_until_it_is_gone() {
        let store = store().await;
        store.put("k", b"2".to_vec(), None).await.unwrap();
        let (kept, wish) = Kept::new(Arc::clone(&store), "k".to_owned(), b"1".to_vec(), TTL);
        let kept = kept.yielding(|found, ours| found <= ours);
        let mut ends_at = kept.ends_at();
        let task = tokio::spawn(kept.run());
        // Not even after several attempts.
        sleep(RETRY_PAUSE * 3).await;
        assert_eq!(store.get("k").await.unwrap().unwrap().value, b"2");
        assert_eq!(*ends_at.borrow(), None);
        store.delete("k").await.unwrap();
        ends_at.wait_for(Option::is_some).await.unwrap();
        assert_eq!(store.get("k").await.unwrap().unwrap().value, b"1");
        wish.send_replace(None);
        task.await.unwrap();
    }
}
