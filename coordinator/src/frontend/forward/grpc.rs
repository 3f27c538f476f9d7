//! The gRPC side of the gateway: a call goes on with the next leader, behind the tokens that its client has.

use std::{
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use futures::{Stream, StreamExt, stream::BoxStream};
use phalanx_proto::{
    dial::Dialer,
    v1::{
        FinishReason, GenerateRequest, GenerateResponse, inference_client::InferenceClient, inference_server::Inference,
    },
};
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, sleep, timeout_at},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{
    Code, Request, Response, Status,
    metadata::{MetadataMap, MetadataValue},
    transport::Channel,
};

use super::{
    Busy, Finder, Local,
    finder::{Over, Target},
    relay::PATIENCE,
    upstream::{FORWARDED, NO_LEADER},
};
use crate::{frontend::grpc::InferenceService, leadership::LeadershipView};

/// Metadata by which a coordinator that passes a call on names it.
const RESUME_KEY: &str = "x-phalanx-resume-key";
/// Longest wait for a connection to the leader.
const CONNECT_LIMIT: Duration = Duration::from_secs(2);
/// A host that is gone says nothing: pings notice.
const PING_INTERVAL: Duration = Duration::from_secs(1);
const PING_LIMIT: Duration = Duration::from_secs(2);
/// Pause before the same leader is asked again.
const RETRY_PAUSE: Duration = Duration::from_millis(100);
/// Messages that wait for a slow client.
const QUEUE: usize = 64;

type Answer = BoxStream<'static, Result<GenerateResponse, Status>>;

/// The `Inference` service of leaders and standbys. Clones are the same.
#[derive(Clone)]
pub struct InferenceGateway {
    dialer: Dialer,
    finder: Finder<Arc<InferenceService>>,
    local: watch::Sender<Option<Local<Arc<InferenceService>>>>,
    /// The connection to the last leader, and which certificates it is made with.
    channel: Arc<Mutex<Option<(String, u64, Channel)>>>,
    is_shared: bool,
    n_busy: watch::Sender<usize>,
}

impl InferenceGateway {
    /// As a standby's. `is_shared` says that others may lead.
    pub fn new(dialer: Dialer, view: LeadershipView, is_shared: bool) -> Self {
        let (local, receiver) = watch::channel(None);
        let finder = Finder::new(view, receiver);
        let n_busy = watch::Sender::new(0);
        Self { dialer, finder, local, channel: Arc::default(), is_shared, n_busy }
    }

    /// This process's service while it leads.
    pub fn set(&self, local: Option<Local<Arc<InferenceService>>>) {
        self.local.send_replace(local);
    }

    /// Waits until no call that may change its server is under way.
    pub async fn idle(&self) {
        // The sender is right here: this can't fail.
        let _ = self.n_busy.subscribe().wait_for(|n| *n == 0).await;
    }

    fn client(&self, address: &str) -> Result<InferenceClient<Channel>, Status> {
        let generation = self.dialer.generation();
        let mut kept = self.channel.lock().unwrap_or_else(PoisonError::into_inner);
        let channel = match &*kept {
            Some((at, of, channel)) if at == address && *of == generation => channel.clone(),
            _ => {
                let endpoint = self
                    .dialer
                    .endpoint(address)
                    .map_err(|e| Status::internal(format!("the leader's address {address}: {e}")))?
                    .connect_timeout(CONNECT_LIMIT)
                    .tcp_nodelay(true)
                    .http2_keep_alive_interval(PING_INTERVAL)
                    .keep_alive_timeout(PING_LIMIT);
                let channel = endpoint.connect_lazy();
                *kept = Some((address.to_owned(), generation, channel.clone()));
                channel
            }
        };
        Ok(InferenceClient::new(channel).max_decoding_message_size(usize::MAX).max_encoding_message_size(usize::MAX))
    }

    /// Asks whoever leads, once.
    async fn ask(&self, call: &Call) -> Result<(Answer, Over), Status> {
        let (target, mut over) = self.finder.find().await;
        let answer = async {
            match target {
                Target::Here(local) => {
                    Ok::<Answer, Status>(local.endpoints.generate(call.request()).await?.into_inner().boxed())
                }
                Target::There(leader) => {
                    let mut request = call.request();
                    request.metadata_mut().insert(FORWARDED, MetadataValue::from_static("1"));
                    let mut client = self.client(&leader.record.grpc_address)?;
                    Ok(client.generate(request).await?.into_inner().boxed())
                }
            }
        };
        let answer = tokio::select! {
            biased;
            () = &mut over => return Err(Status::unavailable("the leadership ended")),
            answer = answer => answer?,
        };
        Ok((answer, over))
    }

    /// Asks until somebody answers, or refuses for a reason that lies in the call.
    async fn ask_until(&self, call: &Call) -> Result<(Answer, Over), Status> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match timeout_at(deadline, self.ask(call)).await {
                Err(_) => return Err(Status::unavailable("no coordinator leads")),
                Ok(Err(status)) if can_be_mended(&status, call.is_accepted) => {
                    tracing::debug!(%status, "asking for a leader again");
                }
                Ok(answer) => return answer,
            }
            sleep(RETRY_PAUSE).await;
        }
    }
}

/// Whether another attempt may fare better: its server is gone, or leads no more. What was accepted once is not refused
/// because the next leader is still busy or without shards.
fn can_be_mended(status: &Status, is_accepted: bool) -> bool {
    // Only what went wrong on the way has a cause; what a server says has none.
    let is_transport = std::error::Error::source(status).is_some();
    match status.code() {
        _ if is_transport => true,
        Code::FailedPrecondition => status.metadata().contains_key(NO_LEADER),
        Code::Unavailable => true,
        Code::ResourceExhausted => is_accepted,
        _ => false,
    }
}

/// A call that can be made several times.
struct Call {
    metadata: MetadataMap,
    message: GenerateRequest,
    /// What the client has.
    progress: Progress,
    is_accepted: bool,
}

impl Call {
    fn request(&self) -> Request<GenerateRequest> {
        let mut message = self.message.clone();
        message.resume_from.clone_from(&self.progress.tokens);
        Request::from_parts(self.metadata.clone(), tonic::Extensions::default(), message)
    }
}

/// What a client has of an answer.
#[derive(Debug, Default, PartialEq)]
struct Progress {
    /// Tokens of each choice.
    tokens: Vec<u32>,
    finished: Vec<bool>,
    has_prompt_scores: bool,
    is_complete: bool,
}

impl Progress {
    /// What of a message is new to the client.
    fn take(&mut self, mut message: GenerateResponse) -> Option<GenerateResponse> {
        if !message.prompt_scores.is_empty() && std::mem::replace(&mut self.has_prompt_scores, true) {
            message.prompt_scores.clear();
            if message.token_ids.is_empty() && message.text.is_empty() && message.usage.is_none() {
                return None;
            }
        }
        if message.usage.is_some() {
            self.is_complete = true;
            return Some(message);
        }
        let index = message.index as usize;
        if self.tokens.len() <= index {
            self.tokens.resize(index + 1, 0);
            self.finished.resize(index + 1, false);
        }
        if self.finished.get(index).copied().unwrap_or(false) {
            return None;
        }
        let n_new = u32::try_from(message.token_ids.len()).unwrap_or(u32::MAX);
        // Servers without positions count from nothing: then this is all there is.
        self.tokens[index] = message.position.max(self.tokens[index].saturating_add(n_new));
        if message.finish_reason() != FinishReason::Unspecified {
            self.finished.resize(self.tokens.len(), false);
            self.finished[index] = true;
        }
        Some(message)
    }
}

#[tonic::async_trait]
impl Inference for InferenceGateway {
    type GenerateStream = Pin<Box<dyn Stream<Item = Result<GenerateResponse, Status>> + Send>>;

    async fn generate(&self, request: Request<GenerateRequest>) -> Result<Response<Self::GenerateStream>, Status> {
        let is_forwarded = request.metadata().contains_key(FORWARDED);
        match self.finder.here() {
            Some(local) if !self.is_shared => return local.endpoints.generate(request).await,
            Some(local) if is_forwarded => {
                let mut end = self.finder.end_of(local.session);
                let gone = || {
                    let mut status = Status::failed_precondition("this coordinator no longer leads");
                    status.metadata_mut().insert(NO_LEADER, MetadataValue::from_static("1"));
                    status
                };
                let answer = tokio::select! {
                    biased;
                    () = &mut end => return Err(gone()),
                    answer = local.endpoints.generate(request) => answer?.into_inner(),
                };
                // Nothing that it says after its leadership counts.
                let end = futures::stream::once(end).map(move |()| Err(gone()));
                return Ok(Response::new(Box::pin(until_first_error(answer, end))));
            }
            None if is_forwarded => {
                let mut status = Status::failed_precondition("this coordinator does not lead");
                status.metadata_mut().insert(NO_LEADER, MetadataValue::from_static("1"));
                return Err(status);
            }
            _ => {}
        }
        let (mut metadata, _, message) = request.into_parts();
        if self.is_shared && message.resume_key.is_empty() {
            let key = MetadataValue::try_from(uuid::Uuid::new_v4().to_string());
            metadata.insert(RESUME_KEY, key.map_err(|e| Status::internal(e.to_string()))?);
        }
        let progress = Progress { tokens: message.resume_from.clone(), ..Progress::default() };
        let mut call = Call { metadata, message, progress, is_accepted: false };
        let busy = Busy::new(&self.n_busy);
        let first = self.ask_until(&call).await?;
        call.is_accepted = true;
        let (client, messages) = mpsc::channel(QUEUE);
        tokio::spawn(relay(self.clone(), call, first, client, busy));
        Ok(Response::new(Box::pin(ReceiverStream::new(messages))))
    }
}

/// One stream until the other one's word, which is an error and the last.
fn until_first_error<T: Send + 'static>(
    answer: impl Stream<Item = Result<T, Status>> + Send + 'static,
    end: impl Stream<Item = Result<T, Status>> + Send + 'static,
) -> impl Stream<Item = Result<T, Status>> + Send {
    futures::stream::unfold(Some((answer.boxed(), end.boxed())), |streams| async {
        let (mut answer, mut end) = streams?;
        tokio::select! {
            biased;
            error = end.next() => error.map(|e| (e, None)),
            next = answer.next() => next.map(|n| (n, Some((answer, end)))),
        }
    })
}

/// Passes one answer on, from one leader after the other.
async fn relay(
    gateway: InferenceGateway,
    mut call: Call,
    (mut answer, mut over): (Answer, Over),
    client: mpsc::Sender<Result<GenerateResponse, Status>>,
    _busy: Busy,
) {
    loop {
        let reason = loop {
            let next = tokio::select! {
                biased;
                () = &mut over => break "its leadership ended".to_owned(),
                next = answer.next() => next,
                () = client.closed() => return,
            };
            match next {
                Some(Ok(message)) => {
                    if let Some(message) = call.progress.take(message)
                        && client.send(Ok(message)).await.is_err()
                    {
                        return;
                    }
                }
                None => return,
                Some(Err(status)) if !call.progress.is_complete && can_be_mended(&status, true) => {
                    break status.message().to_owned();
                }
                Some(Err(status)) => {
                    // A client that has gone needs no reason.
                    let _ = client.send(Err(status)).await;
                    return;
                }
            }
        };
        if call.progress.is_complete {
            return;
        }
        tracing::info!(reason, "a call broke off: going on with the next leader");
        let asked = tokio::select! {
            asked = gateway.ask_until(&call) => asked,
            () = client.closed() => return,
        };
        (answer, over) = match asked {
            Ok(next) => next,
            Err(status) => {
                let _ = client.send(Err(status)).await;
                return;
            }
        };
    }
}

#[cfg(test)]
mod tests {
    use phalanx_proto::v1::{TokenScore, Usage};

    use super::*;

    fn tokens(index: u32, ids: &[u32], position: u32) -> GenerateResponse {
        GenerateResponse { index, token_ids: ids.to_vec(), position, ..GenerateResponse::default() }
    }

    #[test]
    fn a_client_hears_everything_once() {
        let mut progress = Progress::default();
        let scores = GenerateResponse { prompt_scores: vec![TokenScore::default()], ..GenerateResponse::default() };
        assert_eq!(progress.take(scores.clone()).unwrap().prompt_scores.len(), 1);
        assert!(progress.take(tokens(1, &[5, 6], 2)).is_some());
        assert!(progress.take(tokens(0, &[7], 1)).is_some());
        assert_eq!(progress.tokens, [1, 2]);
        let end = GenerateResponse { finish_reason: FinishReason::Stop.into(), ..tokens(1, &[], 2) };
        assert!(progress.take(end.clone()).is_some());
        // From the next leader.
        assert_eq!(progress.take(scores), None);
        assert_eq!(progress.take(end), None);
        assert!(progress.take(tokens(0, &[8], 2)).is_some());
        assert_eq!((progress.tokens.as_slice(), progress.is_complete), (&[2, 2][..], false));
        let last = GenerateResponse { usage: Some(Usage::default()), ..GenerateResponse::default() };
        assert!(progress.take(last).is_some());
        assert!(progress.is_complete);
    }

    #[test]
    fn what_lies_in_the_call_is_not_asked_again() {
        assert!(can_be_mended(&Status::unavailable("no shards"), false));
        assert!(!can_be_mended(&Status::invalid_argument("temperature"), true));
        assert!(!can_be_mended(&Status::failed_precondition("x"), true));
        assert!(!can_be_mended(&Status::resource_exhausted("busy"), false));
        assert!(can_be_mended(&Status::resource_exhausted("busy"), true));
        let broken = Status::from_error(Box::new(std::io::Error::other("reset")));
        assert!(can_be_mended(&broken, false), "{broken:?}");
    }
}
