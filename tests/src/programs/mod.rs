//! Other people's servers with what `deploy/` has for them.

pub mod nginx;
pub mod prometheus;

use std::fs;

use anyhow::{Context, Result, ensure};

use crate::process::repository;

/// A file of `deploy/` in which other addresses and paths stand. Each must be there, so that what runs is what is deployed.
pub fn deployed(path: &str, changes: &[(&str, String)]) -> Result<String> {
    let path = repository().join("deploy").join(path);
    let mut text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    for (from, to) in changes {
        ensure!(text.contains(from), "{} does not have {from:?}", path.display());
        text = text.replace(from, to);
    }
    Ok(text)
}

/// `HOST:PORT` of a URL.
pub fn address(url: &str) -> String {
    url.split_once("://").map_or(url, |(_, address)| address).trim_end_matches('/').to_owned()
}
