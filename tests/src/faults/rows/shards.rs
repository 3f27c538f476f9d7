//! Shards that die, hang or come late.

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use phalanx_proto::v1::StatusResponse;
use rustix::process::Signal;

use super::{Epochs, PLAIN, Row};
use crate::{
    faults::{
        PATIENCE,
        deployment::own_id,
        load::Sizes,
        round::Round,
        setup::{Model, Setup},
        within,
    },
    process::is_alive,
};

pub(super) static ROWS: &[Row] = &[
    Row {
        name: "none",
        fault: "nothing at all: what the laboratory itself does",
        epochs: Epochs::Same,
        inject: |round| round.wait_decode(50, 50),
        ..PLAIN
    },
    Row {
        name: "shard-kill-decode",
        fault: "SIGKILL of a shard in decode, with a spare",
        setup: || Setup::local(Model::Smollm2, 1),
        inject: kill_in_decode,
        ..PLAIN
    },
    Row {
        name: "shard-kill-decode-no-spare",
        short: false,
        fault: "SIGKILL of a shard in decode, without a spare: its keeper starts it again",
        setup: || Setup::local(Model::Smollm2, 0),
        inject: kill_in_decode,
        ..PLAIN
    },
    Row {
        name: "shard-kill-prefill",
        short: false,
        fault: "SIGKILL of a shard while prompts are computed, with a spare",
        setup: || Setup::local(Model::Smollm2, 1).with(&["--no-enable-prefix-caching"]),
        sizes: Some(long_prompts),
        inject: |round| {
            round.wait_prefill();
            kill(round)
        },
        ..PLAIN
    },
    Row {
        name: "shards-kill-two",
        fault: "SIGKILL of both shards of the group at once, with one spare",
        inject: |round| {
            round.wait_decode(10, 60)?;
            let pids = [round.rank_pid(Some(0))?, round.rank_pid(Some(1))?];
            pids.into_iter().for_each(|pid| round.signal(pid, Signal::KILL));
            Ok(())
        },
        ..PLAIN
    },
    Row {
        name: "shard-kill-thrice",
        fault: "SIGKILL of a shard three times, each as soon as the group serves again",
        inject: |round| {
            round.wait_decode(5, 20)?;
            for last in [false, false, true] {
                let epoch = round.deployment.epoch();
                kill(round)?;
                if !last {
                    round.wait_reformed(epoch)?;
                }
            }
            Ok(())
        },
        ..PLAIN
    },
    Row {
        name: "shard-stop-5s",
        fault: "SIGSTOP of a shard in decode for 5 s, with a spare",
        setup: || Setup::local(Model::Tiny, 1),
        inject: |round| {
            round.wait_decode(10, 60)?;
            let pid = round.rank_pid(None)?;
            round.signal(pid, Signal::STOP);
            thread::sleep(Duration::from_secs(5));
            round.signal(pid, Signal::CONT);
            Ok(())
        },
        ..PLAIN
    },
    Row {
        name: "shard-stop-for-ever",
        short: false,
        fault: "SIGSTOP of a local shard in decode for ever, with a spare",
        setup: || Setup::local(Model::Tiny, 1),
        inject: |round| {
            round.wait_decode(10, 60)?;
            let pid = round.rank_pid(None)?;
            round.signal(pid, Signal::STOP);
            Ok(())
        },
        ..PLAIN
    },
    Row {
        name: "shard-kill-loading",
        short: false,
        fault: "SIGKILL of a shard in decode, and of another one while the group loads",
        setup: || Setup::local(Model::Smollm2, 0),
        inject: |round| {
            round.wait_decode(10, 60)?;
            kill(round)?;
            // The first one is back after 0.1 s and loads for some tenths of a second.
            thread::sleep(Duration::from_millis(150 + round.numbers.below(400)));
            let others = round.deployment.coordinators[0].local_shards();
            let index = usize::try_from(round.numbers.below(others.len().max(1) as u64)).unwrap_or(0);
            if let Some(pid) = others.get(index) {
                round.signal(*pid, Signal::KILL);
            }
            Ok(())
        },
        ..PLAIN
    },
    Row {
        name: "spare-kill",
        fault: "SIGKILL of the spare in decode",
        // The group is switched when the spare is back, to copy KV rows to it.
        epochs: Epochs::Any,
        inject: |round| {
            round.wait_decode(10, 60)?;
            let pid = round.deployment.spare()?.pid;
            round.signal(pid, Signal::KILL);
            Ok(())
        },
        ..PLAIN
    },
    Row {
        name: "spare-kill-promotion",
        fault: "SIGKILL of a shard in decode, and of the spare while it takes over",
        inject: |round| {
            round.wait_decode(10, 60)?;
            let spare = round.deployment.spare()?.pid;
            kill(round)?;
            thread::sleep(Duration::from_millis(round.numbers.below(60)));
            round.signal(spare, Signal::KILL);
            Ok(())
        },
        ..PLAIN
    },
    Row {
        name: "shard-kill-allreduce",
        fault: "a shard ends inside an all-reduce, with a spare",
        setup: || Setup::own(Model::Tiny, 1),
        failpoints: true,
        fresh: true,
        arm: Some(|mut setup, steps, numbers| {
            // Three layers with two sums each: one of the second half of the steps.
            let sum = steps * 3 + numbers.below((steps * 2).max(1));
            setup.own_shards[1].first_life = vec!["--failpoint".to_owned(), format!("allreduce:{sum}:abort")];
            setup
        }),
        inject: |round| {
            let pid = round.deployment.own.pid(&own_id(1)).context("the shard was started")?;
            within(PATIENCE, "the shard has ended", || !is_alive(pid) || round.is_over())?;
            round.inject();
            Ok(())
        },
        ..PLAIN
    },
    Row {
        name: "shard-slow",
        short: false,
        fault: "a shard gets a tenth of its processor's time from a moment in decode on, with a spare",
        setup: || Setup::local(Model::Smollm2, 1),
        sizes: Some(|model| Sizes { tokens: 200, ..Sizes::of(model) }),
        epochs: Epochs::Any,
        inject: |round| {
            round.wait_decode(20, 40)?;
            let pid = round.rank_pid(None)?;
            let until = Instant::now() + Duration::from_secs(20);
            while Instant::now() < until && !round.is_over() && is_alive(pid) {
                round.signal(pid, Signal::STOP);
                thread::sleep(Duration::from_millis(45));
                round.signal(pid, Signal::CONT);
                thread::sleep(Duration::from_millis(5));
            }
            Ok(())
        },
        ..PLAIN
    },
    Row {
        name: "replica-group-kill",
        fault: "SIGKILL of the only shard of one of two groups, with a spare: the other group goes on",
        setup: || Setup::groups(Model::Tiny, 2, 1),
        inject: |round| {
            round.wait_decode(10, 60)?;
            let victim = u32::try_from(round.numbers.below(2)).unwrap_or(0);
            let status = round.deployment.status()?;
            let rank = status.members.iter().find(|m| m.group == victim && m.rank.is_some());
            let pid = rank.with_context(|| format!("group {victim} has a rank"))?.pid;
            let epoch = |status: &StatusResponse, group: u32| {
                let found = status.groups.iter().find(|g| g.group == group && g.phase == "serving");
                found.map(|g| g.epoch)
            };
            let lost = epoch(&status, victim);
            // What is changed on purpose, such as who gets copies of KV rows, has other causes.
            let n_lost = |round: &Round<'_>| round.deployment.metric("phalanx_failovers_total{cause=\"lost\"}");
            let before = n_lost(round);
            round.signal(pid, Signal::KILL);
            within(PATIENCE, "the group serves again", || {
                let now = round.deployment.status().ok().and_then(|status| epoch(&status, victim));
                now.is_some() && now != lost
            })?;
            let lost = n_lost(round) - before;
            ensure!(lost == 1.0, "{lost} groups were lost, not the one alone");
            Ok(())
        },
        ..PLAIN
    },
    Row {
        name: "kv-exhaustion-kill",
        fault: "SIGKILL of a shard while KV memory is far too small for the load",
        setup: || Setup::local(Model::Tiny, 1).with(&["--kv-cache-memory", "1MiB"]),
        inject: |round| {
            round.wait_decode(10, 60)?;
            kill(round)
        },
        ..PLAIN
    },
];

fn long_prompts(model: Model) -> Sizes {
    match model {
        Model::Tiny => Sizes { prompt: 200, tokens: 100, ..Sizes::of(model) },
        Model::Smollm2 => Sizes { prompt: 500, sentences: 40, tokens: 32, ..Sizes::of(model) },
    }
}

pub(super) fn kill(round: &mut Round<'_>) -> Result<()> {
    let pid = round.rank_pid(None)?;
    round.signal(pid, Signal::KILL);
    Ok(())
}

fn kill_in_decode(round: &mut Round<'_>) -> Result<()> {
    round.wait_decode(10, 70)?;
    kill(round)
}
