//! A request for a generation, as it came, and its way to an answer. Every API's endpoints take one.

use std::{sync::Arc, time::Instant};

use axum::{
    extract::{FromRequest, Request},
    response::Response,
};
use http::HeaderMap;

use super::{
    FrontendState,
    door::OnBehalf,
    error::ApiError,
    family,
    fields::Fields,
    json_body::JsonBody,
    observe::Record,
    sse::Framing,
    streams::{
        Prepared,
        key::{self, Keyed},
    },
};

/// What a request's priority is moved by where nobody waits for it: behind all that clients choose among themselves.
const BACKGROUND: i32 = 1 << 24;

/// A request for a generation.
pub struct Asked {
    /// What all endpoints share.
    pub state: FrontendState,
    /// What is noted of it.
    pub record: Arc<Record>,
    headers: HeaderMap,
    /// Not parsed yet.
    pub body: JsonBody,
    /// Whether others' requests come first.
    is_background: bool,
}

/// What a request's preparation is told.
pub struct Call {
    /// Unique part of the answer's name.
    pub name: String,
    /// When the answer must be there.
    pub deadline: Option<Instant>,
}

impl FromRequest<FrontendState> for Asked {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &FrontendState) -> Result<Self, ApiError> {
        let record = request.extensions().get::<Arc<Record>>().cloned();
        let record = record.ok_or_else(|| ApiError::internal("the request has no record"))?;
        let is_background = request.extensions().get::<OnBehalf>().is_some_and(|whose| whose.is_background);
        let headers = request.headers().clone();
        let body = JsonBody::from_request(request, state).await?;
        Ok(Self { state: state.noting_in(&record), record, headers, body, is_background })
    }
}

impl Asked {
    /// Answers it: anew, or, if it has a key that is known, with what there is already. `prepare` may take long.
    pub async fn answer(
        self,
        endpoint: &'static str,
        prepare: impl FnOnce(&FrontendState, Fields, Call) -> Result<Prepared, ApiError> + Send + 'static,
    ) -> Result<Response, ApiError> {
        let keyed = self.keyed(endpoint).await?;
        let Self { state, record, body, is_background, .. } = self;
        let keyed = keyed.map(|keyed| keyed.owned_by(record.principal().map(Arc::as_ref)));
        let deadline = state.deadline(record.arrived_at(), None);
        let (generation, reply) = match state.known(keyed.as_ref())? {
            Some(joined) => joined,
            None => {
                let made = || uuid::Uuid::new_v4().simple().to_string();
                let call = Call { name: keyed.as_ref().map_or_else(made, Keyed::name), deadline };
                let mut prepared = state.blocking(move |state| prepare(state, body.parse()?, call)).await?;
                state.admit_grammars(&mut prepared.requests).await?;
                state.moderate(&prepared, &record).await?;
                for request in prepared.requests.iter_mut().filter(|_| is_background) {
                    request.priority = request.priority.saturating_add(BACKGROUND);
                }
                record.submits(prepared.requests.iter().map(|request| request.id.as_str()));
                state.begin(keyed.as_ref(), prepared, &record)?
            }
        };
        let reply = reply.ok_or_else(|| ApiError::internal("the answer has no form"))?;
        let is_passed_on = keyed.as_ref().is_some_and(Keyed::is_forwarders);
        state.deliver(generation, &reply, keyed.map(|keyed| keyed.has), is_passed_on, record).await
    }

    /// What makes the request resumable, if anything does.
    async fn keyed(&self, endpoint: &'static str) -> Result<Option<Keyed>, ApiError> {
        if !key::is_named(&self.headers) {
            return Ok(None);
        }
        if family::of(endpoint).framing == Framing::Lines && self.headers.contains_key(key::IDEMPOTENCY_KEY) {
            let reason = "is not possible here: lines of JSON have no ids to go on from";
            return Err(ApiError::invalid("Idempotency-Key", reason));
        }
        let (headers, body) = (self.headers.clone(), self.body.clone());
        self.state.blocking(move |_| Keyed::of_http(&headers, endpoint, body.bytes())).await
    }
}
