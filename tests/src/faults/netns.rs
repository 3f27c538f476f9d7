//! Hosts on one machine: network namespaces that a bridge joins, with links that can be cut.
//!
//! The bridge lies in a namespace of its own and addresses are the namespaces' own, so nothing here touches the network
//! of the machine. A thread that [`Hosts::enter`]s a host, and all threads and processes that it starts, are on that host.
//!
//! Names are `phx-PID-NUMBER-HOST`; what a killed laboratory left behind is removed by the next one.

use std::{
    fs::File,
    os::fd::AsFd,
    path::PathBuf,
    process::Command,
    sync::{
        OnceLock,
        atomic::{AtomicU32, Ordering},
    },
};

use anyhow::{Context, Result, bail};
use rustix::{
    process::Signal,
    thread::{LinkNameSpaceType, move_into_link_name_space},
};

use super::{
    switch::{self, Switch},
    tools,
};
use crate::process::{is_alive, signal_pid};

/// Beginning of all names.
const PREFIX: &str = "phx-";

/// How hosts are joined.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Joined {
    /// By the kernel's bridge.
    ByBridge,
    /// By [`Switch`], through which every packet goes.
    BySwitch,
}

/// The hosts, gone when dropped, with all that runs there.
pub struct Hosts {
    name: String,
    n_hosts: usize,
    /// What carries packets, if not the bridge.
    pub switch: Option<Switch>,
}

impl Hosts {
    /// Why there can't be any on this machine.
    pub fn obstacle() -> Option<&'static str> {
        static OBSTACLE: OnceLock<Option<String>> = OnceLock::new();
        let obstacle = OBSTACLE.get_or_init(|| {
            if !rustix::process::geteuid().is_root() {
                return Some("network namespaces need root".to_owned());
            }
            Self::start(2, Joined::BySwitch).err().map(|e| format!("no network namespaces: {e:#}"))
        });
        obstacle.as_deref()
    }

    /// Makes hosts that reach each other.
    pub fn start(n_hosts: usize, joined: Joined) -> Result<Self> {
        static SERIAL: AtomicU32 = AtomicU32::new(0);
        tools::installed("ip", "iproute2")?;
        tools::installed("nft", "nftables")?;
        if joined == Joined::BySwitch {
            tools::installed("ethtool", "ethtool")?;
        }
        sweep();
        let name = format!("{PREFIX}{}-{}", std::process::id(), SERIAL.fetch_add(1, Ordering::Relaxed));
        let mut hosts = Self { name, n_hosts, switch: None };
        let hub = hosts.hub();
        ip(&format!("netns add {hub}"))?;
        ip(&format!("-n {hub} link add br0 type bridge"))?;
        ip(&format!("-n {hub} addr add {}/24 dev br0", switch::HUB))?;
        ip(&format!("-n {hub} link set br0 up"))?;
        for host in 0..n_hosts {
            hosts.join(host, joined)?;
        }
        if joined == Joined::BySwitch {
            let hub = hosts.path(&hub);
            hosts.switch = Some(Switch::start(n_hosts, move || enter(&hub))?);
        }
        Ok(hosts)
    }

    fn join(&self, host: usize, joined: Joined) -> Result<()> {
        let (hub, name) = (self.hub(), self.host(host));
        ip(&format!("netns add {name}"))?;
        ip(&format!("-n {name} link set lo up"))?;
        ip(&format!("link add eth0 netns {name} type veth peer p{host} netns {hub}"))?;
        ip(&format!("-n {hub} link set p{host} master br0"))?;
        ip(&format!("-n {hub} link set p{host} up"))?;
        ip(&format!("-n {name} addr add {}/24 dev eth0", switch::outer(host)))?;
        ip(&format!("-n {name} link set eth0 up"))?;
        if joined == Joined::BySwitch {
            let (outer, port) = (switch::outer(host), switch::PORT);
            ip(&format!("-n {name} link add vx type vxlan id 7 local {outer} remote {} dstport {port}", switch::HUB))?;
            ip(&format!("-n {name} link set vx address {}", switch::mac(host)))?;
            // The switch gets packets as they are: with their checksums, and no larger than the link allows.
            run("ip", &["netns", "exec", &name, "ethtool", "-K", "vx", "tx", "off"])?;
            ip(&format!("-n {name} addr add {}/24 dev vx", switch::inner(host)))?;
            ip(&format!("-n {name} link set vx up"))?;
        }
        Ok(())
    }

    /// Address of a host.
    pub fn address(&self, host: usize) -> String {
        let address = if self.switch.is_some() { switch::inner(host) } else { switch::outer(host) };
        address.to_string()
    }

    /// What stands before a command that is to run on a host.
    pub fn wrapper(&self, host: usize) -> Vec<String> {
        ["ip", "netns", "exec", &self.host(host)].map(str::to_owned).to_vec()
    }

    /// Moves this thread to a host.
    pub fn enter(&self, host: usize) -> Result<()> {
        enter(&self.path(&self.host(host)))
    }

    /// Cuts a host's cable, or mends it.
    pub fn set_link(&self, host: usize, is_up: bool) -> Result<()> {
        ip(&format!("-n {} link set p{host} {}", self.hub(), if is_up { "up" } else { "down" }))
    }

    /// A host hears nothing any more.
    pub fn drop_incoming(&self, host: usize) -> Result<()> {
        self.drop_packets(host, "input", "iifname")
    }

    /// A host is not heard any more.
    pub fn drop_outgoing(&self, host: usize) -> Result<()> {
        self.drop_packets(host, "output", "oifname")
    }

    fn drop_packets(&self, host: usize, hook: &str, device: &str) -> Result<()> {
        self.nft(host, "add table inet cut")?;
        self.nft(host, &format!("add chain inet cut {hook} {{ type filter hook {hook} priority 0; }}"))?;
        self.nft(host, &format!("add rule inet cut {hook} {device} eth0 drop"))
    }

    /// No packet of a host is dropped any more.
    pub fn drop_nothing(&self, host: usize) -> Result<()> {
        self.nft(host, "delete table inet cut")
    }

    /// Hosts that are apart reach everybody but each other.
    pub fn set_apart(&self, hosts: &[usize], are_apart: bool) -> Result<()> {
        let word = if are_apart { "on" } else { "off" };
        hosts
            .iter()
            .try_for_each(|host| ip(&format!("-n {} link set p{host} type bridge_slave isolated {word}", self.hub())))
    }

    fn nft(&self, host: usize, rule: &str) -> Result<()> {
        run("ip", &["netns", "exec", &self.host(host), "nft", rule])
    }

    fn host(&self, host: usize) -> String {
        format!("{}-{host}", self.name)
    }

    fn hub(&self) -> String {
        format!("{}-hub", self.name)
    }

    fn path(&self, name: &str) -> PathBuf {
        PathBuf::from("/var/run/netns").join(name)
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        self.switch = None;
        for host in 0..self.n_hosts {
            remove(&self.host(host));
        }
        remove(&self.hub());
    }
}

fn enter(path: &PathBuf) -> Result<()> {
    let namespace = File::open(path).with_context(|| path.display().to_string())?;
    move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))
        .with_context(|| format!("{} can't be entered", path.display()))
}

/// Removes what laboratories that are gone have left.
fn sweep() {
    let Ok(outcome) = Command::new("ip").args(["netns", "list"]).output() else { return };
    for line in String::from_utf8_lossy(&outcome.stdout).lines() {
        let name = line.split_whitespace().next().unwrap_or_default();
        let pid = name.strip_prefix(PREFIX).and_then(|rest| rest.split('-').next()).and_then(|pid| pid.parse().ok());
        if pid.is_some_and(|pid: u32| !is_alive(pid)) {
            remove(name);
        }
    }
}

/// Removes a namespace and ends what runs in it.
fn remove(name: &str) {
    if let Ok(outcome) = Command::new("ip").args(["netns", "pids", name]).output() {
        let pids = String::from_utf8_lossy(&outcome.stdout).into_owned();
        let others = pids.split_whitespace().filter_map(|p| p.parse().ok()).filter(|p| *p != std::process::id());
        others.for_each(|pid| signal_pid(pid, Signal::KILL));
    }
    let _ = Command::new("ip").args(["netns", "del", name]).output();
}

fn ip(args: &str) -> Result<()> {
    run("ip", &args.split_whitespace().collect::<Vec<_>>())
}

fn run(program: &str, args: &[&str]) -> Result<()> {
    let path = tools::find(program).with_context(|| format!("{program} is missing"))?;
    let outcome = Command::new(path).args(args).output()?;
    if !outcome.status.success() {
        bail!("{program} {}: {}", args.join(" "), String::from_utf8_lossy(&outcome.stderr).trim());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read, Write},
        net::{TcpListener, TcpStream},
        thread,
        time::{Duration, Instant},
    };

    use super::*;
    use crate::faults::switch::Path;

    /// A first packet that is lost while a link wakes up is sent again after a second.
    const CONNECT_LIMIT: Duration = Duration::from_millis(1500);

    /// Runs on a host.
    fn on<T: Send>(hosts: &Hosts, host: usize, f: impl FnOnce() -> T + Send) -> T {
        thread::scope(|scope| {
            let inside = scope.spawn(|| {
                hosts.enter(host).expect("the host is there");
                f()
            });
            inside.join().expect("it does not panic")
        })
    }

    fn connects(hosts: &Hosts, from: usize, to: usize) -> bool {
        let listener = on(hosts, to, || TcpListener::bind((hosts.address(to), 7)).expect("the port is free"));
        let address = listener.local_addr().expect("it is bound");
        on(hosts, from, || TcpStream::connect_timeout(&address, CONNECT_LIMIT).is_ok())
    }

    #[test]
    fn links_are_cut_and_mended() {
        if let Some(why) = Hosts::obstacle() {
            println!("skipped: {why}");
            return;
        }
        let hosts = Hosts::start(3, Joined::ByBridge).unwrap();
        let reached = |hosts: &Hosts| [(0, 1), (0, 2), (1, 2)].map(|(from, to)| connects(hosts, from, to));
        assert_eq!(reached(&hosts), [true; 3]);
        hosts.set_link(1, false).unwrap();
        assert_eq!(reached(&hosts), [false, true, false]);
        hosts.set_link(1, true).unwrap();
        hosts.set_apart(&[1, 2], true).unwrap();
        assert_eq!(reached(&hosts), [true, true, false]);
        hosts.set_apart(&[1, 2], false).unwrap();
        for cut in [Hosts::drop_incoming, Hosts::drop_outgoing] {
            cut(&hosts, 2).unwrap();
            assert_eq!(reached(&hosts), [true, false, false]);
            hosts.drop_nothing(2).unwrap();
        }
        assert_eq!(reached(&hosts), [true; 3]);
    }

    #[test]
    fn the_switch_delays_and_loses() {
        if let Some(why) = Hosts::obstacle() {
            println!("skipped: {why}");
            return;
        }
        let hosts = Hosts::start(2, Joined::BySwitch).unwrap();
        let switch = hosts.switch.as_ref().unwrap();
        let listener = on(&hosts, 1, || TcpListener::bind((hosts.address(1), 7)).unwrap());
        let address = listener.local_addr().unwrap();
        let round_trip = || {
            on(&hosts, 0, || {
                let mut stream = TcpStream::connect(address).unwrap();
                let (mut other, _) = listener.accept().unwrap();
                let begun = Instant::now();
                stream.write_all(&[1; 100_000]).unwrap();
                other.read_exact(&mut [0; 100_000]).unwrap();
                other.write_all(&[1]).unwrap();
                stream.read_exact(&mut [0]).unwrap();
                begun.elapsed()
            })
        };
        round_trip();
        assert_eq!(switch.lost(), 0);
        switch.set(0, 1, Path { delay: Duration::from_millis(150), loss_percent: 20 });
        assert!(round_trip() >= Duration::from_millis(150));
        assert!(switch.lost() > 0);
        switch.set(0, 1, Path::default());
        let lost = switch.lost();
        round_trip();
        assert_eq!(switch.lost(), lost);
    }
}
