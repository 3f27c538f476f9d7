//! Writing that survives.

use std::{
    fs::{self, File},
    io::{self, Write},
    path::Path,
};

use serde::{Serialize, de::DeserializeOwned};

/// Ending of files that are not complete.
pub const UNFINISHED: &str = "part";
/// Ending of records.
pub const RECORD: &str = "json";

/// Writes a record so that it is there whole or not at all, whenever the power fails.
///
/// # Errors
/// If the disk says no.
pub fn write(path: &Path, record: &impl Serialize) -> io::Result<()> {
    let unfinished = path.with_extension(UNFINISHED);
    let mut file = File::create(&unfinished)?;
    file.write_all(&serde_json::to_vec(record)?)?;
    file.sync_all()?;
    fs::rename(&unfinished, path)?;
    sync_folder_of(path)
}

/// Makes sure that a name stays after a power cut.
///
/// # Errors
/// If the disk says no.
pub fn sync_folder_of(path: &Path) -> io::Result<()> {
    path.parent().map_or(Ok(()), |folder| File::open(folder)?.sync_all())
}

/// Removes a file that may be gone already.
///
/// # Errors
/// If the disk says no.
pub fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// All records of a folder, which is made. Unfinished files are removed; a record that can't be read is left alone and logged.
///
/// # Errors
/// If the folder can't be read.
pub fn read_all<T: DeserializeOwned>(folder: &Path) -> io::Result<Vec<T>> {
    fs::create_dir_all(folder)?;
    let mut records = Vec::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let ending = path.extension().and_then(|ending| ending.to_str());
        if ending == Some(UNFINISHED) {
            remove(&path)?;
        }
        if ending != Some(RECORD) {
            continue;
        }
        match serde_json::from_slice(&fs::read(&path)?) {
            Ok(record) => records.push(record),
            Err(error) => tracing::error!(file = %path.display(), %error, "a record can't be read: it is left out"),
        }
    }
    Ok(records)
}

/// Does something with the disk that nobody waits for: elsewhere, if others wait for this thread.
pub fn off_the_path(work: impl FnOnce() + Send + 'static) {
    match tokio::runtime::Handle::try_current() {
        Ok(runtime) => drop(runtime.spawn_blocking(work)),
        Err(_) => work(),
    }
}
