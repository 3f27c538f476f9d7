//! One request under a key: its events so far, and who reads them.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{sync::watch, time::sleep};

use super::registry::Asked;
use crate::{frontend::reply::Reply, request::RequestEvent};

/// A request's events with their prompt's index, from the first on. Whoever holds it can read it, also when the registry
/// has forgotten it.
pub struct Run {
    /// Tells runs of the same key apart.
    id: u64,
    /// What was asked.
    asked: Asked,
    /// How the answer looks; `None` for gRPC calls.
    reply: Option<Arc<dyn Reply>>,
    log: Mutex<Log>,
    changed: watch::Sender<()>,
}

#[derive(Default)]
struct Log {
    events: Vec<(usize, RequestEvent)>,
    bytes: usize,
    is_over: bool,
    /// Number of the latest reader; 0 is none yet.
    reader: u64,
    is_read: bool,
}

impl Run {
    pub(super) fn new(id: u64, asked: Asked, reply: Option<Arc<dyn Reply>>) -> Self {
        Self { id, asked, reply, log: Mutex::default(), changed: watch::Sender::new(()) }
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
        // Each change of the log is one assignment: there is no half of it.
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds an event. Returns the bytes that it takes.
    pub(super) fn push(&self, prompt_idx: usize, event: RequestEvent) -> usize {
        let bytes = event_bytes(&event);
        let mut log = self.log();
        log.events.push((prompt_idx, event));
        log.bytes += bytes;
        drop(log);
        self.changed.send_replace(());
        bytes
    }

    /// No more events come.
    pub(super) fn end(&self) {
        self.log().is_over = true;
        self.changed.send_replace(());
    }

    /// Bytes of all events and of what the answer repeats.
    pub(super) fn bytes(&self) -> usize {
        self.log().bytes + self.own_bytes()
    }

    /// Bytes before the first event.
    pub(super) fn own_bytes(&self) -> usize {
        size_of::<Self>() + self.reply.as_ref().map_or(0, |reply| reply.kept_bytes())
    }

    /// Looks at all events so far.
    pub(super) fn inspect(&self, mut look: impl FnMut(usize, &RequestEvent)) {
        for (prompt_idx, event) in &self.log().events {
            look(*prompt_idx, event);
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
        Attachment { run: Arc::clone(self), number, n_read: 0, changed: self.changed.subscribe() }
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
    n_read: usize,
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
                if let Some((prompt_idx, event)) = log.events.get(self.n_read) {
                    self.n_read += 1;
                    return Read::Event(*prompt_idx, event.clone());
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

fn event_bytes(event: &RequestEvent) -> usize {
    let scores = |scores: &[phalanx_proto::v1::TokenScore]| -> usize {
        size_of_val(scores) + scores.iter().map(|score| size_of_val(score.top.as_slice())).sum::<usize>()
    };
    let inside = match event {
        RequestEvent::PromptScored(all) => scores(all),
        RequestEvent::Output(output) => {
            output.text.capacity() + size_of_val(output.token_ids.as_slice()) + scores(&output.scores)
        }
        RequestEvent::Finished(_) | RequestEvent::Failed(_) => 0,
    };
    size_of::<(usize, RequestEvent)>() + inside
}
