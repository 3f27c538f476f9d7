//! What goes wrong.

use phalanx_coordinator::{group::machine::Event as GroupEvent, scheduler::event::Event, sequence::RequestKey};

use super::{
    coordinator::{Coordinator, name},
    shard::Health,
    world::{FromShard, Happening, SILENCE_MS, World},
};

/// What kind of life a cluster has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trouble {
    None,
    Shards,
    Coordinators,
    Poison,
}

impl World {
    pub(super) fn fault(&mut self) {
        if self.now_ms >= self.faults_until_ms {
            return;
        }
        let next = self.luck.within(2, 40) as u64;
        self.after(next, Happening::Fault);
        if self.trouble == Trouble::Coordinators && self.luck.one_in(3) && self.coordinators.len() < 4 {
            return self.change_leader();
        }
        let shard = self.luck.below(self.shards.len());
        match self.luck.below(8) {
            0 | 1 => {
                if self.shards[shard].health != Health::Dead {
                    self.kill(shard);
                }
            }
            2 => {
                if self.shards[shard].health == Health::Alive {
                    self.totals.n_paused += 1;
                    self.shards[shard].health = Health::Paused;
                    let ms = self.luck.within(1, 80) as u64;
                    self.after(ms, Happening::Unpause { shard });
                    if let Some((link, coordinator)) = self.shards[shard].link
                        && ms > SILENCE_MS
                    {
                        self.after(SILENCE_MS, Happening::DownAtCoordinator { coordinator, shard, link });
                    }
                }
            }
            3 => {
                if let Some((link, coordinator)) = self.shards[shard].link {
                    self.totals.n_cut += 1;
                    self.cut.insert(link);
                    let (there, here) = (self.luck.below(SILENCE_MS as usize), self.luck.below(SILENCE_MS as usize));
                    self.after(there as u64, Happening::DownAtCoordinator { coordinator, shard, link });
                    self.after(here as u64, Happening::DownAtShard { shard, link });
                }
            }
            4 => self.store_away_until_ms = self.now_ms + self.luck.within(1, 100) as u64,
            5 => self.change_on_purpose(shard),
            6 => {
                // Its heart beats, but its engine does nothing.
                if self.shards[shard].health == Health::Alive && self.luck.one_in(4) {
                    self.shards[shard].health = Health::Paused;
                    let ms = self.luck.within(100, 4000) as u64;
                    self.after(ms, Happening::Unpause { shard });
                }
            }
            _ => {
                // All of them at once.
                if self.luck.one_in(4) {
                    for shard in 0..self.shards.len() {
                        if self.shards[shard].health != Health::Dead {
                            self.kill(shard);
                        }
                    }
                }
            }
        }
    }

    /// An operator's wish, or a supervisor's.
    fn change_on_purpose(&mut self, shard: usize) {
        match self.luck.below(3) {
            0 => {
                let drain = GroupEvent::Drain { ticket: 0, shard: name(shard), is_helped: false };
                self.group_event(self.leader, drain, None);
                let ms = self.luck.within(1, 300) as u64;
                self.after(ms, Happening::Undrain { shard });
            }
            1 => self.reply(shard, FromShard::Leaving),
            _ => self.group_event(self.leader, GroupEvent::Rollout { but: Vec::new(), return_limit: None }, None),
        }
    }

    /// The leader dies, or is cut off from the store and does not know that it leads no more.
    pub(super) fn change_leader(&mut self) {
        self.totals.n_leaders += 1;
        let old = self.leader;
        let is_dead = self.luck.one_in(2);
        let (term, recovery) = (self.coordinators[old].term + 1, self.coordinators[old].scheduler.recovery());
        let alive =
            (0..self.shards.len()).filter(|shard| self.shards[*shard].health != Health::Dead).map(name).collect();
        self.coordinators.push(Coordinator::new(
            term,
            (self.stored_epoch, self.coordinators[old].ranks.iter().copied().map(name).collect(), alive),
            self.settings.clone(),
            self.limits,
            recovery,
            self.now(),
        ));
        self.leader = self.coordinators.len() - 1;
        self.coordinators[old].is_alive = !is_dead;
        // The host is gone, and a rank with it.
        let ranks = self.coordinators[old].ranks.clone();
        if is_dead && !ranks.is_empty() && self.luck.one_in(2) {
            let shard = ranks[self.luck.below(ranks.len())];
            if self.shards[shard].health != Health::Dead {
                self.kill(shard);
            }
        }
        for shard in 0..self.shards.len() {
            let Some((link, _)) = self.shards[shard].link.filter(|(_, c)| *c != self.leader) else { continue };
            let ms = self.luck.within(0, 25) as u64;
            let happening = if is_dead { Happening::DownAtShard { shard, link } } else { Happening::Learn { shard } };
            self.after(ms, happening);
        }
        for client in 0..self.clients.len() {
            if self.clients[client].is_open() {
                let request = self.clients[client].reborn(&mut self.luck);
                self.totals.n_resumed += usize::from(request.resume.iter().any(|c| !c.tokens.is_empty()));
                self.lives_at[client] = self.leader;
                self.scheduler_event(self.leader, Event::Submit(RequestKey(client as u64), Box::new(request)));
            }
        }
    }
}
