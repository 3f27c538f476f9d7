//! Threads for one operation after another: they spin for a moment between operations, then sleep.
//!
//! The calling thread works too, and an operation ends when its tasks are done: a thread that wakes up late finds the
//! job closed, and nobody waits for it. Which thread does a task never decides a bit, for tasks write disjoint outputs.
//!
//! Each thread has a share of the tasks, the same part of every operation, and helps others when its own is done: what it
//! wrote in one operation lies in its core's caches in the next. Two threads that took tasks as they came had 1.3 to 1.6
//! times the speed of one, where two processes side by side have twice that.
#![allow(unsafe_code)]

use std::{
    any::Any,
    cell::UnsafeCell,
    ops::Range,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::{
        Arc, Condvar, Mutex, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use super::simd::Line;
use crate::error::KernelError;

/// How long a thread spins for the next operation before it sleeps. Within a step operations follow within a few µs.
const SPIN: Duration = Duration::from_micros(60);

/// Low bits of the state: threads at work on the job.
const ACTIVE: u64 = (1 << 16) - 1;
/// State bit: the job takes threads.
const OPEN: u64 = 1 << 16;
/// State bit: threads shall end.
const STOP: u64 = 1 << 17;
/// The number of the job counts in the bits from here up.
const EPOCH: u64 = 1 << 18;

/// A job: calls `task(index, thread)` for each index of all shares.
#[derive(Clone, Copy)]
struct Job {
    task: *const (dyn Fn(usize, usize) + Sync),
}

/// A thread's part of a job: the tasks from `next` to before `end`.
struct Share {
    next: AtomicUsize,
    end: AtomicUsize,
}

struct Shared {
    state: AtomicU64,
    /// Of each thread.
    shares: Vec<Line<Share>>,
    job: UnsafeCell<Option<Job>>,
    sleepers: AtomicUsize,
    sleep: Mutex<()>,
    wake: Condvar,
    /// The caller sleeps here until no thread is active.
    done: Condvar,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

// SAFETY: `job` is written by the caller only while the state is closed and nobody is active; a thread reads it only after
// it has entered (compare-exchange on the open state, acquire), and the caller waits until all that entered have left.
// The pointee is `Sync`.
unsafe impl Sync for Shared {}
// SAFETY: as above.
unsafe impl Send for Shared {}

impl Shared {
    /// Lets nobody begin another task.
    fn leave_tasks(&self) {
        self.shares.iter().for_each(|Line(share)| share.next.store(usize::MAX / 2, Ordering::Relaxed));
    }
}

/// The part of `n` tasks that is a thread's share if all have as many.
pub(crate) fn share_of(n: usize, n_threads: usize, thread: usize) -> Range<usize> {
    n * thread / n_threads..n * (thread + 1) / n_threads
}

/// A number of threads, the caller's among them.
pub(crate) struct Pool {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Pool {
    /// A pool of `n_threads` (at least 1), the caller being one. `cores[i]`, where there is one, is the core that thread
    /// `i + 1` stays on; the caller's thread is not touched.
    pub fn new(n_threads: usize, cores: &[usize]) -> Result<Self, KernelError> {
        let no_threads = |reason: String| KernelError::NoDevice { name: "cpu".into(), reason };
        if n_threads == 0 || n_threads > 1024 {
            return Err(no_threads(format!("{n_threads} threads asked for: use 1 to 1024")));
        }
        let shared = Arc::new(Shared {
            state: AtomicU64::new(0),
            shares: (0..n_threads)
                .map(|_| Line(Share { next: AtomicUsize::new(0), end: AtomicUsize::new(0) }))
                .collect(),
            job: UnsafeCell::new(None),
            sleepers: AtomicUsize::new(0),
            sleep: Mutex::new(()),
            wake: Condvar::new(),
            done: Condvar::new(),
            panic: Mutex::new(None),
        });
        let mut pool = Self { shared, threads: Vec::new() };
        for thread in 1..n_threads {
            let (shared, core) = (pool.shared.clone(), cores.get(thread - 1).copied());
            let handle = std::thread::Builder::new()
                .name(format!("kernels-{thread}"))
                .spawn(move || {
                    pin(core);
                    serve(&shared, thread);
                })
                .map_err(|e| no_threads(format!("can't start thread {thread} of {n_threads}: {e}")))?;
            pool.threads.push(handle);
        }
        Ok(pool)
    }

    /// Threads, the caller's among them.
    pub fn n_threads(&self) -> usize {
        self.threads.len() + 1
    }

    /// Calls `task(index, thread)` once for each `index` below `n_tasks`; returns when all are done. No two calls that
    /// run at the same time have the same `thread`, which is below [`Pool::n_threads`]. Tasks are shared out evenly.
    /// A panic in a task is passed on.
    pub fn run(&mut self, n_tasks: usize, task: &(dyn Fn(usize, usize) + Sync)) {
        let n_threads = self.n_threads();
        self.run_shares(n_tasks, &|thread| share_of(n_tasks, n_threads, thread).start, task);
    }

    /// As [`Pool::run`]. `first_of(thread)`, which ascends, is the first task of that thread's share.
    pub fn run_shares(
        &mut self,
        n_tasks: usize,
        first_of: &dyn Fn(usize) -> usize,
        task: &(dyn Fn(usize, usize) + Sync),
    ) {
        if self.threads.is_empty() || n_tasks <= 1 {
            (0..n_tasks).for_each(|index| task(index, 0));
            return;
        }
        let shared = &*self.shared;
        // SAFETY: only the lifetime changes; `Close` waits, before this function ends, for every thread that entered.
        let task: &'static (dyn Fn(usize, usize) + Sync) = unsafe { std::mem::transmute(task) };
        // SAFETY: `&mut self`, and the last job was closed and left by all, so nobody else reads or writes it.
        unsafe { *shared.job.get() = Some(Job { task }) };
        let mut end = n_tasks;
        for (thread, Line(share)) in shared.shares.iter().enumerate().rev() {
            // Whatever it says, each task is in one share.
            let first = if thread == 0 { 0 } else { first_of(thread).min(end) };
            share.next.store(first, Ordering::Relaxed);
            share.end.store(end, Ordering::Relaxed);
            end = first;
        }
        let last = shared.state.load(Ordering::Relaxed);
        shared.state.store((last & !ACTIVE) + EPOCH + OPEN, Ordering::SeqCst);
        if shared.sleepers.load(Ordering::SeqCst) > 0 {
            drop(lock(&shared.sleep));
            shared.wake.notify_all();
        }
        {
            let _close = Close(shared);
            take_tasks(shared, Job { task }, 0);
        }
        if let Some(payload) = lock(&shared.panic).take() {
            resume_unwind(payload);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.state.fetch_or(STOP, Ordering::SeqCst);
        drop(lock(&self.shared.sleep));
        self.shared.wake.notify_all();
        for thread in self.threads.drain(..) {
            // A task's panic was caught and passed on already.
            let _ = thread.join();
        }
    }
}

/// Closes the job and waits for the threads in it, also when the caller's own task panics.
struct Close<'a>(&'a Shared);

impl Drop for Close<'_> {
    fn drop(&mut self) {
        let shared = self.0;
        if std::thread::panicking() {
            shared.leave_tasks();
        }
        if shared.state.fetch_and(!OPEN, Ordering::AcqRel) & ACTIVE == 0 {
            return;
        }
        let mut spin = Spin::new();
        while shared.state.load(Ordering::Acquire) & ACTIVE != 0 {
            if spin.over() {
                let mut guard = lock(&shared.sleep);
                while shared.state.load(Ordering::Acquire) & ACTIVE != 0 {
                    guard = shared.done.wait(guard).unwrap_or_else(PoisonError::into_inner);
                }
            }
        }
    }
}

/// A thread's life.
fn serve(shared: &Shared, thread: usize) {
    let mut seen = 0;
    let mut spin = Spin::new();
    loop {
        let state = shared.state.load(Ordering::Acquire);
        if state & STOP != 0 {
            return;
        }
        if state & OPEN != 0 && state / EPOCH != seen {
            if shared.state.compare_exchange_weak(state, state + 1, Ordering::AcqRel, Ordering::Relaxed).is_err() {
                continue;
            }
            seen = state / EPOCH;
            // SAFETY: this thread has entered: the job stays as it is until it leaves.
            let job = unsafe { *shared.job.get() };
            if let Some(job) = job
                && let Err(payload) = catch_unwind(AssertUnwindSafe(|| take_tasks(shared, job, thread)))
            {
                shared.leave_tasks();
                lock(&shared.panic).get_or_insert(payload);
            }
            let before = shared.state.fetch_sub(1, Ordering::AcqRel);
            if before & (ACTIVE | OPEN) == 1 {
                drop(lock(&shared.sleep));
                shared.done.notify_one();
            }
            spin = Spin::new();
        } else if spin.over() {
            let mut guard = lock(&shared.sleep);
            shared.sleepers.fetch_add(1, Ordering::SeqCst);
            loop {
                let state = shared.state.load(Ordering::SeqCst);
                if state & STOP != 0 || (state & OPEN != 0 && state / EPOCH != seen) {
                    break;
                }
                guard = shared.wake.wait(guard).unwrap_or_else(PoisonError::into_inner);
            }
            shared.sleepers.fetch_sub(1, Ordering::SeqCst);
            drop(guard);
            spin = Spin::new();
        }
    }
}

fn take_tasks(shared: &Shared, job: Job, thread: usize) {
    let (before, from_here) = shared.shares.split_at(thread);
    for Line(share) in from_here.iter().chain(before) {
        // Asked first, for counting takes the line away from whoever else does.
        while share.next.load(Ordering::Relaxed) < share.end.load(Ordering::Relaxed) {
            let index = share.next.fetch_add(1, Ordering::Relaxed);
            if index >= share.end.load(Ordering::Relaxed) {
                break;
            }
            // SAFETY: the caller's reference lives until all threads that entered have left; this one is among them.
            unsafe { (*job.task)(index, thread) };
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A spell of spinning; looks at the clock now and then only.
struct Spin {
    turns: u32,
    since: Option<Instant>,
}

impl Spin {
    fn new() -> Self {
        Self { turns: 0, since: None }
    }

    /// One turn; whether the spell is over.
    fn over(&mut self) -> bool {
        std::hint::spin_loop();
        self.turns += 1;
        if !self.turns.is_multiple_of(64) {
            return false;
        }
        self.since.get_or_insert_with(Instant::now).elapsed() > SPIN
    }
}

#[cfg(target_os = "linux")]
fn pin(core: Option<usize>) {
    if let Some(core) = core.filter(|&core| core < rustix::thread::CpuSet::MAX_CPU) {
        let mut set = rustix::thread::CpuSet::new();
        set.set(core);
        if let Err(e) = rustix::thread::sched_setaffinity(None, &set) {
            tracing::warn!("can't keep a kernel thread on core {core}: {e}");
        }
    }
}

#[cfg(not(target_os = "linux"))]
fn pin(_: Option<usize>) {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once_on_any_number_of_threads() {
        for n_threads in 1..=4 {
            let mut pool = Pool::new(n_threads, &[]).expect("threads");
            for round in 0..300 {
                let n_tasks = round % 23;
                let counts: Vec<_> = (0..n_tasks).map(|_| AtomicUsize::new(0)).collect();
                pool.run(n_tasks, &|index, thread| {
                    assert!(thread < n_threads);
                    counts[index].fetch_add(1, Ordering::Relaxed);
                });
                assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 1));
            }
        }
    }

    #[test]
    fn a_panic_is_passed_on_and_the_pool_lives() {
        let mut pool = Pool::new(3, &[]).expect("threads");
        for bad in [0, 7, 63] {
            let result = catch_unwind(AssertUnwindSafe(|| {
                pool.run(64, &|index, _| assert_ne!(index, bad, "task {bad} panics on purpose"));
            }));
            assert!(result.is_err());
            let done = AtomicUsize::new(0);
            pool.run(64, &|_, _| {
                done.fetch_add(1, Ordering::Relaxed);
            });
            assert_eq!(done.load(Ordering::Relaxed), 64);
        }
    }

    #[test]
    fn no_threads_is_an_error() {
        assert!(matches!(Pool::new(0, &[]), Err(KernelError::NoDevice { .. })));
    }
}
