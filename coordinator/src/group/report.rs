//! What operators see of a group.

use std::time::Instant;

use phalanx_cluster::id::ShardId;
use phalanx_proto::v1::{GroupStatus, Member, PlanResponse, RankPlan, StatusResponse};

use super::{
    actor::GroupConfig,
    machine::GroupMachine,
    seats::{Seat, Seats},
};

fn count(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}

/// Members, ranks and epochs.
pub fn status(config: &GroupConfig, machine: &GroupMachine, seats: &Seats, now: Instant) -> StatusResponse {
    let index = count(config.index);
    let member = |(shard, seat): (&ShardId, &Seat)| Member {
        shard_id: shard.0.clone(),
        rank: machine.rank_of(shard).map(count),
        device: seat.hello.device.clone(),
        pid: seat.hello.pid,
        host_id: seat.hello.host_id.clone(),
        weight_bytes: seat.memory.weights,
        kv_bytes: seat.memory.kv,
        resident_bytes: seat.memory.resident,
        role: machine.role_of(shard, now).to_owned(),
        prepared_ranks: machine.prepared_ranks(shard).into_iter().map(count).collect(),
        silent_ms: u32::try_from(machine.silent_for(shard, now).as_millis()).unwrap_or(u32::MAX),
        version: seat.hello.version.clone(),
        threads: seat.hello.threads,
        incarnation: seat.hello.incarnation,
        group: index,
        collective_address: seat.hello.collective_address.clone(),
        // Leases are not the group's to know.
        lease_ms: None,
    };
    StatusResponse {
        epoch: machine.epoch().raw(),
        phase: machine.phase().to_owned(),
        world_size: count(machine.world_size()),
        wanted_world_size: count(config.settings.world_size),
        waits_for: machine.waits_for().unwrap_or_default(),
        model: config.name.clone(),
        members: seats.iter().map(member).collect(),
        ..StatusResponse::default()
    }
}

/// What several groups say, in their order, as one: what was there before there were several is the first one's.
pub fn together(groups: Vec<StatusResponse>) -> StatusResponse {
    let of_one = |(group, status): (u32, &StatusResponse)| GroupStatus {
        group,
        epoch: status.epoch,
        phase: status.phase.clone(),
        world_size: status.world_size,
        waits_for: status.waits_for.clone(),
    };
    let each = (0..).zip(&groups).map(of_one).collect();
    let mut members: Vec<Member> = groups.iter().flat_map(|status| status.members.clone()).collect();
    members.sort_by(|a, b| a.shard_id.cmp(&b.shard_id));
    StatusResponse { groups: each, members, ..groups.into_iter().next().unwrap_or_default() }
}

/// What several groups say, in their order, as one.
pub fn plans_together(plans: Vec<PlanResponse>) -> PlanResponse {
    let several = plans.len() > 1;
    let mut all = PlanResponse::default();
    for (group, plan) in (0..).zip(plans) {
        all.ranks.extend(plan.ranks.into_iter().map(|rank| RankPlan { group, ..rank }));
        match several {
            // Whether a spare of another group would come is not the group's to say.
            true if !all.on_loss.is_empty() => all.on_loss.push_str(&format!("; group {group}: {}", plan.on_loss)),
            true => all.on_loss = format!("group {group}: {}", plan.on_loss),
            false => all.on_loss = plan.on_loss,
        }
    }
    all
}

/// Who holds what, and who takes over from whom. What a rank's slice is made of is not known here.
pub fn plan(machine: &GroupMachine, seats: &Seats, now: Instant) -> PlanResponse {
    let rank = |(rank, shard): (usize, &ShardId)| {
        let successor = machine.successor_of(rank, now);
        let is_prepared = |s: &ShardId| machine.prepared_ranks(s).contains(&rank);
        RankPlan {
            rank: count(rank),
            shard_id: shard.0.clone(),
            successor_is_prepared: successor.as_ref().is_some_and(is_prepared),
            successor: successor.map(|s| s.0).unwrap_or_default(),
            weight_bytes: seats.get(shard).map_or(0, |s| s.memory.weights),
            ..RankPlan::default()
        }
    };
    let ranks: Vec<RankPlan> = machine.ranks().iter().enumerate().map(rank).collect();
    let on_loss = if ranks.is_empty() {
        format!("no group serves: {}", machine.waits_for().unwrap_or_else(|| machine.phase().to_owned()))
    } else if ranks.iter().all(|r| r.successor_is_prepared) {
        "a spare that has loaded the rank's slice takes over at once".to_owned()
    } else if ranks.iter().all(|r| !r.successor.is_empty()) {
        "a spare takes over as soon as it has loaded the rank's slice".to_owned()
    } else {
        match machine.regroup_after() {
            Some(after) => format!(
                "running requests wait for the shard's return; after {} s without it the others go on with fewer ranks",
                after.as_secs_f32()
            ),
            None => "running requests wait for the shard's return".to_owned(),
        }
    };
    PlanResponse { ranks, on_loss }
}
