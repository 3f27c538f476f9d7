//! The process: opens the model, starts actors, servers and shards, waits, and ends them in order.

mod announcement;
mod gate;
mod incoming;
mod parts;
mod renewal;
mod servers;

use std::{collections::BTreeSet, ffi::OsString, fmt, net::SocketAddr, process::ExitCode, sync::Arc, time::Duration};

use anyhow::Context;
use futures::future::select_all;
use phalanx_cluster::{
    id::{Epoch, ShardId},
    store::{self, OpenOptions},
};
use phalanx_proto::{
    dial::Dialer,
    v1::{LeaderRequest, leadership_client::LeadershipClient},
};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::{mpsc, oneshot},
    time::timeout,
};
use tracing_subscriber::EnvFilter;

use self::{
    announcement::Announcement,
    parts::{Foundation, Parts},
    servers::{Servers, bind, https},
};
use crate::{
    config::{Config, Flags, LogFormat, Machine},
    frontend::{connections, opening::Opening, prometheus},
    group::actor::Notice,
    leadership::{
        CoordinatorRecord, View,
        actor::{LeadershipConfig, LeadershipHandle, StoreSource},
        address, follower,
        journal_feed::{ReplicatedJournal, Retention},
        service::FeedSlot,
    },
    metrics as names, model,
    scheduler::actor::SchedulerHandle,
    security::{Security, tls::ServingTls},
    spawn::LocalShards,
    trace,
};

/// Filter of the actor framework's own log, unless configured.
const ACTOR_LOG: &str = "ractor=warn";
/// Threads beside those of shards: heartbeats must go on while requests are parsed.
const LEAST_THREADS: usize = 4;
/// Longest wait for the last lines of the audit log.
const AUDIT_LIMIT: Duration = Duration::from_secs(2);
/// Longest wait for a collector of traces at the end.
const TRACE_FLUSH_LIMIT: Duration = Duration::from_secs(2);
/// Longest wait for a standby to say that it is there.
const STANDBY_LIMIT: Duration = Duration::from_secs(1);

/// Runs the coordinator: what the program does. `args` begins with the program's name.
///
/// Exit codes: 0 after Ctrl-C, SIGTERM or help; 2 for wrong options; 1 for everything else.
pub fn main_from(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let flags = match Flags::gather(args) {
        Ok(flags) => flags,
        Err(error) => return ExitCode::from(error.report()),
    };
    let print_config = flags.print_config;
    let config = match Config::resolve(flags, &Machine::detect()) {
        Ok(config) => config,
        Err(error) => return ExitCode::from(error.report()),
    };
    if print_config {
        print!("{}", config.to_flags().to_toml());
        return ExitCode::SUCCESS;
    }
    init_log(&config);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(n_threads()).enable_all().build();
    let served = runtime.context("no asynchronous runtime").and_then(|runtime| {
        let served = runtime.block_on(async { serve(config, Interrupts::of_signals()?, None).await });
        // A download that was interrupted may sit in a read that nothing ends.
        runtime.shutdown_background();
        served
    });
    match served {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("coordinator: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Threads of the asynchronous runtime.
pub fn n_threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from).max(LEAST_THREADS)
}

/// Has events logged to standard error.
pub fn init_log(config: &Config) {
    // Checked when the configuration was resolved.
    let mut filter = EnvFilter::try_new(&config.log_level).unwrap_or_else(|_| EnvFilter::new("info"));
    if !config.log_level.contains("ractor") {
        // Its spans would number actors in front of each of their lines.
        filter = filter.add_directive(ACTOR_LOG.parse().expect("a fixed directive is well formed"));
    }
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    let _has_log = match config.log_format {
        LogFormat::Text => log.with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr())).try_init(),
        // The innermost span alone: of a request it has its id.
        LogFormat::Json => log.json().flatten_event(true).with_span_list(false).try_init(),
    };
}

/// By whom the process is told to end.
pub enum Interrupts {
    /// By Ctrl-C and SIGTERM, which mean the same.
    Signals {
        /// Ctrl-C.
        interrupt: Signal,
        /// SIGTERM.
        terminate: Signal,
    },
    /// By whoever has started it within a process of its own; also by dropping the sender.
    Told(mpsc::Receiver<()>),
}

impl Interrupts {
    fn of_signals() -> anyhow::Result<Self> {
        Ok(Self::Signals {
            interrupt: signal(SignalKind::interrupt()).context("SIGINT can't be watched")?,
            terminate: signal(SignalKind::terminate()).context("SIGTERM can't be watched")?,
        })
    }

    async fn next(&mut self) -> &'static str {
        match self {
            Self::Signals { interrupt, terminate } => tokio::select! {
                _ = interrupt.recv() => "SIGINT",
                _ = terminate.recv() => "SIGTERM",
            },
            Self::Told(told) => {
                let _ = told.recv().await;
                "no more work"
            }
        }
    }
}

/// Where there is an audit log, SIGHUP says that it was moved away.
fn follow_hangups(security: &Arc<Security>) -> anyhow::Result<()> {
    let Some(audit) = security.audit().cloned() else { return Ok(()) };
    let mut hangups = signal(SignalKind::hangup()).context("SIGHUP can't be watched")?;
    tokio::spawn(async move {
        while hangups.recv().await.is_some() {
            audit.reopen();
        }
    });
    Ok(())
}

/// Serves until told to end. `listening` is given the endpoints as soon as there are any; they answer with 503 until they can
/// more.
///
/// # Errors
/// If something can't be had, or can't be mended.
pub async fn serve(
    config: Config,
    mut interrupts: Interrupts,
    listening: Option<oneshot::Sender<axum::Router>>,
) -> anyhow::Result<()> {
    let files = connections::raise_file_limit();
    tracing::debug!(files, "limit of open files");
    let security = Security::start(&config.security)?;
    follow_hangups(&security)?;
    let tls = ServingTls::start(config.ssl.as_ref(), config.cluster_tls.as_ref())?;
    // Before a model is fetched for minutes: is there room for us at all?
    let (http_listener, http) = bind("port", config.http_address)?;
    let (grpc_listener, grpc) = bind("grpc-port", config.grpc_address)?;
    let opening_probes = Opening::start(&http_listener, config.client_write_timeout, https(&tls))?;
    let options = OpenOptions {
        state_dir: config.state_dir.clone(),
        credentials: config.store_credentials.clone(),
        tls: config.store_tls.clone(),
    };
    let store = store::open(&config.store, &options).await?;
    let opening = tokio::task::spawn_blocking({
        let config = config.clone();
        move || model::open(&config)
    });
    let model = tokio::select! {
        opened = opening => opened.context("opening the model")??,
        signal = interrupts.next() => {
            tracing::info!("{signal} while the model is being opened: ending");
            return Ok(());
        }
    };
    tracing::info!(
        model = %model.path.display(),
        names = ?model.served.names,
        architecture = model.shape.architecture,
        context = model.served.max_model_len,
        tensor_parallel_size = config.tensor_parallel_size,
        store = config.redacted_store(),
        "opened"
    );
    let metrics = prometheus::install_metrics().context("metrics")?;
    metrics::gauge!(names::IS_LEADER).set(0.0);
    metrics::gauge!(names::TERM).set(0.0);
    let leadership = LeadershipHandle::start(LeadershipConfig {
        me: CoordinatorRecord {
            http_speaks_tls: config.ssl.is_some(),
            grpc_speaks_tls: config.cluster_tls.is_some(),
            ..address::record(config.advertise_host.as_deref(), http, grpc)
        },
        ttl: config.leader_ttl,
        is_alone: store.is_exclusive(),
        store: if store.is_exclusive() {
            StoreSource::Shared(Arc::clone(&store))
        } else {
            StoreSource::Open { url: config.store.clone(), options }
        },
    })
    .context("no thread for leadership")?;
    let journal = Arc::new(ReplicatedJournal::new(Retention::of(&config)));
    tokio::spawn(Arc::clone(&journal).forget_in_time());
    let dialer = config.dialer()?;
    let (feed, loading) = (FeedSlot::default(), Arc::default());
    let base = Foundation { config, store, model, dialer, metrics, leadership, journal, security, tls, feed, loading };
    parts::begin_to_count(&base);
    if let Some(destination) = base.config.otlp_traces_endpoint.clone() {
        let (ratio, instance, model) = (base.config.otlp_sample_ratio, http.to_string(), base.model.served.name());
        tracing::info!(to = %destination, ratio, "tracing requests");
        trace::install(trace::Settings { destination, ratio, instance, model }).context("traces")?;
    }
    tokio::spawn(follower::follow(base.dialer.clone(), base.leadership.clone(), base.journal.clone()));
    let servers = Servers::start(&base, http_listener, grpc_listener)?;
    drop(opening_probes);
    let addresses = Addresses { http, grpc, https: base.tls.is_for_clients() };
    println!("phalanx listening {addresses}");
    if let Some(listening) = listening {
        // Whoever wanted to know has gone: it says so to `interrupts` too.
        let _ = listening.send(servers.endpoints());
    }
    tracing::info!(%http, %grpc, "listening");

    let (fatal, fatals) = mpsc::unbounded_channel();
    let mut process = Process {
        base,
        servers,
        parts: None,
        local: None,
        addresses,
        fatal,
        fatals,
        announcement: Announcement::default(),
        given_up: Some(BTreeSet::new()),
    };
    let outcome = process.run(&mut interrupts).await;
    process.end(outcome.is_ok(), &mut interrupts).await;
    tracing::info!("ended");
    outcome
}

/// The process while it listens.
struct Process {
    base: Foundation,
    servers: Servers,
    /// Set while this coordinator leads.
    parts: Option<Parts>,
    /// Started with the first leadership. They outlive it: they find the next leader.
    local: Option<LocalShards>,
    addresses: Addresses,
    fatal: mpsc::UnboundedSender<String>,
    fatals: mpsc::UnboundedReceiver<String>,
    announcement: Announcement,
    /// Groups that can't be formed; nothing once one has served.
    given_up: Option<BTreeSet<usize>>,
}

impl Process {
    /// Leads and stands by until told to end, or until something can't be mended.
    async fn run(&mut self, interrupts: &mut Interrupts) -> anyhow::Result<()> {
        let mut view = self.base.view();
        loop {
            tokio::select! {
                signal = interrupts.next() => {
                    tracing::info!("{signal}: ending; again to end at once");
                    return Ok(());
                }
                view = view.changed() => self.follow(&view).await?,
                happened = next_of(&mut self.parts) => match happened? {
                    Notice::Serving { epoch, shards } => {
                        self.given_up = None;
                        self.prepare_announcement(epoch, &shards);
                    }
                    Notice::Stuck { shard, pid } => {
                        if let Some(local) = &self.local {
                            local.kill(&shard, pid);
                        }
                    }
                    Notice::GiveUp { group, cause } => self.give_up(group, &cause)?,
                },
                line = self.announcement.due() => println!("{line}"),
                Some(cause) = self.fatals.recv() => return Err(anyhow::anyhow!(cause)),
                ended = &mut self.servers.http => anyhow::bail!("the HTTP server has ended: {ended:?}"),
                ended = &mut self.servers.grpc => anyhow::bail!("the gRPC server has ended: {ended:?}"),
            }
        }
    }

    /// A group can't be formed. That is the end if none can be.
    fn give_up(&mut self, group: usize, cause: &str) -> anyhow::Result<()> {
        let n_groups = self.base.config.replicas as usize;
        let n_given_up = self.given_up.as_mut().map_or(0, |groups| {
            groups.insert(group);
            groups.len()
        });
        anyhow::ensure!(n_given_up < n_groups, "the model can't be served: {cause}");
        tracing::error!(group, cause, "a group can't be formed; it tries again");
        Ok(())
    }

    /// Becomes what leadership says.
    async fn follow(&mut self, view: &View) -> anyhow::Result<()> {
        let ours = self.parts.as_ref().map(|p| p.session.number);
        if ours == view.session.map(|s| s.number) {
            return Ok(());
        }
        self.stand_by().await;
        if let Some(session) = view.session {
            let parts = Parts::start(&self.base, session).await?;
            self.servers.lead(&self.base, &parts)?;
            self.parts = Some(parts);
            metrics::gauge!(names::IS_LEADER).set(1.0);
            metrics::gauge!(names::TERM).set(session.term as f64);
            if self.local.is_none() {
                self.local = Some(LocalShards::start(&self.base.config, self.addresses.grpc, &self.fatal));
            }
        }
        Ok(())
    }

    async fn stand_by(&mut self) {
        if let Some(parts) = self.parts.take() {
            metrics::gauge!(names::IS_LEADER).set(0.0);
            metrics::gauge!(names::TERM).set(0.0);
            self.base.feed.set(None);
            self.servers.stand_by(&self.base);
            parts.stop().await;
            tracing::info!("standing by");
        }
    }

    fn prepare_announcement(&mut self, epoch: Epoch, shards: &[ShardId]) {
        let Some(parts) = &self.parts else { return };
        let name = self.base.model.served.names.first().cloned().unwrap_or_default();
        let line = ready_line(self.addresses, &name, epoch, shards);
        self.announcement.prepare(line, parts.schedulers.iter().map(SchedulerHandle::watch_readiness).collect());
    }

    /// Ends in order: with a standby its requests go on there, else they are waited for.
    async fn end(mut self, in_peace: bool, interrupts: &mut Interrupts) {
        let limit = self.base.config.shutdown_timeout;
        let view = self.base.view().get();
        let hands_over = in_peace && self.parts.is_some() && a_standby_answers(&self.base.dialer, &view).await;
        if hands_over {
            tracing::info!("handing leadership over");
            self.base.leadership.resign().await;
            self.stand_by().await;
        }
        self.servers.stop_accepting();
        if in_peace {
            let finish = async {
                match &self.parts {
                    Some(parts) => parts.finish_requests(limit).await,
                    // Answers of the leader that pass through here.
                    None => drop(timeout(limit, self.servers.idle()).await),
                }
            };
            tokio::select! {
                () = finish => {}
                signal = interrupts.next() => tracing::info!("{signal} again: ending at once"),
            }
        }
        // What still runs gets an error rather than silence.
        if let Some(parts) = &self.parts {
            parts.stop_schedulers();
        }
        self.servers.flush_http().await;
        if let Some(local) = &self.local {
            local.stop_restarting();
        }
        if let Some(parts) = &self.parts {
            parts.dismiss_shards().await;
        }
        self.servers.flush_grpc().await;
        if let Some(local) = self.local.take() {
            local.end().await;
        }
        self.base.leadership.resign().await;
        self.servers.abort();
        if let Some(audit) = self.base.security.audit() {
            audit.flush(AUDIT_LIMIT).await;
        }
        // A collector that is away must not hold the process up for long.
        let _flushed = tokio::task::spawn_blocking(|| trace::flush(TRACE_FLUSH_LIMIT)).await;
    }
}

/// What the parts say next; nothing while there are none.
async fn next_of(parts: &mut Option<Parts>) -> anyhow::Result<Notice> {
    let Some(parts) = parts else { return std::future::pending().await };
    tokio::select! {
        Some(notice) = parts.notices.recv() => Ok(notice),
        (ended, _, _) = select_all(&mut parts.scheduler_tasks) => {
            Err(anyhow::anyhow!("a scheduler has ended: {ended:?}"))
        }
        ended = &mut parts.membership_task => Err(anyhow::anyhow!("membership has ended: {ended:?}")),
    }
}

/// Whether somebody is there to lead next: a record in the store may be that of a dead process.
async fn a_standby_answers(dialer: &Dialer, view: &View) -> bool {
    let ask = |address: String| async move {
        let endpoint = dialer.endpoint(&address).ok()?.connect_timeout(STANDBY_LIMIT);
        let channel = endpoint.timeout(STANDBY_LIMIT).connect().await.ok()?;
        LeadershipClient::new(channel).leader(LeaderRequest::default()).await.ok()
    };
    let answers = futures::future::join_all(view.others().map(|c| ask(c.grpc_address.clone()))).await;
    answers.iter().any(Option::is_some)
}

/// Where this process listens, as the lines on stdout say it.
#[derive(Clone, Copy)]
struct Addresses {
    http: SocketAddr,
    grpc: SocketAddr,
    /// Whether clients are shown a certificate.
    https: bool,
}

impl fmt::Display for Addresses {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.https { "https" } else { "http" };
        write!(f, "{scheme}://{} grpc://{}", self.http, self.grpc)
    }
}

/// What tests and scripts read from stdout.
fn ready_line(addresses: Addresses, model: &str, epoch: Epoch, shards: &[ShardId]) -> String {
    let tp = shards.len();
    let shards = shards.iter().map(|s| s.0.as_str()).collect::<Vec<_>>().join(",");
    format!("phalanx ready {addresses} model={model} tp={tp} shards={shards} epoch={epoch}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ready_line_has_its_documented_form() {
        let address = |a: &str| a.parse().unwrap();
        let shards = [ShardId("local-0".to_owned()), ShardId("local-1".to_owned())];
        for (https, scheme) in [(false, "http"), (true, "https")] {
            let addresses = Addresses { http: address("127.0.0.1:8000"), grpc: address("127.0.0.1:50051"), https };
            let rest = "://127.0.0.1:8000 grpc://127.0.0.1:50051 model=m tp=2 shards=local-0,local-1 epoch=3";
            assert_eq!(
                ready_line(addresses, "m", Epoch::from_raw(3), &shards),
                format!("phalanx ready {scheme}{rest}")
            );
        }
    }
}
