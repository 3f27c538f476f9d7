//! Wakes the group's actor when its machine wants to be.

use std::time::{Duration, Instant};

use ractor::ActorRef;
use tokio::{
    sync::watch,
    time::{sleep, sleep_until},
};

use super::actor::GroupMsg;

/// Shortest time between two wakes: a machine that always wants to be woken does not take the processor.
const LEAST_PAUSE: Duration = Duration::from_millis(10);
/// A wake that is this late says that this process was held up,
const HELD_UP: Duration = Duration::from_millis(150);
/// and what has arrived meanwhile is to be read before anybody is called late.
const CATCH_UP: Duration = Duration::from_millis(200);

/// Sends `Tick` at the time that was set last. Ends with its owner.
pub struct Alarm(watch::Sender<Option<Instant>>);

impl Alarm {
    /// Ticks go to this actor.
    pub fn start(actor: ActorRef<GroupMsg>) -> Self {
        let (sender, mut times) = watch::channel(None::<Instant>);
        tokio::spawn(async move {
            loop {
                let at = *times.borrow_and_update();
                let rings = async {
                    match at {
                        Some(at) => sleep_until(at.into()).await,
                        None => std::future::pending().await,
                    }
                };
                tokio::select! {
                    changed = times.changed() => match changed {
                        Ok(()) => continue,
                        Err(_) => return,
                    },
                    () = rings => {}
                }
                if at.is_some_and(|at| at.elapsed() > HELD_UP) {
                    sleep(CATCH_UP).await;
                }
                if actor.cast(GroupMsg::Tick).is_err() {
                    return;
                }
                // The answer to the tick sets a new time, which may be the same.
                sleep(LEAST_PAUSE).await;
                if times.changed().await.is_err() {
                    return;
                }
            }
        });
        Self(sender)
    }

    /// Ticks then, and no longer at the time that was set before.
    pub fn set(&self, at: Option<Instant>, is_answer: bool) {
        self.0.send_if_modified(|before| {
            let is_new = *before != at || is_answer;
            *before = at;
            is_new
        });
    }
}
