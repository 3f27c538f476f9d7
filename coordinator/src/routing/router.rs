//! Several schedulers as one: each request goes to a group, and on to another one if its own is away for long.

use std::{
    future::pending,
    pin::pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use tokio::{
    sync::watch,
    time::{sleep_until, timeout_at},
};

use super::{
    machine::{Demand, RoutingMachine, Settings, Share},
    told::Told,
};
use crate::{
    metrics as names,
    request::{Request, RequestError, RequestEvent},
    scheduler::{
        handle::{CancelOnDrop, GroupEvent, Readiness, RequestStream, Submit},
        outbox::{self, MOST_UNREAD_BYTES, Outbox},
    },
};

/// How often a request goes to another group without a new token in between. If it is to blame for the losses, the group
/// that has it then is the last one to find out.
const MOST_MOVES: u32 = 2;
/// Between attempts to go to a group that takes nothing.
const MOVE_PAUSE: Duration = Duration::from_secs(1);

/// Takes requests for all groups. Clones are the same router.
#[derive(Clone)]
pub struct Router(Arc<Shared>);

struct Shared {
    machine: Mutex<RoutingMachine>,
    groups: Vec<Arc<dyn Submit>>,
    /// Changes whenever a group begins or ends to serve.
    changed: watch::Sender<()>,
}

/// A request at a group.
struct Stay {
    share: Option<Share>,
    stream: RequestStream,
    shared: Arc<Shared>,
}

impl Stay {
    fn group(&self) -> usize {
        self.share.as_ref().map_or(0, Share::group)
    }
}

impl Drop for Stay {
    fn drop(&mut self) {
        if let Some(share) = self.share.take() {
            self.shared.machine().end(share);
        }
    }
}

impl Router {
    /// Over these schedulers, one for each group.
    pub fn new(settings: Settings, groups: Vec<Arc<dyn Submit>>) -> Self {
        let machine = Mutex::new(RoutingMachine::new(Settings { groups: groups.len(), ..settings }, Instant::now()));
        Self(Arc::new(Shared { machine, groups, changed: watch::Sender::new(()) }))
    }

    /// Hears what a group tells its scheduler, before that does.
    pub fn group_event(&self, group: usize, event: &GroupEvent) {
        match event {
            GroupEvent::Serving { n_blocks, kept, .. } => {
                self.0.machine().on_serving(group, *n_blocks, kept.is_some());
            }
            GroupEvent::Lost { .. } => self.0.machine().on_lost(group, Instant::now()),
            GroupEvent::Hold { .. } | GroupEvent::Resume { .. } | GroupEvent::Stepped(_) => return,
        }
        self.0.changed.send_replace(());
    }
}

impl Submit for Router {
    fn submit(&self, request: Request) -> Result<RequestStream, RequestError> {
        let demand = self.0.machine().demand(&request);
        let stay = self.0.begin(&request, &demand, None)?;
        let (outbox, events) = outbox::channel();
        let carrier = tokio::spawn(carry(Arc::clone(&self.0), request, demand, stay, outbox));
        Ok(RequestStream { events, _cancel: CancelOnDrop(Some(Box::new(move || carrier.abort()))) })
    }

    fn readiness(&self) -> Readiness {
        let all: Vec<Readiness> = self.0.groups.iter().map(|group| group.readiness()).collect();
        let serving = all.iter().find(|readiness| **readiness == Readiness::Serving);
        let none = || Readiness::NotReady("there are no groups".to_owned());
        serving.or(all.first()).cloned().unwrap_or_else(none)
    }
}

impl Shared {
    fn machine(&self) -> MutexGuard<'_, RoutingMachine> {
        // Counts of load are all that a panic could leave half done.
        self.machine.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Submits a request to the best group that takes it, but for `but`.
    fn begin(self: &Arc<Self>, request: &Request, demand: &Demand, but: Option<usize>) -> Result<Stay, RequestError> {
        let mut refused = None;
        let order = self.machine().choose(demand);
        for group in order.into_iter().filter(|group| Some(*group) != but) {
            match self.groups[group].submit(request.clone()) {
                Ok(stream) => {
                    let share = Some(self.machine().begin(group, demand));
                    return Ok(Stay { share, stream, shared: Arc::clone(self) });
                }
                Err(error) => drop(refused.get_or_insert(error)),
            }
        }
        Err(refused.unwrap_or_else(|| RequestError::Unavailable("no other group serves".to_owned())))
    }

    /// Returns when requests of a group are to go to another one.
    async fn left(&self, group: usize) {
        let mut changed = self.changed.subscribe();
        loop {
            changed.borrow_and_update();
            let at = self.machine().leaves_at(group);
            match at {
                Some(at) if at <= Instant::now() => return,
                // Either the time is over, or it is to be looked at anew.
                Some(at) => drop(timeout_at(at.into(), changed.changed()).await),
                None if changed.changed().await.is_err() => pending().await,
                None => {}
            }
        }
    }
}

/// Carries a request's events from its group to its client, until its end.
async fn carry(shared: Arc<Shared>, request: Request, demand: Demand, mut stay: Stay, outbox: Outbox) {
    let mut told = Told::new(&request);
    // Moves since the last new token, and when the next one may be tried.
    let (mut n_moves, mut not_before) = (0, None);
    loop {
        let group = stay.group();
        let left = async {
            if n_moves >= MOST_MOVES {
                return pending().await;
            }
            if let Some(not_before) = not_before {
                sleep_until(not_before).await;
            }
            shared.left(group).await;
        };
        match carry_until(left, &mut stay.stream, &mut told, &outbox, n_moves > 0).await {
            Pause::Over => return,
            // It gets on here: what went before is nobody's fault.
            Pause::News => n_moves = 0,
            Pause::Left => match shared.begin(&told.next_life(&request), &demand, Some(group)) {
                Ok(next) => {
                    tracing::info!(id = request.id, from = group, to = next.group(), "a request goes to another group");
                    metrics::counter!(names::MOVED).increment(1);
                    told.begin_again();
                    (stay, not_before) = (next, None);
                    n_moves += 1;
                }
                Err(error) => {
                    tracing::debug!(id = request.id, %error, "no other group takes a request: it waits for its own");
                    not_before = Some((Instant::now() + MOVE_PAUSE).into());
                }
            },
        }
    }
}

/// Why [`carry_until`] returns.
enum Pause {
    /// Nothing more is to be told.
    Over,
    /// A new event was told, and that was to be said.
    News,
    /// The group is away.
    Left,
}

async fn carry_until(
    left: impl Future<Output = ()>,
    stream: &mut RequestStream,
    told: &mut Told,
    outbox: &Outbox,
    tells_news: bool,
) -> Pause {
    let mut left = pin!(left);
    loop {
        let event = tokio::select! {
            biased;
            event = stream.events.recv() => event,
            () = &mut left => return Pause::Left,
        };
        let Some(event) = event else { return Pause::Over };
        let Some(event) = told.take(event) else { continue };
        let is_last = matches!(event, RequestEvent::Finished(_) | RequestEvent::Failed(_));
        let has_room = outbox.send(event);
        if is_last {
            return Pause::Over;
        }
        if !has_room {
            tracing::warn!("a client leaves too much of its answer unread: its request is cancelled");
            outbox.send(RequestEvent::Failed(RequestError::Unread { limit: MOST_UNREAD_BYTES }));
            return Pause::Over;
        }
        if tells_news {
            return Pause::News;
        }
    }
}

#[cfg(test)]
mod tests;
