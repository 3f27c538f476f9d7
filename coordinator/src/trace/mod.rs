//! Traces: what a request went through, as spans that a collector is sent by OTLP.
//!
//! A request is a span of its own (continuing the client's, if it says so with `traceparent`), and in it its time in the
//! queue, its prefill and its decoding as the scheduler saw them, and what each rank computed meanwhile. All of it is told
//! when the request is over, by messages into a bounded queue that never waits: if the collector is slow or away, spans are
//! dropped and counted, and nothing else happens.

mod carrier;
mod context;
pub mod destination;
mod exporter;
mod otlp;
pub mod ranks;
mod spans;

use std::{
    sync::{
        OnceLock,
        mpsc::{self, Receiver, SyncSender, TrySendError},
    },
    time::{Duration, Instant},
};

use metrics::Counter;

pub use context::SpanContext;
pub use destination::Destination;
pub use ranks::{RankTotal, Work};

use crate::{metrics as names, scheduler::ending::Ended};

/// Messages that wait for the exporter; what comes beyond is dropped.
const QUEUE: usize = 8192;

/// What traces are told, and how many requests have one.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// Where spans go.
    pub destination: Destination,
    /// Share of the requests without a decision of their client's that are traced, 0 to 1.
    pub ratio: f64,
    /// Name of this process among others.
    pub instance: String,
    /// Name of the served model.
    pub model: String,
}

/// Takes what is to be told. There is one for the process, or none.
pub struct Tracer {
    queue: SyncSender<Note>,
    ratio: f64,
    dropped: Counter,
    ranks: ranks::Ranks,
}

/// What the exporter is told.
enum Note {
    /// A traced request was given to the scheduler under this name.
    Began(String, SpanContext),
    /// A traced request is over for its client.
    Answered(Box<Answered>),
    /// The scheduler has ended a request, traced or not, at which ranks worked so much.
    Ended(Box<Ended>, Vec<Work>),
    /// Send everything, then close the other end.
    Flush(SyncSender<()>),
}

/// A request as its client saw it.
#[derive(Debug, Clone)]
pub struct Answered {
    /// Its span.
    pub context: SpanContext,
    /// The client's span, if it has told one.
    pub parent: Option<[u8; 8]>,
    /// What was called.
    pub endpoint: String,
    /// How it ended, as metrics say it.
    pub status: String,
    /// Its name in logs.
    pub request_id: String,
    /// When it came.
    pub arrived: Instant,
    /// When its last byte was sent, or its client left.
    pub ended: Instant,
}

static TRACER: OnceLock<Tracer> = OnceLock::new();

/// Begins to trace, for the life of the process.
///
/// # Errors
/// If there is no thread for it, or the destination's file of authorities can't be used.
pub fn install(settings: Settings) -> std::io::Result<()> {
    let (queue, notes) = mpsc::sync_channel(QUEUE);
    let ratio = settings.ratio;
    start(settings, notes)?;
    let dropped = metrics::counter!(names::TRACE_SPANS, "outcome" => "dropped");
    let tracer = Tracer { queue, ratio, dropped, ranks: ranks::Ranks::default() };
    // There is one already: that one goes on.
    let _ = TRACER.set(tracer);
    Ok(())
}

fn start(settings: Settings, notes: Receiver<Note>) -> std::io::Result<()> {
    let exporter = exporter::Exporter::new(settings)?;
    std::thread::Builder::new().name("traces".to_owned()).spawn(move || exporter.run(&notes)).map(drop)
}

/// The process's, if it traces.
pub fn active() -> Option<&'static Tracer> {
    TRACER.get()
}

/// Waits a little until everything that was told is sent.
pub fn flush(limit: Duration) {
    let Some(tracer) = active() else { return };
    let (done, waits) = mpsc::sync_channel(1);
    if tracer.queue.try_send(Note::Flush(done)).is_ok() {
        // Late or not, the process ends.
        let _ = waits.recv_timeout(limit);
    }
}

impl Tracer {
    /// The span of a request that came with these headers, if it is to be traced. A client's decision counts.
    pub fn begin(&self, traceparent: Option<&str>) -> Option<(SpanContext, Option<[u8; 8]>)> {
        match traceparent.and_then(SpanContext::parse) {
            Some(client) => client.is_sampled.then(|| (client.child(), Some(client.span))),
            None => SpanContext::drawn(self.ratio).map(|context| (context, None)),
        }
    }

    /// A traced request is about to be given to the scheduler under this name.
    pub fn began(&self, id: &str, context: SpanContext) {
        self.tell(Note::Began(id.to_owned(), context));
    }

    /// A traced request is over for its client.
    pub fn answered(&self, answered: Answered) {
        self.tell(Note::Answered(Box::new(answered)));
    }

    /// The scheduler has ended a request.
    pub fn ended(&self, ended: Box<Ended>, work: Vec<Work>) {
        self.tell(Note::Ended(ended, work));
    }

    /// What ranks have computed so far.
    pub fn ranks(&self) -> &ranks::Ranks {
        &self.ranks
    }

    fn tell(&self, note: Note) {
        if let Err(TrySendError::Full(note) | TrySendError::Disconnected(note)) = self.queue.try_send(note) {
            self.dropped.increment(note.n_spans());
        }
    }
}

impl Note {
    fn n_spans(&self) -> u64 {
        match self {
            Self::Began(..) | Self::Flush(_) => 0,
            Self::Answered(_) => 1,
            Self::Ended(_, work) => 3 + work.len() as u64,
        }
    }
}
