//! Who leads, and what coordinators tell each other.
//!
//! Every coordinator runs a [`machine`]: it campaigns for a key in the store, whose revision is the *term*, and keeps it
//! with a lease. The [`actor`] around it has a thread of its own, so that a lease does not end because tokens are being
//! made. What it knows is a [`View`], which everything else watches: the leader has actors and shards, a standby forwards.
//! A standby [follows](follower) its leader: it keeps a copy of the journal, and learns at once of the leader's death.

pub mod actor;
pub mod address;
pub mod follower;
pub mod journal_feed;
pub mod kept;
pub mod machine;
pub mod registry;
pub mod service;
pub mod shards;
pub mod standby;
pub mod switch;

use std::sync::Arc;

use phalanx_proto::v1::Coordinator;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

/// One life of a coordinator, as it lies in the store.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CoordinatorRecord {
    /// Stable name.
    pub coordinator_id: String,
    /// HOST:PORT where clients and other coordinators reach its HTTP API.
    #[serde(default)]
    pub http_address: String,
    /// Whether that wants TLS.
    #[serde(default)]
    pub http_speaks_tls: bool,
    /// HOST:PORT where clients, shards and other coordinators reach its gRPC services.
    #[serde(default)]
    pub grpc_address: String,
    /// Whether those services want TLS.
    #[serde(default)]
    pub grpc_speaks_tls: bool,
    /// Of the program.
    #[serde(default)]
    pub version: String,
    /// Random at each start of the process.
    #[serde(default)]
    pub incarnation: u64,
    /// Of the machine: a process whose addresses are ours on this very machine is our predecessor.
    #[serde(default)]
    pub boot_id: String,
}

impl CoordinatorRecord {
    /// Whether this is the very same process.
    pub fn is_same_life(&self, other: &Self) -> bool {
        self.coordinator_id == other.coordinator_id && self.incarnation == other.incarnation
    }

    /// URL of its HTTP API.
    pub fn http_url(&self) -> String {
        format!("{}://{}", if self.http_speaks_tls { "https" } else { "http" }, self.http_address)
    }

    /// URL of its gRPC services.
    pub fn grpc_url(&self) -> String {
        format!("{}://{}", if self.grpc_speaks_tls { "https" } else { "http" }, self.grpc_address)
    }

    /// Whether this process, which listens at its addresses, proves that the other one is gone.
    pub fn succeeds(&self, other: &Self) -> bool {
        let is_same_place = self.grpc_address == other.grpc_address && self.boot_id == other.boot_id;
        is_same_place && !self.boot_id.is_empty() && !self.is_same_life(other)
    }
}

/// Somebody who leads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leader {
    /// Who.
    pub record: CoordinatorRecord,
    /// Grows with every leadership.
    pub term: u64,
}

/// A time during which this coordinator leads without a break. Its term may grow: the key was lost and taken again before
/// anybody else had it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Session {
    /// Counts this process's leaderships, from 1.
    pub number: u64,
    /// In force now.
    pub term: u64,
}

/// What a coordinator knows of leadership.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct View {
    /// This coordinator.
    pub me: CoordinatorRecord,
    /// Set while this coordinator leads.
    pub session: Option<Session>,
    /// Who leads; none while nobody is known to.
    pub leader: Option<Leader>,
    /// All that are registered, by name, this one included.
    pub coordinators: Vec<CoordinatorRecord>,
}

impl View {
    /// Coordinators beside this one.
    pub fn others(&self) -> impl Iterator<Item = &CoordinatorRecord> {
        self.coordinators.iter().filter(|c| c.coordinator_id != self.me.coordinator_id)
    }

    /// As operators are shown them.
    pub fn listed(&self) -> Vec<Coordinator> {
        let leader = self.leader.as_ref().map(|l| l.record.coordinator_id.as_str());
        let listed = self.coordinators.iter().map(|c| Coordinator {
            coordinator_id: c.coordinator_id.clone(),
            role: if leader == Some(c.coordinator_id.as_str()) { "leader" } else { "standby" }.to_owned(),
            http_address: c.http_address.clone(),
            grpc_address: c.grpc_address.clone(),
        });
        listed.collect()
    }
}

/// Watches leadership. Clones watch the same.
#[derive(Clone)]
pub struct LeadershipView {
    receiver: watch::Receiver<View>,
    // Without a sender there would be no waiting for changes.
    _sender: Option<Arc<watch::Sender<View>>>,
}

impl LeadershipView {
    /// Of an actor.
    pub fn new(receiver: watch::Receiver<View>) -> Self {
        Self { receiver, _sender: None }
    }

    /// Of a coordinator that leads for ever: for tests of what runs under a leader.
    pub fn alone(record: CoordinatorRecord, term: u64) -> Self {
        let view = View {
            me: record.clone(),
            session: Some(Session { number: 1, term }),
            leader: Some(Leader { record: record.clone(), term }),
            coordinators: vec![record],
        };
        let (sender, receiver) = watch::channel(view);
        Self { receiver, _sender: Some(Arc::new(sender)) }
    }

    /// The present state.
    pub fn get(&self) -> View {
        self.receiver.borrow().clone()
    }

    /// The present state, which is no change to [`LeadershipView::changed`] any more.
    pub fn now(&mut self) -> View {
        self.receiver.borrow_and_update().clone()
    }

    /// The present leadership of this coordinator, if it leads.
    pub fn session(&self) -> Option<Session> {
        self.receiver.borrow().session
    }

    /// Waits for the next change; whatever was there before the last call, or the clone, is no change. Never returns once
    /// the process is being torn down.
    pub async fn changed(&mut self) -> View {
        if self.receiver.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
        self.receiver.borrow_and_update().clone()
    }

    /// Waits until something holds.
    pub async fn wait_for(&mut self, mut condition: impl FnMut(&View) -> bool) -> View {
        let found = match self.receiver.wait_for(|v| condition(v)).await {
            Ok(view) => Some(view.clone()),
            Err(_) => None,
        };
        match found {
            Some(view) => view,
            None => std::future::pending().await,
        }
    }

    /// Waits until a leadership of this coordinator is over.
    pub async fn ended(&mut self, number: u64) {
        self.wait_for(|v| v.session.is_none_or(|s| s.number != number)).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_successor_listens_where_its_predecessor_did() {
        let me = CoordinatorRecord {
            coordinator_id: "a:1".to_owned(),
            grpc_address: "a:1".to_owned(),
            boot_id: "b".to_owned(),
            incarnation: 2,
            ..CoordinatorRecord::default()
        };
        let before = CoordinatorRecord { incarnation: 1, ..me.clone() };
        assert!(me.succeeds(&before));
        assert!(!me.succeeds(&me));
        assert!(!me.succeeds(&CoordinatorRecord { boot_id: "c".to_owned(), ..before.clone() }));
        assert!(!me.succeeds(&CoordinatorRecord { grpc_address: "a:2".to_owned(), ..before }));
        assert!(!CoordinatorRecord { incarnation: 1, ..Default::default() }.succeeds(&CoordinatorRecord::default()));
    }

    #[tokio::test]
    async fn a_view_says_who_leads() {
        let record = CoordinatorRecord { coordinator_id: "a".to_owned(), ..CoordinatorRecord::default() };
        let mut view = LeadershipView::alone(record, 7);
        assert_eq!(view.session().map(|s| s.term), Some(7));
        assert_eq!(view.wait_for(|v| v.leader.is_some()).await.listed()[0].role, "leader");
        assert_eq!(view.get().others().count(), 0);
    }
}
