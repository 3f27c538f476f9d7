//! Command line, environment and file, one before the other.

use std::{
    ffi::{OsStr, OsString},
    fmt,
};

use clap::{CommandFactory, Parser};
use figment::{
    Figment,
    providers::{Format, Serialized, Toml},
};

use super::{ConfigError, Flags, wrong};

/// Variables that other parts of the program read.
const OTHER_VARIABLES: &[&str] =
    &["PHALANX_COORDINATOR", "PHALANX_CACHE", "PHALANX_PYPI_INDEX", "PHALANX_ETCD_USER", "PHALANX_ETCD_PASSWORD"];

impl Flags {
    /// The command line.
    pub fn spec() -> clap::Command {
        Self::command()
    }

    /// Of a command line (program name first), this process's environment, and the file that they name.
    pub fn gather(args: impl IntoIterator<Item = OsString>) -> Result<Self, ConfigError> {
        Self::try_parse_from(Self::expand(args))?.settle()
    }

    /// A command line as clap can read it.
    pub fn expand(args: impl IntoIterator<Item = OsString>) -> impl Iterator<Item = OsString> {
        // vLLM's short form; clap knows short options of one letter only.
        args.into_iter().map(|a| if a == OsStr::new("-tp") { "--tensor-parallel-size".into() } else { a })
    }

    /// What was parsed, with the file that it names.
    pub fn settle(self) -> Result<Self, ConfigError> {
        let mut typed = self;
        check_variables(std::env::vars_os().filter_map(|(name, _)| name.into_string().ok()))?;
        typed.model = typed.positional_model.take().or(typed.model);
        if typed.no_enable_prefix_caching {
            typed.enable_prefix_caching = Some(false);
        }
        let mut figment = Figment::new();
        if let Some(file) = &typed.config {
            // figment takes a missing file for an empty one.
            if let Err(error) = std::fs::metadata(file) {
                return Err(wrong("config", file.display(), error.to_string()));
            }
            figment = figment.merge(Toml::file_exact(file));
        }
        let merged: Self = figment
            .merge(Serialized::defaults(&typed))
            .extract()
            .map_err(|error| ConfigError::Merge(Box::new(error)))?;
        Ok(Self { config: typed.config, print_config: typed.print_config, ..merged })
    }

    /// As a TOML file that gives the same options.
    pub fn to_toml(&self) -> String {
        use fmt::Write as _;
        let value = serde_json::to_value(self).unwrap_or_default();
        let mut text = String::new();
        for (key, value) in value.as_object().into_iter().flatten() {
            // Numbers, booleans, strings and lists of strings are written alike in JSON and TOML.
            let _infallible = writeln!(text, "{key} = {value}");
        }
        text
    }
}

/// Refuses variables that begin like ours and are no option: a typing error would go unnoticed.
pub(super) fn check_variables(names: impl Iterator<Item = String>) -> Result<(), ConfigError> {
    let command = Flags::command();
    let known: Vec<String> =
        command.get_arguments().filter_map(|a| a.get_env()).map(|e| e.to_string_lossy().into_owned()).collect();
    for name in names.filter(|n| n.starts_with("PHALANX_")) {
        if known.contains(&name) || OTHER_VARIABLES.contains(&name.as_str()) {
            continue;
        }
        let similar = known.iter().find(|k| k.starts_with(&name) || name.starts_with(k.as_str()));
        let hint = similar.map_or("; --help lists them".to_owned(), |s| format!("; perhaps {s}?"));
        return Err(ConfigError::UnknownVariable { name, hint });
    }
    Ok(())
}
