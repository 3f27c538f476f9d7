//! The way from the scheduler to a client: never blocks the scheduler, and holds a bounded amount for a client that does
//! not read.
//!
//! A client may well read slower than the model writes, or not at all for a while, and gets everything nevertheless: an
//! answer without scores has some hundred kilobytes at most. Whoever leaves more than [`MOST_UNREAD_BYTES`] unread has
//! gone away or means harm, and its request is cancelled. Nothing is merged or dropped on the way, so that events stay what
//! the journal says.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
};

use tokio::sync::mpsc;

use crate::request::{Output, RequestEvent};

/// What a client may leave unread of one request.
pub const MOST_UNREAD_BYTES: usize = 8 << 20;

/// Where the scheduler puts a request's events.
pub struct Outbox {
    sender: mpsc::UnboundedSender<RequestEvent>,
    unread_bytes: Arc<AtomicUsize>,
}

/// A request's events, in order.
pub struct RequestEvents {
    receiver: mpsc::UnboundedReceiver<RequestEvent>,
    unread_bytes: Arc<AtomicUsize>,
}

/// Both ends of a new way.
pub fn channel() -> (Outbox, RequestEvents) {
    let (sender, receiver) = mpsc::unbounded_channel();
    let unread_bytes = Arc::new(AtomicUsize::new(0));
    (Outbox { sender, unread_bytes: Arc::clone(&unread_bytes) }, RequestEvents { receiver, unread_bytes })
}

impl Outbox {
    /// Puts an event there. Says whether there is room for more.
    pub fn send(&self, event: RequestEvent) -> bool {
        let size = size_of_event(&event);
        let before = self.unread_bytes.fetch_add(size, Ordering::Relaxed);
        // A client that has gone says so by dropping its stream, which cancels the request.
        let _ = self.sender.send(event);
        before.saturating_add(size) <= MOST_UNREAD_BYTES
    }
}

impl RequestEvents {
    /// The next event; `None` after the last.
    pub async fn recv(&mut self) -> Option<RequestEvent> {
        std::future::poll_fn(|context| self.poll_recv(context)).await
    }

    /// The next event, if it is there; `None` after the last.
    pub fn poll_recv(&mut self, context: &mut Context<'_>) -> Poll<Option<RequestEvent>> {
        let event = std::task::ready!(self.receiver.poll_recv(context));
        if let Some(event) = &event {
            self.unread_bytes.fetch_sub(size_of_event(event), Ordering::Relaxed);
        }
        Poll::Ready(event)
    }
}

/// About what an event takes in memory.
pub(crate) fn size_of_event(event: &RequestEvent) -> usize {
    let scores = |list: &[phalanx_proto::v1::TokenScore]| -> usize {
        list.iter().map(|s| size_of_val(s) + size_of_val(s.top.as_slice())).sum()
    };
    let more = match event {
        RequestEvent::PromptScored(list) => scores(list),
        RequestEvent::Output(Output { text, token_ids, scores: list, .. }) => {
            text.len() + size_of_val(token_ids.as_slice()) + scores(list)
        }
        RequestEvent::Finished(_) | RequestEvent::Failed(_) => 0,
    };
    size_of::<RequestEvent>() + more
}

#[cfg(test)]
mod tests {
    use super::*;

    fn output(n_bytes: usize) -> RequestEvent {
        RequestEvent::Output(Output { text: "x".repeat(n_bytes), ..Output::default() })
    }

    #[tokio::test]
    async fn only_what_is_unread_counts() {
        let (outbox, mut events) = channel();
        for _ in 0..20 {
            assert!(outbox.send(output(MOST_UNREAD_BYTES / 2)));
            assert!(events.recv().await.is_some());
        }
        assert!(outbox.send(output(MOST_UNREAD_BYTES / 2)));
        assert!(!outbox.send(output(MOST_UNREAD_BYTES / 2)), "nobody reads");
        drop(outbox);
        assert!(events.recv().await.is_some() && events.recv().await.is_some() && events.recv().await.is_none());
    }
}
