//! Losing a group and going on with the next one.
//!
//! When a group is lost, everything that runs waits again, and what was known of its pages is kept aside. If the next
//! group says that it kept those pages up to some step, sequences get their seats back with what that step left: their
//! tokens go again through the rows that are missing, and no others. If not, they are computed again from their tokens.
//!
//! A new leader knows no seats. The group tells it which blocks hold what, by seals; the prefix cache takes these in, so that
//! a sequence begins behind the blocks that are there.

use std::{
    collections::{BTreeMap, VecDeque},
    time::{Duration, Instant},
};

use phalanx_cluster::seal::Seal;

use super::{
    event::{Action, Kept, Measure},
    machine::{Group, Hold, Machine, Slots},
};
use crate::{
    coverage::Coverage,
    kv::blocks::Blocks,
    sequence::{Seat, SequenceKey},
};

/// A lost group's pages, as plans left them.
pub(super) struct Former {
    pub(super) epoch: u64,
    pub(super) blocks: Blocks,
    pub(super) seats: BTreeMap<SequenceKey, Seat>,
}

impl Machine {
    pub(super) fn on_serving(
        &mut self,
        now: Instant,
        epoch: u64,
        n_blocks: usize,
        kept: Option<Kept>,
        out: &mut Vec<Action>,
    ) {
        if epoch <= self.last_epoch {
            out.push(Action::Measure(Measure::Fenced));
            return;
        }
        self.leave_group(now);
        self.last_epoch = epoch;
        self.without_group_since = None;
        let former = self.former.take();
        let blocks = match (kept, former) {
            (Some(Kept::Rows { epoch, through_step }), Some(former))
                if former.epoch == epoch && former.blocks.n_blocks() == n_blocks =>
            {
                self.restore(former, through_step)
            }
            (Some(Kept::Sealed(sealed)), _) => self.take_over(n_blocks, &sealed),
            _ => Blocks::new(n_blocks, self.limits.block_size),
        };
        self.group = Some(Group {
            epoch,
            next_step: 1,
            blocks,
            in_flight: VecDeque::new(),
            slots: Slots::default(),
            refused: None,
            hold: Hold::Off,
            recovering: Some(Duration::ZERO),
        });
    }

    pub(super) fn on_lost(&mut self, now: Instant, epoch: u64, is_planned: bool, out: &mut Vec<Action>) {
        if self.group.as_ref().is_none_or(|g| g.epoch != epoch) {
            out.push(Action::Measure(Measure::Fenced));
            return;
        }
        if !is_planned {
            self.blame(out);
        }
        self.leave_group(now);
    }

    /// Keeps the group's pages aside and forgets the rest of it. Everything that the journal has open waits again.
    fn leave_group(&mut self, now: Instant) {
        let Some(group) = self.group.take() else { return };
        self.without_group_since = Some(now);
        self.running.clear();
        let mut seats = BTreeMap::new();
        for sequence in self.sequences.values_mut() {
            sequence.n_pending = 0;
            let Some(seat) = sequence.seat.take() else { continue };
            // A position whose token is not known is not computed again but for the first time.
            let n_computed = seat.computed.min(sequence.n_known());
            sequence.replay_until = sequence.replay_until.max(n_computed);
            if sequence.stalled_since.is_none() {
                sequence.stalled_since = sequence.last_token_at;
            }
            seats.insert(sequence.key, seat);
        }
        for live in self.requests.values_mut() {
            live.held.clear();
        }
        self.quarantine.end_trial();
        self.former = Some(Former { epoch: group.epoch, blocks: group.blocks, seats });
        self.waiting.clear();
        for key in self.sequences.keys().copied().collect::<Vec<_>>() {
            self.wait(key);
        }
    }

    /// Gives sequences their seats back as steps up to `through_step` left them. Returns the blocks.
    fn restore(&mut self, former: Former, through_step: u64) -> Blocks {
        let mut blocks = former.blocks;
        blocks.forget_after(through_step);
        // Blocks of those that begin anew first: whoever shares with them then shares with nobody.
        let mut kept = Vec::new();
        for (key, seat) in former.seats {
            match self.n_kept(key, &seat, through_step) {
                Some(n_computed) => kept.push((key, seat, n_computed)),
                None => blocks.release(seat.table),
            }
        }
        for (key, mut seat, n_computed) in kept {
            let n_computed = blocks.reopen(&mut seat.table, &seat.tokens, n_computed);
            let (Some(n_computed), Some(sequence)) = (n_computed, self.sequences.get_mut(&key)) else {
                blocks.release(seat.table);
                continue;
            };
            if n_computed >= sequence.replay_until {
                sequence.replay_until = 0;
            }
            seat.slot = None;
            seat.computed = n_computed;
            seat.coverage = Coverage::from_start(n_computed);
            sequence.seat = Some(seat);
            let turn = sequence.turn();
            self.unwait(key);
            self.running.insert(turn);
        }
        blocks
    }

    /// Blocks that were computed under an earlier leader: who waits finds its own when it is admitted, and blocks that nobody
    /// waits for go first where there are too few.
    fn take_over(&self, n_blocks: usize, sealed: &[(u32, Seal)]) -> Blocks {
        let mut blocks = Blocks::with_sealed(n_blocks, self.limits.block_size, sealed);
        for place in self.waiting.iter().rev() {
            let live = self.requests.get(&place.key.request);
            if let Some((live, tokens)) = live.zip(self.journal.tokens(place.key)) {
                blocks.touch(live.request.cache_root, &tokens);
            }
        }
        blocks
    }

    /// Positions that a seat need not compute again, if it is worth keeping.
    fn n_kept(&self, key: SequenceKey, seat: &Seat, through_step: u64) -> Option<usize> {
        // Younger than the step: its shared blocks may be what a lost step was to compute.
        let n_computed = seat.coverage.through(through_step)?;
        let sequence = self.sequences.get(&key)?;
        // The token that the last known one's row gives must be sampled again if its result is lost; that it is the same
        // one is the shards' promise.
        let n_computed = n_computed.min(sequence.n_known() - 1);
        let scores = self.requests.get(&key.request)?.scores.as_ref();
        // Scores come with the rows. Those that were lost with a result need their rows again.
        let has_scores = key.choice > 0 || scores.is_none_or(|s| s.len() >= n_computed);
        has_scores.then_some(n_computed)
    }
}
