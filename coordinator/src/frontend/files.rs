//! `/v1/files`: what clients send for batches, and what comes of these.

use std::sync::Arc;

use axum::{
    Extension, Json,
    body::Body,
    extract::{DefaultBodyLimit, Multipart, Path, State, multipart::Field},
    response::{IntoResponse, Response},
    routing::{MethodRouter, post},
};
use http::{HeaderValue, Method, header};
use serde::Serialize;
use tokio::{fs::File, io::AsyncWriteExt, time::timeout};

use super::{
    FrontendState,
    error::ApiError,
    generation::unix_seconds,
    listing::{Listing, Page},
    observe::Record,
};
use crate::batches::{
    files::{FileRecord, FilesError, Incoming, KEPT_SECONDS},
    service::Batches,
};

/// Longest field of a form that is no file, in bytes.
const LONGEST_FIELD: usize = 4096;
/// Bytes of a file that are read at once.
const CHUNK: usize = 64 << 10;
/// How long a file may be asked to be kept, in seconds: an hour to 30 days, as OpenAI has it.
const LEAST_KEPT: u64 = 3600;

/// Where files are.
pub const PATH: &str = "/v1/files";

/// A request that brings a file's content, or takes it away.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transfer {
    /// `POST /v1/files`.
    Upload,
    /// `GET /v1/files/{id}/content`.
    Content,
}

/// Whether a request is one.
pub fn transfer(method: &Method, path: &str) -> Option<Transfer> {
    let rest = path.strip_prefix(PATH)?;
    if rest.is_empty() {
        return (method == Method::POST).then_some(Transfer::Upload);
    }
    let id = rest.strip_prefix('/')?.strip_suffix("/content")?;
    (method == Method::GET && !id.is_empty() && !id.contains('/')).then_some(Transfer::Content)
}

/// A file as OpenAI shows it.
#[derive(Debug, Serialize)]
pub struct FileObject {
    id: String,
    object: &'static str,
    bytes: u64,
    created_at: u64,
    expires_at: u64,
    filename: String,
    purpose: String,
    status: &'static str,
    status_details: Option<String>,
}

impl From<FileRecord> for FileObject {
    fn from(record: FileRecord) -> Self {
        Self {
            id: record.id,
            object: "file",
            bytes: record.bytes,
            created_at: record.created_at,
            expires_at: record.expires_at,
            filename: record.filename,
            purpose: record.purpose,
            status: "processed",
            status_details: None,
        }
    }
}

/// What is told of a file that is gone.
#[derive(Debug, Serialize)]
pub struct Deleted {
    id: String,
    object: &'static str,
    deleted: bool,
}

impl From<FilesError> for ApiError {
    fn from(error: FilesError) -> Self {
        match error {
            FilesError::Unknown => Self::no_such("file", ""),
            FilesError::TooLong { .. } => Self::too_large(error.to_string()),
            FilesError::Full { .. } => Self::not_here("no_room", error.to_string()),
            FilesError::InUse => Self::conflict("file_in_use", error.to_string()),
            FilesError::Busy => Self::not_ready(&error.to_string()),
            FilesError::Disk(_) => Self::internal(error),
        }
    }
}

/// The same, where it is known which file.
fn about(id: &str) -> impl Fn(FilesError) -> ApiError {
    move |error| match error {
        FilesError::Unknown => ApiError::no_such("file", id),
        error => error.into(),
    }
}

impl FrontendState {
    /// Files and batches, if there are any.
    pub(super) fn batches(&self) -> Result<&Batches, ApiError> {
        let off = "files and batches are switched off: start the coordinator with --files-dir FOLDER";
        self.batches.as_ref().ok_or_else(|| ApiError::not_here("files_off", off))
    }
}

/// Whose files a request is about.
pub fn owner(record: &Record) -> Option<String> {
    record.principal().map(|principal| principal.name.clone())
}

/// `POST /v1/files`, which takes more than other endpoints: as much as a file may have.
pub fn upload() -> MethodRouter<FrontendState> {
    post(create).layer(DefaultBodyLimit::disable())
}

async fn create(
    State(state): State<FrontendState>,
    Extension(record): Extension<Arc<Record>>,
    form: Result<Multipart, axum::extract::multipart::MultipartRejection>,
) -> Result<Json<FileObject>, ApiError> {
    let batches = state.batches()?;
    let files = batches.files()?;
    let mut form = form.map_err(|error| ApiError::not_a_form(error.body_text()))?;
    let (mut purpose, mut anchor, mut seconds, mut file) = (None, None, None, None);
    while let Some(field) = soon(&state, form.next_field()).await? {
        let name = field.name().unwrap_or_default().to_owned();
        match name.as_str() {
            "file" if file.is_none() => {
                let filename = field.file_name().unwrap_or("file").to_owned();
                let mut incoming = files.begin()?;
                take(&state, field, &mut incoming).await?;
                file = Some((filename, incoming));
            }
            "purpose" if purpose.is_none() => purpose = Some(text(&state, field, "purpose").await?),
            "expires_after[anchor]" if anchor.is_none() => anchor = Some(text(&state, field, &name).await?),
            "expires_after[seconds]" if seconds.is_none() => seconds = Some(text(&state, field, &name).await?),
            "file" | "purpose" | "expires_after[anchor]" | "expires_after[seconds]" => {
                return Err(ApiError::invalid(&name, "stands twice"));
            }
            _ => return Err(ApiError::unknown_field(&name)),
        }
    }
    match purpose.as_deref() {
        Some("batch") => {}
        Some(_) => return Err(ApiError::invalid("purpose", "must be \"batch\": files are for nothing else here")),
        None => return Err(ApiError::missing("purpose")),
    }
    let kept = kept_seconds(anchor.as_deref(), seconds.as_deref().map(str::parse).map(Result::ok))?;
    let (filename, incoming) = file.ok_or_else(|| ApiError::missing("file"))?;
    Ok(Json(batches.keep(incoming, filename, "batch", owner(&record), kept).await?.into()))
}

/// How long something is kept for which that is asked; `seconds` is `Some(None)` if it is no number.
pub fn kept_seconds(anchor: Option<&str>, seconds: Option<Option<u64>>) -> Result<u64, ApiError> {
    match (anchor, seconds) {
        (None, None) => Ok(KEPT_SECONDS),
        (Some("created_at"), Some(Some(seconds))) if (LEAST_KEPT..=KEPT_SECONDS).contains(&seconds) => Ok(seconds),
        _ => {
            let reason = format!("must have the anchor \"created_at\" and seconds from {LEAST_KEPT} to {KEPT_SECONDS}");
            Err(ApiError::invalid("expires_after", reason))
        }
    }
}

/// The next part of a form, if it comes in time.
async fn soon<T>(
    state: &FrontendState,
    part: impl Future<Output = Result<T, axum::extract::multipart::MultipartError>>,
) -> Result<T, ApiError> {
    let part = timeout(state.limits.body_timeout, part).await.map_err(ApiError::body_incomplete)?;
    part.map_err(|error| ApiError::not_a_form(error.body_text()))
}

async fn text(state: &FrontendState, mut field: Field<'_>, name: &str) -> Result<String, ApiError> {
    let mut bytes = Vec::new();
    while let Some(chunk) = soon(state, field.chunk()).await? {
        if bytes.len() + chunk.len() > LONGEST_FIELD {
            return Err(ApiError::invalid(name, "is too long"));
        }
        bytes.extend_from_slice(&chunk);
    }
    String::from_utf8(bytes).map_err(|_| ApiError::invalid(name, "must be UTF-8"))
}

/// Takes a file in as it comes.
async fn take(state: &FrontendState, mut field: Field<'_>, incoming: &mut Incoming) -> Result<(), ApiError> {
    let mut file = File::create(incoming.path()).await.map_err(FilesError::from)?;
    while let Some(chunk) = soon(state, field.chunk()).await? {
        incoming.grow(chunk.len() as u64)?;
        file.write_all(&chunk).await.map_err(FilesError::from)?;
    }
    file.flush().await.map_err(FilesError::from)?;
    Ok(())
}

/// `GET /v1/files`: those of the key, the newest first.
pub async fn list(
    State(state): State<FrontendState>,
    Extension(record): Extension<Arc<Record>>,
    uri: http::Uri,
) -> Result<Json<Listing<FileObject>>, ApiError> {
    let page = Page::of(uri.query(), 10_000, 10_000, &["purpose"])?;
    let mut files = state.batches()?.files()?.list(owner(&record).as_deref(), unix_seconds());
    files.retain(|file| page.filter("purpose").is_none_or(|purpose| purpose == file.purpose));
    Ok(Json(page.take(files, |file| &file.id, "file")?.map(FileObject::from)))
}

/// `GET /v1/files/{id}`.
pub async fn retrieve(
    State(state): State<FrontendState>,
    Extension(record): Extension<Arc<Record>>,
    Path(id): Path<String>,
) -> Result<Json<FileObject>, ApiError> {
    let file = state.batches()?.files()?.get(owner(&record).as_deref(), &id, unix_seconds()).map_err(about(&id))?;
    Ok(Json(file.into()))
}

/// `GET /v1/files/{id}/content`.
pub async fn content(
    State(state): State<FrontendState>,
    Extension(record): Extension<Arc<Record>>,
    Path(id): Path<String>,
) -> Result<Response, ApiError> {
    let files = state.batches()?.files()?;
    let file = files.get(owner(&record).as_deref(), &id, unix_seconds()).map_err(about(&id))?;
    let content = File::open(files.path(&file.id)).await.map_err(FilesError::from).map_err(about(&id))?;
    let mut body = Body::from_stream(chunks(content)).into_response();
    let headers = body.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
    headers.insert(header::CONTENT_LENGTH, HeaderValue::from(file.bytes));
    Ok(body)
}

/// A file's bytes as they are wanted.
fn chunks(file: File) -> impl futures::Stream<Item = std::io::Result<Vec<u8>>> {
    futures::stream::try_unfold(file, |mut file| async move {
        let mut chunk = Vec::with_capacity(CHUNK);
        let n_bytes = tokio::io::AsyncReadExt::read_buf(&mut file, &mut chunk).await?;
        Ok((n_bytes > 0).then_some((chunk, file)))
    })
}

/// `DELETE /v1/files/{id}`.
pub async fn delete(
    State(state): State<FrontendState>,
    Extension(record): Extension<Arc<Record>>,
    Path(id): Path<String>,
) -> Result<Json<Deleted>, ApiError> {
    state.batches()?.remove_file(owner(&record), id.clone()).await.map_err(about(&id))?;
    Ok(Json(Deleted { id, object: "file", deleted: true }))
}
