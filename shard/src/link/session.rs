//! One stream to one coordinator, from hello to its end.

use std::{
    pin::Pin,
    time::{Duration, Instant},
};

use phalanx_proto::v1::{CoordinatorMessage, shard_message::Message};
use phalanx_proto::v1::{Leaving, ShardMessage, Welcome, coordinator_message::Message as FromCoordinator};
use tokio::time::{self, MissedTickBehavior};
use tonic::transport::Uri;

use super::{
    Broken, End, Link,
    dial::Attached,
    directory::Directory,
    leaders::{self, Newer},
    told_to_leave,
};
use crate::{engine::actor::EngineMsg, heartbeat::Silence};

/// Looks for a newer leader.
type Watch<'a> = Pin<Box<dyn Future<Output = Newer> + Send + 'a>>;

/// Passes messages until the stream ends. Plans are queued at the engine while it computes.
pub async fn run(
    link: &mut Link,
    Attached { mut stream, sender }: Attached,
    uri: &Uri,
    directory: &mut Directory,
) -> Result<End, Broken> {
    if link.engine.cast(EngineMsg::Attached(sender.clone())).is_err() {
        return Ok(engine_ended());
    }
    link.pulse.begin(sender.clone());
    let mut silence = Silence::default();
    let mut ticks = ticks(&silence);
    let mut watch = watch(link, directory, uri);
    let mut leaving_until: Option<time::Instant> = None;
    // Known from the welcome on: coordinators of versions without terms know nothing of leaving.
    let mut gives_leave = None;
    loop {
        tokio::select! {
            // What has arrived is read before silence is judged.
            biased;
            message = stream.message() => {
                let message = message.map_err(|status| Broken::Status(Box::new(status)))?.ok_or(Broken::Closed)?;
                silence.hear(Instant::now());
                match message.message {
                    Some(FromCoordinator::Welcome(welcome)) => {
                        silence = greet(link, &welcome, directory)?;
                        gives_leave = Some(welcome.term > 0);
                        ticks = self::ticks(&silence);
                        watch = self::watch(link, directory, uri);
                    }
                    _ => if let Some(end) = pass_on(link, message)? {
                        return Ok(end);
                    }
                }
            }
            newer = &mut watch => return Err(Broken::Newer(newer)),
            reason = told_to_leave(&mut link.leave), if leaving_until.is_none() && gives_leave.is_some() => {
                if gives_leave == Some(false) {
                    return Ok(End::Left(format!("{reason}, and the coordinator knows no leave")));
                }
                tracing::info!("{reason}: asking the coordinator for leave, {:?} at most", link.leave_limit);
                leaving_until = Some(time::Instant::now() + link.leave_limit);
                let message = Message::Leaving(Leaving { reason });
                if sender.send(ShardMessage { message: Some(message) }).is_err() {
                    return Err(Broken::Closed);
                }
            }
            () = until(leaving_until), if leaving_until.is_some() => {
                return Ok(End::Left(format!("the coordinator gave no leave within {:?}", link.leave_limit)));
            }
            _ = ticks.tick() => {
                if let Some(silent) = silence.look(Instant::now()) {
                    return Err(Broken::Silent(silent));
                }
            }
        }
    }
}

/// Takes a welcome in: how often to send heartbeats, who else there is, and whether this leader may be followed.
fn greet(link: &Link, welcome: &Welcome, directory: &mut Directory) -> Result<Silence, Broken> {
    let known = directory.term();
    if !directory.may_follow(welcome.term) {
        return Err(Broken::Older { term: welcome.term, known });
    }
    directory.learn(&welcome.coordinators);
    let interval = Duration::from_millis(u64::from(welcome.heartbeat_ms));
    link.pulse.set_interval(interval);
    tracing::debug!(coordinator = welcome.coordinator_id, term = welcome.term, ?interval, "welcome");
    Ok(Silence::new(interval, Instant::now()))
}

fn pass_on(link: &Link, message: CoordinatorMessage) -> Result<Option<End>, Broken> {
    match message.message {
        Some(FromCoordinator::Heartbeat(heartbeat)) => link.pulse.hear(heartbeat.sequence),
        Some(FromCoordinator::Shutdown(shutdown)) => return Ok(Some(End::Shutdown(shutdown.reason))),
        Some(message) => {
            if link.engine.cast(EngineMsg::Coordinator(Box::new(message))).is_err() {
                return Ok(Some(engine_ended()));
            }
        }
        None => tracing::warn!("the coordinator sent a message of a kind that this version does not know"),
    }
    Ok(None)
}

fn engine_ended() -> End {
    End::Shutdown("the engine has ended".to_owned())
}

fn watch(link: &Link, directory: &Directory, present: &Uri) -> Watch<'static> {
    let others: Vec<Uri> = directory.all().into_iter().filter(|uri| uri != present).collect();
    let (term, dialer) = (directory.term(), link.dialer.clone());
    Box::pin(async move { leaders::newer(&dialer, &others, term).await })
}

async fn until(deadline: Option<time::Instant>) {
    match deadline {
        Some(deadline) => time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

fn ticks(silence: &Silence) -> time::Interval {
    let mut ticks = time::interval(silence.interval());
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks
}
