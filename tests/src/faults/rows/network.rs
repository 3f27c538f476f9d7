//! The connection between a shard and its coordinator: cut, half cut, slow. The proxy stands between the two,
//! in a cluster of each round's own: a shard that comes back dials the leader where that says that it is, past the proxy.

use std::{thread, time::Duration};

use anyhow::{Context, Result};

use super::{Epochs, PLAIN, Row};
use crate::faults::{
    proxy::Weather,
    round::Round,
    setup::{Model, Setup},
};

const FINE: Weather = Weather { hold_up: false, hold_down: false, cut: false, delay: Duration::ZERO, loss_percent: 0 };

pub(super) static ROWS: &[Row] = &[
    Row {
        name: "link-cut",
        fault: "the connection between a rank and the coordinator is cut, and can't be made again for a while",
        setup: proxied,
        fresh: true,
        inject: |round| during(round, Weather { cut: true, ..FINE }, 2, 10),
        ..PLAIN
    },
    Row {
        name: "link-cut-to-coordinator",
        fault: "nothing that a rank says comes through, what it is told does",
        setup: proxied,
        fresh: true,
        inject: |round| during(round, Weather { hold_up: true, ..FINE }, 2, 10),
        ..PLAIN
    },
    Row {
        name: "link-cut-to-shard",
        fault: "nothing that a rank is told comes through, what it says does",
        setup: proxied,
        fresh: true,
        inject: |round| during(round, Weather { hold_down: true, ..FINE }, 2, 10),
        ..PLAIN
    },
    Row {
        name: "link-cut-without-spare",
        short: false,
        fault: "the connection between a rank and the coordinator is silent in both directions, without a spare",
        setup: || with_proxy(Setup::own(Model::Tiny, 0)),
        fresh: true,
        inject: |round| during(round, Weather { hold_up: true, hold_down: true, ..FINE }, 2, 10),
        ..PLAIN
    },
    Row {
        name: "link-slow",
        fault: "200 ms more in each direction, and 5 % of the packets are lost",
        setup: proxied,
        fresh: true,
        // Slow is not gone.
        epochs: Epochs::Any,
        inject: |round| during(round, Weather { delay: Duration::from_millis(200), loss_percent: 5, ..FINE }, 3, 20),
        ..PLAIN
    },
];

fn proxied() -> Setup {
    with_proxy(Setup::own(Model::Tiny, 1))
}

fn with_proxy(mut setup: Setup) -> Setup {
    setup.own_shards[1].proxied = true;
    setup
}

/// Bad weather for so many seconds (in the full matrix, for so many more), from a moment in decode on.
fn during(round: &mut Round<'_>, weather: Weather, seconds: u64, full: u64) -> Result<()> {
    round.wait_decode(10, 40)?;
    round.inject();
    let set = |weather| {
        let proxy = round.deployment.proxy.as_ref().context("there is a proxy")?;
        proxy.set(weather);
        anyhow::Ok(())
    };
    set(weather)?;
    thread::sleep(Duration::from_secs(if round.full { full } else { seconds }));
    set(FINE)
}
