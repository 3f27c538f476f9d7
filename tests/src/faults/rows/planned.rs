//! What operators do on purpose: nothing may be lost, and no stream may stand still for long.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;

use super::{Epochs, PLAIN, Row, coordinators::two};
use crate::{
    faults::{
        eventually,
        load::Sizes,
        round::Round,
        setup::{Clients, Model, Setup},
    },
    process::binary,
};

/// Rounds of a rolling restart.
const ROUNDS: usize = 3;

pub(super) static ROWS: &[Row] = &[
    Row {
        name: "rolling-restart-shards",
        fault: "`cluster rollout restart` of all shards three times round, with a spare",
        setup: || Setup::local(Model::Tiny, 1),
        repeats: true,
        inject: restart_all,
        ..PLAIN
    },
    Row {
        name: "rolling-restart-shards-smollm2",
        short: false,
        fault: "the same with SmolLM2",
        setup: || Setup::local(Model::Smollm2, 1).with(&["--kv-cache-memory", "512MiB"]),
        // Long answers: what new prompts cost beside them is not what is measured.
        sizes: Some(|model| Sizes { sentences: 4, tokens: 800, ..Sizes::of(model) }),
        repeats: true,
        inject: restart_all,
        ..PLAIN
    },
    Row {
        name: "rolling-restart-no-spare",
        short: false,
        fault: "`cluster rollout restart` of all shards three times round, without a spare: each takes its own rank back",
        setup: || Setup::local(Model::Tiny, 0),
        repeats: true,
        inject: restart_all,
        ..PLAIN
    },
    Row {
        name: "shard-leave",
        fault: "SIGTERM of a shard in decode, with a spare: it gives its rank away and ends",
        inject: |round| {
            round.wait_decode(10, 60)?;
            let epoch = round.deployment.epoch();
            let pid = round.rank_pid(None)?;
            round.signal(pid, Signal::TERM);
            round.wait_reformed(epoch)
        },
        ..PLAIN
    },
    Row {
        name: "shard-drain",
        fault: "`cluster drain` of a rank in decode, and `cluster undrain` of it, with a spare",
        inject: |round| {
            round.wait_decode(10, 60)?;
            let world = u64::from(round.deployment.setup.world_size);
            let rank = u32::try_from(round.numbers.below(world))?;
            let shard = round.deployment.rank(rank)?.shard_id;
            round.inject();
            cluster(round, &["drain", &shard])?;
            let members = round.deployment.members()?;
            let drained = members.iter().find(|m| m.shard_id == shard).context("it is still attached")?;
            ensure!(drained.role == "drained" && drained.rank.is_none(), "{drained:?}");
            cluster(round, &["undrain", &shard])?;
            Ok(())
        },
        ..PLAIN
    },
    Row {
        name: "rolling-restart-coordinators",
        fault: "SIGTERM and restart of each of two coordinators in turn, three times round; their clients come back with their keys",
        setup: || two(Clients::OfLeader).with(&["--shutdown-timeout", "1"]),
        resumes: true,
        repeats: true,
        epochs: Epochs::Any,
        inject: |round| {
            round.wait_decode(2, 6)?;
            let coordinators = round.deployment.coordinators.len();
            for _ in 0..ROUNDS {
                for index in 0..coordinators {
                    let was_leading = round.deployment.leads(index);
                    let pid = round.deployment.coordinators[index].process.pid();
                    round.signal(pid, Signal::TERM);
                    if was_leading {
                        let other = coordinators - 1 - index;
                        round.deployment.wait_leads(other)?;
                    }
                    round.deployment.restart_coordinator(index)?;
                    // As an operator does before the next one: a leader that knows of no standby does not hand over.
                    let deployment = &round.deployment;
                    let knows_all = || deployment.status().is_ok_and(|s| s.coordinators.len() == coordinators);
                    eventually("the leader knows the standby", knows_all)?;
                }
            }
            Ok(())
        },
        ..PLAIN
    },
];

fn restart_all(round: &mut Round<'_>) -> Result<()> {
    round.wait_decode(2, 6)?;
    let n_shards = round.deployment.setup.shards();
    for _ in 0..ROUNDS {
        let before: Vec<u32> = round.deployment.members()?.iter().map(|m| m.pid).collect();
        round.inject();
        let told = cluster(round, &["rollout", "restart"])?;
        ensure!(told.contains(&format!("done: {n_shards} shards restarted")), "{told}");
        let after = round.deployment.members()?;
        let same = after.iter().find(|m| before.contains(&m.pid));
        ensure!(same.is_none() && after.len() == n_shards, "not restarted: {same:?} of {}", after.len());
    }
    Ok(())
}

/// What the `cluster` program says. An error if it fails.
fn cluster(round: &Round<'_>, args: &[&str]) -> Result<String> {
    let addresses: Vec<&str> = round.deployment.coordinators.iter().map(|c| c.grpc.as_str()).collect();
    let mut command = Command::new(binary("cluster"));
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("PHALANX_")) {
        command.env_remove(name);
    }
    let output = command.args(args).args(["--coordinator", &addresses.join(",")]).output()?;
    let (said, error) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    ensure!(output.status.success(), "cluster {args:?}: {}: {said}{error}", output.status);
    Ok(said.into_owned())
}
