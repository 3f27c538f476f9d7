//! A status for people.

use std::collections::BTreeSet;

use phalanx_proto::v1::{Member, StatusResponse};

use super::super::text::{self, bytes, count, milliseconds, plain};

/// Hosts have long ids: this many characters tell them apart.
const SHOWN_HOST: usize = 8;

/// Where the group stands, if there are several.
const GROUP_COLUMN: usize = 2;

/// All that is known, over several lines.
pub(in super::super) fn shown(status: &StatusResponse) -> String {
    let mut text = head(status);
    if !status.coordinators.is_empty() {
        let rows = status
            .coordinators
            .iter()
            .map(|c| vec![c.coordinator_id.clone(), c.role.clone(), c.http_address.clone(), c.grpc_address.clone()]);
        text.push_str("\n\n");
        text.push_str(&text::table(&["COORDINATOR", "ROLE", "HTTP", "GRPC"], &[], rows));
    }
    text.push_str("\n\n");
    if status.members.is_empty() {
        text.push_str("No shards are attached.");
        return text;
    }
    let mut header = vec![
        "SHARD", "ROLE", "RANK", "LOADED", "DEVICE", "HOST", "PID", "WEIGHTS", "KV", "RESIDENT", "SILENT", "VERSION",
    ];
    let numbers = ["GROUP", "RANK", "PID", "WEIGHTS", "KV", "RESIDENT", "SILENT"];
    let hosts: BTreeSet<&str> = status.members.iter().map(|m| m.host_id.as_str()).collect();
    let several = status.groups.len() > 1;
    if several {
        header.insert(GROUP_COLUMN, "GROUP");
    }
    let rows = status.members.iter().map(|member| {
        let mut row = row(member, hosts.len() > 1);
        if several {
            row.insert(GROUP_COLUMN, member.group.to_string());
        }
        row
    });
    text.push_str(&text::table(&header, &numbers, rows));
    text
}

fn head(status: &StatusResponse) -> String {
    let phase = match status.waits_for.as_str() {
        "" => status.phase.clone(),
        missing => format!("{}: {missing}", status.phase),
    };
    let size = if status.wanted_world_size == 0 || status.world_size == status.wanted_world_size {
        status.world_size.to_string()
    } else {
        format!("{} ({} are wanted)", status.world_size, status.wanted_world_size)
    };
    let mut lines = vec![
        format!("model       {}", status.model),
        format!("phase       {phase}"),
        format!("term        {}", status.term),
        format!("epoch       {}", status.epoch),
        format!("world size  {size}"),
    ];
    if status.groups.len() > 1 {
        lines.truncate(1);
        lines.push(format!("term        {}", status.term));
        for group in &status.groups {
            let wait = if group.waits_for.is_empty() { String::new() } else { format!(": {}", group.waits_for) };
            let (index, epoch, size) = (group.group, group.epoch, group.world_size);
            lines.push(format!("group {index:<5} {}{wait}, epoch {epoch}, world size {size}", group.phase));
        }
    }
    if let Some(load) = &status.load {
        let used = 100 * u64::from(load.kv_blocks_used) / u64::from(load.kv_blocks).max(1);
        lines.push(format!(
            "load        {}: {} run, {} wait; {used} % of {} in use",
            count(load.requests.into(), "request"),
            count(load.sequences_running.into(), "sequence"),
            load.sequences_waiting,
            count(load.kv_blocks.into(), "KV block"),
        ));
    }
    lines.iter().map(|line| plain(line)).collect::<Vec<_>>().join("\n")
}

fn row(member: &Member, tell_hosts_apart: bool) -> Vec<String> {
    let device = match member.threads {
        0 => member.device.clone(),
        threads => format!("{} ({})", member.device, count(threads.into(), "thread")),
    };
    let host = member.collective_address.rsplit_once(':').map_or("", |(host, _)| host);
    let id: String = member.host_id.chars().take(SHOWN_HOST).collect();
    // An address says more than an id; on one machine it may be the loopback's on several hosts.
    let host =
        if tell_hosts_apart || host.is_empty() { format!("{id} {host}").trim().to_owned() } else { host.to_owned() };
    let ranks = member.prepared_ranks.iter().map(u32::to_string).collect::<Vec<_>>().join(",");
    let memory = |n: u64| if n == 0 { String::new() } else { bytes(n) };
    vec![
        member.shard_id.clone(),
        member.role.clone(),
        member.rank.map(|rank| rank.to_string()).unwrap_or_default(),
        ranks,
        device,
        host,
        member.pid.to_string(),
        memory(member.weight_bytes),
        memory(member.kv_bytes),
        memory(member.resident_bytes),
        milliseconds(member.silent_ms),
        member.version.clone(),
    ]
}
