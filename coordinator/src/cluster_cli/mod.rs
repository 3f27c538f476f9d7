//! The `cluster` program: what operators ask a coordinator, and what they tell it to do.
//!
//! Each command is a file and a line in `COMMANDS`. A command is one call, or one stream of answers, of the services
//! `Cluster` and `Admin`; `connect` finds the coordinator that leads.

mod connect;
mod drain;
mod plan;
mod rollout;
mod status;
mod step_down;
#[cfg(test)]
mod tests;
mod text;

use std::{
    ffi::{OsStr, OsString},
    io::{self, Write},
    path::PathBuf,
    pin::Pin,
    process::ExitCode,
};

use clap::{Arg, ArgMatches, error::ErrorKind};
use phalanx_cluster::{error_text::with_causes, manual, tls::ClusterTls};
use phalanx_proto::dial::Dialer;

use self::connect::{CallError, Coordinators, DEFAULT_COORDINATOR};

/// The program's name, and the first argument under which the coordinator's program is it.
pub const CLUSTER: &str = "cluster";

const COORDINATOR: &str = "coordinator";
const API_KEY: &str = "api-key";
const CLUSTER_CA: &str = "cluster-ca";
const CLUSTER_CERT: &str = "cluster-cert";
const CLUSTER_KEY: &str = "cluster-key";

/// One command.
struct Command {
    /// Its name, help and options.
    spec: fn() -> clap::Command,
    /// Runs it; what it has to say goes to stdout.
    run: fn(ArgMatches, Coordinators) -> Running,
}

type Running = Pin<Box<dyn Future<Output = Result<(), CliError>>>>;

static COMMANDS: &[&Command] =
    &[&status::STATUS, &drain::DRAIN, &drain::UNDRAIN, &rollout::ROLLOUT, &plan::PLAN, &step_down::STEP_DOWN];

/// Why a command did not work.
#[derive(Debug, thiserror::Error)]
enum CliError {
    /// The options, or help was asked for.
    #[error(transparent)]
    Options(#[from] clap::Error),
    /// No coordinator, or it refused.
    #[error(transparent)]
    Call(#[from] CallError),
    /// Nobody reads what we say.
    #[error("stdout: {0}")]
    Output(#[from] io::Error),
    /// A rollout ended early.
    #[error("the rollout has ended before all shards were restarted: {0}")]
    Rollout(String),
}

impl CliError {
    /// Exit codes: 2 for wrong options, 1 for all else that did not work.
    fn report(&self) -> ExitCode {
        match self {
            Self::Options(error) => {
                // Nothing can be done where the terminal is gone.
                let _gone = error.print();
                ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2))
            }
            // `cluster status --watch | head` is no failure worth a message.
            Self::Output(error) if error.kind() == io::ErrorKind::BrokenPipe => ExitCode::FAILURE,
            error => {
                eprintln!("{CLUSTER}: {error}");
                ExitCode::FAILURE
            }
        }
    }
}

/// Whether an argument names a command: then `coordinator COMMAND …` means `cluster COMMAND …`.
pub fn is_command(argument: &OsStr) -> bool {
    COMMANDS.iter().any(|command| argument == (command.spec)().get_name())
}

/// Runs the program. `args` begins with its name.
///
/// Exit codes: 0 if the command worked; 2 for wrong options; 1 for everything else.
pub fn main_from(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let args: Vec<OsString> = args.into_iter().collect();
    if args.get(1).is_some_and(|word| manual::is_command(word)) {
        return manual::main_from(spec(), args);
    }
    let matches = match own_spec().try_get_matches_from(args) {
        Ok(matches) => matches,
        Err(error) => return CliError::from(error).report(),
    };
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("{CLUSTER}: no asynchronous runtime: {error}");
            return ExitCode::FAILURE;
        }
    };
    match runtime.block_on(run(matches)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => error.report(),
    }
}

async fn run(mut matches: ArgMatches) -> Result<(), CliError> {
    let urls: Vec<connect::Url> = matches.remove_many(COORDINATOR).map(Iterator::collect).unwrap_or_default();
    let bearer = match matches.remove_one::<String>(API_KEY) {
        Some(key) => connect::Bearer::new(&key).ok_or_else(|| {
            let reason = format!("--{API_KEY}: want visible ASCII characters\n");
            clap::Error::raw(ErrorKind::ValueValidation, reason)
        })?,
        None => connect::Bearer::default(),
    };
    let coordinators = Coordinators::new(urls.clone(), dialer(&mut matches, &urls)?, bearer);
    let (name, options) = matches.remove_subcommand().expect("clap asks for a command");
    let command = COMMANDS.iter().find(|c| (c.spec)().get_name() == name).expect("clap knows these commands only");
    (command.run)(options, coordinators).await
}

/// How coordinators are dialled.
fn dialer(matches: &mut ArgMatches, urls: &[connect::Url]) -> Result<Dialer, CliError> {
    let wrong = |reason: String| clap::Error::raw(ErrorKind::ValueValidation, format!("{reason}\n"));
    let mut file = |name| matches.remove_one::<PathBuf>(name);
    let (ca, certificate, key) = (file(CLUSTER_CA), file(CLUSTER_CERT), file(CLUSTER_KEY));
    match ClusterTls::read(ca, certificate, key).map_err(|e| wrong(e.to_string()))? {
        Some(tls) => Ok(Dialer::with_certificates(&tls.ca, &tls.certificate, &tls.key)
            .map_err(|e| wrong(tls.unusable(with_causes(&e)).to_string()))?),
        None => match urls.iter().find(|url| url.wants_tls()) {
            Some(url) => {
                Err(wrong(format!("--{COORDINATOR} {url}: needs --{CLUSTER_CA}, --{CLUSTER_CERT} and --{CLUSTER_KEY}"))
                    .into())
            }
            None => Ok(Dialer::default()),
        },
    }
}

fn file_option(name: &'static str, variable: &'static str, help: &'static str) -> Arg {
    let arg = Arg::new(name).long(name).global(true).env(variable).value_name("FILE");
    arg.value_parser(clap::value_parser!(PathBuf)).help(help)
}

/// The program's command line.
pub fn spec() -> clap::Command {
    manual::with_commands(own_spec())
}

/// Its commands, each with the options that all of them have.
pub fn commands() -> Vec<clap::Command> {
    let whole = own_spec();
    let shared: Vec<Arg> = whole.get_arguments().cloned().collect();
    whole.get_subcommands().map(|command| command.clone().args(&shared)).collect()
}

fn own_spec() -> clap::Command {
    clap::Command::new(CLUSTER)
        .version(env!("CARGO_PKG_VERSION"))
        .about("Shows and changes a running cluster: members and ranks, draining, rolling restarts")
        .after_help(
            "The exit status is 0 only if the command worked. `coordinator cluster …` is the same program.\n\
             docs/operations.md says when to use what, and describes the JSON that --json prints.",
        )
        .subcommand_required(true)
        .arg_required_else_help(true)
        .arg(
            Arg::new(COORDINATOR)
                .long(COORDINATOR)
                .global(true)
                .env("PHALANX_COORDINATOR")
                .value_name("URL[,URL]")
                .value_delimiter(',')
                .default_value(DEFAULT_COORDINATOR)
                .value_parser(connect::Url::parse)
                .help("gRPC addresses of coordinators, as http://HOST:PORT; the first that answers is asked"),
        )
        .arg(
            Arg::new(API_KEY)
                .long(API_KEY)
                .global(true)
                .env("PHALANX_API_KEY")
                .hide_env_values(true)
                .value_name("KEY")
                .help("Key of an admin, where coordinators need one and are shown no certificate"),
        )
        .arg(file_option(
            CLUSTER_CA,
            "PHALANX_CLUSTER_CA",
            "PEM file with the authority of the cluster's certificates: speak TLS [default: plain text]",
        ))
        .arg(file_option(
            CLUSTER_CERT,
            "PHALANX_CLUSTER_CERT",
            "PEM file with the certificate that coordinators are shown",
        ))
        .arg(file_option(CLUSTER_KEY, "PHALANX_CLUSTER_KEY", "PEM file with that certificate's key"))
        .subcommands(COMMANDS.iter().map(|command| (command.spec)()))
}

/// Prints a line, or several.
fn say(text: &str) -> Result<(), CliError> {
    let mut out = io::stdout().lock();
    writeln!(out, "{text}")?;
    out.flush()?;
    Ok(())
}

/// Prints a value as JSON over several lines.
fn say_json(value: &impl serde::Serialize) -> Result<(), CliError> {
    say(&serde_json::to_string_pretty(value).expect("plain structures become JSON"))
}
