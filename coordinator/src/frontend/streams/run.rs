//! One request under a key: its events so far, and who reads them.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use phalanx_cluster::id::TokenId;
use phalanx_proto::v1::TokenScore;
use tokio::{sync::watch, time::sleep};

use super::{
    log::{Cursor, EventLog},
    registry::Asked,
};
use crate::{frontend::reply::Reply, request::RequestEvent};

/// What a run takes besides its events and the answer's form: itself, the list of who waits for a change, its task until it
/// is forgotten, and its place under its key. Measured with ten thousand of them.
const OWN_BYTES: usize = 1536;

/// A request's events with their prompt's index, from the first on. Whoever holds it can read it, also when the registry
/// has forgotten it.
pub struct Run {
    /// Tells runs of the same key apart.
    id: u64,
    /// What was asked.
    asked: Asked,
    /// How the answer looks; `None` for gRPC calls.
    reply: Option<Arc<dyn Reply>>,
    /// Memory of all that does not grow.
    own_bytes: usize,
    log: Mutex<Log>,
    changed: watch::Sender<()>,
}

#[derive(Default)]
struct Log {
    events: EventLog,
    is_over: bool,
    /// Number of the latest reader; 0 is none yet.
    reader: u64,
    is_read: bool,
}

impl Run {
    pub(super) fn new(id: u64, asked: Asked, reply: Option<Arc<dyn Reply>>) -> Self {
        let own_bytes = OWN_BYTES + reply.as_ref().map_or(0, |reply| reply.kept_bytes());
        Self { id, asked, reply, own_bytes, log: Mutex::default(), changed: watch::Sender::new(()) }
    }

    /// Tells runs of the same key apart.
    pub(super) fn id(&self) -> u64 {
        self.id
    }

    /// What it answers.
    pub(super) fn asked(&self) -> &Asked {
        &self.asked
    }

    /// How the answer looks; `None` for gRPC calls.
    pub(super) fn reply(&self) -> Option<Arc<dyn Reply>> {
        self.reply.clone()
    }

    fn log(&self) -> MutexGuard<'_, Log> {
        // No change of the log stops half-way.
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds an event.
    pub(super) fn push(&self, prompt_idx: usize, event: RequestEvent) {
        self.log().events.push(prompt_idx, event);
        self.changed.send_replace(());
    }

    /// No more events come: room for them is given back. Who reads goes on reading.
    pub(super) fn end(&self) {
        let mut log = self.log();
        log.is_over = true;
        log.events.shrink();
        drop(log);
        self.changed.send_replace(());
    }

    /// Memory of all events, of what the answer repeats, and of what every run needs.
    pub(super) fn bytes(&self) -> usize {
        self.own_bytes + self.log().events.bytes()
    }

    /// Looks at the tokens of all events so far: indices of prompt and choice, tokens, and their scores if there are any.
    pub(super) fn inspect(&self, mut look: impl FnMut(usize, u32, &[TokenId], Vec<TokenScore>)) {
        for (prompt_idx, index, token_ids, scores) in self.log().events.tokens() {
            look(prompt_idx, index, token_ids, scores);
        }
    }

    /// A new reader, from the first event on. An earlier one is cut off.
    pub(super) fn attach(self: &Arc<Self>) -> Attachment {
        let mut log = self.log();
        log.reader += 1;
        log.is_read = true;
        let number = log.reader;
        drop(log);
        self.changed.send_replace(());
        Attachment { run: Arc::clone(self), number, next: Cursor::default(), changed: self.changed.subscribe() }
    }

    /// Waits until nobody has read for a while.
    pub(super) async fn abandoned(&self, patience: Duration) {
        let mut changed = self.changed.subscribe();
        loop {
            let (is_read, reader) = self.reader();
            if !is_read {
                sleep(patience).await;
                if self.reader() == (false, reader) {
                    return;
                }
                continue;
            }
            if changed.changed().await.is_err() {
                return;
            }
        }
    }

    /// Whether somebody reads it.
    pub(super) fn is_read(&self) -> bool {
        self.reader().0
    }

    fn reader(&self) -> (bool, u64) {
        let log = self.log();
        (log.is_read, log.reader)
    }
}

/// Reads a run.
pub struct Attachment {
    run: Arc<Run>,
    number: u64,
    next: Cursor,
    changed: watch::Receiver<()>,
}

/// What a reader finds.
#[derive(Debug)]
pub enum Read {
    /// The next event, with its prompt's index.
    Event(usize, RequestEvent),
    /// All has been read.
    Over,
    /// A newer reader has taken over.
    Superseded,
}

impl Attachment {
    /// Waits for what comes next. Can be dropped and called again.
    pub async fn next(&mut self) -> Read {
        loop {
            // Before the look: what comes after it wakes us.
            self.changed.borrow_and_update();
            {
                let log = self.run.log();
                if log.reader != self.number {
                    return Read::Superseded;
                }
                if let Some((prompt_idx, event)) = log.events.next(&mut self.next) {
                    return Read::Event(prompt_idx, event);
                }
                if log.is_over {
                    return Read::Over;
                }
            }
            if self.changed.changed().await.is_err() {
                return Read::Over;
            }
        }
    }
}

impl Drop for Attachment {
    fn drop(&mut self) {
        let mut log = self.run.log();
        if log.reader == self.number {
            log.is_read = false;
        }
        drop(log);
        self.run.changed.send_replace(());
    }
}
