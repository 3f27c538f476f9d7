//! Requests that can be resumed: each has a key, all its events are kept, and whoever asks again with the same key gets them
//! again. A run goes on for a while without its client.
//!
//! What is kept here dies with the process. Standbys hear of it as it happens ([`JournalFeed`]), and a new leader looks keys
//! up in what it heard ([`ReplicatedJournal`]): the request goes on behind the tokens that are known, with the same seed, so
//! its tokens are the same.

pub mod endpoint;
pub mod key;
pub mod log;
pub mod position;
pub mod registry;
pub mod run;

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use futures::{StreamExt, stream, stream::BoxStream};
use phalanx_proto::v1::{JournalEntry, JournalSynced, journal_entry::What};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use self::{
    key::{Keyed, seed_of_prompt},
    registry::{Asked, Registry, Retention, Status},
    run::Run,
};
use super::{
    FrontendState,
    error::ApiError,
    generation::{Generation, PromptEvents, submit_each},
    guarded::Watch,
    observe::Record,
    reply::Reply,
    response_cache::Caching,
};
use crate::{
    leadership::journal_feed::{JournalFeed, Replica, ReplicatedJournal},
    request::{Request, ResumedChoice},
    scheduler::handle::Submit,
    security::admission::Admission,
};

/// How long an answer is kept at most for a coordinator that forwards it: as long as that looks for a leader.
const FORWARDERS_RETURN: Duration = Duration::from_secs(60);
/// Changes that a standby may be behind before it has to begin again.
const FEED_CAPACITY: usize = 8192;

/// All requests with a key.
pub struct Streams {
    shared: Mutex<Shared>,
    journal: Arc<ReplicatedJournal>,
    after_end: Duration,
}

struct Shared {
    registry: Registry,
    listeners: Vec<mpsc::Sender<JournalEntry>>,
}

/// Requests of one key, ready to be submitted.
pub struct Prepared {
    /// One per prompt, all with as many choices.
    pub requests: Vec<Request>,
    /// Whether the client named a seed.
    pub has_seed: bool,
    /// How the answer looks; `None` for gRPC calls.
    pub reply: Option<Arc<dyn Reply>>,
}

/// An answer being read, and how it looks.
pub type Joined = (Generation, Option<Arc<dyn Reply>>);

impl FrontendState {
    /// Joins the run of a request that has a key, if there is one.
    pub(super) fn known(&self, keyed: Option<&Keyed>) -> Result<Option<Joined>, ApiError> {
        keyed.map_or(Ok(None), |keyed| self.streams.join_same(keyed))
    }

    /// Submits a request; if it has a key, its answer can be asked for again.
    /// Whoever sent it is asked for tokens of its minute, if it has a key.
    pub(super) fn begin(
        &self,
        keyed: Option<&Keyed>,
        mut prepared: Prepared,
        record: &Record,
    ) -> Result<Joined, ApiError> {
        self.check_hidden(&prepared)?;
        let watch = self.watch(&prepared, record);
        let admit = |principal| self.security.admit(principal, &mut prepared.requests).map(Arc::new);
        let admission = record.principal().map(admit).transpose()?;
        if let Some(account) = record.account() {
            for request in &prepared.requests {
                account.asked(self.model.name(), request.prompt.len());
                account.prompt(|| self.model.tokenizer.decode(&request.prompt, false));
            }
        }
        let owner = || record.principal().map(|principal| principal.name.clone());
        let caching = self.response_cache.clone();
        let caching = caching.map(|cache| Caching { cache, owner: owner(), has_seed: prepared.has_seed });
        match keyed {
            Some(keyed) => {
                self.streams.begin(keyed, self.submit.as_ref(), prepared, admission, caching.as_ref(), &watch)
            }
            None => Ok((self.submit_all(prepared.requests, admission, caching.as_ref(), &watch)?, prepared.reply)),
        }
    }
}

impl Streams {
    /// Knows nothing but what a former leader told.
    pub fn new(retention: Retention, journal: Arc<ReplicatedJournal>) -> Self {
        let shared = Shared { registry: Registry::new(retention), listeners: Vec::new() };
        Self { shared: Mutex::new(shared), journal, after_end: retention.after_end }
    }

    fn lock(&self) -> MutexGuard<'_, Shared> {
        // The registry is whole between any two of its calls.
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Joins the run under a key, whatever it was asked; an earlier reader is cut off.
    pub fn join(&self, key: &str) -> Option<Joined> {
        self.lock().registry.get(Instant::now(), key).map(|run| joined(&run))
    }

    /// Joins the run of a request, if there is one.
    ///
    /// # Errors
    /// If the key's run was asked something else.
    pub fn join_same(&self, keyed: &Keyed) -> Result<Option<Joined>, ApiError> {
        self.lock().join_same(keyed)
    }

    /// Begins a request's run, or joins the one that somebody else has begun meanwhile.
    ///
    /// # Errors
    /// If the scheduler refuses it, or the key's run was asked something else.
    pub fn begin(
        self: &Arc<Self>,
        keyed: &Keyed,
        submit: &dyn Submit,
        mut prepared: Prepared,
        admission: Option<Arc<Admission>>,
        caching: Option<&Caching>,
        watch: &Watch,
    ) -> Result<Joined, ApiError> {
        let mut shared = self.lock();
        if let Some(joined) = shared.join_same(keyed)? {
            return Ok(joined);
        }
        let n = prepared.requests.first().map_or(1, |request| request.n);
        let known = self.journal.get(&keyed.key).filter(|replica| replica.request_hash == keyed.hash);
        let seed = known.as_ref().map_or_else(|| keyed.seed(), |replica| replica.seed);
        if let Some(replica) = known {
            resume(&mut prepared.requests, replica);
        }
        for (prompt_idx, request) in prepared.requests.iter_mut().enumerate().filter(|_| !prepared.has_seed) {
            request.sampling.seed = seed_of_prompt(seed, prompt_idx);
        }
        let seed = prepared.requests.first().map_or(seed, |request| request.sampling.seed);
        let asked = Asked { hash: keyed.hash, seed, n_prompts: prepared.requests.len(), n };
        let events = submit_each(submit, prepared.requests, admission, caching, watch)?;
        let (run, entry) = shared.registry.begin(&keyed.key, asked, prepared.reply);
        shared.tell(Some(entry));
        let joined = joined(&run);
        drop(shared);
        tokio::spawn(Arc::clone(self).pump(keyed.key.clone(), keyed.patience, run, events));
        Ok(joined)
    }

    /// Carries events from the scheduler to the run, until its end or until nobody wants it; forgets it in the end.
    async fn pump(self: Arc<Self>, key: String, patience: Duration, run: Arc<Run>, mut events: PromptEvents) {
        {
            let mut abandoned = Box::pin(run.abandoned(patience));
            loop {
                let event = tokio::select! {
                    event = events.next() => event,
                    () = &mut abandoned => {
                        let mut shared = self.lock();
                        let (is_over, entry) = shared.registry.give_up(&key, &run);
                        shared.tell(entry);
                        drop(shared);
                        if is_over {
                            tracing::debug!(key, "nobody came back for a request: it is cancelled");
                            return;
                        }
                        abandoned = Box::pin(run.abandoned(patience));
                        continue;
                    }
                };
                // The scheduler's streams end with an event that says so.
                let Some((prompt_idx, event)) = event else { break };
                let mut shared = self.lock();
                let (status, entry) = shared.registry.push(Instant::now(), &key, &run, prompt_idx, event);
                shared.tell(entry);
                if status == Status::Over {
                    break;
                }
            }
        }
        drop(events);
        let id = run.id();
        // Its memory is the registry's: it may have to make room before the time is over.
        drop(run);
        tokio::time::sleep(kept_for(patience, self.after_end)).await;
        self.lock().registry.forget(&key, id);
    }

    /// Requests that are known.
    pub fn len(&self) -> usize {
        self.lock().registry.len()
    }

    /// Whether none is known.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl Shared {
    fn join_same(&mut self, keyed: &Keyed) -> Result<Option<Joined>, ApiError> {
        match self.registry.get(Instant::now(), &keyed.key) {
            Some(run) if run.asked().hash != keyed.hash => Err(ApiError::key_reused(&keyed.key)),
            found => Ok(found.map(|run| joined(&run))),
        }
    }

    /// Tells standbys. One that is too slow hears the end of its stream.
    fn tell(&mut self, entry: Option<JournalEntry>) {
        if let Some(entry) = entry {
            self.listeners.retain(|listener| listener.try_send(entry.clone()).is_ok());
        }
    }
}

/// How long an answer is kept. Who does not wait for its client does not come back late either.
fn kept_for(patience: Duration, window: Duration) -> Duration {
    if patience.is_zero() { window.min(FORWARDERS_RETURN) } else { window }
}

fn joined(run: &Arc<Run>) -> Joined {
    let asked = run.asked();
    (Generation::attached(run.attach(), asked.n_prompts, asked.n), run.reply())
}

/// Gives each prompt's request what its choices have emitted already.
fn resume(requests: &mut [Request], replica: Replica) {
    let n_choices: usize = requests.iter().map(|request| request.n as usize).sum();
    if replica.choices.len() != n_choices {
        tracing::warn!(n_choices, n_known = replica.choices.len(), "what is known of a request does not fit it");
        return;
    }
    let mut choices = replica.choices.into_iter();
    for request in requests {
        let wants_scores = request.sampling.logprobs.is_some();
        let resumed = choices.by_ref().take(request.n as usize).map(|choice| {
            let (mut tokens, mut scores) = (choice.token_ids, choice.scores);
            if wants_scores {
                tokens.truncate(scores.len());
                scores.truncate(tokens.len());
            } else {
                scores.clear();
            }
            ResumedChoice { tokens, scores }
        });
        request.resume = resumed.collect();
    }
}

impl JournalFeed for Streams {
    fn subscribe(&self) -> BoxStream<'static, JournalEntry> {
        let (listener, changes) = mpsc::channel(FEED_CAPACITY);
        let mut shared = self.lock();
        shared.listeners.push(listener);
        let mut known = shared.registry.snapshot();
        drop(shared);
        known.push(JournalEntry { key: String::new(), what: Some(What::Synced(JournalSynced {})) });
        stream::iter(known).chain(ReceiverStream::new(changes)).boxed()
    }
}

#[cfg(test)]
mod tests;
