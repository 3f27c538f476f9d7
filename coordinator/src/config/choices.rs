//! Options of which a few words are possible.

use std::path::PathBuf;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// How activations and KV cache are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    /// The fast path.
    #[default]
    Auto,
    /// Everything in float32, weights exactly as stored.
    Float32,
}

impl Dtype {
    /// As messages spell it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Float32 => "float32",
        }
    }
}

/// Where ranks copy their KV rows to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KvMirror {
    /// To a spare shard, if there is one.
    #[default]
    Spare,
    /// Each rank to the next one.
    Buddy,
    /// Nowhere.
    Off,
}

/// How each line of the log looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// A JSON object.
    Json,
}

/// How ranks exchange sums.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CollectiveChoice {
    /// Shared memory where all ranks are on one host, else TCP.
    #[default]
    Auto,
    /// Shared memory; ranks must be on one host.
    Shm,
    /// TCP even on one host.
    Tcp,
}

impl CollectiveChoice {
    /// As flags spell it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Shm => "shm",
            Self::Tcp => "tcp",
        }
    }
}

/// Where defaults of parameters come from.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(from = "String", into = "String")]
pub enum GenerationConfig {
    /// The checkpoint.
    #[default]
    Auto,
    /// Nowhere: they are OpenAI's.
    None,
    /// A file such as Hugging Face's `generation_config.json`, or the folder that it is in.
    File(PathBuf),
}

impl From<String> for GenerationConfig {
    fn from(text: String) -> Self {
        match text.as_str() {
            "auto" => Self::Auto,
            // vLLM's name for its own defaults, which are the same.
            "none" | "vllm" => Self::None,
            _ => Self::File(text.into()),
        }
    }
}

impl From<GenerationConfig> for String {
    fn from(config: GenerationConfig) -> Self {
        match config {
            GenerationConfig::Auto => "auto".to_owned(),
            GenerationConfig::None => "none".to_owned(),
            GenerationConfig::File(path) => path.display().to_string(),
        }
    }
}
