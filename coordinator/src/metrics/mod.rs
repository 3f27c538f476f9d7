//! What is measured: every metric with its kind, unit, labels and help text ([`CATALOGUE`]), gauges that end with their
//! owner, and the labels of a group's metrics. Code records through the `metrics` macros with the names from here.
//!
//! Handles are made once and kept: recording through them is an atomic operation, so that nothing on the way of a token
//! looks a name up, allocates or waits.

pub mod buckets;
mod catalogue;
#[cfg(test)]
mod document;
mod present;

use metrics::{Label, Unit, describe_counter, describe_gauge, describe_histogram};

pub use catalogue::*;
pub use present::Present;

/// A metric: what Prometheus and people are told of it.
#[derive(Debug, Clone, Copy)]
pub struct Metric {
    /// As it is scraped.
    pub name: &'static str,
    /// How it moves.
    pub kind: Kind,
    /// What it counts; the name says it too.
    pub unit: Unit,
    /// Names of its labels. `group?` is there only where there are several groups.
    pub labels: &'static [&'static str],
    /// What it means.
    pub help: &'static str,
}

/// How a metric moves.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Kind {
    /// Only up.
    Counter,
    /// Up and down.
    Gauge,
    /// Counts of values by size; upper bounds of the buckets.
    Histogram(&'static [f64]),
}

/// Tells the recorder all names, units and help texts.
pub fn describe() {
    for metric in CATALOGUE {
        match metric.kind {
            Kind::Counter => describe_counter!(metric.name, metric.unit, metric.help),
            Kind::Gauge => describe_gauge!(metric.name, metric.unit, metric.help),
            Kind::Histogram(_) => describe_histogram!(metric.name, metric.unit, metric.help),
        }
    }
}

/// Counts that a file changed that is followed: of what, and whether it was taken.
pub fn count_reload(of: &'static str, is_taken: bool) {
    let name = if is_taken { RELOADS } else { RELOAD_FAILURES };
    metrics::counter!(name, "of" => of).increment(1);
}

/// Labels of what is measured of one group.
#[derive(Debug, Clone, Default)]
pub struct GroupLabels {
    /// Which of the cluster's groups.
    pub index: usize,
    /// `group`, if there are others.
    pub own: Vec<Label>,
    /// `model_name` and `engine`, as the `vllm:*` metrics have them.
    pub engine: Vec<Label>,
}

impl GroupLabels {
    /// Of a group of so many that serve a model.
    pub fn new(model: &str, index: usize, n_groups: usize) -> Self {
        let own = if n_groups > 1 { vec![Label::new("group", index.to_string())] } else { Vec::new() };
        let engine = vec![Label::new("model_name", model.to_owned()), Label::new("engine", index.to_string())];
        Self { index, own, engine }
    }

    /// Its own and others.
    pub fn with<const N: usize>(&self, others: [(&'static str, String); N]) -> Vec<Label> {
        join(&self.own, others)
    }

    /// Those of the `vllm:*` metrics and others.
    pub fn engine_with<const N: usize>(&self, others: [(&'static str, String); N]) -> Vec<Label> {
        join(&self.engine, others)
    }
}

fn join<const N: usize>(labels: &[Label], others: [(&'static str, String); N]) -> Vec<Label> {
    labels.iter().cloned().chain(others.map(|(name, value)| Label::new(name, value))).collect()
}
