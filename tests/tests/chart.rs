//! The chart renders with few values and with all of them, Kubernetes would take what comes out, and the chart says what is
//! wrong with other values. Helm comes from the package index, as a library.

use std::process::Command;

use phalanx_tests::{
    process::repository,
    python::{environment, run},
};
use serde_json::{Value, json};

/// Kinds that are made with one file of values or another: none is left out by mistake.
const KINDS: [&str; 9] = [
    "HorizontalPodAutoscaler",
    "NetworkPolicy",
    "PodDisruptionBudget",
    "PrometheusRule",
    "ScaledObject",
    "Secret",
    "Service",
    "ServiceMonitor",
    "StatefulSet",
];

#[test]
fn what_the_chart_renders_is_what_kubernetes_takes() {
    let python = environment("chart-venv", "chart/requirements.txt").join("python");
    let script = repository().join("tests/chart/render.py");
    let said = run(Command::new(python).arg(script).arg(repository().join("deploy/helm/phalanx")));
    let found: Value = serde_json::from_str(&said).unwrap_or_else(|e| panic!("{e}: {said}"));
    assert_eq!(found["wrong"], json!([]));
    assert_eq!(found["kinds"], json!(KINDS));
    assert!(found["checked"].as_u64() > Some(60), "{found}");
    for (values, why) in [
        ("nothing", "coordinators need an etcd"),
        ("keda without address", "where is Prometheus?"),
        ("unknown place", "/kvMirror"),
        ("typing error", "sparse"),
    ] {
        let refusal = found["refusals"][values].as_str().unwrap_or_default();
        assert!(refusal.contains(why), "{values}: {refusal}");
    }
}
