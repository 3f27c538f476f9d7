//! What processes hold: file descriptors and memory.

use std::fs;

/// Of one or several processes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Resources {
    /// Open file descriptors.
    pub descriptors: usize,
    /// Resident memory.
    pub resident_kib: u64,
}

impl Resources {
    /// Of processes together; those that are gone count nothing.
    pub fn of(pids: impl IntoIterator<Item = u32>) -> Self {
        let mut sum = Self::default();
        for pid in pids {
            sum.descriptors += fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count);
            let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
            let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:"));
            sum.resident_kib += line.and_then(|l| l.trim().trim_end_matches(" kB").parse::<u64>().ok()).unwrap_or(0);
        }
        sum
    }
}
