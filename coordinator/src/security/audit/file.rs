//! A file that lines are added to, with those that are full kept under numbers: `FILE.1` is the youngest.

use std::{
    fs::{self, File},
    io::{self, ErrorKind, Read, Seek, SeekFrom, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

/// See the module.
pub(super) struct RotatingFile {
    path: PathBuf,
    max_bytes: u64,
    keep: u32,
    open: Option<Open>,
}

struct Open {
    file: File,
    /// Bytes of whole lines.
    size: u64,
    /// Device and inode.
    identity: (u64, u64),
    /// A device or a pipe has no size, and is not renamed.
    is_regular: bool,
}

impl RotatingFile {
    pub(super) fn open(path: PathBuf, max_bytes: u64, keep: u32) -> io::Result<Self> {
        let open = Some(Open::new(&path)?);
        Ok(Self { path, max_bytes, keep, open })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The next line goes to the file that has the name then.
    pub(super) fn forget(&mut self) {
        self.open = None;
    }

    /// Adds whole lines, all of them or none.
    pub(super) fn append(&mut self, text: &[u8]) -> io::Result<()> {
        if text.is_empty() {
            return Ok(());
        }
        // Somebody may have moved it away.
        let is_there = |open: &Open| fs::metadata(&self.path).is_ok_and(|m| (m.dev(), m.ino()) == open.identity);
        if !self.open.as_ref().is_some_and(is_there) {
            self.open = Some(Open::new(&self.path)?);
        }
        let is_full = |open: &Open| {
            open.is_regular && open.size > 0 && open.size.saturating_add(text.len() as u64) > self.max_bytes
        };
        if self.open.as_ref().is_some_and(is_full) {
            self.rotate()?;
        }
        let Some(open) = &mut self.open else { return Err(io::Error::other("it is not open")) };
        match open.file.write_all(text) {
            Ok(()) => {
                open.size += text.len() as u64;
                Ok(())
            }
            Err(error) => {
                if open.is_regular {
                    // Half a line would spoil the next one.
                    open.file.set_len(open.size)?;
                }
                Err(error)
            }
        }
    }

    fn numbered(&self, number: u32) -> PathBuf {
        let mut name = self.path.as_os_str().to_owned();
        name.push(format!(".{number}"));
        name.into()
    }

    fn rotate(&mut self) -> io::Result<()> {
        let moved = |from: &Path, to: &Path| match fs::rename(from, to) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        };
        for number in (1..self.keep).rev() {
            moved(&self.numbered(number), &self.numbered(number + 1))?;
        }
        moved(&self.path, &self.numbered(1))?;
        self.open = None;
        self.open = Some(Open::new(&self.path)?);
        Ok(())
    }
}

impl Open {
    fn new(path: &Path) -> io::Result<Self> {
        let mut file = File::options().read(true).append(true).create(true).mode(0o600).open(path)?;
        let metadata = file.metadata()?;
        let (is_regular, mut size) = (metadata.is_file(), metadata.len());
        if is_regular && size > 0 {
            // A process that was killed may have left half a line.
            let mut last = [0];
            file.seek(SeekFrom::End(-1))?;
            file.read_exact(&mut last)?;
            if last != *b"\n" {
                file.write_all(b"\n")?;
                size += 1;
            }
        }
        Ok(Self { file, size, identity: (metadata.dev(), metadata.ino()), is_regular })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(path: &Path) -> String {
        fs::read_to_string(path).unwrap_or_default()
    }

    #[test]
    fn full_files_are_kept_up_to_a_number() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("audit");
        let mut file = RotatingFile::open(path.clone(), 10, 2).unwrap();
        for line in ["one\n", "two\n", "three\n", "four\n", "a line that is longer than a file\n", "six\n"] {
            file.append(line.as_bytes()).unwrap();
        }
        assert_eq!(text(&path), "six\n");
        assert_eq!(text(&file.numbered(1)), "a line that is longer than a file\n");
        assert_eq!(text(&file.numbered(2)), "four\n");
        assert!(!file.numbered(3).exists());
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
    }

    #[test]
    fn a_file_that_was_moved_away_is_begun_anew() {
        let dir = tempfile::tempdir().unwrap();
        let (path, moved) = (dir.path().join("audit"), dir.path().join("moved"));
        fs::write(&path, "half a li").unwrap();
        let mut file = RotatingFile::open(path.clone(), 1 << 20, 2).unwrap();
        file.append(b"one\n").unwrap();
        fs::rename(&path, &moved).unwrap();
        file.append(b"two\n").unwrap();
        fs::remove_file(&path).unwrap();
        file.append(b"three\n").unwrap();
        assert_eq!((text(&moved).as_str(), text(&path).as_str()), ("half a li\none\n", "three\n"));
    }

    #[test]
    fn a_full_disk_is_an_error() {
        let mut file = RotatingFile::open("/dev/full".into(), 10, 2).unwrap();
        let error = file.append(b"a line that is longer than a file\n").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::StorageFull);
    }
}
