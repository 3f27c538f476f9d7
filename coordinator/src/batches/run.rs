//! One batch, from wherever it is to its end.

use std::{fs, sync::Arc, time::Duration};

use tokio::time::sleep;

use super::{
    files::{FileRecord, FilesError},
    record::{Counts, Status, Stored},
    service::Shared,
};
use crate::{
    batch::{
        ask::{Ask, Here},
        input,
        journal::{Done, Journal, JournalError},
        outcome::Outcome,
        runner::{Ended, RunError, Settings, run},
    },
    frontend::generation::unix_seconds,
    metrics as names,
};

/// Why a batch can't go on now.
#[derive(Debug, thiserror::Error)]
pub(super) enum Unfinished {
    #[error(transparent)]
    Files(#[from] FilesError),
    #[error(transparent)]
    Run(#[from] RunError),
    #[error("{0}")]
    Task(#[from] tokio::task::JoinError),
}

impl From<JournalError> for Unfinished {
    fn from(error: JournalError) -> Self {
        Self::Run(error.into())
    }
}

/// Takes a batch to its end. What it has done is on the disk at any time: it goes on from there when it is called again.
pub(super) async fn finish(shared: &Arc<Shared>, id: &str) -> Result<(), Unfinished> {
    while !shared.is_stopping() {
        let stored = shared.stored(id)?;
        match stored.batch.status {
            Status::Validating => validate(shared, &stored).await?,
            Status::InProgress => work(shared, &stored).await?,
            Status::Finalizing => conclude(shared, stored, Status::Completed).await?,
            Status::Cancelling => conclude(shared, stored, Status::Cancelled).await?,
            Status::Failed | Status::Completed | Status::Expired | Status::Cancelled => return Ok(()),
        }
    }
    Ok(())
}

/// Works with the disk where nobody waits.
async fn on_disk<T: Send + 'static>(
    shared: &Arc<Shared>,
    work: impl FnOnce(&Shared) -> Result<T, Unfinished> + Send + 'static,
) -> Result<T, Unfinished> {
    let shared = Arc::clone(shared);
    tokio::task::spawn_blocking(move || work(&shared)).await?
}

async fn validate(shared: &Arc<Shared>, stored: &Stored) -> Result<(), Unfinished> {
    let (id, file) = (stored.batch.id.clone(), stored.batch.input_file_id.clone());
    on_disk(shared, move |shared| {
        let looked = input::look(&shared.files.path(&file));
        let updated = shared.update(&id, |stored| {
            // It may have been cancelled meanwhile.
            if stored.batch.status == Status::Validating {
                match &looked {
                    Ok(looked) => stored.batch.judge(looked, unix_seconds()),
                    Err(error) => stored.batch.fail("unreadable_file", error.to_string(), unix_seconds()),
                }
            }
        })?;
        count_end(updated.batch.status);
        Ok(())
    })
    .await
}

/// The two files that results go to.
struct Results {
    good: Journal,
    bad: Journal,
}

impl Results {
    fn open(shared: &Shared, stored: &Stored) -> Result<(Self, Done), Unfinished> {
        let (good, done) = Journal::open(&shared.files.path(&stored.output))?;
        let (bad, failed) = Journal::open(&shared.files.path(&stored.error))?;
        Ok((Self { good, bad }, done.and(failed)))
    }

    fn append(&mut self, custom_id: Option<&str>, outcome: &Outcome) -> Result<(), JournalError> {
        let journal = if outcome.is_good() { &mut self.good } else { &mut self.bad };
        journal.append(outcome.to_line(custom_id))?;
        let kind = if outcome.is_good() { "completed" } else { "failed" };
        metrics::counter!(names::BATCH_LINES, "outcome" => kind).increment(1);
        Ok(())
    }
}

async fn work(shared: &Arc<Shared>, stored: &Stored) -> Result<(), Unfinished> {
    let (id, owner) = (stored.batch.id.clone(), stored.owner.clone());
    let opening = stored.clone();
    let (mut results, done) = on_disk(shared, move |shared| Results::open(shared, &opening)).await?;
    let mut counts = counts(stored, &done);
    shared.show(&id, counts);
    let security = Arc::clone(&shared.security);
    let whose = Arc::new(move || owner.as_deref().map_or(Ok(None), |name| security.named(name)));
    let ask: Arc<dyn Ask> = Arc::new(Here { router: shared.endpoints.clone(), whose, is_background: true });
    let settings =
        Settings { concurrency: shared.concurrency, patience: None, places: Some(Arc::clone(&shared.places)) };
    let input = shared.files.path(&stored.batch.input_file_id);
    let left = Duration::from_secs(stored.batch.expires_at.saturating_sub(unix_seconds()));
    let cancelled = shared.cancelled(&id);
    let stop = async {
        tokio::select! {
            () = cancelled => {}
            () = sleep(left) => {}
        }
    };
    let told = |custom_id: Option<&str>, _number: usize, outcome: Outcome| {
        results.append(custom_id, &outcome)?;
        let one = if outcome.is_good() { &mut counts.completed } else { &mut counts.failed };
        *one += 1;
        shared.show(&id, counts);
        Ok(())
    };
    let ended = run(input::read(&input, done.lines), ask, &settings, stop, told).await?;
    drop(results);
    let is_over = ended == Ended::Complete;
    let is_expired = unix_seconds() >= stored.batch.expires_at;
    let stored = on_disk(shared, move |shared| {
        Ok(shared.update(&id, |stored| {
            stored.batch.request_counts = counts;
            // It may have been cancelled in the last moment.
            if is_over && stored.batch.status == Status::InProgress {
                stored.batch.move_to(Status::Finalizing, unix_seconds());
            }
        })?)
    })
    .await?;
    if stored.batch.status == Status::InProgress && is_expired {
        expire(shared, stored).await?;
    }
    Ok(())
}

fn counts(stored: &Stored, done: &Done) -> Counts {
    Counts { total: stored.batch.request_counts.total, completed: done.n_good, failed: done.n_failed() }
}

/// Lines that there was no time for say so.
async fn expire(shared: &Arc<Shared>, stored: Stored) -> Result<(), Unfinished> {
    let opening = stored.clone();
    on_disk(shared, move |shared| {
        let (mut results, done) = Results::open(shared, &opening)?;
        let mut lines = input::read(&shared.files.path(&opening.batch.input_file_id), done.lines);
        while let Some(parsed) = lines.blocking_recv() {
            let parsed = parsed.map_err(RunError::from)?;
            let number = match &parsed {
                Ok(line) => line.number,
                Err(bad) => bad.number,
            };
            results.append(crate::batch::line::id_of(&parsed), &Outcome::expired(number))?;
        }
        Ok(())
    })
    .await?;
    conclude(shared, stored, Status::Expired).await
}

/// Makes files of the results, and ends the batch.
async fn conclude(shared: &Arc<Shared>, stored: Stored, end: Status) -> Result<(), Unfinished> {
    on_disk(shared, move |shared| {
        let (results, done) = Results::open(shared, &stored)?;
        results.good.sync()?;
        results.bad.sync()?;
        let now = unix_seconds();
        let adopt = |id: &String, what: &str| -> Result<Option<String>, FilesError> {
            let path = shared.files.path(id);
            let bytes = fs::metadata(&path)?.len();
            if bytes == 0 {
                super::disk::remove(&path)?;
                return Ok(None);
            }
            shared.files.adopt(FileRecord {
                id: id.clone(),
                bytes,
                created_at: now,
                expires_at: now.saturating_add(stored.results_kept_seconds),
                filename: format!("{}_{what}.jsonl", stored.batch.id),
                purpose: "batch_output".to_owned(),
                owner: stored.owner.clone(),
            })?;
            Ok(Some(id.clone()))
        };
        let (output, error) = (adopt(&stored.output, "output")?, adopt(&stored.error, "error")?);
        let counts = counts(&stored, &done);
        shared.update(&stored.batch.id, |stored| {
            (stored.batch.output_file_id, stored.batch.error_file_id) = (output, error);
            stored.batch.request_counts = counts;
            stored.batch.move_to(end, now);
        })?;
        count_end(end);
        let (id, Counts { total, completed, failed }) = (&stored.batch.id, counts);
        tracing::info!(batch = id, status = ?end, total, completed, failed, "a batch is over");
        Ok(())
    })
    .await
}

fn count_end(status: Status) {
    if let Some((_, name)) = Status::ENDS.iter().find(|(end, _)| *end == status) {
        metrics::counter!(names::BATCHES, "status" => *name).increment(1);
    }
}
