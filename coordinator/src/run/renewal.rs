//! The cluster's certificates are followed: when their files change, whoever shows or trusts them does so with what is in
//! them now. Connections that are there go on.

use anyhow::Context;
use phalanx_cluster::error_text::with_causes;

use super::parts::Foundation;
use crate::{
    frontend::forward::dial::{Connector, Way},
    metrics::count_reload,
};

/// Begins to follow, if there are any.
///
/// # Errors
/// If they can't be read any more, or there is no thread.
pub fn follow(base: &Foundation, connector: &Connector) -> anyhow::Result<()> {
    let Some(cluster) = &base.config.cluster_tls else { return Ok(()) };
    let (tls, dialer, connector) = (base.tls.clone(), base.dialer.clone(), connector.clone());
    let watching = cluster.watch(count_reload, move |renewed| {
        // All of it or nothing: who dials checks last.
        let shown = tls.prepare(renewed).map_err(|e| format!("{e:#}"))?;
        let way = Way::new(Some(renewed)).map_err(|e| format!("{e:#}"))?;
        dialer.renew(&renewed.ca, &renewed.certificate, &renewed.key).map_err(|e| with_causes(&e))?;
        tls.renew(shown);
        connector.renew(way);
        Ok(())
    });
    watching.context("--cluster-ca, --cluster-cert, --cluster-key can't be followed")
}
