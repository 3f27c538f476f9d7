//! The link to the coordinator that leads: finds it, says hello, passes messages to the engine, finds the next.
//!
//! - `directory`: which coordinators there are, and which leadership is the latest (pure).
//! - `leaders`: asks coordinators who leads. `dial`: reaches them.
//! - `session`: one stream, from hello to its end.
//!
//! **Invariant.** The shard follows one leader at a time, and none whose term is lower than one that it has followed.

mod dial;
mod directory;
mod leaders;
mod session;

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use phalanx_proto::{
    dial::Dialer,
    v1::{CopiedPages, Hello},
};
use ractor::ActorRef;
use tokio::{sync::watch, time};
use tonic::transport::Uri;

use self::{
    directory::{Backoff, Directory},
    leaders::Newer,
};
use crate::{
    canary::Canary,
    engine::{
        actor::{EngineHandle, EngineMsg},
        held::Held,
    },
    heartbeat::{Pulse, Watched},
    host,
    mirror::{Copied, Store},
};

/// While nobody answers, the log says so this often.
const WAITING_LOG_INTERVAL: Duration = Duration::from_secs(10);
/// A stream that lasted this long was not refused: pauses begin anew.
const HEALTHY_AFTER: Duration = Duration::from_secs(1);

/// Why the link is over for good.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// The coordinator says so.
    Shutdown(String),
    /// The shard was told to leave, and need not wait any longer.
    Left(String),
}

/// Why one stream ended, or did not begin.
#[derive(Debug, thiserror::Error)]
enum Broken {
    #[error("{0}")]
    Connect(String),
    #[error("{advice} ({reason})")]
    Advised { advice: &'static str, reason: String },
    #[error("refused: {}", status.message())]
    Refused { leader: Option<String>, status: Box<tonic::Status> },
    #[error("the stream broke: {0}")]
    Status(Box<tonic::Status>),
    #[error("the coordinator closed the stream")]
    Closed,
    #[error("the coordinator was silent for {0:?}")]
    Silent(Duration),
    #[error("it leads under term {term}, and term {known} is known: it is followed no more")]
    Older { term: u64, known: u64 },
    #[error("{} leads now, under term {}", .0.uri, .0.term)]
    Newer(Newer),
}

/// Keeps the shard attached to the coordinator that leads.
pub struct Link {
    coordinators: Vec<Uri>,
    dialer: Dialer,
    hello: Hello,
    engine: ActorRef<EngineMsg>,
    held: Held,
    mirror: Option<Store>,
    pulse: Pulse,
    canary: Canary,
    /// Why the shard shall leave, once it shall.
    leave: watch::Receiver<Option<String>>,
    leave_limit: Duration,
}

impl Link {
    /// Of a shard that introduces itself with `hello`, to coordinators that it dials with `dialer`. An address in it that is unspecified (`0.0.0.0`) becomes the one
    /// from which the coordinator is reached. When `leave` says why, the shard asks the coordinator for leave and goes on
    /// until it has it, or for `leave_limit`.
    ///
    /// # Errors
    /// If the system has no thread left for heartbeats.
    pub fn new(
        coordinators: &[Uri],
        dialer: Dialer,
        hello: Hello,
        engine: &EngineHandle,
        leave: watch::Receiver<Option<String>>,
        leave_limit: Duration,
    ) -> std::io::Result<Self> {
        let canary = Canary::default();
        let pulse = Pulse::start(Watched {
            interrupt: engine.interrupt.clone(),
            vitals: engine.vitals.clone(),
            mirror: engine.mirror.clone(),
            canary: canary.clone(),
        })?;
        let coordinators = coordinators.to_vec();
        let (engine, held, mirror) = (engine.actor.clone(), engine.held.clone(), engine.mirror.clone());
        Ok(Self { coordinators, dialer, hello, engine, held, mirror, pulse, canary, leave, leave_limit })
    }

    /// Returns when the shard shall end.
    pub async fn run(self) -> End {
        let canary = self.canary.clone();
        // The canary lives in the same task: what holds the link up silences it.
        tokio::select! {
            end = self.follow() => end,
            never = canary.sing() => never,
        }
    }

    async fn follow(mut self) -> End {
        let mut directory = Directory::new(&self.coordinators, self.dialer.scheme());
        let mut backoff = Backoff::default();
        let mut logged: Option<Instant> = None;
        // A coordinator that hangs up says why, or is gone before that is heard: what it said once is remembered.
        let mut advised: Option<(&str, String)> = None;
        let mut told = "";
        loop {
            if let Some(reason) = self.leave.borrow().clone() {
                return End::Left(format!("{reason}, and no coordinator is attached"));
            }
            let mut failure = "no coordinator that answers leads".to_owned();
            for uri in leaders::candidates(&mut directory, &self.dialer).await {
                let attached = match dial::attach(&self.dialer, &uri, self.hello_from(&uri).await).await {
                    Ok(attached) => attached,
                    Err(broken) => {
                        if let Broken::Refused { leader: Some(leader), .. } = &broken {
                            directory.hint(leader);
                        }
                        failure = format!("{uri}: {broken}");
                        if let Broken::Advised { advice, .. } = broken {
                            advised = Some((advice, failure.clone()));
                        }
                        continue;
                    }
                };
                tracing::info!(coordinator = %uri, "attached");
                (advised, told) = (None, "");
                let begun = Instant::now();
                let ended = session::run(&mut self, attached, &uri, &mut directory).await;
                self.pulse.end();
                if self.engine.cast(EngineMsg::Detached).is_err() {
                    tracing::debug!("the engine has ended");
                }
                let broken = match ended {
                    Ok(end) => return end,
                    Err(broken) => broken,
                };
                tracing::warn!(coordinator = %uri, "detached: {broken}; dialling again");
                if let Broken::Newer(newer) = &broken {
                    directory.hint(&newer.uri.to_string());
                }
                if begun.elapsed() >= HEALTHY_AFTER {
                    (backoff, logged) = (Backoff::default(), None);
                }
                failure = format!("{uri}: {broken}");
                break;
            }
            let is_news = advised.as_ref().is_some_and(|(advice, _)| *advice != told);
            if is_news || logged.is_none_or(|at| at.elapsed() >= WAITING_LOG_INTERVAL) {
                if let Some((advice, advised)) = advised.take() {
                    (told, failure) = (advice, advised);
                }
                tracing::info!("waiting for a coordinator: {failure}");
                logged = Some(Instant::now());
            }
            tokio::select! {
                () = time::sleep(backoff.pause(host::luck())) => {}
                _ = told_to_leave(&mut self.leave) => {}
            }
        }
    }

    /// The introduction, with addresses at which others reach this machine, and the pages that it has now.
    async fn hello_from(&self, coordinator: &Uri) -> Hello {
        let copied_pages = self.mirror.as_ref().and_then(Store::copied);
        let copied_pages = copied_pages.map(|Copied { world_size, ranks }| CopiedPages { world_size, ranks });
        let mut hello = Hello { held_pages: self.held.get(), copied_pages, ..self.hello.clone() };
        for address in [&mut hello.collective_address, &mut hello.mirror_address] {
            let bound = address.parse::<SocketAddr>().ok().filter(|bound| bound.ip().is_unspecified());
            if let Some(bound) = bound
                && let Some(ip) = dial::local_address(coordinator).await
            {
                *address = SocketAddr::new(ip, bound.port()).to_string();
            }
        }
        hello
    }
}

/// Returns when the shard shall leave, and why; never if nobody can tell it any more.
async fn told_to_leave(leave: &mut watch::Receiver<Option<String>>) -> String {
    loop {
        if let Some(reason) = leave.borrow_and_update().clone() {
            return reason;
        }
        if leave.changed().await.is_err() {
            return std::future::pending().await;
        }
    }
}
