//! `GET /v1/streams/{key}`: the rest of an answer, by the key that its request had.

use std::sync::Arc;

use axum::{
    Extension,
    extract::{Path, Query, State},
    response::{IntoResponse, Response},
};
use http::{HeaderMap, StatusCode};
use serde::Deserialize;

use super::{
    key,
    position::{Position, Tail},
};
use crate::frontend::{FrontendState, error::ApiError, observe::Record};

/// What stands behind the `?`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Begin {
    starting_after: Option<String>,
}

/// The endpoint.
pub async fn read(
    State(state): State<FrontendState>,
    Extension(record): Extension<Arc<Record>>,
    Path(key): Path<String>,
    query: Result<Query<Begin>, axum::extract::rejection::QueryRejection>,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let Query(begin) = query.map_err(|_| ApiError::invalid("starting_after", "is the only parameter that is known"))?;
    // An event source repeats its address when it reconnects: what it has got since is in the header.
    let has = match key::last_event_id(&headers)? {
        Some(has) => has,
        None => match begin.starting_after.filter(|id| !id.is_empty()) {
            Some(id) => id.parse().map_err(|reason| ApiError::invalid("starting_after", reason))?,
            None => Position::default(),
        },
    };
    let owned = key::owned(&key, record.principal().map(Arc::as_ref));
    let Some((generation, Some(reply))) = state.streams.join(&owned) else {
        return Err(ApiError::unknown_stream(&key));
    };
    if has.tail() == Tail::Done {
        return Ok(StatusCode::NO_CONTENT.into_response());
    }
    state.deliver(generation, &reply, Some(has), false, record).await
}
