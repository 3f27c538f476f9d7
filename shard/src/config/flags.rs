//! The options as they were typed, and as all sources together give them.

use std::path::PathBuf;

use clap::Parser;
use serde::{Deserialize, Serialize};

#[cfg(any(debug_assertions, feature = "failpoints"))]
use crate::failpoint::Failpoint;

/// Holds a slice of a model on a device, joins a coordinator, and computes the steps that it plans.
#[derive(Debug, Clone, Parser, Serialize)]
#[command(
    name = "shard",
    version,
    after_help = "Every option can be given as an environment variable and as a key of the file (with underscores). \
                  Flags come before the environment, the environment before the file. PHALANX_LOG filters the log \
                  (error, warn, info, debug, trace, or per target) [default: info].\n\n\
                  `shard completions SHELL` and `shard man FOLDER` write completions and manual pages."
)]
pub struct Flags {
    /// Coordinators, as http://HOST:PORT, separated by commas or repeated; the one that leads is joined. The others that
    /// it knows are learned from it
    #[arg(long, env = "PHALANX_COORDINATOR", value_name = "URL[,URL]", value_delimiter = ',')]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) coordinator: Option<Vec<String>>,

    /// Device that computes: cpu [default: cpu]
    #[arg(long, env = "PHALANX_DEVICE", value_name = "cpu|cuda:N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) device: Option<String>,

    /// Threads of a CPU device [default: the cores that this process may use]
    #[arg(long, env = "PHALANX_THREADS", value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) threads: Option<usize>,

    /// Address on which this shard listens for ranks of other hosts; port 0 takes a free one [default: 127.0.0.1:0, or all
    /// addresses if --advertise is given]
    #[arg(long, env = "PHALANX_LISTEN", value_name = "ADDR:PORT")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) listen: Option<String>,

    /// Address at which ranks of other hosts reach this shard; without a port that of --listen [default: that of --listen,
    /// or if it listens on all addresses the one from which it reaches the coordinator]
    #[arg(long, env = "PHALANX_ADVERTISE", value_name = "HOST[:PORT]")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) advertise: Option<String>,

    /// Proof that this shard may join, where coordinators ask for one
    #[arg(long, env = "PHALANX_JOIN_TOKEN", value_name = "TOKEN", hide_env_values = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) join_token: Option<String>,

    /// File that holds the join token
    #[arg(long, env = "PHALANX_JOIN_TOKEN_FILE", value_name = "FILE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) join_token_file: Option<PathBuf>,

    /// PEM file with the authority that the cluster's certificates come from: speak TLS with coordinators, which must be
    /// given as https://HOST:PORT [default: plain text]
    #[arg(long, env = "PHALANX_CLUSTER_CA", value_name = "FILE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) cluster_ca: Option<PathBuf>,

    /// PEM file with the certificate that coordinators are shown
    #[arg(long, env = "PHALANX_CLUSTER_CERT", value_name = "FILE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) cluster_cert: Option<PathBuf>,

    /// PEM file with that certificate's key
    #[arg(long, env = "PHALANX_CLUSTER_KEY", value_name = "FILE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) cluster_key: Option<PathBuf>,

    /// Longest wait for the coordinator to let this shard go after the first Ctrl-C or SIGTERM, in seconds; a second one
    /// ends at once [default: 30]
    #[arg(long, env = "PHALANX_LEAVE_TIMEOUT", value_name = "SECONDS")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) leave_timeout: Option<u32>,

    /// Memory for copies of other ranks' KV rows while this shard is a spare, such as 4GiB; 0 takes none. Where they need
    /// more, or the host has less than 256 MiB left, nothing is copied [default: half of what is free at the start]
    #[arg(long, env = "PHALANX_MIRROR_MEMORY", value_name = "SIZE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) mirror_memory: Option<String>,

    /// Address on which a spare takes those copies in [default: that of --listen, with a free port]
    #[arg(long, env = "PHALANX_MIRROR_LISTEN", value_name = "ADDR:PORT")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) mirror_listen: Option<String>,

    /// Port for probes and Prometheus: /livez, /readyz, /metrics; 0 takes a free one [default: none]
    #[arg(long, env = "PHALANX_HEALTH_PORT", value_name = "PORT")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) health_port: Option<u16>,

    /// IP address of that port [default: 127.0.0.1]
    #[arg(long, env = "PHALANX_HEALTH_HOST", value_name = "ADDRESS")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) health_host: Option<String>,

    /// Stable name of this shard [default: host name and a random number]
    #[arg(long, env = "PHALANX_SHARD_ID", value_name = "NAME")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) shard_id: Option<String>,

    /// Instruction set of a CPU device, for tests: all compute the same bits [default: auto]
    #[arg(long, env = "PHALANX_ISA", value_name = "auto|scalar|avx2|avx-vnni|avx512|amx")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) isa: Option<String>,

    /// How ranks exchange sums [default: auto, which takes the fastest that fits]
    #[arg(long, env = "PHALANX_COLLECTIVE", value_name = "auto|shm|tcp")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) collective: Option<String>,

    /// How each line of the log looks: for people, or a JSON object [default: text]
    #[arg(long, env = "PHALANX_LOG_FORMAT")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) log_format: Option<LogFormat>,

    /// TOML file with any of these options
    #[arg(long, env = "PHALANX_CONFIG", value_name = "FILE")]
    #[serde(skip)]
    pub(super) config: Option<PathBuf>,

    /// End when the process that started this one ends
    #[arg(long, hide = true)]
    #[serde(skip)]
    pub(super) exit_with_parent: bool,

    /// Faults at chosen places, for tests
    #[cfg(any(debug_assertions, feature = "failpoints"))]
    #[arg(long, env = "PHALANX_FAILPOINT", value_name = "SPEC", value_delimiter = ',', hide = true)]
    #[serde(skip)]
    pub(super) failpoint: Vec<Failpoint>,
}

/// The options of all sources together, as text.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Merged {
    #[serde(default)]
    pub(super) coordinator: Addresses,
    pub(super) device: String,
    pub(super) threads: Option<usize>,
    pub(super) listen: Option<String>,
    pub(super) advertise: Option<String>,
    pub(super) join_token: Option<String>,
    pub(super) join_token_file: Option<PathBuf>,
    pub(super) cluster_ca: Option<PathBuf>,
    pub(super) cluster_cert: Option<PathBuf>,
    pub(super) cluster_key: Option<PathBuf>,
    pub(super) leave_timeout: u32,
    pub(super) mirror_memory: Option<MirrorMemory>,
    pub(super) mirror_listen: Option<String>,
    pub(super) health_port: Option<u16>,
    pub(super) health_host: Option<String>,
    pub(super) shard_id: Option<String>,
    pub(super) isa: String,
    pub(super) collective: String,
    #[serde(default)]
    pub(super) log_format: LogFormat,
}

/// How each line of the log looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// A JSON object.
    Json,
}

/// A number of bytes, or a size with its unit.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub(super) enum MirrorMemory {
    Bytes(u64),
    Text(String),
}

/// A list, or one text with commas.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub(super) enum Addresses {
    List(Vec<String>),
    Text(String),
}

impl Default for Addresses {
    fn default() -> Self {
        Self::List(Vec::new())
    }
}

#[derive(Serialize)]
pub(super) struct Defaults {
    pub(super) device: &'static str,
    pub(super) leave_timeout: u32,
    pub(super) isa: &'static str,
    pub(super) collective: &'static str,
}

pub(super) const DEFAULTS: Defaults = Defaults { device: "cpu", leave_timeout: 30, isa: "auto", collective: "auto" };
