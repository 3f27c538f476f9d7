//! A cluster of three shards, one of them a spare, that never changes.

use phalanx_cluster::id::ShardId;
use phalanx_proto::v1::{
    Coordinator, DrainResponse, Load, Member, PlanResponse, RankPlan, RolloutEvent, StatusResponse,
};
use tokio::sync::mpsc;

use super::{AdminError, Control, RollingRestart, RolloutEvents, RolloutPhase, debug::Loads};

const SHARDS: &[&str] = &["local-0", "local-1", "local-2"];

/// Answers as a leader would.
pub struct FakeControl;

/// What it says of itself.
pub fn status() -> StatusResponse {
    let member = |index: u32| Member {
        shard_id: SHARDS[index as usize].to_owned(),
        rank: Some(index).filter(|rank| *rank < 2),
        device: "cpu".to_owned(),
        pid: 100 + index,
        host_id: "0b1c2d3e-boot".to_owned(),
        weight_bytes: 80 << 20,
        kv_bytes: if index < 2 { 64 << 20 } else { 0 },
        resident_bytes: 170 << 20,
        role: if index < 2 { "rank" } else { "spare" }.to_owned(),
        prepared_ranks: if index < 2 { Vec::new() } else { vec![1, 0] },
        silent_ms: 12,
        version: "0.1.0".to_owned(),
        threads: 2,
        incarnation: 7,
        collective_address: "127.0.0.1:5000".to_owned(),
        lease_ms: Some(2500),
        group: 0,
    };
    StatusResponse {
        epoch: 7,
        phase: "serving".to_owned(),
        world_size: 2,
        wanted_world_size: 2,
        model: "tiny".to_owned(),
        members: (0..3).map(member).collect(),
        term: 3,
        coordinators: vec![Coordinator {
            coordinator_id: "c-1".to_owned(),
            role: "leader".to_owned(),
            http_address: "127.0.0.1:8000".to_owned(),
            grpc_address: "127.0.0.1:50051".to_owned(),
        }],
        waits_for: String::new(),
        load: Some(Load {
            requests: 3,
            sequences_waiting: 1,
            sequences_running: 2,
            kv_blocks_used: 120,
            kv_blocks: 2048,
        }),
        groups: Vec::new(),
    }
}

fn check(shard: &ShardId) -> Result<(), AdminError> {
    if SHARDS.contains(&shard.0.as_str()) {
        return Ok(());
    }
    let known = SHARDS.iter().map(|s| (*s).to_owned()).collect();
    Err(AdminError::UnknownShard { shard: shard.0.clone(), known })
}

#[tonic::async_trait]
impl Control for FakeControl {
    async fn status(&self) -> Result<StatusResponse, AdminError> {
        Ok(status())
    }

    async fn drain(&self, shard: ShardId) -> Result<DrainResponse, AdminError> {
        check(&shard)?;
        if shard.0 == "local-0" {
            return Err(AdminError::Refused("nobody can take rank 0".to_owned()));
        }
        let successor = if shard.0 == "local-1" { "local-2" } else { "" };
        Ok(DrainResponse { successor: successor.to_owned(), stall_ms: 120, epoch: 8 })
    }

    async fn undrain(&self, shard: ShardId) -> Result<(), AdminError> {
        check(&shard)
    }

    async fn rollout_restart(&self, rollout: RollingRestart) -> Result<RolloutEvents, AdminError> {
        let (sender, events) = mpsc::unbounded_channel();
        let total = u32::try_from(SHARDS.len()).unwrap();
        let event = |shard: &str, phase: RolloutPhase, done, stall_ms| RolloutEvent {
            shard_id: shard.to_owned(),
            phase: phase.name().to_owned(),
            done,
            total,
            stall_ms,
        };
        for (done, shard) in (1..).zip(SHARDS) {
            if rollout.but.iter().any(|b| b.0 == *shard) {
                continue;
            }
            sender.send(Ok(event(shard, RolloutPhase::Draining, done - 1, 0))).unwrap();
            sender.send(Ok(event(shard, RolloutPhase::Restarting, done - 1, 110))).unwrap();
            sender.send(Ok(event(shard, RolloutPhase::Returned, done, 100 + 10 * done))).unwrap();
        }
        sender.send(Ok(event("", RolloutPhase::Done, total, 0))).unwrap();
        Ok(events)
    }

    async fn plan(&self) -> Result<PlanResponse, AdminError> {
        let rank = |rank: u32| RankPlan {
            rank,
            shard_id: SHARDS[rank as usize].to_owned(),
            successor: "local-2".to_owned(),
            successor_is_prepared: rank == 1,
            q_heads: format!("{}..{}", 4 * rank, 4 * rank + 4),
            kv_heads: format!("{rank}..{}", rank + 1),
            ffn_columns: "0..64".to_owned(),
            vocabulary: "0..256".to_owned(),
            weight_bytes: 80 << 20,
            group: 0,
        };
        Ok(PlanResponse { ranks: vec![rank(0), rank(1)], on_loss: "local-2 takes it".to_owned() })
    }

    async fn loads(&self) -> Result<Loads, AdminError> {
        Ok(Loads { groups: vec![Some(Default::default())], n_streams: 4 })
    }

    async fn step_down(&self) -> Result<String, AdminError> {
        Err(AdminError::Refused("there is no standby".to_owned()))
    }
}
