//! Faults at chosen places, for tests of what survives them. Only in builds with debug assertions or with the feature
//! `failpoints`: elsewhere there is no option for them and every function here is empty.
//!
//! `--failpoint SPEC`, repeatable, or `PHALANX_FAILPOINT` with commas:
//!
//! | spec | what happens |
//! |---|---|
//! | `load:PERCENT:abort` | killed while a slice is loaded, for a form or ahead, once so much of it is read |
//! | `form:N:abort` | killed when it is told to take a rank for the N-th time |
//! | `step:N:abort` | killed at the begin of the N-th step that it runs |
//! | `prefill:abort` | killed halfway through the layers of a step with more rows than sequences |
//! | `allreduce:N:abort` | killed in the N-th sum over ranks of its life, which the others have entered or will |
//! | `token:ID:abort` | killed in a step one of whose rows is this token: a request that kills whoever computes it |
//! | `position:N:abort` | killed in a step one of whose rows is at this position or beyond: the same for long requests |
//! | `step:slow:MS` | each step takes so many milliseconds longer |
//! | `engine:hang:N` | the engine sleeps for ever in the N-th step that it runs; heartbeats go on, aborts don't reach it |
//!
//! Killed means SIGKILL, sent by the process to itself.

#[cfg(any(debug_assertions, feature = "failpoints"))]
pub use armed::{Failpoint, all_reduce, arm, form, layer, loading, rows, step};

#[cfg(any(debug_assertions, feature = "failpoints"))]
mod armed {
    use std::{
        str::FromStr,
        sync::{
            OnceLock,
            atomic::{AtomicBool, AtomicU64, Ordering},
        },
        thread,
        time::Duration,
    };

    use rustix::process::{Signal, getpid, kill_process};

    /// A fault, and where.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub enum Failpoint {
        /// `load:PERCENT:abort`
        Load(u64),
        /// `form:N:abort`
        Form(u64),
        /// `step:N:abort`
        Step(u64),
        /// `prefill:abort`
        Prefill,
        /// `allreduce:N:abort`
        AllReduce(u64),
        /// `token:ID:abort`
        Token(u32),
        /// `position:N:abort`
        Position(usize),
        /// `step:slow:MS`
        Slow(Duration),
        /// `engine:hang:N`
        Hang(u64),
    }

    impl FromStr for Failpoint {
        type Err = String;

        fn from_str(text: &str) -> Result<Self, String> {
            let wrong = || format!("{text:?} is no failpoint: see the list in shard/src/failpoint.rs");
            let number = |text: &str| text.parse::<u64>().map_err(|_| wrong());
            match text.split(':').collect::<Vec<_>>()[..] {
                ["load", percent, "abort"] => Ok(Self::Load(number(percent)?)),
                ["form", n, "abort"] => Ok(Self::Form(number(n)?)),
                ["step", n, "abort"] => Ok(Self::Step(number(n)?)),
                ["prefill", "abort"] => Ok(Self::Prefill),
                ["allreduce", n, "abort"] => Ok(Self::AllReduce(number(n)?)),
                ["token", id, "abort"] => id.parse().map(Self::Token).map_err(|_| wrong()),
                ["position", n, "abort"] => n.parse().map(Self::Position).map_err(|_| wrong()),
                ["step", "slow", ms] => Ok(Self::Slow(Duration::from_millis(number(ms)?))),
                ["engine", "hang", n] => Ok(Self::Hang(number(n)?)),
                _ => Err(wrong()),
            }
        }
    }

    static ARMED: OnceLock<Vec<Failpoint>> = OnceLock::new();
    static FORMS: AtomicU64 = AtomicU64::new(0);
    static STEPS: AtomicU64 = AtomicU64::new(0);
    static ALL_REDUCES: AtomicU64 = AtomicU64::new(0);
    /// Whether the step under way has more rows than sequences.
    static IS_PREFILL: AtomicBool = AtomicBool::new(false);

    /// Arms these, once in the life of the process.
    pub fn arm(failpoints: &[Failpoint]) {
        if !failpoints.is_empty() && ARMED.set(failpoints.to_vec()).is_ok() {
            tracing::warn!(?failpoints, "armed");
        }
    }

    fn armed() -> &'static [Failpoint] {
        ARMED.get().map_or(&[], Vec::as_slice)
    }

    fn has(failpoint: Failpoint) -> bool {
        armed().contains(&failpoint)
    }

    fn die(at: &str) -> ! {
        tracing::warn!("failpoint: {at}");
        // There is no way for this to fail, and no going on if it did.
        let _ = kill_process(getpid(), Signal::KILL);
        std::process::abort()
    }

    /// A slice is being loaded.
    pub fn loading(done_bytes: u64, total_bytes: u64) {
        let is_there =
            |f: &Failpoint| matches!(f, Failpoint::Load(percent) if done_bytes * 100 >= total_bytes * percent);
        if armed().iter().any(is_there) {
            die("load");
        }
    }

    /// The engine was told to take a rank.
    pub fn form() {
        if has(Failpoint::Form(FORMS.fetch_add(1, Ordering::Relaxed) + 1)) {
            die("form");
        }
    }

    /// A step begins.
    pub fn step() {
        let number = STEPS.fetch_add(1, Ordering::Relaxed) + 1;
        for failpoint in armed() {
            match failpoint {
                Failpoint::Step(n) if *n == number => die("step"),
                Failpoint::Slow(time) => thread::sleep(*time),
                Failpoint::Hang(n) if *n == number => loop {
                    thread::sleep(Duration::from_secs(3600));
                },
                _ => {}
            }
        }
    }

    /// The rows of a step are known: their tokens, and where each sequence's end.
    pub fn rows(token_ids: &[u32], ends: impl ExactSizeIterator<Item = usize>) {
        IS_PREFILL.store(token_ids.len() > ends.len(), Ordering::Relaxed);
        let furthest = ends.max().unwrap_or(0);
        if armed().iter().any(|f| matches!(f, Failpoint::Position(n) if furthest > *n)) {
            die("position");
        }
        if armed().iter().any(|f| matches!(f, Failpoint::Token(id) if token_ids.contains(id))) {
            die("token");
        }
    }

    /// A layer of a step begins.
    pub fn layer(idx: usize, n_layers: usize) {
        if idx == n_layers / 2 && IS_PREFILL.load(Ordering::Relaxed) && has(Failpoint::Prefill) {
            die("prefill");
        }
    }

    /// A sum over ranks begins.
    pub fn all_reduce() {
        if has(Failpoint::AllReduce(ALL_REDUCES.fetch_add(1, Ordering::Relaxed) + 1)) {
            die("allreduce");
        }
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn specs_are_parsed() {
            for (text, want) in [
                ("load:50:abort", Failpoint::Load(50)),
                ("form:2:abort", Failpoint::Form(2)),
                ("step:7:abort", Failpoint::Step(7)),
                ("prefill:abort", Failpoint::Prefill),
                ("allreduce:9:abort", Failpoint::AllReduce(9)),
                ("token:1234:abort", Failpoint::Token(1234)),
                ("position:500:abort", Failpoint::Position(500)),
                ("step:slow:20", Failpoint::Slow(Duration::from_millis(20))),
                ("engine:hang:3", Failpoint::Hang(3)),
            ] {
                assert_eq!(text.parse(), Ok(want));
            }
            for text in ["", "step", "step:x:abort", "step:1:panic", "token:-1:abort"] {
                assert!(text.parse::<Failpoint>().is_err(), "{text}");
            }
        }
    }
}

#[cfg(not(any(debug_assertions, feature = "failpoints")))]
mod absent {
    #[inline(always)]
    pub fn loading(_done_bytes: u64, _total_bytes: u64) {}
    #[inline(always)]
    pub fn form() {}
    #[inline(always)]
    pub fn step() {}
    #[inline(always)]
    pub fn rows(_token_ids: &[u32], _ends: impl ExactSizeIterator<Item = usize>) {}
    #[inline(always)]
    pub fn layer(_idx: usize, _n_layers: usize) {}
    #[inline(always)]
    pub fn all_reduce() {}
}

#[cfg(not(any(debug_assertions, feature = "failpoints")))]
pub use absent::{all_reduce, form, layer, loading, rows, step};
