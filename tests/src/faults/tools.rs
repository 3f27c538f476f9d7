//! Programs of the system that rows and tests need.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
    sync::Mutex,
};

use anyhow::{Context, Result, bail, ensure};

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
    if !apt(&["install", package], &[])?.status.success() {
        let _ = apt(&["update"], &[]);
        let outcome = apt(&["install", package], &[])?;
        if !outcome.status.success() {
            bail!("{advice}; apt-get said: {}", String::from_utf8_lossy(&outcome.stderr));
        }
    }
    find(program).ok_or_else(|| anyhow::anyhow!(advice))
}

/// Where a server lies that Debian's package would start and give a port: the package is unpacked beside the build, by any
/// user. It is installed only where libraries are missing and this is root.
pub fn unpacked(program: &str, package: &str) -> Result<PathBuf> {
    if let Some(path) = find(program) {
        return Ok(path);
    }
    let outcome = {
        let _one = INSTALLING.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        unpack(&beside_the_build().join("debian"), program, package)
    };
    outcome.or_else(|unpacking| installed(program, package).with_context(|| format!("{unpacking:#}")))
}

/// The folder of cargo's outputs.
fn beside_the_build() -> PathBuf {
    let test = std::env::current_exe().unwrap_or_default();
    // Tests lie in target/PROFILE/deps.
    test.ancestors().nth(3).map_or_else(std::env::temp_dir, Path::to_owned)
}

/// Fetches a package into a folder and unpacks it there, once.
fn unpack(folder: &Path, program: &str, package: &str) -> Result<PathBuf> {
    let root = folder.join(package);
    if !root.is_dir() {
        fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
        let dir = tempfile::tempdir_in(folder)?;
        let deb = fetch(folder, dir.path(), package)?;
        let tree = dir.path().join("tree");
        let outcome = Command::new("dpkg-deb").arg("-x").args([&deb, &tree]).output().context("dpkg-deb")?;
        ensure!(outcome.status.success(), "{package}: {}", String::from_utf8_lossy(&outcome.stderr));
        // Whole or not at all, whatever ends this process.
        fs::rename(&tree, &root).with_context(|| root.display().to_string())?;
    }
    let places = ["usr/bin", "usr/sbin", "bin", "sbin"].map(|place| root.join(place).join(program));
    let path = places.into_iter().find(|p| p.is_file()).with_context(|| format!("{package} has no {program}"))?;
    let libraries = Command::new("ldd").arg(&path).output().context("ldd")?;
    let libraries = String::from_utf8_lossy(&libraries.stdout).into_owned();
    let missing: Vec<_> = libraries.lines().filter(|line| line.contains("not found")).map(str::trim).collect();
    ensure!(missing.is_empty(), "{program} lacks libraries: {missing:?}");
    Ok(path)
}

/// Downloads a package; its file.
fn fetch(folder: &Path, into: &Path, package: &str) -> Result<PathBuf> {
    let download = |options: &[String]| -> Result<Output> {
        let command = Command::new("apt-get").args(options).args(["download", package]).current_dir(into).output();
        command.context("apt-get")
    };
    let mut outcome = download(&[])?;
    if !outcome.status.success() {
        // The system's lists are empty or old, and only root may renew those.
        let lists = folder.join("apt");
        for needed in ["lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(lists.join(needed)).with_context(|| lists.display().to_string())?;
        }
        let option = |name: &str, path: &str| ["-o".to_owned(), format!("{name}={}", lists.join(path).display())];
        let own = [option("Dir::State::lists", "lists"), option("Dir::Cache", "cache")].concat();
        let _ = apt(&["update"], &own);
        outcome = download(&own)?;
    }
    ensure!(outcome.status.success(), "{package} can't be fetched: {}", String::from_utf8_lossy(&outcome.stderr));
    let mut files = fs::read_dir(into)?.flatten().map(|entry| entry.path());
    files.find(|p| p.extension().is_some_and(|e| e == "deb")).with_context(|| format!("apt-get left no {package}"))
}

fn apt(command: &[&str], options: &[String]) -> Result<Output> {
    let apt = Command::new("apt-get")
        .args(["-o", "DPkg::Lock::Timeout=300", "-y", "--no-install-recommends"])
        .args(options)
        .args(command)
        .env("DEBIAN_FRONTEND", "noninteractive")
        // A package would start a server of its own.
        .env("RUNLEVEL", "1")
        .output();
    apt.context("apt-get")
}
