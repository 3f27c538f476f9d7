//! One round: the load runs, and a row's fault looks for its moment.

use std::{
    fmt::Write as _,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, bail};
use rustix::process::Signal;
use tokio::{runtime::Runtime, task::JoinHandle};

use super::{
    deployment::Deployment,
    load::Job,
    stream::{Client, Progress, Record, run},
    within,
};
use crate::{process::signal_pid, workload::Numbers};

/// Longest wait for a stream's progress before a fault.
const MOMENT_LIMIT: Duration = Duration::from_secs(120);

/// A running load.
pub struct Load {
    /// How far all streams are.
    pub progress: Arc<Progress>,
    vanish: Vec<Arc<AtomicBool>>,
    /// Clients ask again and again while this is set.
    again: Arc<AtomicBool>,
    tasks: Vec<JoinHandle<Vec<Record>>>,
}

impl Load {
    /// Starts all requests at once. With a `key`, clients come back after a broken connection. If it `repeats`, each client
    /// asks the same again until [`Load::finish`].
    pub fn start(
        runtime: &Runtime,
        deployment: &Deployment,
        jobs: &[Job],
        key: Option<&str>,
        repeats: bool,
    ) -> Result<Self> {
        let (http, grpc) = deployment.addresses()?;
        let progress = Arc::new(Progress::default());
        let again = Arc::new(AtomicBool::new(repeats));
        let vanish: Vec<_> = jobs.iter().map(|_| Arc::new(AtomicBool::new(false))).collect();
        let tasks = jobs.iter().zip(&vanish).enumerate().map(|(index, (job, vanish))| {
            let client = Client {
                http: http.clone(),
                grpc: grpc.clone(),
                key: key.map(|k| format!("{k}-{index}")),
                vanish: Arc::clone(vanish),
                progress: Arc::clone(&progress),
            };
            runtime.spawn(client_life(client, job.clone(), Arc::clone(&again)))
        });
        let tasks = tasks.collect();
        Ok(Self { progress, vanish, again, tasks })
    }

    /// Lets nobody ask again, and waits for all streams: those of the first client, then the second's.
    pub fn finish(self, runtime: &Runtime) -> Vec<(usize, Record)> {
        self.again.store(false, Ordering::Relaxed);
        let all = runtime.block_on(futures::future::join_all(self.tasks));
        let of_client = |(client, records): (usize, Result<Vec<Record>, _>)| {
            let records = records.expect("clients do not panic");
            records.into_iter().map(move |record| (client, record))
        };
        all.into_iter().enumerate().flat_map(of_client).collect()
    }
}

/// One request, or the same one again and again.
async fn client_life(client: Client, job: Job, again: Arc<AtomicBool>) -> Vec<Record> {
    let mut records: Vec<Record> = Vec::new();
    loop {
        let mut next = client.clone();
        if let Some(key) = &mut next.key {
            // Another request has another key.
            let _infallible = write!(key, "-{}", records.len());
        }
        records.push(run(next, job.clone()).await);
        let is_lost = records.last().is_some_and(|r| r.error.is_some());
        if is_lost || !again.load(Ordering::Relaxed) {
            client.progress.ended.fetch_add(1, Ordering::Relaxed);
            return records;
        }
    }
}

/// What a row's fault works with.
pub struct Round<'a> {
    /// The processes.
    pub deployment: &'a mut Deployment,
    /// The streams.
    pub load: &'a Load,
    /// Seeded.
    pub numbers: Numbers,
    /// Tokens of all streams together, without the fault.
    pub all_tokens: u64,
    /// From the start to the last first token, without the fault.
    pub prefill: Duration,
    /// When the fault began.
    pub injected: Option<Instant>,
    /// Runs clients.
    pub runtime: &'a Runtime,
    /// Whether this is a long round: what is away stays away longer.
    pub full: bool,
}

impl Round<'_> {
    /// Waits until a seeded token between these shares (percent) of all tokens has come.
    pub fn wait_decode(&mut self, from: u64, to: u64) -> Result<()> {
        let share = from + self.numbers.below(to - from + 1);
        let wanted = self.all_tokens * share / 100;
        self.wait_tokens(wanted)
    }

    /// Waits until so many tokens have come.
    pub fn wait_tokens(&self, wanted: u64) -> Result<()> {
        let progress = &self.load.progress;
        let all = self.load.tasks.len() as u64;
        within(MOMENT_LIMIT, "enough tokens came", || {
            progress.tokens.load(Ordering::Relaxed) >= wanted || progress.ended.load(Ordering::Relaxed) == all
        })?;
        if progress.ended.load(Ordering::Relaxed) == all {
            bail!("all streams ended before the fault");
        }
        Ok(())
    }

    /// Waits until copies of KV rows are at most so many steps behind.
    pub fn wait_mirrored(&self, steps: u64) -> Result<()> {
        within(MOMENT_LIMIT, "copies of KV rows have caught up", || {
            self.is_over() || self.deployment.mirror_lag().is_some_and(|lag| lag <= steps)
        })?;
        if self.is_over() {
            bail!("all streams ended before the fault");
        }
        Ok(())
    }

    /// Waits until every stream has a token.
    pub fn wait_all_begun(&self) -> Result<()> {
        let all = self.load.tasks.len() as u64;
        let progress = &self.load.progress;
        within(MOMENT_LIMIT, "every stream has a token", || {
            progress.begun.load(Ordering::Relaxed) >= all || progress.ended.load(Ordering::Relaxed) > 0
        })?;
        if progress.ended.load(Ordering::Relaxed) > 0 {
            bail!("a stream ended before all had begun");
        }
        Ok(())
    }

    /// Whether all streams have ended.
    pub fn is_over(&self) -> bool {
        self.load.progress.ended.load(Ordering::Relaxed) == self.load.tasks.len() as u64
    }

    /// Waits for a seeded moment while prompts are computed.
    pub fn wait_prefill(&mut self) {
        let span = u64::try_from(self.prefill.as_millis()).unwrap_or(1000);
        // Requests need a little time to arrive.
        thread::sleep(Duration::from_millis(span / 10 + self.numbers.below(span * 6 / 10 + 1)));
    }

    /// Notes that the fault begins now.
    pub fn inject(&mut self) {
        self.injected.get_or_insert_with(Instant::now);
    }

    /// The fault: a signal to a process.
    pub fn signal(&mut self, pid: u32, signal: Signal) {
        self.inject();
        signal_pid(pid, signal);
    }

    /// Process id of a seeded rank, or of a given one.
    pub fn rank_pid(&mut self, rank: Option<u32>) -> Result<u32> {
        let world = u64::from(self.deployment.setup.world_size);
        let rank = rank.unwrap_or_else(|| u32::try_from(self.numbers.below(world)).unwrap_or(0));
        Ok(self.deployment.rank(rank)?.pid)
    }

    /// Makes a client vanish at its next event.
    pub fn vanish(&self, client: usize) {
        self.load.vanish[client].store(true, Ordering::Relaxed);
    }

    /// Waits until the group serves another epoch than before.
    pub fn wait_reformed(&self, before: f64) -> Result<()> {
        self.wait_reformed_within(super::PATIENCE, before)
    }

    /// The same with a limit of its own.
    pub fn wait_reformed_within(&self, limit: Duration, before: f64) -> Result<()> {
        within(limit, "the group serves another epoch", || {
            self.deployment.epoch() > before && self.deployment.status().is_ok_and(|s| s.phase == "serving")
        })
    }
}
