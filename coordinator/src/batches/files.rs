//! Files in a folder: what each is, and whose, in a record beside it. Time is an argument, in seconds since 1970.
//!
//! What only asks takes no longer than a look into memory, whatever the disk is doing. What changes something waits for the
//! disk, and for those who change something else: it says so, and is not for threads that others wait for.

use std::{
    collections::BTreeMap,
    fs::{self, File, TryLockError},
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use serde::{Deserialize, Serialize};

use super::{FilesConfig, disk};

/// How long a file is kept unless its sender says.
pub const KEPT_SECONDS: u64 = 30 * 24 * 3600;
/// Longest name, in bytes.
const LONGEST_NAME: usize = 255;

/// What is known of a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileRecord {
    /// Nobody can guess it.
    pub id: String,
    /// Its length.
    pub bytes: u64,
    /// When it was complete.
    pub created_at: u64,
    /// When it goes.
    pub expires_at: u64,
    /// As its sender calls it.
    pub filename: String,
    /// What it is for.
    pub purpose: String,
    /// Name of the key whose it is; `None` where everybody may ask.
    pub owner: Option<String>,
}

/// Why something can't be done with a file.
#[derive(Debug, thiserror::Error)]
pub enum FilesError {
    /// There is none of this id, or it is somebody else's.
    #[error("no such file")]
    Unknown,
    /// It is longer than a file may be.
    #[error("the file is longer than {limit} bytes (--max-file-size)")]
    TooLong {
        /// Most bytes.
        limit: u64,
    },
    /// There is no room for another one.
    #[error("there is no room for more files: {limit} {what} is the most: delete some")]
    Full {
        /// As much as may be.
        limit: u64,
        /// Of what.
        what: &'static str,
    },
    /// Something else needs it.
    #[error("the file is being read by a batch: cancel it first")]
    InUse,
    /// Another process has the folder.
    #[error("another process has the folder of files")]
    Busy,
    /// The disk says no.
    #[error("the folder of files can't be used: {0}")]
    Disk(#[from] io::Error),
}

struct Shelf {
    by_id: BTreeMap<String, FileRecord>,
    /// Bytes that are there or on their way.
    total_bytes: u64,
    /// Files that are on their way.
    n_coming: usize,
}

/// All files.
pub struct Files {
    config: FilesConfig,
    folder: PathBuf,
    /// Never held while the disk is asked for something.
    shelf: Mutex<Shelf>,
    /// The lock of the folder, for as long as this process has it; let go by the system when it dies. Held by whoever changes
    /// something, from the first look until it is on the disk.
    lock: Mutex<Option<File>>,
}

/// The folder is ours, and nobody else here changes anything.
pub struct Held<'a> {
    _lock: MutexGuard<'a, Option<File>>,
}

/// A name that nobody guesses.
pub fn new_id(prefix: &str) -> String {
    format!("{prefix}{}", uuid::Uuid::new_v4().simple())
}

impl Files {
    /// Takes the folder; makes it if it is not there.
    ///
    /// # Errors
    /// If another process has it, or the disk says no.
    pub fn open(config: FilesConfig) -> Result<Self, FilesError> {
        let folder = config.folder.join("files");
        fs::create_dir_all(&folder)?;
        let lock = File::create(config.folder.join("lock"))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(FilesError::Busy),
            Err(TryLockError::Error(error)) => return Err(error.into()),
        }
        let records = disk::read_all::<FileRecord>(&folder)?;
        let total_bytes = records.iter().map(|record| record.bytes).sum();
        let by_id = records.into_iter().map(|record| (record.id.clone(), record)).collect();
        let shelf = Mutex::new(Shelf { by_id, total_bytes, n_coming: 0 });
        Ok(Self { config, folder, shelf, lock: Mutex::new(Some(lock)) })
    }

    fn shelf(&self) -> MutexGuard<'_, Shelf> {
        // Each change is whole before it can fail.
        self.shelf.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes sure that the folder is ours, and that nothing is changed by others until the answer is dropped. Waits for them.
    ///
    /// # Errors
    /// If it is no longer.
    pub fn held(&self) -> Result<Held<'_>, FilesError> {
        let lock = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        if lock.is_some() { Ok(Held { _lock: lock }) } else { Err(FilesError::Busy) }
    }

    /// Lets another process have the folder. Nothing is changed from here any more. Waits for what is being changed.
    pub fn let_go(&self) {
        drop(self.lock.lock().unwrap_or_else(PoisonError::into_inner).take());
    }

    /// Folder of everything.
    pub fn root(&self) -> &Path {
        &self.config.folder
    }

    /// Where a file's content is.
    pub fn path(&self, id: &str) -> PathBuf {
        self.folder.join(id)
    }

    fn record_path(&self, id: &str) -> PathBuf {
        self.folder.join(format!("{id}.{}", disk::RECORD))
    }

    /// Files there are, and their bytes.
    pub fn size(&self) -> (usize, u64) {
        let shelf = self.shelf();
        (shelf.by_id.len(), shelf.by_id.values().map(|record| record.bytes).sum())
    }

    /// Begins to take a file in.
    ///
    /// # Errors
    /// If there are enough of them.
    pub fn begin(self: &Arc<Self>) -> Result<Incoming, FilesError> {
        let mut shelf = self.shelf();
        let limit = self.config.max_files;
        if shelf.by_id.len() + shelf.n_coming >= limit {
            return Err(FilesError::Full { limit: limit as u64, what: "files (--max-files)" });
        }
        shelf.n_coming += 1;
        drop(shelf);
        let id = new_id("file-");
        let path = self.folder.join(&id).with_extension(disk::UNFINISHED);
        Ok(Incoming { files: Arc::clone(self), id, path, bytes: 0, is_kept: false })
    }

    /// Makes a file of content that is there, under the id that was chosen for it. Does nothing if that was done before. Waits for
    /// the disk.
    ///
    /// # Errors
    /// If the disk says no.
    pub fn adopt(&self, record: FileRecord) -> Result<(), FilesError> {
        let _held = self.held()?;
        disk::write(&self.record_path(&record.id), &record)?;
        let bytes = record.bytes;
        let mut shelf = self.shelf();
        if shelf.by_id.insert(record.id.clone(), record).is_none() {
            shelf.total_bytes += bytes;
        }
        Ok(())
    }

    /// What is known of somebody's file.
    ///
    /// # Errors
    /// If he has none of this id.
    pub fn get(&self, owner: Option<&str>, id: &str, now: u64) -> Result<FileRecord, FilesError> {
        let shelf = self.shelf();
        let record = shelf.by_id.get(id).filter(|record| record.owner.as_deref() == owner && record.expires_at > now);
        record.cloned().ok_or(FilesError::Unknown)
    }

    /// All files of somebody, the newest first.
    pub fn list(&self, owner: Option<&str>, now: u64) -> Vec<FileRecord> {
        let shelf = self.shelf();
        let is_his = |record: &&FileRecord| record.owner.as_deref() == owner && record.expires_at > now;
        let mut list: Vec<_> = shelf.by_id.values().filter(is_his).cloned().collect();
        list.sort_by(|a, b| (b.created_at, &b.id).cmp(&(a.created_at, &a.id)));
        list
    }

    /// Removes a file, unless something needs it. Waits for the disk.
    ///
    /// # Errors
    /// If there is none of this id, it is needed, or the disk says no.
    pub fn remove(&self, id: &str, is_used: impl FnOnce(&str) -> bool) -> Result<(), FilesError> {
        let _held = self.held()?;
        let bytes = self.shelf().by_id.get(id).ok_or(FilesError::Unknown)?.bytes;
        // Nothing comes to need it meanwhile: that would be a change.
        if is_used(id) {
            return Err(FilesError::InUse);
        }
        // The record first: content without one is found by nobody, and removed at the next start.
        disk::remove(&self.record_path(id))?;
        disk::remove(&self.path(id))?;
        let mut shelf = self.shelf();
        shelf.by_id.remove(id);
        shelf.total_bytes = shelf.total_bytes.saturating_sub(bytes);
        Ok(())
    }

    /// Removes files whose time is over, but for those that are in use, and content that belongs to nobody. Waits for the disk.
    ///
    /// # Errors
    /// If the disk says no.
    pub fn sweep(&self, now: u64, is_used: impl Fn(&str) -> bool) -> Result<(), FilesError> {
        let expired = |record: &&FileRecord| record.expires_at <= now;
        let expired: Vec<_> = self.shelf().by_id.values().filter(expired).map(|record| record.id.clone()).collect();
        for id in expired {
            match self.remove(&id, &is_used) {
                Ok(()) => tracing::debug!(id, "a file's time is over"),
                // Later, or somebody else has removed it.
                Err(FilesError::InUse | FilesError::Unknown) => {}
                Err(error) => return Err(error),
            }
        }
        let _held = self.held()?;
        for entry in fs::read_dir(&self.folder)? {
            let path = entry?.path();
            let Some(id) = path.file_name().and_then(|name| name.to_str()) else { continue };
            if path.extension().is_none() && !self.shelf().by_id.contains_key(id) && !is_used(id) {
                disk::remove(&path)?;
            }
        }
        Ok(())
    }
}

/// A file that is being taken in. Dropped before [`Incoming::keep`], nothing is left of it.
pub struct Incoming {
    files: Arc<Files>,
    id: String,
    path: PathBuf,
    bytes: u64,
    is_kept: bool,
}

impl Incoming {
    /// Where its bytes are to be written.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// So many bytes more are about to be written.
    ///
    /// # Errors
    /// If it becomes too long, or there is no room.
    pub fn grow(&mut self, bytes: u64) -> Result<(), FilesError> {
        let config = &self.files.config;
        if self.bytes + bytes > config.max_file_bytes {
            return Err(FilesError::TooLong { limit: config.max_file_bytes });
        }
        let mut shelf = self.files.shelf();
        if shelf.total_bytes + bytes > config.max_total_bytes {
            return Err(FilesError::Full { limit: config.max_total_bytes, what: "bytes (--max-files-total)" });
        }
        shelf.total_bytes += bytes;
        self.bytes += bytes;
        Ok(())
    }

    /// It is complete. Waits until the disk has all of it.
    ///
    /// # Errors
    /// If the disk says no, or the folder is no longer ours.
    pub fn keep(
        mut self,
        filename: &str,
        purpose: &str,
        owner: Option<&str>,
        now: u64,
        kept_seconds: u64,
    ) -> Result<FileRecord, FilesError> {
        let end = filename.floor_char_boundary(LONGEST_NAME);
        let record = FileRecord {
            id: self.id.clone(),
            bytes: self.bytes,
            created_at: now,
            expires_at: now.saturating_add(kept_seconds),
            filename: filename[..end].to_owned(),
            purpose: purpose.to_owned(),
            owner: owner.map(str::to_owned),
        };
        File::open(&self.path)?.sync_all()?;
        let files = Arc::clone(&self.files);
        // Content that belongs to nobody is swept away: nobody may do so in between.
        let _held = files.held()?;
        fs::rename(&self.path, files.path(&self.id))?;
        disk::write(&files.record_path(&self.id), &record)?;
        files.shelf().by_id.insert(self.id.clone(), record.clone());
        self.is_kept = true;
        Ok(record)
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        let mut shelf = self.files.shelf();
        shelf.n_coming -= 1;
        if self.is_kept {
            return;
        }
        shelf.total_bytes = shelf.total_bytes.saturating_sub(self.bytes);
        drop(shelf);
        let left = [self.files.record_path(&self.id), std::mem::take(&mut self.path), self.files.path(&self.id)];
        disk::off_the_path(move || {
            // What is left is removed at the next start.
            for path in left {
                let _ = disk::remove(&path);
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(folder: &Path) -> FilesConfig {
        FilesConfig { folder: folder.to_owned(), max_file_bytes: 10, max_files: 3, max_total_bytes: 15 }
    }

    fn open(folder: &Path) -> Arc<Files> {
        Arc::new(Files::open(config(folder)).unwrap())
    }

    fn is_free(_id: &str) -> bool {
        false
    }

    fn add(files: &Arc<Files>, text: &str, owner: Option<&str>, now: u64) -> Result<FileRecord, FilesError> {
        let mut incoming = files.begin()?;
        incoming.grow(text.len() as u64)?;
        fs::write(incoming.path(), text)?;
        incoming.keep("in.jsonl", "batch", owner, now, 100)
    }

    #[test]
    fn who_asks_does_not_wait_for_who_changes() {
        let folder = tempfile::tempdir().unwrap();
        let files = open(folder.path());
        let one = add(&files, "one", None, 5).unwrap();
        let mut incoming = files.begin().unwrap();
        incoming.grow(5).unwrap();
        fs::write(incoming.path(), "other").unwrap();
        let held = files.held().unwrap();
        let keeping = std::thread::spawn(move || incoming.keep("in.jsonl", "batch", None, 6, 100));
        let removing = std::thread::spawn({
            let (files, id) = (Arc::clone(&files), one.id.clone());
            move || files.remove(&id, is_free)
        });
        assert_eq!(files.get(None, &one.id, 7).unwrap(), one);
        assert_eq!(files.list(None, 7), std::slice::from_ref(&one));
        assert_eq!(files.size(), (1, 3));
        drop(files.begin().unwrap());
        drop(held);
        let other = keeping.join().unwrap().unwrap();
        removing.join().unwrap().unwrap();
        assert_eq!(files.list(None, 7), std::slice::from_ref(&other));
        assert!(matches!(files.remove(&other.id, |_| true), Err(FilesError::InUse)));
    }

    #[test]
    fn files_are_their_owners_and_survive() {
        let folder = tempfile::tempdir().unwrap();
        let files = open(folder.path());
        let (one, other) = (add(&files, "one", Some("a"), 5).unwrap(), add(&files, "other", Some("a"), 6).unwrap());
        assert!(matches!(files.get(Some("b"), &one.id, 7), Err(FilesError::Unknown)));
        assert!(matches!(files.get(None, &one.id, 7), Err(FilesError::Unknown)));
        assert!(matches!(Files::open(config(folder.path())), Err(FilesError::Busy)));
        let former = files;
        former.let_go();
        let files = open(folder.path());
        assert!(matches!(former.remove(&one.id, is_free), Err(FilesError::Busy)), "it has nothing to say any more");
        assert_eq!(files.get(Some("a"), &one.id, 7).unwrap(), one);
        assert_eq!(files.list(Some("a"), 7), [other.clone(), one.clone()]);
        assert_eq!(fs::read(files.path(&one.id)).unwrap(), b"one");
        assert_eq!(files.size(), (2, 8));
        files.remove(&one.id, is_free).unwrap();
        assert!(!files.path(&one.id).exists());
        assert!(matches!(files.remove(&one.id, is_free), Err(FilesError::Unknown)));
        assert_eq!(files.list(Some("a"), 106), [], "its time is over");
        files.sweep(106, |id| id == other.id).unwrap();
        assert_eq!(files.size().0, 1, "it is in use");
        files.sweep(106, |_| false).unwrap();
        assert_eq!((files.size(), fs::read_dir(folder.path().join("files")).unwrap().count()), ((0, 0), 0));
    }

    #[test]
    fn what_is_too_much_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let files = open(folder.path());
        assert!(matches!(add(&files, "eleven byte", None, 0), Err(FilesError::TooLong { limit: 10 })));
        add(&files, "ten bytes!", None, 0).unwrap();
        assert!(matches!(add(&files, "six...", None, 0), Err(FilesError::Full { limit: 15, .. })));
        add(&files, "five.", None, 0).unwrap();
        add(&files, "", None, 0).unwrap();
        assert!(matches!(add(&files, "", None, 0), Err(FilesError::Full { limit: 3, .. })));
        let mut unfinished: Vec<_> = fs::read_dir(folder.path().join("files")).unwrap().collect();
        unfinished.retain(|entry| entry.as_ref().unwrap().path().extension().is_some_and(|e| e == disk::UNFINISHED));
        assert!(unfinished.is_empty());
    }

    #[test]
    fn names_are_cut_between_characters() {
        let folder = tempfile::tempdir().unwrap();
        let files = open(folder.path());
        let incoming = files.begin().unwrap();
        fs::write(incoming.path(), "").unwrap();
        let record = incoming.keep(&"é".repeat(200), "batch", None, 0, 1).unwrap();
        assert_eq!(record.filename.len(), 254);
    }
}
