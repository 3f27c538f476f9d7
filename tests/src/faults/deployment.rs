//! The processes of a row.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use phalanx_proto::v1::{Member, StatusRequest, StatusResponse, cluster_client::ClusterClient};
use rustix::process::Signal;
use tokio::runtime::Runtime;

use super::{
    PATIENCE,
    etcd::Etcd,
    eventually, free_port,
    netns::Hosts,
    own_shards::OwnShards,
    proxy::Proxy,
    resources::{Held, Role},
    setup::{Clients, Setup, StoreKind},
    state_dir::StateDir,
};
use crate::{
    client::{get, metric, metric_values},
    process::{Process, children, is_alive, shards_of, signal_pid},
};

/// One coordinator.
pub struct Coordinator {
    /// The process of its present life.
    pub process: Process,
    /// `http://HOST:PORT` of the HTTP APIs.
    pub http: String,
    /// `http://HOST:PORT` of gRPC.
    pub grpc: String,
    args: Vec<String>,
    /// Shards that it started, in any life of it.
    seen: Vec<u32>,
    state: StateDir,
}

impl Coordinator {
    /// Whether the process lives.
    pub fn is_alive(&self) -> bool {
        is_alive(self.process.pid())
    }

    /// Where its embedded store lies.
    pub fn state_dir(&self) -> &Path {
        self.state.path()
    }

    /// Process ids of the shards that it started and that live.
    pub fn local_shards(&self) -> Vec<u32> {
        shards_of(self.process.pid())
    }
}

/// Everything that runs. Declared in the order in which it must end.
pub struct Deployment {
    /// What it was made from.
    pub setup: Setup,
    /// Shards of the laboratory.
    pub own: OwnShards,
    /// Coordinators; the first was started first.
    pub coordinators: Vec<Coordinator>,
    /// Between proxied shards and the first coordinator.
    pub proxy: Option<Proxy>,
    /// The store, if it is not embedded.
    pub etcd: Option<Etcd>,
    /// Where shards run, if not on this host. This host is the first of them.
    pub hosts: Option<Arc<Hosts>>,
    runtime: Arc<Runtime>,
}

impl Deployment {
    /// Starts all of it on this host and waits until it serves.
    pub fn start(runtime: &Arc<Runtime>, setup: &Setup) -> Result<Self> {
        Self::start_on(runtime, setup, None)
    }

    /// The same, with shards on other hosts.
    pub fn start_on(runtime: &Arc<Runtime>, setup: &Setup, hosts: Option<&Arc<Hosts>>) -> Result<Self> {
        let etcd = match setup.store {
            StoreKind::Embedded => None,
            StoreKind::Etcd(members) => Some(Etcd::start(members)?),
        };
        let mut deployment = Self {
            setup: setup.clone(),
            own: OwnShards::default(),
            coordinators: Vec::new(),
            proxy: None,
            etcd,
            hosts: hosts.cloned(),
            runtime: Arc::clone(runtime),
        };
        for index in 0..setup.coordinators {
            let coordinator = deployment.coordinator()?;
            deployment.coordinators.push(coordinator);
            // The first is to lead.
            if index == 0 && setup.coordinators > 1 {
                deployment.wait_listening(0)?;
                eventually("the first coordinator leads", || deployment.leads(0))?;
            }
        }
        for index in 0..setup.coordinators {
            deployment.wait_listening(index)?;
        }
        for index in 0..setup.own_shards.len() {
            // The order of joining is the order of ranks.
            deployment.start_own_shard(index)?;
            let wanted = index + 1;
            eventually("the shard is attached", || deployment.members().is_ok_and(|m| m.len() >= wanted))?;
        }
        deployment.wait_whole()?;
        Ok(deployment)
    }

    fn coordinator(&self) -> Result<Coordinator> {
        let setup = &self.setup;
        let state = StateDir::new(setup.tiny_disk)?;
        let (port, grpc_port) = (free_port(), free_port());
        let mut args = vec![setup.model.path().display().to_string()];
        let mut option = |name: &str, value: String| args.extend([name.to_owned(), value]);
        option("--port", port.to_string());
        option("--grpc-port", grpc_port.to_string());
        option("--threads-per-shard", "1".to_owned());
        option("--replicas", setup.replicas.to_string());
        option("--tensor-parallel-size", setup.world_size.to_string());
        option("--local-shards", setup.local_shards.to_string());
        // Answers are kept for a few rounds only, so that memory is steady after them and a leak shows. Clients come back at
        // once; who finds its answer forgotten gets the same one, computed again.
        option("--resume-window", "5".to_owned());
        if let Some(hosts) = &self.hosts {
            option("--host", "0.0.0.0".to_owned());
            option("--advertise-host", hosts.address(0));
            args.push("--insecure-cluster".to_owned());
        }
        let mut option = |name: &str, value: String| args.extend([name.to_owned(), value]);
        match &self.etcd {
            Some(etcd) => option("--store", etcd.url()),
            None => option("--state-dir", state.path().display().to_string()),
        }
        if !setup.args.iter().any(|a| a == "--kv-cache-memory") {
            option("--kv-cache-memory", "128MiB".to_owned());
        }
        args.extend(setup.args.iter().cloned());
        let process = Process::start("coordinator", &args);
        let at = |port: u16| format!("http://127.0.0.1:{port}");
        Ok(Coordinator { process, http: at(port), grpc: at(grpc_port), args, seen: Vec::new(), state })
    }

    fn wait_listening(&mut self, index: usize) -> Result<()> {
        let coordinator = &mut self.coordinators[index];
        let url = format!("{}/health", coordinator.http);
        let mut ended = None;
        let outcome = eventually("the coordinator listens", || {
            ended = coordinator.process.ended();
            ended.is_some() || get(&url).is_ok_and(|a| a.status == 200)
        });
        ensure!(ended.is_none(), "the coordinator ended at its start:\n{}", coordinator.process.log());
        outcome.with_context(|| coordinator.process.log())
    }

    fn start_own_shard(&mut self, index: usize) -> Result<()> {
        let own = self.setup.own_shards[index].clone();
        let mut urls: Vec<_> = self.coordinators.iter().map(|c| c.grpc.clone()).collect();
        if own.proxied {
            if self.proxy.is_none() {
                let target: SocketAddr = urls[0].trim_start_matches("http://").parse()?;
                self.proxy = Some(Proxy::start(self.runtime.handle(), target)?);
            }
            urls = self.proxy.iter().map(|p| format!("http://127.0.0.1:{}", p.port)).collect();
        }
        let id = own_id(index);
        let mut wrapper = Vec::new();
        let mut args = vec!["--threads".to_owned(), "1".to_owned(), "--shard-id".to_owned(), id.clone()];
        if let Some(hosts) = &self.hosts {
            wrapper = hosts.wrapper(host_of(index));
            urls = urls.iter().map(|url| url.replace("127.0.0.1", &hosts.address(0))).collect();
            args.extend(["--advertise".to_owned(), hosts.address(host_of(index))]);
        }
        args.extend(["--coordinator".to_owned(), urls.join(",")]);
        args.extend(own.always);
        self.own.start(&id, &wrapper, &args, &own.first_life);
        Ok(())
    }

    /// Waits until a coordinator leads.
    pub fn wait_leads(&self, index: usize) -> Result<()> {
        eventually("the standby leads", || self.leads(index))
    }

    /// Starts a coordinator that is ending again, with the same ports and files.
    pub fn restart_coordinator(&mut self, index: usize) -> Result<()> {
        let coordinator = &mut self.coordinators[index];
        eventually("the coordinator ends", || coordinator.process.ended().is_some())?;
        coordinator.process = Process::start("coordinator", &coordinator.args);
        self.wait_listening(index)
    }

    /// Whether a coordinator leads.
    pub fn leads(&self, index: usize) -> bool {
        let coordinator = &self.coordinators[index];
        coordinator.is_alive()
            && (self.coordinators.len() == 1 || metric(&coordinator.http, "phalanx_is_leader") >= 1.0)
    }

    /// Index of the coordinator that leads.
    pub fn leader(&self) -> Result<usize> {
        (0..self.coordinators.len()).find(|i| self.leads(*i)).context("no coordinator leads")
    }

    /// Index of a coordinator that does not lead.
    pub fn standby(&self) -> Result<usize> {
        let leader = self.leader()?;
        let standby = |i: &usize| *i != leader && self.coordinators[*i].is_alive();
        (0..self.coordinators.len()).find(standby).context("there is no standby")
    }

    /// Where clients call: first, and where they go if that breaks.
    pub fn addresses(&self) -> Result<(Vec<String>, Vec<String>)> {
        let first = match self.setup.clients {
            Clients::OfLeader => self.leader()?,
            Clients::OfStandby => self.standby()?,
        };
        let n = self.coordinators.len();
        let order = || (0..n).map(|i| &self.coordinators[(first + i) % n]);
        Ok((order().map(|c| c.http.clone()).collect(), order().map(|c| c.grpc.clone()).collect()))
    }

    /// What the leader says about its cluster.
    pub fn status(&self) -> Result<StatusResponse> {
        let grpc = self.coordinators[self.leader()?].grpc.clone();
        let call = async move {
            let mut client = ClusterClient::connect(grpc).await?;
            anyhow::Ok(client.status(StatusRequest {}).await?.into_inner())
        };
        self.runtime.block_on(async { tokio::time::timeout(Duration::from_secs(5), call).await })?
    }

    /// The shards that are attached.
    pub fn members(&self) -> Result<Vec<Member>> {
        Ok(self.status()?.members)
    }

    /// The shard that has a rank.
    pub fn rank(&self, rank: u32) -> Result<Member> {
        let members = self.members()?;
        members.into_iter().find(|m| m.rank == Some(rank)).with_context(|| format!("nobody has rank {rank}"))
    }

    /// A shard without a rank.
    pub fn spare(&self) -> Result<Member> {
        self.members()?.into_iter().find(|m| m.rank.is_none()).context("there is no spare")
    }

    /// Waits until everybody is there, the group serves, spares are prepared for each rank and nothing holds KV memory.
    pub fn wait_whole(&mut self) -> Result<()> {
        let mut last = String::new();
        let outcome = eventually("all is well", || match self.whole() {
            Ok(()) => true,
            Err(error) => {
                last = format!("{error:#}");
                false
            }
        });
        self.note_shards();
        outcome.with_context(|| last)
    }

    fn whole(&self) -> Result<()> {
        for (index, coordinator) in self.coordinators.iter().enumerate() {
            let ready = get(&format!("{}/ready", coordinator.http))?;
            ensure!(ready.status == 200, "coordinator {index} is not ready: {}", ready.body);
        }
        let http = &self.coordinators[self.leader()?].http;
        let status = self.status()?;
        let wanted = self.setup.shards();
        ensure!(status.members.len() == wanted, "{} of {wanted} shards are attached", status.members.len());
        let ranks = status.members.iter().filter(|m| m.rank.is_some()).count();
        ensure!(ranks == (self.setup.replicas * self.setup.world_size) as usize, "{ranks} ranks in all groups");
        let other = status.groups.iter().find(|group| group.phase != "serving");
        ensure!(other.is_none(), "{other:?} does not serve");
        let is_unprepared = |m: &&Member| m.role == "spare" && m.prepared_ranks.len() < self.setup.world_size as usize;
        let unprepared = status.members.iter().find(is_unprepared);
        ensure!(unprepared.is_none(), "{unprepared:?} has not loaded all slices ahead");
        ensure!(!self.setup.mirrors() || self.mirror_lag().is_some(), "the spare has no copies of KV rows");
        ensure!(metric(http, "sequences_running") == 0.0, "sequences run");
        Ok(())
    }

    /// A number of the leader's metrics, summed over labels.
    pub fn metric(&self, name: &str) -> f64 {
        self.leader().map_or(0.0, |leader| metric(&self.coordinators[leader].http, name))
    }

    /// Steps whose KV rows the mirrors lack; `None` while nobody has a whole copy.
    pub fn mirror_lag(&self) -> Option<u64> {
        let leader = self.leader().ok()?;
        let of_groups = metric_values(&self.coordinators[leader].http, "phalanx_mirror_lag_steps");
        // The gauge of a group without copies is no number.
        of_groups.into_iter().filter(|lag| *lag >= 0.0).map(|lag| lag as u64).max()
    }

    /// The greatest epoch that any coordinator tells.
    pub fn epoch(&self) -> f64 {
        let epochs = self.coordinators.iter().filter(|c| c.is_alive()).map(|c| metric(&c.http, "phalanx_epoch"));
        epochs.fold(0.0, f64::max)
    }

    /// Tokens that each living coordinator counts as computed again, by process.
    pub fn replayed(&self) -> BTreeMap<u32, f64> {
        let alive = self.coordinators.iter().filter(|c| c.is_alive());
        alive.map(|c| (c.process.pid(), metric(&c.http, "phalanx_replayed_tokens_total"))).collect()
    }

    /// Failovers that all living coordinators count.
    pub fn failovers(&self) -> f64 {
        let alive = self.coordinators.iter().filter(|c| c.is_alive());
        alive.map(|c| metric(&c.http, "phalanx_failovers_total")).sum()
    }

    /// Lines that coordinators and shards of the laboratory wrote since a moment, in order.
    pub fn log_since(&self, moment: Instant) -> Vec<(Instant, String)> {
        let mut lines = self.own.log_since(moment);
        for (index, coordinator) in self.coordinators.iter().enumerate() {
            let own = coordinator.process.log_since(moment);
            lines.extend(own.into_iter().map(|(at, line)| (at, format!("[c{index}] {line}"))));
        }
        lines.sort_by_key(|(at, _)| *at);
        lines
    }

    /// Process ids of the coordinators that live.
    pub fn coordinator_pids(&self) -> Vec<u32> {
        self.coordinators.iter().filter(|c| c.is_alive()).map(|c| c.process.pid()).collect()
    }

    /// What coordinators and shards hold.
    pub fn held(&self) -> Vec<Held> {
        let coordinators = self.coordinator_pids();
        let local = self.coordinators.iter().flat_map(Coordinator::local_shards);
        let shards: Vec<_> = local.chain(self.own.pids()).filter(|pid| is_alive(*pid)).collect();
        let of = |pids: Vec<u32>, role| pids.into_iter().map(move |pid| Held::of(pid, role));
        of(coordinators, Role::Coordinator).chain(of(shards, Role::Shard)).collect()
    }

    /// Remembers which shards are there, to look for them after the end.
    pub fn note_shards(&mut self) {
        for coordinator in &mut self.coordinators {
            let now = children(coordinator.process.pid());
            coordinator.seen.extend(now);
            coordinator.seen.sort_unstable();
            coordinator.seen.dedup();
        }
    }

    /// Ends all as an operator does; says what was left behind.
    pub fn end(mut self) -> Vec<String> {
        let mut problems = Vec::new();
        self.note_shards();
        self.own.set_restart(false);
        let own = self.own.pids();
        // Standbys first, or one of them would take over.
        let leader = self.leader().unwrap_or(0);
        let mut order: Vec<_> = (0..self.coordinators.len()).filter(|i| *i != leader).collect();
        order.push(leader);
        for index in order {
            let process = &mut self.coordinators[index].process;
            if process.ended().is_some() {
                continue;
            }
            process.signal(Signal::INT);
            let deadline = Instant::now() + PATIENCE;
            let status = loop {
                match process.ended() {
                    None if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(20)),
                    status => break status,
                }
            };
            match status {
                Some(status) if status.success() => {}
                Some(status) => problems.push(format!("coordinator {index} ended with {status}")),
                None => problems.push(format!("coordinator {index} does not end")),
            }
        }
        drop(self.own);
        let seen = self.coordinators.iter().flat_map(|c| c.seen.iter().copied()).chain(own);
        let seen: Vec<_> = seen.collect();
        if eventually("shards end", || seen.iter().all(|pid| !is_alive(*pid))).is_err() {
            let left: Vec<_> = seen.iter().filter(|pid| is_alive(**pid)).collect();
            problems.push(format!("shards {left:?} outlive their coordinator"));
            left.iter().for_each(|pid| signal_pid(**pid, Signal::KILL));
        }
        problems
    }
}

/// The host of a shard of the laboratory, where each has one; the coordinator is on the first.
pub fn host_of(index: usize) -> usize {
    index + 1
}

/// Which shard of the laboratory has a name.
pub fn own_index(id: &str) -> Option<usize> {
    id.strip_prefix("own-")?.parse().ok()
}

/// Name of a shard of the laboratory.
pub fn own_id(index: usize) -> String {
    format!("own-{index}")
}
