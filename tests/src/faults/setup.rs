//! What runs in a row.

use std::path::PathBuf;

use super::netns::Joined;
use crate::{golden, model_cache};

/// Which model is served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Model {
    /// Three layers of a tiny checkpoint: steps take about a millisecond.
    Tiny,
    /// SmolLM2 135M.
    Smollm2,
}

impl Model {
    /// Where it lies; fetched if need be.
    pub fn path(self) -> PathBuf {
        match self {
            Self::Tiny => golden::tiny("llama"),
            Self::Smollm2 => model_cache::model(model_cache::SMOLLM2),
        }
    }

    /// As the command line and the reports spell it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Tiny => "tiny",
            Self::Smollm2 => "smollm2",
        }
    }
}

/// Where membership lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StoreKind {
    /// In the coordinator.
    Embedded,
    /// In a real etcd of so many members.
    Etcd(usize),
}

/// Which coordinator clients call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Clients {
    /// The leader.
    OfLeader,
    /// A standby, which forwards.
    OfStandby,
}

/// What joins the processes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Network {
    /// They are on one host.
    Loopback,
    /// Each shard has a host of its own, and so have the coordinator, its store and the clients together (needs root).
    Hosts(Joined),
}

/// A shard that the laboratory starts itself, because a fault needs its options.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct OwnShard {
    /// Options of its first life only, such as `--failpoint step:5:abort`.
    pub first_life: Vec<String>,
    /// Options of all its lives.
    pub always: Vec<String>,
    /// Whether it reaches the coordinator through the proxy.
    pub proxied: bool,
}

/// What runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Setup {
    /// Model.
    pub model: Model,
    /// Groups.
    pub replicas: u32,
    /// Ranks of each.
    pub world_size: u32,
    /// Shards that each coordinator starts.
    pub local_shards: u32,
    /// Shards that the laboratory starts, and starts again when they end.
    pub own_shards: Vec<OwnShard>,
    /// Coordinators.
    pub coordinators: usize,
    /// Store.
    pub store: StoreKind,
    /// Network.
    pub network: Network,
    /// Whom clients call.
    pub clients: Clients,
    /// Whether the embedded store has a disk of its own, of 64 KiB (needs root).
    pub tiny_disk: bool,
    /// More options of the coordinators.
    pub args: Vec<String>,
}

impl Setup {
    /// One coordinator, two ranks, `spares` spares: all local.
    pub fn local(model: Model, spares: u32) -> Self {
        Self {
            model,
            replicas: 1,
            world_size: 2,
            local_shards: 2 + spares,
            own_shards: Vec::new(),
            coordinators: 1,
            store: StoreKind::Embedded,
            network: Network::Loopback,
            clients: Clients::OfLeader,
            tiny_disk: false,
            args: Vec::new(),
        }
    }

    /// One coordinator, two ranks, `spares` spares: processes of the laboratory.
    pub fn own(model: Model, spares: u32) -> Self {
        Self {
            local_shards: 0,
            own_shards: vec![OwnShard::default(); 2 + spares as usize],
            ..Self::local(model, spares)
        }
    }

    /// One coordinator with an etcd beside it, two ranks, one spare: four hosts.
    pub fn on_hosts(joined: Joined) -> Self {
        let setup = Self { store: StoreKind::Etcd(1), network: Network::Hosts(joined), ..Self::own(Model::Tiny, 1) };
        // The ranks share a kernel, and so memory: hosts would not.
        setup.with(&["--collective", "tcp"])
    }

    /// One coordinator, `replicas` groups of one rank, `spares` spares: all local.
    pub fn groups(model: Model, replicas: u32, spares: u32) -> Self {
        Self { replicas, world_size: 1, local_shards: replicas + spares, ..Self::local(model, spares) }
    }

    /// The same with more options of the coordinators.
    pub fn with(mut self, args: &[&str]) -> Self {
        self.args.extend(args.iter().map(|a| (*a).to_owned()));
        self
    }

    /// Whether ranks copy their KV rows to a spare.
    pub fn mirrors(&self) -> bool {
        self.shards() > self.world_size as usize && !self.args.iter().any(|arg| arg == "off" || arg == "buddy")
    }

    /// Shards that are attached when all is well.
    pub fn shards(&self) -> usize {
        // Every coordinator starts its own local shards, and all of them serve the one that leads.
        self.own_shards.len() + self.local_shards as usize * self.coordinators
    }
}
