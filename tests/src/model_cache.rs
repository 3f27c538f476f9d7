//! The real models that tests use, fetched once into the user's cache.

use std::path::PathBuf;

/// Small enough for every test: Llama architecture, 9 query and 3 KV heads.
pub const SMOLLM2: &str = "smollm2-135m-instruct";
/// Qwen2 architecture, 14 query and 2 KV heads.
pub const QWEN_05B: &str = "qwen2.5-coder-0.5b-instruct";
/// Qwen2 architecture, larger than the caches.
pub const QWEN_15B: &str = "qwen2.5-coder-1.5b-instruct";

/// Path of a model by its alias; fetched at first use.
///
/// # Panics
/// If it can't be fetched, saying why.
pub fn model(alias: &str) -> PathBuf {
    phalanx_cluster::source::resolve_quietly(alias).unwrap_or_else(|e| panic!("fetch {alias}: {e}"))
}
