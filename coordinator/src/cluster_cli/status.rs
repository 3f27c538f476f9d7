//! `cluster status`.

mod changes;
mod table;

#[cfg(test)]
pub(super) use self::{changes::between as changes, table::shown};

use std::{
    io::{self, IsTerminal},
    time::Duration,
};

use clap::{Arg, ArgAction, ArgMatches};
use phalanx_proto::v1::{StatusRequest, StatusResponse, cluster_client::ClusterClient};
use tokio::time::{MissedTickBehavior, interval, timeout};
use tonic::Status;

use super::{
    CliError, Command,
    connect::{CallError, Coordinators},
    say, say_json,
};
use crate::admin::json::StatusJson;

const JSON: &str = "json";
const WATCH: &str = "watch";
/// Between looks at the cluster.
const WATCH_INTERVAL: Duration = Duration::from_secs(1);
/// Longest wait for a status: a coordinator that is stopped accepts connections nevertheless.
const STATUS_LIMIT: Duration = Duration::from_secs(10);
/// To the upper left corner, and nothing below.
const CLEAR: &str = "\u{1b}[H\u{1b}[2J";

pub(super) static STATUS: Command = Command {
    spec: || {
        clap::Command::new("status")
            .about("Shows coordinators, members, roles, ranks, epoch and load")
            .arg(Arg::new(JSON).long(JSON).action(ArgAction::SetTrue).help("Print JSON"))
            .arg(
                Arg::new(WATCH)
                    .long(WATCH)
                    .action(ArgAction::SetTrue)
                    .help("Go on until interrupted: redraw every second on a terminal, else print a line per change")
                    .long_help(
                        "Go on until interrupted: redraw every second on a terminal, else print a line per change; \
                         with --json a status as one line of JSON whenever something but memory and load has changed",
                    ),
            )
    },
    run: |options, coordinators| Box::pin(status(options, coordinators)),
};

async fn status(options: ArgMatches, coordinators: Coordinators) -> Result<(), CliError> {
    match (options.get_flag(WATCH), options.get_flag(JSON)) {
        (false, false) => say(&table::shown(&ask(&coordinators).await?)),
        (false, true) => say_json(&StatusJson::from(&ask(&coordinators).await?)),
        (true, is_json) => watch(&coordinators, is_json).await,
    }
}

async fn ask(coordinators: &Coordinators) -> Result<StatusResponse, CallError> {
    coordinators
        .ask(async |channel| {
            let call = async { ClusterClient::new(channel).status(StatusRequest {}).await };
            match timeout(STATUS_LIMIT, call).await {
                Ok(answer) => Ok(answer?.into_inner()),
                Err(_) => Err(Status::unavailable(format!("no answer within {} s", STATUS_LIMIT.as_secs()))),
            }
        })
        .await
}

/// Ends only when nobody can read any more: that a coordinator is gone is worth watching.
async fn watch(coordinators: &Coordinators, is_json: bool) -> Result<(), CliError> {
    let is_terminal = io::stdout().is_terminal() && !is_json;
    let mut last: Option<Result<StatusResponse, String>> = None;
    let mut ticks = interval(WATCH_INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let now = ask(coordinators).await.map_err(|error| error.to_string());
        if is_terminal {
            let text = match &now {
                Ok(status) => table::shown(status),
                Err(error) => error.clone(),
            };
            say(&format!("{CLEAR}{}\n\n{text}", time()))?;
            continue;
        }
        let changes = match (&last, &now) {
            (Some(Err(before)), Err(error)) if before == error => Vec::new(),
            (_, Err(error)) => vec![error.replace('\n', " ")],
            (Some(Ok(before)), Ok(status)) => changes::between(before, status),
            (_, Ok(status)) => changes::all(status),
        };
        match &now {
            Ok(status) if is_json && !changes.is_empty() => {
                say(&serde_json::to_string(&StatusJson::from(status)).expect("plain structures become JSON"))?;
            }
            Err(_) if is_json => changes.iter().for_each(|change| eprintln!("{} {change}", time())),
            _ if is_json => {}
            _ => {
                for change in &changes {
                    say(&format!("{} {change}", time()))?;
                }
            }
        }
        last = Some(now);
    }
}

fn time() -> String {
    jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}
