//! Shards on this machine: this very program, started again under the name `shard`.
//!
//! A shard that ends is started again: at once if it was told to end, else after a pause that grows. Shards watch this
//! process and end with it, however it ends; they have process groups of their own, so that Ctrl-C at a terminal reaches the
//! coordinator alone, which ends them in order.

use std::{
    collections::BTreeMap,
    ffi::OsString,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::unix::process::ExitStatusExt,
    process::{ExitStatus, Stdio},
    time::Duration,
};

use phalanx_cluster::id::ShardId;
use rustix::process::{Pid, Signal, kill_process};
use tokio::{
    process::{Child, Command},
    sync::{mpsc, watch},
    task::JoinHandle,
    time::{Instant, sleep, timeout},
};

use crate::config::{Config, KvMirror, LogFormat};

/// Name under which this program is a shard: as the process's own name, or as its first argument.
pub const SHARD: &str = "shard";

/// Exit code of a shard whose options are wrong: starting it again would not help.
const BAD_OPTIONS: i32 = 2;
/// Pause before the first restart; doubles from there
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// to here: it keeps a shard that can't start from wasting a core, and streams may wait for this one.
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
/// A shard that lived this long did not fail at its start: the pause begins anew. Short, for whatever kills shards again and
/// again, each as soon as it is back, must find a spare.
const HEALTHY_AFTER: Duration = Duration::from_secs(2);
/// A shard that was told to end, and lived this long, is started again without a pause.
const NO_PAUSE_AFTER: Duration = Duration::from_secs(1);
/// Longest wait for a shard that was told to end, before SIGTERM, and again before SIGKILL.
const END_LIMIT: Duration = Duration::from_secs(3);

/// Variables that shards may see; the others that begin with `PHALANX_` are this process's options.
const PASSED_ON: &[&str] = &["PHALANX_CACHE", "PHALANX_PYPI_INDEX"];

/// The local shards, each with a task that keeps it alive.
pub struct LocalShards {
    ending: watch::Sender<bool>,
    /// Shards that are to be ended at once, by name, with the process that is meant.
    kills: BTreeMap<String, mpsc::UnboundedSender<u32>>,
    tasks: Vec<JoinHandle<()>>,
}

impl LocalShards {
    /// Starts as many shards as configured; they join at `grpc`. What makes a shard impossible goes to `fatal`.
    pub fn start(config: &Config, grpc: SocketAddr, fatal: &mpsc::UnboundedSender<String>) -> Self {
        let (ending, _) = watch::channel(false);
        let mut kills = BTreeMap::new();
        let tasks = (0..config.local_shards).map(|index| {
            let name = format!("local-{index}");
            let (sender, receiver) = mpsc::unbounded_channel();
            kills.insert(name.clone(), sender);
            let keeper = Keeper {
                name,
                kills: receiver,
                args: arguments(config, grpc, index),
                log_level: config.log_level.clone(),
                join_token: config.join_token.as_ref().map(|token| token.secret().to_owned()),
                ending: ending.subscribe(),
                fatal: fatal.clone(),
            };
            tokio::spawn(keeper.run())
        });
        let tasks = tasks.collect();
        Self { ending, kills, tasks }
    }

    /// Ends a process that is stuck, if it is one of these: it can't be asked to. It is started again.
    pub fn kill(&self, shard: &ShardId, pid: u32) {
        if let Some(keeper) = self.kills.get(&shard.0) {
            // A keeper that has ended has no process.
            let _ = keeper.send(pid);
        }
    }

    /// From now on a shard that ends is not started again. Tell them to end next.
    pub fn stop_restarting(&self) {
        self.ending.send_replace(true);
    }

    /// Waits until all have ended: by themselves (they were told), else by SIGTERM, else by SIGKILL.
    pub async fn end(self) {
        self.stop_restarting();
        for task in self.tasks {
            if let Err(error) = task.await {
                tracing::error!(%error, "a shard's keeper has ended before its shard");
            }
        }
    }
}

fn arguments(config: &Config, grpc: SocketAddr, index: u32) -> Vec<OsString> {
    let address = match grpc.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => IpAddr::V4(Ipv4Addr::LOCALHOST),
        IpAddr::V6(ip) if ip.is_unspecified() => IpAddr::V6(Ipv6Addr::LOCALHOST),
        ip => ip,
    };
    let scheme = if config.cluster_tls.is_some() { "https" } else { "http" };
    let coordinator = format!("{scheme}://{}", SocketAddr::new(address, grpc.port()));
    let mut args: Vec<OsString> = vec!["--exit-with-parent".into()];
    for (flag, value) in [
        ("--coordinator", coordinator),
        ("--shard-id", format!("local-{index}")),
        ("--threads", config.threads_per_shard.to_string()),
        ("--isa", config.isa.clone()),
        ("--collective", config.collective.as_str().to_owned()),
    ] {
        args.extend([flag.into(), value.into()]);
    }
    if config.log_format == LogFormat::Json {
        args.extend(["--log-format".into(), "json".into()]);
    }
    if config.kv_mirror == KvMirror::Off {
        args.extend(["--mirror-memory".into(), "0".into()]);
    }
    if let Some(tls) = &config.cluster_tls {
        let files = [
            ("--cluster-ca", &tls.ca_file),
            ("--cluster-cert", &tls.certificate_file),
            ("--cluster-key", &tls.key_file),
        ];
        for (flag, file) in files {
            args.extend([flag.into(), file.clone().into_os_string()]);
        }
    }
    args
}

/// Keeps one shard alive.
struct Keeper {
    name: String,
    args: Vec<OsString>,
    log_level: String,
    join_token: Option<String>,
    kills: mpsc::UnboundedReceiver<u32>,
    ending: watch::Receiver<bool>,
    fatal: mpsc::UnboundedSender<String>,
}

impl Keeper {
    async fn run(mut self) {
        let mut pause = FIRST_PAUSE;
        loop {
            let started = Instant::now();
            let mut was_told = false;
            match self.spawn() {
                Ok(mut child) => {
                    tracing::debug!(shard = self.name, pid = child.id(), "started");
                    let pid = child.id();
                    let ended = tokio::select! {
                        status = child.wait() => status,
                        () = stuck(&mut self.kills, pid) => {
                            tracing::warn!(shard = self.name, pid, "the shard is stuck: SIGKILL");
                            match child.start_kill() {
                                Ok(()) => child.wait().await,
                                Err(error) => Err(error),
                            }
                        }
                        () = told_to_end(&mut self.ending) => return end(&self.name, child).await,
                    };
                    match ended {
                        Ok(status) if status.code() == Some(BAD_OPTIONS) => {
                            let reason = format!("shard {} refuses its options; see above", self.name);
                            // The process may be ending already.
                            let _ = self.fatal.send(reason);
                            return;
                        }
                        // As in a rolling restart.
                        Ok(status) if status.success() => {
                            was_told = true;
                            tracing::info!(shard = self.name, "the shard has ended as it was told to");
                        }
                        Ok(status) => tracing::warn!(shard = self.name, "shard ended unexpectedly: {}", how(status)),
                        Err(error) => tracing::error!(shard = self.name, %error, "shard can't be waited for"),
                    }
                }
                Err(error) => tracing::error!(shard = self.name, %error, "shard can't be started"),
            }
            if was_told || started.elapsed() >= HEALTHY_AFTER {
                pause = FIRST_PAUSE;
            }
            if was_told && started.elapsed() >= NO_PAUSE_AFTER && !*self.ending.borrow() {
                tracing::info!(shard = self.name, "starting the shard again");
                continue;
            }
            tokio::select! {
                () = sleep(pause) => {}
                () = told_to_end(&mut self.ending) => return,
            }
            pause = (pause * 2).min(LONGEST_PAUSE);
            tracing::info!(shard = self.name, "starting the shard again");
        }
    }

    fn spawn(&self) -> std::io::Result<Child> {
        // Also right when the file was replaced meanwhile.
        let mut command = Command::new("/proc/self/exe");
        command.arg0(SHARD).args(&self.args).process_group(0).kill_on_drop(true);
        // stdout is the coordinator's, for its ready line.
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::inherit());
        for (name, _) in std::env::vars_os() {
            let ours = name.to_str().is_some_and(|n| n.starts_with("PHALANX_") && !PASSED_ON.contains(&n));
            if ours {
                command.env_remove(name);
            }
        }
        if let Some(token) = &self.join_token {
            // Not an argument: those are everybody's to read.
            command.env("PHALANX_JOIN_TOKEN", token);
        }
        command.env("PHALANX_LOG", &self.log_level).spawn()
    }
}

/// Also returns when the process is being torn down.
async fn told_to_end(ending: &mut watch::Receiver<bool>) {
    // An error means that nobody is left to tell.
    let _ = ending.wait_for(|e| *e).await;
}

/// Returns when the process of this number is to be killed.
async fn stuck(kills: &mut mpsc::UnboundedReceiver<u32>, pid: Option<u32>) {
    loop {
        match kills.recv().await {
            Some(meant) if Some(meant) == pid => return,
            // A former life of the shard.
            Some(_) => {}
            None => std::future::pending().await,
        }
    }
}

fn how(status: ExitStatus) -> String {
    match (status.signal(), status.code()) {
        (Some(signal), _) => format!("signal {signal}"),
        (None, Some(code)) => format!("exit code {code}"),
        (None, None) => status.to_string(),
    }
}

/// Waits for a shard's end, less and less patiently.
async fn end(name: &str, mut child: Child) {
    if timeout(END_LIMIT, child.wait()).await.is_ok() {
        return;
    }
    if let Some(pid) = child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw) {
        tracing::info!(shard = name, "does not end by itself: SIGTERM");
        // It may end this moment.
        let _ = kill_process(pid, Signal::TERM);
    }
    if timeout(END_LIMIT, child.wait()).await.is_ok() {
        return;
    }
    tracing::warn!(shard = name, "does not end: SIGKILL");
    if let Err(error) = child.kill().await {
        tracing::error!(shard = name, %error, "can't be killed");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Flags, Machine};

    #[test]
    fn shards_are_told_where_to_join() {
        let machine =
            Machine { cores: 4, state_home: None, store_credentials: None, otel: std::collections::BTreeMap::new() };
        let config = Config::resolve(Flags::default(), &machine).unwrap();
        let text = |address: &str| {
            let args = arguments(&config, address.parse().unwrap(), 1);
            args.iter().map(|a| a.to_str().unwrap()).collect::<Vec<_>>().join(" ")
        };
        let args = text("0.0.0.0:7000");
        assert!(args.contains("--coordinator http://127.0.0.1:7000 --shard-id local-1 --threads 2"), "{args}");
        assert!(text("[::]:7000").contains("--coordinator http://[::1]:7000"));
        assert!(text("10.0.0.5:7000").contains("--coordinator http://10.0.0.5:7000"));
        assert!(!args.contains("--mirror-memory"), "{args}");
        let config = Config { kv_mirror: KvMirror::Off, ..config.clone() };
        let args = arguments(&config, ([127, 0, 0, 1], 7000).into(), 0);
        assert!(args.ends_with(&["--mirror-memory".into(), "0".into()]), "{args:?}");
    }
}
