//! `/v1/batches`: many requests from a file, whenever there is time for them.

use std::sync::Arc;

use axum::{
    Extension, Json,
    extract::{Path, State},
};
use http::HeaderMap;
use phalanx_cluster::hex::hex;
use sha2::{Digest, Sha256};

use super::{
    FrontendState,
    error::ApiError,
    fields::{Fields, Integer},
    files::{kept_seconds, owner},
    json_body::JsonBody,
    listing::{Listing, Page},
    observe::Record,
    streams::key::FORWARDERS_KEY,
};
use crate::{
    batch::line::URLS,
    batches::record::{Batch, BatchError, NewBatch},
};

/// Longest completion window, in hours.
const MOST_HOURS: u64 = 168;
/// Most labels.
const MOST_LABELS: usize = 16;

/// A batch's error, where it is known which.
fn about(id: &str) -> impl Fn(BatchError) -> ApiError {
    move |error| match error {
        BatchError::Unknown => ApiError::no_such("batch", id),
        BatchError::UnknownFile => ApiError::no_such("file", id),
        BatchError::WrongPurpose(_) => ApiError::invalid("input_file_id", format!("is of another kind: {error}")),
        BatchError::TooMany => ApiError::not_here("too_many_batches", error.to_string()),
        BatchError::Over => ApiError::conflict("batch_over", error.to_string()),
        BatchError::Files(error) => error.into(),
    }
}

/// `POST /v1/batches`.
pub async fn create(
    State(state): State<FrontendState>,
    Extension(record): Extension<Arc<Record>>,
    headers: HeaderMap,
    body: JsonBody,
) -> Result<Json<Batch>, ApiError> {
    let batches = state.batches()?;
    let mut new = parse(body.parse()?)?;
    let owner = owner(&record);
    // Whoever passes the request on may do so again if the answer is lost.
    new.id = headers.get(FORWARDERS_KEY).map(|key| {
        let mut sha = Sha256::new();
        sha.update(owner.as_deref().unwrap_or_default());
        sha.update([0]);
        sha.update(key);
        let digest: [u8; 32] = sha.finalize().into();
        format!("batch_{}", hex(&digest[..16]))
    });
    let file = new.input_file_id.clone();
    batches.create(owner, new).await.map(Json).map_err(about(&file))
}

fn parse(mut fields: Fields) -> Result<NewBatch, ApiError> {
    let input_file_id = fields.require("input_file_id")?;
    let endpoint = fields.require::<String>("endpoint")?;
    if !URLS.contains(&endpoint.as_str()) {
        return Err(ApiError::invalid("endpoint", format!("must be one of {}", URLS.join(", "))));
    }
    let completion_window = fields.require::<String>("completion_window")?;
    let hours = completion_window.strip_suffix('h').and_then(|hours| hours.parse::<u64>().ok());
    let hours = hours.filter(|hours| (1..=MOST_HOURS).contains(hours)).ok_or_else(|| {
        ApiError::invalid("completion_window", format!("must be a number of hours from \"1h\" to \"{MOST_HOURS}h\""))
    })?;
    let metadata = fields.take::<Fields>("metadata")?.map(Fields::into_entries);
    if metadata.as_ref().is_some_and(|labels| labels.len() > MOST_LABELS || labels.values().any(|l| !l.is_string())) {
        return Err(ApiError::invalid("metadata", format!("must be at most {MOST_LABELS} strings by name")));
    }
    let results_kept_seconds = match fields.take::<Fields>("output_expires_after")? {
        None => kept_seconds(None, None)?,
        Some(mut after) => {
            let anchor = after.require::<String>("anchor")?;
            let seconds = after.require::<Integer>("seconds")?;
            after.finish()?;
            kept_seconds(Some(&anchor), Some(u64::try_from(seconds).ok()))?
        }
    };
    fields.finish()?;
    let window_seconds = hours * 3600;
    Ok(NewBatch {
        id: None,
        input_file_id,
        endpoint,
        completion_window,
        window_seconds,
        metadata,
        results_kept_seconds,
    })
}

/// `GET /v1/batches`: those of the key, the newest first.
pub async fn list(
    State(state): State<FrontendState>,
    Extension(record): Extension<Arc<Record>>,
    uri: http::Uri,
) -> Result<Json<Listing<Batch>>, ApiError> {
    let page = Page::of(uri.query(), 20, 100, &[])?;
    let batches = state.batches()?.list(owner(&record).as_deref()).map_err(about(""))?;
    Ok(Json(page.take(batches, |batch| &batch.id, "batch")?))
}

/// `GET /v1/batches/{id}`.
pub async fn retrieve(
    State(state): State<FrontendState>,
    Extension(record): Extension<Arc<Record>>,
    Path(id): Path<String>,
) -> Result<Json<Batch>, ApiError> {
    state.batches()?.get(owner(&record).as_deref(), &id).map(Json).map_err(about(&id))
}

/// `POST /v1/batches/{id}/cancel`.
pub async fn cancel(
    State(state): State<FrontendState>,
    Extension(record): Extension<Arc<Record>>,
    Path(id): Path<String>,
) -> Result<Json<Batch>, ApiError> {
    state.batches()?.cancel(owner(&record), id.clone()).await.map(Json).map_err(about(&id))
}
