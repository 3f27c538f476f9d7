//! HTTP: documents into memory, files onto the disk, resumed where they broke off.

use std::fs::{File, OpenOptions};
use std::io::{Read as _, Write as _};
use std::path::Path;
use std::time::Duration;

use ureq::http::{Response, StatusCode, header};
use ureq::{Agent, Body};

use super::lock::{hash, remove};
use super::{SourceError, SourceOptions};
use crate::web;

/// Longer lists of files are not read.
const LONGEST_DOCUMENT_BYTES: u64 = 64 << 20;
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
const CHUNK_BYTES: usize = 256 << 10;

/// Fetches over HTTP; the system's certificates decide who is trusted.
pub(super) struct Downloader {
    agent: Agent,
    attempts: u32,
    first_pause: Duration,
    /// `Authorization`, sent to the first host only, never where it redirects to.
    authorization: Option<String>,
}

/// A file to fetch.
pub(super) struct Remote<'a> {
    pub(super) url: &'a str,
    /// Size that the source promises, if it does.
    pub(super) bytes: Option<u64>,
    /// Checksum that the source promises, if it does: hexadecimal digits.
    pub(super) sha256: Option<&'a str>,
}

/// Why one attempt failed.
enum Failure {
    /// Another attempt may succeed.
    Passing(String),
    Final(SourceError),
}

impl Downloader {
    pub(super) fn new(options: &SourceOptions) -> Self {
        let agent = web::agent()
            .http_status_as_error(false)
            // A compressed body could not be resumed.
            .accept_encoding("identity")
            .user_agent(concat!("phalanx/", env!("CARGO_PKG_VERSION")))
            .timeout_connect(Some(Duration::from_secs(20)))
            .timeout_recv_response(Some(Duration::from_secs(60)))
            .timeout_per_read(Some(Duration::from_secs(60)))
            .build()
            .new_agent();
        Self { agent, attempts: options.attempts.max(1), first_pause: options.first_pause, authorization: None }
    }

    pub(super) fn with_token(mut self, token: Option<&str>) -> Self {
        self.authorization = token.map(|token| format!("Bearer {token}"));
        self
    }

    /// A document, of the type that `accept` asks for.
    pub(super) fn document(&self, url: &str, accept: &str) -> Result<Vec<u8>, SourceError> {
        self.again(url, |_| {
            let response = self.get(url, &[("accept", accept)], true)?;
            let mut response = ok(url, response)?;
            response.body_mut().with_config().limit(LONGEST_DOCUMENT_BYTES).read_to_vec().map_err(passing)
        })
    }

    /// Headers of the answer to a request for `url`, redirects not followed.
    pub(super) fn headers(&self, url: &str) -> Result<header::HeaderMap, SourceError> {
        self.again(url, |_| {
            let response = self.get(url, &[("range", "bytes=0-0")], false)?;
            let response = if response.status().is_redirection() { response } else { ok(url, response)? };
            Ok(response.headers().clone())
        })
    }

    /// Fetches into `part`, going on where an earlier call stopped, and checks size and checksum. `at` is told how many
    /// bytes are there. A file with a wrong checksum is removed.
    pub(super) fn file(&self, remote: &Remote<'_>, part: &Path, at: &dyn Fn(u64)) -> Result<(), SourceError> {
        let length = || std::fs::metadata(part).map_or(0, |metadata| metadata.len());
        self.again(remote.url, |fresh_attempt| {
            let before = length();
            let outcome = self.attempt(remote, part, at);
            if length() > before {
                fresh_attempt();
            }
            outcome
        })?;
        let got = length();
        if let Some(want) = remote.bytes.filter(|&want| want != got) {
            remove(part)?;
            return Err(SourceError::Size { url: remote.url.to_owned(), want, got });
        }
        // Its final name will be trusted: the bytes must be on the disk before.
        std::fs::File::open(part).and_then(|file| file.sync_all()).map_err(SourceError::file("write", part))?;
        if let Some(want) = remote.sha256 {
            let got = hash(part)?;
            if !got.eq_ignore_ascii_case(want) {
                remove(part)?;
                return Err(SourceError::Checksum { what: remote.url.to_owned(), want: want.to_owned(), got });
            }
        }
        Ok(())
    }

    /// One request, for what is missing of `part`.
    fn attempt(&self, remote: &Remote<'_>, part: &Path, at: &dyn Fn(u64)) -> Result<(), Failure> {
        let file = |error| Failure::Final(SourceError::file("write", part)(error));
        let mut out = OpenOptions::new().create(true).append(true).open(part).map_err(file)?;
        let mut done = out.metadata().map_err(file)?.len();
        if remote.bytes == Some(done) {
            return Ok(());
        }
        if remote.bytes.is_some_and(|bytes| done > bytes) {
            out.set_len(0).map_err(file)?;
            done = 0;
        }
        let range = format!("bytes={done}-");
        let headers: &[_] = if done > 0 { &[("range", range.as_str())] } else { &[] };
        let response = self.get(remote.url, headers, true)?;
        match response.status() {
            StatusCode::PARTIAL_CONTENT if range_start(&response) == Some(done) => {}
            StatusCode::PARTIAL_CONTENT | StatusCode::RANGE_NOT_SATISFIABLE => {
                // What is here is not what is there.
                out.set_len(0).map_err(file)?;
                return Err(Failure::Passing(format!("{} for {range}", response.status())));
            }
            StatusCode::OK => {
                out.set_len(0).map_err(file)?;
                done = 0;
            }
            _ => return ok(remote.url, response).map(|_| ()),
        }
        let end = response.body().content_length().map(|length| done + length);
        self.copy(remote, response, &mut out, done, end, at).map_err(|failure| match failure {
            Failure::Final(SourceError::File { source, .. }) => file(source),
            other => other,
        })
    }

    fn copy(
        &self,
        remote: &Remote<'_>,
        response: Response<Body>,
        out: &mut File,
        mut done: u64,
        end: Option<u64>,
        at: &dyn Fn(u64),
    ) -> Result<(), Failure> {
        let mut body = response.into_body().into_with_config().limit(u64::MAX).reader();
        let mut buffer = vec![0; CHUNK_BYTES];
        at(done);
        loop {
            let n = body.read(&mut buffer).map_err(|error| Failure::Passing(error.to_string()))?;
            if n == 0 {
                break;
            }
            done += n as u64;
            if let Some(want) = remote.bytes.filter(|&want| done > want) {
                let url = remote.url.to_owned();
                return Err(Failure::Final(SourceError::Size { url, want, got: done }));
            }
            let write_error = |error| Failure::Final(SourceError::file("write", Path::new(""))(error));
            out.write_all(&buffer[..n]).map_err(write_error)?;
            at(done);
        }
        match end.or(remote.bytes).filter(|&end| done < end) {
            Some(end) => Err(Failure::Passing(format!("connection closed after {done} of {end} bytes"))),
            None => Ok(()),
        }
    }

    fn get(&self, url: &str, headers: &[(&str, &str)], redirects: bool) -> Result<Response<Body>, Failure> {
        let mut request = self.agent.get(url).config().max_redirects(if redirects { 10 } else { 0 }).build();
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        if let Some(authorization) = &self.authorization {
            request = request.header("authorization", authorization);
        }
        request.call().map_err(|error| match error {
            ureq::Error::BadUri(_) | ureq::Error::Http(_) | ureq::Error::Tls(_) | ureq::Error::TooManyRedirects => {
                Failure::Final(SourceError::Answer { url: url.to_owned(), reason: error.to_string() })
            }
            other => passing(other),
        })
    }

    /// Tries until it works, fails for good, or has failed `attempts` times in a row; `attempt` calls its argument when
    /// it made progress, which begins a new row.
    fn again<T>(
        &self,
        url: &str,
        mut attempt: impl FnMut(&mut dyn FnMut()) -> Result<T, Failure>,
    ) -> Result<T, SourceError> {
        let mut failed = 0;
        loop {
            match attempt(&mut || failed = 0) {
                Ok(result) => return Ok(result),
                Err(Failure::Final(error)) => return Err(error),
                Err(Failure::Passing(reason)) => {
                    failed += 1;
                    if failed >= self.attempts {
                        return Err(SourceError::Network { url: url.to_owned(), attempts: self.attempts, reason });
                    }
                    let pause = self.first_pause.saturating_mul(1 << (failed - 1).min(16)).min(LONGEST_PAUSE);
                    tracing::warn!(url, %reason, pause_ms = pause.as_millis() as u64, "download broke off: trying again");
                    std::thread::sleep(pause);
                }
            }
        }
    }
}

fn passing(error: ureq::Error) -> Failure {
    Failure::Passing(error.to_string())
}

/// The response if it is a success.
fn ok(url: &str, response: Response<Body>) -> Result<Response<Body>, Failure> {
    let status = response.status();
    if status.is_success() {
        return Ok(response);
    }
    if status.is_server_error() || matches!(status, StatusCode::TOO_MANY_REQUESTS | StatusCode::REQUEST_TIMEOUT) {
        return Err(Failure::Passing(format!("HTTP status {status}")));
    }
    let hint = match status {
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => ": set HF_TOKEN if the model asks for a login",
        StatusCode::NOT_FOUND => ": no such package, repository or file",
        _ => "",
    };
    Err(Failure::Final(SourceError::Status { url: url.to_owned(), status: status.as_u16(), hint }))
}

/// Where a partial answer begins.
fn range_start(response: &Response<Body>) -> Option<u64> {
    let range = response.headers().get(header::CONTENT_RANGE)?.to_str().ok()?;
    range.strip_prefix("bytes ")?.split('-').next()?.parse().ok()
}
