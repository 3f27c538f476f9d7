//! The audit log: a line of JSON for every request, written by a thread of its own.
//!
//! A request takes a [`Ticket`] before it runs: a place in the queue, so that its line can't be lost for lack of one. Where
//! the file can't be written, `refuse` keeps what is queued and lets nothing new in, `ignore` goes on without lines; both
//! say so in the log and in metrics.

mod account;
mod file;

use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::Context;
use tokio::{
    sync::mpsc::{self, OwnedPermit},
    time::timeout,
};

pub use self::account::{Account, CLIENT, Line, Origin, VIA};
use self::file::RotatingFile;
use crate::metrics as names;

/// Lines, and requests that run, at the same time.
const QUEUE: usize = 1 << 16;
/// Longest wait of a request for a place in the queue.
const PLACE_LIMIT: Duration = Duration::from_secs(5);
/// Lines that are written together.
const BATCH: usize = 256;
/// Between attempts to write.
const RETRY: Duration = Duration::from_millis(200);

/// What happens when a line can't be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnError {
    /// Requests are refused until it can.
    #[default]
    Refuse,
    /// Requests run, and have no line.
    Ignore,
}

/// What is configured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AuditConfig {
    /// The file.
    pub path: PathBuf,
    /// Its size at which another one is begun.
    pub max_bytes: u64,
    /// How many full ones are kept.
    pub keep: u32,
    /// What happens when it can't be written.
    pub on_error: OnError,
    /// Whether prompts and answers are in it.
    pub content: bool,
}

enum Message {
    Line(Vec<u8>),
    /// Everything before it has been written, or given up.
    Flush(tokio::sync::oneshot::Sender<()>),
}

/// The log's near end. Clones are the same.
#[derive(Clone)]
pub struct AuditLog {
    queue: mpsc::Sender<Message>,
    is_failing: Arc<AtomicBool>,
    reopen: Arc<AtomicBool>,
    on_error: OnError,
    content: bool,
}

/// Why a request can't be recorded, and so can't run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the audit log can't be written, and nothing is served without it (--audit-on-error refuse)")]
pub struct NotRecorded;

/// A place for one line.
pub struct Ticket(Option<OwnedPermit<Message>>);

impl AuditLog {
    /// Opens the file and starts the thread.
    ///
    /// # Errors
    /// If the file can't be opened.
    pub fn start(config: &AuditConfig) -> anyhow::Result<Self> {
        let file = RotatingFile::open(config.path.clone(), config.max_bytes, config.keep);
        let file = file.with_context(|| format!("--audit-log {}", config.path.display()))?;
        let (queue, lines) = mpsc::channel(QUEUE);
        let log = Self {
            queue,
            is_failing: Arc::default(),
            reopen: Arc::default(),
            on_error: config.on_error,
            content: config.content,
        };
        metrics::gauge!(names::AUDIT_FAILING).set(0.0);
        let writer =
            Writer { file, is_failing: log.is_failing.clone(), reopen: log.reopen.clone(), on_error: log.on_error };
        let thread = std::thread::Builder::new().name("audit log".to_owned());
        thread.spawn(move || writer.run(lines)).context("no thread for --audit-log")?;
        Ok(log)
    }

    /// Whether prompts and answers are recorded.
    pub fn wants_content(&self) -> bool {
        self.content
    }

    /// From the next line on the file is the one that has the name then.
    pub fn reopen(&self) {
        self.reopen.store(true, Ordering::Relaxed);
    }

    /// Whether requests may run.
    ///
    /// # Errors
    /// If they can't be recorded and must be.
    pub fn check(&self) -> Result<(), NotRecorded> {
        let is_failing = self.on_error == OnError::Refuse && self.is_failing.load(Ordering::Relaxed);
        if is_failing { Err(NotRecorded) } else { Ok(()) }
    }

    /// A place for a request's line.
    ///
    /// # Errors
    /// If there is none and must be one.
    pub async fn ticket(&self) -> Result<Ticket, NotRecorded> {
        self.check()?;
        if self.on_error == OnError::Ignore {
            return Ok(Ticket(self.queue.clone().try_reserve_owned().ok()));
        }
        match timeout(PLACE_LIMIT, self.queue.clone().reserve_owned()).await {
            Ok(Ok(permit)) => Ok(Ticket(Some(permit))),
            _ => Err(NotRecorded),
        }
    }

    /// Waits until what was said is written, but no longer than that.
    pub async fn flush(&self, limit: Duration) {
        let (done, written) = tokio::sync::oneshot::channel();
        let flushed = async {
            if self.queue.send(Message::Flush(done)).await.is_ok() {
                // An error means that the thread is gone.
                let _ = written.await;
            }
        };
        if timeout(limit, flushed).await.is_err() {
            tracing::error!("the end of the audit log could not be written");
        }
    }
}

impl Ticket {
    /// Writes the line.
    pub fn write(self, line: &Line) {
        let Some(permit) = self.0 else { return lose(1) };
        match serde_json::to_vec(line) {
            Ok(mut text) => {
                text.push(b'\n');
                permit.send(Message::Line(text));
            }
            Err(error) => {
                tracing::error!(%error, "a line of the audit log is no JSON");
                lose(1);
            }
        }
    }
}

fn lose(n_lines: usize) {
    metrics::counter!(names::AUDIT_LOST).increment(n_lines as u64);
}

/// The log's far end.
struct Writer {
    file: RotatingFile,
    is_failing: Arc<AtomicBool>,
    reopen: Arc<AtomicBool>,
    on_error: OnError,
}

impl Writer {
    fn run(mut self, mut queue: mpsc::Receiver<Message>) {
        let mut batch = Vec::with_capacity(BATCH);
        while queue.blocking_recv_many(&mut batch, BATCH) > 0 {
            let (mut text, mut n_lines, mut waiting) = (Vec::new(), 0, Vec::new());
            for message in batch.drain(..) {
                match message {
                    Message::Line(line) => {
                        text.extend(line);
                        n_lines += 1;
                    }
                    Message::Flush(done) => waiting.push(done),
                }
            }
            if n_lines > 0 {
                self.write(&text, n_lines);
            }
            for done in waiting {
                // Nobody waits any more.
                let _ = done.send(());
            }
        }
    }

    fn write(&mut self, text: &[u8], n_lines: usize) {
        loop {
            if self.reopen.swap(false, Ordering::Relaxed) {
                self.file.forget();
            }
            match self.file.append(text) {
                Ok(()) => {
                    if self.is_failing.swap(false, Ordering::Relaxed) {
                        tracing::info!(file = %self.file.path().display(), "the audit log can be written again");
                        metrics::gauge!(names::AUDIT_FAILING).set(0.0);
                    }
                    return;
                }
                Err(error) => {
                    if !self.is_failing.swap(true, Ordering::Relaxed) {
                        let file = self.file.path().display();
                        tracing::error!(%file, %error, on_error = ?self.on_error, "the audit log can't be written");
                        metrics::gauge!(names::AUDIT_FAILING).set(1.0);
                    }
                }
            }
            if self.on_error == OnError::Ignore {
                return lose(n_lines);
            }
            std::thread::sleep(RETRY);
        }
    }
}

#[cfg(test)]
mod tests;
