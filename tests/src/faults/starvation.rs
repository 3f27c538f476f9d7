//! Processes that get next to no processor time.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use rustix::process::Signal;

use crate::process::signal_pid;

/// What a share is a share of.
const PERIOD: Duration = Duration::from_millis(100);

/// A process that starves until this is dropped.
pub struct Starved {
    pid: u32,
    how: How,
}

enum How {
    /// A control group with a quota, and the one that the process came from.
    Group { starving: PathBuf, before: PathBuf },
    /// It is stopped most of the time.
    Signals { ending: Arc<AtomicBool>, thread: Option<JoinHandle<()>> },
}

impl Starved {
    /// From now on a process gets so much of every tenth of a second: by a control group's quota where this may make one, else by
    /// SIGSTOP and SIGCONT.
    pub fn start(pid: u32, share: Duration) -> Self {
        let how = group(pid, share).unwrap_or_else(|| signals(pid, share));
        Self { pid, how }
    }

    /// How it is done.
    pub fn means(&self) -> &'static str {
        match self.how {
            How::Group { .. } => "a control group's quota",
            How::Signals { .. } => "SIGSTOP and SIGCONT",
        }
    }
}

impl Drop for Starved {
    fn drop(&mut self) {
        match &mut self.how {
            How::Group { starving, before } => {
                let _ = fs::write(before.join("cgroup.procs"), self.pid.to_string());
                // Empty as soon as the process has left it.
                for _ in 0..100 {
                    if fs::remove_dir(&*starving).is_ok() {
                        return;
                    }
                    thread::sleep(Duration::from_millis(10));
                }
                eprintln!("{} stays", starving.display());
            }
            How::Signals { ending, thread } => {
                ending.store(true, Ordering::Relaxed);
                if let Some(thread) = thread.take() {
                    let _ = thread.join();
                }
                signal_pid(self.pid, Signal::CONT);
            }
        }
    }
}

/// Moves a process into a new group below the root of the hierarchy that has the processor, version 1 or 2.
fn group(pid: u32, share: Duration) -> Option<How> {
    let (period, share) = (PERIOD.as_micros(), share.as_micros());
    let list = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
    let own = |wanted: &dyn Fn(&str) -> bool| {
        let of = |line: &str| {
            let mut fields = line.splitn(3, ':').skip(1);
            let (controllers, path) = (fields.next()?, fields.next()?);
            wanted(controllers).then(|| path.trim_start_matches('/').to_owned())
        };
        list.lines().find_map(of)
    };
    let (root, before, limits) = if let Some(path) = own(&|c| c.split(',').any(|c| c == "cpu")) {
        let root = PathBuf::from("/sys/fs/cgroup/cpu");
        (root, path, vec![("cpu.cfs_period_us", period.to_string()), ("cpu.cfs_quota_us", share.to_string())])
    } else {
        let root = PathBuf::from("/sys/fs/cgroup");
        // What the machine's groups control is not changed for this.
        let controls = fs::read_to_string(root.join("cgroup.subtree_control")).ok()?;
        controls.split_whitespace().find(|c| *c == "cpu")?;
        (root, own(&str::is_empty)?, vec![("cpu.max", format!("{share} {period}"))])
    };
    let starving = root.join(format!("phalanx-faultlab-{}-{pid}", std::process::id()));
    fs::create_dir(&starving).ok()?;
    let set = |name: &str, value: &str| fs::write(starving.join(name), value);
    let done = limits.iter().try_for_each(|(name, value)| set(name, value));
    if done.and_then(|()| set("cgroup.procs", &pid.to_string())).is_err() {
        let _ = fs::remove_dir(&starving);
        return None;
    }
    Some(How::Group { starving, before: joined(&root, &before) })
}

fn joined(root: &Path, path: &str) -> PathBuf {
    if path.is_empty() { root.to_owned() } else { root.join(path) }
}

fn signals(pid: u32, share: Duration) -> How {
    let ending = Arc::new(AtomicBool::new(false));
    let thread = {
        let ending = Arc::clone(&ending);
        thread::spawn(move || {
            while !ending.load(Ordering::Relaxed) {
                signal_pid(pid, Signal::STOP);
                thread::sleep(PERIOD.saturating_sub(share));
                signal_pid(pid, Signal::CONT);
                thread::sleep(share);
            }
        })
    };
    How::Signals { ending, thread: Some(thread) }
}
