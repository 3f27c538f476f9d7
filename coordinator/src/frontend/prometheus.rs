//! `GET /metrics`, and the recorder behind it.

use std::time::Duration;

use axum::{
    extract::State,
    response::{IntoResponse, Response},
};
use http::header;
use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusHandle};

use super::FrontendState;
use crate::metrics::{self as names, Kind};

/// Samples wait in memory until they are put into buckets, even if nobody scrapes.
const UPKEEP_INTERVAL: Duration = Duration::from_secs(5);

/// A recorder's settings: buckets for every histogram.
pub fn recorder() -> Result<PrometheusBuilder, BuildError> {
    names::CATALOGUE.iter().try_fold(PrometheusBuilder::new(), |builder, metric| match metric.kind {
        Kind::Histogram(buckets) => builder.set_buckets_for_metric(Matcher::Full(metric.name.to_owned()), buckets),
        Kind::Counter | Kind::Gauge => Ok(builder),
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
        for metric in names::CATALOGUE {
            if let Kind::Histogram(buckets) = metric.kind {
                assert!(buckets.is_sorted(), "{}", metric.name);
            }
        }
    }
}
