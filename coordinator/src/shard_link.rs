//! Streams to shards: the `Cluster` service. One task per attached shard passes messages and watches its health.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use phalanx_cluster::id::ShardId;
use phalanx_proto::v1::{
    CoordinatorMessage, Heartbeat, Hello, ShardMessage, StatusRequest, StatusResponse, Welcome,
    cluster_server::{self, ClusterServer},
    coordinator_message::Message as ToShard,
    shard_message::Message as FromShard,
};
use ractor::{ActorRef, rpc::CallResult};
use tokio::{
    sync::{Notify, mpsc},
    time::{Instant, MissedTickBehavior, interval, timeout},
};
use tokio_stream::{Stream, StreamExt, wrappers::ReceiverStream};
use tonic::{Request, Response, Status, Streaming};

use crate::{
    group::{actor::GroupMsg, machine::Origin},
    leadership::{LeadershipView, View, standby},
    membership::actor::{GroupAddress, MembershipMsg},
};

/// Messages that wait for the network on one link. The scheduler has two plans under way at most, so a link that is
/// this far behind leads to a shard that no longer takes anything.
const QUEUE: usize = 256;
/// Longest wait for a new stream's Hello.
const HELLO_LIMIT: Duration = Duration::from_secs(10);
/// Longest wait for an answer of our own actors.
const CALL_LIMIT: Duration = Duration::from_secs(5);
/// A plan that starts hundreds of long sequences is larger than gRPC's usual 4 MB.
const MESSAGE_LIMIT: usize = 256 << 20;
/// Most characters of a shard's name.
const NAME_LIMIT: usize = 128;

/// Sends to one life of a shard. Clones lead to the same.
#[derive(Clone)]
pub struct LinkHandle {
    origin: Arc<Origin>,
    stream: u64,
    queue: mpsc::Sender<Result<CoordinatorMessage, Status>>,
    closing: Arc<Notify>,
}

impl LinkHandle {
    /// Where its messages come from.
    pub fn origin(&self) -> &Origin {
        &self.origin
    }

    /// Which stream: one life of a shard may open several, one after the other.
    pub fn stream(&self) -> u64 {
        self.stream
    }

    /// Queues a message; never waits. A link that can't take it is closed, which counts as the loss of the shard.
    pub fn send(&self, message: ToShard) {
        match self.queue.try_send(Ok(CoordinatorMessage { message: Some(message) })) {
            Ok(()) => {}
            Err(mpsc::error::TrySendError::Full(_)) => {
                tracing::warn!(shard = %self.origin.shard, "{QUEUE} messages wait on the link: the shard takes nothing");
                self.close();
            }
            // The stream broke; its task says so.
            Err(mpsc::error::TrySendError::Closed(_)) => {}
        }
    }

    /// Ends the stream.
    pub fn close(&self) {
        self.closing.notify_one();
    }
}

/// The `Cluster` service.
pub struct ClusterService {
    membership: ActorRef<MembershipMsg>,
    group: GroupAddress,
    heartbeat_timeout: Duration,
    leadership: LeadershipView,
    streams: AtomicU64,
}

impl ClusterService {
    /// As a gRPC service that reports to these actors, which live as long as this coordinator leads.
    pub fn server(
        membership: ActorRef<MembershipMsg>,
        group: GroupAddress,
        heartbeat_timeout: Duration,
        leadership: LeadershipView,
    ) -> ClusterServer<Self> {
        ClusterServer::new(Self { membership, group, heartbeat_timeout, leadership, streams: AtomicU64::new(1) })
            .max_decoding_message_size(MESSAGE_LIMIT)
            .max_encoding_message_size(MESSAGE_LIMIT)
    }

    /// Several in the time after which silence is a loss.
    fn heartbeat_interval(&self) -> Duration {
        (self.heartbeat_timeout / 5).clamp(Duration::from_millis(20), Duration::from_secs(1))
    }
}

fn check(hello: &Hello) -> Result<(), Status> {
    let id = &hello.shard_id;
    if id.is_empty() || id.chars().count() > NAME_LIMIT || id.chars().any(|c| c.is_control() || c == '/') {
        let reason =
            format!("shard id {id:?}: want 1 to {NAME_LIMIT} characters without slashes and control characters");
        return Err(Status::invalid_argument(reason));
    }
    let ours = env!("CARGO_PKG_VERSION");
    if hello.version != ours {
        let reason = format!("shard {id} is version {:?}, the coordinator {ours}: run one version", hello.version);
        return Err(Status::failed_precondition(reason));
    }
    Ok(())
}

#[tonic::async_trait]
impl cluster_server::Cluster for ClusterService {
    type AttachStream = ReceiverStream<Result<CoordinatorMessage, Status>>;

    async fn attach(&self, request: Request<Streaming<ShardMessage>>) -> Result<Response<Self::AttachStream>, Status> {
        let mut stream = request.into_inner();
        let first = timeout(HELLO_LIMIT, stream.message())
            .await
            .map_err(|_| Status::deadline_exceeded(format!("no Hello within {HELLO_LIMIT:?}")))??;
        let Some(FromShard::Hello(hello)) = first.and_then(|m| m.message) else {
            return Err(Status::invalid_argument("the first message must be Hello"));
        };
        check(&hello)?;

        let (queue, receiver) = mpsc::channel(QUEUE);
        let origin = Origin { shard: ShardId(hello.shard_id.clone()), incarnation: hello.incarnation };
        let stream_number = self.streams.fetch_add(1, Ordering::Relaxed);
        let closing = Arc::new(Notify::new());
        let link = LinkHandle { origin: Arc::new(origin), stream: stream_number, queue, closing };
        let interval = self.heartbeat_interval();
        let mut leadership = self.leadership.clone();
        let view = leadership.now();
        let Some(session) = view.session else { return Err(standby::not_leading(&view)) };
        link.send(ToShard::Welcome(welcome(&view, interval)));
        let task = LinkTask {
            link,
            group: self.group.clone(),
            interval,
            silence_limit: self.heartbeat_timeout,
            leadership,
            session: session.number,
        };
        // In a task of its own: a client that goes away now must still be detached.
        let attached = tokio::spawn(attach(self.membership.clone(), hello, task, stream));
        attached.await.map_err(|e| Status::internal(e.to_string()))??;
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn status(&self, _request: Request<StatusRequest>) -> Result<Response<StatusResponse>, Status> {
        match self.group.get().call(GroupMsg::Status, Some(CALL_LIMIT)).await {
            Ok(CallResult::Success(mut status)) => {
                let view = self.leadership.get();
                status.term = view.session.map_or(0, |s| s.term);
                status.coordinators = view.listed();
                Ok(Response::new(*status))
            }
            _ => Err(Status::unavailable("the group does not answer: it is being started again")),
        }
    }
}

fn welcome(view: &View, interval: Duration) -> Welcome {
    Welcome {
        heartbeat_ms: u32::try_from(interval.as_millis()).unwrap_or(u32::MAX),
        term: view.session.map_or(0, |s| s.term),
        coordinator_id: view.me.coordinator_id.clone(),
        coordinators: view.coordinators.iter().map(|c| c.grpc_address.clone()).collect(),
    }
}

/// Announces a shard and lets its task run, if it may stay.
async fn attach(
    membership: ActorRef<MembershipMsg>,
    hello: Hello,
    task: LinkTask,
    stream: Streaming<ShardMessage>,
) -> Result<(), Status> {
    let link = task.link.clone();
    let (from, number) = (link.origin().clone(), link.stream());
    let message = |reply| MembershipMsg::Attach { hello: Box::new(hello), link, reply };
    let answer = membership.call(message, Some(CALL_LIMIT)).await;
    let detached = move |cause| {
        if membership.cast(MembershipMsg::Detached { from, stream: number, cause }).is_err() {
            tracing::debug!("membership has ended before a link");
        }
    };
    match answer {
        Ok(CallResult::Success(Ok(()))) => {
            tokio::spawn(async move { detached(task.run(stream).await) });
            Ok(())
        }
        Ok(CallResult::Success(Err(refused))) => Err(Status::already_exists(refused)),
        _ => {
            // It may have been attached after we stopped waiting.
            detached("nobody waited for its admission".to_owned());
            Err(Status::unavailable("the coordinator is busy or ending"))
        }
    }
}

/// Receives from one shard until its stream ends.
struct LinkTask {
    link: LinkHandle,
    group: GroupAddress,
    interval: Duration,
    silence_limit: Duration,
    leadership: LeadershipView,
    /// The leadership in which the stream was opened: it ends with it.
    session: u64,
}

impl LinkTask {
    /// Returns why the stream ended.
    async fn run(self, mut stream: impl Stream<Item = Result<ShardMessage, Status>> + Unpin) -> String {
        let mut ticks = interval(self.interval);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut leadership = self.leadership.clone();
        let mut sequence = 0;
        let (mut heard, mut last_tick) = (Instant::now(), Instant::now());
        loop {
            tokio::select! {
                // What has arrived is read before silence is judged.
                biased;
                message = stream.next() => match message {
                    Some(Ok(message)) => {
                        heard = Instant::now();
                        if let Some(message) = message.message {
                            self.pass_on(message);
                        }
                    }
                    Some(Err(status)) => return format!("its stream broke: {}", status.message()),
                    None => return "it closed its stream".to_owned(),
                },
                () = self.link.closing.notified() => return "the coordinator closed its stream".to_owned(),
                view = leadership.changed() => match view.session {
                    Some(session) if session.number == self.session => {
                        self.link.send(ToShard::Welcome(welcome(&view, self.interval)));
                    }
                    _ => return "this coordinator no longer leads".to_owned(),
                },
                _ = ticks.tick() => {
                    // A coordinator that was held up itself can't tell who was silent.
                    let held_up = last_tick.elapsed() > 2 * self.interval;
                    last_tick = Instant::now();
                    if held_up {
                        heard = heard.max(last_tick - self.interval);
                    } else if heard.elapsed() > self.silence_limit {
                        return format!("it was silent for {} ms", heard.elapsed().as_millis());
                    }
                    sequence += 1;
                    self.link.send(ToShard::Heartbeat(Heartbeat { sequence, ..Heartbeat::default() }));
                }
            }
        }
    }

    fn pass_on(&self, message: FromShard) {
        if matches!(message, FromShard::Hello(_)) {
            tracing::warn!(shard = %self.link.origin.shard, "Hello came twice");
            return;
        }
        let message = GroupMsg::FromShard { from: Arc::clone(&self.link.origin), message: Box::new(message) };
        if self.group.get().cast(message).is_err() {
            // Its successor forms a new epoch: nothing of the old one matters.
            tracing::debug!(shard = %self.link.origin.shard, "a message has no group");
        }
    }
}
