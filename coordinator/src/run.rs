//! The process: opens the model, starts actors, servers and shards, waits, and ends them in order.

use std::{
    ffi::OsString,
    net::{SocketAddr, TcpListener},
    process::ExitCode,
    sync::{Arc, Mutex},
    time::Duration,
};

use anyhow::{Context, bail};
use axum::serve::ListenerExt;
use phalanx_cluster::{
    id::{Epoch, ShardId},
    store::{self, MembershipStore, OpenOptions},
};
use phalanx_proto::v1::Form;
use ractor::{Actor, ActorRef, rpc::CallResult};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::{mpsc, watch},
    task::JoinHandle,
    time::{Instant, sleep, timeout},
};
use tonic::transport::server::TcpIncoming;
use tracing_subscriber::EnvFilter;

use crate::{
    config::{Config, Flags, Machine},
    frontend::{self, FrontendState, prometheus},
    group::actor::{GroupConfig, GroupMsg, Notice},
    membership::actor::{GroupAddress, Membership, MembershipMsg},
    model::{self, OpenedModel},
    scheduler::{
        actor::{SchedulerConfig, SchedulerHandle},
        event::{Limits, Recovery},
    },
    shard_link::ClusterService,
    spawn::LocalShards,
};

/// Failed formations in a row, before anything was served, after which local shards are not tried again.
const GIVE_UP_AFTER: u32 = 3;
/// Filter of the actor framework's own log, unless configured.
const ACTOR_LOG: &str = "ractor=warn";
/// Threads beside those of shards: heartbeats must go on while requests are parsed.
const LEAST_THREADS: usize = 4;
/// HTTP/2 window: a large message comes in without waiting for window updates.
const WINDOW_BYTES: u32 = 8 << 20;
/// Longest wait for an answer of our own actors.
const CALL_LIMIT: Duration = Duration::from_secs(2);
/// Between looks at what is still running at the end.
const END_POLL: Duration = Duration::from_millis(20);
/// Longest wait for answers to leave the process after their requests are finished.
const FLUSH_LIMIT: Duration = Duration::from_secs(1);
/// Longest wait for shards elsewhere to take their farewell.
const FAREWELL_LIMIT: Duration = Duration::from_secs(2);

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
    let threads = std::thread::available_parallelism().map_or(1, usize::from).max(LEAST_THREADS);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(threads).enable_all().build();
    let served = runtime.context("no asynchronous runtime").and_then(|runtime| {
        let served = runtime.block_on(serve(config));
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

fn init_log(config: &Config) {
    // Checked when the configuration was resolved.
    let mut filter = EnvFilter::try_new(&config.log_level).unwrap_or_else(|_| EnvFilter::new("info"));
    if !config.log_level.contains("ractor") {
        // Its spans would number actors in front of each of their lines.
        filter = filter.add_directive(ACTOR_LOG.parse().expect("a fixed directive is well formed"));
    }
    let _has_log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
        .try_init();
}

/// Ctrl-C and SIGTERM mean the same.
struct Interrupts {
    interrupt: Signal,
    terminate: Signal,
}

impl Interrupts {
    fn new() -> anyhow::Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt()).context("SIGINT can't be watched")?,
            terminate: signal(SignalKind::terminate()).context("SIGTERM can't be watched")?,
        })
    }

    async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.interrupt.recv() => "SIGINT",
            _ = self.terminate.recv() => "SIGTERM",
        }
    }
}

/// A bound socket, and the address that it got.
fn bind(option: &str, address: SocketAddr) -> anyhow::Result<(tokio::net::TcpListener, SocketAddr)> {
    let listener = TcpListener::bind(address).with_context(|| format!("--{option}: can't listen on {address}"))?;
    listener.set_nonblocking(true)?;
    let bound = listener.local_addr()?;
    Ok((tokio::net::TcpListener::from_std(listener)?, bound))
}

async fn serve(config: Config) -> anyhow::Result<()> {
    let mut interrupts = Interrupts::new()?;
    // Before a model is fetched for minutes: is there room for us at all?
    let (http_listener, http) = bind("port", config.http_address)?;
    let (grpc_listener, grpc) = bind("grpc-port", config.grpc_address)?;
    let options = OpenOptions { state_dir: config.state_dir.clone(), credentials: config.store_credentials.clone() };
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
    let name = model.served.names.first().cloned().unwrap_or_default();
    let (mut parts, mut notices) = Parts::start(&config, store, model).await?;
    let mut servers = Servers::start(&parts, http_listener, grpc_listener, &config)?;
    println!("phalanx listening http://{http} grpc://{grpc}");
    tracing::info!(%http, %grpc, "listening");

    let (fatal, mut fatals) = mpsc::unbounded_channel();
    let local = LocalShards::start(&config, grpc, &fatal);
    let mut is_announced = false;
    let outcome = loop {
        tokio::select! {
            signal = interrupts.next() => {
                tracing::info!("{signal}: ending; again to end at once");
                break Ok(());
            }
            Some(notice) = notices.recv() => match notice {
                Notice::Serving { epoch, shards } => {
                    if !is_announced {
                        is_announced = true;
                        println!("{}", ready_line(http, grpc, &name, epoch, &shards));
                    }
                }
                Notice::GiveUp(cause) => break Err(anyhow::anyhow!("the model can't be served: {cause}")),
            },
            Some(cause) = fatals.recv() => break Err(anyhow::anyhow!(cause)),
            ended = &mut parts.scheduler_task => break Err(anyhow::anyhow!("the scheduler has ended: {ended:?}")),
            ended = &mut parts.membership_task => break Err(anyhow::anyhow!("membership has ended: {ended:?}")),
            ended = &mut servers.http => break Err(anyhow::anyhow!("the HTTP server has ended: {ended:?}")),
            ended = &mut servers.grpc => break Err(anyhow::anyhow!("the gRPC server has ended: {ended:?}")),
        }
    };
    servers.stop_accepting();
    if outcome.is_ok() {
        tokio::select! {
            () = parts.finish_requests(config.shutdown_timeout) => {}
            signal = interrupts.next() => tracing::info!("{signal} again: ending at once"),
        }
    }
    // What still runs gets an error rather than silence.
    parts.scheduler.stop();
    servers.flush().await;
    local.stop_restarting();
    parts.dismiss_shards().await;
    local.end().await;
    servers.abort();
    tracing::info!("ended");
    outcome
}

/// What tests and scripts read from stdout.
fn ready_line(http: SocketAddr, grpc: SocketAddr, model: &str, epoch: Epoch, shards: &[ShardId]) -> String {
    let tp = shards.len();
    let shards = shards.iter().map(|s| s.0.as_str()).collect::<Vec<_>>().join(",");
    format!("phalanx ready http://{http} grpc://{grpc} model={model} tp={tp} shards={shards} epoch={epoch}")
}

/// The actors.
struct Parts {
    scheduler: SchedulerHandle,
    scheduler_task: JoinHandle<()>,
    membership: ActorRef<MembershipMsg>,
    membership_task: JoinHandle<()>,
    group: GroupAddress,
    state: FrontendState,
}

impl Parts {
    async fn start(
        config: &Config,
        store: Arc<dyn MembershipStore>,
        model: OpenedModel,
    ) -> anyhow::Result<(Self, mpsc::UnboundedReceiver<Notice>)> {
        let metrics = prometheus::install_metrics().context("metrics")?;
        let (scheduler, scheduler_task) = SchedulerHandle::spawn(
            SchedulerConfig {
                limits: Limits {
                    block_size: config.block_size as usize,
                    max_step_rows: config.max_num_batched_tokens as usize,
                    max_running: config.max_num_seqs as usize,
                    max_model_len: model.served.max_model_len,
                    vocab: model.served.vocab,
                    prefix_caching: config.enable_prefix_caching,
                },
                recovery: Recovery { max_replays: config.max_replays, no_group_timeout: config.no_group_timeout },
                eos: model.served.eos.clone(),
                detokenizers: Box::new(model.served.tokenizer.as_ref().clone()),
                max_queued_requests: config.max_num_queued_reqs as usize,
                max_queued_tokens: config.max_num_queued_tokens as usize,
            },
            None,
        )
        .await
        .context("the scheduler can't be started")?;

        let (notice_sender, notices) = mpsc::unbounded_channel();
        let to_scheduler = scheduler.clone();
        let group_config = GroupConfig {
            world_size: config.tensor_parallel_size as usize,
            name: model.served.names.first().cloned().unwrap_or_default(),
            form: Form {
                model: model.location.clone(),
                model_hash: model.identity.clone(),
                dtype: config.dtype.as_str().to_owned(),
                block_size: config.block_size,
                kv_cache_bytes: config.kv_cache_memory.unwrap_or(0),
                max_step_rows: config.max_num_batched_tokens,
                max_sequences: config.max_num_seqs,
                max_model_len: u32::try_from(model.served.max_model_len).unwrap_or(u32::MAX),
                ..Form::default()
            },
            store,
            scheduler: Box::new(move |event| to_scheduler.group_event(event)),
            notices: notice_sender,
            // Shards that join from elsewhere may be mended while we wait.
            give_up_after: (config.local_shards > 0).then_some(GIVE_UP_AFTER),
            serving: Mutex::new(None),
        };
        let (membership, membership_task) =
            Actor::spawn(None, Membership, group_config).await.context("membership can't be started")?;
        let group = match membership.call(MembershipMsg::Group, Some(CALL_LIMIT)).await {
            Ok(CallResult::Success(group)) => group,
            _ => bail!("membership does not answer"),
        };
        let submit = Arc::new(scheduler.clone());
        let state = FrontendState::new(submit, model.served, frontend::Limits::default(), metrics);
        Ok((Self { scheduler, scheduler_task, membership, membership_task, group, state }, notices))
    }

    /// Waits until no request lives, or the time is over.
    async fn finish_requests(&self, limit: Duration) {
        let deadline = Instant::now() + limit;
        let mut is_told = false;
        loop {
            let n_requests = self.scheduler.status(CALL_LIMIT).await.map_or(0, |s| s.n_requests);
            if n_requests == 0 {
                return;
            }
            if !is_told {
                is_told = true;
                tracing::info!(n_requests, limit_s = limit.as_secs(), "waiting for running requests");
            }
            if Instant::now() >= deadline {
                tracing::warn!(n_requests, "the time is over: running requests are given up");
                return;
            }
            sleep(END_POLL).await;
        }
    }

    /// Tells all shards to end, and waits until they have heard it.
    async fn dismiss_shards(&self) {
        let message = |reply| MembershipMsg::Shutdown { reason: "the coordinator ends".to_owned(), reply };
        if !matches!(self.membership.call(message, Some(CALL_LIMIT)).await, Ok(CallResult::Success(()))) {
            return;
        }
        let deadline = Instant::now() + FAREWELL_LIMIT;
        while Instant::now() < deadline {
            match self.group.get().call(GroupMsg::Status, Some(CALL_LIMIT)).await {
                Ok(CallResult::Success(status)) if !status.members.is_empty() => sleep(END_POLL).await,
                _ => return,
            }
        }
    }
}

/// The servers.
struct Servers {
    http: JoinHandle<std::io::Result<()>>,
    grpc: JoinHandle<Result<(), tonic::transport::Error>>,
    stopping: watch::Sender<bool>,
}

impl Servers {
    fn start(
        parts: &Parts,
        http: tokio::net::TcpListener,
        grpc: tokio::net::TcpListener,
        config: &Config,
    ) -> anyhow::Result<Self> {
        let (stopping, _) = watch::channel(false);
        let stopped = || {
            let mut stopping = stopping.subscribe();
            async move {
                // An error means that the process is being torn down.
                let _ = stopping.wait_for(|s| *s).await;
            }
        };
        let cluster = ClusterService::server(parts.membership.clone(), parts.group.clone(), config.heartbeat_timeout);
        let routes = frontend::grpc::grpc_routes(parts.state.clone()).context("gRPC reflection")?;
        let grpc = tonic::transport::Server::builder()
            .initial_stream_window_size(WINDOW_BYTES)
            .initial_connection_window_size(WINDOW_BYTES)
            .add_routes(routes.add_service(cluster))
            .serve_with_incoming_shutdown(TcpIncoming::from(grpc).with_nodelay(Some(true)), stopped());
        let router = frontend::http_router(parts.state.clone());
        let http = http.tap_io(|stream| {
            // A token is a small packet: it must not wait for the next one.
            if let Err(error) = stream.set_nodelay(true) {
                tracing::debug!(%error, "TCP_NODELAY");
            }
        });
        let http = tokio::spawn(axum::serve(http, router).with_graceful_shutdown(stopped()).into_future());
        Ok(Self { http, grpc: tokio::spawn(grpc), stopping })
    }

    /// Takes no new connections; requests that run go on.
    fn stop_accepting(&self) {
        self.stopping.send_replace(true);
    }

    /// Lets answers leave.
    async fn flush(&mut self) {
        // gRPC does not end while shards are attached.
        if !self.http.is_finished() && timeout(FLUSH_LIMIT, &mut self.http).await.is_err() {
            tracing::debug!("HTTP connections are still open");
        }
    }

    fn abort(&self) {
        self.http.abort();
        self.grpc.abort();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ready_line_has_its_documented_form() {
        let address = |a: &str| a.parse().unwrap();
        let shards = [ShardId("local-0".to_owned()), ShardId("local-1".to_owned())];
        let line = ready_line(address("127.0.0.1:8000"), address("127.0.0.1:50051"), "m", Epoch::from_raw(3), &shards);
        assert_eq!(
            line,
            "phalanx ready http://127.0.0.1:8000 grpc://127.0.0.1:50051 model=m tp=2 shards=local-0,local-1 epoch=3"
        );
    }
}
