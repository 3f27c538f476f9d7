//! The thread that makes spans and sends them to a collector.

use std::{
    collections::{HashMap, VecDeque},
    io,
    sync::mpsc::{Receiver, RecvTimeoutError},
    time::{Duration, Instant},
};

use metrics::Counter;

use super::{
    Note, Settings, SpanContext,
    carrier::{self, Carrier},
    otlp::{Export, Resource, ResourceSpans, Scope, ScopeSpans, Span, attribute},
    spans::Clock,
};
use crate::metrics as names;

/// Most spans of a message.
const MOST_SPANS: usize = 512;
/// Longest that a span waits for others.
const LINGER: Duration = Duration::from_secs(1);
/// Between complaints about a collector that does not take spans.
const COMPLAIN_EVERY: Duration = Duration::from_secs(60);
/// Traced requests that are known; the oldest are forgotten.
const MOST_OPEN: usize = 16_384;

/// Turns messages into spans and sends them.
pub(super) struct Exporter {
    settings: Settings,
    carrier: Box<dyn Carrier>,
    clock: Clock,
    open: Open,
    spans: Vec<Span>,
    /// When the first of them came.
    since: Instant,
    exported: Counter,
    failed: Counter,
    complained: Option<Instant>,
}

/// Traced requests that were given to the scheduler.
#[derive(Default)]
struct Open {
    contexts: HashMap<String, SpanContext>,
    order: VecDeque<String>,
}

impl Open {
    fn insert(&mut self, id: String, context: SpanContext) {
        if self.contexts.insert(id.clone(), context).is_none() {
            self.order.push_back(id);
        }
        if self.order.len() > MOST_OPEN
            && let Some(oldest) = self.order.pop_front()
        {
            self.contexts.remove(&oldest);
        }
    }

    /// It stays: a request may go on at another group, under the same name.
    fn get(&self, id: &str) -> Option<SpanContext> {
        self.contexts.get(id).copied()
    }
}

impl Exporter {
    pub(super) fn new(settings: Settings) -> io::Result<Self> {
        let outcome = |outcome: &'static str| metrics::counter!(names::TRACE_SPANS, "outcome" => outcome);
        let carrier = carrier::to(&settings.destination)?;
        Ok(Self {
            settings,
            carrier,
            clock: Clock::new(),
            open: Open::default(),
            spans: Vec::new(),
            since: Instant::now(),
            exported: outcome("exported"),
            failed: outcome("failed"),
            complained: None,
        })
    }

    /// Ends with the tracer, which is at the end of the process.
    pub(super) fn run(mut self, notes: &Receiver<Note>) {
        loop {
            let note = if self.spans.is_empty() {
                notes.recv().map_err(|_| RecvTimeoutError::Disconnected)
            } else {
                notes.recv_timeout(LINGER.saturating_sub(self.since.elapsed()))
            };
            match note {
                Ok(Note::Began(id, context)) => self.open.insert(id, context),
                Ok(Note::Answered(answered)) => {
                    let span = self.clock.answered(*answered);
                    self.add([span]);
                }
                Ok(Note::Ended(ended, work)) => {
                    if let Some(request) = self.open.get(&ended.id) {
                        let spans = self.clock.ended(&ended, &work, request, &self.settings.model);
                        self.add(spans);
                    }
                }
                Ok(Note::Flush(_done)) => self.send(),
                Err(RecvTimeoutError::Timeout) => self.send(),
                Err(RecvTimeoutError::Disconnected) => return self.send(),
            }
            if self.spans.len() >= MOST_SPANS || self.since.elapsed() >= LINGER {
                self.send();
            }
        }
    }

    fn add(&mut self, spans: impl IntoIterator<Item = Span>) {
        if self.spans.is_empty() {
            self.since = Instant::now();
        }
        self.spans.extend(spans);
    }

    fn send(&mut self) {
        if self.spans.is_empty() {
            return;
        }
        let spans = std::mem::take(&mut self.spans);
        let n_spans = spans.len() as u64;
        let message = self.message(spans);
        let (n_refused, reason) = match self.carrier.carry(message) {
            Ok(accepted) => accepted.refused(n_spans),
            Err(reason) => (n_spans, reason),
        };
        self.exported.increment(n_spans - n_refused);
        self.failed.increment(n_refused);
        if n_refused > 0 && self.complained.is_none_or(|at| at.elapsed() >= COMPLAIN_EVERY) {
            self.complained = Some(Instant::now());
            let to = &self.settings.destination;
            tracing::warn!(%to, n_refused, reason, "the collector does not take spans: they are dropped");
        }
    }

    fn message(&self, spans: Vec<Span>) -> Export {
        let attributes = vec![
            attribute("service.name", "phalanx"),
            attribute("service.version", env!("CARGO_PKG_VERSION")),
            attribute("service.instance.id", self.settings.instance.as_str()),
        ];
        let scope = Scope { name: "phalanx-coordinator".to_owned(), version: env!("CARGO_PKG_VERSION").to_owned() };
        Export {
            resource_spans: vec![ResourceSpans {
                resource: Some(Resource { attributes }),
                scope_spans: vec![ScopeSpans { scope: Some(scope), spans }],
            }],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn open_requests_are_bounded() {
        let mut open = Open::default();
        let context = SpanContext::drawn(1.0).unwrap();
        for n in 0..=MOST_OPEN {
            open.insert(n.to_string(), context);
        }
        assert_eq!(open.contexts.len(), MOST_OPEN);
        assert!(open.get("0").is_none() && open.get("1").is_some());
        assert_eq!(open.order.len(), MOST_OPEN);
    }
}
