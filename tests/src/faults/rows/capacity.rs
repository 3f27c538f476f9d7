//! Less than there was: shards that don't come back for a while, a disk without room.

use std::{fs, io::Write, thread, time::Duration};

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;

use super::{Epochs, PLAIN, Row};
use crate::faults::{
    eventually,
    round::Round,
    setup::{Model, Setup},
};

pub(super) static ROWS: &[Row] = &[
    Row {
        name: "shards-lost-regroup",
        fault: "SIGKILL of a shard and of the only spare, which stay away: one rank serves until they are back",
        setup: || Setup::own(Model::Tiny, 1).with(&["--regroup-after", "1"]),
        inject: regroup,
        ..PLAIN
    },
    Row {
        name: "store-disk-full",
        fault: "no room on the disk of the embedded store while a shard is killed twice",
        root: true,
        setup: || Setup { tiny_disk: true, ..Setup::local(Model::Tiny, 1) },
        inject: disk_full,
        ..PLAIN
    },
    Row {
        name: "store-disk-full-idle",
        short: false,
        fault: "no room on the disk of the embedded store while nothing else happens",
        root: true,
        epochs: Epochs::Same,
        setup: || Setup { tiny_disk: true, ..Setup::local(Model::Tiny, 1) },
        inject: |round| {
            round.wait_decode(10, 60)?;
            fill_disk(round)
        },
        ..PLAIN
    },
];

fn regroup(round: &mut Round<'_>) -> Result<()> {
    round.wait_decode(10, 40)?;
    round.deployment.own.set_restart(false);
    let (rank, spare) = (round.rank_pid(None)?, round.deployment.spare()?.pid);
    round.signal(rank, Signal::KILL);
    round.signal(spare, Signal::KILL);
    let alone = eventually("one rank serves", || {
        round.is_over() || round.deployment.status().is_ok_and(|s| s.phase == "serving" && s.world_size == 1)
    });
    // Some tokens come from the smaller group.
    thread::sleep(Duration::from_millis(50 + round.numbers.below(200)));
    let over = round.is_over();
    round.deployment.own.set_restart(true);
    alone?;
    ensure!(!over || round.deployment.status()?.world_size == 1, "the streams did not wait for the smaller group");
    Ok(())
}

fn fill_disk(round: &mut Round<'_>) -> Result<()> {
    round.inject();
    let folder = round.deployment.coordinators[0].state_dir();
    let mut file = fs::File::create(folder.join("filler"))?;
    // Until nothing fits any more.
    for size in [4096, 1] {
        while file.write_all(&vec![0; size]).is_ok() {}
    }
    Ok(())
}

fn disk_full(round: &mut Round<'_>) -> Result<()> {
    round.wait_decode(10, 40)?;
    fill_disk(round)?;
    // The first formation has its epoch in reserve, the second must wait until there is room.
    for _ in 0..2 {
        let epoch = round.deployment.epoch();
        let pid = round.rank_pid(None)?;
        round.signal(pid, Signal::KILL);
        if round.wait_reformed_within(Duration::from_secs(3), epoch).is_err() {
            break;
        }
    }
    let folder = round.deployment.coordinators[0].state_dir();
    fs::remove_file(folder.join("filler")).context("the disk can't be emptied")
}
