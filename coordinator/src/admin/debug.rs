//! `GET /debug/cluster`: everything that the leader knows of its cluster at the moment, for people who look for a fault.
//! Unlike `/admin/status` its form may change with any version.

use std::sync::Arc;

use axum::{Json, extract::State, response::IntoResponse, response::Response};
use phalanx_proto::v1::{Member, StatusResponse};
use serde_json::{Value, json};

use super::{
    AdminError, Control,
    json::{PlanJson, StatusJson},
};
use crate::scheduler::event::Status;

/// What the leader has to do at the moment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Loads {
    /// Of each group's scheduler; `None` if it does not answer.
    pub groups: Vec<Option<Status>>,
    /// Answers that can be asked for again by their key.
    pub n_streams: usize,
}

/// The endpoint.
pub async fn cluster(State(control): State<Arc<dyn Control>>) -> Response {
    match cluster_of(&*control).await {
        Ok(body) => Json(body).into_response(),
        Err(error) => error.into_response(),
    }
}

async fn cluster_of(control: &dyn Control) -> Result<Value, AdminError> {
    let status = control.status().await?;
    // The rest is told without what does not answer.
    let plan = control.plan().await.ok();
    let loads = control.loads().await.ok();
    let mut body = json!({
        "version": env!("CARGO_PKG_VERSION"),
        "term": status.term,
        "model": status.model,
    });
    body["groups"] = groups(&status, loads.as_ref());
    body["streams"] = loads.as_ref().map_or(Value::Null, |loads| json!({"kept": loads.n_streams}));
    body["plan"] = plan.as_ref().map_or(Value::Null, |plan| plain(&PlanJson::from(plan)));
    let mut whole = plain(&StatusJson::from(&status));
    body["coordinators"] = whole["coordinators"].take();
    body["shards"] = whole["members"].take();
    Ok(body)
}

fn plain(value: &impl serde::Serialize) -> Value {
    serde_json::to_value(value).expect("plain structures become JSON")
}

/// Each group with its ranks and its load.
fn groups(status: &StatusResponse, loads: Option<&Loads>) -> Value {
    let group = |group: &phalanx_proto::v1::GroupStatus| {
        let members = || status.members.iter().filter(|member| member.group == group.group);
        let mut ranks: Vec<(u32, &Member)> = members().filter_map(|m| Some((m.rank?, m))).collect();
        ranks.sort_by_key(|(rank, _)| *rank);
        let ranks: Vec<Value> = ranks
            .into_iter()
            .map(|(rank, member)| {
                json!({
                    "rank": rank, "shard": member.shard_id, "silent_ms": member.silent_ms,
                })
            })
            .collect();
        let others: Vec<Value> = members()
            .filter(|m| m.rank.is_none())
            .map(|member| {
                json!({
                    "shard": member.shard_id, "role": member.role, "silent_ms": member.silent_ms,
                })
            })
            .collect();
        let load = loads.and_then(|loads| *loads.groups.get(group.group as usize)?);
        json!({
            "group": group.group,
            "epoch": group.epoch,
            "phase": group.phase,
            "waits_for": Some(group.waits_for.as_str()).filter(|w| !w.is_empty()),
            "world_size": group.world_size,
            "ranks": ranks,
            "others": others,
            "load": load.map(|load| json!({
                "requests": load.n_requests,
                "sequences": {"waiting": load.n_waiting, "held": load.n_held, "running": load.n_running},
                "steps_in_flight": load.n_in_flight,
                "kv_blocks": {"used": load.n_blocks_used, "total": load.n_blocks},
                "serving_epoch": load.epoch,
            })),
        })
    };
    status.groups.iter().map(group).collect()
}

#[cfg(test)]
mod tests {
    use phalanx_proto::v1::GroupStatus;

    use super::*;
    use crate::admin::testing;

    #[test]
    fn a_group_is_told_with_its_ranks_and_its_load() {
        let group =
            GroupStatus { group: 0, epoch: 7, phase: "serving".to_owned(), world_size: 2, ..Default::default() };
        let status = StatusResponse { groups: vec![group], ..testing::status() };
        let load = Status { n_running: 3, n_blocks: 64, epoch: Some(7), ..Status::default() };
        let told = groups(&status, Some(&Loads { groups: vec![Some(load)], n_streams: 0 }));
        assert_eq!(told[0]["ranks"][1], json!({"rank": 1, "shard": "local-1", "silent_ms": 12}));
        assert_eq!(told[0]["others"][0]["role"], "spare");
        assert_eq!(
            (&told[0]["load"]["sequences"]["running"], &told[0]["load"]["kv_blocks"]["total"]),
            (&json!(3), &json!(64))
        );
        assert!(groups(&status, None)[0]["load"].is_null(), "nobody has said");
    }
}
