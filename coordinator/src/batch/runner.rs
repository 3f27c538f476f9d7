//! Asks for lines until all are done.

use std::{
    collections::VecDeque,
    future::pending,
    io,
    pin::pin,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{
    sync::{Semaphore, mpsc},
    task::JoinSet,
    time::sleep_until,
};

use super::{
    ask::{Answer, Ask},
    journal::JournalError,
    line::{Line, Parsed},
    outcome::Outcome,
    pace::Pace,
};

/// Pause after a connection that failed.
const RECONNECT_PAUSE: Duration = Duration::from_secs(2);

/// How a batch is run.
pub struct Settings {
    /// Most lines that are asked for at once.
    pub concurrency: usize,
    /// How long nobody may answer before the run ends; `None` is for ever.
    pub patience: Option<Duration>,
    /// Places that several batches share; each line takes one while it is asked for.
    pub places: Option<Arc<Semaphore>>,
}

/// Why a run ended before its end.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The input can't be read.
    #[error("the input can't be read: {0}")]
    Input(#[from] io::Error),
    /// The output can't be written.
    #[error(transparent)]
    Output(#[from] JournalError),
    /// Nobody answers.
    #[error("nobody has answered for {} s; the last reason: {reason}", patience.as_secs())]
    Unanswered {
        /// How long that was tried.
        patience: Duration,
        /// Of the last attempt.
        reason: String,
    },
}

/// How a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// All lines are done.
    Complete,
    /// It was told to stop.
    Stopped,
}

/// Asks for all lines that come; `done` is told what becomes of each, as they finish. A server that says that it is busy, or that
/// can't be reached, is asked again. What runs when `stop` ends is given up, and is not done.
///
/// # Errors
/// If lines can't be read, or told, or nobody answers for long.
pub async fn run(
    mut lines: mpsc::Receiver<io::Result<Parsed>>,
    ask: Arc<dyn Ask>,
    settings: &Settings,
    stop: impl Future<Output = ()>,
    mut done: impl FnMut(Option<&str>, usize, Outcome) -> Result<(), JournalError>,
) -> Result<Ended, RunError> {
    let mut stop = pin!(stop);
    let mut pace = Pace::new(settings.concurrency);
    let mut running = JoinSet::new();
    let mut again: VecDeque<Line> = VecDeque::new();
    let (mut is_read, mut answered_at) = (false, Instant::now());
    loop {
        let now = Instant::now();
        while !again.is_empty() && pace.allows(now, running.len()) {
            running.spawn(asked(Arc::clone(&ask), settings.places.clone(), again.pop_front().expect("there is one")));
        }
        if is_read && again.is_empty() && running.is_empty() {
            return Ok(Ended::Complete);
        }
        let takes_more = !is_read && again.is_empty() && pace.allows(now, running.len());
        let resumes = async {
            match pace.resumes_at(now) {
                Some(at) => sleep_until(at.into()).await,
                None => pending().await,
            }
        };
        tokio::select! {
            biased;
            () = &mut stop => return Ok(Ended::Stopped),
            Some(finished) = running.join_next() => {
                // A panic of an endpoint is caught there; this one would be ours.
                let (line, answer): (Line, Result<Answer, String>) = finished.map_err(io::Error::other)?;
                match answer {
                    Ok(answer) if answer.retry_after.is_none() => {
                        answered_at = Instant::now();
                        pace.on_answer();
                        let Answer { status, request_id, body, .. } = answer;
                        let outcome = Outcome::Answered { status: status.as_u16(), request_id, body };
                        done(Some(&line.custom_id), line.number, outcome)?;
                    }
                    refused => {
                        let (pause, reason) = match refused {
                            Ok(answer) => {
                                // Who is busy is there.
                                if answer.status == http::StatusCode::TOO_MANY_REQUESTS {
                                    answered_at = Instant::now();
                                }
                                (answer.retry_after.unwrap_or(RECONNECT_PAUSE), answer.status.to_string())
                            }
                            Err(reason) => (RECONNECT_PAUSE, reason),
                        };
                        tracing::debug!(line = line.number, reason, "asking for a line again");
                        if let Some(patience) = settings.patience.filter(|patience| answered_at.elapsed() > *patience) {
                            return Err(RunError::Unanswered { patience, reason });
                        }
                        pace.on_refusal(Instant::now(), pause, running.len());
                        again.push_back(line);
                    }
                }
            }
            next = lines.recv(), if takes_more => match next.transpose()? {
                None => is_read = true,
                Some(Ok(line)) => drop(running.spawn(asked(Arc::clone(&ask), settings.places.clone(), line))),
                Some(Err(bad)) => done(bad.custom_id.as_deref(), bad.number, Outcome::of_bad(&bad))?,
            },
            () = resumes => {}
        }
    }
}

async fn asked(ask: Arc<dyn Ask>, places: Option<Arc<Semaphore>>, line: Line) -> (Line, Result<Answer, String>) {
    let _place = match &places {
        // It is never closed.
        Some(places) => places.acquire().await.ok(),
        None => None,
    };
    let answer = ask.ask(line.url, line.body.clone()).await;
    (line, answer)
}

#[cfg(test)]
mod tests {
    use std::{
        collections::BTreeMap,
        sync::{
            Mutex,
            atomic::{AtomicUsize, Ordering},
        },
    };

    use futures::{FutureExt, future::BoxFuture};
    use http::StatusCode;
    use serde_json::json;

    use super::*;
    use crate::batch::line::{URLS, parse};

    type Script = Box<dyn Fn(usize) -> Result<Answer, String> + Send + Sync>;

    /// Answers by a script that is told how often a line was asked for; counts how many are asked for at once.
    struct Fake {
        script: Script,
        n_asked: Mutex<BTreeMap<Vec<u8>, usize>>,
        n_now: AtomicUsize,
        most: AtomicUsize,
    }

    impl Fake {
        fn new(script: impl Fn(usize) -> Result<Answer, String> + Send + Sync + 'static) -> Arc<Self> {
            let (n_asked, n_now, most) = Default::default();
            Arc::new(Self { script: Box::new(script), n_asked, n_now, most })
        }
    }

    struct Wrapped(Arc<Fake>);

    impl Ask for Wrapped {
        fn ask(&self, path: &'static str, body: Vec<u8>) -> BoxFuture<'static, Result<Answer, String>> {
            assert!(URLS.contains(&path));
            let fake = Arc::clone(&self.0);
            async move {
                let now = fake.n_now.fetch_add(1, Ordering::SeqCst) + 1;
                fake.most.fetch_max(now, Ordering::SeqCst);
                tokio::task::yield_now().await;
                fake.n_now.fetch_sub(1, Ordering::SeqCst);
                let mut n_asked = fake.n_asked.lock().unwrap();
                let n = n_asked.entry(body).or_default();
                *n += 1;
                (fake.script)(*n)
            }
            .boxed()
        }
    }

    fn answer(status: u16, retry_after: Option<u64>) -> Answer {
        Answer {
            status: StatusCode::from_u16(status).unwrap(),
            request_id: "r".to_owned(),
            retry_after: retry_after.map(Duration::from_secs),
            body: json!({}),
        }
    }

    fn lines(n: usize) -> mpsc::Receiver<io::Result<Parsed>> {
        let (sender, lines) = mpsc::channel(n + 1);
        for number in 1..=n {
            let line = json!({"custom_id": format!("c{number}"), "method": "POST", "url": "/v1/completions",
                              "body": {"prompt": number}});
            sender.try_send(Ok(parse(number, line.to_string().as_bytes()))).unwrap();
        }
        sender.try_send(Ok(parse(n + 1, b"nonsense"))).unwrap();
        lines
    }

    fn settings(concurrency: usize) -> Settings {
        Settings { concurrency, patience: Some(Duration::from_secs(60)), places: None }
    }

    async fn run_all(fake: &Arc<Fake>, n: usize, settings: &Settings) -> (Result<Ended, RunError>, Vec<(usize, bool)>) {
        let mut told = Vec::new();
        let ended = run(lines(n), Arc::new(Wrapped(Arc::clone(fake))), settings, pending(), |_, number, outcome| {
            told.push((number, outcome.is_good()));
            Ok(())
        });
        let ended = ended.await;
        told.sort_unstable();
        (ended, told)
    }

    #[tokio::test]
    async fn every_line_is_told_once_and_no_more_run_than_may() {
        let fake = Fake::new(|_| Ok(answer(200, None)));
        let (ended, told) = run_all(&fake, 50, &settings(4)).await;
        assert_eq!(ended.unwrap(), Ended::Complete);
        let want: Vec<_> = (1..=50).map(|number| (number, true)).chain([(51, false)]).collect();
        assert_eq!(told, want);
        assert_eq!(fake.most.load(Ordering::SeqCst), 4);
    }

    #[tokio::test]
    async fn busy_and_unreachable_servers_are_asked_again() {
        let fake = Fake::new(|n| match n {
            1 => Ok(answer(429, Some(0))),
            2 => Err("connection refused".to_owned()),
            3 => Ok(answer(503, Some(0))),
            _ => Ok(answer(200, None)),
        });
        let (ended, told) = run_all(&fake, 1, &settings(8)).await;
        assert_eq!((ended.unwrap(), told), (Ended::Complete, vec![(1, true), (2, false)]));
        assert_eq!(fake.n_asked.lock().unwrap().values().copied().collect::<Vec<_>>(), [4]);
    }

    #[tokio::test]
    async fn other_errors_are_answers() {
        let fake = Fake::new(|_| Ok(answer(500, None)));
        let (ended, told) = run_all(&fake, 3, &settings(2)).await;
        assert_eq!((ended.unwrap(), told.len()), (Ended::Complete, 4));
        assert!(told.iter().all(|(_, is_good)| !is_good));
        assert!(fake.n_asked.lock().unwrap().values().all(|n| *n == 1));
    }

    #[tokio::test]
    async fn a_run_ends_when_nobody_answers_or_somebody_stops_it() {
        let fake = Fake::new(|_| Err("connection refused".to_owned()));
        let impatient = Settings { patience: Some(Duration::ZERO), ..settings(2) };
        let (ended, told) = run_all(&fake, 3, &impatient).await;
        assert!(matches!(ended, Err(RunError::Unanswered { .. })) && told.is_empty());

        let fake = Fake::new(|_| Ok(answer(200, None)));
        let settings = settings(2);
        let stopped = run(lines(3), Arc::new(Wrapped(fake)), &settings, async {}, |_, _, _| Ok(()));
        assert_eq!(stopped.await.unwrap(), Ended::Stopped);
    }
}
