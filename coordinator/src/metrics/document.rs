//! `docs/metrics.md` says what the catalogue says.

use super::{CATALOGUE, Kind, Metric};

/// The table's lines in the documentation.
fn row(metric: &Metric) -> String {
    let kind = match metric.kind {
        Kind::Counter => "counter",
        Kind::Gauge => "gauge",
        Kind::Histogram(_) => "histogram",
    };
    let labels: Vec<_> = metric.labels.iter().map(|label| format!("`{label}`")).collect();
    format!("| `{}` | {kind} | {} | {} |", metric.name, labels.join(" "), metric.help)
}

#[test]
fn the_documentation_has_every_metric_and_no_other() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/metrics.md");
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let told: Vec<&str> = text.lines().filter(|line| line.starts_with("| `")).collect();
    let wanted: Vec<String> = CATALOGUE.iter().map(row).collect();
    assert!(told == wanted, "the rows of docs/metrics.md must be these:\n{}", wanted.join("\n"));
}

#[test]
fn names_say_what_is_measured() {
    for Metric { name, kind, unit, labels, help } in CATALOGUE {
        assert!(!help.ends_with('.') && help.len() > 5, "{name}: {help}");
        assert!(labels.iter().all(|label| !label.is_empty()), "{name}");
        // Given by others: the guide of the metrics and vLLM.
        if matches!(*name, "gpu_memory_used" | "gpu_memory_total" | "vllm:iteration_tokens_total") {
            continue;
        }
        assert_eq!(*kind == Kind::Counter, name.ends_with("_total"), "{name}");
        assert_eq!(*unit == metrics::Unit::Seconds, name.ends_with("_seconds"), "{name}");
        assert_eq!(*unit == metrics::Unit::Bytes, name.ends_with("_bytes"), "{name}");
    }
    let mut names: Vec<_> = CATALOGUE.iter().map(|metric| metric.name).collect();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), CATALOGUE.len(), "each once");
}
