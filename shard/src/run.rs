//! The process: configuration, log, engine, link, and how it ends.

use std::{
    convert::Infallible,
    ffi::OsString,
    io,
    net::{SocketAddr, TcpListener},
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::Context;
use clap::CommandFactory;
use phalanx_cluster::{error_text::with_causes, manual};
use phalanx_kernels::ops::Precision;
use phalanx_proto::v1::Hello;
use rustix::{
    event::{PollFd, PollFlags, poll},
    io::Errno,
    process::{PidfdFlags, pidfd_open},
};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::watch,
};
use tracing_subscriber::EnvFilter;

use crate::{
    config::{Advertised, Config, Flags, LogFormat},
    engine::{
        RankConfig,
        actor::{self, EngineHandle},
    },
    health, host,
    link::{End, Link},
    memory,
    mirror::{Receiver, Store},
};

/// Longest wait for the engine to end its step and release its shared memory.
const ENGINE_END_LIMIT: Duration = Duration::from_secs(2);
/// Time that a last message has to leave.
const FLUSH: Duration = Duration::from_millis(200);

/// The command line of the program `shard`.
pub fn spec() -> clap::Command {
    manual::with_commands(Flags::command())
}

/// Runs a shard: what the program `shard` does, for programs that embed it. `args` begins with the program's name.
///
/// The process is called `shard` in the process list from then on.
pub fn main_from(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let args: Vec<OsString> = args.into_iter().collect();
    if args.get(1).is_some_and(|word| manual::is_command(word)) {
        return manual::main_from(spec(), args);
    }
    // Not being renamed hurts nobody.
    let _unnamed = rustix::thread::set_name(c"shard");
    let config = match Config::from_args(args) {
        Ok(config) => config,
        Err(error) => return if error.print() { ExitCode::SUCCESS } else { ExitCode::from(2) },
    };
    init_log(config.log_format);
    // One thread is enough for a stream; the cores are the engine's.
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            tracing::error!("no asynchronous runtime: {error}");
            return ExitCode::FAILURE;
        }
    };
    match runtime.block_on(run(config)) {
        Ok(code) => code,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn init_log(format: LogFormat) {
    let filter = EnvFilter::try_from_env("PHALANX_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    // A program that embeds the shard may have a log already.
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr);
    let _has_log = match format {
        LogFormat::Text => log.with_ansi(io::IsTerminal::is_terminal(&io::stderr())).try_init(),
        LogFormat::Json => log.json().flatten_event(true).with_span_list(false).try_init(),
    };
}

async fn run(config: Config) -> anyhow::Result<ExitCode> {
    let parent_gone = parent_gone(config.exit_with_parent)?;
    let mut terminate = signal(SignalKind::terminate()).context("SIGTERM can't be watched")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("SIGINT can't be watched")?;
    #[cfg(any(debug_assertions, feature = "failpoints"))]
    crate::failpoint::arm(&config.failpoints);
    let listener = TcpListener::bind(config.listen).with_context(|| format!("--listen {}", config.listen))?;
    let bound = listener.local_addr().context("--listen: no local address")?;
    let collective_address =
        config.advertise.as_ref().map_or_else(|| bound.to_string(), |advertised| advertised.address(bound.port()));
    let mirror = mirror(&config)?;
    let hello = Hello { collective_address, ..hello(&config, mirror.as_ref())? };
    tracing::info!(
        shard = %hello.shard_id,
        device = %hello.device,
        threads = hello.threads,
        collective = %hello.collective_address,
        "starting"
    );
    let engine = actor::start(RankConfig {
        device: config.device.clone(),
        collective: config.collective.clone(),
        listener,
        host_id: hello.host_id.clone(),
        mirror: mirror.as_ref().map(|receiver| receiver.store().clone()),
    })
    .await?;

    let health = health(&config, &hello, &engine)?;
    let (leave, told_to_leave) = watch::channel(None);
    let (coordinators, dialer) = (&config.coordinators, config.dialer.clone());
    follow_certificates(&config)?;
    let link = Link::new(coordinators, dialer, hello, &engine, told_to_leave, config.leave_timeout)
        .context("no thread for heartbeats")?;
    let signals = async {
        // The first asks for leave; the second does not wait for it.
        loop {
            let signal = tokio::select! {
                _ = terminate.recv() => "SIGTERM",
                _ = interrupt.recv() => "SIGINT",
            };
            if leave.send_replace(Some(signal.to_owned())).is_some() {
                return signal;
            }
        }
    };
    let ended = tokio::select! {
        end = link.run() => match end {
            End::Shutdown(reason) => format!("told to shut down: {reason}"),
            End::Left(reason) => reason,
        },
        signal = signals => format!("{signal} again"),
        () = parent_gone => "the parent process has ended".to_owned(),
        never = health => match never {},
        () = thread_ended(&engine) => "the engine has ended".to_owned(),
    };
    tracing::info!("ending: {ended}");
    Ok(end(engine).await)
}

/// Dials with new certificates when their files change; the stream that is there goes on.
fn follow_certificates(config: &Config) -> anyhow::Result<()> {
    let Some(tls) = &config.cluster_tls else { return Ok(()) };
    let dialer = config.dialer.clone();
    let watching = tls.watch(
        |_, _| {},
        move |renewed| {
            let taken = dialer.renew(&renewed.ca, &renewed.certificate, &renewed.key);
            taken.map_err(|error| with_causes(&error))
        },
    );
    watching.context("--cluster-ca, --cluster-cert, --cluster-key can't be followed")
}

/// Answers probes, if there is a port for them; never ends.
fn health(
    config: &Config,
    hello: &Hello,
    engine: &EngineHandle,
) -> anyhow::Result<impl Future<Output = Infallible> + use<>> {
    let serving = match config.health {
        Some(address) => {
            let listener =
                health::bind(address).with_context(|| format!("--health-port: can't listen on {address}"))?;
            tracing::info!(address = %listener.local_addr()?, "probes are answered");
            Some(health::serve(listener, health::Shard::new(hello, engine)))
        }
        None => None,
    };
    Ok(async move {
        match serving {
            Some(serving) => serving.await,
            None => std::future::pending().await,
        }
    })
}

/// Where copies of other ranks' rows are taken in, if any are.
fn mirror(config: &Config) -> anyhow::Result<Option<Receiver>> {
    let limit = config.mirror_memory.unwrap_or_else(memory::mirror_limit);
    if limit == 0 {
        return Ok(None);
    }
    let address = config.mirror_listen;
    let receiver = Receiver::start(address, Store::new(limit)).with_context(|| format!("--mirror-listen {address}"))?;
    Ok(Some(receiver))
}

/// Everything but where ranks connect.
fn hello(config: &Config, mirror: Option<&Receiver>) -> anyhow::Result<Hello> {
    // The precision is the group's; what else decides bits is the device's.
    let fingerprint = config.device.open(Precision::Auto)?.fingerprint();
    Ok(Hello {
        shard_id: config.shard_id.clone(),
        incarnation: host::incarnation(),
        host_id: host::host_id(),
        pid: std::process::id(),
        device: config.device.name.clone(),
        threads: config.device.threads as u32,
        memory_bytes: memory::free_bytes().unwrap_or(0),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        fingerprint,
        join_token: config.join_token.clone(),
        mirror_address: mirror.map(|receiver| mirror_address(config, receiver.address())).unwrap_or_default(),
        mirror_secret: mirror.map(|receiver| receiver.secret().to_vec()).unwrap_or_default(),
        ..Hello::default()
    })
}

/// Where ranks reach the mirror: on the advertised host, at the mirror's own port.
fn mirror_address(config: &Config, bound: SocketAddr) -> String {
    match &config.advertise {
        Some(advertised) => Advertised { port: None, ..advertised.clone() }.address(bound.port()),
        None => bound.to_string(),
    }
}

/// Ends the engine and says with which code the process should end.
async fn end(engine: EngineHandle) -> ExitCode {
    // Its last message may still be on its way to the coordinator.
    if engine.thread.is_finished() {
        tokio::time::sleep(FLUSH).await;
    }
    engine.interrupt.advance(Instant::now());
    // The thread ends when the actor drops its sender.
    engine.actor.stop(None);
    let begun = tokio::time::Instant::now();
    while !engine.thread.is_finished() && begun.elapsed() < ENGINE_END_LIMIT {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    if !engine.thread.is_finished() {
        tracing::warn!("the engine is busy; ending without it");
        return ExitCode::SUCCESS;
    }
    match engine.thread.join() {
        Ok(Ok(())) => ExitCode::SUCCESS,
        Ok(Err(_)) | Err(_) => ExitCode::FAILURE,
    }
}

/// Waits for the engine thread to end of itself, which it does only after a panic.
async fn thread_ended(engine: &EngineHandle) {
    while !engine.thread.is_finished() {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Resolves when the parent process is gone; never if that is not wanted.
///
/// A process descriptor is watched, because the kernel's death signal comes when the parent's *thread* ends.
fn parent_gone(wanted: bool) -> anyhow::Result<impl Future<Output = ()>> {
    let (gone, watch) = tokio::sync::oneshot::channel::<()>();
    let parent = if wanted { rustix::process::getppid() } else { None };
    let watched = match parent {
        Some(parent) => {
            let descriptor = pidfd_open(parent, PidfdFlags::empty())
                .with_context(|| format!("the parent process {parent:?} can't be watched"))?;
            let wait = move || {
                // A descriptor of a process is readable when the process has ended. An error other than a signal is as
                // good a reason to end as that.
                while poll(&mut [PollFd::new(&descriptor, PollFlags::IN)], None) == Err(Errno::INTR) {}
                drop(gone);
            };
            std::thread::Builder::new().name("parent-watch".to_owned()).spawn(wait)?;
            true
        }
        None => false,
    };
    Ok(async move {
        if watched {
            let _dropped = watch.await;
        } else {
            std::future::pending().await
        }
    })
}
