//! The folder of an embedded store.

use std::{io, path::Path, process::Command};

use anyhow::{Result, ensure};

/// Gone when dropped.
pub struct StateDir {
    folder: tempfile::TempDir,
    is_mounted: bool,
}

impl StateDir {
    /// A new one; on a file system of its own of 64 KiB if that is wanted.
    pub fn new(tiny_disk: bool) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let mut state = Self { folder, is_mounted: false };
        if tiny_disk {
            let outcome = Command::new("mount")
                .args(["-t", "tmpfs", "-o", "size=64k", "phalanx-faultlab"])
                .arg(state.path())
                .output()?;
            ensure!(outcome.status.success(), "no tmpfs: {}", String::from_utf8_lossy(&outcome.stderr));
            state.is_mounted = true;
        }
        Ok(state)
    }

    /// Where.
    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    fn unmount(&self) -> io::Result<()> {
        // Lazily: a process may have its files open until it is waited for.
        Command::new("umount").arg("-l").arg(self.path()).output().map(drop)
    }
}

impl Drop for StateDir {
    fn drop(&mut self) {
        if self.is_mounted
            && let Err(error) = self.unmount()
        {
            eprintln!("{} stays mounted: {error}", self.path().display());
        }
    }
}
