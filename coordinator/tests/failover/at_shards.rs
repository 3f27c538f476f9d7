//! What shards do with what they are told, and how they compute a step: all ranks begin it together, each ends it at its
//! own time.

use std::collections::BTreeSet;

use phalanx_coordinator::group::machine::SliceOf;
use phalanx_shard::step::seals::Seals;

use super::{
    shard::{Copied, Form, Health, Kept, Shard, ToShard},
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
        state.link = Some((link, coordinator));
        state.known_term = self.coordinators[coordinator].term;
        let message = FromShard::Hello { holds: state.holds(), copies: self.copies_at(shard) };
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
        if form.keep_sealed {
            return self.maybe_take_sealed(shard, form);
        }
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
        let Copied { step: through_step, pages, seals, .. } = steps[self.luck.below(steps.len())].clone();
        self.shards[shard].kept = Some(Kept { epoch, rank, world_size, through_step, pages, seals });
        self.totals.n_mirrored += 1;
        self.totals.n_fetched += usize::from(shard != holder);
    }

    /// Whoever gets copies of a rank's rows may give a sign of life.
    fn maybe_beat(&mut self, epoch: u64, rank: usize) {
        let Some(me) = self.holders.get(&(epoch, rank)).copied() else { return };
        let (holder, incarnation) = me;
        let state = &self.shards[holder];
        if state.health != Health::Alive || state.incarnation != incarnation || !self.luck.one_in(3) {
            return;
        }
        let mine = self.holders.range((epoch, 0)..(epoch + 1, 0)).filter(|(_, holder)| **holder == me);
        let steps = mine.map(|(key, _)| Some(self.mirror.get(key)?.front()?.step)).collect::<Option<Vec<u64>>>();
        if let Some(step) = steps.and_then(|steps| steps.into_iter().min()) {
            self.reply(holder, FromShard::Beat { mirrored: (epoch, step) });
        }
    }

    /// The last epoch of which a shard may have copies.
    fn copied_epoch(&self, shard: usize) -> Option<u64> {
        let me = (shard, self.shards[shard].incarnation);
        let mut of_me = self.holders.iter().rev().filter(|(_, holder)| **holder == me);
        of_me.find_map(|(key, _)| self.mirror.contains_key(key).then_some(key.0))
    }

    /// Ranks of whose pages a shard may have copies.
    fn copies_at(&self, shard: usize) -> BTreeSet<SliceOf> {
        let Some(epoch) = self.copied_epoch(shard) else { return BTreeSet::new() };
        let me = (shard, self.shards[shard].incarnation);
        let of_epoch =
            self.mirror.range((epoch, 0)..(epoch + 1, 0)).filter(|(key, _)| self.holders.get(key) == Some(&me));
        of_epoch.filter_map(|(key, steps)| Some((steps.front()?.world_size, key.1))).collect()
    }

    /// It may take over copies that it has of the rank, for what their blocks hold: each block as it was after one of the
    /// last steps, or half way to the next one and without a seal.
    fn maybe_take_sealed(&mut self, shard: usize, form: &Form) {
        let (rank, world_size) = (form.rank, form.ranks.len());
        let Some(epoch) = self.copied_epoch(shard) else { return };
        let has_own = self.shards[shard].holds() == Some((world_size, rank));
        let Some(steps) = self.mirror.get(&(epoch, rank)).filter(|_| !has_own) else { return };
        let Some(oldest) = steps.front().filter(|copied| copied.world_size == world_size) else { return };
        let (n_blocks, through_step) = (oldest.pages.len(), oldest.step);
        let (mut pages, mut seals) = (Vec::new(), Vec::new());
        for block in 0..n_blocks {
            let copied = &steps[self.luck.below(steps.len())];
            let mut page = copied.pages[block].clone();
            if self.luck.one_in(5) {
                let slot = self.luck.below(page.len());
                page[slot] = Some((slot, u64::MAX));
            } else {
                seals.extend(copied.seals.of(block as u32).map(|seal| (block as u32, seal)));
            }
            pages.push(page);
        }
        let seals = Seals::of_copies(n_blocks, self.limits.block_size, seals);
        self.shards[shard].kept = Some(Kept { epoch, rank, world_size, through_step, pages, seals });
        self.totals.n_sealed_copies += 1;
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
        let (rank, world_size) = (engine.rank, engine.ranks.len());
        engine.begun = None;
        if fake.next_computes(POISON) {
            return self.kill(shard);
        }
        let Some(result) = fake.run_next() else { return };
        let steps = self.mirror.entry((epoch, rank)).or_default();
        steps.push_back(Copied { world_size, step, pages: fake.pages().clone(), seals: fake.seals().clone() });
        if steps.len() > MIRRORED_STEPS {
            steps.pop_front();
        }
        self.reply(shard, FromShard::Result(result));
        self.maybe_beat(epoch, rank);
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
