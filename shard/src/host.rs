//! Who this process is to others.

use std::fs;

/// Equal for processes that can share memory and see each other's process ids: one boot of one machine, one set of
/// namespaces.
pub fn host_id() -> String {
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_else(|_| "unknown-boot".to_owned());
    let namespace = |kind: &str| {
        fs::read_link(format!("/proc/self/ns/{kind}"))
            .map_or_else(|_| format!("{kind}:unknown"), |link| link.to_string_lossy().into_owned())
    };
    format!("{}/{}/{}/{}", boot.trim(), namespace("ipc"), namespace("mnt"), namespace("pid"))
}

/// A name for this shard: the host's, and something random.
pub fn default_shard_id() -> String {
    let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_else(|_| "host".to_owned());
    let random = uuid::Uuid::new_v4().simple().to_string();
    format!("{}-{}", host.trim(), &random[..8])
}

/// A number that no other start of a process has.
pub fn incarnation() -> u64 {
    uuid::Uuid::new_v4().as_u64_pair().0
}

/// A random number from 0 to 1.
pub fn luck() -> f64 {
    (uuid::Uuid::new_v4().as_u64_pair().1 >> 11 & 0xFFFF_FFFF) as f64 / f64::from(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_host_is_the_same_for_all_and_names_are_not() {
        assert_eq!(host_id(), host_id());
        assert!(!host_id().contains('\n'));
        assert_ne!(default_shard_id(), default_shard_id());
        assert_ne!(incarnation(), incarnation());
        assert!((0..100).all(|_| (0.0..=1.0).contains(&luck())));
    }
}
