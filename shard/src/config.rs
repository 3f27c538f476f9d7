//! Flags, environment and file become one checked configuration.
//!
//! Precedence: flags, then environment, then file, then defaults.

use std::{
    ffi::OsString,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::PathBuf,
    str::FromStr,
    time::Duration,
};

use clap::{Parser, error::ErrorKind};
use figment::{
    Figment,
    providers::{Format, Serialized, Toml},
};
use phalanx_cluster::{
    byte_size::ByteSize,
    error_text::with_causes,
    tls::{ClusterTls, ClusterTlsError},
};
use phalanx_kernels::{collective, ops::Precision};
use phalanx_proto::dial::Dialer;
use serde::{Deserialize, Serialize};
use tonic::transport::Uri;

use crate::device::{self, DeviceConfig};
#[cfg(any(debug_assertions, feature = "failpoints"))]
use crate::failpoint::Failpoint;

/// Holds a slice of a model on a device, joins a coordinator, and computes the steps that it plans.
#[derive(Debug, Clone, Parser, Serialize)]
#[command(
    name = "shard",
    version,
    after_help = "Every option can be given as an environment variable and as a key of the file (with underscores). \
                  Flags come before the environment, the environment before the file. PHALANX_LOG filters the log \
                  (error, warn, info, debug, trace, or per target) [default: info]."
)]
pub struct Flags {
    /// Coordinators, as http://HOST:PORT, separated by commas or repeated; the one that leads is joined. The others that
    /// it knows are learned from it
    #[arg(long, env = "PHALANX_COORDINATOR", value_name = "URL[,URL]", value_delimiter = ',')]
    #[serde(skip_serializing_if = "Option::is_none")]
    coordinator: Option<Vec<String>>,

    /// Device that computes: cpu [default: cpu]
    #[arg(long, env = "PHALANX_DEVICE", value_name = "cpu|cuda:N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    device: Option<String>,

    /// Threads of a CPU device [default: the cores that this process may use]
    #[arg(long, env = "PHALANX_THREADS", value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    threads: Option<usize>,

    /// Address on which this shard listens for ranks of other hosts; port 0 takes a free one [default: 127.0.0.1:0, or all
    /// addresses if --advertise is given]
    #[arg(long, env = "PHALANX_LISTEN", value_name = "ADDR:PORT")]
    #[serde(skip_serializing_if = "Option::is_none")]
    listen: Option<String>,

    /// Address at which ranks of other hosts reach this shard; without a port that of --listen [default: that of --listen,
    /// or if it listens on all addresses the one from which it reaches the coordinator]
    #[arg(long, env = "PHALANX_ADVERTISE", value_name = "HOST[:PORT]")]
    #[serde(skip_serializing_if = "Option::is_none")]
    advertise: Option<String>,

    /// Proof that this shard may join, where coordinators ask for one
    #[arg(long, env = "PHALANX_JOIN_TOKEN", value_name = "TOKEN", hide_env_values = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    join_token: Option<String>,

    /// File that holds the join token
    #[arg(long, env = "PHALANX_JOIN_TOKEN_FILE", value_name = "FILE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    join_token_file: Option<PathBuf>,

    /// PEM file with the authority that the cluster's certificates come from: speak TLS with coordinators, which must be
    /// given as https://HOST:PORT [default: plain text]
    #[arg(long, env = "PHALANX_CLUSTER_CA", value_name = "FILE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    cluster_ca: Option<PathBuf>,

    /// PEM file with the certificate that coordinators are shown
    #[arg(long, env = "PHALANX_CLUSTER_CERT", value_name = "FILE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    cluster_cert: Option<PathBuf>,

    /// PEM file with that certificate's key
    #[arg(long, env = "PHALANX_CLUSTER_KEY", value_name = "FILE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    cluster_key: Option<PathBuf>,

    /// Longest wait for the coordinator to let this shard go after the first Ctrl-C or SIGTERM, in seconds; a second one
    /// ends at once [default: 30]
    #[arg(long, env = "PHALANX_LEAVE_TIMEOUT", value_name = "SECONDS")]
    #[serde(skip_serializing_if = "Option::is_none")]
    leave_timeout: Option<u32>,

    /// Memory for copies of other ranks' KV rows while this shard is a spare, such as 4GiB; 0 takes none. Where they need
    /// more, nothing is copied [default: half of what is free at the start]
    #[arg(long, env = "PHALANX_MIRROR_MEMORY", value_name = "SIZE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    mirror_memory: Option<String>,

    /// Address on which a spare takes those copies in [default: that of --listen, with a free port]
    #[arg(long, env = "PHALANX_MIRROR_LISTEN", value_name = "ADDR:PORT")]
    #[serde(skip_serializing_if = "Option::is_none")]
    mirror_listen: Option<String>,

    /// Stable name of this shard [default: host name and a random number]
    #[arg(long, env = "PHALANX_SHARD_ID", value_name = "NAME")]
    #[serde(skip_serializing_if = "Option::is_none")]
    shard_id: Option<String>,

    /// Instruction set of a CPU device, for tests: all compute the same bits [default: auto]
    #[arg(long, env = "PHALANX_ISA", value_name = "auto|scalar|avx2|avx512")]
    #[serde(skip_serializing_if = "Option::is_none")]
    isa: Option<String>,

    /// How ranks exchange sums [default: auto, which takes the fastest that fits]
    #[arg(long, env = "PHALANX_COLLECTIVE", value_name = "auto|shm|tcp")]
    #[serde(skip_serializing_if = "Option::is_none")]
    collective: Option<String>,

    /// TOML file with any of these options
    #[arg(long, env = "PHALANX_CONFIG", value_name = "FILE")]
    #[serde(skip)]
    config: Option<PathBuf>,

    /// End when the process that started this one ends
    #[arg(long, hide = true)]
    #[serde(skip)]
    exit_with_parent: bool,

    /// Faults at chosen places, for tests
    #[cfg(any(debug_assertions, feature = "failpoints"))]
    #[arg(long, env = "PHALANX_FAILPOINT", value_name = "SPEC", value_delimiter = ',', hide = true)]
    #[serde(skip)]
    failpoint: Vec<Failpoint>,
}

/// The options of all sources together, as text.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Merged {
    #[serde(default)]
    coordinator: Addresses,
    device: String,
    threads: Option<usize>,
    listen: Option<String>,
    advertise: Option<String>,
    join_token: Option<String>,
    join_token_file: Option<PathBuf>,
    cluster_ca: Option<PathBuf>,
    cluster_cert: Option<PathBuf>,
    cluster_key: Option<PathBuf>,
    leave_timeout: u32,
    mirror_memory: Option<MirrorMemory>,
    mirror_listen: Option<String>,
    shard_id: Option<String>,
    isa: String,
    collective: String,
}

/// A number of bytes, or a size with its unit.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum MirrorMemory {
    Bytes(u64),
    Text(String),
}

/// A list, or one text with commas.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Addresses {
    List(Vec<String>),
    Text(String),
}

impl Default for Addresses {
    fn default() -> Self {
        Self::List(Vec::new())
    }
}

#[derive(Serialize)]
struct Defaults {
    device: &'static str,
    leave_timeout: u32,
    isa: &'static str,
    collective: &'static str,
}

const DEFAULTS: Defaults = Defaults { device: "cpu", leave_timeout: 30, isa: "auto", collective: "auto" };

/// What a shard runs with; checked.
#[derive(Debug, Clone)]
pub struct Config {
    /// Coordinators, in the order in which they are tried.
    pub coordinators: Vec<Uri>,
    /// Device.
    pub device: DeviceConfig,
    /// Where this shard listens for ranks of other hosts.
    pub listen: SocketAddr,
    /// Where they reach it; `None` for where it listens.
    pub advertise: Option<Advertised>,
    /// Proof that it may join; empty for none.
    pub join_token: String,
    /// How coordinators are dialled.
    pub dialer: Dialer,
    /// Longest wait for leave.
    pub leave_timeout: Duration,
    /// Most bytes of copies of other ranks' rows; 0 for no copies, `None` for a share of what is free.
    pub mirror_memory: Option<u64>,
    /// Where they are taken in.
    pub mirror_listen: SocketAddr,
    /// Stable name.
    pub shard_id: String,
    /// Collective; `None` for the fastest that fits.
    pub collective: Option<String>,
    /// Whether to end with the parent process.
    pub exit_with_parent: bool,
    /// Faults, for tests.
    #[cfg(any(debug_assertions, feature = "failpoints"))]
    pub failpoints: Vec<Failpoint>,
}

/// Where others reach this shard.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Advertised {
    /// A name or an address.
    pub host: String,
    /// `None` for the one that is listened on.
    pub port: Option<u16>,
}

impl Advertised {
    /// `HOST:PORT` of a listener on this port.
    pub fn address(&self, listening: u16) -> String {
        let port = self.port.unwrap_or(listening);
        if self.host.contains(':') { format!("[{}]:{port}", self.host) } else { format!("{}:{port}", self.host) }
    }
}

/// An option that can't be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// Help or version was asked for, or the command line can't be parsed.
    #[error(transparent)]
    CommandLine(#[from] clap::Error),
    /// The file, or a value in it.
    #[error("configuration: {0}")]
    Merge(Box<figment::Error>),
    /// A value.
    #[error("--{option} {value}: {reason}")]
    Value {
        /// Name of the flag.
        option: &'static str,
        /// As given.
        value: String,
        /// What is wrong and what would do.
        reason: String,
    },
    /// An option that has no default is not there.
    #[error("--{option} is missing: {hint}")]
    Missing {
        /// Name of the flag.
        option: &'static str,
        /// What to give.
        hint: &'static str,
    },
}

impl Config {
    /// Of a command line (the program's name first), the environment and the file that they name.
    ///
    /// # Errors
    /// Says which option is wrong and what would do.
    pub fn from_args(args: impl IntoIterator<Item = OsString>) -> Result<Self, ConfigError> {
        Self::from_flags(&Flags::try_parse_from(args)?)
    }

    fn from_flags(flags: &Flags) -> Result<Self, ConfigError> {
        let mut figment = Figment::from(Serialized::defaults(DEFAULTS));
        if let Some(file) = &flags.config {
            // figment takes a missing file for an empty one.
            if let Err(error) = std::fs::metadata(file) {
                return Err(value("config", file.display().to_string(), error.to_string()));
            }
            figment = figment.merge(Toml::file_exact(file));
        }
        let merged: Merged = figment
            .merge(Serialized::defaults(flags))
            .extract()
            .map_err(|error| ConfigError::Merge(Box::new(error)))?;
        merged.check(flags)
    }
}

impl Merged {
    fn check(self, flags: &Flags) -> Result<Config, ConfigError> {
        let texts = match self.coordinator {
            Addresses::List(texts) => texts,
            Addresses::Text(text) => text.split(',').map(str::to_owned).collect(),
        };
        let dialer = dialer(self.cluster_ca, self.cluster_cert, self.cluster_key)?;
        let coordinators =
            texts.iter().map(|text| coordinator(text.trim(), dialer.scheme())).collect::<Result<Vec<_>, _>>()?;
        if coordinators.is_empty() {
            let hint = "give the coordinator's gRPC address, such as http://127.0.0.1:50051";
            return Err(ConfigError::Missing { option: "coordinator", hint });
        }
        let cores = || std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let threads = self.threads.unwrap_or_else(cores);
        if !(1..=1024).contains(&threads) {
            return Err(value("threads", threads.to_string(), "want 1 to 1024"));
        }
        let isa = device::isa_of(&self.isa).map_err(|error| value("isa", self.isa.clone(), error.to_string()))?;
        let device = DeviceConfig { name: self.device, threads, isa };
        // A device that is not here should be known before the coordinator counts on it.
        device.open(Precision::Auto).map_err(|error| value("device", device.name.clone(), error.to_string()))?;
        let advertise = self.advertise.as_deref().map(advertised).transpose()?;
        let listen = listen(self.listen.as_deref(), advertise.as_ref())?;
        let mirror_memory = self.mirror_memory.map(mirror_memory).transpose()?;
        let mirror_listen = match self.mirror_listen.as_deref() {
            Some(text) => socket("mirror-listen", text)?,
            None => SocketAddr::new(listen.ip(), 0),
        };
        let join_token = join_token(self.join_token, self.join_token_file)?;
        let kinds: Vec<&str> = collective::KINDS.iter().map(|kind| kind.name).collect();
        let collective = match self.collective.as_str() {
            "auto" => None,
            name if kinds.contains(&name) => Some(self.collective),
            _ => return Err(value("collective", self.collective, format!("want auto, {}", kinds.join(", ")))),
        };
        let shard_id = self.shard_id.unwrap_or_else(crate::host::default_shard_id);
        if shard_id.is_empty() || shard_id.len() > 128 || shard_id.chars().any(|c| c.is_control() || c == '/') {
            let reason = "want 1 to 128 characters without slashes and control characters";
            return Err(value("shard-id", shard_id, reason));
        }
        Ok(Config {
            coordinators,
            device,
            listen,
            advertise,
            join_token,
            dialer,
            leave_timeout: Duration::from_secs(u64::from(self.leave_timeout)),
            mirror_memory,
            mirror_listen,
            shard_id,
            collective,
            exit_with_parent: flags.exit_with_parent,
            #[cfg(any(debug_assertions, feature = "failpoints"))]
            failpoints: flags.failpoint.clone(),
        })
    }
}

fn listen(text: Option<&str>, advertise: Option<&Advertised>) -> Result<SocketAddr, ConfigError> {
    if let Some(text) = text {
        return socket("listen", text);
    }
    Ok(match advertise {
        // The address may be another's that leads here, so all own ones listen.
        Some(advertise) => {
            let port = advertise.port.unwrap_or(0);
            match IpAddr::from_str(&advertise.host) {
                Ok(ip) if ip.is_loopback() => (ip, port).into(),
                Ok(IpAddr::V6(_)) => (Ipv6Addr::UNSPECIFIED, port).into(),
                _ => (Ipv4Addr::UNSPECIFIED, port).into(),
            }
        }
        None => (Ipv4Addr::LOCALHOST, 0).into(),
    })
}

fn socket(option: &'static str, text: &str) -> Result<SocketAddr, ConfigError> {
    SocketAddr::from_str(text).map_err(|_| value(option, text, "want ADDRESS:PORT, such as 10.0.0.5:7000"))
}

fn mirror_memory(size: MirrorMemory) -> Result<u64, ConfigError> {
    match size {
        MirrorMemory::Bytes(bytes) => Ok(bytes),
        MirrorMemory::Text(text) if text.trim() == "0" => Ok(0),
        MirrorMemory::Text(text) => match ByteSize::from_str(&text) {
            Ok(ByteSize(bytes)) => Ok(bytes),
            Err(reason) => Err(value("mirror-memory", text, reason)),
        },
    }
}

fn advertised(text: &str) -> Result<Advertised, ConfigError> {
    let wrong = || value("advertise", text, "want HOST or HOST:PORT, such as 10.0.0.5, gpu1:7000 or [fd00::5]:7000");
    let (host, port) = if let Ok(ip) = IpAddr::from_str(text.trim_matches(['[', ']'])) {
        (ip.to_string(), None)
    } else {
        match text.rsplit_once(':') {
            Some((host, port)) => {
                (host.trim_matches(['[', ']']).to_owned(), Some(port.parse::<u16>().map_err(|_| wrong())?))
            }
            None => (text.to_owned(), None),
        }
    };
    let is_address = IpAddr::from_str(&host).is_ok_and(|ip| !ip.is_unspecified());
    let is_name = !host.is_empty()
        && host.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_'))
        && IpAddr::from_str(&host).is_err();
    if !(is_address || is_name) || port == Some(0) {
        return Err(wrong());
    }
    Ok(Advertised { host, port })
}

fn join_token(token: Option<String>, file: Option<PathBuf>) -> Result<String, ConfigError> {
    match (token, file) {
        (Some(_), Some(file)) => {
            Err(value("join-token-file", file.display().to_string(), "give it or --join-token, not both"))
        }
        (Some(token), None) => Ok(token),
        (None, Some(file)) => match std::fs::read_to_string(&file) {
            Ok(text) if text.trim().is_empty() => {
                Err(value("join-token-file", file.display().to_string(), "the file is empty"))
            }
            Ok(text) => Ok(text.trim().to_owned()),
            Err(error) => Err(value("join-token-file", file.display().to_string(), error.to_string())),
        },
        (None, None) => Ok(String::new()),
    }
}

fn dialer(ca: Option<PathBuf>, certificate: Option<PathBuf>, key: Option<PathBuf>) -> Result<Dialer, ConfigError> {
    let refused = |ClusterTlsError { option, value, reason }| ConfigError::Value { option, value, reason };
    match ClusterTls::read(ca, certificate, key).map_err(refused)? {
        Some(tls) => Dialer::with_certificates(&tls.ca, &tls.certificate, &tls.key)
            .map_err(|error| refused(tls.unusable(with_causes(&error)))),
        None => Ok(Dialer::default()),
    }
}

fn coordinator(text: &str, scheme: &str) -> Result<Uri, ConfigError> {
    let wrong = |reason: String| value("coordinator", text.to_owned(), reason);
    let uri = Uri::from_str(text).map_err(|error| wrong(format!("{error}: want {scheme}://HOST:PORT")))?;
    match (uri.scheme_str(), uri.port_u16()) {
        (Some(given), Some(_)) if given == scheme => Ok(uri),
        (Some("https"), Some(_)) => {
            Err(wrong("needs --cluster-ca, --cluster-cert and --cluster-key; without them want http://".to_owned()))
        }
        (Some("http"), Some(_)) => Err(wrong("want https://HOST:PORT, because --cluster-ca is given".to_owned())),
        _ => Err(wrong(format!("want {scheme}://HOST:PORT"))),
    }
}

fn value(option: &'static str, value: impl Into<String>, reason: impl Into<String>) -> ConfigError {
    ConfigError::Value { option, value: value.into(), reason: reason.into() }
}

impl ConfigError {
    /// Prints the error, or the help that was asked for. Returns whether it was help.
    pub fn print(&self) -> bool {
        match self {
            Self::CommandLine(error) => {
                // Nothing can be done where the terminal is gone.
                let _gone = error.print();
                matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion)
            }
            error => {
                eprintln!("shard: {error}");
                false
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;

    fn config(args: &[&str]) -> Result<Config, ConfigError> {
        Config::from_args(std::iter::once("shard").chain(args.iter().copied()).map(OsString::from))
    }

    fn refused(args: &[&str]) -> String {
        config(args).expect_err("the options are wrong").to_string()
    }

    const JOIN: &str = "--coordinator=http://127.0.0.1:50051";

    #[test]
    fn defaults_are_filled_in() {
        let config = config(&[JOIN, "--threads", "3"]).expect("good options");
        assert_eq!(config.coordinators, ["http://127.0.0.1:50051"]);
        assert_eq!(config.device, DeviceConfig { name: "cpu".into(), threads: 3, isa: None });
        assert_eq!(config.listen.port(), 0);
        assert_eq!(config.collective, None);
    }

    #[test]
    fn flags_win_over_the_file() {
        let mut file = tempfile::NamedTempFile::new().expect("a file");
        write!(file, "coordinator = 'http://a:1,http://b:2'\nthreads = 1\nshard_id = 'file'\n").expect("written");
        let path = file.path().to_str().expect("a path");
        let merged = config(&["--config", path, "--threads", "2"]).expect("good options");
        assert_eq!(merged.coordinators, ["http://a:1", "http://b:2"]);
        assert_eq!(merged.device.threads, 2);
        assert_eq!(merged.shard_id, "file");
    }

    #[test]
    fn unknown_keys_and_files_are_refused() {
        let mut file = tempfile::NamedTempFile::new().expect("a file");
        writeln!(file, "thraeds = 1").expect("written");
        let path = file.path().to_str().expect("a path");
        assert!(refused(&[JOIN, "--config", path]).contains("thraeds"));
        assert!(refused(&[JOIN, "--config", "/does/not/exist.toml"]).contains("exist.toml"));
        assert!(refused(&[JOIN, "--thraeds", "1"]).contains("thraeds"));
    }

    #[test]
    fn coordinators_are_separated_or_repeated() {
        let both = config(&[JOIN, "--coordinator", "http://a:1,http://b:2"]).expect("good options");
        assert_eq!(both.coordinators, ["http://127.0.0.1:50051", "http://a:1", "http://b:2"]);
    }

    #[test]
    fn what_is_advertised_is_listened_for() {
        let with = |args: &[&str]| {
            let config = config(&[&[JOIN], args].concat()).expect("good options");
            (config.listen.to_string(), config.advertise.map(|advertised| advertised.address(9)))
        };
        assert_eq!(with(&[]), ("127.0.0.1:0".into(), None));
        assert_eq!(with(&["--advertise", "gpu-1.lan"]), ("0.0.0.0:0".into(), Some("gpu-1.lan:9".into())));
        assert_eq!(with(&["--advertise", "10.0.0.5:7000"]), ("0.0.0.0:7000".into(), Some("10.0.0.5:7000".into())));
        assert_eq!(with(&["--advertise", "127.0.0.1"]), ("127.0.0.1:0".into(), Some("127.0.0.1:9".into())));
        assert_eq!(with(&["--advertise", "[fd00::5]:7000"]), ("[::]:7000".into(), Some("[fd00::5]:7000".into())));
        assert_eq!(with(&["--advertise", "fd00::5"]), ("[::]:0".into(), Some("[fd00::5]:9".into())));
        let both = ["--advertise", "nat:80", "--listen", "10.0.0.5:7000"];
        assert_eq!(with(&both), ("10.0.0.5:7000".into(), Some("nat:80".into())));
        assert_eq!(with(&["--listen", "0.0.0.0:7000"]), ("0.0.0.0:7000".into(), None));
    }

    #[test]
    fn a_join_token_comes_from_one_place() {
        let mut file = tempfile::NamedTempFile::new().expect("a file");
        writeln!(file, " s3cret ").expect("written");
        let path = file.path().to_str().expect("a path");
        assert_eq!(config(&[JOIN, "--join-token-file", path]).expect("good options").join_token, "s3cret");
        assert_eq!(config(&[JOIN, "--join-token", "x"]).expect("good options").join_token, "x");
        assert_eq!(config(&[JOIN]).expect("good options").join_token, "");
        assert!(refused(&[JOIN, "--join-token", "x", "--join-token-file", path]).contains("not both"));
        assert!(refused(&[JOIN, "--join-token-file", "/does/not/exist"]).contains("/does/not/exist"));
        let empty = tempfile::NamedTempFile::new().expect("a file");
        assert!(refused(&[JOIN, "--join-token-file", empty.path().to_str().expect("a path")]).contains("empty"));
    }

    #[test]
    fn mirrors_have_a_size_and_an_address() {
        let with = |args: &[&str]| {
            let config = config(&[&[JOIN], args].concat()).expect("good options");
            (config.mirror_memory, config.mirror_listen.to_string())
        };
        assert_eq!(with(&[]), (None, "127.0.0.1:0".into()));
        assert_eq!(with(&["--mirror-memory", "0"]), (Some(0), "127.0.0.1:0".into()));
        assert_eq!(
            with(&["--mirror-memory", "2GiB", "--listen", "10.0.0.5:7000"]),
            (Some(2 << 30), "10.0.0.5:0".into())
        );
        assert_eq!(with(&["--mirror-listen", "10.0.0.5:7001"]), (None, "10.0.0.5:7001".into()));
        assert!(refused(&[JOIN, "--mirror-memory", "many"]).contains("512MiB"));
        assert!(refused(&[JOIN, "--mirror-listen", "here"]).contains("ADDRESS:PORT"));
    }

    #[test]
    fn bad_values_say_what_would_do() {
        assert!(refused(&[]).contains("--coordinator is missing"));
        assert!(refused(&["--coordinator", "127.0.0.1:1"]).contains("want http://HOST:PORT"));
        assert!(refused(&["--coordinator", "http://host"]).contains("want http://HOST:PORT"));
        assert!(refused(&["--coordinator", "https://host:1"]).contains("needs --cluster-ca"));
        assert!(refused(&[JOIN, "--cluster-ca", "/does/not/exist"]).contains("--cluster-cert and --cluster-key"));
        assert!(refused(&[JOIN, "--threads", "0"]).contains("1 to 1024"));
        assert!(refused(&[JOIN, "--device", "cuda:0"]).contains("no CUDA backend"));
        assert!(refused(&[JOIN, "--isa", "sse"]).contains("sse"));
        assert!(refused(&[JOIN, "--collective", "pigeon"]).contains("shm"));
        assert!(refused(&[JOIN, "--listen", "here"]).contains("ADDRESS:PORT"));
        assert!(refused(&[JOIN, "--shard-id", "a/b"]).contains("slashes"));
        for address in ["0.0.0.0", "a:b:c", "host:", "host:0", "http://host", "[::]:7000"] {
            assert!(refused(&[JOIN, "--advertise", address]).contains("HOST:PORT"), "{address}");
        }
        #[cfg(any(debug_assertions, feature = "failpoints"))]
        assert!(refused(&[JOIN, "--failpoint", "step:1:explode"]).contains("no failpoint"));
    }
}
