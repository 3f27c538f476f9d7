//! What is different between two looks at a cluster, a line each. Memory, load and silence always are: they don't count.

use std::collections::BTreeMap;

use phalanx_proto::v1::{Coordinator, Member, StatusResponse};

use super::super::text::plain;

/// Everything, as if nothing had been known.
pub(super) fn all(status: &StatusResponse) -> Vec<String> {
    let mut lines = vec![group(status)];
    lines.extend(status.coordinators.iter().map(coordinator));
    lines.extend(status.members.iter().map(member));
    lines.iter().map(|line| plain(line)).collect()
}

/// What is new, and what is gone.
pub(in super::super) fn between(before: &StatusResponse, now: &StatusResponse) -> Vec<String> {
    let mut lines = Vec::new();
    if group(before) != group(now) {
        lines.push(group(now));
    }
    let coordinators = |status: &StatusResponse| -> BTreeMap<String, String> {
        status.coordinators.iter().map(|c| (c.coordinator_id.clone(), coordinator(c))).collect()
    };
    let members = |status: &StatusResponse| -> BTreeMap<String, String> {
        status.members.iter().map(|m| (m.shard_id.clone(), member(m))).collect()
    };
    lines.extend(differences("coordinator", &coordinators(before), &coordinators(now)));
    lines.extend(differences("shard", &members(before), &members(now)));
    lines.iter().map(|line| plain(line)).collect()
}

fn differences(what: &str, before: &BTreeMap<String, String>, now: &BTreeMap<String, String>) -> Vec<String> {
    let gone = before.keys().filter(|name| !now.contains_key(*name)).map(|name| format!("{what} {name}: gone"));
    let changed = now.iter().filter(|(name, line)| before.get(*name) != Some(*line)).map(|(_, line)| line.clone());
    gone.chain(changed).collect()
}

fn group(status: &StatusResponse) -> String {
    let StatusResponse { term, epoch, phase, world_size, waits_for, .. } = status;
    let waits = if waits_for.is_empty() { String::new() } else { format!(": {waits_for}") };
    format!("group: term {term}, epoch {epoch}, world size {world_size}, {phase}{waits}")
}

fn coordinator(coordinator: &Coordinator) -> String {
    let Coordinator { coordinator_id, role, grpc_address, .. } = coordinator;
    format!("coordinator {coordinator_id}: {role}, grpc {grpc_address}")
}

fn member(member: &Member) -> String {
    let rank = member.rank.map(|rank| format!(" {rank}")).unwrap_or_default();
    let loaded = match member.prepared_ranks.as_slice() {
        [] => String::new(),
        ranks => format!(", loaded {}", ranks.iter().map(u32::to_string).collect::<Vec<_>>().join(",")),
    };
    let Member { shard_id, role, pid, version, .. } = member;
    format!("shard {shard_id}: {role}{rank}{loaded}, pid {pid}, version {version}")
}
