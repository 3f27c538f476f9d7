//! Whether the process of another rank still runs.

use std::os::fd::OwnedFd;

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    process::{Pid, PidfdFlags, getpid, pidfd_open, test_kill_process},
};

/// A handle on a rank's process.
pub(super) enum Liveness {
    /// Ourselves.
    Own,
    /// A descriptor that becomes readable when the process ends, even before its parent has reaped it.
    Descriptor(OwnedFd),
    /// For kernels before 5.3.
    Number(Pid),
    /// It ended before we looked.
    Ended,
}

impl Liveness {
    pub fn of(pid: u32) -> Self {
        let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) else { return Self::Ended };
        if pid == getpid() {
            return Self::Own;
        }
        match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(descriptor) => Self::Descriptor(descriptor),
            Err(Errno::SRCH) => Self::Ended,
            Err(_) => Self::Number(pid),
        }
    }

    /// Why nothing more comes from the process, if so.
    pub fn ended(&self) -> Option<String> {
        let ended = match self {
            Self::Own => false,
            Self::Ended => true,
            Self::Descriptor(descriptor) => {
                let mut polled = [PollFd::new(descriptor, PollFlags::IN)];
                matches!(poll(&mut polled, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })), Ok(1..))
            }
            Self::Number(pid) => test_kill_process(*pid) == Err(Errno::SRCH) || is_zombie(*pid),
        };
        ended.then(|| "its process ended".to_owned())
    }
}

/// Whether the process ended and waits for its parent to notice.
fn is_zombie(pid: Pid) -> bool {
    // The state follows the name, which is in parentheses and may hold any characters.
    std::fs::read_to_string(format!("/proc/{pid}/stat", pid = pid.as_raw_nonzero()))
        .is_ok_and(|stat| stat.rsplit_once(')').is_some_and(|(_, rest)| rest.trim_start().starts_with(['Z', 'X'])))
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn a_killed_process_is_seen_before_it_is_reaped() {
        let mut child = Command::new("cat").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("cat exists");
        let pid = Pid::from_child(&child);
        let kinds = [Liveness::of(child.id()), Liveness::Number(pid)];
        for kind in &kinds {
            assert_eq!(kind.ended(), None);
        }
        child.kill().expect("it runs");
        // Its output ends when the kernel has torn it down; it stays a zombie until `wait`.
        let mut output = child.stdout.take().expect("piped");
        std::io::copy(&mut output, &mut std::io::sink()).expect("readable");
        let mut seen = [false; 2];
        while seen != [true; 2] {
            for (seen, kind) in seen.iter_mut().zip(&kinds) {
                *seen |= kind.ended().is_some();
            }
            std::thread::yield_now();
        }
        child.wait().expect("it ended");
        assert!(kinds[0].ended().is_some());
    }

    #[test]
    fn no_process_has_number_zero_and_this_one_lives() {
        assert!(Liveness::of(0).ended().is_some());
        assert_eq!(Liveness::of(std::process::id()).ended(), None);
    }
}
