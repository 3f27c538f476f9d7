//! How an answer looks, and its way to the client.

use std::{sync::Arc, time::Duration};

use axum::response::Response;

use super::{
    FrontendState,
    error::ApiError,
    generation::{Collected, Generation},
    neutral::Delivery,
    observe::Record,
    sse::{self, Chunks, Framing},
    streams::position::Position,
};

/// How long a stream's status waits for its first event: what is known to be wrong by then has a status of its own.
const STATUS_WAIT: Duration = Duration::from_millis(100);

/// Makes answers to one request. A request with a key may be answered several times.
pub trait Reply: Send + Sync {
    /// Whole, or in events.
    fn delivery(&self) -> Delivery;

    /// The whole answer.
    fn whole(&self, collected: Collected) -> Response;

    /// A streamed answer from its beginning.
    fn chunks(&self) -> Box<dyn Chunks>;

    /// The field that asks for something of the output's tokens beside their text, if one does.
    fn reveals(&self) -> Option<&'static str>;

    /// Memory that it takes, for the bound of what is kept.
    fn kept_bytes(&self) -> usize;
}

impl FrontendState {
    /// Sends an answer. `has` is what the client has of it, if the request can be resumed; `is_passed_on` says that the
    /// client is another coordinator.
    pub(super) async fn deliver(
        &self,
        mut generation: Generation,
        reply: &Arc<dyn Reply>,
        has: Option<Position>,
        is_passed_on: bool,
        record: Arc<Record>,
    ) -> Result<Response, ApiError> {
        generation = generation.recorded(Arc::clone(&record));
        if reply.delivery() == Delivery::Whole {
            return Ok(reply.whole(generation.collect().await?));
        }
        if has.as_ref().is_some_and(|has| has.n_choices() > generation.n_choices()) {
            let reason = format!("names more than the {} choices there are", generation.n_choices());
            return Err(ApiError::invalid("Last-Event-ID", reason));
        }
        generation.settle(STATUS_WAIT).await?;
        let chunks = reply.chunks();
        // Lines have no ids: who passes them on is given events, and takes the lines out of these.
        let framing = if is_passed_on { Framing::Events } else { chunks.family().framing };
        Ok(sse::respond(generation, chunks, framing, has, record, self.limits.keep_alive))
    }
}
