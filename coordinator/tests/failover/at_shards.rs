//! What shards do with what they are told, and how they compute a step: all ranks begin it together, each ends it at its
//! own time.

use phalanx_shard::step::seals::Seals;

use super::{
    shard::{Form, Health, Kept, Shard, ToShard},
    world::{FromShard, Happening, POISON, SILENCE_MS, World},
};

/// Steps that a mirror may lag.
const MIRRORED_STEPS: usize = 4;

impl World {
    pub(super) fn attach(&mut self, shard: usize) {
        let state = &mut self.shards[shard];
        if state.health != Health::Alive || state.link.is_some() {
            return;
        }
        self.n_links += 1;
        let (link, coordinator, incarnation) = (self.n_links, self.leader, state.incarnation);
        let message = FromShard::Hello { holds: state.holds() };
        state.link = Some((link, coordinator));
        state.known_term = self.coordinators[coordinator].term;
        self.post(link, false, Happening::ToCoordinator { coordinator, shard, link, incarnation, message });
    }

    pub(super) fn lose_link(&mut self, shard: usize, link: u64) {
        if self.shards[shard].link.is_none_or(|(l, _)| l != link) {
            return;
        }
        self.shards[shard].link = None;
        self.shards[shard].leave(&mut self.luck);
        let after = self.luck.within(1, 10) as u64;
        self.after(after, Happening::Attach { shard });
    }

    pub(super) fn reply(&mut self, shard: usize, message: FromShard) {
        let state = &self.shards[shard];
        let Some((link, coordinator)) = state.link else { return };
        let incarnation = state.incarnation;
        self.post(link, false, Happening::ToCoordinator { coordinator, shard, link, incarnation, message });
    }

    pub(super) fn at_shard(&mut self, shard: usize, link: u64, message: ToShard) {
        if self.shards[shard].link.is_none_or(|(l, _)| l != link) {
            return;
        }
        match message {
            ToShard::Form(form) => {
                self.shards[shard].leave(&mut self.luck);
                self.maybe_mirror(shard, &form);
                let epoch = form.epoch;
                let (kept, sealed) = self.shards[shard].form(form);
                let n_blocks = self.shards[shard].n_blocks;
                self.reply(shard, FromShard::Loaded { epoch, kept, sealed, n_blocks });
            }
            ToShard::Serve { epoch, n_blocks } => {
                let limits = self.limits;
                if self.shards[shard].engine.as_ref().is_some_and(|e| e.epoch == epoch) {
                    self.shards[shard].serve(n_blocks, limits);
                    self.reply(shard, FromShard::Ready { epoch });
                }
            }
            ToShard::Plan(plan) => {
                let epoch = plan.epoch;
                let engine = self.shards[shard].engine.as_mut().filter(|e| e.epoch == epoch);
                if let Some(fake) = engine.and_then(|e| e.serving.as_mut()) {
                    fake.queue.push_back(plan);
                    self.try_to_begin(epoch);
                }
            }
            ToShard::Retire { epoch, keep_kv } => {
                if self.shards[shard].engine.as_ref().is_some_and(|e| e.epoch == epoch) {
                    self.shards[shard].leave(&mut self.luck);
                    if !keep_kv {
                        self.shards[shard].kept = None;
                    }
                }
            }
            ToShard::Prepare { world_size, ranks } => {
                for rank in ranks {
                    self.reply(shard, FromShard::Prepared { world_size, rank });
                }
            }
            ToShard::Shutdown => self.kill(shard),
        }
    }

    /// A spare may have had the rows of the rank that it takes streamed to it, up to some step; or another shard may have,
    /// of which it fetches them.
    pub(super) fn maybe_mirror(&mut self, shard: usize, form: &Form) {
        let (rank, world_size) = (form.rank, form.ranks.len());
        let Some(epoch) = form.keep_kv_of else { return };
        let Some((holder, incarnation)) = self.holders.get(&(epoch, rank)).copied() else { return };
        // The holder of that life, or nobody.
        let state = &self.shards[holder];
        let is_there = state.health != Health::Dead && state.incarnation == incarnation;
        if !is_there || (shard != holder && form.copy_at != Some(holder)) {
            return;
        }
        let has_own = self.shards[shard].kept.as_ref().is_some_and(|k| k.epoch == epoch && k.rank == rank);
        let Some(steps) = self.mirror.get(&(epoch, rank)).filter(|s| !has_own && !s.is_empty()) else { return };
        if self.luck.one_in(3) {
            return;
        }
        let (through_step, pages) = steps[self.luck.below(steps.len())].clone();
        // What the blocks of a copy hold is not known.
        let seals = Seals::new(pages.len(), self.limits.block_size);
        self.shards[shard].kept = Some(Kept { epoch, rank, world_size, through_step, pages, seals });
        self.totals.n_mirrored += 1;
        self.totals.n_fetched += usize::from(shard != holder);
    }

    /// Begins the next step if all ranks can.
    pub(super) fn try_to_begin(&mut self, epoch: u64) {
        let of_epoch = |s: &&Shard| s.engine.as_ref().is_some_and(|e| e.epoch == epoch);
        let Some(engine) = self.shards.iter().find(of_epoch).and_then(|s| s.engine.as_ref()) else { return };
        let ranks = engine.ranks.clone();
        let mut step = None;
        for shard in &ranks {
            let state = &self.shards[*shard];
            let Some(engine) = state.engine.as_ref().filter(|e| e.epoch == epoch) else { return };
            let Some(plan) = engine.serving.as_ref().and_then(|fake| fake.queue.front()) else { return };
            if state.health != Health::Alive || engine.begun.is_some() || step.is_some_and(|s| s != plan.step) {
                return;
            }
            step = Some(plan.step);
        }
        let Some(step) = step else { return };
        for shard in ranks {
            if let Some(engine) = &mut self.shards[shard].engine {
                engine.begun = Some(step);
            }
            let after = self.luck.within(1, 4) as u64;
            self.after(after, Happening::Execute { shard, epoch, step });
        }
    }

    pub(super) fn execute(&mut self, shard: usize, epoch: u64, step: u64) {
        let state = &mut self.shards[shard];
        let is_mine = state.engine.as_ref().is_some_and(|e| e.epoch == epoch && e.begun == Some(step));
        if !is_mine || state.health == Health::Dead {
            return;
        }
        if state.health == Health::Paused {
            return self.after(3, Happening::Execute { shard, epoch, step });
        }
        let Some(engine) = &mut state.engine else { return };
        let Some(fake) = &mut engine.serving else { return };
        let rank = engine.rank;
        engine.begun = None;
        if fake.next_computes(POISON) {
            return self.kill(shard);
        }
        let Some(result) = fake.run_next() else { return };
        let steps = self.mirror.entry((epoch, rank)).or_default();
        steps.push_back((step, fake.pages().clone()));
        if steps.len() > MIRRORED_STEPS {
            steps.pop_front();
        }
        self.reply(shard, FromShard::Result(result));
        self.try_to_begin(epoch);
    }

    pub(super) fn kill(&mut self, shard: usize) {
        let state = &mut self.shards[shard];
        state.health = Health::Dead;
        state.engine = None;
        state.kept = None;
        state.inbox.clear();
        if let Some((link, coordinator)) = state.link.take() {
            self.cut.insert(link);
            // The stream breaks, or the host is gone and only silence tells.
            let after = if self.luck.one_in(4) { SILENCE_MS } else { self.luck.below(3) as u64 };
            self.after(after, Happening::DownAtCoordinator { coordinator, shard, link });
        }
        let after = self.luck.within(1, 120) as u64;
        self.after(after, Happening::Restart { shard });
    }
}
