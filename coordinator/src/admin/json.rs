//! Status and plan as JSON: what `--json` prints and `GET /admin/status` answers.
//!
//! **Stable.** Fields may be added; none is renamed, removed or given another type. Absent values are `null`. Names are
//! those of the wire's messages. `docs/operations.md` lists them.

use phalanx_proto::v1::{Coordinator, GroupStatus, Load, Member, PlanResponse, RankPlan, StatusResponse};
use serde::Serialize;

/// A status.
#[derive(Debug, Serialize)]
pub struct StatusJson<'a> {
    term: u64,
    epoch: u64,
    phase: &'a str,
    model: &'a str,
    world_size: u32,
    wanted_world_size: u32,
    waits_for: Option<&'a str>,
    coordinators: Vec<CoordinatorJson<'a>>,
    members: Vec<MemberJson<'a>>,
    load: Option<LoadJson>,
    /// Every group; epoch, phase and world sizes above are those of the first.
    groups: Vec<GroupJson<'a>>,
}

#[derive(Debug, Serialize)]
struct GroupJson<'a> {
    group: u32,
    epoch: u64,
    phase: &'a str,
    world_size: u32,
    waits_for: Option<&'a str>,
}

#[derive(Debug, Serialize)]
struct CoordinatorJson<'a> {
    coordinator_id: &'a str,
    role: &'a str,
    http_address: &'a str,
    grpc_address: &'a str,
}

#[derive(Debug, Serialize)]
struct MemberJson<'a> {
    shard_id: &'a str,
    role: &'a str,
    rank: Option<u32>,
    prepared_ranks: &'a [u32],
    device: &'a str,
    threads: u32,
    host_id: &'a str,
    pid: u32,
    /// As text: many readers of JSON keep 53 bits of a number.
    incarnation: String,
    version: &'a str,
    collective_address: &'a str,
    weight_bytes: u64,
    kv_bytes: u64,
    resident_bytes: u64,
    silent_ms: u32,
    lease_ms: Option<u32>,
    group: u32,
}

#[derive(Debug, Serialize)]
struct LoadJson {
    requests: u32,
    sequences_waiting: u32,
    sequences_running: u32,
    kv_blocks_used: u32,
    kv_blocks: u32,
}

impl<'a> From<&'a StatusResponse> for StatusJson<'a> {
    fn from(status: &'a StatusResponse) -> Self {
        Self {
            term: status.term,
            epoch: status.epoch,
            phase: &status.phase,
            model: &status.model,
            world_size: status.world_size,
            wanted_world_size: status.wanted_world_size,
            waits_for: Some(status.waits_for.as_str()).filter(|w| !w.is_empty()),
            coordinators: status.coordinators.iter().map(CoordinatorJson::from).collect(),
            members: status.members.iter().map(MemberJson::from).collect(),
            load: status.load.as_ref().map(LoadJson::from),
            groups: status.groups.iter().map(GroupJson::from).collect(),
        }
    }
}

impl<'a> From<&'a GroupStatus> for GroupJson<'a> {
    fn from(group: &'a GroupStatus) -> Self {
        Self {
            group: group.group,
            epoch: group.epoch,
            phase: &group.phase,
            world_size: group.world_size,
            waits_for: Some(group.waits_for.as_str()).filter(|w| !w.is_empty()),
        }
    }
}

impl<'a> From<&'a Coordinator> for CoordinatorJson<'a> {
    fn from(coordinator: &'a Coordinator) -> Self {
        Self {
            coordinator_id: &coordinator.coordinator_id,
            role: &coordinator.role,
            http_address: &coordinator.http_address,
            grpc_address: &coordinator.grpc_address,
        }
    }
}

impl<'a> From<&'a Member> for MemberJson<'a> {
    fn from(member: &'a Member) -> Self {
        Self {
            shard_id: &member.shard_id,
            role: &member.role,
            rank: member.rank,
            prepared_ranks: &member.prepared_ranks,
            device: &member.device,
            threads: member.threads,
            host_id: &member.host_id,
            pid: member.pid,
            incarnation: member.incarnation.to_string(),
            version: &member.version,
            collective_address: &member.collective_address,
            weight_bytes: member.weight_bytes,
            kv_bytes: member.kv_bytes,
            resident_bytes: member.resident_bytes,
            silent_ms: member.silent_ms,
            lease_ms: member.lease_ms,
            group: member.group,
        }
    }
}

impl From<&Load> for LoadJson {
    fn from(load: &Load) -> Self {
        Self {
            requests: load.requests,
            sequences_waiting: load.sequences_waiting,
            sequences_running: load.sequences_running,
            kv_blocks_used: load.kv_blocks_used,
            kv_blocks: load.kv_blocks,
        }
    }
}

/// A plan.
#[derive(Debug, Serialize)]
pub struct PlanJson<'a> {
    ranks: Vec<RankPlanJson<'a>>,
    on_loss: &'a str,
}

#[derive(Debug, Serialize)]
struct RankPlanJson<'a> {
    rank: u32,
    shard_id: Option<&'a str>,
    successor: Option<&'a str>,
    successor_is_prepared: bool,
    q_heads: &'a str,
    kv_heads: &'a str,
    ffn_columns: &'a str,
    vocabulary: &'a str,
    weight_bytes: u64,
    group: u32,
}

impl<'a> From<&'a PlanResponse> for PlanJson<'a> {
    fn from(plan: &'a PlanResponse) -> Self {
        Self { ranks: plan.ranks.iter().map(RankPlanJson::from).collect(), on_loss: &plan.on_loss }
    }
}

impl<'a> From<&'a RankPlan> for RankPlanJson<'a> {
    fn from(rank: &'a RankPlan) -> Self {
        let named = |name: &'a String| Some(name.as_str()).filter(|n| !n.is_empty());
        Self {
            rank: rank.rank,
            shard_id: named(&rank.shard_id),
            successor: named(&rank.successor),
            successor_is_prepared: rank.successor_is_prepared,
            q_heads: &rank.q_heads,
            kv_heads: &rank.kv_heads,
            ffn_columns: &rank.ffn_columns,
            vocabulary: &rank.vocabulary,
            weight_bytes: rank.weight_bytes,
            group: rank.group,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fields_of_a_status_are_those_documented() {
        let status = StatusResponse {
            members: vec![Member { incarnation: u64::MAX, ..Member::default() }],
            coordinators: vec![Coordinator::default()],
            load: Some(Load::default()),
            groups: vec![GroupStatus::default()],
            ..StatusResponse::default()
        };
        let json = serde_json::to_value(StatusJson::from(&status)).unwrap();
        let keys = |value: &serde_json::Value| {
            value.as_object().unwrap().keys().map(String::as_str).collect::<Vec<_>>().join(" ")
        };
        assert_eq!(
            keys(&json),
            "term epoch phase model world_size wanted_world_size waits_for coordinators members load groups"
        );
        assert_eq!(keys(&json["coordinators"][0]), "coordinator_id role http_address grpc_address");
        assert_eq!(
            keys(&json["members"][0]),
            "shard_id role rank prepared_ranks device threads host_id pid incarnation version collective_address \
             weight_bytes kv_bytes resident_bytes silent_ms lease_ms group"
        );
        assert_eq!(keys(&json["groups"][0]), "group epoch phase world_size waits_for");
        assert_eq!(keys(&json["load"]), "requests sequences_waiting sequences_running kv_blocks_used kv_blocks");
        assert!(json["waits_for"].is_null() && json["members"][0]["rank"].is_null());
        assert_eq!(json["members"][0]["incarnation"], u64::MAX.to_string());
    }

    #[test]
    fn a_plan_without_successor_says_null() {
        let plan = PlanResponse { ranks: vec![RankPlan::default()], on_loss: "all wait".to_owned() };
        let json = serde_json::to_value(PlanJson::from(&plan)).unwrap();
        assert!(json["ranks"][0]["successor"].is_null());
        assert_eq!(json["on_loss"], "all wait");
    }
}
