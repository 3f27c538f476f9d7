//! Coordinators that die, hang or hand over, with a standby on the same etcd.

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::Result;
use rustix::process::Signal;

use super::{
    Epochs, PLAIN, Row,
    mirrored::{LAG, LAG_OF_SHORT_STEPS, LARGE_KV},
};
use crate::faults::{
    load::Sizes,
    round::Round,
    setup::{Clients, Model, Setup, StoreKind},
    starvation::Starved,
};

pub(super) static ROWS: &[Row] = &[
    Row {
        name: "leader-kill",
        fault: "SIGKILL of the leading coordinator with a standby; its clients come back with their keys",
        setup: || two(Clients::OfLeader),
        resumes: true,
        epochs: Epochs::Any,
        inject: kill_leader,
        ..PLAIN
    },
    Row {
        name: "leader-kill-forwarded",
        fault: "SIGKILL of the leading coordinator; clients call the standby and know nothing of it",
        setup: || two(Clients::OfStandby),
        epochs: Epochs::Any,
        inject: kill_leader,
        ..PLAIN
    },
    Row {
        name: "leader-rank-kill",
        fault: "SIGKILL of the leading coordinator and of a rank at once, with a standby, and a spare that has copies of the \
                rank's KV rows; clients call the standby",
        setup: || two(Clients::OfStandby),
        long_prompts: Some(200),
        mirrored: true,
        most_replayed: Some(0.5),
        inject: |round| kill_leader_and_rank(round, LAG_OF_SHORT_STEPS),
        ..PLAIN
    },
    Row {
        name: "leader-rank-kill-1000",
        short: false,
        fault: "the same with SmolLM2, 16 streams of about 1,000 tokens",
        setup: || Setup { model: Model::Smollm2, ..two(Clients::OfStandby) }.with(&LARGE_KV),
        sizes: Some(|model| Sizes { tokens: 96, ..Sizes::of(model) }),
        long_prompts: Some(1000),
        mirrored: true,
        most_replayed: Some(0.2),
        inject: |round| kill_leader_and_rank(round, LAG),
        ..PLAIN
    },
    Row {
        name: "standby-kill",
        fault: "SIGKILL of the standby; clients call the leader",
        setup: || two(Clients::OfLeader),
        epochs: Epochs::Same,
        inject: kill_standby,
        ..PLAIN
    },
    Row {
        name: "standby-kill-forwarded",
        fault: "SIGKILL of the standby; its clients come back at the leader with their keys",
        setup: || two(Clients::OfStandby),
        resumes: true,
        epochs: Epochs::Same,
        inject: kill_standby,
        ..PLAIN
    },
    Row {
        name: "leader-term",
        fault: "SIGTERM of the leading coordinator, which hands over; its clients stay connected to it",
        setup: || two(Clients::OfLeader),
        epochs: Epochs::Any,
        inject: end_leader,
        ..PLAIN
    },
    Row {
        name: "leader-term-forwarded",
        short: false,
        fault: "SIGTERM of the leading coordinator; clients call the standby",
        setup: || two(Clients::OfStandby),
        epochs: Epochs::Any,
        inject: end_leader,
        ..PLAIN
    },
    Row {
        name: "lease-expiry",
        fault: "SIGSTOP of the leading coordinator until its lease has ended and the standby leads; clients call the standby",
        setup: || two(Clients::OfStandby).with(&["--leader-ttl-ms", "1000"]),
        epochs: Epochs::Any,
        inject: |round| {
            round.wait_decode(10, 60)?;
            let (leader, standby) = (round.deployment.leader()?, round.deployment.standby()?);
            let pid = round.deployment.coordinators[leader].process.pid();
            round.signal(pid, Signal::STOP);
            let succeeded = round.deployment.wait_leads(standby);
            // It wakes up in the belief that it leads.
            thread::sleep(Duration::from_millis(round.numbers.below(500)));
            round.signal(pid, Signal::CONT);
            succeeded
        },
        ..PLAIN
    },
    Row {
        name: "lease-starvation",
        fault: "the leading coordinator gets a hundredth of a processor, until the standby leads or for 4 s (15 s in long rounds); \
                clients call the standby",
        setup: || two(Clients::OfStandby).with(&["--leader-ttl-ms", "1000"]),
        // It may keep its lease.
        epochs: Epochs::Any,
        inject: starve_leader,
        ..PLAIN
    },
];

/// Two coordinators on one etcd, two ranks and a spare.
pub(super) fn two(clients: Clients) -> Setup {
    Setup { coordinators: 2, store: StoreKind::Etcd(1), clients, ..Setup::own(Model::Tiny, 1) }
}

fn kill_leader(round: &mut Round<'_>) -> Result<()> {
    round.wait_decode(10, 60)?;
    let (leader, standby) = (round.deployment.leader()?, round.deployment.standby()?);
    let pid = round.deployment.coordinators[leader].process.pid();
    round.signal(pid, Signal::KILL);
    round.deployment.wait_leads(standby)?;
    round.deployment.restart_coordinator(leader)
}

fn kill_leader_and_rank(round: &mut Round<'_>, lag: u64) -> Result<()> {
    round.wait_all_begun()?;
    round.wait_decode(10, 40)?;
    round.wait_mirrored(lag)?;
    let (leader, standby) = (round.deployment.leader()?, round.deployment.standby()?);
    let (rank, pid) = (round.rank_pid(None)?, round.deployment.coordinators[leader].process.pid());
    round.signal(pid, Signal::KILL);
    round.signal(rank, Signal::KILL);
    round.deployment.wait_leads(standby)?;
    round.deployment.restart_coordinator(leader)
}

fn starve_leader(round: &mut Round<'_>) -> Result<()> {
    round.wait_decode(10, 60)?;
    let (leader, standby) = (round.deployment.leader()?, round.deployment.standby()?);
    round.inject();
    let starved = Starved::start(round.deployment.coordinators[leader].process.pid(), Duration::from_millis(1));
    let until = Instant::now() + Duration::from_secs(if round.full { 15 } else { 4 });
    while Instant::now() < until && !round.deployment.leads(standby) {
        thread::sleep(Duration::from_millis(20));
    }
    // It goes on in the belief that it leads.
    thread::sleep(Duration::from_millis(round.numbers.below(500)));
    drop(starved);
    Ok(())
}

fn kill_standby(round: &mut Round<'_>) -> Result<()> {
    round.wait_decode(10, 60)?;
    let standby = round.deployment.standby()?;
    let pid = round.deployment.coordinators[standby].process.pid();
    round.signal(pid, Signal::KILL);
    round.deployment.restart_coordinator(standby)
}

fn end_leader(round: &mut Round<'_>) -> Result<()> {
    round.wait_decode(10, 60)?;
    let (leader, standby) = (round.deployment.leader()?, round.deployment.standby()?);
    let pid = round.deployment.coordinators[leader].process.pid();
    round.signal(pid, Signal::TERM);
    round.deployment.wait_leads(standby)?;
    round.deployment.restart_coordinator(leader)
}
