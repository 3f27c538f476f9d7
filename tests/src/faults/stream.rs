//! One client: makes its request, notes every token and when it came, and returns after a broken connection.

use std::{
    io::{BufRead, BufReader, Read},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, bail};
use phalanx_proto::v1::{FinishReason, GenerateRequest, Usage, inference_client::InferenceClient};
use serde_json::Value;

use super::load::{Call, Job};

/// Longest that a stream may take in all. Reached only by one that hangs.
pub const STREAM_LIMIT: Duration = Duration::from_secs(240);
/// Pause before a client that lost its connection comes back.
const RETURN_PAUSE: Duration = Duration::from_millis(50);

/// What all streams of a round have come to.
#[derive(Debug, Default)]
pub struct Progress {
    /// Tokens that arrived.
    pub tokens: AtomicU64,
    /// Streams with a token.
    pub begun: AtomicU64,
    /// Clients whose last stream ended, well or not.
    pub ended: AtomicU64,
}

/// Where a client calls, and how it behaves.
#[derive(Debug, Clone)]
pub struct Client {
    /// `http://HOST:PORT` of the HTTP APIs; a client whose connection breaks goes round.
    pub http: Vec<String>,
    /// `http://HOST:PORT` of gRPC, in the same order.
    pub grpc: Vec<String>,
    /// Idempotency key; without one, a broken connection is a lost request.
    pub key: Option<String>,
    /// Set: the client vanishes.
    pub vanish: Arc<AtomicBool>,
    /// Shared with all streams of the round.
    pub progress: Arc<Progress>,
}

/// One choice as it arrived.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Choice {
    /// Tokens.
    pub tokens: Vec<u32>,
    /// Log-probabilities of the tokens, by their bits.
    pub scores: Vec<u64>,
    /// Text.
    pub text: String,
    /// Why it ended; empty if it did not.
    pub finish: String,
}

/// One stream as it arrived.
#[derive(Debug, Clone)]
pub struct Record {
    /// Choices.
    pub choices: Vec<Choice>,
    /// Prompt and completion tokens.
    pub usage: Option<(u64, u64)>,
    /// When it was asked for.
    pub started: Instant,
    /// When tokens came.
    pub arrivals: Vec<Instant>,
    /// Times that the client came back after a broken connection.
    pub returns: u32,
    /// Why it is lost.
    pub error: Option<String>,
    /// The client vanished.
    pub vanished: bool,
}

impl Record {
    fn new(n_choices: usize) -> Self {
        Self {
            choices: vec![Choice::default(); n_choices],
            usage: None,
            started: Instant::now(),
            arrivals: Vec::new(),
            returns: 0,
            error: None,
            vanished: false,
        }
    }

    /// Gaps between two tokens that ended after `moment`, and when.
    pub fn gaps(&self, moment: Instant) -> impl Iterator<Item = (Duration, Instant)> {
        self.arrivals.windows(2).filter(move |w| w[1] >= moment).map(|w| (w[1] - w[0], w[1]))
    }

    /// The largest of them.
    pub fn longest_gap(&self, moment: Instant) -> Duration {
        self.gaps(moment).map(|(gap, _)| gap).max().unwrap_or_default()
    }

    /// Tokens that it had at that moment, prompt and answer, if it ran then.
    pub fn held_at(&self, moment: Instant) -> usize {
        let n_before = self.arrivals.iter().filter(|at| **at < moment).count();
        let prompt = self.usage.map_or(0, |(prompt, _)| usize::try_from(prompt).unwrap_or(0));
        if n_before < self.arrivals.len() { prompt + n_before } else { 0 }
    }

    /// From the request to its first token.
    pub fn first_token(&self) -> Option<Duration> {
        Some(*self.arrivals.first()? - self.started)
    }

    fn arrived(&mut self, progress: &Progress, n_tokens: usize) {
        if n_tokens == 0 {
            return;
        }
        if self.arrivals.is_empty() {
            progress.begun.fetch_add(1, Ordering::Relaxed);
        }
        self.arrivals.push(Instant::now());
        progress.tokens.fetch_add(n_tokens as u64, Ordering::Relaxed);
    }
}

/// Runs a request to its end.
pub async fn run(client: Client, job: Job) -> Record {
    match job.call {
        Call::Grpc(request) => grpc(&client, *request, job.n).await,
        Call::Http { path, body } => {
            let outcome = tokio::task::spawn_blocking(move || http(&client, path, &body, job.n)).await;
            outcome.unwrap_or_else(|error| {
                let mut record = Record::new(job.n);
                record.error = Some(format!("the client failed: {error}"));
                record
            })
        }
    }
}

async fn grpc(client: &Client, request: GenerateRequest, n: usize) -> Record {
    let mut record = Record::new(n);
    let outcome = tokio::time::timeout(STREAM_LIMIT, grpc_calls(client, request, &mut record)).await;
    match outcome {
        Ok(Ok(())) => {}
        Ok(Err(error)) => record.error = Some(format!("{error:#}")),
        Err(_) => record.error = Some(format!("not ended after {} s", STREAM_LIMIT.as_secs())),
    }
    record
}

/// Calls until the stream has ended.
async fn grpc_calls(client: &Client, mut request: GenerateRequest, record: &mut Record) -> Result<()> {
    request.resume_key = client.key.clone().unwrap_or_default();
    for address in client.grpc.iter().cycle() {
        match grpc_stream(client, address, request.clone(), record).await {
            Err(Broken::Refused(_)) if client.key.is_some() => {
                record.returns += 1;
                request.resume_from = record.choices.iter().map(|c| c.tokens.len() as u32).collect();
                tokio::time::sleep(RETURN_PAUSE).await;
            }
            Err(Broken::Refused(error) | Broken::Failed(error)) => return Err(error),
            Ok(()) => return Ok(()),
        }
    }
    bail!("there is no coordinator to call")
}

/// What a call's end means: a connection that breaks has a cause, what a server says has none.
fn broken(status: tonic::Status) -> Broken {
    let is_connection = std::error::Error::source(&status).is_some() || status.code() == tonic::Code::Unavailable;
    if is_connection { Broken::Refused(status.into()) } else { Broken::Failed(status.into()) }
}

async fn grpc_stream(
    client: &Client,
    address: &str,
    request: GenerateRequest,
    record: &mut Record,
) -> Result<(), Broken> {
    let connected = InferenceClient::connect(address.to_owned()).await.context("connect");
    let mut inference = connected.map_err(Broken::Refused)?;
    let mut stream = inference.generate(request).await.map_err(broken)?.into_inner();
    while let Some(part) = stream.message().await.map_err(broken)? {
        if client.vanish.load(Ordering::Relaxed) {
            record.vanished = true;
            return Ok(());
        }
        let finish = part.finish_reason();
        let choice = record.choices.get_mut(part.index as usize).context("choice index out of range");
        let choice = choice.map_err(Broken::Failed)?;
        choice.text.push_str(&part.text);
        choice.tokens.extend(&part.token_ids);
        choice.scores.extend(part.scores.iter().map(|s| u64::from(s.logprob.to_bits())));
        if finish != FinishReason::Unspecified {
            choice.finish = finish.as_str_name().to_owned();
        }
        if let Some(Usage { prompt_tokens, completion_tokens, .. }) = part.usage {
            record.usage = Some((prompt_tokens.into(), completion_tokens.into()));
        }
        record.arrived(&client.progress, part.token_ids.len());
    }
    match record.usage {
        Some(_) => Ok(()),
        None => Err(Broken::Refused(anyhow!("the stream ended without usage"))),
    }
}

fn http(client: &Client, path: &str, body: &Value, n: usize) -> Record {
    let mut record = Record::new(n);
    let mut last_event = None;
    let mut address = 0;
    loop {
        let url = format!("{}{path}", client.http[address % client.http.len()]);
        match http_stream(client, &url, body, &mut record, &mut last_event) {
            Ok(()) => break,
            Err(Broken::Refused(error)) if client.key.is_none() || record.started.elapsed() > STREAM_LIMIT => {
                record.error = Some(format!("{error:#}"));
                break;
            }
            Err(Broken::Refused(_)) => {
                record.returns += 1;
                address += 1;
                thread::sleep(RETURN_PAUSE);
            }
            Err(Broken::Failed(error)) => {
                record.error = Some(format!("{error:#}"));
                break;
            }
        }
    }
    record
}

/// Why a stream did not reach its end.
enum Broken {
    /// The connection: a client with a key may come back.
    Refused(anyhow::Error),
    /// The server said that it failed.
    Failed(anyhow::Error),
}

fn http_stream(
    client: &Client,
    url: &str,
    body: &Value,
    record: &mut Record,
    last_event: &mut Option<String>,
) -> Result<(), Broken> {
    let left = STREAM_LIMIT.saturating_sub(record.started.elapsed()).max(Duration::from_secs(1));
    let config = ureq::Agent::config_builder().http_status_as_error(false).timeout_global(Some(left));
    let agent: ureq::Agent = config.build().into();
    let mut call = agent.post(url).header("content-type", "application/json");
    if let Some(key) = &client.key {
        call = call.header("idempotency-key", key);
    }
    if let Some(id) = last_event.as_deref() {
        call = call.header("last-event-id", id);
    }
    let body = serde_json::to_vec(body).map_err(|e| Broken::Failed(e.into()))?;
    let response = call.send(&body).map_err(|e| Broken::Refused(e.into()))?;
    let status = response.status().as_u16();
    let mut reader = BufReader::new(response.into_body().into_reader());
    if status != 200 {
        let mut text = String::new();
        let _ = reader.read_to_string(&mut text);
        let error = anyhow!("status {status}: {text}");
        // A coordinator that does not lead yet, or is about to end.
        return Err(if status == 503 { Broken::Refused(error) } else { Broken::Failed(error) });
    }
    let mut line = String::new();
    let mut id = None;
    loop {
        line.clear();
        match reader.read_line(&mut line) {
            Ok(0) => return Err(Broken::Refused(anyhow!("the stream ended without [DONE]"))),
            Ok(_) => {}
            Err(error) => return Err(Broken::Refused(error.into())),
        }
        if client.vanish.load(Ordering::Relaxed) {
            record.vanished = true;
            return Ok(());
        }
        if let Some(value) = line.trim_end().strip_prefix("id: ") {
            id = Some(value.to_owned());
            continue;
        }
        let Some(data) = line.trim_end().strip_prefix("data: ") else { continue };
        if data == "[DONE]" {
            return Ok(());
        }
        let event: Value = serde_json::from_str(data).map_err(|e| Broken::Failed(e.into()))?;
        take(record, &client.progress, &event).map_err(Broken::Failed)?;
        // Counts from the moment at which the client has the event.
        if id.is_some() {
            *last_event = id.take();
        }
    }
}

/// Takes an event of either endpoint.
fn take(record: &mut Record, progress: &Progress, event: &Value) -> Result<()> {
    if let Some(error) = event.get("error") {
        bail!("an error in the stream: {error}");
    }
    if let Some(usage) = event.get("usage").filter(|u| !u.is_null()) {
        let count = |name: &str| usage[name].as_u64().with_context(|| format!("usage without {name}"));
        record.usage = Some((count("prompt_tokens")?, count("completion_tokens")?));
    }
    let mut n_tokens = 0;
    for part in event["choices"].as_array().into_iter().flatten() {
        let index = part["index"].as_u64().and_then(|i| usize::try_from(i).ok()).context("a choice without index")?;
        let choice = record.choices.get_mut(index).context("choice index out of range")?;
        let text = part["text"].as_str().or_else(|| part["delta"]["content"].as_str());
        choice.text.push_str(text.unwrap_or_default());
        let tokens = part["token_ids"].as_array().into_iter().flatten().filter_map(Value::as_u64);
        let before = choice.tokens.len();
        choice.tokens.extend(tokens.filter_map(|t| u32::try_from(t).ok()));
        n_tokens += choice.tokens.len() - before;
        let logprobs = &part["logprobs"];
        let columns = logprobs["token_logprobs"].as_array().into_iter().flatten().filter_map(Value::as_f64);
        let entries = logprobs["content"].as_array().into_iter().flatten().filter_map(|e| e["logprob"].as_f64());
        choice.scores.extend(columns.chain(entries).map(f64::to_bits));
        if let Some(finish) = part["finish_reason"].as_str() {
            choice.finish = finish.to_owned();
        }
    }
    record.arrived(progress, n_tokens);
    Ok(())
}
