//! `coordinator batch`: a file of requests, answered by a cluster that lives as long as that takes, or by one that runs already.

use std::{
    ffi::OsString,
    io,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use clap::{CommandFactory, FromArgMatches, Parser, error::ErrorKind, parser::ValueSource};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::{mpsc, oneshot},
};

use super::{
    ask::{Ask, Here, There},
    input,
    journal::Journal,
    outcome::Which,
    progress::{Progress, Tally},
    runner::{Ended, Settings, run},
};
use crate::{
    config::{Config, ConfigError, Flags, Machine},
    run as process,
};

/// Exit code when all lines are done and some have failed.
const SOME_FAILED: u8 = 3;
/// How long another server may be away.
const PATIENCE: Duration = Duration::from_secs(600);
/// Lines at once of another server, unless said.
const ELSEWHERE: usize = 256;
/// Most lines at once.
const MOST: usize = 65_536;
/// Log of a cluster that nobody looks at.
const LOG_LEVEL: &str = "warn";

/// Answers a file of requests: OpenAI's batch lines in, one line of result for each out, as they finish.
///
/// Starts the model as `coordinator MODEL` does and ends it when all is done; or asks a server that runs (--url). Run it again after
/// a crash or Ctrl-C, and it goes on: lines that stand in the output are not asked for again.
#[derive(Debug, Parser)]
#[command(
    name = "coordinator batch",
    version,
    args_override_self = true,
    after_help = "Exit codes: 0 all lines have what they asked for; 3 all lines are done, some failed (their lines of the output \
                  say why); 1 not all lines are done: run it again; 2 wrong options."
)]
struct Cli {
    /// File of requests, one JSON object a line: custom_id, method ("POST"), url (/v1/chat/completions, /v1/completions or
    /// /v1/responses) and body
    #[arg(short = 'i', long = "input-file", value_name = "FILE")]
    input: PathBuf,

    /// File that gets the results, one JSON object a line: custom_id, response (status_code, request_id, body) or error. Delete a
    /// line of it to have it asked for again
    #[arg(short = 'o', long = "output-file", value_name = "FILE")]
    output: PathBuf,

    /// Server to ask, as http://HOST:8000, instead of starting the model here; with --api-key KEY if it wants one
    #[arg(long, value_name = "URL")]
    url: Option<String>,

    /// Lines that are asked for at once [default: what fills --max-num-seqs and a few more; with --url 256]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=MOST as i64))]
    concurrency: Option<u32>,

    #[command(flatten)]
    flags: Flags,
}

/// The command line.
pub fn spec() -> clap::Command {
    Cli::command()
}

/// Runs the command; `args` begins with the program's name.
pub fn main_from(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let parsed = parse(args).map_err(ConfigError::from).and_then(|cli| {
        let Cli { input, output, url, concurrency, flags } = cli;
        Ok((input, output, concurrency, Served::of(url, flags)?))
    });
    let (input, output, concurrency, served) = match parsed {
        Ok(parsed) => parsed,
        Err(error) => return ExitCode::from(error.report()),
    };
    if let Served::Printed(config) = served {
        print!("{config}");
        return ExitCode::SUCCESS;
    }
    let concurrency = concurrency.map_or_else(|| served.concurrency(), |n| n as usize);
    match done(&input, &output, served, concurrency) {
        Ok(0) => ExitCode::SUCCESS,
        Ok(_) => ExitCode::from(SOME_FAILED),
        Err(error) => {
            eprintln!("coordinator batch: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Options that say something where a server is asked that runs.
const WITH_URL: &[&str] = &["input", "output", "url", "concurrency", "api_key"];

/// The command line. What would have no effect is refused.
fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Cli, clap::Error> {
    let mut command = Cli::command();
    let matches = command.try_get_matches_from_mut(Flags::expand(args))?;
    let cli = Cli::from_arg_matches(&matches)?;
    let is_typed = |id: &str| matches.value_source(id) == Some(ValueSource::CommandLine);
    let names = command.get_arguments().map(|argument| argument.get_id().as_str().to_owned()).collect::<Vec<_>>();
    let idle = names.iter().find(|id| cli.url.is_some() && is_typed(id) && !WITH_URL.contains(&id.as_str()));
    if let Some(id) = idle {
        let name = if id == "positional_model" { "MODEL".to_owned() } else { format!("--{}", id.replace('_', "-")) };
        let reason =
            format!("{name} is for a model that is started here, and --url asks a server that runs: leave it out");
        return Err(command.error(ErrorKind::ArgumentConflict, reason));
    }
    Ok(cli)
}

/// By whom lines are answered.
enum Served {
    /// Nothing is: the options were to be shown.
    Printed(String),
    Here(Box<Config>),
    There(There),
}

impl Served {
    fn of(url: Option<String>, mut flags: Flags) -> Result<Self, ConfigError> {
        if let Some(url) = url {
            if !url.starts_with("http://") && !url.starts_with("https://") {
                let reason = "want http://HOST:PORT or https://HOST:PORT".to_owned();
                return Err(ConfigError::Value { option: "url", value: url, reason });
            }
            let key = flags.api_key.take();
            return Ok(Self::There(There::new(&url, key.as_ref().and_then(|keys| keys.first()).map(String::as_str))));
        }
        let is_printed = flags.print_config;
        let mut flags = flags.settle()?;
        // Nobody else need reach it, and others may serve on this machine.
        flags.port.get_or_insert(0);
        flags.grpc_port.get_or_insert(0);
        flags.log_level.get_or_insert_with(|| LOG_LEVEL.to_owned());
        let config = Config::resolve(flags, &Machine::detect())?;
        if config.store != "embedded" {
            let reason = "a batch's own cluster has one coordinator: ask one of those with --url";
            return Err(ConfigError::Value {
                option: "store",
                value: config.redacted_store(),
                reason: reason.to_owned(),
            });
        }
        if is_printed {
            return Ok(Self::Printed(config.to_flags().to_toml()));
        }
        Ok(Self::Here(Box::new(config)))
    }

    fn concurrency(&self) -> usize {
        match self {
            Self::Here(config) => {
                // A few wait, so that a place is taken as soon as it is free; never so many that the queue is full.
                let n_seats = (config.max_num_seqs * config.replicas) as usize;
                (n_seats + n_seats.div_ceil(8)).min(n_seats + config.max_num_queued_reqs as usize).min(MOST)
            }
            Self::There(_) | Self::Printed(_) => ELSEWHERE,
        }
    }
}

/// Does it all; how many lines have failed.
fn done(input: &Path, output: &Path, served: Served, concurrency: usize) -> anyhow::Result<usize> {
    let shown = input.display();
    let looked = input::look(input).with_context(|| format!("{shown}: can't be read"))?;
    if let Some((id, [first, second])) = looked.doubles.first() {
        bail!("{shown}, lines {first} and {second} have the same custom_id {id:?}: give each its own");
    }
    let (mut journal, before) = Journal::open(output)?;
    if let Some(foreign) = before.lines.iter().find(|line| !looked.has(line)) {
        let name = match foreign {
            Which::Named(id) => format!("custom_id {id:?}"),
            Which::Numbered(number) => format!("line {number} without a custom_id"),
        };
        bail!("{}: has a result of {name}, which {shown} has not: give another output", output.display());
    }
    let tally = Tally::new(looked.n_lines, before.lines.len(), before.n_failed(), Instant::now());
    if tally.n_done == tally.n_lines {
        eprintln!("coordinator batch: all {} lines were done already, {} failed", tally.n_lines, tally.n_failed);
        return Ok(tally.n_failed);
    }
    if tally.n_before > 0 {
        eprintln!("coordinator batch: going on: {} of {} lines are done", tally.n_before, tally.n_lines);
    }
    drop(looked);
    if let Served::Here(config) = &served {
        process::init_log(config);
    }
    // Each line that is asked of another server waits on a thread.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(process::n_threads())
        .max_blocking_threads(concurrency + 512)
        .enable_all()
        .build()
        .context("no asynchronous runtime")?;
    let tally = runtime.block_on(async {
        let settings = |patience| Settings { concurrency, patience, places: None };
        let stopped = interrupted()?;
        let mut progress = Progress::new(tally);
        let lines = input::read(input, before.lines);
        let ended = {
            let done = |id: Option<&str>, _number: usize, outcome: super::outcome::Outcome| {
                journal.append(outcome.to_line(id))?;
                progress.count(&outcome);
                Ok(())
            };
            match served {
                Served::There(there) => {
                    run(lines, Arc::new(there), &settings(Some(PATIENCE)), stopped, done).await.map_err(Into::into)
                }
                Served::Here(config) => {
                    beside(*config, stopped, async |ask, over| {
                        run(lines, ask, &settings(None), over, done).await.map_err(Into::into)
                    })
                    .await
                }
                Served::Printed(_) => Ok(Ended::Stopped),
            }
        };
        let tally = progress.finish();
        journal.sync()?;
        match ended? {
            Ended::Complete => Ok(tally),
            Ended::Stopped => bail!("stopped; {}; run it again to go on", tally.text(Instant::now())),
        }
    });
    // A thread that waits for another server's answer is not waited for.
    runtime.shutdown_background();
    let tally = tally?;
    ensure!(tally.n_done == tally.n_lines, "{} has changed meanwhile: run it again", input.display());
    eprintln!("coordinator batch: {}", tally.text(Instant::now()));
    Ok(tally.n_failed)
}

/// Ends with the first Ctrl-C or SIGTERM.
fn interrupted() -> io::Result<impl Future<Output = ()>> {
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    Ok(async move {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
    })
}

/// Starts a cluster in this process, works with it, and ends it. `work` is given its endpoints, and a future that ends when it is
/// to stop.
async fn beside(
    config: Config,
    stopped: impl Future<Output = ()>,
    work: impl AsyncFnOnce(Arc<dyn Ask>, std::pin::Pin<Box<dyn Future<Output = ()> + '_>>) -> anyhow::Result<Ended>,
) -> anyhow::Result<Ended> {
    let (end, ends) = mpsc::channel(2);
    let (listening, listens) = oneshot::channel();
    let mut serving = tokio::spawn(process::serve(config, process::Interrupts::Told(ends), Some(listening)));
    let mut stopped = Box::pin(stopped);
    let router = tokio::select! {
        ended = &mut serving => return ended.context("the cluster")?.and(Err(anyhow::anyhow!("the cluster has ended"))),
        () = &mut stopped => None,
        router = listens => router.ok(),
    };
    let mut over = None;
    let ended = match router {
        Some(router) => {
            let ask: Arc<dyn Ask> = Arc::new(Here { router, whose: Arc::new(|| Ok(None)), is_background: false });
            let stop = Box::pin(async {
                tokio::select! {
                    () = &mut stopped => {}
                    ended = &mut serving => over = Some(ended),
                }
            });
            work(ask, stop).await
        }
        None => Ok(Ended::Stopped),
    };
    match over {
        // It never ends by itself unless something can't be mended.
        Some(ended) => ended.context("the cluster")?.and(ended_anyway()),
        None => {
            // It has ended if it does not listen.
            let _gone = end.send(()).await;
            serving.await.context("the cluster")??;
            ended
        }
    }
}

fn ended_anyway() -> anyhow::Result<Ended> {
    bail!("the cluster has ended: run it again to go on")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(args: &[&str]) -> Result<Cli, clap::Error> {
        let files = ["coordinator batch", "-i", "in.jsonl", "-o", "out.jsonl"];
        parse(files.iter().chain(args).map(OsString::from))
    }

    #[test]
    fn options_of_the_model_are_possible_where_one_is_started() {
        Cli::command().debug_assert();
        let cli = parsed(&["m.gguf", "-tp", "1", "--concurrency", "9"]).unwrap();
        assert_eq!((cli.flags.positional_model.as_deref(), cli.flags.tensor_parallel_size), (Some("m.gguf"), Some(1)));
        assert_eq!((cli.concurrency, cli.url), (Some(9), None));
        assert!(parsed(&["--url", "http://h:1", "--api-key", "k"]).is_ok());
        for (args, named) in [
            (&["--url", "http://h:1", "m.gguf"][..], "MODEL"),
            (&["--url", "http://h:1", "--max-num-seqs", "3"], "--max-num-seqs"),
            (&["--concurrency", "0"], "--concurrency"),
        ] {
            let refused = parsed(args).unwrap_err().to_string();
            assert!(refused.contains(named), "{refused}");
        }
        assert!(Served::of(Some("h:1".to_owned()), Flags::default()).is_err());
    }

    #[test]
    fn seats_are_filled() {
        let seats = Flags { max_num_seqs: Some(16), replicas: Some(2), ..Flags::default() };
        let served = Served::of(None, seats).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(served.concurrency(), 36);
        let few = Flags { max_num_seqs: Some(16), max_num_queued_reqs: Some(1), ..Flags::default() };
        let served = Served::of(None, few).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(served.concurrency(), 17, "never more than are taken");
    }
}
