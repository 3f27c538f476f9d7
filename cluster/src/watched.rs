//! Files that count as they are now: read again and again, so that no change is missed whatever the file system says of it.

use std::{io, path::PathBuf, time::Duration};

/// Between looks.
const POLL: Duration = Duration::from_millis(500);

/// Files, and what was in them.
pub struct Watched {
    what: &'static str,
    paths: Vec<PathBuf>,
    contents: Vec<Vec<u8>>,
    /// What was wrong at the last look: said once.
    complaint: Option<String>,
    is_unreadable: bool,
    count: Count,
}

/// Counts a change: of what, and whether it was taken.
pub type Count = fn(&'static str, bool);

impl Watched {
    /// Reads the files. `what` they are is said in the log.
    ///
    /// # Errors
    /// If one can't be read.
    pub fn open(what: &'static str, paths: Vec<PathBuf>) -> io::Result<Self> {
        let contents = read(&paths)?;
        Ok(Self { what, paths, contents, complaint: None, is_unreadable: false, count: |_, _| {} })
    }

    /// Has changes counted too.
    #[must_use]
    pub fn counted(self, count: Count) -> Self {
        Self { count, ..self }
    }

    /// What is in them, in their order.
    pub fn contents(&self) -> &[Vec<u8>] {
        &self.contents
    }

    /// Looks at the files. If they have changed, `take` gets what is in them; if it refuses, what was before stays in force.
    pub fn look(&mut self, take: &mut impl FnMut(&[Vec<u8>]) -> Result<(), String>) {
        let outcome = match read(&self.paths) {
            Ok(contents) if contents == self.contents => {
                // A broken file that is still the same has been spoken of.
                if std::mem::take(&mut self.is_unreadable) {
                    self.complaint = None;
                }
                return;
            }
            Ok(contents) => {
                self.is_unreadable = false;
                let outcome = take(&contents);
                self.contents = contents;
                outcome
            }
            Err(error) => {
                self.is_unreadable = true;
                Err(error.to_string())
            }
        };
        match outcome {
            Ok(()) => {
                tracing::info!(files = ?self.paths, "{} read again", self.what);
                (self.count)(self.what, true);
                self.complaint = None;
            }
            Err(reason) if self.complaint.as_ref() == Some(&reason) => {}
            Err(reason) => {
                tracing::error!(files = ?self.paths, reason, "{} can't be used: those before stay in force", self.what);
                (self.count)(self.what, false);
                self.complaint = Some(reason);
            }
        }
    }

    /// Goes on looking, on a thread of its own: a file system may take its time.
    ///
    /// # Errors
    /// If there is no thread.
    pub fn watch(mut self, mut take: impl FnMut(&[Vec<u8>]) -> Result<(), String> + Send + 'static) -> io::Result<()> {
        let thread = std::thread::Builder::new().name("watched files".to_owned());
        thread.spawn(move || {
            loop {
                std::thread::sleep(POLL);
                self.look(&mut take);
            }
        })?;
        Ok(())
    }
}

fn read(paths: &[PathBuf]) -> io::Result<Vec<Vec<u8>>> {
    let named =
        |path: &PathBuf| std::fs::read(path).map_err(|e| io::Error::new(e.kind(), format!("{}: {e}", path.display())));
    paths.iter().map(named).collect()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn every_change_is_taken_and_a_broken_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        fs::write(&path, "1").unwrap();
        let mut watched = Watched::open("numbers", vec![path.clone()]).unwrap();
        let mut taken = vec![watched.contents()[0].clone()];
        let look = |watched: &mut Watched, taken: &mut Vec<Vec<u8>>| {
            watched.look(&mut |contents| {
                let is_number = contents[0].iter().all(u8::is_ascii_digit) && !contents[0].is_empty();
                if !is_number {
                    return Err("no number".to_owned());
                }
                taken.push(contents[0].clone());
                Ok(())
            });
        };
        look(&mut watched, &mut taken);
        assert_eq!(taken.len(), 1, "nothing has changed");
        let time = fs::metadata(&path).unwrap().modified().unwrap();
        fs::write(&path, "2").unwrap();
        // The clock of the file system may be coarse.
        fs::File::options().write(true).open(&path).unwrap().set_modified(time).unwrap();
        look(&mut watched, &mut taken);
        assert_eq!(taken.last().unwrap(), b"2");
        fs::write(&path, "").unwrap();
        look(&mut watched, &mut taken);
        assert_eq!((taken.len(), watched.complaint.as_deref()), (2, Some("no number")));
        fs::remove_file(&path).unwrap();
        look(&mut watched, &mut taken);
        assert!(watched.complaint.as_ref().is_some_and(|c| c.contains("file")));
        fs::write(&path, "2").unwrap();
        look(&mut watched, &mut taken);
        assert_eq!((taken.len(), watched.complaint.as_deref()), (3, None), "it is taken again");
    }
}
