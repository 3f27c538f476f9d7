//! Looking for the leader: before attaching, and while attached for a newer one.

use std::time::Duration;

use futures::{StreamExt, stream::FuturesUnordered};
use tokio::time;
use tonic::transport::Uri;

use phalanx_proto::dial::Dialer;

use super::{dial::Oracle, directory::Directory};

/// Pause between looks for a newer leader.
const WATCH_INTERVAL: Duration = Duration::from_secs(1);

/// A coordinator that leads under a newer term.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Newer {
    /// Where it is.
    pub uri: Uri,
    /// Its term.
    pub term: u64,
}

/// The coordinators to attach to, in this order: the leader if one is found, else those that can't say who leads.
///
/// One coordinator alone is not asked. A coordinator that answers that it does not lead is left out.
pub async fn candidates(directory: &mut Directory, dialer: &Dialer) -> Vec<Uri> {
    let all = directory.all();
    if all.len() < 2 {
        return all;
    }
    let term = directory.term();
    let ask = |uri: Uri| async move {
        let answer = match Oracle::new(dialer, &uri) {
            Some(oracle) => oracle.ask(term).await,
            None => None,
        };
        (answer, uri)
    };
    let mut asked: FuturesUnordered<_> = all.into_iter().map(ask).collect();
    let mut unknown = Vec::new();
    while let Some((answer, uri)) = asked.next().await {
        match answer {
            // Under an older term it will learn from being asked that it is not.
            Some(answer) if answer.is_leader && answer.term >= term => return vec![uri],
            Some(answer) => {
                if directory.hint(&answer.grpc_address)
                    && let Some(uri) = directory.uri_of(&answer.grpc_address)
                {
                    asked.push(ask(uri));
                }
            }
            None => unknown.push(uri),
        }
    }
    let order = directory.all();
    unknown.sort_by_key(|uri| order.iter().position(|other| other == uri));
    unknown
}

/// Returns when one of these coordinators leads under a term greater than `term`.
pub async fn newer(dialer: &Dialer, others: &[Uri], term: u64) -> Newer {
    let oracles = || -> Vec<Oracle> { others.iter().filter_map(|uri| Oracle::new(dialer, uri)).collect() };
    let (mut generation, mut all) = (dialer.generation(), oracles());
    if all.is_empty() {
        return std::future::pending().await;
    }
    loop {
        time::sleep(WATCH_INTERVAL).await;
        if dialer.generation() != generation {
            // A connection that breaks must not come back with certificates that were renewed meanwhile.
            (generation, all) = (dialer.generation(), oracles());
        }
        let ask = |oracle: &Oracle| {
            let oracle = oracle.clone();
            async move { (oracle.ask(term).await, oracle.uri) }
        };
        let mut asked: FuturesUnordered<_> = all.iter().map(ask).collect();
        while let Some((answer, uri)) = asked.next().await {
            if let Some(answer) = answer.filter(|answer| answer.is_leader && answer.term > term) {
                return Newer { uri, term: answer.term };
            }
        }
    }
}
