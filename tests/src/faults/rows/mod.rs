//! The faults, one entry each.

mod capacity;
mod clients;
mod coordinators;
mod hosts;
mod mirrored;
mod network;
mod planned;
mod poison;
mod shards;
mod stores;

use std::{process::Command, sync::OnceLock};

use anyhow::Result;

use super::{
    load::Sizes,
    netns::Hosts,
    round::Round,
    setup::{Model, Network, Setup},
};
use crate::{process::binary, workload::Numbers};

/// What a fault does to the epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Epochs {
    /// Nothing: the group goes on.
    Same,
    /// The group is formed again.
    Grow,
    /// Either.
    Any,
}

/// A fault and where it happens.
pub struct Row {
    /// As the command line spells it.
    pub name: &'static str,
    /// In words.
    pub fault: &'static str,
    /// Whether it belongs to the short matrix.
    pub short: bool,
    /// Whether it needs root.
    pub root: bool,
    /// Whether it needs shards with failpoints.
    pub failpoints: bool,
    /// What runs.
    pub setup: fn() -> Setup,
    /// Every round has a cluster of its own, for faults that a process can have only once.
    pub fresh: bool,
    /// With `fresh`: gives shards their failpoints, knowing how many steps the reference took.
    pub arm: Option<fn(Setup, u64, &mut Numbers) -> Setup>,
    /// Whether clients come back after a broken connection.
    pub resumes: bool,
    /// Whether clients ask again and again until the fault is over.
    pub repeats: bool,
    /// Other sizes than a model's usual ones.
    pub sizes: Option<fn(Model) -> Sizes>,
    /// Prompts of about so many tokens, each another, instead of the usual mix.
    pub long_prompts: Option<usize>,
    /// Whether a round begins only when copies of KV rows have caught up.
    pub mirrored: bool,
    /// Largest share of the tokens that running streams have at the fault that may be computed again.
    pub most_replayed: Option<f64>,
    /// What becomes of the epoch.
    pub epochs: Epochs,
    /// Waits for its moment and breaks something; may heal it too.
    pub inject: fn(&mut Round<'_>) -> Result<()>,
}

/// What most rows are.
const PLAIN: Row = Row {
    name: "",
    fault: "",
    short: true,
    root: false,
    failpoints: false,
    setup: || Setup::local(Model::Tiny, 1),
    fresh: false,
    arm: None,
    resumes: false,
    repeats: false,
    sizes: None,
    long_prompts: None,
    mirrored: false,
    most_replayed: None,
    epochs: Epochs::Grow,
    inject: |_| Ok(()),
};

impl Row {
    /// Why it can't be run here, if it can't.
    pub fn obstacle(&self) -> Option<&'static str> {
        if self.root && !rustix::process::geteuid().is_root() {
            Some("it needs root")
        } else if self.failpoints && !have_failpoints() {
            Some("it needs failpoints: dev builds have them, and builds with `--features phalanx-shard/failpoints`")
        } else if (self.setup)().network != Network::Loopback {
            Hosts::obstacle()
        } else {
            None
        }
    }
}

/// Whether the shard that would be started knows `--failpoint`.
fn have_failpoints() -> bool {
    static HAVE: OnceLock<bool> = OnceLock::new();
    *HAVE.get_or_init(|| {
        let args = ["--failpoint", "step:1:abort", "--version"];
        Command::new(binary("shard")).args(args).output().is_ok_and(|outcome| outcome.status.success())
    })
}

/// All rows, in the order of the matrix.
pub fn all() -> Vec<&'static Row> {
    let rows = [
        shards::ROWS,
        mirrored::ROWS,
        poison::ROWS,
        capacity::ROWS,
        network::ROWS,
        hosts::ROWS,
        clients::ROWS,
        planned::ROWS,
        coordinators::ROWS,
        stores::ROWS,
    ];
    rows.into_iter().flatten().collect()
}

/// A row by its name.
pub fn by_name(name: &str) -> Option<&'static Row> {
    all().into_iter().find(|row| row.name == name)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn names_are_unique() {
        let names: BTreeSet<_> = all().iter().map(|row| row.name).collect();
        assert_eq!(names.len(), all().len());
    }
}
