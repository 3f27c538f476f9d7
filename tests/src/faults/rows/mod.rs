//! The faults, one entry each.

mod capacity;
mod clients;
mod coordinators;
mod network;
mod planned;
mod shards;
mod stores;

use anyhow::Result;

use super::{
    load::Sizes,
    round::Round,
    setup::{Model, Setup},
};
use crate::workload::Numbers;

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
    /// Whether it needs failpoints, which only dev builds have.
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
    epochs: Epochs::Grow,
    inject: |_| Ok(()),
};

impl Row {
    /// Why it can't be run here, if it can't.
    pub fn obstacle(&self) -> Option<&'static str> {
        if self.root && !rustix::process::geteuid().is_root() {
            Some("it needs root")
        } else if self.failpoints && !cfg!(debug_assertions) {
            Some("it needs failpoints, which only dev builds have")
        } else {
            None
        }
    }
}

/// All rows, in the order of the matrix.
pub fn all() -> Vec<&'static Row> {
    let rows =
        [shards::ROWS, capacity::ROWS, network::ROWS, clients::ROWS, planned::ROWS, coordinators::ROWS, stores::ROWS];
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
