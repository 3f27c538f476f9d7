//! The journal of live requests on its way from the leader to standbys, and the copy that a standby keeps.
//!
//! A request is a pure function of what was asked and its seed, so a copy may lag and may be forgotten: what is missing is
//! computed again. The copy only saves that work, and the seed of requests that named none.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use futures::stream::BoxStream;
use phalanx_proto::v1::{JournalEntry, TokenScore, journal_entry::What};

use crate::{config::Config, scores::PackedScores};

/// What a request takes besides its tokens: its place under its key, and what an allocator adds.
const OWN_BYTES: usize = size_of::<(String, Request)>() + 64;
/// Pauses between looks for requests whose time is over.
const SHORTEST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// Shortest time for a request that has not ended: its client, or who forwards it, looks for a leader for so long.
const CLIENTS_RETURN: Duration = Duration::from_secs(60);

/// What the leader knows of requests that can be resumed.
pub trait JournalFeed: Send + Sync {
    /// All that is known now, then `JournalSynced`, then every change in order. Ends when the feed does, or when the
    /// listener is too slow: subscribe again.
    fn subscribe(&self) -> BoxStream<'static, JournalEntry>;
}

/// Takes what a feed says.
pub trait JournalSink: Send + Sync {
    /// In the order of the feed.
    fn apply(&self, entry: JournalEntry);
}

/// A request as the former leader knew it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Replica {
    /// SHA-256 of what was asked.
    pub request_hash: Vec<u8>,
    /// Seed of choice 0.
    pub seed: u64,
    /// What each choice has emitted.
    pub choices: Vec<ReplicaChoice>,
    /// Whether the request has ended: nothing follows these tokens.
    pub is_ended: bool,
}

/// What a choice has emitted.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ReplicaChoice {
    /// In order.
    pub token_ids: Vec<u32>,
    /// One for each token if the request asked for log-probabilities, else none.
    pub scores: Vec<TokenScore>,
}

/// How much a copy keeps, and for how long.
#[derive(Debug, Clone, Copy)]
pub struct Retention {
    /// Bytes of all requests together; the longest unchanged are forgotten first, those that have ended before others.
    pub bytes: usize,
    /// Most choices of one request: a longer claim is a fault of the sender.
    pub choices: usize,
    /// Time after a request's end.
    pub after_end: Duration,
    /// Time after the last change of a request that has not ended.
    pub after_change: Duration,
}

impl Retention {
    /// As configured.
    pub fn of(config: &Config) -> Self {
        Self {
            bytes: config.resume_memory,
            after_end: config.resume_window,
            after_change: config.resume_window.max(CLIENTS_RETURN),
            ..Self::default()
        }
    }
}

impl Default for Retention {
    fn default() -> Self {
        let ten_minutes = Duration::from_secs(600);
        Self { bytes: 256 << 20, choices: 4096, after_end: ten_minutes, after_change: ten_minutes }
    }
}

/// A standby's copy of the leader's journal. It outlives leaders: on takeover the new leader looks keys up in it.
pub struct ReplicatedJournal {
    kept: Mutex<Kept>,
}

impl ReplicatedJournal {
    /// An empty copy.
    pub fn new(retention: Retention) -> Self {
        Self { kept: Mutex::new(Kept { retention, requests: BTreeMap::new(), bytes: 0 }) }
    }

    /// What is known of the request with this key.
    pub fn get(&self, key: &str) -> Option<Replica> {
        self.lock().get(Instant::now(), key)
    }

    /// Forgets requests when their time is over, for the life of the process. Nobody else does where no request follows.
    pub async fn forget_in_time(self: Arc<Self>) {
        let pause = (self.lock().retention.after_end / 8).clamp(SHORTEST_PAUSE, LONGEST_PAUSE);
        loop {
            tokio::time::sleep(pause).await;
            self.lock().forget_over(Instant::now());
        }
    }

    /// Memory of all requests that are known.
    pub fn bytes(&self) -> usize {
        self.lock().bytes
    }

    /// Requests that are known.
    pub fn len(&self) -> usize {
        self.lock().requests.len()
    }

    /// Whether nothing is known.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn lock(&self) -> MutexGuard<'_, Kept> {
        // Losing part of a request to a panic is like never having heard of it.
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Default for ReplicatedJournal {
    fn default() -> Self {
        Self::new(Retention::default())
    }
}

impl JournalSink for ReplicatedJournal {
    fn apply(&self, entry: JournalEntry) {
        self.lock().apply(Instant::now(), entry);
    }
}

/// The state; time is an argument.
struct Kept {
    retention: Retention,
    requests: BTreeMap<String, Request>,
    bytes: usize,
}

/// A [`Replica`] in little memory.
struct Request {
    request_hash: Vec<u8>,
    seed: u64,
    choices: Vec<Choice>,
    is_ended: bool,
    bytes: usize,
    changed_at: Instant,
}

#[derive(Default, Clone)]
struct Choice {
    token_ids: Vec<u32>,
    scores: PackedScores,
}

impl Request {
    /// Gives back memory that was meant for more tokens; how much it was.
    fn shrink(&mut self) -> usize {
        let mut freed = 0;
        for choice in &mut self.choices {
            let before = choice.bytes();
            choice.token_ids.shrink_to_fit();
            choice.scores.shrink();
            freed += before - choice.bytes();
        }
        self.bytes -= freed;
        freed
    }

    fn replica(&self) -> Replica {
        let choices = self
            .choices
            .iter()
            .map(|choice| ReplicaChoice { token_ids: choice.token_ids.clone(), scores: choice.scores.to_vec() });
        let choices = choices.collect();
        Replica { request_hash: self.request_hash.clone(), seed: self.seed, choices, is_ended: self.is_ended }
    }
}

impl Choice {
    fn bytes(&self) -> usize {
        self.token_ids.capacity() * size_of::<u32>() + self.scores.bytes()
    }
}

impl Kept {
    fn apply(&mut self, now: Instant, entry: JournalEntry) {
        let JournalEntry { key, what } = entry;
        let Some(what) = what else { return };
        match what {
            What::Began(began) => {
                self.forget(&key);
                let n_choices = began.choices as usize;
                if n_choices > self.retention.choices {
                    tracing::warn!(n_choices, "a journal entry claims too many choices: ignored");
                    return;
                }
                let bytes = OWN_BYTES + key.len() + began.request_hash.len() + n_choices * size_of::<Choice>();
                let request = Request {
                    request_hash: began.request_hash,
                    seed: began.seed,
                    choices: vec![Choice::default(); n_choices],
                    is_ended: false,
                    bytes,
                    changed_at: now,
                };
                self.bytes += bytes;
                self.requests.insert(key, request);
            }
            What::Tokens(tokens) => {
                // Unknown: forgotten for want of room.
                let Some(request) = self.requests.get_mut(&key) else { return };
                let Some(choice) = request.choices.get_mut(tokens.choice as usize) else { return };
                let before = choice.bytes();
                choice.token_ids.extend(tokens.token_ids);
                choice.scores.extend(tokens.scores);
                let added = choice.bytes() - before;
                request.bytes += added;
                request.changed_at = now;
                self.bytes += added;
            }
            What::Ended(_) => {
                if let Some(request) = self.requests.get_mut(&key) {
                    request.is_ended = true;
                    request.changed_at = now;
                    self.bytes -= request.shrink();
                }
            }
            What::Synced(_) => {}
        }
        self.tidy(now);
    }

    fn get(&mut self, now: Instant, key: &str) -> Option<Replica> {
        let request = self.requests.get(key)?;
        if self.is_over(now, request) {
            self.forget(key);
            return None;
        }
        Some(request.replica())
    }

    fn is_over(&self, now: Instant, request: &Request) -> bool {
        let kept_for = if request.is_ended { self.retention.after_end } else { self.retention.after_change };
        now.saturating_duration_since(request.changed_at) >= kept_for
    }

    fn forget(&mut self, key: &str) {
        if let Some(request) = self.requests.remove(key) {
            self.bytes -= request.bytes;
        }
    }

    fn forget_over(&mut self, now: Instant) {
        let over: Vec<String> =
            self.requests.iter().filter(|(_, r)| self.is_over(now, r)).map(|(key, _)| key.clone()).collect();
        for key in over {
            self.forget(&key);
        }
    }

    /// Makes room. Looks at all requests only when there is none.
    fn tidy(&mut self, now: Instant) {
        if self.bytes <= self.retention.bytes {
            return;
        }
        self.forget_over(now);
        let mut order: Vec<(bool, Instant, String)> =
            self.requests.iter().map(|(key, r)| (!r.is_ended, r.changed_at, key.clone())).collect();
        order.sort_unstable();
        // Room for a while, so that not every entry looks at all requests.
        let goal = self.retention.bytes - self.retention.bytes / 8;
        for (_, _, key) in order {
            if self.bytes <= goal {
                return;
            }
            self.forget(&key);
        }
    }
}

#[cfg(test)]
mod tests {
    use phalanx_proto::v1::{JournalBegan, JournalEnded, JournalTokens};

    use super::*;

    fn entry(key: &str, what: What) -> JournalEntry {
        JournalEntry { key: key.to_owned(), what: Some(what) }
    }

    fn began(key: &str, choices: u32, seed: u64) -> JournalEntry {
        entry(key, What::Began(JournalBegan { request_hash: vec![7; 32], choices, seed }))
    }

    fn tokens(key: &str, choice: u32, ids: &[u32]) -> JournalEntry {
        let scores = ids.iter().map(|id| TokenScore { token_id: *id, ..TokenScore::default() }).collect();
        entry(key, What::Tokens(JournalTokens { choice, token_ids: ids.to_vec(), scores }))
    }

    fn ended(key: &str) -> JournalEntry {
        entry(key, What::Ended(JournalEnded {}))
    }

    #[test]
    fn a_copy_says_what_was_emitted() {
        let journal = ReplicatedJournal::default();
        for entry in [began("a", 2, 9), tokens("a", 0, &[1, 2]), tokens("a", 1, &[5]), tokens("a", 0, &[3])] {
            journal.apply(entry);
        }
        let replica = journal.get("a").unwrap();
        assert_eq!((replica.seed, replica.request_hash.len(), replica.is_ended), (9, 32, false));
        assert_eq!(replica.choices[0].token_ids, [1, 2, 3]);
        assert_eq!((replica.choices[1].token_ids.as_slice(), replica.choices[1].scores.len()), (&[5][..], 1));
        journal.apply(ended("a"));
        assert!(journal.get("a").unwrap().is_ended);
        // A new leader tells it all again.
        journal.apply(began("a", 2, 9));
        assert_eq!(journal.get("a").unwrap().choices[0].token_ids, [] as [u32; 0]);
        assert_eq!(journal.get("b"), None);
    }

    #[test]
    fn nonsense_changes_nothing() {
        let journal = ReplicatedJournal::default();
        journal.apply(tokens("a", 0, &[1]));
        journal.apply(ended("a"));
        journal.apply(began("a", u32::MAX, 0));
        journal.apply(JournalEntry::default());
        assert!(journal.is_empty());
        journal.apply(began("a", 1, 0));
        journal.apply(tokens("a", 1, &[1]));
        assert_eq!(journal.get("a").unwrap().choices.len(), 1);
    }

    #[test]
    fn old_requests_are_forgotten() {
        let start = Instant::now();
        let after = |s| start + Duration::from_secs(s);
        let retention = Retention {
            after_end: Duration::from_secs(10),
            after_change: Duration::from_secs(20),
            ..Retention::default()
        };
        let mut kept = Kept { retention, requests: BTreeMap::new(), bytes: 0 };
        kept.apply(start, began("runs", 1, 0));
        kept.apply(start, began("ended", 1, 0));
        kept.apply(after(1), ended("ended"));
        kept.forget_over(after(10));
        assert!(kept.get(after(10), "ended").is_some());
        kept.forget_over(after(11));
        assert!(!kept.requests.contains_key("ended"), "though nobody asked for it");
        assert!(kept.get(after(19), "runs").is_some());
        assert!(kept.get(after(20), "runs").is_none());
        assert_eq!(kept.bytes, 0);
    }

    #[test]
    fn what_has_ended_gets_smaller() {
        let now = Instant::now();
        let mut kept = Kept { retention: Retention::default(), requests: BTreeMap::new(), bytes: 0 };
        kept.apply(now, began("a", 2, 0));
        let ids: Vec<u32> = (0..700).collect();
        ids.iter().for_each(|id| kept.apply(now, tokens("a", id % 2, &[*id])));
        let (before, live) = (kept.get(now, "a"), kept.bytes);
        kept.apply(now, ended("a"));
        assert!(kept.bytes < live && kept.bytes < 20 * ids.len() + 500, "{} {live}", kept.bytes);
        assert_eq!(kept.get(now, "a"), before.map(|replica| Replica { is_ended: true, ..replica }));
        kept.forget("a");
        assert_eq!(kept.bytes, 0);
    }

    #[test]
    fn memory_is_bounded_and_live_requests_stay_longest() {
        let now = Instant::now();
        let retention = Retention { bytes: 100_000, ..Retention::default() };
        let mut kept = Kept { retention, requests: BTreeMap::new(), bytes: 0 };
        kept.apply(now, began("live", 1, 0));
        kept.apply(now, tokens("live", 0, &[1; 100]));
        for i in 0..1000u64 {
            let key = format!("r{i}");
            let at = now + Duration::from_millis(i);
            for entry in [began(&key, 1, i), tokens(&key, 0, &[1; 10]), ended(&key)] {
                kept.apply(at, entry);
                assert!(kept.bytes <= retention.bytes);
            }
        }
        assert!(kept.requests.contains_key("live") && kept.requests.contains_key("r999"));
        assert!(!kept.requests.contains_key("r0"));
        assert_eq!(kept.bytes, kept.requests.values().map(|r| r.bytes).sum::<usize>());
        // Alone it does not fit at all.
        kept.apply(now, tokens("live", 0, &[1; 100_000]));
        assert!(kept.bytes <= retention.bytes && !kept.requests.contains_key("live"));
    }
}
