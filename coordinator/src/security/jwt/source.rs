//! Where the issuer's keys are, and reading them again.

use std::{
    path::PathBuf,
    sync::{
        Arc, PoisonError, RwLock,
        mpsc::{self, SyncSender},
    },
    time::{Duration, Instant},
};

use anyhow::Context;
use phalanx_cluster::{watched::Watched, web};

use super::jwks::KeySet;
use crate::metrics::{self as names, count_reload};

/// As metrics name it.
const WHAT: &str = super::KEYS;
/// How often an address is asked.
#[derive(Clone, Copy)]
struct Pace {
    /// Between looks.
    refresh: Duration,
    /// Between looks that tokens of unknown signers ask for, and after failures.
    least_pause: Duration,
}

const PACE: Pace = Pace { refresh: Duration::from_secs(300), least_pause: Duration::from_secs(10) };
/// Longest wait for an answer.
const LIMIT: Duration = Duration::from_secs(10);
/// Longest document.
const MOST_BYTES: u64 = 1 << 20;

/// Lets keys be looked at before it is time.
pub(super) struct Refresher(Option<SyncSender<()>>);

impl Refresher {
    /// As soon as that is due.
    pub(super) fn ask(&self) {
        if let Some(wake) = &self.0 {
            // One that waits already is enough.
            let _ = wake.try_send(());
        }
    }
}

/// Keeps the keys as they are at their source.
pub(super) fn follow(source: &str, keys: Arc<RwLock<KeySet>>) -> anyhow::Result<Refresher> {
    follow_at(source, keys, PACE)
}

fn follow_at(source: &str, keys: Arc<RwLock<KeySet>>, pace: Pace) -> anyhow::Result<Refresher> {
    let put = move |text: &[u8]| -> Result<(), String> {
        let set = KeySet::parse(text)?;
        // Replaced as a whole.
        *keys.write().unwrap_or_else(PoisonError::into_inner) = set;
        Ok(())
    };
    if !is_address(source) {
        let watched = Watched::open(WHAT, vec![PathBuf::from(source)]).context("--jwks")?.counted(count_reload);
        put(&watched.contents()[0]).map_err(|e| anyhow::anyhow!("--jwks {source}: {e}"))?;
        watched.watch(move |contents| put(contents.first().map_or(&[][..], Vec::as_slice)))?;
        return Ok(Refresher(None));
    }
    let (wake, woken) = mpsc::sync_channel(1);
    let url = source.to_owned();
    std::thread::Builder::new().name(WHAT.to_owned()).spawn(move || {
        loop {
            let read_at = Instant::now();
            let pause = match fetch(&url).and_then(|text| put(&text)) {
                Ok(()) => {
                    metrics::counter!(names::RELOADS, "of" => WHAT).increment(1);
                    pace.refresh
                }
                Err(reason) => {
                    tracing::error!(url, reason, "the issuer's keys can't be read: those before stay in force");
                    metrics::counter!(names::RELOAD_FAILURES, "of" => WHAT).increment(1);
                    pace.least_pause
                }
            };
            match woken.recv_timeout(pause) {
                Err(mpsc::RecvTimeoutError::Disconnected) => return,
                // Whoever makes up tokens must not make us ask all the time.
                Ok(()) => std::thread::sleep(pace.least_pause.saturating_sub(read_at.elapsed())),
                Err(mpsc::RecvTimeoutError::Timeout) => {}
            }
        }
    })?;
    Ok(Refresher(Some(wake)))
}

fn is_address(source: &str) -> bool {
    ["https://", "http://"].iter().any(|scheme| source.starts_with(scheme))
}

fn fetch(url: &str) -> Result<Vec<u8>, String> {
    let agent = web::agent().timeout_global(Some(LIMIT)).build().new_agent();
    let mut answer = agent.get(url).call().map_err(|e| e.to_string())?;
    answer.body_mut().with_config().limit(MOST_BYTES).read_to_vec().map_err(|e| e.to_string())
}

#[cfg(test)]
#[path = "source_tests.rs"]
mod tests;
