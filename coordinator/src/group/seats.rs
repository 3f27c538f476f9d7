//! Shards as the actor knows them: how to reach them, and what they use.

use std::collections::BTreeMap;

use phalanx_cluster::id::ShardId;
use phalanx_proto::v1::{Hello, MirrorTarget, Peer, coordinator_message::Message};

use super::machine::Origin;
use crate::{
    metrics::{self as names, GroupLabels, Present},
    shard_link::LinkHandle,
};

/// Memory that a shard uses, in bytes.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Memory {
    /// Of weights.
    pub weights: u64,
    /// Of KV pages.
    pub kv: u64,
    /// Of the whole process.
    pub resident: u64,
}

/// A shard as the group knows it.
pub struct Seat {
    /// What it said of itself.
    pub hello: Hello,
    /// Leads to it.
    pub link: LinkHandle,
    /// What it uses.
    pub memory: Memory,
    /// Its memory as it is shown under its rank.
    shown: Option<Shown>,
}

struct Shown {
    rank: usize,
    weights: Present,
    kv: Present,
    resident: Present,
}

/// All shards that are attached.
pub struct Seats {
    shards: BTreeMap<ShardId, Seat>,
    labels: GroupLabels,
}

impl Seats {
    /// Nobody yet; labels of what is shown of them.
    pub fn new(labels: GroupLabels) -> Self {
        Self { shards: BTreeMap::new(), labels }
    }

    /// A shard is attached.
    pub fn insert(&mut self, hello: Hello, link: LinkHandle) {
        let shard = link.origin().shard.clone();
        self.shards.insert(shard, Seat { hello, link, memory: Memory::default(), shown: None });
    }

    /// That shard.
    pub fn get(&self, shard: &ShardId) -> Option<&Seat> {
        self.shards.get(shard)
    }

    /// All, by name.
    pub fn iter(&self) -> impl Iterator<Item = (&ShardId, &Seat)> {
        self.shards.iter()
    }

    /// That life of a shard is gone.
    pub fn remove(&mut self, from: &Origin) {
        if self.shards.get(&from.shard).is_some_and(|s| s.link.origin() == from) {
            self.shards.remove(&from.shard);
        }
    }

    /// Sends to a shard. One without a seat has left: its departure is on its way to the machine.
    pub fn tell(&self, shard: &ShardId, message: Message) {
        if let Some(seat) = self.shards.get(shard) {
            seat.link.send(message);
        }
    }

    /// Notes what a shard uses, and shows it under its rank.
    pub fn note_memory(&mut self, from: &Origin, rank: Option<usize>, change: impl FnOnce(&mut Memory)) {
        let Some(seat) = self.shards.get_mut(&from.shard).filter(|s| s.link.origin() == from) else { return };
        change(&mut seat.memory);
        if seat.shown.as_ref().map(|shown| shown.rank) != rank {
            // What it was shown as ends before it is shown anew.
            seat.shown = None;
            seat.shown = rank.map(|rank| Shown::new(&self.labels, &from.shard, rank));
        }
        if let Some(shown) = &seat.shown {
            shown.set(seat.memory);
        }
    }

    /// Bytes that a shard uses of its device's memory, and those that it may use. On a CPU all shards of a host have an
    /// equal part of what was free there when the shard started.
    pub fn device_memory(&self, shard: &ShardId) -> Option<(u64, u64)> {
        let Seat { hello, memory, .. } = self.shards.get(shard)?;
        if hello.device != "cpu" {
            return Some((memory.weights + memory.kv, hello.memory_bytes));
        }
        let is_beside = |other: &&Seat| other.hello.host_id == hello.host_id && other.hello.device == "cpu";
        let n_sharers = self.shards.values().filter(is_beside).count().max(1) as u64;
        Some((memory.resident, (hello.memory_bytes / n_sharers).max(memory.resident)))
    }

    /// As ranks find each other.
    pub fn peers(&self, ranks: &[ShardId]) -> Vec<Peer> {
        let peer = |(rank, shard): (u32, &ShardId)| {
            let hello = &self.shards.get(shard)?.hello;
            Some(Peer {
                rank,
                shard_id: shard.0.clone(),
                host_id: hello.host_id.clone(),
                collective_address: hello.collective_address.clone(),
                weight: 1.0,
            })
        };
        (0u32..).zip(ranks).filter_map(peer).collect()
    }

    /// As ranks find a shard that keeps copies of the KV rows of so many of them.
    pub fn mirror(&self, shard: &ShardId, n_sources: usize) -> Option<MirrorTarget> {
        let hello = &self.shards.get(shard)?.hello;
        Some(MirrorTarget {
            shard_id: shard.0.clone(),
            address: hello.mirror_address.clone(),
            secret: hello.mirror_secret.clone(),
            ranks: u32::try_from(n_sources).unwrap_or(u32::MAX),
        })
    }
}

impl Shown {
    fn new(labels: &GroupLabels, shard: &ShardId, rank: usize) -> Self {
        let present = |kind: &str| {
            let of = [("shard", shard.0.clone()), ("rank", rank.to_string()), ("kind", kind.to_owned())];
            Present::new(names::SHARD_MEMORY, labels.with(of))
        };
        Self { rank, weights: present("weights"), kv: present("kv"), resident: present("resident") }
    }

    fn set(&self, memory: Memory) {
        self.weights.set(memory.weights as f64);
        self.kv.set(memory.kv as f64);
        self.resident.set(memory.resident as f64);
    }
}
