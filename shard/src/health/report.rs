//! What a shard says of itself: whether it is ready, and its metrics in Prometheus' text format.

use std::{fmt::Write as _, time::Instant};

use phalanx_proto::v1::Hello;

use crate::{
    engine::{
        actor::EngineHandle,
        standing::{Standing, State},
        vitals::Vitals,
    },
    memory,
};

/// What is known of the process.
pub struct Shard {
    name: String,
    device: String,
    threads: u32,
    standing: Standing,
    vitals: Vitals,
}

/// A metric: its name, type, meaning, and its samples as labels and values.
type Family = (&'static str, &'static str, &'static str, Vec<(String, f64)>);

impl Shard {
    /// Of a shard that introduces itself so.
    pub fn new(hello: &Hello, engine: &EngineHandle) -> Self {
        Self {
            name: hello.shard_id.clone(),
            device: hello.device.clone(),
            threads: hello.threads,
            standing: engine.standing.clone(),
            vitals: engine.vitals.clone(),
        }
    }

    #[cfg(test)]
    pub(super) fn for_tests(name: &str) -> Self {
        let (standing, vitals) = (Standing::default(), Vitals::default());
        Self { name: name.to_owned(), device: "cpu".to_owned(), threads: 1, standing, vitals }
    }

    /// Whether nobody need wait for it.
    ///
    /// # Errors
    /// What it waits for.
    pub fn readiness(&self) -> Result<(), String> {
        self.standing.get().readiness(Instant::now())
    }

    /// All metrics.
    pub fn metrics(&self) -> String {
        let now = Instant::now();
        let state = self.standing.get();
        let busy = self.vitals.busy().map_or(0.0, |busy| busy.lasts(now).as_secs_f64());
        let mut out = String::new();
        for (name, kind, help, samples) in self.families(&state, busy, now) {
            let _infallible = writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}");
            for (labels, value) in samples {
                let shard = escaped(&self.name);
                let _infallible = writeln!(out, "{name}{{shard=\"{shard}\"{labels}}} {value}");
            }
        }
        out
    }

    fn families(&self, state: &State, busy: f64, now: Instant) -> Vec<Family> {
        let one = |value: f64| vec![(String::new(), value)];
        let flag = |is_so: bool| one(f64::from(u8::from(is_so)));
        let seat = state.seat.map_or_else(Vec::new, |seat| {
            let labels = format!(",rank=\"{}\",world_size=\"{}\"", seat.rank, seat.world_size);
            vec![(labels, seat.epoch as f64)]
        });
        let phase = |phase: &str, seconds: f64| (format!(",phase=\"{phase}\""), seconds);
        let device = escaped(&self.device);
        let about =
            format!(",device=\"{device}\",threads=\"{}\",version=\"{}\"", self.threads, env!("CARGO_PKG_VERSION"));
        vec![
            ("phalanx_shard_info", "gauge", "1, with what the shard is", vec![(about, 1.0)]),
            (
                "phalanx_shard_attached",
                "gauge",
                "1 while a coordinator has taken the shard in",
                flag(state.attached_since.is_some()),
            ),
            ("phalanx_shard_ready", "gauge", "1 while /readyz is 200", flag(state.readiness(now).is_ok())),
            (
                "phalanx_shard_serving",
                "gauge",
                "1 while it computes as a rank",
                flag(state.seat.is_some_and(|seat| seat.is_serving)),
            ),
            ("phalanx_shard_epoch", "gauge", "Epoch of the group that it has a rank in", seat),
            (
                "phalanx_shard_prepared_ranks",
                "gauge",
                "Ranks whose weights it has loaded ahead",
                one(state.prepared.len() as f64),
            ),
            ("phalanx_shard_steps_total", "counter", "Steps that were computed", one(state.n_steps as f64)),
            (
                "phalanx_shard_step_seconds_total",
                "counter",
                "Time of these steps, in computing and in waiting for other ranks",
                vec![
                    phase("compute", state.computing.as_secs_f64()),
                    phase("collective", state.in_collectives.as_secs_f64()),
                ],
            ),
            (
                "phalanx_shard_busy_seconds",
                "gauge",
                "How long the step that is computed now has taken so far",
                one(busy),
            ),
            (
                "phalanx_shard_failures_total",
                "counter",
                "What the coordinator wanted and the shard could not do",
                one(state.n_failures as f64),
            ),
            (
                "phalanx_shard_resident_bytes",
                "gauge",
                "Memory of the process that is in RAM",
                one(memory::resident_bytes() as f64),
            ),
            (
                "phalanx_shard_weight_bytes",
                "gauge",
                "Packed weights of the rank that it took last",
                one(state.weight_bytes as f64),
            ),
            ("phalanx_shard_kv_bytes", "gauge", "KV pages of its rank", one(state.kv_bytes as f64)),
        ]
    }
}

/// A label's value.
fn escaped(text: &str) -> String {
    text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_metric_has_its_form() {
        let text = Shard::for_tests("a\"b").metrics();
        let mut typed = Vec::new();
        for line in text.lines() {
            if let Some(rest) = line.strip_prefix("# TYPE ") {
                typed.push(rest.split_once(' ').unwrap());
            } else if !line.starts_with("# HELP ") {
                let (name, rest) = line.split_once('{').unwrap();
                let (labels, value) = rest.rsplit_once("} ").unwrap();
                assert!(labels.starts_with("shard=\"a\\\"b\""), "{line}");
                assert!(value.parse::<f64>().is_ok(), "{line}");
                let (last, kind) = typed.last().unwrap();
                assert_eq!(name, *last);
                assert_eq!(*kind == "counter", name.ends_with("_total"), "{line}");
            }
        }
        assert!(typed.len() > 10);
        assert!(text.contains("phalanx_shard_step_seconds_total{shard=\"a\\\"b\",phase=\"collective\"} 0"), "{text}");
    }
}
