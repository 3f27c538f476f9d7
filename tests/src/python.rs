//! Python packages from the package index, in virtual environments beside the build.

use std::{fs, path::PathBuf, process::Command};

use crate::process::repository;

/// The programs of a virtual environment with the packages of `tests/REQUIREMENTS`; made once per machine.
///
/// # Panics
/// If it can't be made.
pub fn environment(name: &str, requirements: &str) -> PathBuf {
    let requirements = repository().join("tests").join(requirements);
    let target = std::env::current_exe().expect("the test has a path");
    let target = target.ancestors().nth(3).expect("tests lie in target/PROFILE/deps");
    let folder = target.join(name);
    let marker = folder.join("complete");
    // Which packages are in it: others are wanted when the list changes.
    let wanted = fs::read_to_string(&requirements).expect("the list of packages is readable");
    if fs::read_to_string(&marker).ok() != Some(wanted.clone()) {
        let _ = fs::remove_dir_all(&folder);
        run(Command::new("python3").args(["-m", "venv"]).arg(&folder));
        let pip = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r"];
        run(Command::new(folder.join("bin/python")).args(pip).arg(&requirements));
        fs::write(&marker, wanted).expect("the environment is writable");
    }
    folder.join("bin")
}

/// Runs a command; what it says.
///
/// # Panics
/// If it fails, with what it says about that.
pub fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}: install Python 3 with venv and pip"));
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {}\n{said}{error}", output.status);
    said
}
