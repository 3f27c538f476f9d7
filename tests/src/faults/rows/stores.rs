//! etcd that is away, in part or as a whole.

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use serde_json::json;

use super::{Epochs, PLAIN, Row, coordinators::two};
use crate::{
    client,
    faults::{
        etcd::Etcd,
        round::Round,
        setup::{Clients, Setup, StoreKind},
    },
};

/// Pause between requests while the store is away.
const REQUEST_PAUSE: Duration = Duration::from_millis(200);

pub(super) static ROWS: &[Row] = &[
    Row {
        name: "etcd-member-kill",
        fault: "SIGKILL of one etcd member of three for 3 s; new requests are asked meanwhile",
        setup: || Setup { store: StoreKind::Etcd(3), ..two(Clients::OfStandby) },
        epochs: Epochs::Same,
        inject: |round| {
            round.wait_decode(10, 60)?;
            let member = usize::try_from(round.numbers.below(3)).unwrap_or(0);
            round.inject();
            etcd(round)?.kill(member);
            serve_for(round, Duration::from_secs(3))?;
            etcd(round)?.restart(member)?;
            etcd(round)?.wait_healthy()
        },
        ..PLAIN
    },
    Row {
        name: "etcd-away",
        fault: "SIGKILL of all of etcd for 60 s (10 s in the short matrix); new requests are asked meanwhile",
        setup: || two(Clients::OfStandby),
        epochs: Epochs::Same,
        inject: |round| {
            round.wait_decode(10, 60)?;
            round.inject();
            let members = etcd(round)?.len();
            for member in 0..members {
                etcd(round)?.kill(member);
            }
            serve_for(round, Duration::from_secs(if round.full { 60 } else { 10 }))?;
            (0..members).try_for_each(|member| etcd(round)?.restart(member))?;
            etcd(round)?.wait_healthy()?;
            // Leases ended meanwhile: the leader takes its key again, and goes on as if nothing had been.
            serve_for(round, Duration::from_secs(3))
        },
        ..PLAIN
    },
];

fn etcd<'a>(round: &'a mut Round<'_>) -> Result<&'a mut Etcd> {
    round.deployment.etcd.as_mut().context("the row has no etcd")
}

/// Asks for completions, which must all be the same, until the time is over.
fn serve_for(round: &Round<'_>, time: Duration) -> Result<()> {
    let (http, _) = round.deployment.addresses()?;
    let body = json!({"prompt": [5, 6, 7], "max_tokens": 8, "temperature": 0, "ignore_eos": true});
    let until = Instant::now() + time;
    let mut first = None;
    while Instant::now() < until {
        let answer = client::post(&format!("{}/v1/completions", http[0]), &body)?;
        ensure!(answer.status == 200, "a new request is answered with {}: {}", answer.status, answer.body);
        let text = serde_json::from_str::<serde_json::Value>(&answer.body)?["choices"].clone();
        ensure!(*first.get_or_insert_with(|| text.clone()) == text, "another answer to the same request: {text}");
        thread::sleep(REQUEST_PAUSE);
    }
    Ok(())
}
