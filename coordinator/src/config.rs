//! Flags, environment and file become one checked configuration.
//!
//! [`Flags`] is what was typed: everything may be absent. [`Config`] is what the process runs with: resolved and checked.
//! Flags come before `PHALANX_*` variables, those before the file, the file before defaults.

mod choices;
mod error;
mod files;
mod flags;
mod gathered;
mod guard;
mod join_token;
mod security;
#[cfg(test)]
mod tests;

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use phalanx_cluster::{
    byte_size::ByteSize,
    error_text::with_causes,
    source::DEFAULT_MODEL,
    store::{self, TlsFiles},
    tls::ClusterTls,
};
use phalanx_proto::dial::Dialer;

use self::error::{within, wrong};
pub use self::{
    choices::{CollectiveChoice, Dtype, GenerationConfig, KvMirror, LogFormat},
    error::ConfigError,
    flags::Flags,
    join_token::JoinToken,
};
use crate::{
    admin::http::AdminHttp,
    batches::FilesConfig,
    frontend::tools::Parsers,
    security::{SecurityConfig, tls::SslFiles},
    trace::destination::{Destination, Variables},
};

/// What the process runs with.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// Model as it was asked for.
    pub model: String,
    /// Ranks of the group.
    pub tensor_parallel_size: u32,
    /// Groups.
    pub replicas: u32,
    /// Shards to start here.
    pub local_shards: u32,
    /// Where HTTP listens.
    pub http_address: SocketAddr,
    /// Where gRPC listens.
    pub grpc_address: SocketAddr,
    /// Whether the gRPC port may be reached from elsewhere without certificates.
    pub insecure_cluster: bool,
    /// Most sequences at the same time.
    pub max_num_seqs: u32,
    /// Most rows in a step.
    pub max_num_batched_tokens: u32,
    /// Most tokens of prompt and output; `None` is the model's context.
    pub max_model_len: Option<u32>,
    /// Positions in a KV block.
    pub block_size: u32,
    /// Bytes for KV pages on each rank; `None` lets the shard measure.
    pub kv_cache_memory: Option<u64>,
    /// Names of the model; empty: derived from `model`.
    pub served_model_names: Vec<String>,
    /// Numbers of activations and KV cache.
    pub dtype: Dtype,
    /// URL of the membership store.
    pub store: String,
    /// User and password of the store.
    pub store_credentials: Option<(String, String)>,
    /// Files for TLS with the store; `None`: plain text.
    pub store_tls: Option<TlsFiles>,
    /// Folder of the embedded store; `None` keeps nothing.
    pub state_dir: Option<PathBuf>,
    /// Where files of clients are, and how much of them; `None`: they can't send any.
    pub files: Option<FilesConfig>,
    /// Bytes for answers that are given again to the same question; `None` gives none.
    pub response_cache: Option<usize>,
    /// Threads of each local shard.
    pub threads_per_shard: u32,
    /// Jinja file instead of the model's template.
    pub chat_template: Option<PathBuf>,
    /// Where defaults of parameters come from.
    pub generation_config: GenerationConfig,
    /// Tokenizer instead of the model's.
    pub tokenizer: Option<PathBuf>,
    /// How calls of tools and thoughts are found in outputs.
    pub parsers: Parsers,
    /// Most requests that wait.
    pub max_num_queued_reqs: u32,
    /// How long a client may take nothing of an answer.
    pub client_write_timeout: Duration,
    /// Most prompt tokens of requests that wait.
    pub max_num_queued_tokens: u32,
    /// How often a request is computed again after losses of a group without progress between them.
    pub max_replays: u32,
    /// Longest wait of requests for a group.
    pub no_group_timeout: Duration,
    /// How long a finished answer can be asked for again.
    pub resume_window: Duration,
    /// Bytes for answers that can be asked for again.
    pub resume_memory: usize,
    /// Whether prompts share KV blocks.
    pub enable_prefix_caching: bool,
    /// How ranks exchange sums.
    pub collective: CollectiveChoice,
    /// Instruction set of local shards.
    pub isa: String,
    /// Silence after which a shard is lost.
    pub heartbeat_timeout: Duration,
    /// Time without enough shards after which fewer ranks serve; `None`: never.
    pub regroup_after: Option<Duration>,
    /// Where ranks copy their KV rows to.
    pub kv_mirror: KvMirror,
    /// What shards must know to join; `None`: nothing.
    pub join_token: Option<JoinToken>,
    /// Who may ask, and how much.
    pub security: SecurityConfig,
    /// What clients are shown; `None`: plain text.
    pub ssl: Option<SslFiles>,
    /// What coordinators and shards show each other; `None`: plain text.
    pub cluster_tls: Option<ClusterTls>,
    /// Host under which others reach this coordinator; `None`: an address of this machine.
    pub advertise_host: Option<String>,
    /// Silence after which another coordinator may lead.
    pub leader_ttl: Duration,
    /// Whose requests `/admin/*` takes.
    pub admin_http: AdminHttp,
    /// Longest wait for running requests at the end.
    pub shutdown_timeout: Duration,
    /// Filter of the log.
    pub log_level: String,
    /// How its lines look.
    pub log_format: LogFormat,
    /// Where traces are sent; `None`: there are none.
    pub otlp_traces_endpoint: Option<Destination>,
    /// Share of requests that are traced where their clients don't say.
    pub otlp_sample_ratio: f64,
}

/// What `resolve` needs to know of the machine.
#[derive(Debug, Clone)]
pub struct Machine {
    /// Cores that the process may use.
    pub cores: u32,
    /// `$XDG_STATE_HOME`, else `$HOME/.local/state`.
    pub state_home: Option<PathBuf>,
    /// The store's user and password.
    pub store_credentials: Option<(String, String)>,
    /// What OpenTelemetry's variables say.
    pub otel: Variables,
}

impl Machine {
    /// This one.
    pub fn detect() -> Self {
        let variable = |name| std::env::var_os(name).filter(|v| !v.is_empty());
        let text = |name| variable(name).and_then(|v| v.into_string().ok());
        let state_home = variable("XDG_STATE_HOME")
            .map(PathBuf::from)
            .or_else(|| variable("HOME").map(|home| PathBuf::from(home).join(".local/state")));
        Self {
            cores: std::thread::available_parallelism().map_or(1, |n| u32::try_from(n.get()).unwrap_or(u32::MAX)),
            state_home,
            store_credentials: text("PHALANX_ETCD_USER").zip(text("PHALANX_ETCD_PASSWORD")),
            otel: std::env::vars_os()
                .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
                .filter(|(name, _)| name.starts_with("OTEL_"))
                .collect(),
        }
    }
}

impl Config {
    /// Fills in defaults and checks.
    pub fn resolve(mut flags: Flags, machine: &Machine) -> Result<Self, ConfigError> {
        let (security, ssl) = (security::resolve(&mut flags)?, security::certificates(&mut flags)?);
        let response_cache = files::response_cache(&mut flags)?;
        let files = files::Asked::take(&mut flags);
        let model = flags.model.unwrap_or_else(|| DEFAULT_MODEL.to_owned());
        if model.trim().is_empty() {
            return Err(wrong("model", "\"\"", "want a file, a folder, hf:ORG/REPO, pypi:PACKAGE or an alias"));
        }
        let tensor_parallel_size = within("tensor-parallel-size", flags.tensor_parallel_size.unwrap_or(2), 1, 256)?;
        let replicas = within("replicas", flags.replicas.unwrap_or(1), 1, 64)?;
        let local_shards = flags.local_shards.unwrap_or(replicas * tensor_parallel_size);
        let local_shards = within("local-shards", local_shards, 0, 256)?;
        let host = flags.host.unwrap_or_else(|| Ipv4Addr::LOCALHOST.to_string());
        let parsed = |option, host: &str| -> Result<IpAddr, ConfigError> {
            if host == "localhost" { Ok(Ipv4Addr::LOCALHOST.into()) } else { host.parse() }
                .map_err(|_| wrong(option, host, "want an IP address such as 127.0.0.1, 0.0.0.0 or ::"))
        };
        let address = parsed("host", &host)?;
        let grpc_ip = flags.grpc_host.as_deref().map_or(Ok(address), |host| parsed("grpc-host", host))?;
        let (port, grpc_port) = (flags.port.unwrap_or(8000), flags.grpc_port.unwrap_or(50051));
        if port == grpc_port && port != 0 {
            return Err(wrong("grpc-port", grpc_port, "is --port too: give two different ones"));
        }
        let max_num_seqs = within("max-num-seqs", flags.max_num_seqs.unwrap_or(256), 1, 65_536)?;
        let batched = flags.max_num_batched_tokens.unwrap_or(2048.max(max_num_seqs));
        let max_num_batched_tokens = within("max-num-batched-tokens", batched, 1, 1 << 20)?;
        if max_num_batched_tokens < max_num_seqs && flags.max_num_seqs.is_some() {
            let reason = format!("{max_num_seqs} sequences (--max-num-seqs) need at least one token each in a step");
            return Err(wrong("max-num-batched-tokens", max_num_batched_tokens, reason));
        }
        let max_model_len = flags.max_model_len.map(|n| within("max-model-len", n, 2, 1 << 28)).transpose()?;
        let block_size = within("block-size", flags.block_size.unwrap_or(16), 16, 1024)?;
        if !block_size.is_multiple_of(16) {
            return Err(wrong("block-size", block_size, "want a multiple of 16: kernels read keys 16 at a time"));
        }
        let kv_cache_memory = flags.kv_cache_memory.map(|size| size.0);
        if let Some(bytes) = kv_cache_memory.filter(|b| *b < 1 << 16) {
            return Err(wrong("kv-cache-memory", ByteSize(bytes), "want at least 64KiB"));
        }
        let served_model_names = flags.served_model_name.unwrap_or_default();
        if served_model_names.iter().any(|n| n.trim().is_empty()) {
            return Err(wrong("served-model-name", "\"\"", "a name is empty"));
        }
        let store = flags.store.unwrap_or_else(|| "embedded".to_owned());
        store::check_url(&store).map_err(|e| wrong("store", store::redacted(&store), e.to_string()))?;
        let embedded = store == "embedded";
        if !embedded && let Some(dir) = &flags.state_dir {
            return Err(wrong("state-dir", dir.display(), "is for --store embedded only"));
        }
        // Not all of them come from the command line, which has checked this for itself.
        let store_tls = match (flags.store_cacert, flags.store_cert, flags.store_key) {
            (None, None, None) => None,
            (Some(ca), _, _) if embedded => return Err(wrong("store-cacert", ca.display(), "is for --store etcd://…")),
            (Some(ca), None, None) => Some(TlsFiles { ca, identity: None }),
            (Some(ca), Some(certificate), Some(key)) => Some(TlsFiles { ca, identity: Some((certificate, key)) }),
            (None, Some(file), _) | (None, None, Some(file)) => {
                return Err(wrong("store-cert", file.display(), "needs --store-cacert"));
            }
            (Some(_), file, other) => {
                let file = file.or(other).unwrap_or_default();
                return Err(wrong("store-cert", file.display(), "give both --store-cert and --store-key"));
            }
        };
        let default_dir = || Some(machine.state_home.as_ref()?.join("phalanx").join(grpc_port.to_string()));
        // A process on a free port is not the same one again at its next start: it has nothing to remember.
        let default_dir = if embedded && grpc_port != 0 { default_dir() } else { None };
        let state_dir = flags.state_dir.or(default_dir);
        let files = files.resolve(state_dir.as_deref())?;
        let threads = flags.threads_per_shard.unwrap_or((machine.cores / local_shards.max(1)).max(1));
        let heartbeat_ms = within("heartbeat-timeout-ms", flags.heartbeat_timeout_ms.unwrap_or(500), 100, 600_000)?;
        let regroup_after = within("regroup-after", flags.regroup_after.unwrap_or(30), 0, 86_400)?;
        let join_token = JoinToken::from_flags(flags.join_token, flags.join_token_file)?;
        let cluster_tls = ClusterTls::read(flags.cluster_ca, flags.cluster_cert, flags.cluster_key)?;
        let insecure_cluster = flags.insecure_cluster.unwrap_or(false);
        match &cluster_tls {
            Some(tls) => drop(Self::dialer_of(tls)?),
            None if grpc_ip.to_canonical().is_loopback() || insecure_cluster => {}
            None => {
                let option = if flags.grpc_host.is_some() { "grpc-host" } else { "host" };
                let reason = "the gRPC port would let everybody who reaches it read and administrate the cluster: give it \
                              certificates (--cluster-ca, --cluster-cert, --cluster-key; `coordinator certs init` makes \
                              them), or let it listen on this machine only (--grpc-host 127.0.0.1), or say that the \
                              network can be trusted (--insecure-cluster)";
                return Err(wrong(option, grpc_ip, reason));
            }
        }
        if let Some(SslFiles { client_ca: Some(file), .. }) = &ssl
            && cluster_tls.is_none()
            && !embedded
        {
            let reason = "coordinators that pass requests on to each other must show a certificate too: give them \
                          --cluster-ca, --cluster-cert and --cluster-key";
            return Err(wrong("ssl-ca-certs", file.display(), reason));
        }
        let leader_ttl_ms = within("leader-ttl-ms", flags.leader_ttl_ms.unwrap_or(3000), 500, 600_000)?;
        let advertise_host = match flags.advertise_host {
            Some(host) if host.is_empty() || host.contains(|c: char| c.is_whitespace() || "/@".contains(c)) => {
                return Err(wrong("advertise-host", format!("{host:?}"), "want a host name or an address"));
            }
            Some(host) => Some(host),
            None if address.is_unspecified() => None,
            None => Some(address.to_string()),
        };
        let write_timeout = flags.client_write_timeout.unwrap_or(60);
        let write_timeout = within("client-write-timeout", write_timeout, 1, 86_400)?;
        let no_group = within("no-group-timeout", flags.no_group_timeout.unwrap_or(60), 1, 86_400)?;
        let resume_window = within("resume-window", flags.resume_window.unwrap_or(600), 1, 86_400)?;
        let resume_memory = flags.resume_memory.unwrap_or(ByteSize(256 << 20));
        let resume_memory = match usize::try_from(resume_memory.0) {
            Ok(bytes) if bytes >= 1 << 20 => bytes,
            _ => return Err(wrong("resume-memory", resume_memory, "want at least 1MiB")),
        };
        let shutdown = within("shutdown-timeout", flags.shutdown_timeout.unwrap_or(10), 0, 86_400)?;
        let log_level = flags.log_level.unwrap_or_else(|| "info".to_owned());
        tracing_subscriber::EnvFilter::try_new(&log_level)
            .map_err(|e| wrong("log-level", &log_level, e.to_string()))?;
        let (url, protocol) = (flags.otlp_traces_endpoint.as_deref(), flags.otlp_traces_protocol);
        let otlp_traces_endpoint = Destination::resolve(url, protocol, &machine.otel)?;
        let otlp_sample_ratio = flags.otlp_sample_ratio.unwrap_or(1.0);
        if !(0.0..=1.0).contains(&otlp_sample_ratio) {
            return Err(wrong("otlp-sample-ratio", otlp_sample_ratio, "want 0 to 1"));
        }
        if flags.enable_auto_tool_choice == Some(false) {
            let reason = "tools may always be offered: a request that wants none called says so (tool_choice: none)";
            return Err(wrong("enable-auto-tool-choice", false, reason));
        }
        let parsers = Parsers::named(flags.tool_call_parser, flags.reasoning_parser)
            .map_err(|unknown| wrong(unknown.option, &unknown.value, unknown.to_string()))?;
        let exists = |option, path: Option<PathBuf>| match path {
            Some(path) => match std::fs::metadata(&path) {
                Ok(_) => Ok(Some(path)),
                Err(error) => Err(wrong(option, path.display(), error.to_string())),
            },
            None => Ok(None),
        };
        Ok(Self {
            model,
            tensor_parallel_size,
            replicas,
            local_shards,
            http_address: SocketAddr::new(address, port),
            grpc_address: SocketAddr::new(grpc_ip, grpc_port),
            insecure_cluster,
            max_num_seqs: max_num_seqs.min(max_num_batched_tokens),
            max_num_batched_tokens,
            max_model_len,
            block_size,
            kv_cache_memory,
            served_model_names,
            dtype: flags.dtype.unwrap_or_default(),
            store,
            store_credentials: machine.store_credentials.clone(),
            store_tls,
            state_dir,
            files,
            response_cache,
            threads_per_shard: within("threads-per-shard", threads, 1, 1024)?,
            chat_template: exists("chat-template", flags.chat_template)?,
            generation_config: match flags.generation_config.unwrap_or_default() {
                GenerationConfig::File(path) => {
                    exists("generation-config", Some(path))?.map_or(GenerationConfig::Auto, GenerationConfig::File)
                }
                other => other,
            },
            tokenizer: exists("tokenizer", flags.tokenizer)?,
            parsers,
            max_num_queued_reqs: within("max-num-queued-reqs", flags.max_num_queued_reqs.unwrap_or(1024), 1, 1 << 20)?,
            client_write_timeout: Duration::from_secs(u64::from(write_timeout)),
            max_num_queued_tokens: within(
                "max-num-queued-tokens",
                flags.max_num_queued_tokens.unwrap_or(1 << 20),
                1,
                1 << 30,
            )?,
            max_replays: within("max-replays", flags.max_replays.unwrap_or(3), 1, 1000)?,
            no_group_timeout: Duration::from_secs(u64::from(no_group)),
            resume_window: Duration::from_secs(u64::from(resume_window)),
            resume_memory,
            enable_prefix_caching: flags.enable_prefix_caching.unwrap_or(true),
            collective: flags.collective.unwrap_or_default(),
            isa: flags.isa.unwrap_or_else(|| "auto".to_owned()),
            heartbeat_timeout: Duration::from_millis(u64::from(heartbeat_ms)),
            regroup_after: (regroup_after > 0).then(|| Duration::from_secs(u64::from(regroup_after))),
            kv_mirror: flags.kv_mirror.unwrap_or_default(),
            join_token,
            security,
            ssl,
            cluster_tls,
            advertise_host,
            leader_ttl: Duration::from_millis(u64::from(leader_ttl_ms)),
            admin_http: flags.admin_http.unwrap_or_default(),
            shutdown_timeout: Duration::from_secs(u64::from(shutdown)),
            log_level,
            log_format: flags.log_format.unwrap_or_default(),
            otlp_traces_endpoint,
            otlp_sample_ratio,
        })
    }

    /// How other coordinators are dialled.
    pub fn dialer(&self) -> Result<Dialer, ConfigError> {
        self.cluster_tls.as_ref().map_or_else(|| Ok(Dialer::default()), Self::dialer_of)
    }

    fn dialer_of(tls: &ClusterTls) -> Result<Dialer, ConfigError> {
        let dialer = Dialer::with_certificates(&tls.ca, &tls.certificate, &tls.key);
        dialer.map_err(|error| tls.unusable(with_causes(&error)).into())
    }

    /// Flags that resolve to this configuration.
    pub fn to_flags(&self) -> Flags {
        let (tool_call_parser, reasoning_parser) = self.parsers.to_options();
        let clamp = |n: u128| u32::try_from(n).unwrap_or(u32::MAX);
        Flags {
            model: Some(self.model.clone()),
            tensor_parallel_size: Some(self.tensor_parallel_size),
            replicas: Some(self.replicas),
            local_shards: Some(self.local_shards),
            host: Some(self.http_address.ip().to_string()),
            port: Some(self.http_address.port()),
            grpc_host: Some(self.grpc_address.ip().to_string()),
            insecure_cluster: Some(self.insecure_cluster),
            grpc_port: Some(self.grpc_address.port()),
            max_num_seqs: Some(self.max_num_seqs),
            max_num_batched_tokens: Some(self.max_num_batched_tokens),
            max_model_len: self.max_model_len,
            block_size: Some(self.block_size),
            kv_cache_memory: self.kv_cache_memory.map(ByteSize),
            served_model_name: Some(self.served_model_names.clone()).filter(|n| !n.is_empty()),
            dtype: Some(self.dtype),
            store: Some(self.store.clone()),
            store_cacert: self.store_tls.as_ref().map(|tls| tls.ca.clone()),
            store_cert: self.store_tls.as_ref().and_then(|tls| Some(tls.identity.as_ref()?.0.clone())),
            store_key: self.store_tls.as_ref().and_then(|tls| Some(tls.identity.as_ref()?.1.clone())),
            threads_per_shard: Some(self.threads_per_shard),
            chat_template: self.chat_template.clone(),
            generation_config: Some(self.generation_config.clone()),
            tokenizer: self.tokenizer.clone(),
            tool_call_parser,
            reasoning_parser,
            max_num_queued_reqs: Some(self.max_num_queued_reqs),
            client_write_timeout: Some(clamp(self.client_write_timeout.as_secs().into())),
            max_num_queued_tokens: Some(self.max_num_queued_tokens),
            max_replays: Some(self.max_replays),
            no_group_timeout: Some(clamp(self.no_group_timeout.as_secs().into())),
            resume_window: Some(clamp(self.resume_window.as_secs().into())),
            resume_memory: Some(ByteSize(self.resume_memory as u64)),
            enable_prefix_caching: Some(self.enable_prefix_caching),
            state_dir: self.state_dir.clone(),
            files_dir: self.files.as_ref().map(|files| files.folder.clone()),
            max_file_size: self.files.as_ref().map(|files| ByteSize(files.max_file_bytes)),
            max_files: self.files.as_ref().map(|files| clamp(files.max_files as u128)),
            max_files_total: self.files.as_ref().map(|files| ByteSize(files.max_total_bytes)),
            response_cache: self.response_cache.map(|bytes| ByteSize(bytes as u64)),
            collective: Some(self.collective),
            isa: Some(self.isa.clone()),
            heartbeat_timeout_ms: Some(clamp(self.heartbeat_timeout.as_millis())),
            regroup_after: Some(self.regroup_after.map_or(0, |after| clamp(after.as_secs().into()))),
            kv_mirror: Some(self.kv_mirror),
            join_token: self.join_token.as_ref().filter(|t| t.file().is_none()).map(|t| t.secret().to_owned()),
            join_token_file: self.join_token.as_ref().and_then(JoinToken::file).map(PathBuf::from),
            cluster_ca: self.cluster_tls.as_ref().map(|tls| tls.ca_file.clone()),
            cluster_cert: self.cluster_tls.as_ref().map(|tls| tls.certificate_file.clone()),
            cluster_key: self.cluster_tls.as_ref().map(|tls| tls.key_file.clone()),
            advertise_host: self.advertise_host.clone(),
            leader_ttl_ms: Some(clamp(self.leader_ttl.as_millis())),
            admin_http: Some(self.admin_http),
            shutdown_timeout: Some(clamp(self.shutdown_timeout.as_secs().into())),
            log_level: Some(self.log_level.clone()),
            log_format: Some(self.log_format),
            otlp_traces_endpoint: self.otlp_traces_endpoint.as_ref().map(ToString::to_string),
            otlp_traces_protocol: self.otlp_traces_endpoint.as_ref().map(|to| to.protocol),
            otlp_sample_ratio: Some(self.otlp_sample_ratio),
            ..security::to_flags(&self.security, self.ssl.as_ref())
        }
    }

    /// For people, in the log: the store's URL without password.
    pub fn redacted_store(&self) -> String {
        store::redacted(&self.store)
    }
}
