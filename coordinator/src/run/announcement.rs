//! Saying, once, that requests are served.

use futures::future::select_all;
use tokio::sync::watch;

use crate::scheduler::handle::Readiness;

/// Whether it was said.
#[derive(Default)]
pub enum Announcement {
    /// No group has served yet.
    #[default]
    Early,
    /// A group serves, which its scheduler hears a little later.
    Prepared {
        /// What to say.
        line: String,
        /// Of each scheduler.
        readiness: Vec<watch::Receiver<Readiness>>,
    },
    /// It was.
    Made,
}

impl Announcement {
    /// A group serves: `line` is to be said as soon as one of the schedulers takes requests, if nothing was said before.
    pub fn prepare(&mut self, line: String, readiness: Vec<watch::Receiver<Readiness>>) {
        if !matches!(self, Self::Made) && !readiness.is_empty() {
            *self = Self::Prepared { line, readiness };
        }
    }

    /// Waits until it is time, and gives the line out once. Dropped before, it has had no effect.
    pub async fn due(&mut self) -> String {
        if let Self::Prepared { line, readiness } = self {
            let serves = |readiness: &mut watch::Receiver<Readiness>| {
                let mut readiness = readiness.clone();
                Box::pin(async move { readiness.wait_for(|now| *now == Readiness::Serving).await.is_ok() })
            };
            // One that has ended serves no more: then the next group's turn is awaited.
            if let (true, ..) = select_all(readiness.iter_mut().map(serves)).await {
                let line = std::mem::take(line);
                *self = Self::Made;
                return line;
            }
        }
        std::future::pending().await
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    #[tokio::test]
    async fn it_is_said_once_and_not_before_it_is_true() {
        let mut announcement = Announcement::default();
        assert_eq!(announcement.due().now_or_never(), None, "no group");
        let (ended, gone) = watch::channel(Readiness::Serving);
        ended.send_replace(Readiness::NotReady("lost".to_owned()));
        drop(ended);
        announcement.prepare("first".to_owned(), vec![gone]);
        assert_eq!(announcement.due().now_or_never(), None, "its scheduler has ended");
        let (scheduler, readiness) = watch::channel(Readiness::NotReady("forming".to_owned()));
        announcement.prepare("second".to_owned(), vec![readiness.clone()]);
        assert_eq!(announcement.due().now_or_never(), None, "the scheduler has not heard of it");
        scheduler.send_replace(Readiness::Serving);
        assert_eq!(announcement.due().now_or_never().as_deref(), Some("second"));
        announcement.prepare("third".to_owned(), vec![readiness]);
        assert_eq!(announcement.due().now_or_never(), None, "it was said");
    }
}
