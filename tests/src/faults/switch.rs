//! A switch in user space: every packet between hosts goes through it, and may come late or never, per direction.
//!
//! Kernels without `netem` can't delay packets, and a TAP device needs an `ioctl`. So hosts wrap their frames in VXLAN
//! (RFC 7348), which is plain UDP, and send them to the hub, where this is the other end.

use std::{
    collections::BTreeMap,
    io::ErrorKind,
    net::{Ipv4Addr, SocketAddr, UdpSocket},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc,
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context, Result};

use crate::workload::Numbers;

/// Address of the bridge, where the switch listens.
pub const HUB: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 254);
/// VXLAN's port.
pub const PORT: u16 = 4789;
/// The frame begins with the hardware address that it is for, after VXLAN's header.
const FRAME_AT: usize = 8;
/// Longest wait for a packet before the switch looks whether it is to end.
const LOOK_INTERVAL: Duration = Duration::from_millis(50);

/// Address of a host on the bridge.
pub fn outer(host: usize) -> Ipv4Addr {
    Ipv4Addr::new(10, 77, 0, number(host))
}

/// Address of a host behind the switch.
pub fn inner(host: usize) -> Ipv4Addr {
    Ipv4Addr::new(10, 88, 0, number(host))
}

/// Hardware address of a host behind the switch: it ends with the host's number.
pub fn mac(host: usize) -> String {
    format!("02:00:00:00:00:{:02x}", number(host))
}

fn number(host: usize) -> u8 {
    u8::try_from(host + 1).expect("there are few hosts")
}

/// What happens to packets from one host to another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Path {
    /// They come so much later.
    pub delay: Duration,
    /// So many of a hundred never come.
    pub loss_percent: u8,
}

#[derive(Default)]
struct Shared {
    paths: Mutex<BTreeMap<(usize, usize), Path>>,
    lost: AtomicU64,
    ending: AtomicBool,
}

/// The switch, gone when dropped.
pub struct Switch {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Switch {
    /// Listens at the hub, into which `enter` brings a thread.
    pub fn start(n_hosts: usize, enter: impl FnOnce() -> Result<()> + Send + 'static) -> Result<Self> {
        let shared = Arc::new(Shared::default());
        let (sender, bound) = mpsc::channel();
        let thread = {
            let shared = Arc::clone(&shared);
            thread::spawn(move || {
                let socket = enter().and_then(|()| UdpSocket::bind((HUB, PORT)).context("the switch can't listen"));
                match socket {
                    Ok(socket) => {
                        let _ = sender.send(Ok(()));
                        carry(&socket, n_hosts, &shared);
                    }
                    Err(error) => drop(sender.send(Err(error))),
                }
            })
        };
        bound.recv().context("the switch ended")??;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Changes what happens to packets from a host to another, from now on.
    pub fn set(&self, from: usize, to: usize, path: Path) {
        self.shared.paths.lock().unwrap_or_else(PoisonError::into_inner).insert((from, to), path);
    }

    /// Packets that were lost so far.
    pub fn lost(&self) -> u64 {
        self.shared.lost.load(Ordering::Relaxed)
    }
}

impl Drop for Switch {
    fn drop(&mut self) {
        self.shared.ending.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn carry(socket: &UdpSocket, n_hosts: usize, shared: &Shared) {
    let mut numbers = Numbers(1);
    let mut buffer = vec![0; 64 << 10];
    // By time, and in the order of arrival where that is the same.
    let mut late: BTreeMap<(Instant, u64), (usize, Vec<u8>)> = BTreeMap::new();
    let mut n_packets = 0;
    while !shared.ending.load(Ordering::Relaxed) {
        let now = Instant::now();
        while let Some(entry) = late.first_entry()
            && entry.key().0 <= now
        {
            let (to, packet) = entry.remove();
            send(socket, to, &packet);
        }
        let next = late.keys().next().map_or(LOOK_INTERVAL, |(due, _)| due.saturating_duration_since(now));
        let wait = next.clamp(Duration::from_micros(100), LOOK_INTERVAL);
        let received = socket.set_read_timeout(Some(wait)).and_then(|()| socket.recv_from(&mut buffer));
        let (len, from) = match received {
            Ok((len, SocketAddr::V4(from))) => (len, from),
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted) => {
                continue;
            }
            // A host that is gone may be told by ICMP.
            Ok(_) | Err(_) => continue,
        };
        let packet = &buffer[..len];
        let (Some(from), Some(target)) = (host_of(from.ip().octets()[3], n_hosts), packet.get(FRAME_AT..FRAME_AT + 6))
        else {
            continue;
        };
        let is_for_all = target[0] & 1 == 1;
        let only = host_of(target[5], n_hosts);
        for to in (0..n_hosts).filter(|to| *to != from && (is_for_all || only == Some(*to))) {
            let path = shared.paths.lock().unwrap_or_else(PoisonError::into_inner).get(&(from, to)).copied();
            let path = path.unwrap_or_default();
            if numbers.below(100) < u64::from(path.loss_percent) {
                shared.lost.fetch_add(1, Ordering::Relaxed);
            } else if path.delay.is_zero() {
                send(socket, to, packet);
            } else {
                n_packets += 1;
                late.insert((Instant::now() + path.delay, n_packets), (to, packet.to_vec()));
            }
        }
    }
}

fn host_of(number: u8, n_hosts: usize) -> Option<usize> {
    usize::from(number).checked_sub(1).filter(|host| *host < n_hosts)
}

fn send(socket: &UdpSocket, to: usize, packet: &[u8]) {
    // What can't be sent is lost, as on any network.
    let _ = socket.send_to(packet, (outer(to), PORT));
}
