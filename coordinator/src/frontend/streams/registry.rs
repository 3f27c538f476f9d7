//! Which keys are known, how much is kept of them, and what standbys are told. Time is an argument.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use phalanx_cluster::id::TokenId;
use phalanx_proto::v1::{JournalBegan, JournalEnded, JournalEntry, JournalTokens, TokenScore, journal_entry::What};

use super::run::Run;
use crate::{config::Config, frontend::reply::Reply, request::RequestEvent};

/// Tokens per message when standbys are told all of a request: messages stay small whatever they are scored with.
const TOKENS_PER_ENTRY: usize = 256;

/// How much is kept of requests, and for how long.
#[derive(Debug, Clone, Copy)]
pub struct Retention {
    /// Memory of all requests together. Those that ended first are forgotten first; live ones are never.
    pub bytes: usize,
    /// Time after a request's end.
    pub after_end: Duration,
}

impl Retention {
    /// As configured.
    pub fn of(config: &Config) -> Self {
        Self { bytes: config.resume_memory, after_end: config.resume_window }
    }
}

impl Default for Retention {
    fn default() -> Self {
        Self { bytes: 256 << 20, after_end: Duration::from_secs(600) }
    }
}

/// What a run answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Asked {
    /// SHA-256 of it.
    pub hash: [u8; 32],
    /// Seed of the first prompt's first choice.
    pub seed: u64,
    /// Prompts.
    pub n_prompts: usize,
    /// Choices of each.
    pub n: u32,
}

/// Whether more of a run is to come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// It goes on.
    Live,
    /// That was all.
    Over,
}

struct Entry {
    run: Arc<Run>,
    n_open: usize,
    ended_at: Option<Instant>,
    /// As they are counted among all.
    bytes: usize,
}

/// All runs by key.
pub struct Registry {
    retention: Retention,
    runs: BTreeMap<String, Entry>,
    bytes: usize,
    next_id: u64,
}

impl Registry {
    /// Knows nothing.
    pub fn new(retention: Retention) -> Self {
        Self { retention, runs: BTreeMap::new(), bytes: 0, next_id: 1 }
    }

    /// The run under a key.
    pub fn get(&mut self, now: Instant, key: &str) -> Option<Arc<Run>> {
        let entry = self.runs.get(key)?;
        if self.is_stale(now, entry) {
            self.remove(key);
            return None;
        }
        Some(Arc::clone(&entry.run))
    }

    fn is_stale(&self, now: Instant, entry: &Entry) -> bool {
        entry.ended_at.is_some_and(|at| now.saturating_duration_since(at) >= self.retention.after_end)
    }

    /// Enters a run under a key that has none. Also what standbys are told.
    pub fn begin(&mut self, key: &str, asked: Asked, reply: Option<Arc<dyn Reply>>) -> (Arc<Run>, JournalEntry) {
        self.remove(key);
        let run = Arc::new(Run::new(self.next_id, asked, reply));
        self.next_id += 1;
        let entry = Entry { run: Arc::clone(&run), n_open: asked.n_prompts, ended_at: None, bytes: 0 };
        self.runs.insert(key.to_owned(), entry);
        self.recount(key);
        (run, began(key, &asked))
    }

    /// Adds an event to a run. A failed request is forgotten, so that it can be tried again. Also what standbys are told.
    pub fn push(
        &mut self,
        now: Instant,
        key: &str,
        run: &Run,
        prompt_idx: usize,
        event: RequestEvent,
    ) -> (Status, Option<JournalEntry>) {
        let told = told(key, run, prompt_idx, &event);
        let outcome = match &event {
            RequestEvent::Finished(_) => Some(Ok(())),
            RequestEvent::Failed(_) => Some(Err(())),
            RequestEvent::PromptScored(_) | RequestEvent::Output(_) => None,
        };
        run.push(prompt_idx, event);
        let Some(entry) = self.runs.get_mut(key).filter(|entry| entry.run.id() == run.id()) else {
            // Forgotten; who reads it still can.
            run.end();
            return (Status::Over, None);
        };
        match outcome {
            Some(Ok(())) => {
                entry.n_open = entry.n_open.saturating_sub(1);
                if entry.n_open > 0 {
                    self.recount(key);
                    return (Status::Live, None);
                }
                entry.ended_at = Some(now);
                run.end();
                self.recount(key);
                self.tidy(now);
                (Status::Over, Some(ended(key)))
            }
            Some(Err(())) => {
                self.remove(key);
                run.end();
                (Status::Over, Some(ended(key)))
            }
            None => {
                self.recount(key);
                self.tidy(now);
                (Status::Live, told)
            }
        }
    }

    /// Gives up a run, unless somebody reads it again; whether it is given up. Also what standbys are told.
    pub fn give_up(&mut self, key: &str, run: &Run) -> (bool, Option<JournalEntry>) {
        if run.is_read() {
            return (false, None);
        }
        run.end();
        (true, self.forget(key, run.id()).then(|| ended(key)))
    }

    /// Forgets a run, if it is still that one; whether it was.
    pub fn forget(&mut self, key: &str, id: u64) -> bool {
        let is_that = self.runs.get(key).is_some_and(|entry| entry.run.id() == id);
        if is_that {
            self.remove(key);
        }
        is_that
    }

    fn remove(&mut self, key: &str) {
        if let Some(entry) = self.runs.remove(key) {
            self.bytes -= entry.bytes;
        }
    }

    /// After a change of a run.
    fn recount(&mut self, key: &str) {
        if let Some(entry) = self.runs.get_mut(key) {
            let bytes = entry.run.bytes() + 2 * key.len();
            self.bytes = self.bytes - entry.bytes + bytes;
            entry.bytes = bytes;
        }
    }

    /// Memory of all runs that are known.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Makes room: what ended first goes first.
    fn tidy(&mut self, now: Instant) {
        if self.bytes <= self.retention.bytes {
            return;
        }
        let ended = self.runs.iter().filter_map(|(key, entry)| Some((entry.ended_at?, key.clone())));
        let mut ended: Vec<(Instant, String)> = ended.collect();
        ended.sort_unstable();
        // Room for a while, so that not every token looks at all runs.
        let goal = self.retention.bytes - self.retention.bytes / 8;
        for (at, key) in ended {
            let is_stale = now.saturating_duration_since(at) >= self.retention.after_end;
            if self.bytes <= goal && !is_stale {
                return;
            }
            self.remove(&key);
        }
    }

    /// All that is known, as standbys are told.
    pub fn snapshot(&self) -> Vec<JournalEntry> {
        let mut all = Vec::new();
        for (key, entry) in &self.runs {
            let asked = entry.run.asked();
            all.push(began(key, asked));
            let mut choices: Vec<(Vec<TokenId>, Vec<TokenScore>)> =
                vec![Default::default(); asked.n_prompts * asked.n as usize];
            entry.run.inspect(|prompt_idx, index, token_ids, token_scores| {
                if let Some((ids, scores)) = choices.get_mut(prompt_idx * asked.n as usize + index as usize) {
                    ids.extend_from_slice(token_ids);
                    scores.extend(token_scores);
                }
            });
            for (choice, (ids, scores)) in (0..).zip(&choices) {
                all.extend(in_pieces(key, choice, ids, scores));
            }
            if entry.ended_at.is_some() {
                all.push(ended(key));
            }
        }
        all
    }

    /// Runs that are known.
    pub(super) fn len(&self) -> usize {
        self.runs.len()
    }
}

fn in_pieces(key: &str, choice: u32, ids: &[u32], scores: &[TokenScore]) -> impl Iterator<Item = JournalEntry> {
    (0..ids.len()).step_by(TOKENS_PER_ENTRY).map(move |begin| {
        let end = (begin + TOKENS_PER_ENTRY).min(ids.len());
        // Scores are one for each token, or none.
        let scores = scores.get(begin..end).unwrap_or_default().to_vec();
        entry(key, What::Tokens(JournalTokens { choice, token_ids: ids[begin..end].to_vec(), scores }))
    })
}

fn entry(key: &str, what: What) -> JournalEntry {
    JournalEntry { key: key.to_owned(), what: Some(what) }
}

fn began(key: &str, asked: &Asked) -> JournalEntry {
    let choices = u32::try_from(asked.n_prompts).unwrap_or(u32::MAX).saturating_mul(asked.n);
    let began = JournalBegan { request_hash: asked.hash.to_vec(), choices, seed: asked.seed };
    entry(key, What::Began(began))
}

fn ended(key: &str) -> JournalEntry {
    entry(key, What::Ended(JournalEnded {}))
}

/// What standbys are told of an event.
fn told(key: &str, run: &Run, prompt_idx: usize, event: &RequestEvent) -> Option<JournalEntry> {
    let RequestEvent::Output(output) = event else { return None };
    if output.token_ids.is_empty() {
        return None;
    }
    let choice = u32::try_from(prompt_idx).ok()?.checked_mul(run.asked().n)?.checked_add(output.index)?;
    let (token_ids, scores) = (output.token_ids.clone(), output.scores.clone());
    Some(entry(key, What::Tokens(JournalTokens { choice, token_ids, scores })))
}
