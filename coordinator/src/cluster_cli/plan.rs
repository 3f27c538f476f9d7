//! `cluster plan`.

use clap::{Arg, ArgAction, ArgMatches};
use phalanx_proto::v1::{PlanRequest, PlanResponse, admin_client::AdminClient};

use super::{CliError, Command, connect::Coordinators, say, say_json, text};
use crate::admin::json::PlanJson;

const JSON: &str = "json";

pub(super) static PLAN: Command = Command {
    spec: || {
        clap::Command::new("plan")
            .about("Shows what each rank holds, who takes over from whom, and what happens if a rank is lost now")
            .arg(Arg::new(JSON).long(JSON).action(ArgAction::SetTrue).help("Print JSON"))
    },
    run: |options, coordinators| Box::pin(plan(options, coordinators)),
};

async fn plan(options: ArgMatches, coordinators: Coordinators) -> Result<(), CliError> {
    let answer = coordinators
        .ask(async |channel| Ok(AdminClient::new(channel).plan(PlanRequest {}).await?.into_inner()))
        .await?;
    if options.get_flag(JSON) { say_json(&PlanJson::from(&answer)) } else { say(&shown(&answer)) }
}

pub(super) fn shown(plan: &PlanResponse) -> String {
    let header = ["RANK", "SHARD", "QUERY HEADS", "KV HEADS", "FFN COLUMNS", "VOCABULARY", "WEIGHTS", "TAKES OVER"];
    let ranks = text::table(
        &header,
        &["RANK", "WEIGHTS"],
        plan.ranks.iter().map(|rank| {
            let successor = match (rank.successor.as_str(), rank.successor_is_prepared) {
                ("", _) => String::new(),
                (shard, true) => format!("{shard} (loaded)"),
                (shard, false) => format!("{shard} (loads first)"),
            };
            vec![
                rank.rank.to_string(),
                rank.shard_id.clone(),
                rank.q_heads.clone(),
                rank.kv_heads.clone(),
                rank.ffn_columns.clone(),
                rank.vocabulary.clone(),
                if rank.weight_bytes == 0 { String::new() } else { text::bytes(rank.weight_bytes) },
                successor,
            ]
        }),
    );
    format!("{ranks}\n\nIf a rank is lost now: {}", text::plain(&plan.on_loss))
}
