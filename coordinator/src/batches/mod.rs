//! Files that clients send, and batches of requests that they are: what is behind `/v1/files` and `/v1/batches`.
//!
//! Everything is on the disk ([`files`], [`record`]) before it is told to anybody, in a folder that one process owns at a time:
//! whoever leads. [`service`] runs batches over it with the line runner of [`crate::batch`], and goes on where the
//! process before it was killed.

pub mod disk;
pub mod files;
pub mod record;
pub mod run;
pub mod service;

use std::path::PathBuf;

/// Where files are, and how much of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FilesConfig {
    /// Their folder.
    pub folder: PathBuf,
    /// Most bytes of one that is sent.
    pub max_file_bytes: u64,
    /// Most files.
    pub max_files: usize,
    /// Most bytes of all that were sent together.
    pub max_total_bytes: u64,
}
