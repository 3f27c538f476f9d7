//! Programs of the system that rows need.

use std::{path::PathBuf, process::Command, sync::Mutex};

use anyhow::{Result, bail, ensure};

/// One installation at a time.
static INSTALLING: Mutex<()> = Mutex::new(());

/// Where a program lies.
pub fn find(program: &str) -> Option<PathBuf> {
    let paths = std::env::var_os("PATH").unwrap_or_default();
    // A user's PATH may lack where administrators' programs lie.
    let more = ["/usr/sbin", "/sbin"].map(PathBuf::from);
    std::env::split_paths(&paths).chain(more).map(|p| p.join(program)).find(|p| p.is_file())
}

/// Where a program lies; installs Debian's package if there is none and this is root.
pub fn installed(program: &str, package: &str) -> Result<PathBuf> {
    let _one = INSTALLING.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    if let Some(path) = find(program) {
        return Ok(path);
    }
    let advice = format!("{program} is missing: `apt-get install {package}`, or put it in PATH");
    ensure!(rustix::process::geteuid().is_root(), "{advice}");
    let apt = |args: &[&str]| {
        Command::new("apt-get")
            .args(["-o", "DPkg::Lock::Timeout=300", "-y", "--no-install-recommends"])
            .args(args)
            .env("DEBIAN_FRONTEND", "noninteractive")
            // A package would start a server of its own.
            .env("RUNLEVEL", "1")
            .output()
    };
    if !apt(&["install", package]).is_ok_and(|o| o.status.success()) {
        let _ = apt(&["update"]);
        let outcome = apt(&["install", package])?;
        if !outcome.status.success() {
            bail!("{advice}; apt-get said: {}", String::from_utf8_lossy(&outcome.stderr));
        }
    }
    find(program).ok_or_else(|| anyhow::anyhow!(advice))
}
