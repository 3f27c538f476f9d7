//! A real etcd of one or several members.

use std::{
    fs::File,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use anyhow::{Context, Result};
use rustix::process::Signal;

use super::{free_port, tools, within};
use crate::{client, process::signal_pid};

/// Longest wait for a member to answer.
const START_LIMIT: Duration = Duration::from_secs(60);

/// One member.
struct Member {
    child: Child,
    client: u16,
    peer: u16,
}

/// A cluster of members on loopback, gone when dropped.
pub struct Etcd {
    members: Vec<Member>,
    dir: tempfile::TempDir,
}

impl Etcd {
    /// Starts members and waits until they agree; installs Debian's package if there is none and this is root.
    pub fn start(n_members: usize) -> Result<Self> {
        let program = installed()?;
        let dir = tempfile::tempdir()?;
        let ports: Vec<_> = (0..n_members).map(|_| (free_port(), free_port())).collect();
        let mut members = Vec::new();
        for (index, (client, peer)) in ports.iter().enumerate() {
            let child = launch(&program, dir.path(), index, &ports)?;
            members.push(Member { child, client: *client, peer: *peer });
        }
        let etcd = Self { members, dir };
        etcd.wait_healthy()?;
        Ok(etcd)
    }

    /// `etcd://HOST:PORT,…` for `--store`.
    pub fn url(&self) -> String {
        let hosts: Vec<_> = self.members.iter().map(|m| format!("127.0.0.1:{}", m.client)).collect();
        format!("etcd://{}", hosts.join(","))
    }

    /// Members.
    pub fn len(&self) -> usize {
        self.members.len()
    }

    /// Whether there are none: never.
    pub fn is_empty(&self) -> bool {
        self.members.is_empty()
    }

    /// SIGKILL of a member.
    pub fn kill(&mut self, index: usize) {
        let child = &mut self.members[index].child;
        signal_pid(child.id(), Signal::KILL);
        let _ = child.wait();
    }

    /// Starts a killed member again on its files and ports.
    pub fn restart(&mut self, index: usize) -> Result<()> {
        let ports: Vec<_> = self.members.iter().map(|m| (m.client, m.peer)).collect();
        self.members[index].child = launch(&installed()?, self.dir.path(), index, &ports)?;
        Ok(())
    }

    /// Waits until every member answers and knows a leader.
    pub fn wait_healthy(&self) -> Result<()> {
        for member in &self.members {
            let url = format!("http://127.0.0.1:{}/health", member.client);
            within(START_LIMIT, "etcd is healthy", || {
                client::get(&url).is_ok_and(|a| a.status == 200 && a.body.contains("true"))
            })?;
        }
        Ok(())
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        for member in &mut self.members {
            let _ = member.child.kill();
            let _ = member.child.wait();
        }
    }
}

fn launch(program: &Path, dir: &Path, index: usize, ports: &[(u16, u16)]) -> Result<Child> {
    let url = |port: u16| format!("http://127.0.0.1:{port}");
    let (client, peer) = (url(ports[index].0), url(ports[index].1));
    let all: Vec<_> = ports.iter().enumerate().map(|(i, (_, peer))| format!("m{i}={}", url(*peer))).collect();
    let log = File::options().create(true).append(true).open(dir.join(format!("m{index}.log")))?;
    Command::new(program)
        .args(["--name", &format!("m{index}"), "--data-dir"])
        .arg(dir.join(format!("m{index}")))
        .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
        .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
        .args(["--initial-cluster", &all.join(",")])
        // The data is thrown away, and disks of shared machines sync slowly.
        .arg("--unsafe-no-fsync")
        .env_clear()
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()
        .context("etcd can't be started")
}

/// The program; issue 3.4 or later.
fn installed() -> Result<PathBuf> {
    tools::installed("etcd", "etcd-server")
}
