//! `coordinator key add|list|revoke`: the file that `--api-keys` reads.

use std::{ffi::OsString, io::IsTerminal, path::PathBuf, process::ExitCode};

use clap::{Args, CommandFactory, Parser, Subcommand};
use comfy_table::{Table, presets};
use jiff::{Timestamp, civil::Date, tz::TimeZone};

use super::{
    key_file::{KeyFile, KeyFileError, StoredKey},
    keys::{KeyHash, Role, new_key},
};

#[derive(Debug, Parser)]
#[command(
    name = "coordinator key",
    version,
    about = "Makes, lists and revokes API keys in a file. Coordinators that were started with --api-keys FILE follow its \
             changes within a second."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Makes a key and prints it: this once, for the file holds its hash only
    Add(Add),
    /// Shows whose keys there are, and what they may do
    List {
        /// File of keys
        #[arg(long, value_name = "FILE")]
        file: PathBuf,
    },
    /// Takes a key out of force: requests that run under it end, new ones are refused
    Revoke {
        /// File of keys
        #[arg(long, value_name = "FILE")]
        file: PathBuf,
        /// Whose key
        #[arg(long, value_name = "NAME")]
        name: String,
    },
}

#[derive(Debug, Args)]
struct Add {
    /// File of keys; made if it is not there
    #[arg(long, value_name = "FILE")]
    file: PathBuf,
    /// Whose key: 1 to 64 letters, digits and -_.@, in the audit log and in answers to admins
    #[arg(long, value_name = "NAME")]
    name: String,
    /// Most requests in a minute [default: any number]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    rpm: Option<u64>,
    /// Most tokens in a minute, of prompts and outputs [default: any number]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    tpm: Option<u64>,
    /// Most requests that run at the same time [default: any number]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    concurrency: Option<u32>,
    /// Most tokens of a prompt [default: what the model takes]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    max_prompt_tokens: Option<u32>,
    /// Most tokens of an answer [default: what the model takes]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    max_output_tokens: Option<u32>,
    /// Until when it is in force: a day (2027-03-31, whose end in UTC counts), or a moment (2027-03-31T12:00:00Z)
    /// [default: until it is revoked]
    #[arg(long, value_name = "DATE", value_parser = parse_end)]
    expires: Option<Timestamp>,
    /// What it may do: everything but administrate, or everything
    #[arg(long, value_name = "ROLE", default_value = "user")]
    role: Role,
}

/// When a key expires that is good until `text`.
fn parse_end(text: &str) -> Result<Timestamp, String> {
    if let Ok(moment) = text.parse::<Timestamp>() {
        return Ok(moment);
    }
    let wrong = |_| format!("{text:?} is neither a day such as 2027-03-31 nor a moment such as 2027-03-31T12:00:00Z");
    let day: Date = text.parse().map_err(wrong)?;
    let end = day.tomorrow().and_then(|next| next.to_zoned_datetime(TimeZone::UTC));
    end.map(|end| end.timestamp()).map_err(wrong)
}

/// The command line.
pub fn spec() -> clap::Command {
    Cli::command()
}

/// Runs the command; `args` begins with the program's name.
///
/// Exit codes: 0 if it worked, 2 for wrong options, 1 for everything else.
pub fn main_from(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let command = match Cli::try_parse_from(args) {
        Ok(cli) => cli.command,
        Err(error) => {
            // Nothing can be done where the terminal is gone.
            let _gone = error.print();
            return ExitCode::from(u8::from(error.use_stderr()) * 2);
        }
    };
    let done = match command {
        Command::Add(add) => add.run(Timestamp::now()),
        Command::List { file } => list(&file, Timestamp::now()),
        Command::Revoke { file, name } => {
            KeyFile::change(&file, |keys| keys.revoke(&name, Timestamp::now())).map(|()| format!("{name} is revoked"))
        }
    };
    match done {
        Ok(said) => {
            println!("{said}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("coordinator key: {error}");
            ExitCode::FAILURE
        }
    }
}

impl Add {
    /// The key.
    fn run(self, now: Timestamp) -> Result<String, KeyFileError> {
        if self.expires.is_some_and(|end| end <= now) {
            return Err(KeyFileError::Change("--expires lies in the past".to_owned()));
        }
        let key = new_key().map_err(|e| KeyFileError::Change(format!("the system gives no random bytes: {e}")))?;
        let stored = StoredKey {
            name: self.name,
            sha256: KeyHash::of(&key).to_string(),
            role: self.role,
            rpm: self.rpm,
            tpm: self.tpm,
            concurrency: self.concurrency,
            max_prompt_tokens: self.max_prompt_tokens,
            max_output_tokens: self.max_output_tokens,
            created: Some(Timestamp::from_second(now.as_second()).unwrap_or(now)),
            expires: self.expires,
            revoked: None,
        };
        KeyFile::change(&self.file, |file| file.add(stored))?;
        if std::io::stdout().is_terminal() {
            eprintln!("This key is shown once and kept nowhere:");
        }
        Ok(key)
    }
}

fn list(file: &std::path::Path, now: Timestamp) -> Result<String, KeyFileError> {
    let keys = KeyFile::read(file)?.keys;
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(["NAME", "ROLE", "RPM", "TPM", "CONCURRENCY", "PROMPT", "OUTPUT", "CREATED", "EXPIRES", "STATE"]);
    let number = |n: Option<u64>| n.map_or("-".to_owned(), |n| n.to_string());
    let moment = |t: Option<Timestamp>| t.map_or("-".to_owned(), |t| t.to_string());
    for key in &keys {
        let state = match key {
            StoredKey { revoked: Some(when), .. } => format!("revoked {when}"),
            StoredKey { expires: Some(end), .. } if *end <= now => "expired".to_owned(),
            _ => "in force".to_owned(),
        };
        table.add_row([
            key.name.clone(),
            key.role.as_str().to_owned(),
            number(key.rpm),
            number(key.tpm),
            number(key.concurrency.map(u64::from)),
            number(key.max_prompt_tokens.map(u64::from)),
            number(key.max_output_tokens.map(u64::from)),
            moment(key.created),
            moment(key.expires),
            state,
        ]);
    }
    Ok(table.lines().map(|line| line.trim_end().to_owned()).collect::<Vec<_>>().join("\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn days_end_at_midnight_and_moments_where_they_are() {
        assert_eq!(parse_end("2027-03-31").unwrap().to_string(), "2027-04-01T00:00:00Z");
        assert_eq!(parse_end("2027-03-31T12:00:00Z").unwrap().to_string(), "2027-03-31T12:00:00Z");
        assert_eq!(parse_end("2027-03-31T12:00:00+02:00").unwrap().to_string(), "2027-03-31T10:00:00Z");
        assert!(parse_end("soon").is_err() && parse_end("2027-02-30").is_err());
    }
}
