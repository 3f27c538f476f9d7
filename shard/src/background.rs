//! How a thread works without taking processor time from threads that compute steps on the same machine.

use std::{
    fs,
    time::{Duration, Instant},
};

#[cfg(target_os = "linux")]
use thread_priority::{
    NormalThreadSchedulePolicy, ThreadPriority, ThreadSchedulePolicy, set_thread_priority_and_policy, thread_native_id,
};

/// How long a thread may have waited for a processor until waiting for an idle one is no use.
const PATIENCE: Duration = Duration::from_secs(20);
/// How often it is worth a look.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// What a background thread takes of the processors. Where the system does not allow it, the thread is as quick as others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Share {
    /// What nobody else wants. The kernel treats a processor that runs nothing but such threads as idle: whoever computes
    /// is placed there at once. With niceness alone two ranks were seen to share one processor for 150 ms, because a
    /// loading thread had the other.
    Leftovers,
    /// About a hundredth of a busy one.
    Least,
    /// About a tenth of a busy one: what must not fall behind for ever, but never comes first.
    Little,
}

impl Share {
    /// Makes it so for the calling thread, and for no other.
    pub fn bind(self) {
        #[cfg(target_os = "linux")]
        if self == Self::Leftovers {
            let policy = ThreadSchedulePolicy::Normal(NormalThreadSchedulePolicy::Idle);
            match set_thread_priority_and_policy(thread_native_id(), ThreadPriority::Min, policy) {
                Ok(()) => return,
                Err(error) => tracing::debug!("no SCHED_IDLE: {error:?}"),
            }
        }
        let niceness = if self == Self::Little { 10 } else { 19 };
        let _refused = rustix::process::setpriority_process(Some(rustix::thread::gettid()), niceness);
    }
}

/// How long a thread waits for idle processors.
pub(crate) struct Patience {
    looked_at: Instant,
    is_over: bool,
}

impl Patience {
    pub fn new() -> Self {
        Self { looked_at: Instant::now(), is_over: false }
    }

    /// Whether the calling thread has waited in vain. To be asked now and then.
    pub fn is_over(&mut self) -> bool {
        if !self.is_over && self.looked_at.elapsed() >= LOOK_EVERY {
            self.looked_at = Instant::now();
            let stat = fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
            self.is_over = waited(&stat).is_some_and(|waited| waited >= PATIENCE);
        }
        self.is_over
    }
}

/// How long a thread was ready and had no processor, from the kernel's statistics: time on processors and time that it
/// waited for one, in ns, and the number of its turns.
fn waited(schedstat: &str) -> Option<Duration> {
    schedstat.split_whitespace().nth(1)?.parse().ok().map(Duration::from_nanos)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_number_is_the_wait() {
        assert_eq!(waited("812345 2500000000 17\n"), Some(Duration::from_millis(2500)));
        assert_eq!(waited(""), None);
        assert_eq!(waited("1 x 2"), None);
    }

    #[test]
    fn who_got_processors_is_patient() {
        let mut patience = Patience { looked_at: Instant::now() - LOOK_EVERY, is_over: false };
        assert!(!patience.is_over());
        patience.is_over = true;
        assert!(patience.is_over(), "and who is not stays so");
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_thread_leaves_processors_to_others() {
        // Fields 19 and 41 of proc_pid_stat(5), of which the first two end with the name: niceness and policy.
        let of_this_thread = || {
            let stat = fs::read_to_string("/proc/thread-self/stat").expect("of this thread");
            let fields: Vec<_> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
            (fields[16].to_owned(), fields[38].to_owned())
        };
        let before = of_this_thread();
        let scheduler = |share: Share| {
            let bound = move || {
                share.bind();
                of_this_thread()
            };
            std::thread::spawn(bound).join().expect("no panic")
        };
        assert_eq!(scheduler(Share::Leftovers).1, "5", "SCHED_IDLE");
        assert_eq!(scheduler(Share::Least), ("19".to_owned(), "0".to_owned()));
        assert_eq!(scheduler(Share::Little), ("10".to_owned(), "0".to_owned()));
        assert_eq!(of_this_thread(), before, "other threads are as before");
    }
}
