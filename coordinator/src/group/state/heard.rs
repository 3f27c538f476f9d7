//! What shards say, as events of the machine.

use std::{collections::BTreeMap, time::Instant};

use phalanx_cluster::{
    id::{Epoch, ShardId},
    seal::{SEAL_BYTES, Seal},
};
use phalanx_proto::v1::{Heartbeat, Loaded, Ready, SealedBlocks, shard_message::Message as FromShard};
use ractor::{ActorProcessingErr, ActorRef};

use super::State;
use crate::group::{
    actor::GroupMsg,
    machine::{Beat, Event, Origin, Slice},
    seats::Memory,
};

impl State {
    pub(in crate::group) fn on_message(
        &mut self,
        myself: &ActorRef<GroupMsg>,
        from: &Origin,
        message: FromShard,
    ) -> Result<(), ActorProcessingErr> {
        let epoch = Epoch::from_raw;
        let shard = &from.shard;
        let from = || from.clone();
        let event = match message {
            FromShard::StepResult(result) => {
                if result.epoch == self.machine.epoch().raw()
                    && let Some(rank) = self.machine.rank_of(shard)
                {
                    self.meters.stepped(rank, &result, Instant::now());
                }
                let event = Event::Stepped { from: from(), epoch: epoch(result.epoch), step: result.step };
                return self.step(myself, event, Some(result));
            }
            FromShard::Heartbeat(beat) => {
                self.note(&from(), |memory| memory.resident = beat.resident_bytes);
                self.show_device(shard);
                self.step(myself, Event::Beat { from: from(), beat: what_it_does(&beat) }, None)?;
                self.meters.mirror_lag(self.machine.mirror_lag());
                return Ok(());
            }
            FromShard::LoadProgress(progress) => {
                let rank = self.machine.rank_of(&from().shard);
                if let (Some(rank), true) = (rank, progress.epoch == self.machine.epoch().raw())
                    && let Some(shown) = &mut self.progress
                {
                    shown.update(rank, progress.done_bytes, progress.total_bytes);
                    self.config.loading.update(self.config.index, rank, progress.done_bytes, progress.total_bytes);
                }
                Event::Progress { from: from(), epoch: epoch(progress.epoch) }
            }
            FromShard::Loaded(loaded) => {
                self.on_loaded(&from(), &loaded);
                let sealed = loaded.sealed.as_ref().and_then(|sealed| sealed_blocks(&from().shard, sealed));
                let slice = Slice {
                    kv_blocks: loaded.kv_blocks,
                    weight_bytes: loaded.weight_bytes,
                    kept_through: loaded.kv_kept_through_step,
                    sealed,
                };
                Event::Loaded { from: from(), epoch: epoch(loaded.epoch), slice }
            }
            FromShard::Ready(ready) => {
                self.on_ready(&from(), &ready);
                Event::Ready { from: from(), epoch: epoch(ready.epoch) }
            }
            FromShard::Failed(failed) => {
                let error = match failed.step {
                    0 => failed.error,
                    step => format!("step {step}: {}", failed.error),
                };
                tracing::error!(shard = %from().shard, epoch = failed.epoch, error, "a shard has failed");
                Event::Failed { from: from(), epoch: epoch(failed.epoch), error }
            }
            FromShard::Prepared(prepared) => {
                tracing::info!(
                    shard = %from().shard,
                    rank = prepared.rank,
                    world_size = prepared.world_size,
                    weight_bytes = prepared.weight_bytes,
                    "a spare has loaded a slice"
                );
                self.note(&from(), |memory| memory.weights = memory.weights.max(prepared.weight_bytes));
                let (world_size, rank) = (prepared.world_size as usize, prepared.rank as usize);
                Event::Prepared { from: from(), world_size, rank }
            }
            FromShard::Leaving(leaving) => {
                tracing::info!(shard = %from().shard, reason = leaving.reason, "a shard was asked to end");
                Event::Leaving(from())
            }
            FromShard::Hello(_) => return Ok(()),
        };
        self.step(myself, event, None)
    }

    fn on_loaded(&mut self, from: &Origin, loaded: &Loaded) {
        self.note(from, |memory| memory.weights = loaded.weight_bytes);
        if let Some(rank) = self.machine.rank_of(&from.shard) {
            tracing::info!(
                rank,
                shard = %from.shard,
                epoch = loaded.epoch,
                weight_bytes = loaded.weight_bytes,
                kv_blocks = loaded.kv_blocks,
                kv_bytes_per_block = loaded.kv_bytes_per_block,
                kv_kept_through_step = loaded.kv_kept_through_step,
                sealed_blocks = loaded.sealed.as_ref().map(|sealed| sealed.blocks.len()),
                "loaded"
            );
        }
    }

    fn on_ready(&mut self, from: &Origin, ready: &Ready) {
        self.note(from, |memory| {
            memory.kv = ready.kv_bytes;
            memory.resident = ready.resident_bytes;
        });
        if let Some(rank) = self.machine.rank_of(&from.shard) {
            let (kv_bytes, resident_bytes) = (ready.kv_bytes, ready.resident_bytes);
            tracing::info!(rank, shard = %from.shard, epoch = ready.epoch, kv_bytes, resident_bytes, "ready");
        }
    }

    fn note(&mut self, from: &Origin, change: impl FnOnce(&mut Memory)) {
        let rank = self.machine.rank_of(&from.shard);
        self.seats.note_memory(from, rank, change);
    }
}

/// What a rank says that its blocks hold; nothing if it makes no sense.
fn sealed_blocks(shard: &ShardId, sealed: &SealedBlocks) -> Option<BTreeMap<u32, Seal>> {
    let (seals, rest) = sealed.seals.as_chunks::<SEAL_BYTES>();
    if seals.len() != sealed.blocks.len() || !rest.is_empty() {
        let (blocks, bytes) = (sealed.blocks.len(), sealed.seals.len());
        tracing::warn!(%shard, "{bytes} bytes of seals for {blocks} blocks: want {SEAL_BYTES} for each; they are ignored");
        return None;
    }
    Some(sealed.blocks.iter().zip(seals).map(|(block, seal)| (*block, Seal::from_bytes(*seal))).collect())
}

fn what_it_does(beat: &Heartbeat) -> Beat {
    let busy = (beat.busy_epoch != 0).then(|| (Epoch::from_raw(beat.busy_epoch), beat.busy_step));
    let mirrored = (beat.mirrored_epoch != 0).then(|| (Epoch::from_raw(beat.mirrored_epoch), beat.mirrored_step));
    Beat { busy, waits_for: beat.waits_for_rank.map(|r| r as usize), mirrored }
}
