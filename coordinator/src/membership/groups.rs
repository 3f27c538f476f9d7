//! Where the groups' actors are, and which shard belongs to which.

use std::{
    collections::BTreeMap,
    sync::{Arc, PoisonError, RwLock},
};

use phalanx_cluster::id::ShardId;
use ractor::ActorRef;

use crate::group::actor::GroupMsg;

/// Where a group's actor is; it changes when the actor is started again.
#[derive(Clone)]
pub struct GroupAddress(Arc<RwLock<ActorRef<GroupMsg>>>);

impl GroupAddress {
    pub(super) fn new(actor: ActorRef<GroupMsg>) -> Self {
        Self(Arc::new(RwLock::new(actor)))
    }

    /// The present one.
    pub fn get(&self) -> ActorRef<GroupMsg> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn set(&self, actor: ActorRef<GroupMsg>) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = actor;
    }
}

/// All groups. Clones know the same.
#[derive(Clone)]
pub struct Groups {
    addresses: Arc<[GroupAddress]>,
    known: Arc<RwLock<Known>>,
}

/// What membership says of them.
#[derive(Default)]
struct Known {
    places: BTreeMap<ShardId, usize>,
    /// Shards of each group beyond those that it needs.
    n_spares: Vec<usize>,
}

impl Groups {
    pub(super) fn new(addresses: Vec<GroupAddress>) -> Self {
        Self { addresses: addresses.into(), known: Arc::default() }
    }

    /// Each of them, by index.
    pub fn all(&self) -> &[GroupAddress] {
        &self.addresses
    }

    /// The group that a shard belongs to: the one that it is in, or that waits for it.
    pub fn of(&self, shard: &ShardId) -> Option<&GroupAddress> {
        let group = *self.known.read().unwrap_or_else(PoisonError::into_inner).places.get(shard)?;
        self.addresses.get(group)
    }

    /// Whether a group that this shard does not belong to has a spare.
    pub fn others_have_spares(&self, shard: &ShardId) -> bool {
        let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
        let own = known.places.get(shard);
        known.n_spares.iter().enumerate().any(|(group, n)| *n > 0 && own != Some(&group))
    }

    /// From now on shards belong to these, and so many of each group are spares.
    pub(super) fn place(&self, places: BTreeMap<ShardId, usize>, n_spares: Vec<usize>) {
        *self.known.write().unwrap_or_else(PoisonError::into_inner) = Known { places, n_spares };
    }
}
