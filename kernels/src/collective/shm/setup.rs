//! Making the shared memory: rank 0 creates it under a name that follows from the secret, the others open it, and once
//! all are attached the name goes, so that the kernel frees the memory with the last process, however that ends.

use std::{
    os::fd::OwnedFd,
    sync::atomic::Ordering,
    time::{Duration, Instant, SystemTime},
};

use rustix::{
    fs::{FallocateFlags, FlockOperation, fallocate, flock, fstat},
    io::Errno,
    process::geteuid,
    shm::{self, Mode, OFlags},
};

use super::{ATTACHED, BUFFER_BYTES, Exchange, LEFT, Liveness, Placement, Segment, Spin};
use crate::collective::{AbortFlag, CollectiveConfig, CollectiveError, auth};

/// Also the version of the layout and of the protocol.
const MAGIC: u32 = 0x5048_4C02;

/// Pause between looks at what another process has yet to do.
const RETRY_INTERVAL: Duration = Duration::from_millis(1);

/// Age from which an unlocked segment is known to be left over: its creator locks it right after making it.
const LEFT_OVER_AGE: Duration = Duration::from_secs(60);

const DIRECTORY: &str = "/dev/shm";
const PREFIX: &str = "phalanx-";

/// Joins the group of `config`.
pub(super) fn attach(config: &CollectiveConfig, abort: AbortFlag) -> Result<Exchange, CollectiveError> {
    let setup = Setup { config, abort, deadline: Instant::now() + config.time_limit, name: name(config) };
    if config.rank == 0 { setup.create() } else { setup.open() }
}

/// Name of the segment in `/dev/shm`, with the leading slash.
fn name(config: &CollectiveConfig) -> String {
    let proof = auth::prove(&config.secret, "phalanx shm name", &config.epoch.to_le_bytes());
    let [b0, b1, b2, b3, b4, b5, b6, b7, ..] = proof;
    let hash = u64::from_be_bytes([b0, b1, b2, b3, b4, b5, b6, b7]);
    format!("/{PREFIX}{hash:016x}-{}", config.epoch)
}

/// Proof, in the header, that the creator knows the secret.
fn proof(config: &CollectiveConfig) -> [u64; 4] {
    let mut message = config.epoch.to_le_bytes().to_vec();
    message.extend((config.world_size as u64).to_le_bytes());
    bytemuck::cast(auth::prove(&config.secret, "phalanx shm header", &message))
}

/// Inode of the namespace in which this process's number means something.
fn pid_namespace() -> u64 {
    rustix::fs::stat("/proc/self/ns/pid").map_or(0, |stat| stat.st_ino)
}

struct Setup<'a> {
    config: &'a CollectiveConfig,
    abort: AbortFlag,
    deadline: Instant,
    name: String,
}

/// Takes the name away again, also on errors.
struct Unlink<'a>(&'a str);

impl Drop for Unlink<'_> {
    fn drop(&mut self) {
        // Gone already is as good.
        let _ = shm::unlink(self.0);
    }
}

impl Setup<'_> {
    fn create(self) -> Result<Exchange, CollectiveError> {
        sweep();
        let descriptor = self.create_file()?;
        let unlink = Unlink(&self.name);
        // Tells a sweep that this segment is in use. Freed with the process.
        flock(&descriptor, FlockOperation::NonBlockingLockExclusive)
            .map_err(|errno| self.failed("locking", errno, ""))?;
        let bytes = Segment::bytes(self.config.world_size);
        // Takes the pages now: running out of them later would be a SIGBUS.
        fallocate(&descriptor, FallocateFlags::empty(), 0, bytes as u64).map_err(|errno| match errno {
            Errno::NOSPC | Errno::NOMEM => self.failed(
                &format!("reserving {bytes} bytes for"),
                errno,
                ": enlarge /dev/shm (docker: --shm-size) or choose the tcp collective",
            ),
            _ => self.failed("sizing", errno, ""),
        })?;
        let mut exchange = self.map(&descriptor)?;
        let header = exchange.segment.header();
        header.world_size.store(self.config.world_size as u32, Ordering::Relaxed);
        header.buffer_bytes.store(BUFFER_BYTES as u32, Ordering::Relaxed);
        for (word, value) in header.proof.iter().zip(proof(self.config)) {
            word.store(value, Ordering::Relaxed);
        }
        self.enter(&mut exchange)?;
        let header = exchange.segment.header();
        header.ready.store(MAGIC, Ordering::Release);
        for peer in 1..self.config.world_size {
            self.until(peer, || Ok((exchange.segment.lane(peer).state.load(Ordering::Acquire) != 0).then_some(())))?;
        }
        drop(unlink);
        header.complete.store(1, Ordering::Release);
        self.meet(exchange)
    }

    fn create_file(&self) -> Result<OwnedFd, CollectiveError> {
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::RDWR;
        let create = || shm::open(&self.name, flags, Mode::RUSR | Mode::WUSR);
        match create() {
            // Only an earlier life of this rank knows the secret, and it is gone: there is one rank 0.
            Err(Errno::EXIST) => {
                shm::unlink(&self.name).map_err(|errno| self.failed("replacing", errno, ""))?;
                create()
            }
            other => other,
        }
        .map_err(|errno| {
            self.failed("creating", errno, ": is /dev/shm mounted and writable? Else choose the tcp collective")
        })
    }

    fn open(self) -> Result<Exchange, CollectiveError> {
        let descriptor = self.until(0, || match shm::open(&self.name, OFlags::RDWR, Mode::empty()) {
            Ok(descriptor) => {
                let stat = fstat(&descriptor).map_err(|errno| self.failed("inspecting", errno, ""))?;
                if stat.st_uid != geteuid().as_raw() || stat.st_mode & 0o077 != 0 {
                    return Err(self.config.setup(format!(
                        "shared memory {} belongs to user {} with mode {:o}: want user {} and 600",
                        self.name,
                        stat.st_uid,
                        stat.st_mode & 0o777,
                        geteuid().as_raw()
                    )));
                }
                // Rank 0 may be between making the file and giving it its size.
                Ok((stat.st_size > 0).then_some((descriptor, stat.st_size as u64)))
            }
            Err(Errno::NOENT) => Ok(None),
            Err(errno) => Err(self.failed("opening", errno, "")),
        })?;
        let (descriptor, got) = descriptor;
        let want = Segment::bytes(self.config.world_size) as u64;
        if got != want {
            return Err(self.config.setup(format!(
                "shared memory {} has {got} bytes, want {want}: ranks differ in world size or version",
                self.name
            )));
        }
        let mut exchange = self.map(&descriptor)?;
        let header = exchange.segment.header();
        self.until(0, || Ok((header.ready.load(Ordering::Acquire) != 0).then_some(())))?;
        let got = (header.ready.load(Ordering::Relaxed), header.world_size.load(Ordering::Relaxed) as usize);
        if got != (MAGIC, self.config.world_size)
            || header.buffer_bytes.load(Ordering::Relaxed) as usize != BUFFER_BYTES
        {
            return Err(self.config.setup(format!(
                "shared memory {} is of layout {:#x} for {} ranks, want {MAGIC:#x} for {}",
                self.name, got.0, got.1, self.config.world_size
            )));
        }
        let proof = proof(self.config);
        if header.proof.iter().zip(proof).any(|(word, value)| word.load(Ordering::Relaxed) != value) {
            return Err(self.config.setup(format!("shared memory {} was made with another secret", self.name)));
        }
        self.enter(&mut exchange)?;
        let header = exchange.segment.header();
        let root = Liveness::of(exchange.segment.lane(0).pid.load(Ordering::Relaxed));
        self.until(0, || {
            if header.complete.load(Ordering::Acquire) != 0 {
                return Ok(Some(()));
            }
            let left = exchange.segment.lane(0).state.load(Ordering::Acquire) == LEFT;
            match left.then(|| "it gave up while the group formed".to_owned()).or_else(|| root.ended()) {
                Some(reason) => Err(CollectiveError::PeerLost { epoch: self.config.epoch, rank: 0, reason }),
                None => Ok(None),
            }
        })?;
        self.meet(exchange)
    }

    fn map(&self, descriptor: &OwnedFd) -> Result<Exchange, CollectiveError> {
        let world_size = self.config.world_size;
        let segment = Segment::map(descriptor, world_size).map_err(|errno| self.failed("mapping", errno, ""))?;
        let n_cores = std::thread::available_parallelism().map_or(1, usize::from);
        Ok(Exchange {
            segment,
            epoch: self.config.epoch,
            rank: self.config.rank,
            world_size,
            time_limit: self.config.time_limit,
            abort: self.abort.clone(),
            round: 0,
            published: false,
            liveness: Vec::new(),
            spin: Spin::new(world_size, n_cores),
            placement: Placement::new(world_size, n_cores),
            attached: false,
        })
    }

    /// Takes this rank's lane.
    fn enter(&self, exchange: &mut Exchange) -> Result<(), CollectiveError> {
        let lane = exchange.segment.lane(self.config.rank);
        lane.pid_namespace.store(pid_namespace(), Ordering::Relaxed);
        if lane.pid.compare_exchange(0, std::process::id(), Ordering::AcqRel, Ordering::Relaxed).is_err() {
            return Err(self.config.setup(format!("another process is rank {} already", self.config.rank)));
        }
        lane.state.store(ATTACHED, Ordering::Release);
        exchange.attached = true;
        Ok(())
    }

    /// Learns who the others are, once all are attached.
    fn meet(&self, mut exchange: Exchange) -> Result<Exchange, CollectiveError> {
        for peer in 0..self.config.world_size {
            let lane = exchange.segment.lane(peer);
            if lane.pid_namespace.load(Ordering::Relaxed) != pid_namespace() {
                return Err(self.config.setup(format!(
                    "rank {peer} runs in another PID namespace: its death would not be seen; give it another host id"
                )));
            }
            let pid = lane.pid.load(Ordering::Relaxed);
            exchange.liveness.push(Liveness::of(pid));
        }
        Ok(exchange)
    }

    /// Repeats `look` until it finds something, the group is told to stop, or `peer` took too long.
    fn until<T>(
        &self,
        peer: usize,
        mut look: impl FnMut() -> Result<Option<T>, CollectiveError>,
    ) -> Result<T, CollectiveError> {
        let _waiting = self.abort.waiting_for(peer);
        loop {
            if let Some(found) = look()? {
                return Ok(found);
            }
            let epoch = self.config.epoch;
            if self.abort.is_aborted() {
                return Err(CollectiveError::Aborted { epoch });
            }
            if Instant::now() >= self.deadline {
                return Err(CollectiveError::Timeout { epoch, rank: peer, after: self.config.time_limit });
            }
            std::thread::sleep(RETRY_INTERVAL);
        }
    }

    fn failed(&self, doing: &str, errno: Errno, advice: &str) -> CollectiveError {
        self.config.setup(format!("{doing} shared memory {}: {errno}{advice}", self.name))
    }
}

/// Removes what rank 0s left that were killed while their groups formed.
fn sweep() {
    let Ok(entries) = std::fs::read_dir(DIRECTORY) else { return };
    for entry in entries.flatten() {
        let is_ours = entry.file_name().to_str().is_some_and(is_segment_name);
        let age = entry.metadata().and_then(|metadata| metadata.modified());
        let is_old = age.is_ok_and(|made| SystemTime::now().duration_since(made).is_ok_and(|age| age > LEFT_OVER_AGE));
        // Another user's can't be opened; one in use is locked.
        if is_ours && is_old && std::fs::File::open(entry.path()).is_ok_and(|file| file.try_lock().is_ok()) {
            tracing::info!(path = %entry.path().display(), "removing shared memory that a killed process left");
            let _ = std::fs::remove_file(entry.path());
        }
    }
}

fn is_segment_name(name: &str) -> bool {
    name.strip_prefix(PREFIX).and_then(|rest| rest.split_once('-')).is_some_and(|(hash, epoch)| {
        hash.len() == 16 && hash.bytes().all(|b| b.is_ascii_hexdigit()) && epoch.parse::<u64>().is_ok()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::collective::PeerAddress;

    fn config(epoch: u64, secret: &[u8]) -> CollectiveConfig {
        let peer = PeerAddress { host_id: "here".into(), address: String::new() };
        CollectiveConfig {
            epoch,
            rank: 0,
            world_size: 2,
            secret: secret.to_vec(),
            peers: vec![peer.clone(), peer],
            time_limit: Duration::from_millis(20),
        }
    }

    #[test]
    fn names_follow_secret_and_epoch() {
        let one = name(&config(7, b"secret"));
        assert_eq!(one, name(&config(7, b"secret")));
        assert_ne!(one, name(&config(8, b"secret")));
        assert_ne!(one[..25], name(&config(7, b"Secret"))[..25]);
        assert!(is_segment_name(&one[1..]), "{one}");
        assert!(!is_segment_name("phalanx-notes") && !is_segment_name("phalanx-0123456789abcdef-x"));
    }

    #[test]
    fn a_group_that_does_not_form_leaves_no_file() {
        let config = config(1, format!("lonely {}", std::process::id()).as_bytes());
        let path = format!("{DIRECTORY}{}", name(&config));
        // A former life of rank 0 was killed: its file is in the way.
        std::fs::write(&path, b"left over").expect("/dev/shm is writable");
        let Err(error) = attach(&config, AbortFlag::default()) else { panic!("a group of one half formed") };
        assert!(matches!(error, CollectiveError::Timeout { rank: 1, .. }), "{error}");
        assert!(!std::path::Path::new(&path).exists());
    }

    #[test]
    fn a_sweep_takes_old_unlocked_segments_only() {
        let path = |idx: u8| format!("{DIRECTORY}/{PREFIX}{:08x}5eed{idx:04x}-1", std::process::id());
        let old = SystemTime::now() - 2 * LEFT_OVER_AGE;
        let files: Vec<_> = (0..3)
            .map(|idx| {
                let file = std::fs::File::create(path(idx)).expect("/dev/shm is writable");
                if idx == 1 {
                    file.try_lock().expect("nobody locks what is new");
                }
                if idx < 2 {
                    file.set_modified(old).expect("own file");
                }
                file
            })
            .collect();
        sweep();
        // Tests beside this one sweep too: one that looks at the file this moment has it locked.
        let deadline = std::time::Instant::now() + Duration::from_secs(60);
        while std::path::Path::new(&path(0)).exists() && std::time::Instant::now() < deadline {
            sweep();
        }
        let left: Vec<bool> = (0..3).map(|idx| std::path::Path::new(&path(idx)).exists()).collect();
        drop(files);
        (0..3).for_each(|idx| drop(std::fs::remove_file(path(idx))));
        assert_eq!(left, [false, true, true]);
    }

    #[test]
    fn a_file_of_others_is_refused() {
        use std::os::unix::fs::PermissionsExt;
        let config = CollectiveConfig { rank: 1, ..config(2, format!("shared {}", std::process::id()).as_bytes()) };
        let path = format!("{DIRECTORY}{}", name(&config));
        std::fs::write(&path, b"bait").expect("/dev/shm is writable");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o666)).expect("own file");
        let result = attach(&config, AbortFlag::default());
        std::fs::remove_file(&path).expect("still there");
        let Err(error) = result else { panic!("a world-writable file was taken") };
        assert!(error.to_string().contains("mode 666"), "{error}");
    }
}
