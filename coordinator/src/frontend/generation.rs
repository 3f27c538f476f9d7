//! Requests on their way: submitted together, their events in one stream. Dropping it cancels them all, unless they have a
//! key: then it only stops reading them.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};

use futures::{FutureExt, Stream, StreamExt, future::BoxFuture, stream::SelectAll};
use phalanx_cluster::id::TokenId;
use phalanx_proto::v1::TokenScore;

use super::{
    FrontendState,
    error::ApiError,
    guarded::{Guarded, Watch},
    observe::Record,
    response_cache::{Caching, Looked, Recording, Replay},
    streams::run::{Attachment, Read},
};
use crate::{
    request::{Finish, Output, Request, RequestError, RequestEvent, Usage},
    scheduler::handle::{RequestStream, Submit},
    security::admission::Admission,
};

/// Several prompts being continued.
pub struct Generation {
    source: Source,
    n_prompts: usize,
    n: u32,
    usage: Usage,
    is_over: bool,
    /// What [`Generation::settle`] has read.
    first: Option<Progress>,
    /// Whose answer it is.
    record: Option<Arc<Record>>,
}

/// Events of all prompts as they come, with their prompt's index.
pub type PromptEvents = SelectAll<Guarded>;

enum Source {
    /// Straight from the scheduler.
    Submitted(PromptEvents),
    /// From the run under a key.
    Attached(Attachment),
}

/// Why a generation has no end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Broken {
    /// It failed.
    Failed(RequestError),
    /// Another connection has taken it over.
    Superseded,
}

impl From<Broken> for ApiError {
    fn from(broken: Broken) -> Self {
        match broken {
            Broken::Failed(error) => error.into(),
            Broken::Superseded => Self::superseded(),
        }
    }
}

/// Submits a request per prompt. If one is refused, none runs.
pub fn submit_each(
    submit: &dyn Submit,
    requests: Vec<Request>,
    admission: Option<Arc<Admission>>,
    caching: Option<&Caching>,
    watch: &Watch,
) -> Result<PromptEvents, RequestError> {
    let mut events = SelectAll::new();
    for (prompt_idx, request) in requests.into_iter().enumerate() {
        let (n_prompt, n) = (request.prompt.len(), request.n);
        let (source, recording) = match caching.and_then(|caching| caching.look(&request)) {
            Some(Looked::Known(replay)) => (Running::Again(replay), None),
            Some(Looked::New(recording)) => (Running::Anew(submit.submit(request)?), Some(recording)),
            None => (Running::Anew(submit.submit(request)?), None),
        };
        if let Some(admission) = &admission {
            admission.take(n_prompt);
        }
        let revoked = admission.as_ref().map(|admission| admission.revoked().boxed());
        let admission = admission.clone();
        let own = Events { prompt_idx, running: Some(source), recording, admission, revoked };
        events.push(Guarded::new(own, watch.clone(), prompt_idx, n_prompt, n));
    }
    Ok(events)
}

/// What happened next.
#[derive(Debug)]
pub enum Progress {
    /// Scores of a prompt's tokens from the second on.
    PromptScored {
        /// Which prompt.
        prompt_idx: usize,
        /// One per token but the first.
        scores: Vec<TokenScore>,
    },
    /// New tokens of a choice; `output.index` is its index among the choices of its prompt.
    Output {
        /// Which prompt.
        prompt_idx: usize,
        /// What is new.
        output: Output,
    },
    /// All choices of all prompts are complete.
    Finished(Usage),
}

impl FrontendState {
    /// Submits requests that all ask for the same number of choices. If one is refused, none runs.
    pub(super) fn submit_all(
        &self,
        requests: Vec<Request>,
        admission: Option<Arc<Admission>>,
        caching: Option<&Caching>,
        watch: &Watch,
    ) -> Result<Generation, ApiError> {
        let n = requests.first().map_or(1, |request| request.n);
        let n_prompts = requests.len();
        let source = Source::Submitted(submit_each(self.submit.as_ref(), requests, admission, caching, watch)?);
        Ok(Generation { source, n_prompts, n, usage: Usage::default(), is_over: false, first: None, record: None })
    }

    /// When a request that arrived then must be answered: the server's own deadline, or an earlier one.
    pub(super) fn deadline(&self, arrived_at: Instant, own: Option<Instant>) -> Option<Instant> {
        let limit = self.limits.deadline.and_then(|limit| arrived_at.checked_add(limit));
        own.into_iter().chain(limit).min()
    }
}

impl Generation {
    /// Reads the run under a key from its beginning.
    pub fn attached(attachment: Attachment, n_prompts: usize, n: u32) -> Self {
        let source = Source::Attached(attachment);
        Self { source, n_prompts, n, usage: Usage::default(), is_over: false, first: None, record: None }
    }

    /// Notes what it says in a request's record.
    #[must_use]
    pub fn recorded(self, record: Arc<Record>) -> Self {
        Self { record: Some(record), ..self }
    }

    /// Waits a little for the first thing that happens: a failure is told here, everything else by [`Generation::next`].
    pub async fn settle(&mut self, limit: Duration) -> Result<(), Broken> {
        if let Ok(Some(first)) = tokio::time::timeout(limit, self.next()).await {
            self.first = Some(first?);
        }
        Ok(())
    }

    /// Choices of all prompts.
    pub fn n_choices(&self) -> usize {
        self.n_prompts * self.n as usize
    }

    /// Index of a choice among all, counted as OpenAI does: prompt by prompt.
    pub fn choice_index(n: u32, prompt_idx: usize, output: &Output) -> usize {
        prompt_idx * n as usize + output.index as usize
    }

    /// Choices per prompt.
    pub fn n(&self) -> u32 {
        self.n
    }

    /// What happens next; `None` after [`Progress::Finished`] or an error. Can be dropped and called again.
    pub async fn next(&mut self) -> Option<Result<Progress, Broken>> {
        if let Some(first) = self.first.take() {
            return Some(Ok(first));
        }
        if self.is_over {
            return None;
        }
        loop {
            let read = match &mut self.source {
                Source::Submitted(events) => match events.next().await {
                    Some((prompt_idx, event)) => Read::Event(prompt_idx, event),
                    None => Read::Over,
                },
                Source::Attached(attachment) => attachment.next().await,
            };
            let (prompt_idx, event) = match read {
                Read::Event(prompt_idx, event) => (prompt_idx, event),
                Read::Over => {
                    self.is_over = true;
                    return Some(Ok(Progress::Finished(self.usage)));
                }
                Read::Superseded => {
                    self.is_over = true;
                    return Some(Err(Broken::Superseded));
                }
            };
            match event {
                RequestEvent::PromptScored(scores) => return Some(Ok(Progress::PromptScored { prompt_idx, scores })),
                RequestEvent::Output(output) => {
                    if let Some(account) = self.record.as_ref().and_then(|record| record.account()) {
                        let choice = Self::choice_index(self.n, prompt_idx, &output);
                        account.answered(choice, &output.text, output.token_ids.len());
                    }
                    return Some(Ok(Progress::Output { prompt_idx, output }));
                }
                RequestEvent::Finished(usage) => {
                    self.usage.prompt_tokens += usage.prompt_tokens;
                    self.usage.completion_tokens += usage.completion_tokens;
                    self.usage.cached_tokens += usage.cached_tokens;
                }
                RequestEvent::Failed(error) => {
                    self.is_over = true;
                    if let Source::Submitted(events) = &mut self.source {
                        events.clear();
                    }
                    return Some(Err(Broken::Failed(error)));
                }
            }
        }
    }

    /// Waits for everything.
    pub async fn collect(mut self) -> Result<Collected, Broken> {
        let mut all = Collected {
            choices: vec![Collection::default(); self.n_choices()],
            prompt_scores: vec![None; self.n_prompts],
            usage: Usage::default(),
            first_output_at: None,
        };
        while let Some(progress) = self.next().await {
            match progress? {
                Progress::PromptScored { prompt_idx, scores } => all.prompt_scores[prompt_idx] = Some(scores),
                Progress::Output { prompt_idx, output } => {
                    let index = Self::choice_index(self.n, prompt_idx, &output);
                    let unknown = || {
                        let reason = format!("the scheduler made a choice {}", output.index);
                        Broken::Failed(RequestError::Internal(reason))
                    };
                    let choice = all.choices.get_mut(index).ok_or_else(unknown)?;
                    all.first_output_at.get_or_insert_with(Instant::now);
                    choice.text.push_str(&output.text);
                    choice.pieces.push((output.text.len(), output.token_ids.len()));
                    choice.token_ids.extend(output.token_ids);
                    choice.scores.extend(output.scores);
                    choice.finish = output.finish.or(choice.finish.take());
                }
                Progress::Finished(usage) => all.usage = usage,
            }
        }
        Ok(all)
    }
}

/// A whole answer.
#[derive(Debug)]
pub struct Collected {
    /// Prompt by prompt.
    pub choices: Vec<Collection>,
    /// One per prompt, if asked for.
    pub prompt_scores: Vec<Option<Vec<TokenScore>>>,
    /// Of all together.
    pub usage: Usage,
    /// When the first of it was there.
    pub first_output_at: Option<Instant>,
}

impl Collected {
    /// Leaves of `best_of` choices per prompt the `n` whose tokens are the most probable on average, the best first. Among
    /// equals the earlier one.
    pub fn keep_best(&mut self, best_of: usize, n: usize) {
        let mean = |choice: &Collection| {
            let total: f64 = choice.scores.iter().map(|score| f64::from(score.logprob)).sum();
            if choice.scores.is_empty() { f64::NEG_INFINITY } else { total / choice.scores.len() as f64 }
        };
        let mut kept = Vec::new();
        let mut choices = std::mem::take(&mut self.choices).into_iter();
        loop {
            let mut of_prompt: Vec<_> = choices.by_ref().take(best_of.max(1)).collect();
            if of_prompt.is_empty() {
                break;
            }
            of_prompt.sort_by(|a, b| mean(b).total_cmp(&mean(a)));
            of_prompt.truncate(n);
            kept.extend(of_prompt);
        }
        self.choices = kept;
    }
}

/// A whole choice.
#[derive(Debug, Clone, Default)]
pub struct Collection {
    /// All text.
    pub text: String,
    /// Bytes of the text and tokens, as they came.
    pub pieces: Vec<(usize, usize)>,
    /// All tokens.
    pub token_ids: Vec<TokenId>,
    /// Of the tokens, if asked for.
    pub scores: Vec<TokenScore>,
    /// Why it ended.
    pub finish: Option<Finish>,
}

/// Events of one request, with its prompt's index. A stream that breaks off is a failure.
pub struct Events {
    prompt_idx: usize,
    running: Option<Running>,
    /// Where what happens is kept for others who ask the same.
    recording: Option<Recording>,
    /// What the request's key has given it, until its end.
    admission: Option<Arc<Admission>>,
    /// Ends if that is taken away.
    revoked: Option<BoxFuture<'static, ()>>,
}

/// Where a request's events come from.
enum Running {
    /// The scheduler.
    Anew(RequestStream),
    /// An earlier run.
    Again(Replay),
}

impl Running {
    fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Option<RequestEvent>> {
        match self {
            Self::Anew(stream) => stream.events.poll_recv(context),
            Self::Again(replay) => Poll::Ready(replay.next_event()),
        }
    }
}

impl Stream for Events {
    type Item = (usize, RequestEvent);

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        let Some(running) = &mut this.running else { return Poll::Ready(None) };
        let gone = || RequestEvent::Failed(RequestError::Internal("the scheduler is gone".to_owned()));
        let is_revoked = this.revoked.as_mut().is_some_and(|revoked| revoked.as_mut().poll(context).is_ready());
        let event = match is_revoked {
            true => RequestEvent::Failed(RequestError::Revoked),
            false => ready!(running.poll_next(context)).unwrap_or_else(gone),
        };
        if let (RequestEvent::Output(output), Some(admission)) = (&event, &this.admission) {
            admission.take(output.token_ids.len());
        }
        if let Some(recording) = &mut this.recording {
            recording.note(&event);
        }
        if matches!(event, RequestEvent::Finished(_) | RequestEvent::Failed(_)) {
            (this.running, this.admission, this.revoked) = (None, None, None);
        }
        Poll::Ready(Some((this.prompt_idx, event)))
    }
}

/// `finish_reason` as OpenAI has it.
pub fn finish_reason(finish: &Finish) -> &'static str {
    match finish {
        Finish::EndOfSequence | Finish::StopToken(_) | Finish::StopString(_) => "stop",
        Finish::Length => "length",
        Finish::ContentFilter => "content_filter",
    }
}

/// `stop_reason` as vLLM has it: the stop string or token that ended the choice.
#[derive(Debug, Clone, serde::Serialize)]
#[serde(untagged)]
pub enum StopReason {
    /// A string of `stop`.
    String(String),
    /// A token of `stop_token_ids`.
    Token(TokenId),
}

impl StopReason {
    /// None if something else ended it.
    pub fn of(finish: Option<&Finish>) -> Option<Self> {
        match finish? {
            Finish::StopString(text) => Some(Self::String(text.clone())),
            Finish::StopToken(id) => Some(Self::Token(*id)),
            Finish::EndOfSequence | Finish::Length | Finish::ContentFilter => None,
        }
    }
}

/// `usage` as OpenAI has it.
#[derive(Debug, Clone, Copy, serde::Serialize)]
pub struct UsageObject {
    prompt_tokens: u32,
    completion_tokens: u32,
    total_tokens: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_tokens_details: Option<PromptTokensDetails>,
    #[serde(skip_serializing_if = "Option::is_none")]
    completion_tokens_details: Option<CompletionTokensDetails>,
}

impl UsageObject {
    /// With the tokens of thoughts.
    #[must_use]
    pub fn with_reasoning(self, reasoning_tokens: u32) -> Self {
        Self { completion_tokens_details: Some(CompletionTokensDetails { reasoning_tokens }), ..self }
    }

    /// While it is not known yet what came from the prefix cache.
    pub fn without_details(usage: Usage) -> Self {
        Self { prompt_tokens_details: None, ..usage.into() }
    }
}

#[derive(Debug, Clone, Copy, serde::Serialize)]
struct PromptTokensDetails {
    cached_tokens: u32,
}

#[derive(Debug, Clone, Copy, serde::Serialize)]
struct CompletionTokensDetails {
    reasoning_tokens: u32,
}

impl From<Usage> for UsageObject {
    fn from(usage: Usage) -> Self {
        Self {
            prompt_tokens: usage.prompt_tokens,
            completion_tokens: usage.completion_tokens,
            total_tokens: usage.prompt_tokens.saturating_add(usage.completion_tokens),
            prompt_tokens_details: Some(PromptTokensDetails { cached_tokens: usage.cached_tokens }),
            completion_tokens_details: None,
        }
    }
}

/// Seconds since 1970.
pub fn unix_seconds() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |since| since.as_secs())
}
