//! Why options don't do.

use std::fmt;

use clap::error::ErrorKind;
use phalanx_cluster::tls::ClusterTlsError;

use crate::trace::destination::DestinationError;

/// Why the process does not start.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// Help or version was asked for, or the command line or a variable can't be parsed.
    #[error(transparent)]
    CommandLine(#[from] clap::Error),
    /// The file, or a key of it.
    #[error("configuration: {0}")]
    Merge(Box<figment::Error>),
    /// A variable that looks like ours but is none.
    #[error("environment variable {name}: no such option{hint}")]
    UnknownVariable {
        /// Its name.
        name: String,
        /// What may have been meant.
        hint: String,
    },
    /// A collector of traces.
    #[error(transparent)]
    Traces(#[from] DestinationError),
    /// A value, alone or beside another.
    #[error("--{option} {value}: {reason}")]
    Value {
        /// Name of the flag.
        option: &'static str,
        /// As given.
        value: String,
        /// What is wrong, and what would do.
        reason: String,
    },
}

impl From<ClusterTlsError> for ConfigError {
    fn from(ClusterTlsError { option, value, reason }: ClusterTlsError) -> Self {
        Self::Value { option, value, reason }
    }
}

impl ConfigError {
    /// Prints the error, or the help that was asked for. Returns the process's exit code: 0 for help, 2 for errors.
    pub fn report(&self) -> u8 {
        match self {
            Self::CommandLine(error) => {
                // Nothing can be done where the terminal is gone.
                let _gone = error.print();
                if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) { 0 } else { 2 }
            }
            error => {
                eprintln!("coordinator: {error}");
                2
            }
        }
    }
}

/// A value that does not do.
pub(super) fn wrong(option: &'static str, value: impl fmt::Display, reason: impl Into<String>) -> ConfigError {
    ConfigError::Value { option, value: value.to_string(), reason: reason.into() }
}

/// Checks that a number is within limits.
pub(super) fn within(option: &'static str, value: u32, least: u32, most: u32) -> Result<u32, ConfigError> {
    if (least..=most).contains(&value) {
        Ok(value)
    } else {
        Err(wrong(option, value, format!("want {least} to {most}")))
    }
}
