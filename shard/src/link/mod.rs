//! The stream to the coordinator: dials, says hello, passes messages to the engine, dials again.

use std::time::{Duration, Instant};

use phalanx_proto::v1::{
    Hello, ShardMessage, cluster_client::ClusterClient, coordinator_message::Message as FromCoordinator,
    shard_message::Message,
};
use ractor::ActorRef;
use tokio::{sync::mpsc, time};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::{
    Streaming,
    transport::{Channel, Endpoint, Uri},
};

use crate::{engine::actor::EngineMsg, heartbeat::Pulse};

/// Longest wait for a coordinator to accept a connection or the stream.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);
/// Pauses between attempts grow from here
const FIRST_PAUSE: Duration = Duration::from_millis(50);
/// to here.
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
/// While nobody answers, the log says so this often.
const WAITING_LOG_INTERVAL: Duration = Duration::from_secs(10);
/// Heartbeats before the coordinator says how often.
const FIRST_INTERVAL: Duration = Duration::from_secs(1);
/// A plan that starts hundreds of long sequences is larger than gRPC's usual 4 MB.
const MESSAGE_LIMIT: usize = 256 << 20;
/// HTTP/2 window: a large plan goes out without waiting for window updates.
const WINDOW_BYTES: u32 = 8 << 20;

/// Why the link is over for good.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// The coordinator says so.
    Shutdown(String),
}

/// Why one stream ended.
#[derive(Debug, thiserror::Error)]
enum Broken {
    #[error("{0}")]
    Connect(String),
    #[error("the stream broke: {0}")]
    Status(Box<tonic::Status>),
    #[error("the coordinator closed the stream")]
    Closed,
    #[error("the coordinator was silent for {0:?}")]
    Silent(Duration),
}

/// Keeps the shard attached to one of the coordinators until one says to shut down.
pub async fn run(coordinators: &[Uri], hello: &Hello, engine: &ActorRef<EngineMsg>) -> End {
    let mut pause = FIRST_PAUSE;
    let mut logged: Option<Instant> = None;
    loop {
        for uri in coordinators {
            match attach(uri, hello).await {
                Ok((stream, sender)) => {
                    tracing::info!(coordinator = %uri, "attached");
                    (pause, logged) = (FIRST_PAUSE, None);
                    let ended = session(stream, sender, engine).await;
                    if engine.cast(EngineMsg::Detached).is_err() {
                        tracing::debug!("the engine has ended");
                    }
                    match ended {
                        Ok(end) => return end,
                        Err(broken) => tracing::warn!(coordinator = %uri, "detached: {broken}; dialling again"),
                    }
                }
                Err(broken) if logged.is_none_or(|at| at.elapsed() >= WAITING_LOG_INTERVAL) => {
                    tracing::info!(coordinator = %uri, "waiting for the coordinator: {broken}");
                    logged = Some(Instant::now());
                }
                Err(_) => {}
            }
        }
        time::sleep(pause).await;
        pause = (pause * 3 / 2).min(LONGEST_PAUSE);
    }
}

type Attached = (Streaming<phalanx_proto::v1::CoordinatorMessage>, mpsc::UnboundedSender<ShardMessage>);

async fn attach(uri: &Uri, hello: &Hello) -> Result<Attached, Broken> {
    let channel = Endpoint::from(uri.clone())
        .connect_timeout(CONNECT_LIMIT)
        .tcp_nodelay(true)
        .initial_stream_window_size(WINDOW_BYTES)
        .initial_connection_window_size(WINDOW_BYTES)
        .connect()
        .await
        .map_err(|error| Broken::Connect(with_causes(&error)))?;
    let mut client: ClusterClient<Channel> =
        ClusterClient::new(channel).max_decoding_message_size(MESSAGE_LIMIT).max_encoding_message_size(MESSAGE_LIMIT);
    let (sender, receiver) = mpsc::unbounded_channel();
    let first = ShardMessage { message: Some(Message::Hello(hello.clone())) };
    // The receiver is right here: sending can't fail.
    let _sent = sender.send(first);
    match time::timeout(CONNECT_LIMIT, client.attach(UnboundedReceiverStream::new(receiver))).await {
        Ok(Ok(response)) => Ok((response.into_inner(), sender)),
        Ok(Err(status)) => Err(Broken::Status(Box::new(status))),
        Err(_) => Err(Broken::Connect(format!("no answer within {CONNECT_LIMIT:?}"))),
    }
}

/// Passes messages until the stream ends. Plans are queued at the engine while it computes.
async fn session(
    mut stream: Streaming<phalanx_proto::v1::CoordinatorMessage>,
    sender: mpsc::UnboundedSender<ShardMessage>,
    engine: &ActorRef<EngineMsg>,
) -> Result<End, Broken> {
    if engine.cast(EngineMsg::Attached(sender.clone())).is_err() {
        return Ok(End::Shutdown("the engine has ended".to_owned()));
    }
    let mut pulse = Pulse::new(FIRST_INTERVAL, Instant::now());
    let mut ticks = ticks(&pulse);
    loop {
        tokio::select! {
            message = stream.message() => {
                let message = message.map_err(|status| Broken::Status(Box::new(status)))?.ok_or(Broken::Closed)?;
                pulse.hear(Instant::now());
                match message.message {
                    Some(FromCoordinator::Welcome(welcome)) => {
                        pulse = Pulse::new(Duration::from_millis(u64::from(welcome.heartbeat_ms)), Instant::now());
                        ticks = self::ticks(&pulse);
                    }
                    Some(FromCoordinator::Heartbeat(_)) => {}
                    Some(FromCoordinator::Shutdown(shutdown)) => return Ok(End::Shutdown(shutdown.reason)),
                    Some(message) => {
                        if engine.cast(EngineMsg::Coordinator(Box::new(message))).is_err() {
                            return Ok(End::Shutdown("the engine has ended".to_owned()));
                        }
                    }
                    None => tracing::warn!("the coordinator sent a message of a kind that this version does not know"),
                }
            }
            _ = ticks.tick() => {
                if let Some(silence) = pulse.silence(Instant::now()) {
                    return Err(Broken::Silent(silence));
                }
                if sender.send(pulse.beat()).is_err() {
                    return Err(Broken::Closed);
                }
            }
        }
    }
}

fn ticks(pulse: &Pulse) -> time::Interval {
    let mut ticks = time::interval(pulse.interval());
    ticks.set_missed_tick_behavior(time::MissedTickBehavior::Delay);
    ticks
}

/// An error with everything that lies under it: transport errors say the reason at the bottom only.
fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}
