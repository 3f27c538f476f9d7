//! Finds out whether a request would be answered, by trying one.
//!
//! A leader is tried once after each time that no group served: with one token, through the scheduler and all ranks. Who asks
//! meanwhile waits a little for the outcome, which is kept for the next one. A standby is tried whenever it is asked: it has
//! to reach the leader.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{net::TcpStream, sync::watch, time::timeout};

use super::{
    FrontendState,
    params::{Params, RawParams},
};
use crate::{
    leadership::LeadershipView,
    request::{Request, RequestEvent},
    scheduler::handle::Readiness,
};

/// How long whoever asks waits for the outcome: probes often give up after a second.
const PATIENCE: Duration = Duration::from_millis(800);
/// Longest that one token may take.
const TRIAL_LIMIT: Duration = Duration::from_secs(30);
/// Longest wait for a connection to the leader.
const CONNECT_LIMIT: Duration = Duration::from_millis(700);
/// Its prompt: every vocabulary has it.
const PROMPT: u32 = 0;

/// Tries requests.
pub struct Prober {
    stage: watch::Sender<Stage>,
    /// Set on a standby: who is to be reached.
    leader: Option<LeadershipView>,
}

/// What is known.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Stage {
    Untried,
    /// A trial is under way.
    Trying,
    Answered,
    Failed(String),
}

impl Default for Prober {
    fn default() -> Self {
        Self { stage: watch::Sender::new(Stage::Untried), leader: None }
    }
}

impl Prober {
    /// A standby's: it is ready if the leader can be reached.
    pub fn of_standby(view: LeadershipView) -> Self {
        Self { leader: Some(view), ..Self::default() }
    }

    /// Whether a request would be answered, else why not.
    pub(super) async fn check(self: &Arc<Self>, state: &FrontendState) -> Result<(), String> {
        if let Readiness::NotReady(reason) = state.submit.readiness() {
            // Whatever serves next has to prove itself. A trial that is under way ends by itself.
            self.stage.send_if_modified(|stage| {
                let is_stale = matches!(stage, Stage::Answered | Stage::Failed(_));
                if is_stale {
                    *stage = Stage::Untried;
                }
                is_stale
            });
            return Err(reason);
        }
        if let Some(view) = &self.leader {
            return reach_leader(view).await;
        }
        let begins = self.stage.send_if_modified(|stage| {
            let begins = matches!(stage, Stage::Untried | Stage::Failed(_));
            if begins {
                *stage = Stage::Trying;
            }
            begins
        });
        if begins {
            let (prober, state) = (Arc::clone(self), state.clone());
            // It goes on if whoever asked gives up.
            tokio::spawn(async move {
                let outcome = try_one_token(&state).await;
                prober.stage.send_replace(outcome.map_or_else(Stage::Failed, |()| Stage::Answered));
            });
        }
        let mut watched = self.stage.subscribe();
        let outcome = timeout(PATIENCE, watched.wait_for(|stage| *stage != Stage::Trying)).await;
        match outcome.ok().and_then(Result::ok).as_deref() {
            Some(Stage::Answered) => Ok(()),
            Some(Stage::Failed(reason)) => Err(format!("a request of one token failed: {reason}")),
            _ => Err("a request of one token is being tried and has no answer yet".to_owned()),
        }
    }
}

async fn reach_leader(view: &LeadershipView) -> Result<(), String> {
    let Some(leader) = view.get().leader else { return Err("no coordinator leads".to_owned()) };
    let address = &leader.record.http_address;
    match timeout(CONNECT_LIMIT, TcpStream::connect(address)).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(error)) => Err(format!("the leader can't be reached at {address}: {error}")),
        Err(_) => Err(format!("the leader does not answer at {address}")),
    }
}

async fn try_one_token(state: &FrontendState) -> Result<(), String> {
    let request = one_token(state).map_err(|error| format!("it can't be made: {error:?}"))?;
    let mut stream = state.submit.submit(request).map_err(|error| error.to_string())?;
    loop {
        match stream.events.recv().await {
            Some(RequestEvent::Finished(_)) => return Ok(()),
            Some(RequestEvent::Failed(error)) => return Err(error.to_string()),
            Some(RequestEvent::Output(_) | RequestEvent::PromptScored(_)) => {}
            None => return Err("the scheduler is gone".to_owned()),
        }
    }
}

fn one_token(state: &FrontendState) -> Result<Request, super::error::ApiError> {
    let raw = RawParams {
        temperature: Some(0.0),
        seed: Some(0),
        max_tokens: Some(1),
        ignore_eos: true,
        ..RawParams::default()
    };
    let params = Params::check(raw, &state.model)?;
    let deadline = Instant::now().checked_add(TRIAL_LIMIT);
    params.request("readyz".to_owned(), "prompt", vec![PROMPT], &state.model, deadline)
}
