//! What memory there is and what of it KV pages get.

use std::{fs, path::Path};

/// Share of the free memory that KV pages may take when their size is not given.
const KV_SHARE_OF_FREE: f64 = 0.5;

/// Most memory that KV pages take on a rank when their size is not given.
const KV_DEFAULT_LIMIT: u64 = 4 << 30;

/// Memory that stays free for what else the process needs, besides weights and pages.
pub const RESERVE_BYTES: u64 = 128 << 20;

/// Bytes that could be allocated now: the kernel's estimate, or less where a control group has a limit.
/// `None` if the system does not say.
pub fn free_bytes() -> Option<u64> {
    let system = fs::read_to_string("/proc/meminfo").ok().and_then(|text| mem_available(&text));
    let group =
        fs::read_to_string("/proc/self/cgroup").ok().and_then(|text| group_free(&text, Path::new("/sys/fs/cgroup")));
    [system, group].into_iter().flatten().min()
}

/// Most bytes of copies of other ranks' KV rows where no limit is given: half of what is free. It is taken block by block,
/// as they come.
pub fn mirror_limit() -> u64 {
    free_bytes().map_or(KV_DEFAULT_LIMIT, |free| free / 2)
}

/// Memory of this process that is in RAM, in bytes.
pub fn resident_bytes() -> u64 {
    let statm = fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages: u64 = statm.split_whitespace().nth(1).and_then(|n| n.parse().ok()).unwrap_or(0);
    pages * rustix::param::page_size() as u64
}

/// What the size of the KV cache follows from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvDemand {
    /// Asked for, in bytes; 0 if not given.
    pub asked_bytes: u64,
    /// Blocks that the group had before; 0 if it had none.
    pub wanted_blocks: u32,
    /// Bytes of a block on this rank; 0 on a rank without KV heads.
    pub bytes_per_block: u64,
    /// Free memory, if known.
    pub free_bytes: Option<u64>,
    /// Ranks that share that memory.
    pub sharers: u64,
    /// Blocks with which all sequences could have their full length.
    pub useful_blocks: u64,
}

impl KvDemand {
    /// Blocks that the rank has memory for.
    ///
    /// The size that was asked for decides. Without it: as many as the group had before, if they are free, so that a change
    /// of ranks changes nothing for those that stay. Else half of the free memory, divided by the ranks on this host, but
    /// no more than 4 GiB and no more blocks than all sequences can fill.
    pub fn n_blocks(&self) -> u32 {
        let clamp = |n: u64| u32::try_from(n).unwrap_or(u32::MAX);
        if self.bytes_per_block == 0 {
            return clamp(self.useful_blocks);
        }
        if self.asked_bytes > 0 {
            return clamp(self.asked_bytes / self.bytes_per_block);
        }
        let wanted_bytes = u64::from(self.wanted_blocks).saturating_mul(self.bytes_per_block);
        let are_free = |free: u64| wanted_bytes.saturating_add(RESERVE_BYTES) <= free;
        if self.wanted_blocks > 0 && self.free_bytes.is_none_or(are_free) {
            return self.wanted_blocks;
        }
        let share = |free: u64| (free as f64 * KV_SHARE_OF_FREE) as u64 / self.sharers.max(1);
        let bytes = self.free_bytes.map_or(KV_DEFAULT_LIMIT, share).min(KV_DEFAULT_LIMIT);
        clamp((bytes / self.bytes_per_block).min(self.useful_blocks))
    }
}

fn mem_available(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

/// The least that any control group above this process leaves; `None` without limits.
fn group_free(cgroup: &str, mount: &Path) -> Option<u64> {
    let mut least: Option<u64> = None;
    for line in cgroup.lines() {
        let mut fields = line.splitn(3, ':');
        let (_, Some(controllers), Some(path)) = (fields.next(), fields.next(), fields.next()) else { continue };
        let (root, limit, usage) = match controllers {
            "" => (mount.to_owned(), "memory.max", "memory.current"),
            c if c.split(',').any(|c| c == "memory") => {
                (mount.join("memory"), "memory.limit_in_bytes", "memory.usage_in_bytes")
            }
            _ => continue,
        };
        // Inside a container the path may be the host's: then only the mount's root is there.
        let own = root.join(path.trim_start_matches('/'));
        for folder in own.ancestors().take_while(|folder| folder.starts_with(&root)) {
            let number = |file: &str| fs::read_to_string(folder.join(file)).ok()?.trim().parse::<u64>().ok();
            let (Some(limit), Some(usage)) = (number(limit), number(usage)) else { continue };
            // The kernel takes cached file pages back when memory is wanted.
            let cached = fs::read_to_string(folder.join("memory.stat")).ok().and_then(|text| inactive_file(&text));
            let free = limit.saturating_sub(usage.saturating_sub(cached.unwrap_or(0)));
            least = Some(least.map_or(free, |l| l.min(free)));
        }
    }
    least
}

/// Cached file pages of a group and those below it: version 1 has a counter of its own for that.
fn inactive_file(stat: &str) -> Option<u64> {
    let field = |name| stat.lines().find_map(|line| line.strip_prefix(name)).and_then(|n: &str| n.trim().parse().ok());
    field("total_inactive_file ").or_else(|| field("inactive_file "))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn demand() -> KvDemand {
        KvDemand {
            asked_bytes: 0,
            wanted_blocks: 0,
            bytes_per_block: MIB,
            free_bytes: Some(1000 * MIB),
            sharers: 2,
            useful_blocks: 1_000_000,
        }
    }

    #[test]
    fn the_asked_size_decides() {
        assert_eq!(KvDemand { asked_bytes: 10 * MIB + 5, ..demand() }.n_blocks(), 10);
        assert_eq!(KvDemand { asked_bytes: 5000 * MIB, ..demand() }.n_blocks(), 5000);
    }

    #[test]
    fn without_one_it_is_a_share_of_free_memory_within_limits() {
        assert_eq!(demand().n_blocks(), 250);
        assert_eq!(KvDemand { useful_blocks: 40, ..demand() }.n_blocks(), 40);
        assert_eq!(KvDemand { free_bytes: Some(1 << 50), ..demand() }.n_blocks(), 4096);
        assert_eq!(KvDemand { free_bytes: None, ..demand() }.n_blocks(), 4096);
        assert_eq!(KvDemand { bytes_per_block: 0, useful_blocks: 7, ..demand() }.n_blocks(), 7);
    }

    #[test]
    fn a_group_keeps_its_number_of_blocks_where_memory_allows() {
        assert_eq!(KvDemand { wanted_blocks: 800, ..demand() }.n_blocks(), 800);
        assert_eq!(KvDemand { wanted_blocks: 900, ..demand() }.n_blocks(), 250);
        assert_eq!(KvDemand { wanted_blocks: 900, free_bytes: None, ..demand() }.n_blocks(), 900);
        assert_eq!(KvDemand { wanted_blocks: 800, asked_bytes: 10 * MIB, ..demand() }.n_blocks(), 10);
    }

    #[test]
    fn meminfo_is_read() {
        assert_eq!(mem_available("MemTotal: 9 kB\nMemAvailable:    1024 kB\n"), Some(MIB));
        assert_eq!(mem_available("MemTotal: 9 kB\n"), None);
    }

    #[test]
    fn the_tightest_group_counts_and_cached_files_are_free() {
        let mount = tempfile::tempdir().expect("a temporary folder");
        let inner = mount.path().join("outer/inner");
        fs::create_dir_all(&inner).expect("folders");
        let write = |folder: &Path, name: &str, text: &str| fs::write(folder.join(name), text).expect("a file");
        write(&inner, "memory.max", "max\n");
        write(&inner, "memory.current", "100\n");
        write(&mount.path().join("outer"), "memory.max", "1000\n");
        write(&mount.path().join("outer"), "memory.current", "900\n");
        assert_eq!(group_free("0::/outer/inner\n", mount.path()), Some(100));
        write(&mount.path().join("outer"), "memory.stat", "anon 1\ninactive_file 300\n");
        assert_eq!(group_free("0::/outer/inner\n", mount.path()), Some(400));
        assert_eq!(group_free("0::/elsewhere\n", mount.path()), None);
    }

    #[test]
    fn a_process_has_resident_memory() {
        assert!(resident_bytes() > 0);
    }
}
