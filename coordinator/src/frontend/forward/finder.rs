//! Who answers now: this process while it leads, else the leader.

use std::pin::Pin;

use futures::FutureExt;
use tokio::sync::watch;

use crate::leadership::{Leader, LeadershipView, View};

/// This process's own endpoints in one of its leaderships.
#[derive(Clone)]
pub struct Local<T> {
    /// Number of the leadership.
    pub session: u64,
    /// The endpoints.
    pub endpoints: T,
}

/// Who answers.
#[derive(Clone)]
pub enum Target<T> {
    /// This process.
    Here(Local<T>),
    /// Another one.
    There(Leader),
}

/// Ends when whoever answers leads no more: whatever the connection looks like, nothing more is to be expected of it.
pub type Over = Pin<Box<dyn Future<Output = ()> + Send>>;

/// Finds who answers.
#[derive(Clone)]
pub struct Finder<T> {
    view: LeadershipView,
    local: watch::Receiver<Option<Local<T>>>,
}

impl<T: Clone + Send + Sync + 'static> Finder<T> {
    /// `local` is set while this process leads.
    pub fn new(view: LeadershipView, local: watch::Receiver<Option<Local<T>>>) -> Self {
        Self { view, local }
    }

    /// This process's own endpoints, if it leads and they are there.
    pub fn here(&self) -> Option<Local<T>> {
        let session = self.view.session()?;
        self.local.borrow().clone().filter(|l| l.session == session.number)
    }

    /// Ends when a leadership of this process does.
    pub fn end_of(&self, session: u64) -> Over {
        let mut view = self.view.clone();
        async move { view.ended(session).await }.boxed()
    }

    /// Waits until somebody leads.
    pub async fn find(&self) -> (Target<T>, Over) {
        let target = self.target().await;
        let (mut view, watched) = (self.view.clone(), target.clone());
        (target, async move { drop(view.wait_for(|v| is_over(&watched, v)).await) }.boxed())
    }

    async fn target(&self) -> Target<T> {
        let (mut view, mut local) = (self.view.clone(), self.local.clone());
        loop {
            let now = view.now();
            local.borrow_and_update();
            match (now.session, now.leader) {
                // The endpoints come a moment later than the leadership.
                (Some(_), _) => {
                    if let Some(local) = self.here() {
                        return Target::Here(local);
                    }
                }
                (None, Some(leader)) if !leader.record.http_address.is_empty() => return Target::There(leader),
                (None, _) => {}
            }
            tokio::select! {
                _ = view.changed() => {}
                changed = local.changed() => if changed.is_err() {
                    // The process is being torn down.
                    std::future::pending::<()>().await;
                },
            }
        }
    }
}

/// Whether somebody else answers by now. Not while nobody does: a leader without a lease serves on.
fn is_over<T>(target: &Target<T>, view: &View) -> bool {
    match target {
        Target::Here(local) => view.session.is_none_or(|s| s.number != local.session),
        Target::There(leader) => view.leader.as_ref().is_some_and(|l| !l.record.is_same_life(&leader.record)),
    }
}
