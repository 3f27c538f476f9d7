//! Shards as the actor knows them: how to reach them, and what they use.

use std::collections::BTreeMap;

use phalanx_cluster::id::ShardId;
use phalanx_proto::v1::{Hello, MirrorTarget, Peer, coordinator_message::Message};

use super::machine::Origin;
use crate::{metrics as names, shard_link::LinkHandle};

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
    /// Rank under which its memory is shown.
    shown_as: Option<usize>,
}

/// All shards that are attached.
#[derive(Default)]
pub struct Seats(BTreeMap<ShardId, Seat>);

impl Seats {
    /// A shard is attached.
    pub fn insert(&mut self, hello: Hello, link: LinkHandle) {
        let shard = link.origin().shard.clone();
        self.0.insert(shard, Seat { hello, link, memory: Memory::default(), shown_as: None });
    }

    /// That shard.
    pub fn get(&self, shard: &ShardId) -> Option<&Seat> {
        self.0.get(shard)
    }

    /// All, by name.
    pub fn iter(&self) -> impl Iterator<Item = (&ShardId, &Seat)> {
        self.0.iter()
    }

    /// That life of a shard is gone.
    pub fn remove(&mut self, from: &Origin) {
        if self.0.get(&from.shard).is_some_and(|s| s.link.origin() == from)
            && let Some(Seat { shown_as: Some(rank), .. }) = self.0.remove(&from.shard)
        {
            show(&from.shard, rank, Memory::default());
        }
    }

    /// Sends to a shard. One without a seat has left: its departure is on its way to the machine.
    pub fn tell(&self, shard: &ShardId, message: Message) {
        if let Some(seat) = self.0.get(shard) {
            seat.link.send(message);
        }
    }

    /// Notes what a shard uses, and shows it under its rank.
    pub fn note_memory(&mut self, from: &Origin, rank: Option<usize>, change: impl FnOnce(&mut Memory)) {
        let Some(seat) = self.0.get_mut(&from.shard).filter(|s| s.link.origin() == from) else { return };
        change(&mut seat.memory);
        if seat.shown_as != rank {
            if let Some(before) = seat.shown_as {
                show(&from.shard, before, Memory::default());
            }
            seat.shown_as = rank;
        }
        if let Some(rank) = rank {
            show(&from.shard, rank, seat.memory);
        }
    }

    /// As ranks find each other.
    pub fn peers(&self, ranks: &[ShardId]) -> Vec<Peer> {
        let peer = |(rank, shard): (u32, &ShardId)| {
            let hello = &self.0.get(shard)?.hello;
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
        let hello = &self.0.get(shard)?.hello;
        Some(MirrorTarget {
            shard_id: shard.0.clone(),
            address: hello.mirror_address.clone(),
            secret: hello.mirror_secret.clone(),
            ranks: u32::try_from(n_sources).unwrap_or(u32::MAX),
        })
    }
}

fn show(shard: &ShardId, rank: usize, memory: Memory) {
    let rank = rank.to_string();
    for (kind, bytes) in [("weights", memory.weights), ("kv", memory.kv), ("resident", memory.resident)] {
        metrics::gauge!(names::SHARD_MEMORY, "shard" => shard.0.clone(), "rank" => rank.clone(), "kind" => kind)
            .set(bytes as f64);
    }
}
