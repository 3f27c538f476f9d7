//! Answers that are given again to exactly the same question (`--response-cache`).
//!
//! A request's events depend on what it asks and its seed, and on nothing else. So where the seed is the client's, or no token is
//! drawn at all, the events of an earlier run are those that another run would have. What is kept is these events: every API makes
//! of them what it made of them before, streamed or whole. Nobody gets what another key's requests have left.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use metrics::Counter;
use phalanx_cluster::id::TokenId;
use prost::Message;
use sha2::{Digest, Sha256};

use crate::{
    metrics::{self as names, Present},
    request::{Finish, Request, RequestEvent, StopConditions},
    scheduler::outbox::size_of_event,
};

/// A single answer takes at most this part of the cache.
const LARGEST_PART: usize = 8;
/// Memory for the bookkeeping of an answer.
const OVERHEAD: usize = 256;

/// SHA-256 of what is asked.
type Key = [u8; 32];

/// Answers, those that were wanted last.
pub struct ResponseCache {
    most_bytes: usize,
    state: Mutex<State>,
    hits: Counter,
    misses: Counter,
    gauge: Present,
}

#[derive(Default)]
struct State {
    by_key: HashMap<Key, Kept>,
    by_use: BTreeMap<u64, Key>,
    clock: u64,
    bytes: usize,
}

struct Kept {
    events: Arc<[RequestEvent]>,
    bytes: usize,
    used_at: u64,
}

/// The cache as one key's requests see it.
#[derive(Clone)]
pub struct Caching {
    /// Of all keys.
    pub cache: Arc<ResponseCache>,
    /// Name of the key; `None` where everybody may ask.
    pub owner: Option<String>,
    /// Whether the client has named the seed.
    pub has_seed: bool,
}

/// What is known of a request.
pub enum Looked {
    /// All of it.
    Known(Replay),
    /// Nothing yet.
    New(Recording),
}

/// An answer, event by event.
pub struct Replay {
    events: Arc<[RequestEvent]>,
    next: usize,
}

impl Replay {
    /// The next event; `None` after the last.
    pub fn next_event(&mut self) -> Option<RequestEvent> {
        let event = self.events.get(self.next)?.clone();
        self.next += 1;
        Some(event)
    }
}

/// Notes an answer as it comes. Dropped before its end, nothing is kept.
pub struct Recording {
    cache: Arc<ResponseCache>,
    key: Key,
    events: Vec<RequestEvent>,
    bytes: usize,
    is_open_ended: bool,
    /// Whether it is worth nothing any more.
    is_given_up: bool,
}

impl Recording {
    /// Notes an event.
    pub fn note(&mut self, event: &RequestEvent) {
        // Where an open-ended answer is cut depends on how much memory there is.
        let is_cut = self.is_open_ended
            && matches!(event, RequestEvent::Output(output) if output.finish == Some(Finish::Length));
        self.bytes += size_of_event(event);
        self.is_given_up |=
            is_cut || matches!(event, RequestEvent::Failed(_)) || self.bytes > self.cache.most_bytes / LARGEST_PART;
        if self.is_given_up {
            self.events = Vec::new();
            return;
        }
        self.events.push(event.clone());
        if matches!(event, RequestEvent::Finished(_)) {
            self.cache.keep(self.key, std::mem::take(&mut self.events), self.bytes);
        }
    }
}

impl Caching {
    /// Looks a request up; `None` if its answer may differ from one time to the next.
    pub fn look(&self, request: &Request) -> Option<Looked> {
        let key = self.key_of(request)?;
        if let Some(events) = self.cache.get(&key) {
            self.cache.hits.increment(1);
            return Some(Looked::Known(Replay { events, next: 0 }));
        }
        self.cache.misses.increment(1);
        Some(Looked::New(Recording {
            cache: Arc::clone(&self.cache),
            key,
            events: Vec::new(),
            bytes: OVERHEAD,
            is_open_ended: request.is_open_ended,
            is_given_up: false,
        }))
    }

    /// Of everything that the answer depends on, and of whose it is.
    fn key_of(&self, request: &Request) -> Option<Key> {
        let Request {
            id: _,
            prompt,
            n,
            sampling,
            max_tokens,
            is_open_ended,
            stop,
            deadline: _,
            priority: _,
            resume,
            cache_root,
        } = request;
        let is_drawn = sampling.temperature > 0.0;
        if (is_drawn && !self.has_seed) || !resume.is_empty() {
            return None;
        }
        let mut sampling = sampling.clone();
        if !is_drawn {
            sampling.seed = 0;
        }
        let mut sha = Sha256::new();
        // Each part with its length: where it ends is certain.
        let mut part = |bytes: &[u8]| {
            sha.update((bytes.len() as u64).to_le_bytes());
            sha.update(bytes);
        };
        part(&[u8::from(self.owner.is_some())]);
        part(self.owner.as_deref().unwrap_or_default().as_bytes());
        part(&prompt.iter().flat_map(|token| token.to_le_bytes()).collect::<Vec<_>>());
        part(&sampling.encode_to_vec());
        part(&n.to_le_bytes());
        part(&max_tokens.to_le_bytes());
        // Whoever adds a field has to say here whether answers depend on it.
        let StopConditions { strings, token_ids, ignore_eos, include_in_output, skip_special_tokens, shown_tokens } =
            stop;
        let bytes_of = |tokens: &[TokenId]| tokens.iter().flat_map(|token| token.to_le_bytes()).collect::<Vec<_>>();
        part(&[*is_open_ended, *ignore_eos, *include_in_output, *skip_special_tokens].map(u8::from));
        part(&(strings.len() as u64).to_le_bytes());
        strings.iter().for_each(|text| part(text.as_bytes()));
        part(&bytes_of(token_ids));
        part(&bytes_of(shown_tokens));
        part(&cache_root.bytes());
        Some(sha.finalize().into())
    }
}

impl ResponseCache {
    /// Keeps nothing yet, and at most so many bytes.
    pub fn new(most_bytes: usize) -> Self {
        let [hits, misses] =
            [names::RESPONSE_CACHE_HITS, names::RESPONSE_CACHE_MISSES].map(|name| metrics::counter!(name));
        let gauge = Present::new(names::RESPONSE_CACHE_BYTES, Vec::new());
        Self { most_bytes, state: Mutex::default(), hits, misses, gauge }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Each change is whole before it can fail.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn get(&self, key: &Key) -> Option<Arc<[RequestEvent]>> {
        let mut state = self.state();
        let State { by_key, by_use, clock, .. } = &mut *state;
        let kept = by_key.get_mut(key)?;
        by_use.remove(&kept.used_at);
        *clock += 1;
        kept.used_at = *clock;
        by_use.insert(*clock, *key);
        Some(Arc::clone(&kept.events))
    }

    fn keep(&self, key: Key, events: Vec<RequestEvent>, bytes: usize) {
        let mut state = self.state();
        // Somebody may have asked the same at the same time.
        state.remove(&key);
        state.clock += 1;
        let used_at = state.clock;
        state.by_use.insert(used_at, key);
        state.by_key.insert(key, Kept { events: events.into(), bytes, used_at });
        state.bytes += bytes;
        while state.bytes > self.most_bytes {
            let Some((_, oldest)) = state.by_use.first_key_value() else { break };
            let oldest = *oldest;
            state.remove(&oldest);
        }
        self.gauge.set(state.bytes as f64);
    }

    /// Bytes that are kept.
    pub fn bytes(&self) -> usize {
        self.state().bytes
    }
}

impl State {
    fn remove(&mut self, key: &Key) {
        if let Some(kept) = self.by_key.remove(key) {
            self.by_use.remove(&kept.used_at);
            self.bytes -= kept.bytes;
        }
    }
}

/// Series are there before anything is counted.
pub fn begin_to_count() {
    drop(ResponseCache::new(0));
}

#[cfg(test)]
mod tests {
    use phalanx_cluster::seal::Seal;
    use phalanx_proto::v1::SamplingParams;

    use super::*;
    use crate::request::{Output, RequestError, Usage};

    fn request() -> Request {
        Request {
            id: "a".to_owned(),
            prompt: vec![1, 2],
            n: 1,
            sampling: SamplingParams { temperature: 1.0, seed: 7, ..SamplingParams::default() },
            max_tokens: 5,
            is_open_ended: false,
            stop: StopConditions::default(),
            deadline: None,
            priority: 0,
            resume: Vec::new(),
            cache_root: Seal::EMPTY,
        }
    }

    fn caching(most_bytes: usize) -> Caching {
        Caching { cache: Arc::new(ResponseCache::new(most_bytes)), owner: None, has_seed: true }
    }

    fn output(text: &str, finish: Option<Finish>) -> RequestEvent {
        RequestEvent::Output(Output { text: text.to_owned(), finish, ..Output::default() })
    }

    fn finished() -> RequestEvent {
        RequestEvent::Finished(Usage { prompt_tokens: 2, completion_tokens: 1, cached_tokens: 0 })
    }

    fn record(caching: &Caching, request: &Request, events: &[RequestEvent]) {
        let Some(Looked::New(mut recording)) = caching.look(request) else { panic!("it is not known") };
        events.iter().for_each(|event| recording.note(event));
    }

    fn known(caching: &Caching, request: &Request) -> Option<Vec<RequestEvent>> {
        match caching.look(request)? {
            Looked::New(_) => None,
            Looked::Known(mut replay) => Some(std::iter::from_fn(|| replay.next_event()).collect()),
        }
    }

    #[test]
    fn whole_answers_are_kept_and_no_others() {
        let caching = caching(1 << 20);
        let events = [output("x", Some(Finish::Length)), finished()];
        record(&caching, &request(), &events[..1]);
        assert_eq!(known(&caching, &request()), None, "it was given up before its end");
        record(&caching, &request(), &[events[0].clone(), RequestEvent::Failed(RequestError::DeadlineExceeded)]);
        assert_eq!(known(&caching, &request()), None, "it has failed");
        let open = Request { is_open_ended: true, ..request() };
        record(&caching, &open, &events);
        assert_eq!(known(&caching, &open), None, "another cluster may have more memory");
        record(&caching, &request(), &events);
        let renamed =
            Request { id: "b".to_owned(), priority: 3, deadline: Some(std::time::Instant::now()), ..request() };
        assert_eq!(known(&caching, &renamed), Some(events.to_vec()));
    }

    #[test]
    fn what_differs_in_anything_is_another_question() {
        let caching = caching(1 << 20);
        record(&caching, &request(), &[finished()]);
        let sampling = |change: fn(&mut SamplingParams)| {
            let mut request = request();
            change(&mut request.sampling);
            request
        };
        let stop = |stop: StopConditions| Request { stop, ..request() };
        let others = [
            Request { prompt: vec![1, 2, 3], ..request() },
            Request { n: 2, ..request() },
            Request { max_tokens: 6, ..request() },
            Request { is_open_ended: true, ..request() },
            Request { cache_root: Seal::root("salt"), ..request() },
            sampling(|s| s.seed = 8),
            sampling(|s| s.temperature = 0.0),
            sampling(|s| s.logprobs = Some(0)),
            sampling(|s| s.allowed_token_ids = vec![1]),
            stop(StopConditions { strings: vec!["a".to_owned()], ..StopConditions::default() }),
            stop(StopConditions { token_ids: vec![1], ..StopConditions::default() }),
            stop(StopConditions { ignore_eos: true, ..StopConditions::default() }),
            stop(StopConditions { skip_special_tokens: true, ..StopConditions::default() }),
        ];
        for other in others {
            assert_eq!(known(&caching, &other), None, "{other:?}");
        }
        let stranger = Caching { owner: Some("b".to_owned()), ..caching.clone() };
        assert_eq!(known(&stranger, &request()), None);
        assert!(known(&caching, &request()).is_some());
    }

    #[test]
    fn only_what_is_certain_is_kept() {
        let unseeded = Caching { has_seed: false, ..caching(1 << 20) };
        assert!(unseeded.look(&request()).is_none());
        let greedy = |seed| {
            let sampling = SamplingParams { temperature: 0.0, seed, ..SamplingParams::default() };
            Request { sampling, ..request() }
        };
        record(&unseeded, &greedy(1), &[finished()]);
        assert!(known(&unseeded, &greedy(2)).is_some(), "no token is drawn: the seed says nothing");
    }

    #[test]
    fn what_was_not_wanted_for_longest_goes_first() {
        let asked = |prompt: u32| Request { prompt: vec![prompt], ..request() };
        let events = [output(&"x".repeat(1000), None), finished()];
        let one = events.iter().map(size_of_event).sum::<usize>() + OVERHEAD;
        let caching = caching(LARGEST_PART * one);
        (0..8).for_each(|n| record(&caching, &asked(n), &events));
        assert_eq!(caching.cache.bytes(), 8 * one);
        assert!(known(&caching, &asked(0)).is_some());
        record(&caching, &asked(8), &events);
        assert_eq!(caching.cache.bytes(), 8 * one);
        assert!(known(&caching, &asked(0)).is_some() && known(&caching, &asked(1)).is_none());
        record(&caching, &asked(9), &[output(&"x".repeat(2000), None), finished()]);
        assert!(known(&caching, &asked(9)).is_none(), "it would take too much");
    }
}
