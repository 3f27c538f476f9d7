//! Shards that the laboratory starts itself, and the supervisor that starts them again.

use std::{
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use rustix::process::Signal;

use crate::process::Process;

/// Pause before a shard is started again: as the keeper of local shards.
const RESTART_PAUSE: Duration = Duration::from_millis(100);

struct Kept {
    id: String,
    wrapper: Vec<String>,
    args: Vec<String>,
    process: Process,
    restart: bool,
    earlier: Vec<(Instant, String)>,
}

/// The shards, ended when dropped.
pub struct OwnShards {
    shards: Arc<Mutex<Vec<Kept>>>,
    ending: Arc<AtomicBool>,
    supervisor: Option<JoinHandle<()>>,
}

impl Default for OwnShards {
    fn default() -> Self {
        let shards = Arc::new(Mutex::new(Vec::new()));
        let ending = Arc::new(AtomicBool::new(false));
        let supervisor = {
            let (shards, ending) = (Arc::clone(&shards), Arc::clone(&ending));
            thread::spawn(move || supervise(&shards, &ending))
        };
        Self { shards, ending, supervisor: Some(supervisor) }
    }
}

impl OwnShards {
    /// Starts a shard; `first_life` are options that a restarted one does not have.
    pub fn start(&self, id: &str, wrapper: &[String], args: &[String], first_life: &[String]) {
        let all: Vec<_> = args.iter().chain(first_life).cloned().collect();
        let process = Process::start_in(wrapper, "shard", &all);
        let kept = Kept {
            id: id.to_owned(),
            wrapper: wrapper.to_vec(),
            args: args.to_vec(),
            process,
            restart: true,
            earlier: Vec::new(),
        };
        self.lock().push(kept);
    }

    /// Process id of a shard.
    pub fn pid(&self, id: &str) -> Option<u32> {
        self.lock().iter().find(|k| k.id == id).map(|k| k.process.pid())
    }

    /// Process ids of all.
    pub fn pids(&self) -> Vec<u32> {
        self.lock().iter().map(|k| k.process.pid()).collect()
    }

    /// Whether shards that end are started again from now on.
    pub fn set_restart(&self, restart: bool) {
        self.lock().iter_mut().for_each(|k| k.restart = restart);
    }

    /// Lines of all shards since a moment.
    pub fn log_since(&self, moment: Instant) -> Vec<(Instant, String)> {
        let shards = self.lock();
        let named = shards.iter().flat_map(|k| {
            let lines = k.earlier.iter().filter(|(at, _)| *at >= moment).cloned().chain(k.process.log_since(moment));
            lines.map(|(at, line)| (at, format!("[{}] {line}", k.id)))
        });
        named.collect()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Kept>> {
        self.shards.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl Drop for OwnShards {
    fn drop(&mut self) {
        self.ending.store(true, Ordering::Relaxed);
        if let Some(supervisor) = self.supervisor.take() {
            let _ = supervisor.join();
        }
        for kept in self.lock().iter() {
            // A stopped process would not see anything else.
            kept.process.signal(Signal::KILL);
        }
    }
}

fn supervise(shards: &Mutex<Vec<Kept>>, ending: &AtomicBool) {
    let since = Instant::now();
    let mut due: Vec<(String, Instant)> = Vec::new();
    while !ending.load(Ordering::Relaxed) {
        if let Ok(mut shards) = shards.lock() {
            for kept in shards.iter_mut().filter(|k| k.restart) {
                if kept.process.ended().is_none() {
                    continue;
                }
                match due.iter().position(|(id, _)| *id == kept.id) {
                    None => due.push((kept.id.clone(), Instant::now() + RESTART_PAUSE)),
                    Some(index) if due[index].1 <= Instant::now() => {
                        due.swap_remove(index);
                        let next = Process::start_in(&kept.wrapper, "shard", &kept.args);
                        let last = std::mem::replace(&mut kept.process, next);
                        kept.earlier.extend(last.log_since(since));
                    }
                    Some(_) => {}
                }
            }
        }
        thread::sleep(Duration::from_millis(10));
    }
}
