//! `cluster rollout restart`.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use clap::{Arg, ArgMatches};
use phalanx_proto::v1::{RolloutEvent, RolloutRestartRequest, admin_client::AdminClient};
use tokio::time::sleep;
use tonic::{Code, Status};

use super::{
    CliError, Command,
    connect::{CallError, Coordinators, is_gone},
    say, text,
};
use crate::admin::RolloutPhase;

const TIMEOUT: &str = "timeout";
/// A rollout outlives its leader: the next one is asked to go on, for this long after the last sign of progress.
const PATIENCE: Duration = Duration::from_secs(60);
/// Between attempts.
const PAUSE: Duration = Duration::from_secs(1);

pub(super) static ROLLOUT: Command = Command {
    spec: || {
        clap::Command::new("rollout")
            .about("Changes all shards, one after the other, without losing a request")
            .subcommand_required(true)
            .arg_required_else_help(true)
            .subcommand(
                clap::Command::new("restart").about("Restarts every shard; waits until all are back").arg(
                    Arg::new(TIMEOUT)
                        .long(TIMEOUT)
                        .value_name("SECONDS")
                        .value_parser(clap::value_parser!(u32).range(1..=86_400))
                        .help("Longest wait for each shard to be back [default: 120]"),
                ),
            )
    },
    run: |options, coordinators| Box::pin(rollout(options, coordinators)),
};

async fn rollout(options: ArgMatches, coordinators: Coordinators) -> Result<(), CliError> {
    match options.subcommand() {
        Some(("restart", options)) => restart(coordinators, options.get_one(TIMEOUT).copied()).await,
        _ => unreachable!("clap knows this command only"),
    }
}

/// What is known of a rollout, over the leaders that it sees.
#[derive(Debug, Default)]
struct Progress {
    restarted: BTreeSet<String>,
    longest_stall_ms: u32,
    is_done: bool,
}

impl Progress {
    /// Returns what to print.
    fn on(&mut self, event: &RolloutEvent) -> String {
        let shard = text::plain(&event.shard_id);
        self.longest_stall_ms = self.longest_stall_ms.max(event.stall_ms);
        let of = format!("{} of {}", event.done, event.total);
        match RolloutPhase::from_name(&event.phase) {
            Some(RolloutPhase::Draining) => format!("{shard}: another shard takes its rank ({of} are done)"),
            Some(RolloutPhase::Restarting) => format!("{shard}: ends and starts again"),
            Some(RolloutPhase::Returned) => {
                self.restarted.insert(event.shard_id.clone());
                format!(
                    "{shard}: is back ({of} are done); requests stood still for {}",
                    text::milliseconds(event.stall_ms)
                )
            }
            Some(RolloutPhase::Done) => {
                self.is_done = true;
                let stall = text::milliseconds(self.longest_stall_ms);
                let shards = text::count(self.restarted.len() as u64, "shard");
                format!("done: {shards} restarted; requests stood still for {stall} at most")
            }
            // Of a later version.
            None => format!("{shard}: {}", text::plain(&event.phase)),
        }
    }
}

async fn restart(coordinators: Coordinators, return_timeout_s: Option<u32>) -> Result<(), CliError> {
    let mut progress = Progress::default();
    let mut last_sign = Instant::now();
    let mut is_retry = false;
    loop {
        let n_before = progress.restarted.len();
        let outcome = follow(&coordinators, return_timeout_s, &mut progress).await;
        if progress.is_done {
            return Ok(());
        }
        if progress.restarted.len() > n_before {
            last_sign = Instant::now();
        }
        let (why, error) = match outcome {
            Ok(()) => ("the coordinator ended the stream".to_owned(), None),
            Err(RolloutError::Output(error)) => return Err(error),
            // Nobody answered in the first place: that is not a change of leaders.
            Err(RolloutError::Call(error)) if !is_retry && progress.restarted.is_empty() && !error.began => {
                return Err(error.error.into());
            }
            Err(RolloutError::Call(error)) if error.is_passing() => (error.error.to_string(), Some(error.error)),
            Err(RolloutError::Call(error)) => return Err(CliError::Rollout(error.error.to_string())),
        };
        if last_sign.elapsed() > PATIENCE {
            return Err(CliError::Rollout(error.map_or(why, |e| e.to_string())));
        }
        is_retry = true;
        eprintln!("{}: {}; asking again", super::CLUSTER, why.replace('\n', " "));
        sleep(PAUSE).await;
    }
}

enum RolloutError {
    Output(CliError),
    Call(Interrupted),
}

struct Interrupted {
    error: CallError,
    /// Whether the coordinator had said anything yet.
    began: bool,
}

impl Interrupted {
    /// Whether the next leader may go on with it.
    fn is_passing(&self) -> bool {
        match &self.error {
            CallError::Nobody(_) => true,
            CallError::Refused(status) => {
                is_gone(status) || status.code() == Code::Aborted || super::connect::names_leader(status)
            }
        }
    }
}

/// Follows one coordinator's rollout to its end.
async fn follow(
    coordinators: &Coordinators,
    return_timeout_s: Option<u32>,
    progress: &mut Progress,
) -> Result<(), RolloutError> {
    let restarted: Vec<String> = progress.restarted.iter().cloned().collect();
    let lost = |began| move |error| RolloutError::Call(Interrupted { error, began });
    let mut events = coordinators
        .ask(async |channel| {
            let request = RolloutRestartRequest { restarted: restarted.clone(), return_timeout_s };
            Ok(AdminClient::new(channel).rollout_restart(request).await?.into_inner())
        })
        .await
        .map_err(lost(false))?;
    let mut began = false;
    loop {
        let event =
            events.message().await.map_err(|status: Status| lost(began)(CallError::Refused(Box::new(status))))?;
        let Some(event) = event else { return Ok(()) };
        began = true;
        say(&progress.on(&event)).map_err(RolloutError::Output)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(shard: &str, phase: RolloutPhase, done: u32, stall_ms: u32) -> RolloutEvent {
        RolloutEvent { shard_id: shard.to_owned(), phase: phase.name().to_owned(), done, total: 2, stall_ms }
    }

    #[test]
    fn a_rollout_tells_its_longest_stall_and_whom_it_need_not_restart_again() {
        let mut progress = Progress::default();
        progress.on(&event("a", RolloutPhase::Draining, 0, 0));
        progress.on(&event("a", RolloutPhase::Restarting, 0, 120));
        assert!(progress.restarted.is_empty());
        let line = progress.on(&event("a", RolloutPhase::Returned, 1, 120));
        assert_eq!(line, "a: is back (1 of 2 are done); requests stood still for 120 ms");
        assert!(progress.restarted.contains("a"));
        progress.on(&event("b", RolloutPhase::Returned, 2, 90));
        assert!(!progress.is_done);
        let line = progress.on(&event("", RolloutPhase::Done, 2, 0));
        assert_eq!(line, "done: 2 shards restarted; requests stood still for 120 ms at most");
        assert!(progress.is_done);
    }

    #[test]
    fn phases_of_later_versions_are_shown_as_they_are() {
        let unknown =
            RolloutEvent { shard_id: "a".to_owned(), phase: "polishing".to_owned(), ..RolloutEvent::default() };
        assert_eq!(Progress::default().on(&unknown), "a: polishing");
    }
}
