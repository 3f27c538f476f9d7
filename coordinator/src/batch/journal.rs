//! The output of a batch, which is its journal too: a line that stands in it, whole, is done.
//!
//! Lines are appended whole, each by one write. Whatever kills the process, at most the last line is torn; it is cut off when
//! the file is opened again, and its request is asked for once more.

use std::{
    collections::BTreeSet,
    fs::{File, OpenOptions, TryLockError},
    io::{self, BufRead, BufReader, Write},
    path::{Path, PathBuf},
};

use super::outcome::{DoneLine, Which, parse_done};

/// An output that can be gone on with.
#[derive(Debug)]
pub struct Journal {
    file: File,
    path: PathBuf,
}

/// What an output says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Done {
    /// Lines that are done.
    pub lines: BTreeSet<Which>,
    /// Those of them that have what they asked for.
    pub n_good: usize,
}

impl Done {
    /// Of several outputs of one batch.
    #[must_use]
    pub fn and(mut self, mut other: Self) -> Self {
        self.lines.append(&mut other.lines);
        self.n_good += other.n_good;
        self
    }

    /// Those that have not.
    pub fn n_failed(&self) -> usize {
        self.lines.len().saturating_sub(self.n_good)
    }
}

/// Why an output can't be gone on with.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// The file can't be used.
    #[error("{path}: can't {action}: {source}", path = path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// It holds something else.
    #[error("{path}, line {line}: is no result of a batch: give the output of an earlier run, or a new file", path = path.display())]
    Foreign {
        /// Which.
        path: PathBuf,
        /// Where.
        line: usize,
    },
    /// Another process writes to it.
    #[error("{path}: another run writes to it: wait for its end, or give another file", path = path.display())]
    Busy {
        /// Which.
        path: PathBuf,
    },
}

impl Journal {
    /// Opens an output, a new one or that of an earlier run, which is read through. Nobody else can open it meanwhile.
    ///
    /// # Errors
    /// If the file can't be used, or holds something else.
    pub fn open(path: &Path) -> Result<(Self, Done), JournalError> {
        let wrong = |action| {
            let path = path.to_owned();
            move |source| JournalError::File { path, action, source }
        };
        let file = OpenOptions::new().read(true).append(true).create(true).open(path).map_err(wrong("open"))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(JournalError::Busy { path: path.to_owned() }),
            Err(TryLockError::Error(error)) => return Err(wrong("lock")(error)),
        }
        let (done, whole_bytes) = read(&file).map_err(|error| match error {
            Unreadable::File(error) => wrong("read")(error),
            Unreadable::Line(line) => JournalError::Foreign { path: path.to_owned(), line },
        })?;
        if file.metadata().map_err(wrong("read"))?.len() > whole_bytes {
            file.set_len(whole_bytes).map_err(wrong("cut off the torn last line"))?;
        }
        Ok((Self { file, path: path.to_owned() }, done))
    }

    /// Adds a line. It is there, whole, whatever becomes of this process.
    ///
    /// # Errors
    /// If it can't be written. What was written of it is cut off.
    pub fn append(&mut self, mut line: Vec<u8>) -> Result<(), JournalError> {
        line.push(b'\n');
        let wrong = |action, source| JournalError::File { path: self.path.clone(), action, source };
        let before = self.file.metadata().map_err(|error| wrong("read", error))?.len();
        (&self.file).write_all(&line).map_err(|error| {
            // If this fails too, it is cut off when the file is opened again.
            let _torn = self.file.set_len(before);
            wrong("write", error)
        })
    }

    /// Waits until the disk has it all.
    ///
    /// # Errors
    /// If that can't be had.
    pub fn sync(&self) -> Result<(), JournalError> {
        let wrong = |source| JournalError::File { path: self.path.clone(), action: "write to the disk", source };
        self.file.sync_all().map_err(wrong)
    }
}

enum Unreadable {
    File(io::Error),
    Line(usize),
}

/// What is done, and up to where whole lines go.
fn read(file: &File) -> Result<(Done, u64), Unreadable> {
    let mut reader = BufReader::new(file);
    let (mut done, mut whole_bytes) = (Done::default(), 0);
    let mut text = Vec::new();
    for number in 1.. {
        text.clear();
        let n_bytes = reader.read_until(b'\n', &mut text).map_err(Unreadable::File)?;
        if text.last() != Some(&b'\n') {
            break;
        }
        text.pop();
        match parse_done(&text) {
            Some(DoneLine { of, is_good }) => {
                if done.lines.insert(of) {
                    done.n_good += usize::from(is_good);
                }
            }
            // After a power cut the last line may be as long as it should be, but not what it should be.
            None if number > 1 && reader.fill_buf().map_err(Unreadable::File)?.is_empty() => break,
            None => return Err(Unreadable::Line(number)),
        }
        whole_bytes += n_bytes as u64;
    }
    Ok((done, whole_bytes))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use serde_json::json;

    use super::*;
    use crate::batch::outcome::Outcome;

    fn answered(status: u16) -> Outcome {
        Outcome::Answered { status, request_id: "r".to_owned(), body: json!({}) }
    }

    fn named(name: &str) -> Which {
        Which::Named(name.to_owned())
    }

    #[test]
    fn what_is_whole_is_done_and_what_is_torn_is_cut_off() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out.jsonl");
        let (mut journal, done) = Journal::open(&path).unwrap();
        assert_eq!(done, Done::default());
        journal.append(answered(200).to_line(Some("a"))).unwrap();
        journal.append(answered(400).to_line(Some("b"))).unwrap();
        journal.sync().unwrap();
        drop(journal);
        let whole = fs::read(&path).unwrap();
        // Torn at every place of a third line.
        let third = [answered(200).to_line(Some("c")), b"\n".to_vec()].concat();
        for cut in 0..third.len() {
            fs::write(&path, [&whole[..], &third[..cut]].concat()).unwrap();
            let (_journal, done) = Journal::open(&path).unwrap();
            assert_eq!((done.lines.len(), done.n_good, done.n_failed()), (2, 1, 1), "torn at {cut}");
            assert!(done.lines.contains(&named("a")) && done.lines.contains(&named("b")));
            assert_eq!(fs::read(&path).unwrap(), whole);
        }
        fs::write(&path, [&whole[..], &third[..]].concat()).unwrap();
        assert_eq!(Journal::open(&path).unwrap().1.lines.len(), 3);
    }

    #[test]
    fn zeros_at_the_end_are_torn_and_foreign_texts_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out.jsonl");
        let line = [answered(200).to_line(Some("a")), b"\n".to_vec()].concat();
        fs::write(&path, [&line[..], &[0, 0, 0, b'\n']].concat()).unwrap();
        assert_eq!(Journal::open(&path).unwrap().1.lines.len(), 1);
        assert_eq!(fs::read(&path).unwrap(), line);
        fs::write(&path, "my diary\n").unwrap();
        assert!(matches!(Journal::open(&path), Err(JournalError::Foreign { line: 1, .. })));
        assert_eq!(fs::read(&path).unwrap(), b"my diary\n", "it is left as it was");
    }

    #[test]
    fn two_runs_can_t_write_to_the_same_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out.jsonl");
        let (first, _) = Journal::open(&path).unwrap();
        assert!(matches!(Journal::open(&path), Err(JournalError::Busy { .. })));
        drop(first);
        assert!(Journal::open(&path).is_ok());
    }
}
