//! `GET /metrics`, and the recorder behind it.

use std::time::Duration;

use axum::{
    extract::State,
    response::{IntoResponse, Response},
};
use http::header;
use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusHandle};

use super::FrontendState;
use crate::metrics as names;

/// Seconds of whole requests: from a refusal to a long generation.
const LATENCY_BUCKETS: &[f64] =
    &[0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0];
/// Seconds to a first token.
const TTFT_BUCKETS: &[f64] = &[
    0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
    80.0,
];
/// Seconds of a step or between tokens.
const STEP_BUCKETS: &[f64] = &[
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.5, 5.0,
];
/// Seconds that a loss takes from a stream.
const STALL_BUCKETS: &[f64] =
    &[0.025, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0];
/// Samples wait in memory until they are put into buckets, even if nobody scrapes.
const UPKEEP_INTERVAL: Duration = Duration::from_secs(5);

/// A recorder's settings: buckets for every histogram.
pub fn recorder() -> Result<PrometheusBuilder, BuildError> {
    let histograms = [
        (names::LATENCY, LATENCY_BUCKETS),
        (names::TTFT, TTFT_BUCKETS),
        (names::ITL, STEP_BUCKETS),
        (names::STEP_SECONDS, STEP_BUCKETS),
        (names::STALL, STALL_BUCKETS),
    ];
    histograms.into_iter().try_fold(PrometheusBuilder::new(), |builder, (name, buckets)| {
        builder.set_buckets_for_metric(Matcher::Full(name.to_owned()), buckets)
    })
}

/// Installs the process's recorder, describes all metrics and starts a thread for upkeep. An error if there is a
/// recorder already.
pub fn install_metrics() -> Result<PrometheusHandle, BuildError> {
    let handle = recorder()?.install_recorder()?;
    names::describe();
    let upkeep = handle.clone();
    let thread = std::thread::Builder::new().name("metrics upkeep".to_owned());
    let started = thread.spawn(move || {
        loop {
            std::thread::sleep(UPKEEP_INTERVAL);
            upkeep.run_upkeep();
        }
    });
    if let Err(error) = started {
        tracing::warn!(%error, "no thread for the upkeep of metrics: their memory grows until they are scraped");
    }
    Ok(handle)
}

/// `GET /metrics`: Prometheus text format.
pub async fn render(State(state): State<FrontendState>) -> Response {
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], state.metrics.render()).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn histograms_have_ascending_buckets() {
        let recorder = recorder().unwrap().build_recorder();
        let handle = recorder.handle();
        metrics::with_local_recorder(&recorder, || {
            names::describe();
            metrics::histogram!(names::TTFT).record(0.03);
            metrics::histogram!(names::LATENCY, "endpoint" => "x").record(3.0);
        });
        let text = handle.render();
        assert!(text.contains("time_to_first_token_seconds_bucket{le=\"0.04\"} 1"), "{text}");
        assert!(text.contains("inference_latency_seconds_bucket{endpoint=\"x\",le=\"5\"} 1"), "{text}");
        for buckets in [LATENCY_BUCKETS, TTFT_BUCKETS, STEP_BUCKETS, STALL_BUCKETS] {
            assert!(buckets.is_sorted());
        }
    }
}
