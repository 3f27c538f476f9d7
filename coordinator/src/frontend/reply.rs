//! How an answer looks, and its way to the client.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use axum::response::Response;
use http::HeaderMap;

use super::{
    FrontendState,
    error::ApiError,
    family,
    generation::{Collected, Generation},
    json_body::JsonBody,
    neutral::Delivery,
    observe::Record,
    sse::{self, Chunks, Framing},
    streams::{
        Prepared,
        key::{self, Keyed},
        position::Position,
    },
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

    /// Memory that it takes, for the bound of what is kept.
    fn kept_bytes(&self) -> usize;
}

/// What a request's preparation is told.
pub struct Call {
    /// Unique part of the answer's name.
    pub name: String,
    /// When the answer must be there.
    pub deadline: Option<Instant>,
}

impl FrontendState {
    /// Answers a request: anew, or, if it has a key that is known, with what there is already. `prepare` may take long.
    pub(super) async fn answer(
        &self,
        endpoint: &'static str,
        headers: &HeaderMap,
        record: Arc<Record>,
        body: JsonBody,
        prepare: impl FnOnce(&Self, &JsonBody, Call) -> Result<Prepared, ApiError> + Send + 'static,
    ) -> Result<Response, ApiError> {
        let keyed = self.keyed(endpoint, headers, &body).await?;
        let keyed = keyed.map(|keyed| keyed.owned_by(record.principal().map(Arc::as_ref)));
        let deadline = self.deadline(record.arrived_at(), None);
        let (generation, reply) = match self.known(keyed.as_ref())? {
            Some(joined) => joined,
            None => {
                let made = || uuid::Uuid::new_v4().simple().to_string();
                let call = Call { name: keyed.as_ref().map_or_else(made, Keyed::name), deadline };
                let mut prepared = self.blocking(move |state| prepare(state, &body, call)).await?;
                self.admit_grammars(&mut prepared.requests).await?;
                record.submits(prepared.requests.iter().map(|request| request.id.as_str()));
                self.begin(keyed.as_ref(), prepared, &record)?
            }
        };
        let reply = reply.ok_or_else(|| ApiError::internal("the answer has no form"))?;
        let is_passed_on = keyed.as_ref().is_some_and(Keyed::is_forwarders);
        self.deliver(generation, &reply, keyed.map(|keyed| keyed.has), is_passed_on, record).await
    }

    /// What makes the request resumable, if anything does.
    async fn keyed(
        &self,
        endpoint: &'static str,
        headers: &HeaderMap,
        body: &JsonBody,
    ) -> Result<Option<Keyed>, ApiError> {
        if !key::is_named(headers) {
            return Ok(None);
        }
        if family::of(endpoint).framing == Framing::Lines && headers.contains_key(key::IDEMPOTENCY_KEY) {
            let reason = "is not possible here: lines of JSON have no ids to go on from";
            return Err(ApiError::invalid("Idempotency-Key", reason));
        }
        let (headers, body) = (headers.clone(), body.clone());
        self.blocking(move |_| Keyed::of_http(&headers, endpoint, body.bytes())).await
    }

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
