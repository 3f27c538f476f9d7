//! Hosts that lose each other: cables that are pulled, packets that go one way only, come late or never. Each shard has a
//! host of its own, so ranks exchange sums over TCP.

use std::{thread, time::Duration};

use anyhow::{Context, Result};

use super::{Epochs, PLAIN, Row};
use crate::faults::{
    deployment::{host_of, own_index},
    netns::{Hosts, Joined},
    round::Round,
    setup::Setup,
    switch::Path,
};

pub(super) static ROWS: &[Row] = &[
    Row {
        name: "host-cut",
        fault: "the host of a rank loses its cable; coordinator and etcd are on another host, a spare on a third",
        setup: || Setup::on_hosts(Joined::ByBridge),
        inject: |round| {
            let host = host_of_rank(round, None)?;
            during(round, 2, 10, |hosts| hosts.set_link(host, false), |hosts| hosts.set_link(host, true))
        },
        ..PLAIN
    },
    Row {
        name: "host-cut-incoming",
        short: false,
        fault: "the host of a rank hears nothing, and is heard",
        setup: || Setup::on_hosts(Joined::ByBridge),
        inject: |round| {
            let host = host_of_rank(round, None)?;
            during(round, 2, 10, |hosts| hosts.drop_incoming(host), |hosts| hosts.drop_nothing(host))
        },
        ..PLAIN
    },
    Row {
        name: "host-cut-outgoing",
        fault: "the host of a rank is not heard, and hears",
        setup: || Setup::on_hosts(Joined::ByBridge),
        inject: |round| {
            let host = host_of_rank(round, None)?;
            during(round, 2, 10, |hosts| hosts.drop_outgoing(host), |hosts| hosts.drop_nothing(host))
        },
        ..PLAIN
    },
    Row {
        name: "ranks-cut",
        fault: "the hosts of both ranks reach everybody but each other",
        setup: || Setup::on_hosts(Joined::ByBridge),
        inject: |round| {
            let ranks = [host_of_rank(round, Some(0))?, host_of_rank(round, Some(1))?];
            during(round, 4, 10, |hosts| hosts.set_apart(&ranks, true), |hosts| hosts.set_apart(&ranks, false))
        },
        ..PLAIN
    },
    Row {
        name: "host-slow",
        fault: "packets between the coordinator's host and a rank's come 200 ms later, and 5 % never, in both directions",
        setup: || Setup::on_hosts(Joined::BySwitch),
        epochs: Epochs::Any,
        inject: |round| {
            let host = host_of_rank(round, None)?;
            slow(round, 0, host)
        },
        ..PLAIN
    },
    Row {
        name: "ranks-slow",
        short: false,
        fault: "packets between the hosts of both ranks come 200 ms later, and 5 % never, in both directions",
        setup: || Setup::on_hosts(Joined::BySwitch),
        epochs: Epochs::Any,
        inject: |round| {
            let (one, other) = (host_of_rank(round, Some(0))?, host_of_rank(round, Some(1))?);
            slow(round, one, other)
        },
        ..PLAIN
    },
];

/// The host of a seeded rank, or of a given one.
fn host_of_rank(round: &mut Round<'_>, rank: Option<u32>) -> Result<usize> {
    let world = u64::from(round.deployment.setup.world_size);
    let rank = rank.unwrap_or_else(|| u32::try_from(round.numbers.below(world)).unwrap_or(0));
    let shard = round.deployment.rank(rank)?.shard_id;
    own_index(&shard).map(host_of).with_context(|| format!("{shard} is no shard of the laboratory"))
}

/// For so many seconds (in long rounds, for so many more), from a moment in decode on.
fn during(
    round: &mut Round<'_>,
    seconds: u64,
    long: u64,
    begin: impl Fn(&Hosts) -> Result<()>,
    end: impl Fn(&Hosts) -> Result<()>,
) -> Result<()> {
    round.wait_decode(10, 40)?;
    let hosts = round.deployment.hosts.clone().context("the row has no hosts")?;
    round.inject();
    begin(&hosts)?;
    thread::sleep(Duration::from_secs(if round.full { long } else { seconds }));
    end(&hosts)
}

fn slow(round: &mut Round<'_>, one: usize, other: usize) -> Result<()> {
    let set = |hosts: &Hosts, path| {
        let switch = hosts.switch.as_ref().context("the row has no switch")?;
        switch.set(one, other, path);
        switch.set(other, one, path);
        Ok(())
    };
    let bad = Path { delay: Duration::from_millis(200), loss_percent: 5 };
    during(round, 3, 20, |hosts| set(hosts, bad), |hosts| set(hosts, Path::default()))
}
