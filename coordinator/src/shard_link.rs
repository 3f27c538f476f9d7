//! Streams to shards: the `Cluster` service. One task per attached shard passes messages and watches its health.

mod silence;

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

use self::silence::Silence;
use crate::{
    admin::status::StatusSource,
    config::JoinToken,
    group::{
        actor::GroupMsg,
        machine::{Cause, Origin},
    },
    leadership::{
        LeadershipView, View,
        shards::{ShardRecord, ShardRegistry},
        standby,
    },
    membership::{actor::MembershipMsg, groups::Groups},
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
    host: Arc<str>,
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

    /// The address that it comes from, without port; empty if that is not known.
    pub fn host(&self) -> &str {
        &self.host
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
    groups: Groups,
    status: StatusSource,
    heartbeat_timeout: Duration,
    leadership: LeadershipView,
    registry: ShardRegistry,
    join_token: Option<JoinToken>,
    streams: AtomicU64,
}

/// Several in the time after which silence is a loss.
fn heartbeat_interval(timeout: Duration) -> Duration {
    (timeout / 10).clamp(Duration::from_millis(20), Duration::from_secs(1))
}

/// When a shard that should give signs of life counts as silent, if somebody must be to blame.
pub fn silent_after(heartbeat_timeout: Duration) -> Duration {
    (4 * heartbeat_interval(heartbeat_timeout)).min(heartbeat_timeout)
}

impl ClusterService {
    /// As a gRPC service that reports to these actors, which live as long as this coordinator leads, and to the registry of
    /// shards. With a `join_token`, only shards that know it are admitted.
    pub fn server(
        membership: ActorRef<MembershipMsg>,
        groups: Groups,
        status: StatusSource,
        heartbeat_timeout: Duration,
        leadership: LeadershipView,
        registry: ShardRegistry,
        join_token: Option<JoinToken>,
    ) -> ClusterServer<Self> {
        let streams = AtomicU64::new(1);
        ClusterServer::new(Self {
            membership,
            groups,
            status,
            heartbeat_timeout,
            leadership,
            registry,
            join_token,
            streams,
        })
        .max_decoding_message_size(MESSAGE_LIMIT)
        .max_encoding_message_size(MESSAGE_LIMIT)
    }
}

fn check(hello: &Hello, join_token: Option<&JoinToken>) -> Result<(), Status> {
    if join_token.is_some_and(|token| !token.admits(&hello.join_token)) {
        // Nothing of what a stranger says is repeated.
        let reason = "the join token is missing or wrong: give the shard the coordinator's --join-token-file";
        return Err(Status::unauthenticated(reason));
    }
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
        let host: Arc<str> =
            request.remote_addr().map_or_else(String::new, |a| a.ip().to_canonical().to_string()).into();
        let mut stream = request.into_inner();
        let first = timeout(HELLO_LIMIT, stream.message())
            .await
            .map_err(|_| Status::deadline_exceeded(format!("no Hello within {HELLO_LIMIT:?}")))??;
        let Some(FromShard::Hello(hello)) = first.and_then(|m| m.message) else {
            return Err(Status::invalid_argument("the first message must be Hello"));
        };
        check(&hello, self.join_token.as_ref())?;

        let (queue, receiver) = mpsc::channel(QUEUE);
        let origin = Origin { shard: ShardId(hello.shard_id.clone()), incarnation: hello.incarnation };
        let stream_number = self.streams.fetch_add(1, Ordering::Relaxed);
        let closing = Arc::new(Notify::new());
        let link = LinkHandle { origin: Arc::new(origin), stream: stream_number, host, queue, closing };
        let interval = heartbeat_interval(self.heartbeat_timeout);
        let mut leadership = self.leadership.clone();
        let view = leadership.now();
        let Some(session) = view.session else { return Err(standby::not_leading(&view)) };
        link.send(ToShard::Welcome(welcome(&view, interval)));
        let record = ShardRecord::new(&hello, link.host(), &view);
        let task = LinkTask {
            link,
            groups: self.groups.clone(),
            interval,
            silence_limit: self.heartbeat_timeout,
            leadership,
            session: session.number,
        };
        // In a task of its own: a client that goes away now must still be detached.
        let registered = (self.registry.clone(), record);
        let attached = tokio::spawn(attach(self.membership.clone(), registered, hello, task, stream));
        attached.await.map_err(|e| Status::internal(e.to_string()))??;
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn status(&self, _request: Request<StatusRequest>) -> Result<Response<StatusResponse>, Status> {
        Ok(Response::new(self.status.status().await?))
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
    (registry, record): (ShardRegistry, ShardRecord),
    hello: Hello,
    task: LinkTask,
    stream: Streaming<ShardMessage>,
) -> Result<(), Status> {
    let link = task.link.clone();
    let (from, number) = (link.origin().clone(), link.stream());
    let message = |reply| MembershipMsg::Attach { hello: Box::new(hello), link, reply };
    let answer = membership.call(message, Some(CALL_LIMIT)).await;
    let detached = move |(cause, reason)| {
        if membership.cast(MembershipMsg::Detached { from, stream: number, cause, reason }).is_err() {
            tracing::debug!("membership has ended before a link");
        }
    };
    match answer {
        Ok(CallResult::Success(Ok(()))) => {
            let (session, shard) = (task.session, record.shard_id.clone());
            registry.attached(session, number, record);
            tokio::spawn(async move {
                let ended = task.run(stream).await;
                registry.detached(session, number, &shard);
                detached(ended);
            });
            Ok(())
        }
        Ok(CallResult::Success(Err(refused))) => Err(Status::already_exists(refused)),
        _ => {
            // It may have been attached after we stopped waiting.
            detached((Cause::Lost, "nobody waited for its admission".to_owned()));
            Err(Status::unavailable("the coordinator is busy or ending"))
        }
    }
}

/// Receives from one shard until its stream ends.
struct LinkTask {
    link: LinkHandle,
    groups: Groups,
    interval: Duration,
    silence_limit: Duration,
    leadership: LeadershipView,
    /// The leadership in which the stream was opened: it ends with it.
    session: u64,
}

impl LinkTask {
    /// Returns why the stream ended.
    async fn run(self, mut stream: impl Stream<Item = Result<ShardMessage, Status>> + Unpin) -> (Cause, String) {
        let mut ticks = interval(self.interval);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut leadership = self.leadership.clone();
        let mut silence = Silence::new(self.silence_limit, self.interval, Instant::now());
        let lost = |reason: String| (Cause::Lost, reason);
        loop {
            tokio::select! {
                // What has arrived is read before silence is judged.
                biased;
                message = stream.next() => match message {
                    Some(Ok(message)) => {
                        silence.heard(&message, Instant::now());
                        if let Some(message) = message.message {
                            self.pass_on(message);
                        }
                    }
                    Some(Err(status)) => return lost(format!("its stream broke: {}", status.message())),
                    None => return lost("it closed its stream".to_owned()),
                },
                () = self.link.closing.notified() => return lost("the coordinator closed its stream".to_owned()),
                view = leadership.changed() => match view.session {
                    Some(session) if session.number == self.session => {
                        self.link.send(ToShard::Welcome(welcome(&view, self.interval)));
                    }
                    _ => return lost("this coordinator no longer leads".to_owned()),
                },
                _ = ticks.tick() => match silence.tick(Instant::now()) {
                    Ok(sequence) => {
                        self.link.send(ToShard::Heartbeat(Heartbeat { sequence, ..Heartbeat::default() }));
                    }
                    Err(reason) => return (Cause::Silent, reason),
                },
            }
        }
    }

    fn pass_on(&self, message: FromShard) {
        if matches!(message, FromShard::Hello(_)) {
            tracing::warn!(shard = %self.link.origin.shard, "Hello came twice");
            return;
        }
        let message = GroupMsg::FromShard { from: Arc::clone(&self.link.origin), message: Box::new(message) };
        // A shard without a group has no rank: nobody waits for what it says. A group that has ended is followed by one
        // that forms a new epoch: nothing of the old one matters.
        let group = self.groups.of(&self.link.origin.shard);
        if group.is_none_or(|group| group.get().cast(message).is_err()) {
            tracing::debug!(shard = %self.link.origin.shard, "a message has no group");
        }
    }
}
