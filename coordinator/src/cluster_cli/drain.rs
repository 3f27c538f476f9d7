//! `cluster drain SHARD` and `cluster undrain SHARD`.

use clap::{Arg, ArgMatches};
use phalanx_proto::v1::{DrainRequest, DrainResponse, UndrainRequest, admin_client::AdminClient};

use super::{CliError, Command, connect::Coordinators, say, text};

const SHARD: &str = "shard";

pub(super) static DRAIN: Command = Command {
    spec: || {
        clap::Command::new("drain")
            .about(
                "Takes the rank from a shard and gives it none again until it is undrained; waits until that is done",
            )
            .arg(shard())
    },
    run: |options, coordinators| Box::pin(drain(options, coordinators)),
};

pub(super) static UNDRAIN: Command = Command {
    spec: || clap::Command::new("undrain").about("Lets a drained shard take ranks again").arg(shard()),
    run: |options, coordinators| Box::pin(undrain(options, coordinators)),
};

fn shard() -> Arg {
    Arg::new(SHARD).value_name("SHARD").required(true).help("Name of the shard, as `cluster status` shows it")
}

fn name_of(mut options: ArgMatches) -> String {
    options.remove_one(SHARD).expect("clap asks for it")
}

async fn drain(options: ArgMatches, coordinators: Coordinators) -> Result<(), CliError> {
    let shard_id = name_of(options);
    let answer = coordinators
        .ask(async |channel| {
            let request = DrainRequest { shard_id: shard_id.clone() };
            Ok(AdminClient::new(channel).drain(request).await?.into_inner())
        })
        .await?;
    say(&drained(&shard_id, &answer))
}

pub(super) fn drained(shard: &str, answer: &DrainResponse) -> String {
    if answer.successor.is_empty() {
        return format!("{shard} is drained; it had no rank");
    }
    let (successor, stall) = (text::plain(&answer.successor), text::milliseconds(answer.stall_ms));
    format!(
        "{shard} is drained; {successor} has its rank since epoch {}; requests stood still for {stall}",
        answer.epoch
    )
}

async fn undrain(options: ArgMatches, coordinators: Coordinators) -> Result<(), CliError> {
    let shard_id = name_of(options);
    coordinators
        .ask(async |channel| {
            let request = UndrainRequest { shard_id: shard_id.clone() };
            AdminClient::new(channel).undrain(request).await
        })
        .await?;
    say(&format!("{shard_id} may take ranks again"))
}
