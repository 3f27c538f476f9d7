//! A client of streams of chats that comes back after a broken connection, and what streams have said.

use std::{
    io::{BufRead, BufReader, Read},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::process::PATIENCE;

/// Pause before a client that lost its connection comes back.
const RETURN_PAUSE: Duration = Duration::from_millis(50);

/// What a chat says: content, calls with their arguments, and why it ended.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Said {
    /// All text.
    pub content: String,
    /// Names and arguments.
    pub calls: Vec<(String, String)>,
    /// Why it ended; empty if it has not.
    pub finish: String,
    /// Tokens of prompt and answer, if it told.
    pub usage: Option<(u64, u64)>,
}

impl Said {
    /// By an answer that was not streamed.
    pub fn whole(answer: &Value) -> Self {
        let choice = &answer["choices"][0];
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let calls = choice["message"]["tool_calls"].as_array().into_iter().flatten();
        Self {
            content: text(&choice["message"]["content"]),
            calls: calls.map(|c| (text(&c["function"]["name"]), text(&c["function"]["arguments"]))).collect(),
            finish: text(&choice["finish_reason"]),
            usage: None,
        }
    }

    /// Adds an event. Whether it brought arguments.
    ///
    /// # Panics
    /// If the event is an error, or tells of a call in another order.
    pub fn add(&mut self, event: &Value) -> bool {
        assert!(event["error"].is_null(), "{event}");
        if let (Some(prompt), Some(answer)) =
            (event["usage"]["prompt_tokens"].as_u64(), event["usage"]["completion_tokens"].as_u64())
        {
            assert_eq!(self.usage.replace((prompt, answer)), None, "usage is told twice");
        }
        let choice = &event["choices"][0];
        self.content.push_str(choice["delta"]["content"].as_str().unwrap_or_default());
        self.finish.push_str(choice["finish_reason"].as_str().unwrap_or_default());
        let Some(call) = choice["delta"]["tool_calls"].get(0) else { return false };
        if let Some(name) = call["function"]["name"].as_str() {
            assert_eq!(call["index"], self.calls.len());
            self.calls.push((name.to_owned(), String::new()));
        }
        let arguments = call["function"]["arguments"].as_str().unwrap_or_default();
        self.calls.last_mut().expect("a call begins with its name").1.push_str(arguments);
        !arguments.is_empty()
    }
}

/// What a client was told so far.
#[derive(Debug, Clone, Default)]
pub struct Told {
    /// Events with their ids.
    pub events: Vec<(Option<String>, Value)>,
    /// Times that the client came back.
    pub returns: u32,
    /// Whether the stream has come to its end.
    pub is_over: bool,
}

impl Told {
    /// Tokens that the client has, as the last id tells.
    pub fn n_tokens(&self) -> u64 {
        let last = self.events.iter().rev().find_map(|(id, _)| id.as_deref());
        let digits = last.map(|id| id.split(|c: char| !c.is_ascii_digit()).next().unwrap_or_default());
        digits.and_then(|digits| digits.parse().ok()).unwrap_or(0)
    }

    /// All of it together.
    ///
    /// # Panics
    /// If an event came twice.
    pub fn said(&self) -> Said {
        let mut ids: Vec<_> = self.events.iter().filter_map(|(id, _)| id.as_deref()).collect();
        let n_ids = ids.len();
        ids.sort_unstable();
        ids.dedup();
        assert_eq!(ids.len(), n_ids, "an event came twice: {:#?}", self.events);
        let mut said = Said::default();
        for (_, event) in &self.events {
            said.add(event);
        }
        said
    }
}

/// A client that reads a streamed chat on a thread of its own.
pub struct Reader {
    told: Arc<Mutex<Told>>,
    thread: JoinHandle<Result<()>>,
}

fn lock(told: &Mutex<Told>) -> MutexGuard<'_, Told> {
    told.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Reader {
    /// Asks the first of the coordinators; with a key it goes on at the next one when its connection breaks.
    pub fn start(coordinators: &[&str], body: &Value, key: Option<&str>) -> Self {
        let urls: Vec<_> = coordinators.iter().map(|http| format!("{http}/v1/chat/completions")).collect();
        let mut body = body.clone();
        body["stream"] = true.into();
        body["stream_options"] = serde_json::json!({"include_usage": true});
        let (told, key) = (Arc::<Mutex<Told>>::default(), key.map(str::to_owned));
        let shared = Arc::clone(&told);
        let thread = thread::spawn(move || {
            let deadline = Instant::now() + PATIENCE;
            for url in urls.iter().cycle() {
                let broken = match read(url, &body, key.as_deref(), &shared) {
                    Ok(()) => break,
                    Err(broken) => broken,
                };
                if key.is_none() || Instant::now() > deadline {
                    return Err(broken);
                }
                lock(&shared).returns += 1;
                thread::sleep(RETURN_PAUSE);
            }
            lock(&shared).is_over = true;
            Ok(())
        });
        Self { told, thread }
    }

    /// What it was told so far.
    pub fn told(&self) -> Told {
        lock(&self.told).clone()
    }

    /// Waits for the end.
    ///
    /// # Panics
    /// If the stream did not come to its end.
    pub fn finish(self) -> Told {
        match self.thread.join() {
            Ok(Ok(())) => lock(&self.told).clone(),
            Ok(Err(error)) => panic!("a stream is lost: {error:#}; before: {:#?}", lock(&self.told)),
            Err(_) => panic!("the client failed"),
        }
    }
}

/// Reads a stream to its end. An error is a connection that broke, or a coordinator that is not ready.
fn read(url: &str, body: &Value, key: Option<&str>, told: &Mutex<Told>) -> Result<()> {
    let agent: ureq::Agent = ureq::Agent::config_builder().http_status_as_error(false).build().into();
    let mut call = agent.post(url).header("content-type", "application/json");
    if let Some(key) = key {
        call = call.header("idempotency-key", key);
        if let Some(id) = lock(told).events.iter().rev().find_map(|(id, _)| id.clone()) {
            call = call.header("last-event-id", id);
        }
    }
    let response = call.send(&serde_json::to_vec(body)?)?;
    let status = response.status().as_u16();
    let mut reader = BufReader::new(response.into_body().into_reader());
    if status != 200 {
        let mut text = String::new();
        reader.read_to_string(&mut text)?;
        assert_eq!(status, 503, "{text}");
        bail!("status {status}: {text}");
    }
    let (mut line, mut id) = (String::new(), None);
    loop {
        line.clear();
        if reader.read_line(&mut line)? == 0 {
            bail!("the stream ended without [DONE]");
        }
        if let Some(value) = line.trim_end().strip_prefix("id: ") {
            id = Some(value.to_owned());
        }
        let Some(data) = line.trim_end().strip_prefix("data: ") else { continue };
        if data == "[DONE]" {
            return Ok(());
        }
        let event = serde_json::from_str(data).with_context(|| format!("event {data:?}"))?;
        lock(told).events.push((id.take(), event));
    }
}
