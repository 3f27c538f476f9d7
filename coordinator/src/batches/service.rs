//! Batches of this process while it leads: what clients ask of them, and the task that runs them.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
    time::Duration,
};

use axum::Router;
use tokio::{
    sync::{Notify, Semaphore, watch},
    task::{JoinHandle, JoinSet},
    time::{MissedTickBehavior, interval, sleep},
};

use super::{
    FilesConfig, disk,
    files::{FileRecord, Files, FilesError, Incoming, KEPT_SECONDS, new_id},
    record::{Batch, BatchError, Counts, MOST_UNFINISHED, NewBatch, Status, Stored},
    run::{Unfinished, finish},
};
use crate::{
    batch::{journal::JournalError, runner::RunError},
    frontend::generation::unix_seconds,
    metrics::{self as names, Present},
    security::Security,
};

/// Batches that run at the same time: one that waits for its key's next minute must not hold up all others.
const MOST_RUNNING: usize = 16;
/// Between looks at what is to be removed.
const SWEEP: Duration = Duration::from_secs(60);
/// Pause after the disk said no.
const DISK_PAUSE: Duration = Duration::from_secs(10);
/// Pause while another process still has the files.
const BUSY_PAUSE: Duration = Duration::from_millis(200);

/// Files and batches of a leader. Clones are the same.
#[derive(Clone)]
pub struct Batches(Arc<Outer>);

struct Outer {
    /// There once the folder is ours.
    shared: OnceLock<Arc<Shared>>,
    stopping: watch::Sender<bool>,
    task: Mutex<Option<JoinHandle<()>>>,
}

/// What runs and requests have in common.
pub(super) struct Shared {
    pub files: Arc<Files>,
    folder: PathBuf,
    /// Never held while the disk is asked for something; changed by whoever holds the files.
    entries: Mutex<BTreeMap<String, Entry>>,
    pub endpoints: Router,
    pub security: Arc<Security>,
    /// Shared by the lines of all batches.
    pub places: Arc<Semaphore>,
    pub concurrency: usize,
    changed: Notify,
    stopping: watch::Receiver<bool>,
    gauges: Gauges,
}

struct Gauges {
    unfinished: Present,
    files: Present,
    bytes: Present,
}

impl Gauges {
    fn new() -> Self {
        let [unfinished, files, bytes] =
            [names::BATCHES_UNFINISHED, names::FILES, names::FILES_BYTES].map(|name| Present::new(name, Vec::new()));
        Self { unfinished, files, bytes }
    }
}

/// Counters and gauges are there before anything is counted.
pub fn begin_to_count() {
    drop(Gauges::new());
    for outcome in ["completed", "failed"] {
        drop(metrics::counter!(names::BATCH_LINES, "outcome" => outcome));
    }
    for (_, status) in Status::ENDS {
        drop(metrics::counter!(names::BATCHES, "status" => status));
    }
}

struct Entry {
    stored: Stored,
    is_running: bool,
    is_cancelled: watch::Sender<bool>,
}

impl Batches {
    /// Takes the folder as soon as nobody else has it, and goes on with what is in it. Lines go to `endpoints`, `concurrency` of all
    /// batches at once.
    pub fn start(config: FilesConfig, endpoints: Router, security: Arc<Security>, concurrency: usize) -> Self {
        let (stopping, stopped) = watch::channel(false);
        let outer = Arc::new(Outer { shared: OnceLock::new(), stopping, task: Mutex::default() });
        let task = tokio::spawn({
            let outer = Arc::clone(&outer);
            async move {
                let mut stopping = stopped.clone();
                let opened = tokio::select! {
                    opened = open(config) => opened,
                    () = told_to_stop(&mut stopping) => return,
                };
                let (files, folder, entries) = opened;
                let shared = Arc::new(Shared {
                    files: Arc::new(files),
                    folder,
                    entries: Mutex::new(entries),
                    endpoints,
                    security,
                    places: Arc::new(Semaphore::new(concurrency.max(1))),
                    concurrency: concurrency.max(1),
                    changed: Notify::new(),
                    stopping: stopped,
                    gauges: Gauges::new(),
                });
                shared.measure();
                let _ = outer.shared.set(Arc::clone(&shared));
                oversee(&shared).await;
                // It waits for what is being changed.
                let files = Arc::clone(&shared.files);
                if let Err(error) = tokio::task::spawn_blocking(move || files.let_go()).await {
                    tracing::error!(%error, "the folder of files could not be let go");
                }
            }
        });
        *outer.task.lock().unwrap_or_else(PoisonError::into_inner) = Some(task);
        Self(outer)
    }

    /// Gives up what runs, and lets another process have the folder.
    pub async fn stop(&self) {
        self.0.stopping.send_replace(true);
        let task = self.0.task.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(task) = task
            && let Err(error) = task.await
        {
            tracing::error!(%error, "the task that runs batches has failed");
        }
    }

    fn shared(&self) -> Result<&Arc<Shared>, FilesError> {
        self.0.shared.get().ok_or(FilesError::Busy)
    }

    /// Does something with files and batches where it may wait for the disk.
    async fn on_disk<T: Send + 'static, E: From<FilesError> + Send + 'static>(
        &self,
        work: impl FnOnce(&Arc<Shared>) -> Result<T, E> + Send + 'static,
    ) -> Result<T, E> {
        let shared = Arc::clone(self.shared()?);
        let done = tokio::task::spawn_blocking(move || {
            let done = work(&shared);
            shared.measure();
            done
        });
        done.await.map_err(|error| FilesError::Disk(std::io::Error::other(error)))?
    }

    /// The files.
    ///
    /// # Errors
    /// While another process has them.
    pub fn files(&self) -> Result<&Arc<Files>, FilesError> {
        Ok(&self.shared()?.files)
    }

    /// Removes somebody's file.
    ///
    /// # Errors
    /// If he has none of this id, or a batch reads it.
    pub async fn remove_file(&self, owner: Option<String>, id: String) -> Result<(), FilesError> {
        self.on_disk(move |shared| {
            shared.files.get(owner.as_deref(), &id, unix_seconds())?;
            shared.files.remove(&id, |id| shared.uses(id))
        })
        .await
    }

    /// Makes a file of what was taken in.
    ///
    /// # Errors
    /// If the disk says no.
    pub async fn keep(
        &self,
        incoming: Incoming,
        filename: String,
        purpose: &'static str,
        owner: Option<String>,
        kept_seconds: u64,
    ) -> Result<FileRecord, FilesError> {
        self.on_disk(move |_| incoming.keep(&filename, purpose, owner.as_deref(), unix_seconds(), kept_seconds)).await
    }

    /// Makes a batch. If one of its name is there, that one.
    ///
    /// # Errors
    /// If its input can't be one, or there are too many.
    pub async fn create(&self, owner: Option<String>, new: NewBatch) -> Result<Batch, BatchError> {
        self.on_disk(move |shared| shared.create(owner, new, unix_seconds())).await
    }

    /// Somebody's batch.
    ///
    /// # Errors
    /// If he has none of this id.
    pub fn get(&self, owner: Option<&str>, id: &str) -> Result<Batch, BatchError> {
        let entries = self.shared()?.entries();
        let entry = entries.get(id).filter(|entry| entry.stored.owner.as_deref() == owner);
        entry.map(|entry| entry.stored.batch.clone()).ok_or(BatchError::Unknown)
    }

    /// All batches of somebody, the newest first.
    ///
    /// # Errors
    /// While another process has them.
    pub fn list(&self, owner: Option<&str>) -> Result<Vec<Batch>, BatchError> {
        let entries = self.shared()?.entries();
        let of_owner = entries.values().filter(|entry| entry.stored.owner.as_deref() == owner);
        let mut list: Vec<_> = of_owner.map(|entry| entry.stored.batch.clone()).collect();
        list.sort_by(|a, b| (b.created_at, &b.id).cmp(&(a.created_at, &a.id)));
        Ok(list)
    }

    /// Ends somebody's batch before its time.
    ///
    /// # Errors
    /// If he has none of this id, or it is over.
    pub async fn cancel(&self, owner: Option<String>, id: String) -> Result<Batch, BatchError> {
        self.on_disk(move |shared| shared.cancel(owner.as_deref(), &id, unix_seconds())).await
    }
}

/// Waits for the folder, and reads what is in it.
async fn open(config: FilesConfig) -> (Files, PathBuf, BTreeMap<String, Entry>) {
    let mut is_told = false;
    loop {
        let config = config.clone();
        let opening = tokio::task::spawn_blocking(move || -> Result<_, FilesError> {
            let files = Files::open(config)?;
            let folder = files.root().join("batches");
            let stored = disk::read_all::<Stored>(&folder)?;
            Ok((files, folder, stored))
        });
        let error = match opening.await {
            Ok(Ok((files, folder, stored))) => {
                let n_unfinished = stored.iter().filter(|stored| !stored.batch.status.is_over()).count();
                tracing::info!(folder = %files.root().display(), n_unfinished, "files and batches are there");
                let entry = |stored: Stored| (stored.batch.id.clone(), Entry::new(stored));
                return (files, folder, stored.into_iter().map(entry).collect());
            }
            Ok(Err(FilesError::Busy)) => {
                sleep(BUSY_PAUSE).await;
                continue;
            }
            Ok(Err(error)) => error.to_string(),
            Err(error) => error.to_string(),
        };
        if !std::mem::replace(&mut is_told, true) {
            tracing::error!(error, "there are no files and batches (--files-dir); trying again");
        }
        sleep(DISK_PAUSE).await;
    }
}

/// Waits for the end; also if whoever tells it is gone.
async fn told_to_stop(stopping: &mut watch::Receiver<bool>) {
    let _ = stopping.wait_for(|is_stopping| *is_stopping).await;
}

/// Runs batches until told to stop; gives up what runs then.
async fn oversee(shared: &Arc<Shared>) {
    let mut running = JoinSet::new();
    let mut stopping = shared.stopping.clone();
    let mut sweeps = interval(SWEEP);
    sweeps.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        while running.len() < MOST_RUNNING
            && let Some(id) = shared.take_next()
        {
            running.spawn(run_one(Arc::clone(shared), id));
        }
        tokio::select! {
            () = told_to_stop(&mut stopping) => break,
            Some(_) = running.join_next() => {}
            () = shared.changed.notified() => {}
            _ = sweeps.tick() => {
                let shared = Arc::clone(shared);
                let swept = tokio::task::spawn_blocking(move || shared.sweep(unix_seconds())).await;
                if let Ok(Err(error)) = swept {
                    tracing::warn!(%error, "files whose time is over stay for now");
                }
            }
        }
    }
    running.shutdown().await;
}

async fn run_one(shared: Arc<Shared>, id: String) {
    if let Err(error) = finish(&shared, &id).await {
        let is_busy = matches!(&error, Unfinished::Run(RunError::Output(JournalError::Busy { .. })));
        if !is_busy {
            tracing::error!(batch = id, %error, "a batch can't go on; trying again");
        }
        sleep(if is_busy { BUSY_PAUSE } else { DISK_PAUSE }).await;
    }
    if let Some(entry) = shared.entries().get_mut(&id) {
        entry.is_running = false;
    }
    shared.measure();
    shared.changed.notify_one();
}

impl Entry {
    fn new(stored: Stored) -> Self {
        Self { stored, is_running: false, is_cancelled: watch::Sender::new(false) }
    }
}

impl Shared {
    fn entries(&self) -> MutexGuard<'_, BTreeMap<String, Entry>> {
        // Each change is whole before it can fail.
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn record_path(&self, id: &str) -> PathBuf {
        self.folder.join(format!("{id}.{}", disk::RECORD))
    }

    /// Gauges say what there is.
    fn measure(&self) {
        let n_unfinished = self.entries().values().filter(|entry| !entry.stored.batch.status.is_over()).count();
        let (n_files, bytes) = self.files.size();
        self.gauges.unfinished.set(n_unfinished as f64);
        self.gauges.files.set(n_files as f64);
        self.gauges.bytes.set(bytes as f64);
    }

    /// The oldest batch that is neither over nor run by anybody; from now on it is.
    fn take_next(&self) -> Option<String> {
        let mut entries = self.entries();
        let waits = |entry: &&mut Entry| !entry.is_running && !entry.stored.batch.status.is_over();
        let next = entries.values_mut().filter(waits).min_by_key(|entry| entry.stored.batch.created_at)?;
        next.is_running = true;
        Some(next.stored.batch.id.clone())
    }

    /// Whether a batch that is not over needs a file.
    fn uses(&self, file: &str) -> bool {
        let entries = self.entries();
        let mut unfinished = entries.values().map(|entry| &entry.stored).filter(|s| !s.batch.status.is_over());
        unfinished
            .any(|stored| [&stored.batch.input_file_id, &stored.output, &stored.error].contains(&&file.to_owned()))
    }

    fn sweep(&self, now: u64) -> Result<(), FilesError> {
        self.files.sweep(now, |id| self.uses(id))?;
        let _held = self.files.held()?;
        let is_old = |entry: &Entry| {
            let batch = &entry.stored.batch;
            batch.status.is_over() && now >= batch.expires_at.saturating_add(KEPT_SECONDS)
        };
        let entries = self.entries();
        let old: Vec<_> = entries.iter().filter(|(_, entry)| is_old(entry)).map(|(id, _)| id.clone()).collect();
        drop(entries);
        for id in old {
            disk::remove(&self.record_path(&id))?;
            self.entries().remove(&id);
        }
        self.measure();
        Ok(())
    }

    fn create(&self, owner: Option<String>, new: NewBatch, now: u64) -> Result<Batch, BatchError> {
        let _held = self.files.held()?;
        let file = self.files.get(owner.as_deref(), &new.input_file_id, now).map_err(|_| BatchError::UnknownFile)?;
        if file.purpose != "batch" {
            return Err(BatchError::WrongPurpose(file.purpose));
        }
        let entries = self.entries();
        let id = new.id.clone().unwrap_or_else(|| new_id("batch_"));
        if let Some(entry) = entries.get(&id) {
            return Ok(entry.stored.batch.clone());
        }
        let of_owner = |entry: &&Entry| entry.stored.owner == owner && !entry.stored.batch.status.is_over();
        if entries.values().filter(of_owner).count() >= MOST_UNFINISHED {
            return Err(BatchError::TooMany);
        }
        drop(entries);
        let results_kept_seconds = new.results_kept_seconds;
        let batch = Batch::new(id.clone(), new, now);
        let (output, error) = (new_id("file-"), new_id("file-"));
        let stored = Stored { batch: batch.clone(), owner, output, error, results_kept_seconds };
        disk::write(&self.record_path(&id), &stored).map_err(FilesError::from)?;
        self.entries().insert(id, Entry::new(stored));
        self.changed.notify_one();
        Ok(batch)
    }

    fn cancel(&self, owner: Option<&str>, id: &str, now: u64) -> Result<Batch, BatchError> {
        let status = {
            let entries = self.entries();
            let entry = entries.get(id).filter(|entry| entry.stored.owner.as_deref() == owner);
            entry.ok_or(BatchError::Unknown)?.stored.batch.status
        };
        match status {
            Status::Validating | Status::InProgress => {}
            Status::Cancelling => return Ok(self.stored(id)?.batch),
            _ => return Err(BatchError::Over),
        }
        let stored = self.update(id, |stored| {
            // It may have gone on since.
            if matches!(stored.batch.status, Status::Validating | Status::InProgress) {
                stored.batch.move_to(Status::Cancelling, now);
            }
        })?;
        if stored.batch.status != Status::Cancelling {
            return Err(BatchError::Over);
        }
        if let Some(entry) = self.entries().get(id) {
            entry.is_cancelled.send_replace(true);
        }
        self.changed.notify_one();
        Ok(stored.batch)
    }

    /// A batch as it is now.
    pub fn stored(&self, id: &str) -> Result<Stored, FilesError> {
        self.entries().get(id).map(|entry| entry.stored.clone()).ok_or(FilesError::Unknown)
    }

    /// Changes a batch, on the disk first.
    pub fn update(&self, id: &str, change: impl FnOnce(&mut Stored)) -> Result<Stored, FilesError> {
        let _held = self.files.held()?;
        let mut stored = self.stored(id)?;
        let counts = stored.batch.request_counts;
        change(&mut stored);
        disk::write(&self.record_path(id), &stored)?;
        if let Some(entry) = self.entries().get_mut(id) {
            let shown = entry.stored.batch.request_counts;
            entry.stored = stored.clone();
            // Lines may have been done meanwhile.
            if stored.batch.request_counts == counts {
                entry.stored.batch.request_counts = shown;
            }
        }
        Ok(stored)
    }

    /// Shows how many lines are done. The disk need not know: results say it.
    pub fn show(&self, id: &str, counts: Counts) {
        if let Some(entry) = self.entries().get_mut(id) {
            entry.stored.batch.request_counts = counts;
        }
    }

    /// Ends when a batch is to be cancelled.
    pub fn cancelled(&self, id: &str) -> impl Future<Output = ()> + Send + 'static + use<> {
        let cancelled = self.entries().get(id).map(|entry| entry.is_cancelled.subscribe());
        async move {
            if let Some(mut cancelled) = cancelled {
                let _ = cancelled.wait_for(|is_cancelled| *is_cancelled).await;
            }
        }
    }

    /// Whether this process is to stop running batches.
    pub fn is_stopping(&self) -> bool {
        *self.stopping.borrow()
    }
}
