//! Options of files, batches and the response cache.

use std::path::{Path, PathBuf};

use phalanx_cluster::byte_size::ByteSize;

use super::{ConfigError, Flags, within, wrong};
use crate::batches::FilesConfig;

/// Name of the folder beside what the embedded store keeps.
const FOLDER: &str = "files";

/// What is said of files.
pub(super) struct Asked {
    folder: Option<PathBuf>,
    file: Option<ByteSize>,
    files: Option<u32>,
    total: Option<ByteSize>,
}

impl Asked {
    /// Takes its options from `flags`.
    pub(super) fn take(flags: &mut Flags) -> Self {
        Self {
            folder: flags.files_dir.take(),
            file: flags.max_file_size.take(),
            files: flags.max_files.take(),
            total: flags.max_files_total.take(),
        }
    }

    /// Where files are, if anywhere.
    pub(super) fn resolve(self, state_dir: Option<&Path>) -> Result<Option<FilesConfig>, ConfigError> {
        let Self { folder, file, files, total } = self;
        let Some(folder) = folder.or_else(|| Some(state_dir?.join(FOLDER))) else {
            let details = [
                ("max-file-size", file.map(|size| size.to_string())),
                ("max-files", files.map(|n| n.to_string())),
                ("max-files-total", total.map(|size| size.to_string())),
            ];
            return match details.into_iter().find_map(|(option, value)| Some((option, value?))) {
                Some((option, value)) => Err(wrong(option, value, "needs --files-dir too")),
                None => Ok(None),
            };
        };
        if folder.as_os_str().is_empty() {
            return Err(wrong("files-dir", "\"\"", "want a folder"));
        }
        let max_file_bytes = file.unwrap_or(ByteSize(200 << 20)).0;
        let max_total_bytes = total.unwrap_or(ByteSize((10 << 30).max(max_file_bytes))).0;
        if max_total_bytes < max_file_bytes {
            let reason = format!("is less than one file may have (--max-file-size {})", ByteSize(max_file_bytes));
            return Err(wrong("max-files-total", ByteSize(max_total_bytes), reason));
        }
        let max_files = within("max-files", files.unwrap_or(10_000), 1, 1 << 24)? as usize;
        Ok(Some(FilesConfig { folder, max_file_bytes, max_files, max_total_bytes }))
    }
}

/// Bytes for answers that are given again. Takes its option from `flags`.
pub(super) fn response_cache(flags: &mut Flags) -> Result<Option<usize>, ConfigError> {
    let Some(size) = flags.response_cache.take() else { return Ok(None) };
    match usize::try_from(size.0) {
        Ok(bytes) if bytes >= 1 << 16 => Ok(Some(bytes)),
        _ => Err(wrong("response-cache", size, "want at least 64KiB")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolved(flags: Flags, state_dir: Option<&str>) -> Result<Option<FilesConfig>, ConfigError> {
        let mut flags = flags;
        Asked::take(&mut flags).resolve(state_dir.map(Path::new))
    }

    #[test]
    fn files_are_beside_the_store_unless_said() {
        let beside = resolved(Flags::default(), Some("/state")).unwrap().unwrap();
        assert_eq!(
            (beside.folder, beside.max_file_bytes, beside.max_files),
            ("/state/files".into(), 200 << 20, 10_000)
        );
        assert_eq!(beside.max_total_bytes, 10 << 30);
        assert_eq!(resolved(Flags::default(), None).unwrap(), None);
        let said = Flags { files_dir: Some("/f".into()), max_files: Some(3), ..Flags::default() };
        let said = resolved(said, Some("/state")).unwrap().unwrap();
        assert_eq!((said.folder, said.max_files), ("/f".into(), 3));
        let large = Flags { max_file_size: Some(ByteSize(20 << 30)), ..Flags::default() };
        assert_eq!(resolved(large, Some("/state")).unwrap().unwrap().max_total_bytes, 20 << 30);
    }

    #[test]
    fn bounds_without_files_and_bounds_that_exclude_each_other_are_refused() {
        let refused = |flags, state_dir| resolved(flags, state_dir).unwrap_err().to_string();
        assert!(refused(Flags { max_files: Some(3), ..Flags::default() }, None).contains("--files-dir"));
        let narrow = Flags { max_files_total: Some(ByteSize(1 << 20)), ..Flags::default() };
        assert!(refused(narrow, Some("/state")).contains("--max-file-size"));
        assert!(refused(Flags { max_files: Some(0), ..Flags::default() }, Some("/state")).contains("--max-files"));
        let mut small = Flags { response_cache: Some(ByteSize(100)), ..Flags::default() };
        assert!(response_cache(&mut small).unwrap_err().to_string().contains("64KiB"));
    }
}
