//! What is noted of one request until its line is written.

use std::{
    collections::BTreeMap,
    sync::{
        Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use http::HeaderMap;
use jiff::Timestamp;
use serde::Serialize;

use super::{AuditLog, Ticket};
use crate::guard::{Direction, Tally};

/// Header in which a coordinator says whom a request is from.
pub const CLIENT: &str = "x-phalanx-client";
/// Header in which it says who passed the request on.
pub const VIA: &str = "x-phalanx-via";
/// Longest text of a prompt or an answer, in bytes.
const LONGEST_TEXT: usize = 1 << 20;
/// Longest path, in bytes.
const LONGEST_ROUTE: usize = 256;

/// Where a request is from, and what it is.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Origin {
    /// Name of the request in answers and in the log.
    pub request_id: String,
    /// Address of whoever sent it.
    pub client: Option<String>,
    /// Address of the coordinator that says so, if the request came from one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub via: Option<String>,
    /// HTTP's, or `gRPC`.
    pub method: String,
    /// The endpoint; of requests that none has seen, the path.
    pub route: String,
}

impl Origin {
    /// Of a request with these headers.
    pub fn new(headers: &HeaderMap, request_id: String, method: &str, route: &str) -> Self {
        let text = |name| Some(headers.get(name)?.to_str().ok()?.to_owned());
        let end = (0..=LONGEST_ROUTE.min(route.len())).rev().find(|at| route.is_char_boundary(*at)).unwrap_or(0);
        let (method, route) = (method.to_owned(), route[..end].to_owned());
        Self { request_id, client: text(CLIENT), via: text(VIA), method, route }
    }
}

/// A line of the audit log.
#[derive(Debug, Serialize)]
pub struct Line {
    /// When it ended.
    pub time: Timestamp,
    /// Name of the key.
    pub key: Option<String>,
    /// From where.
    #[serde(flatten)]
    pub origin: Origin,
    /// The model that was asked.
    pub model: Option<String>,
    /// Tokens of the prompts.
    pub prompt_tokens: u64,
    /// Tokens that the client was sent, in all choices.
    pub output_tokens: u64,
    /// HTTP status, or gRPC's code.
    pub status: String,
    /// From its arrival to its end.
    pub duration_ms: u64,
    /// How often the guard found what in the prompts.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub input_matches: BTreeMap<&'static str, u64>,
    /// And in the answers.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub output_matches: BTreeMap<&'static str, u64>,
    /// What of it, or whether the moderation, had the request refused or an answer ended.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub blocked_by: Option<&'static str>,
    /// What was asked, if that is wanted.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub prompts: Vec<String>,
    /// What was answered, by choice.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub outputs: Vec<String>,
}

impl Line {
    /// Of a request that has come to nothing.
    pub fn short(origin: Origin, key: Option<String>, status: &str, duration: Duration) -> Self {
        Self {
            time: now(),
            key,
            origin,
            model: None,
            prompt_tokens: 0,
            output_tokens: 0,
            status: status.to_owned(),
            duration_ms: millis(duration),
            input_matches: BTreeMap::new(),
            output_matches: BTreeMap::new(),
            blocked_by: None,
            prompts: Vec::new(),
            outputs: Vec::new(),
        }
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// To the millisecond.
fn now() -> Timestamp {
    let now = Timestamp::now();
    Timestamp::from_millisecond(now.as_millisecond()).unwrap_or(now)
}

#[derive(Default)]
struct Content {
    prompts: Vec<String>,
    outputs: Vec<String>,
}

/// Collects what a line says.
pub struct Account {
    ticket: Ticket,
    origin: Origin,
    model: OnceLock<String>,
    prompt_tokens: AtomicU64,
    output_tokens: AtomicU64,
    content: Option<Mutex<Content>>,
}

impl Account {
    /// Of a request that begins.
    pub fn new(log: &AuditLog, ticket: Ticket, origin: Origin) -> Self {
        let (model, prompt_tokens, output_tokens) = Default::default();
        let content = log.wants_content().then(Mutex::default);
        Self { ticket, origin, model, prompt_tokens, output_tokens, content }
    }

    fn content(&self) -> Option<MutexGuard<'_, Content>> {
        // Texts are added, and that is all.
        Some(self.content.as_ref()?.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// A model is asked for so many tokens of prompts.
    pub fn asked(&self, model: String, n_prompt_tokens: usize) {
        let _ = self.model.set(model);
        self.prompt_tokens.fetch_add(n_prompt_tokens as u64, Ordering::Relaxed);
    }

    /// One of the prompts, if it is wanted.
    pub fn prompt(&self, text: impl FnOnce() -> String) {
        if let Some(mut content) = self.content() {
            let mut prompt = String::new();
            append(&mut prompt, &text());
            content.prompts.push(prompt);
        }
    }

    /// The client is sent a part of a choice.
    pub fn answered(&self, choice: usize, text: &str, n_tokens: usize) {
        self.output_tokens.fetch_add(n_tokens as u64, Ordering::Relaxed);
        if let Some(mut content) = self.content() {
            if content.outputs.len() <= choice {
                content.outputs.resize(choice + 1, String::new());
            }
            append(&mut content.outputs[choice], text);
        }
    }

    /// Writes the line.
    pub fn close(self, key: Option<String>, status: &str, duration: Duration, tally: &Tally) {
        let content = self.content.map(|c| c.into_inner().unwrap_or_else(PoisonError::into_inner)).unwrap_or_default();
        let line = Line {
            model: self.model.into_inner(),
            prompt_tokens: self.prompt_tokens.into_inner(),
            output_tokens: self.output_tokens.into_inner(),
            input_matches: tally.matches(Direction::Input),
            output_matches: tally.matches(Direction::Output),
            blocked_by: tally.blocked_by(),
            prompts: content.prompts,
            outputs: content.outputs,
            ..Line::short(self.origin, key, status, duration)
        };
        self.ticket.write(&line);
    }
}

/// Adds what has room, and a sign where something has not.
fn append(text: &mut String, more: &str) {
    let room = LONGEST_TEXT.saturating_sub(text.len());
    let end = (0..=room.min(more.len())).rev().find(|at| more.is_char_boundary(*at)).unwrap_or(0);
    text.push_str(&more[..end]);
    if end < more.len() && !text.ends_with('…') {
        text.push('…');
    }
}
